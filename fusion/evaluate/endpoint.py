"""One question to a chat model behind an OpenAI-compatible address."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fusion.endpoint import Passing, Server
from fusion.errors import RecipeError


@dataclass(frozen=True)
class Endpoint(Server):
    """A server that is asked in conversations; `max_tokens` is the longest reply. See `fusion.endpoint.Server` for the rest."""

    route: ClassVar[str] = "chat/completions"
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens <= 0:
            raise RecipeError(f"max_tokens is {self.max_tokens}", todo="Give a number above 0.")

    def ask(self, messages: Sequence[Mapping[str, str]], stop: threading.Event | None = None) -> str:
        """The reply to a conversation, at temperature 0 where the model allows it.

        FusionError when it refuses or all tries failed; Stopped when `stop` was set meanwhile.
        """
        body = {"messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        return self.post(body, _content, optional=("temperature", "max_tokens"), stop=stop)


def _content(reply: bytes) -> str:
    """The text of the first choice."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Passing("its answer is not one of the OpenAI chat format") from error
    if not isinstance(content, str):
        raise Passing("its answer holds no text")
    return content.encode("utf-8", "replace").decode()  # half of a surrogate pair could not be written to a file
