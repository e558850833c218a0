"""Where an answer ends: by a token that the tokenizer, the config or the template names, or by the label of the next speaker.

A model without a chat template reads lines "User: … Assistant: …" and goes on writing both; so does one whose template marks
turns by plain words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fusion.errors import CheckpointError
from fusion.template import ChatTemplate, stand_ins

ROLES = ("User", "Assistant", "System")
_LONGEST_LABEL = 40
_TAIL = 32  # tokens that surely hold a label
_ORNAMENT = re.compile(r"[\s#*>]")


def turn_end(template: ChatTemplate | None) -> int | None:
    """The special token that the template sets right after an answer, if there is one."""
    if template is None or "<|channel|>" in template.text:  # there an answer has several messages, and this ends each
        return None
    return _special(template, _between(template)[1])


def text_end(template: ChatTemplate | None) -> TextEnd | None:
    """How a turn of somebody else begins in words; None where a token ends an answer."""
    if template is None:
        return TextEnd((*(f"{role}:" for role in ROLES), *(f"{role.upper()}:" for role in ROLES)))
    before, after = _between(template)
    if _special(template, after) is not None or not _label(after):
        return None
    return TextEnd(tuple(filter(None, (_label(after), _label(before)))))


def _between(template: ChatTemplate) -> tuple[str, str]:
    """What stands between a question and its answer, and between that and the next question; "" when it cannot be rendered."""
    names = stand_ins(3)
    roles = ("user", "assistant", "user")
    try:
        text = template.render([{"role": role, "content": name} for role, name in zip(roles, names, strict=True)])
    except CheckpointError:  # the prompt says so when it is rendered
        return "", ""
    asked, answered = (text.rpartition(name) for name in names[:2])
    return asked[2].partition(names[1])[0] if asked[1] else "", answered[2].partition(names[2])[0] if answered[1] else ""


def _special(template: ChatTemplate, text: str) -> int | None:
    tokenizer = template.tokenizer
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
