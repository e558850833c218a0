"""Which names a page answers to: a web page elsewhere may give its own name the address of this machine (DNS rebinding), and
the browser then takes this app for a part of it, but the name still stands in the Host header."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^:\[\]/@\s]+)(?::\d*)?")


class KnownHosts:
    """ASGI middleware that refuses every request whose Host is not one of `names`, whatever the port."""

    def __init__(self, app: ASGIApp, names: Iterable[str]):
        self.app, self.names = app, frozenset(filter(None, map(host_of, names)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if scope["type"] == "lifespan" or (len(given) == 1 and host_of(given[0]) in self.names):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse("This page answers to this machine's own names alone. Behind a proxy, start the app with "
                                    "--allow-host NAME; for strangers, with --public.\n", status_code=403)(scope, receive, send)


def host_of(text: str) -> str:
    """The host that a Host header, an address or a name means, without its port; "" for what is none."""
    text = urlsplit(text).netloc if "://" in text else text
    text = f"[{text}]" if re.fullmatch(r"[0-9a-fA-F:.%]*:[0-9a-fA-F:.%]*:[0-9a-fA-F:.%]*", text) else text  # a bare IPv6 address
    found = _HOST.fullmatch(text)
    return found[1].lower().rstrip(".") if found else ""
