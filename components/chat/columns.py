"""What stands above and around a column: its letter and colour, the line about its answer, and which model stands in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from components.state import COLORS, LETTERS, Selection
from fusion.chat import Reply
from fusion.errors import RecipeError

MIN_COLUMNS, MAX_COLUMNS = 2, 4
BADGES = {"length": "stopped by length", "stopped": "stopped", "error": "error"}


def letter(i: int) -> str:
    """The coloured letter of column i, as HTML."""
    return (f'<span class="fc-letter fc-{LETTERS[i].lower()}" style="--c:{COLORS[i]}" aria-hidden="true">'
            f"{LETTERS[i]}</span>")


def header(role: str, reply: Reply | None) -> str:
    """The line under a model's name: its role, then what its last answer is doing or has cost; all text escaped."""
    parts = [f'<span class="fc-role">{escape(role)}</span>'] if role else []
    if reply is None:
        return _line(parts, [])
    if not reply.finish and not reply.tokens:
        return _line(parts, [f'<span class="fc-busy">{escape(reply.status)}</span>'])
    right = []
    if reply.tokens:
        right.append(f'<span class="fc-stats">{reply.tokens:,} tok · {reply.tokens_per_s:,.1f} tok/s</span>')
    if reply.finish in BADGES:
        right.append(f'<span class="fc-badge fc-{reply.finish}">{BADGES[reply.finish]}</span>')
    return _line(parts, right, [f'<p class="fc-note">{escape(note)}</p>' for note in reply.notes])


def _line(left: Sequence[str], right: Sequence[str], below: Sequence[str] = ()) -> str:
    return (f'<div class="fc-head">{"".join(left)}<span class="fc-right">{"".join(right)}</span></div>'
            f'{"".join(below)}')


def spoken(i: int, title: str, reply: Reply) -> str:
    """How a screen reader hears that column i has finished."""
    how = BADGES.get(reply.finish, "finished")
    return f"{LETTERS[i]}, {title}: {how}, {reply.tokens} tokens."


def default_keys(selection: Selection) -> list[str | None]:
    """The models of the four columns on a first visit: newest merge, first two sources, pivot, then whatever is left."""
    newest = [selection.merges[-1].key] if selection.merges else []
    wanted = dict.fromkeys([*newest, *selection.sources[:2], selection.pivot, *selection.chat_keys()])
    keys: list[str | None] = [key for key in wanted if key][:MAX_COLUMNS]
    return keys + [None] * (MAX_COLUMNS - len(keys))


def next_keys(selection: Selection, keys: Sequence[str | None], seen: Sequence[str]) -> list[str | None]:
    """The models of the columns after the selection changed; `seen` are the merges that were known before.

    A new merge takes the first column, in place of an older merge or by moving the others on; models that are still
    there stay where they are, and empty columns are filled.
    """
    known = selection.chat_keys()
    kept = [key if key in known else None for key in keys]
    if not any(kept):
        return default_keys(selection)
    merges = [merge.key for merge in selection.merges]
    new = next((key for key in reversed(merges) if key not in seen), None)
    if new:
        rest = [key for key in (kept[1:] if kept[0] in merges else kept) if key != new]
        kept = ([new, *rest] + [None] * MAX_COLUMNS)[:MAX_COLUMNS]
    spare = iter([key for key in default_keys(selection) if key and key not in kept])
    return [key or next(spare, None) for key in kept]


def checked_keys(selection: Selection, keys: Sequence[str | None], count: object) -> list[str]:
    """The models of the visible columns; raises RecipeError for a number of columns or a key that does not exist."""
    if isinstance(count, bool) or not isinstance(count, int) or not MIN_COLUMNS <= count <= MAX_COLUMNS:
        raise RecipeError(f"{count!r} columns", todo=f"Choose {MIN_COLUMNS} to {MAX_COLUMNS}.")
    known = selection.chat_keys()
    if not known:
        raise RecipeError("There are no models to talk to", todo="Choose a pivot and sources first.")
    chosen = [(i, key) for i, key in enumerate(keys[:count]) if key]
    for i, key in chosen:
        if key not in known:
            raise RecipeError(f"Column {LETTERS[i]} has a model that is not there any more", todo="Choose another one.")
    if not chosen:
        raise RecipeError("No column has a model", todo="Choose one in each column.")
    return [key for _, key in chosen]
