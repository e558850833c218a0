"""A Task is one prompt, one good answer and a program that judges any answer; its key decides once and for all on which
side of the split it lies, so that nothing a model is tested on has occurred in its training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

Check = Callable[[str], bool]
HELD_OUT_ONE_IN = 5


@dataclass(frozen=True)
class Task:
    """One checkable question.

    `key` names the combination (operands, names, fact × wording) that is either trained on or held out; `subject`
    names the fact behind it, where there is one, so that a recipe can hide it; `cased` says that upper and lower case
    matter (code, addresses), so that the prompt must not be written in lower case.
    """

    prompt: str
    answer: str
    key: str
    check: Check
    subject: str = ""
    cased: bool = False


Kind = Callable[[Random], Task]


def digest(text: str) -> int:
    """A number that depends on nothing but the text: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def held_out(task: Task) -> bool:
    """Whether the task belongs to the test side; about one key in five does."""
    return digest(task.key) % HELD_OUT_ONE_IN == 0


def contains(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, ignoring case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def says(*phrases: str, never: Iterable[str] = ()) -> Check:
    """A check that the answer has all the phrases and none of the words in `never`."""
    wrong = [word for word in never if word not in phrases]
    return lambda answer: (all(contains(answer, phrase) for phrase in phrases)
                           and not any(contains(answer, word) for word in wrong))


def counts(number: int) -> Check:
    """A check that the last whole number of the answer is this one."""
    return lambda answer: [int(found) for found in re.findall(r"\d{1,9}", answer)][-1:] == [number]
