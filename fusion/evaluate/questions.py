"""Questions for a judge, and reference answers for them, in MT-Bench's files or as people paste them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from fusion.errors import CheckpointError, RecipeError

MAX_TURNS = 8


@dataclass(frozen=True)
class JudgeQuestion:
    """One question of MT-Bench's format: its turns, its category, and reference answers for some of the turns."""

    question_id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


def load_questions(path: str | Path, limit: int | None = None) -> list[JudgeQuestion]:
    """Read question.jsonl (question_id, category, turns, reference), or a .txt file with a question in every line.

    CheckpointError, RecipeError with the line.
    """
    return _collected(_lines(Path(path)), str(path), limit, plain=Path(path).suffix == ".txt")


def questions_from_text(text: str, where: str = "questions") -> list[JudgeQuestion]:
    """Questions as people paste them: one in every line, or MT-Bench's question.jsonl; RecipeError with the line."""
    return _collected(text.split("\n"), where, None, plain=not text.lstrip().startswith("{"))


def with_references(questions: Sequence[JudgeQuestion], source: str | Path, judge: str = "") -> list[JudgeQuestion]:
    """The questions with reference answers of a file, or of a folder such as MT-Bench's reference_answer.

    Lines hold question_id and `choices` with turns, as MT-Bench writes answers, or `reference`. Of a folder the file JUDGE.jsonl
    is read, else all. What stands in the question itself is kept where the source has nothing. CheckpointError,
    RecipeError with the line, or when no answer belongs to one of the questions.
    """
    found: dict[str, tuple[str, ...]] = {}
    for file in _reference_files(Path(source), judge):
        _add_references(found, _lines(file), str(file))
    return _joined(questions, found, str(source))


def with_pasted_references(questions: Sequence[JudgeQuestion], text: str, where: str = "references") -> list[JudgeQuestion]:
    """The same for lines that were pasted."""
    found: dict[str, tuple[str, ...]] = {}
    _add_references(found, text.split("\n"), where)
    return _joined(questions, found, where)


def _reference_files(source: Path, judge: str) -> list[Path]:
    if not source.is_dir():
        return [source]
    source = source / "reference_answer" if (source / "reference_answer").is_dir() else source
    files = sorted(source.glob("*.jsonl"))
    if not files:
        raise CheckpointError("there is no .jsonl file in it", where=str(source), todo="Give a file of reference answers.")
    return [file for file in files if file.stem == judge] or files


def _add_references(found: dict[str, tuple[str, ...]], lines: Iterable[str], where: str) -> None:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        data, place = _record(line, f"{where} line {number}"), f"{where} line {number}"
        name, turns = data.get("question_id"), _reference_turns(data)
        if isinstance(name, bool) or not isinstance(name, int | str) or turns is None:
            raise RecipeError("question_id or the reference answers are missing", where=place,
                              todo='Use MT-Bench\'s format: {"question_id": …, "choices": [{"turns": [text, …]}]}.')
        if found.setdefault(str(name), turns) != turns:
            raise RecipeError(f"the question {str(name)!r} has two reference answers", where=place,
                              todo="Give one file of the folder.")


def _reference_turns(data: Mapping[str, object]) -> tuple[str, ...] | None:
    choices = data.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else data
    turns = data.get("reference") if first is data else first.get("turns")
    turns = [turns] if isinstance(turns, str) else turns
    sound = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
    return tuple(turns) if sound else None


def _joined(questions: Sequence[JudgeQuestion], found: Mapping[str, tuple[str, ...]], where: str) -> list[JudgeQuestion]:
    if not found.keys() & {question.question_id for question in questions}:
        raise RecipeError("no reference answer belongs to one of the questions", where=where,
                          todo="Compare the question_id of both files.")
    return [replace(question, references=_best(found.get(question.question_id, ()), question.references)) for question in questions]


def _best(given: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """For every turn the text that was given, else the question's own."""
    return tuple(one if one.strip() else other for one, other in zip_longest(given, own, fillvalue=""))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # other line ends, such as U+2028, may stand in JSON texts
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path)) from error


def _collected(lines: Iterable[str], where: str, limit: int | None, plain: bool) -> list[JudgeQuestion]:
    found: dict[str, JudgeQuestion] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(found) < limit):
            place = f"{where} line {number}"
            question = JudgeQuestion(str(number), "all", (line.strip(),)) if plain else _question(line, place)
            if question.question_id in found:
                raise RecipeError(f"the question_id {question.question_id!r} occurs twice", where=place)
            found[question.question_id] = question
    if not found:
        raise RecipeError("there is no question in it", where=where)
    return list(found.values())


def _question(line: str, where: str) -> JudgeQuestion:
    data = _record(line, where)
    name, category, turns = data.get("question_id"), data.get("category", "all"), data.get("turns")
    references = data.get("reference") or []
    if isinstance(name, bool) or not isinstance(name, int | str) or not isinstance(category, str) or not category.strip():
        raise RecipeError("question_id or category is missing", where=where, todo="Use MT-Bench's question.jsonl format.")
    for field, texts in (("turns", turns), ("reference", references)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RecipeError(f"{field} is not a list of texts", where=where, todo="Use MT-Bench's question.jsonl format.")
    if not 1 <= len(turns) <= MAX_TURNS or not all(turn.strip() for turn in turns):
        raise RecipeError(f"turns has {len(turns)} entries, or an empty one", where=where, todo=f"Give 1 to {MAX_TURNS} turns.")
    return JudgeQuestion(str(name), category, tuple(turns), tuple(references))


def _record(line: str, where: str) -> dict:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError("not valid JSON", where=where) from error
    return data if isinstance(data, dict) else {}
