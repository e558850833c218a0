"""One question to a chat model behind an OpenAI-compatible address."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fusion.endpoint import Passing, Server
from fusion.errors import RecipeError

_LENGTHS = ("max_tokens", "max_completion_tokens")  # OpenAI's reasoning models know only the second


@dataclass(frozen=True)
class Said:
    """A reply: its text, "" when it holds none, and how it ended, in the server's word: "stop", "length", …"""

    text: str
    finish: str


@dataclass(frozen=True)
class Endpoint(Server):
    """A server that is asked in conversations; `max_tokens` is the longest reply. See `fusion.endpoint.Server` for the rest."""

    route: ClassVar[str] = "chat/completions"
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens <= 0:
            raise RecipeError(f"max_tokens is {self.max_tokens}", todo="Give a number above 0.")

    def reply(self, messages: Sequence[Mapping[str, str]], stop: threading.Event | None = None) -> Said:
        """The reply to a conversation, at temperature 0 where the model allows it.

        FusionError when it refuses or all tries failed; Stopped when `stop` was set meanwhile.
        """
        body = {"messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        return self.post(body, _said, optional=("temperature", *_LENGTHS), stop=stop)

    def ask(self, messages: Sequence[Mapping[str, str]], stop: threading.Event | None = None) -> str:
        """The text of `reply`."""
        return self.reply(messages, stop).text

    def fields(self, body: Mapping[str, object]) -> dict[str, object]:
        """The limit under the name that the server takes."""
        limit, other = _LENGTHS
        renamed = {**body, other: body[limit]} if limit in self._refused and limit in body else body
        return super().fields(renamed)


def _said(reply: bytes) -> Said:
    """The first choice; one without words is a reply too: a reasoning model that was cut within its thoughts has none."""
    try:
        choice = json.loads(reply)["choices"][0]
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Passing("its answer is not one of the OpenAI chat format") from error
    if isinstance(content, list):  # some send parts, thoughts among them
        content = "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
                          and part.get("type", "text") == "text")
    text = content if isinstance(content, str) else ""
    return Said(text.encode("utf-8", "replace").decode(), str(finish or ""))  # half a surrogate pair fits into no file
