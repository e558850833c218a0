"""Dialogues to fuse on: ShareGPT-style and OpenAI-style files or a Hub dataset in, checked dialogues and a report out.

    dialogues, report = load("mixture.json")
    print(report)                                  # what was dropped, how often, and where it occurred first

A dialogue here is what a model can be taught from: perhaps a system prompt, then user and assistant in turns. Nothing is
repaired silently; what does not fit is dropped and counted under its reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusion.errors import CheckpointError, RecipeError

_ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
          "bot": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}
_FILES = (".json", ".jsonl", ".parquet")


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


def load(source: str, *, split: str = "train", limit: int | None = None) -> tuple[list[Dialogue], Report]:
    """Read dialogues from a file (.json, .jsonl, .parquet), a folder of such files, or a Hub dataset "org/name[@revision]".

    `split` of a Hub dataset; `limit` stops after so many kept dialogues. Raises CheckpointError when nothing can be read,
    RecipeError when no record is a dialogue.
    """
    report, kept = Report(), []
    for origin, record in _records(source, split):
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
    messages = _messages(record)
    if messages is None:
        report.note("no messages: neither `conversations` (from, value) nor `messages` (role, content)", origin)
        return None
    if any(role is None for role, _ in messages):
        report.note("an unknown role", origin)
        return None
    system = ""
    if messages and messages[0][0] == "system":
        system, messages = messages[0][1].strip(), messages[1:]
    if messages and messages[0][0] != "user":
        report.note("a first message that is not the user's (that message was left out)", origin)
        messages = messages[1:]
    if [role for role, _ in messages] != ["user", "assistant"] * (len(messages) // 2) + ["user"] * (len(messages) % 2):
        report.note("roles that do not take turns", origin)
        return None
    if len(messages) % 2:
        report.note("a last user message without an answer (that message was left out)", origin)
        messages = messages[:-1]
    if not messages:
        report.note("nothing left to learn from", origin)
        return None
    if any(not text.strip() for _, text in messages):
        report.note("an empty message", origin)
        return None
    texts = [text for _, text in messages]
    return Dialogue(tuple(zip(texts[::2], texts[1::2], strict=True)), system, origin)


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


def _messages(record: object) -> list[tuple[str | None, str]] | None:
    if not isinstance(record, Mapping):
        return None
    for key, role, text in (("conversations", "from", "value"), ("messages", "role", "content"),
                            ("conversations", "role", "content"), ("conversation", "role", "content")):
        found = record.get(key)
        if isinstance(found, Sequence) and not isinstance(found, str) and found and all(
                isinstance(entry, Mapping) and isinstance(entry.get(role), str) and isinstance(entry.get(text), str)
                for entry in found):
            return [(_ROLES.get(entry[role].strip().lower()), entry[text]) for entry in found]
    return None


def _records(source: str, split: str) -> Iterator[tuple[str, object]]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _FILES)
        if not files:
            raise CheckpointError("there is no .json, .jsonl or .parquet file in it", where=source)
        for file in files:
            yield from _file(file)
    elif path.exists():
        yield from _file(path)
    elif path.suffix in _FILES or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError("there is no such file or folder", where=source, todo="Give a .json, .jsonl or .parquet file.")
    else:
        yield from _hub(source, split)


def _file(path: Path) -> Iterator[tuple[str, object]]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path.name} line {number}", _json(line, f"{path.name} line {number}")
        else:
            data = _json(path.read_text(encoding="utf-8"), path.name)
            records = data if isinstance(data, list) else next((v for v in data.values() if isinstance(v, list)), [data]) \
                if isinstance(data, dict) and _messages(data) is None else [data]
            yield from ((f"{path.name} record {number}", record) for number, record in enumerate(records, 1))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path)) from error


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON ({str(error)[:200]})", where=where) from error


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CheckpointError("reading Parquet needs pyarrow", where=str(path), todo="Run pip install pyarrow.") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=512):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", record
    except ArrowException as error:
        raise CheckpointError(f"not a sound Parquet file ({str(error)[:200]})", where=str(path)) from error


def _hub(source: str, split: str) -> Iterator[tuple[str, object]]:
    try:
        import datasets
    except ImportError as error:
        raise CheckpointError("reading a Hub dataset needs the package datasets", where=source,
                              todo="Run pip install datasets, or give a local file.") from error
    name, _, revision = source.partition("@")
    try:
        found = datasets.load_dataset(name, split=split, revision=revision or None)
    except Exception as error:  # the border to datasets and the Hub, which raise many kinds
        raise CheckpointError(f"this dataset cannot be loaded ({str(error)[:200]})", where=source,
                              todo="Give a local file, or org/name[@revision] of a public dataset.") from error
    yield from ((f"{name} {split} {number}", record) for number, record in enumerate(found, 1))
