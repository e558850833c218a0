"""Right or wrong by program: prompts whose answers a function can check, put to any number of models.

    scores, records = finish(measure({"pivot": "assets/demo/pivot"}, questions))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.errors import RecipeError, nearest
from fusion.evaluate.answering import answer
from fusion.evaluate.models import Models, fingerprints, lend
from fusion.evaluate.scores import Scores
from fusion.progress import Meter, Work

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A prompt of a domain, and the program that says whether an answer is right."""

    domain: str
    prompt: str
    check: Callable[[str], bool]


def of_domains(questions: Sequence[Question], domains: Sequence[str]) -> list[Question]:
    """The questions of some domains; RecipeError for a domain that has none."""
    known = dict.fromkeys(question.domain for question in questions)
    for domain in domains:
        if domain not in known:
            raise RecipeError(f"there is no domain {str(domain)[:40]!r}", todo=nearest(str(domain)[:40], known))
    return [question for question in questions if question.domain in domains]


def measure(models: Models, questions: Sequence[Question],
            max_new_tokens: int = MAX_NEW_TOKENS) -> Work[tuple[Scores, list[dict]]]:
    """Ask every model every question, greedy, each in a conversation of its own; yields Progress.

    `models`: name → folder or Hub id, or a model that is Lent. Returns the scores (1 right, 0 wrong) and a record per answer.
    """
    if not questions:
        raise RecipeError("there is no question", todo="Ask for at least one prompt per domain.")
    fingerprints(models)
    shape = len(models), len(questions)
    right, truncated, records = np.zeros(shape), np.zeros(shape, bool), []
    meter = Meter("Asking", len(models) * len(questions), "prompts")
    conversations = [[{"role": "user", "content": question.prompt}] for question in questions]
    for row, (name, ref) in enumerate(models.items()):
        yield meter.step(note=name)
        with lend(ref, name) as model:
            given = yield from answer(model, conversations, max_new_tokens, meter)
        for i, (question, reply) in enumerate(zip(questions, given, strict=True)):
            right[row, i], truncated[row, i] = question.check(reply.text), reply.truncated
            records.append({"model": name, "domain": question.domain, "prompt": question.prompt, "reply": reply.text,
                            "right": bool(right[row, i]), "finish": reply.finish, "tokens": reply.tokens,
                            **({"thought": reply.thought} if reply.thought else {})})
    scores = Scores("Right answers to held-out prompts", tuple(models), tuple(str(i) for i in range(len(questions))),
                    tuple(question.domain for question in questions), right, truncated, right_or_wrong=True, unit="%", scale=100)
    return scores, records
