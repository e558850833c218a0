"""Where an answer ends: by a token that the tokenizer, the config or the template names, or by the label of the next speaker.

A model without a chat template reads lines "User: … Assistant: …" and goes on writing both; so does one whose template marks
turns by plain words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusion.chat.template import template_of

ROLES = ("User", "Assistant", "System")
_LONGEST_LABEL = 40
_TAIL = 32  # tokens that surely hold a label
_ORNAMENT = re.compile(r"[\s#*>]")


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the template sets right after an answer, if there is one."""
    template = template_of(tokenizer)
    if template is None or "<|channel|>" in template.source:  # there an answer has several messages, and this ends each
        return None
    return _special(tokenizer, template.after_answer())


def text_end(tokenizer: Any) -> TextEnd | None:
    """How a turn of somebody else begins in words; None where a token ends an answer."""
    template = template_of(tokenizer)
    if template is None:
        return TextEnd((*(f"{role}:" for role in ROLES), *(f"{role.upper()}:" for role in ROLES)))
    between = template.after_answer()
    if _special(tokenizer, between) is not None:
        return None
    labels = [label for text in (between, template.after_question()) if (label := _label(text))]
    return TextEnd(tuple(labels)) if _label(between) else None


def _special(tokenizer: Any, text: str) -> int | None:
    ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"] if text.strip() else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _label(between: str) -> str:
    """The first line of words that stand on lines of their own between two turns; "" for anything else."""
    lines = between.strip().splitlines()
    own_line = "\n" in between[:len(between) - len(between.lstrip())]
    return lines[0].strip() if lines and own_line and 1 < len(lines[0].strip()) <= _LONGEST_LABEL else ""


@dataclass(frozen=True)
class TextEnd:
    """The labels of other turns, such as "User:"; one at the beginning of a line ends an answer."""

    labels: tuple[str, ...]

    @cached_property
    def _pattern(self) -> re.Pattern:
        names = "|".join(rf"{re.escape(label.removesuffix(':').strip())}\**[^\S\n]*{':' * label.endswith(':')}"
                         for label in self.labels)
        return re.compile(rf"(?:\A|\n)[^\S\n]*(?:[#*>]+[^\S\n]*)?(?:{names})")

    def place(self, text: str) -> int | None:
        """Where the answer ends in this text; a label of the answerer in front of everything ends nothing."""
        for found in self._pattern.finditer(text):
            if text[:found.start()].strip() or "assistant" not in found[0].lower():
                return found.start()
        return None

    def reached(self, decode: Callable[[list[int]], str], ids: Sequence[int]) -> bool:
        """Whether the last of these tokens end an answer."""
        tail = decode(list(ids[-_TAIL:]))
        return self.place(tail if len(ids) <= _TAIL else f".{tail}") is not None

    def safe(self, text: str) -> str:
        """What can be shown of a text that is being written: no label, and no last line that may become one."""
        if self.place(text) is not None:
            return self.whole(text, "stop")
        before, _, last = text.rpartition("\n")
        begun = _ORNAMENT.sub("", last)
        return before.rstrip() if any(_ORNAMENT.sub("", label).startswith(begun) for label in self.labels) else text

    def whole(self, text: str, finish: str) -> str:
        """A finished text: cut at the label, also where the last token allowed wrote all of one but its colon."""
        end = self.place(text)
        if end is None and finish != "stop":
            end = self.place(f"{text}:")
        return text if end is None else text[:end].rstrip()
