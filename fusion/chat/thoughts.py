"""What a reasoning model thought, told apart from what it says: pure text in, pure text out.

    split("<think>2 + 2 …</think>It is 4.")        # (Part("2 + 2 …", thought=True), Part("It is 4."))
    split("2 + 2 …</think>It is 4.", "…<think>\\n")  # the same: the template had opened the thought

A thought that was cut has no end: the rest of the text belongs to it. Marks inside code are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MESSAGE = r"(?:(?:(?!<\|channel\|>)[^\n]){0,80}?<\|message\|>)?"
_FINAL = rf"(?:<\|start\|>\s*assistant\s*)?<\|channel\|>\s*final{_MESSAGE}"
_ANALYSIS = rf"(?:<\|start\|>\s*assistant\s*)?<\|channel\|>\s*(?:analysis|commentary){_MESSAGE}"
_MARKS = (  # how a thought begins and how it ends
    *((f"<{tag}>", f"</{tag}>") for tag in ("think", "thinking", "thoughts?", "reasoning", "reflection", "seed:think")),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (_ANALYSIS, rf"<\|end\|>|(?={_FINAL})|(?={_ANALYSIS})"),  # gpt-oss
    (r"<\|channel>thought\b", r"<channel\|>"),  # Gemma 4
    (r"<unused94>thought\b", r"<unused95>"),  # MedGemma
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # Sky-T1, OpenThinker
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command A
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    ("◁think▷", "◁/think▷"),  # Kimi
)
_BEGIN = re.compile("|".join(f"(?P<_{i}>{begin})" for i, (begin, _) in enumerate(_MARKS)), re.IGNORECASE)
_ENDS = [re.compile(end, re.IGNORECASE) for _, end in _MARKS]
_LONE_END = re.compile("|".join(end for begin, end in _MARKS if begin != _ANALYSIS), re.IGNORECASE)
_AROUND_ANSWERS = re.compile(rf"{_FINAL}|<\|(?:begin|end)_of_solution\|>|<\|(?:START|END)_RESPONSE\|>")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n(?:.*?\n)??\s*?\1[`~]*[^\S\n]*$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")


@dataclass(frozen=True)
class Part:
    """A piece of a reply: a thought or words for the person; `closed` is False for a thought without an end."""

    text: str
    thought: bool = False
    closed: bool = True


def split(text: str, prompt: str = "") -> tuple[Part, ...]:
    """The parts of a reply in order; `prompt` is the rendered text before it, which may have opened a thought.

    A reply without thoughts is one part, exactly as it was written.
    """
    pieces = list(_pieces(text, prompt))
    if len(pieces) == 1 and not pieces[0].thought and not _outside_code(_AROUND_ANSWERS, text):
        return (Part(text),)
    tidy = (Part(piece.text.strip(), True, piece.closed) if piece.thought else Part(_answer(piece.text)) for piece in pieces)
    return tuple(part for part in tidy if part.text.strip() or not part.closed)


def spoken(text: str, prompt: str = "") -> str:
    """The reply without its thoughts."""
    return "\n\n".join(part.text for part in split(text, prompt) if not part.thought)


def thought(text: str, prompt: str = "") -> str:
    """The thoughts of a reply without its answer."""
    return "\n\n".join(part.text for part in split(text, prompt) if part.thought)


def opened(prompt: str) -> int | None:
    """Which mark a rendered prompt leaves open at its end; None for most."""
    ends = [found for found in _BEGIN.finditer(prompt) if not prompt[found.end():].strip()]
    return _kind(ends[-1]) if ends else None


def _pieces(text: str, prompt: str):
    kind, at = opened(prompt), 0
    if kind is not None:
        begin = _BEGIN.match(text, len(text) - len(text.lstrip()))  # some write once more what the template wrote
        at = begin.end() if begin else 0
    elif end := _orphan(text):
        yield Part(text[:end.start()], True)
        at = end.end()
    while True:
        if kind is None:
            begin = _outside_code(_BEGIN, text, at)
            yield Part(text[at:begin.start() if begin else None])
            if begin is None:
                return
            kind, at = _kind(begin), begin.end()
        end = _ENDS[kind].search(text, at)
        yield Part(text[at:end.start() if end else None], True, end is not None)
        if end is None:
            return
        kind, at = None, end.end()


def _orphan(text: str) -> re.Match | None:
    """The end of a thought whose beginning was never written."""
    end, begin = _outside_code(_LONE_END, text), _outside_code(_BEGIN, text)
    return end if end and not (begin and begin.start() < end.start()) else None


def _kind(begin: re.Match) -> int:
    return int(begin.lastgroup[1:])


def _outside_code(mark: re.Pattern, text: str, at: int = 0) -> re.Match | None:
    found = mark.search(text, at)
    if found is None:
        return None
    code = [span.span() for pattern in (_FENCE, _SPAN) for span in pattern.finditer(text)]
    while found and any(start < found.start() < end for start, end in code):
        found = mark.search(text, found.end())
    return found


def _answer(text: str) -> str:
    return _AROUND_ANSWERS.sub("", text).strip("\n")
