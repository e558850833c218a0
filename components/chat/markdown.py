"""What a model wrote, as Markdown that shows all of it: code, tables and formulas as such, everything else as it was written.

The chat window takes HTML in Markdown for HTML: tags vanish, and pictures are fetched from whoever they belong to. Outside of code
their first letters are therefore written as entities, in a spelling of their own, so that `original` can take them back.
"""

from __future__ import annotations

import re
from functools import lru_cache

from markdown_it import MarkdownIt

_ENTITIES = {"<": "&#x0003C;", "&": "&#x00026;", "[": "&#x0005B;", " ": "&#x000A0;", "\\": "&#x0005C;",
             "`": "&#x00060;"}
_LETTERS = {entity: letter for letter, entity in _ENTITIES.items()}
ESCAPED = re.compile("|".join(_LETTERS))  # the same as in layout.py's script
_AUTOLINK = r"<(?:https?://|mailto:)[^\s<>]*>"
_ESCAPES = r"\\+(?=<|&#?\w+;)"  # one of these would take the letter of an entity for itself
_MARKUP = re.compile(rf"{_AUTOLINK}|{_ESCAPES}|<|&(?=#?\w+;)|(?<=!)\[|\[(?=!\[)")
_INDENT = re.compile(rf"(?<=\n)[ \t]+|{_MARKUP.pattern}")  # spaces that Markdown would drop
_MERMAID = re.compile(r"^(\s*[`~]{3,}\s*mermaid)\s*$")
_FORMULA = r"\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]"
_TICKS = re.compile(rf"{_FORMULA}|\\.|(?P<ticks>`+)", re.DOTALL)
_CELL = re.compile(r"(?<!\\)\|")
_NO_CODE = re.compile(r"\n[ \t]{0,3}<")  # the chat window begins HTML here, whatever stands around it
_PARSER = MarkdownIt("commonmark", {"html": False, "inline_definitions": True}).enable("table")


def original(text: str) -> str:
    """The text that `as_written` was given."""
    return ESCAPED.sub(lambda found: _LETTERS[found[0]], text)


@lru_cache(1024)
def as_written(text: str) -> str:
    """Markdown for the chat window that shows this text and fetches nothing."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    kinds = _kinds(text, len(lines))
    shown, at = [], 0
    while at < len(lines):
        end = at + 1
        while end < len(lines) and kinds[end] == kinds[at]:
            end += 1
        shown.append(_block(kinds[at][0], lines[at:end]))
        at = end
    return "\n".join(shown)


def _kinds(text: str, count: int) -> list[tuple[str, int]]:
    """For each line what kind of block it belongs to, and where that begins."""
    kinds, before = [("", 0)] * count, None
    for token in _PARSER.parse(text):
        if token.map and token.type in ("inline", "fence", "code_block", "definition"):
            plain = before is not None and before.type == "paragraph_open" and before.level == 0
            start, end = token.map
            cell = before is not None and before.type in ("th_open", "td_open")
            kinds[start:end] = [("paragraph" if plain else "cells" if cell else token.type, start)] * (end - start)
        before = token
    return kinds[:count]


def _block(kind: str, lines: list[str]) -> str:
    if kind == "fence":  # a program of the page's would draw the diagram, and fetch what it names
        return "\n".join([_MARKUP.sub(_entity, _MERMAID.sub(rf"\1 {_ENTITIES[' ']}", lines[0])), *lines[1:]])
    if kind == "code_block":
        return "\n".join(lines)
    if kind == "paragraph":
        return _inline("\n" + "\n".join(lines), _INDENT)[1:]
    text = _inline("\n".join(lines), _MARKUP, _CELL if kind == "cells" else _NO_CODE)
    # A definition is the address of links: nothing of it would be shown.
    return text.replace("[", _ENTITIES["["], 1) if kind == "definition" else text


def _inline(text: str, markup: re.Pattern, ends: re.Pattern = _NO_CODE) -> str:
    """The text of one block with its markup as entities, except inside of `code`, which does not reach over `ends`."""
    shown, start, at = [], 0, 0
    while found := _TICKS.search(text, at):
        at = found.end()
        end = found["ticks"] and re.compile(rf"(?<!`){found['ticks']}(?!`)").search(text, at)
        if end:
            cut = ends.search(text, at, end.start())
            at = at if cut else end.end()
            kept = _ENTITIES["`"] * len(found[0]) if cut else text[found.start():at]
            shown += [markup.sub(_entity, text[start:found.start()]), kept]
            start = at
    return "".join([*shown, markup.sub(_entity, text[start:])])


def _entity(found: re.Match) -> str:
    if found[0].isspace():
        return _ENTITIES[" "] * len(found[0].expandtabs(4))
    if found[0][0] == "\\":
        return _ENTITIES["\\"] * len(found[0])
    return _ENTITIES.get(found[0], found[0])
