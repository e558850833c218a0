"""What a handler may stream: Gradio's page gets every later value as a difference from the one before and edits that in place, so
what a later yield leaves out is lost where the page has not drawn it yet (a tab that was never opened, a page that is behind)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import gradio as gr
from gradio.blocks import Block

TYPED = {"chat-prompt"}  # a person types there meanwhile, so its value is given once


def streams(page: gr.Blocks) -> Iterator[Any]:
    """Every event of a page whose handler yields."""
    yield from (event for event in page.fns.values()
                if inspect.isgeneratorfunction(event.fn) or inspect.isasyncgenfunction(event.fn))


def watch(page: gr.Blocks) -> list[str]:
    """Look at what all handlers of a page stream from now on; the list fills with what they lose."""
    wrong: list[str] = []
    for event in streams(page):
        event.fn = watched(event.fn, event.outputs, wrong)
    return wrong


def watched(handler: Any, outputs: Sequence[Block], wrong: list[str]) -> Any:
    """A handler that streams the same and notes in `wrong` what it loses."""
    name = getattr(handler, "__qualname__", str(handler))

    @wraps(handler)
    def plain(*values, **more):
        seen = Stream(name, outputs, wrong)
        for given in handler(*values, **more):
            seen.add(given)
            yield given

    @wraps(handler)
    async def waiting(*values, **more):
        seen = Stream(name, outputs, wrong)
        async for given in handler(*values, **more):
            seen.add(given)
            yield given

    return waiting if inspect.isasyncgenfunction(handler) else plain


class Stream:
    """The properties that one run of a handler has given to each of its outputs."""

    def __init__(self, name: str, outputs: Sequence[Block], wrong: list[str]):
        self.name, self.outputs, self.wrong = name, outputs, wrong
        self.given: dict[int, set[str]] = {}

    def add(self, values: Any) -> None:
        """Note one yield: a list with a value for every output or a dict with some of them."""
        if isinstance(values, dict) and all(isinstance(part, Block) for part in values):
            pairs = list(values.items())
        else:
            pairs = list(zip(self.outputs, values if len(self.outputs) > 1 else [values], strict=True))
        for part, value in pairs:
            if isinstance(part, gr.State):  # it stays on the server
                continue
            keys = properties(value) | ({"value"} if part.elem_id in TYPED else set())
            if lost := self.given.get(part._id, set()) - keys:
                self.wrong.append(f"{self.name}: {part.elem_id or part} loses {', '.join(sorted(lost))}")
            self.given.setdefault(part._id, set()).update(keys)


def properties(value: Any) -> set[str]:
    """Which properties of a component a yielded value sets: none for gr.skip()."""
    if isinstance(value, Block):
        return set(value.constructor_args)
    if isinstance(value, dict) and value.get("__type__") == "update":
        return set(value) - {"__type__"}
    return {"value"}
