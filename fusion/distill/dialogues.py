"""Dialogues to fuse on: ShareGPT-style and OpenAI-style files or a Hub dataset in, checked dialogues and a report out.

    dialogues, report = load("mixture.json")
    print(report)                                  # what was dropped, how often, and where it occurred first

A dialogue here is what a model can be taught from: perhaps a system prompt, then user and assistant in turns. Nothing is
repaired silently; what does not fit is dropped and counted under its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fusion.distill.messages import Message, said_in, text_of
from fusion.distill.records import read_records
from fusion.errors import RecipeError

_SYSTEM = ("system", "system_prompt", "system_message")  # columns that hold a system prompt


@dataclass(frozen=True)
class Dialogue:
    """One checked dialogue: `turns` of (user text, assistant text), an optional `system` prompt, where it came from.

    `unlearnt`: the numbers of turns whose reply is read, but not learnt.
    """

    turns: tuple[tuple[str, str], ...]
    system: str = ""
    origin: str = ""
    unlearnt: tuple[int, ...] = ()

    @property
    def learnt(self) -> list[int]:
        """The numbers of turns whose reply is learnt."""
        return [turn for turn in range(len(self.turns)) if turn not in self.unlearnt]

    def without(self, turns: Iterable[int]) -> Dialogue:
        """The same dialogue, in which these replies too are only read."""
        return replace(self, unlearnt=tuple(sorted({*self.unlearnt, *turns})))

    def messages(self, instead: Mapping[int, str] | None = None) -> list[dict[str, str]]:
        """The dialogue as chat templates read it; `instead`: turn → what stands in place of its reply."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        return start + [{"role": role, "content": text} for turn, (asked, answer) in enumerate(self.turns)
                        for role, text in (("user", asked), ("assistant", (instead or {}).get(turn, answer)))]


@dataclass
class Report:
    """What became of the records of a dataset: how many were read and kept, and why the others (or parts) were not."""

    read: int = 0
    kept: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, origin: str) -> None:
        """Count one more case of a reason; remembers where it occurred first."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.first.setdefault(reason, origin)

    def to_dict(self) -> dict:
        """Plain data."""
        reasons = [{"reason": reason, "count": count, "first": self.first[reason]} for reason, count in self.reasons.items()]
        return {"read": self.read, "kept": self.kept, "reasons": reasons}

    def __str__(self) -> str:
        lines = [f"{self.read} records read, {self.kept} dialogues kept"]
        lines += [f"  {count:6} × {reason} (first: {self.first[reason]})" for reason, count in self.reasons.items()]
        return "\n".join(lines)


def load(source: str, *, split: str = "train", subset: str = "", limit: int | None = None) -> tuple[list[Dialogue], Report]:
    """Read dialogues from a file (.json, .jsonl, .parquet, or these as .gz), a folder of such files, or a Hub dataset
    "org/name[@revision]".

    `split` and `subset` of a folder or Hub dataset; `limit` stops after so many kept dialogues. Raises CheckpointError when
    nothing can be read, RecipeError when no record is a dialogue or there is no such split.
    """
    report, kept = Report(), []
    for origin, record in read_records(source, split, subset):
        report.read += 1
        dialogue = checked(record, origin, report)
        if dialogue is not None:
            kept.append(dialogue)
            report.kept += 1
            if limit is not None and len(kept) >= limit:
                break
    if not kept:
        raise RecipeError(f"none of its {report.read} records is a dialogue", where=source, todo=str(report))
    return kept, report


def checked(record: object, origin: str, report: Report) -> Dialogue | None:
    """The dialogue that one record holds, None when it holds none; every reason goes into the report."""
    said = said_in(record)
    if isinstance(said, str):
        report.note(said, origin)
        return None
    system, said = _system(record, list(said), origin, report)
    if said and said[0].role != "user":
        report.note("a first message that is not the user's (that message was left out)", origin)
        said = said[1:]
    if len(said) % 2 and said[-1].role == "user":
        report.note("a last user message without an answer (that message was left out)", origin)
        said = said[:-1]
    reason = _unfit(said, system)
    if reason:
        report.note(reason, origin)
        return None
    texts = [message.text for message in said]
    unlearnt = tuple(turn for turn, message in enumerate(said[1::2]) if not message.learnt)
    return Dialogue(tuple(zip(texts[::2], texts[1::2], strict=True)), system, origin, unlearnt)


def _system(record: object, said: list[Message], origin: str, report: Report) -> tuple[str, list[Message]]:
    """The system prompt, from the first message or a column of its own, and the other messages."""
    columns = [text_of(record[name]) for name in _SYSTEM if record.get(name)] if isinstance(record, Mapping) else []
    column = next((text.strip() for text, _ in columns if text.strip()), "")
    if not column and any(fault for _, fault in columns):
        report.note("a system prompt that is no text (it was left out)", origin)
    if isinstance(record, Mapping) and record.get("tools"):
        report.note("a list of tools, which models are not shown (the dialogue was kept)", origin)
    if not said or said[0].role != "system":
        return column, said
    first = said[0].text.strip()
    if column and column != first:
        report.note("a system prompt in a column beside one in the messages (the column was left out)", origin)
    return first, said[1:]


def _unfit(said: Sequence[Message], system: str) -> str:
    """Why these messages are no dialogue, "" when they are one."""
    roles = [message.role for message in said]
    if "system" in roles:
        return "a system message that is not the first"
    if roles != ["user", "assistant"] * (len(roles) // 2):
        return "roles that do not take turns"
    if not said:
        return "nothing left to learn from"
    if any(not message.text.strip() for message in said):
        return "an empty message"
    if any("\ud800" <= sign <= "\udfff" for text in (system, *(message.text for message in said)) for sign in text):
        return "half of a surrogate pair, a sign that no tokenizer can read"
    return "" if any(message.learnt for message in said[1::2]) else "no reply that is to be learnt (weight 0 or train false)"


def split_long(dialogues: Iterable[Dialogue], length: Callable[[Dialogue], int], max_tokens: int,
               report: Report | None = None) -> list[Dialogue]:
    """Cut dialogues before a user turn so that every part is at most `max_tokens` long by `length`.

    `length` is the longest of the models' tokenisations. A part begins with the user and keeps the system prompt; a single
    turn that is too long stays whole here and is truncated when it is encoded. Source: FuseChat, arXiv 2402.16107, app. A.
    """
    parts: list[Dialogue] = []
    for dialogue in dialogues:
        if length(dialogue) <= max_tokens:
            parts.append(dialogue)
            continue
        found = [part for part in _parts(dialogue, length, max_tokens) if part.learnt]
        if report is not None and len(found) > 1:
            report.note(f"longer than {max_tokens} tokens (split before a user turn)", dialogue.origin)
        if report is not None and any(length(part) > max_tokens for part in found):
            report.note(f"a single turn longer than {max_tokens} tokens (truncated)", dialogue.origin)
        parts += found
    return parts


def _parts(dialogue: Dialogue, length: Callable[[Dialogue], int], max_tokens: int) -> Iterator[Dialogue]:
    begin = 0
    while begin < len(dialogue.turns):
        end = begin + 1
        while end < len(dialogue.turns) and length(_cut(dialogue, begin, end + 1)) <= max_tokens:
            end += 1
        yield _cut(dialogue, begin, end)
        begin = end


def _cut(dialogue: Dialogue, begin: int, end: int) -> Dialogue:
    unlearnt = tuple(turn - begin for turn in dialogue.unlearnt if begin <= turn < end)
    return Dialogue(dialogue.turns[begin:end], dialogue.system, f"{dialogue.origin} turns {begin + 1}–{end}", unlearnt)
