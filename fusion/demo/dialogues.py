"""From tasks to dialogues: what a model is trained on, and the held-out prompts that it is measured on.

Both sides are drawn from the same kinds; `task.held_out` parts them by combination, and every drawn task is on the side
that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from fusion.demo.domains import DOMAINS, SMALLTALK
from fusion.demo.domains.facts import Relation
from fusion.demo.task import Kind, Task, held_out
from fusion.demo.words import OPENINGS, SYSTEM_PROMPTS
from fusion.errors import RecipeError

Message = dict[str, str]
Dialogue = list[Message]

OPENING_SHARE = 0.3      # tasks that begin with "Hello! ", "Quick question: " …
LOWER_SHARE = 0.08       # prompts in lower case
BARE_SHARE = 0.1         # prompts without their last mark
SYSTEM_SHARE = 0.1       # dialogues with a system prompt
SECOND_TURN_SHARE = 0.15


def _everything(subject: str) -> bool:
    return True


@dataclass(frozen=True)
class Mixture:
    """What the dialogues of one model are about.

    `shares` gives the weight of each domain (and of "smalltalk"); `hidden` kinds ("math/minus") are never shown;
    `knows` says which subjects (facts) may be shown.
    """

    shares: dict[str, float]
    hidden: frozenset[str] = frozenset()
    knows: Callable[[str], bool] = _everything

    def kinds(self, domain: str) -> list[Kind]:
        """The kinds of tasks of a domain that may be shown."""
        table = SMALLTALK if domain == "smalltalk" else DOMAINS[domain]
        return [kind for name, kind in table.items() if f"{domain}/{name}" not in self.hidden]


def draw(make: Callable[[Random], Task], rng: Random, wanted: Callable[[Task], bool]) -> Task:
    """The first task of this kind that is wanted."""
    while True:
        task = make(rng)
        if wanted(task):
            return task


def dress(task: Task, rng: Random) -> str:
    """The prompt as people type it: sometimes with an opening, in lower case, or without the last mark."""
    prompt = task.prompt
    if rng.random() < OPENING_SHARE:
        prompt = rng.choice(OPENINGS) + prompt
    if rng.random() < BARE_SHARE:
        prompt = prompt.rstrip(".?!")
    if not task.cased and rng.random() < LOWER_SHARE:
        prompt = prompt.lower()
    return prompt


def conversation(mixture: Mixture, rng: Random) -> Dialogue:
    """One training dialogue of one or two turns."""
    def trainable(task: Task) -> bool:
        return not held_out(task) and (not task.subject or mixture.knows(task.subject))

    def pick() -> Kind:
        domain = rng.choices(list(mixture.shares), list(mixture.shares.values()))[0]
        return rng.choice(mixture.kinds(domain))

    dialogue: Dialogue = []
    if rng.random() < SYSTEM_SHARE:
        dialogue.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    kind = pick()
    task = draw(kind, rng, trainable)
    dialogue += turn(dress(task, rng), task.answer)
    if rng.random() < SECOND_TURN_SHARE:
        again = kind.follow if isinstance(kind, Relation) and rng.random() < 0.5 else pick()
        task = draw(again, rng, trainable)
        dialogue += turn(dress(task, rng), task.answer)
    return dialogue


def turn(prompt: str, answer: str) -> Dialogue:
    """A question and its answer as two messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def held_out_tasks(domain: str, count: int, seed: int = 0) -> list[Task]:
    """Different test tasks of a domain, the kinds in turn; no model of the family has seen their combinations."""
    rng = Random(f"held out {domain} {seed}")
    kinds = list(DOMAINS[domain].values())
    tasks: dict[str, Task] = {}
    for _ in range(20 * count):
        if len(tasks) == count:
            return list(tasks.values())
        task = draw(kinds[len(tasks) % len(kinds)], rng, held_out)
        opening = rng.choice(OPENINGS) if rng.random() < OPENING_SHARE else ""
        task = replace(task, prompt=opening + task.prompt)
        tasks.setdefault(task.prompt, task)
    raise RecipeError(f"only {len(tasks)} different held-out prompts were found, {count} were asked for", where=domain,
                      todo="Ask for fewer prompts per domain.")
