"""A model behind an OpenAI-compatible address: one question at a time, asked again when the network or the server stumbles."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

from fusion.errors import FusionError, RecipeError, Stopped

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_REPLY_BYTES = 8 << 20
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_WAIT_S = 60.0
_TOO_LONG = re.compile(r"context (?:length|window)|too (?:large|long)", re.IGNORECASE)  # such a limit is known, but not kept
T = TypeVar("T")


class Passing(Exception):
    """A failure that may be over in a moment; `wait_s` is what the server asked for."""

    def __init__(self, text: str, wait_s: float = 0.0):
        super().__init__(text)
        self.wait_s = wait_s


class Refused(FusionError):
    """The server does not answer such a request, whenever it is asked; `status` is its HTTP status."""

    def __init__(self, found: str, status: int, *, where: str, todo: str):
        super().__init__(found, where=where, todo=todo)
        self.status = status


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key belongs to the address that was given and is sent nowhere else."""

    def redirect_request(self, *_) -> None:
        return None


@dataclass(frozen=True)
class Server:
    """`base_url` such as https://api.openai.com/v1, the model's name there, and how patiently it is asked.

    `tries` per question, waiting `backoff_s`, then twice as long each time; `concurrency` questions at once. The key comes
    from the environment variable OPENAI_API_KEY and is never shown or stored. Raises RecipeError for an address that is none.
    """

    route: ClassVar[str] = "completions"
    base_url: str
    model: str
    timeout_s: float = 120.0
    tries: int = 6
    backoff_s: float = 1.0
    concurrency: int = 4
    _refused: set[str] = field(default_factory=set, repr=False, compare=False, kw_only=True)

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
            raise RecipeError("the model has no name", where=self.base_url, todo="Name the model that the server shall use.")
        for name in ("timeout_s", "tries", "concurrency"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}", todo="Give a number above 0.")

    @property
    def address(self) -> str:
        """Where questions are sent."""
        base = self.base_url.rstrip("/")
        return base if base.endswith(f"/{self.route}") else f"{base}/{self.route}"

    def post(self, body: Mapping[str, object], read: Callable[[bytes], T], *, optional: Collection[str] = (),
             max_reply_bytes: int = MAX_REPLY_BYTES, stop: threading.Event | None = None) -> T:
        """What `read` makes of the reply to a request; `read` raises Passing for a reply that is worth another try.

        Fields named in `optional` are left out for good once the server says that it does not take them. Raises Refused when
        it answers with an error that will not pass, FusionError when all tries failed, Stopped when `stop` was set meanwhile.
        """
        stop, wait, reason = stop or threading.Event(), self.backoff_s, ""
        for tried in range(self.tries):
            if tried:
                stop.wait(wait)
            if stop.is_set():
                raise Stopped("stopped while a server was asked", where=self.base_url)
            try:
                return read(self._once({"model": self.model, **body}, optional, max_reply_bytes))
            except Passing as failed:
                reason = str(failed)
                wait = min(_LONGEST_WAIT_S, max(self.backoff_s * 2 ** tried, failed.wait_s))
        raise FusionError(f"no answer after {self.tries} tries ({reason})", where=self.base_url,
                          todo="Run the same command again later: it continues where it stopped.")

    def fields(self, body: Mapping[str, object]) -> dict[str, object]:
        """What is sent of a request: all that the server has not refused so far."""
        return {name: value for name, value in body.items() if name not in self._refused}

    def _once(self, body: Mapping[str, object], optional: Collection[str], max_reply_bytes: int) -> bytes:
        body = self.fields(body)
        key = os.environ.get(KEY_VARIABLE, "")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_s) as response:
                return response.read(max_reply_bytes)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, [name for name in optional if name in body], key) from error
        except (OSError, HTTPException) as error:
            raise Passing(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _refusal(self, error: urllib.error.HTTPError, optional: Collection[str], key: str) -> Exception:
        """What a status other than 200 means."""
        said = ""
        with contextlib.suppress(OSError, HTTPException):
            said = error.read(2000).decode("utf-8", "replace")
        if key:
            said = said.replace(key, "…")
        odd = [] if _TOO_LONG.search(said) else [name for name in optional if name in said]
        if error.code == 400 and odd:  # some models know neither
            self._refused.update(odd)
            return Passing(f"it does not take {' and '.join(odd)}")
        if error.code in _PASSING:
            return Passing(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After")))
        todo = f"Set {KEY_VARIABLE}." if error.code in (401, 403) else "Check the address and the model's name."
        return Refused(f"the server answers HTTP {error.code} ({said[:300]})", error.code, where=self.base_url, todo=todo)


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
