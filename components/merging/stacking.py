"""Layer stacking as people write it, `A 0-2` a row, both ways, and a picture of the stack that comes out."""

from __future__ import annotations

import re
from html import escape

from components.state import COLORS, INKS, LETTERS, Stack
from fusion import RecipeError

_PART = re.compile(r"(pivot|[A-H])\s+([0-9]{1,6})(?:\s*[-–]\s*([0-9]{1,6}))?", re.IGNORECASE)
_MAX_CHARS = 10_000
_MAX_ROWS = 400


def parse_stack(text: str, targets: tuple[str, ...]) -> Stack:
    """The slices that a text means, layers counted from 0 and both ends included; RecipeError names the row that is wrong."""
    if len(text) > _MAX_CHARS or text.count("\n") > _MAX_ROWS:
        raise RecipeError("there are too many rows", where="Stack layers", todo="Write a recipe file instead.")
    keys = {"PIVOT": "pivot", **dict(zip(LETTERS, targets, strict=False))}
    slices = []
    for number, row in enumerate(text.splitlines(), 1):
        parts = []
        for words in row.split(",") if row.strip() else ():
            found = _PART.fullmatch(words.strip())
            if found is None or found[1].upper() not in keys:
                known = ", ".join(["pivot", *LETTERS[:len(targets)]])
                raise RecipeError(f"row {number}: {words.strip()[:40]!r} is no run of layers", where="Stack layers",
                                  todo=f"Write it like A 0-2, with one of {known}.")
            start, last = int(found[2]), int(found[3] or found[2])
            if last < start:
                raise RecipeError(f"row {number}: layer {last} stands before layer {start}", where="Stack layers",
                                  todo="Write the lower layer first.")
            parts.append((keys[found[1].upper()], start, last + 1))
        if len({key for key, _, _ in parts}) < len(parts):
            raise RecipeError(f"row {number}: a model is named twice", where="Stack layers", todo="Name each once in a row.")
        if parts:
            slices.append(tuple(parts))
    return tuple(slices)


def write_stack(slices: Stack, targets: tuple[str, ...]) -> str:
    """The text of slices; models that are no longer picked are left out."""
    letters = {"pivot": "pivot", **dict(zip(targets, LETTERS, strict=False))}
    rows = (", ".join(f"{letters[key]} {start}-{end - 1}" for key, start, end in one if key in letters) for one in slices)
    return "\n".join(row for row in rows if row)


def picture(slices: Stack, targets: tuple[str, ...], titles: tuple[str, ...]) -> str:
    """The stack as bars, first layer on top, one colour a model."""
    if not slices:
        return ""
    names = {"pivot": "pivot", **dict(zip(targets, titles, strict=True))}
    rows, at = [], 0
    for one in slices:
        count = one[0][2] - one[0][1]
        bars = "".join(_bar(key, start, end, names.get(key, key), targets) for key, start, end in one)
        label = f"{at}" if count == 1 else f"{at}–{at + count - 1}"
        rows.append(f"<div class='fs-slice'><b>{label}</b><span>{bars}</span></div>")
        at += count
    said = f"role='img' aria-label='The result has {at} layers'"
    return f"<div class='fs-stack' {said}>{''.join(rows)}<p>{at} layers in all</p></div>"


def _bar(key: str, start: int, end: int, name: str, targets: tuple[str, ...]) -> str:
    color, ink = ("var(--neutral-500)", "#fff") if key == "pivot" else (COLORS[targets.index(key)], INKS[targets.index(key)]) \
        if key in targets else ("#999", "#000")
    layers = f"{start}" if end - start == 1 else f"{start}–{end - 1}"
    return f"<i style='background:{color};color:{ink}'>{escape(name)} {layers}</i>"
