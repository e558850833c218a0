"""One question to a chat model behind an OpenAI-compatible address, asked again when the network or the server stumbles."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.parse import urlsplit

from fusion.errors import FusionError, RecipeError, Stopped

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_REPLY_BYTES = 8 << 20
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_WAIT_S = 60.0


class _Passing(Exception):
    """A failure that may be over in a moment; `wait_s` is what the server asked for."""

    def __init__(self, text: str, wait_s: float = 0.0):
        super().__init__(text)
        self.wait_s = wait_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key belongs to the address that was given and is sent nowhere else."""

    def redirect_request(self, *_) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """`base_url` such as https://api.openai.com/v1, the model's name there, and how patiently it is asked.

    `tries` per question, waiting `backoff_s`, then twice as long each time; `concurrency` questions at once. The key comes
    from the environment variable OPENAI_API_KEY and is never shown or stored. Raises RecipeError for an address that is none.
    """

    base_url: str
    model: str
    timeout_s: float = 120.0
    tries: int = 6
    backoff_s: float = 1.0
    concurrency: int = 4
    max_tokens: int = 2048
    _refused: set[str] = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            parts, sound = None, False
        if not sound:
            raise RecipeError(f"{self.base_url!r} is no address of a server", todo="Give one like https://api.openai.com/v1.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise RecipeError("an address with a password, a query or a fragment is not taken",
                              todo=f"Put the key into the environment variable {KEY_VARIABLE}.")
        if not self.model.strip():
            raise RecipeError("the judge has no name", todo="Name the model that the server shall use.")
        for name in ("timeout_s", "tries", "concurrency", "max_tokens"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}", todo="Give a number above 0.")

    @property
    def address(self) -> str:
        """Where questions are sent."""
        base = self.base_url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def ask(self, messages: Sequence[Mapping[str, str]], stop: threading.Event | None = None) -> str:
        """The reply to a conversation, at temperature 0 where the model allows it.

        FusionError when it refuses or all tries failed; Stopped when `stop` was set meanwhile.
        """
        stop, wait, reason = stop or threading.Event(), self.backoff_s, ""
        for tried in range(self.tries):
            if tried:
                stop.wait(wait)
            if stop.is_set():
                raise Stopped("the judging was stopped")
            try:
                return self._once(messages)
            except _Passing as failed:
                reason = str(failed)
                wait = min(_LONGEST_WAIT_S, max(self.backoff_s * 2 ** tried, failed.wait_s))
        raise FusionError(f"no answer after {self.tries} tries ({reason})", where=self.base_url,
                          todo="Run the same command again later: it continues where it stopped.")

    def _once(self, messages: Sequence[Mapping[str, str]]) -> str:
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        body = {name: value for name, value in body.items() if name not in self._refused}
        key = os.environ.get(KEY_VARIABLE, "")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_s) as response:
                return _content(response.read(MAX_REPLY_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, body, key) from error
        except (OSError, HTTPException) as error:
            raise _Passing(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _refusal(self, error: urllib.error.HTTPError, body: Mapping, key: str) -> Exception:
        """What a status other than 200 means."""
        said = ""
        with contextlib.suppress(OSError, HTTPException):
            said = error.read(2000).decode("utf-8", "replace")
        if key:
            said = said.replace(key, "…")
        odd = [name for name in ("temperature", "max_tokens") if name in body and name in said]
        if error.code == 400 and odd:  # some models know neither
            self._refused.update(odd)
            return _Passing(f"it does not take {' and '.join(odd)}")
        if error.code in _PASSING:
            return _Passing(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After")))
        todo = f"Set {KEY_VARIABLE}." if error.code in (401, 403) else "Check the address and the model's name."
        return FusionError(f"the server answers HTTP {error.code} ({said[:300]})", where=self.base_url, todo=todo)


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0


def _content(reply: bytes) -> str:
    """The text of the first choice."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _Passing("its answer is not one of the OpenAI chat format") from error
    if not isinstance(content, str):
        raise _Passing("its answer holds no text")
    return content.encode("utf-8", "replace").decode()  # half of a surrogate pair could not be written to a file
