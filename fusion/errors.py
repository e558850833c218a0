"""Everything a person can cause ends in a FusionError: what was found, where, what to do.

    FusionError
    ├── CheckpointError   a model folder that cannot be read: missing, truncated, lying, quantised, not finite …
    ├── MismatchError     models that cannot be merged with each other: shapes, names, vocabulary …
    ├── RecipeError       a request that makes no sense: unknown name, bad number, no targets …
    ├── OutputError       a result that cannot be written: folder exists, read-only …
    ├── ResourceError     not enough disk or memory, predicted or met
    └── Stopped           the person asked for the work to stop

Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and line end


class FusionError(Exception):
    """A problem the person can solve; `str(error)` says what was found, where, and what to do."""

    def __init__(self, found: str, *, where: str | None = None, todo: str | None = None):
        self.found, self.where, self.todo = found, where, todo
        text = f"{where}: {found}" if where else found
        super().__init__(printable(f"{text.rstrip('.')}. {todo}" if todo else text))


class CheckpointError(FusionError):
    """A checkpoint folder that cannot be read."""


class MismatchError(FusionError):
    """Checkpoints that cannot be merged with each other."""


class RecipeError(FusionError):
    """A recipe, option or name that makes no sense."""


class OutputError(FusionError):
    """A result that cannot be written where it was asked for."""


class ResourceError(FusionError):
    """Too little disk or memory for the work."""


class Stopped(FusionError):
    """The work was stopped on request; nothing is left behind."""


def printable(text: str) -> str:
    """Text from elsewhere without control characters, which could steer a terminal: they are shown as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, or list them: the `todo` of an error about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    shown = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
    return f"Known: {shown}." if known else "There is nothing to choose from."
