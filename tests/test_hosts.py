"""A page for its owner answers to this machine's names alone, a public one to every name."""

from __future__ import annotations

import asyncio

import pytest

import app
from components.hosts import host_of


def answered(host: str | None, *options: str, kind: str = "http") -> bool:
    """Whether a request with this Host reaches the app behind what `python app.py OPTIONS` puts before it."""
    reached, sent = [], []

    async def behind(scope, receive, send):
        reached.append(scope)

    async def send(message):
        sent.append(message)

    whole = behind
    for guard in app.guards(app.options(options)):
        whole = guard.cls(whole, **guard.kwargs)
    headers = [] if host is None else [(b"host", host.encode())]
    asyncio.run(whole({"type": kind, "method": "GET", "path": "/config", "headers": headers}, None, send))
    if not reached:
        assert sent[0].get("status") == 403 or sent[0]["type"] == "websocket.close"
    return bool(reached)


@pytest.mark.parametrize("host", ["localhost:7860", "localhost", "127.0.0.1:7860", "127.0.0.1", "[::1]:7860", "[::1]",
                                  "LocalHost:1", "localhost.:80"])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_this_machines_names_are_answered_on_any_port(host, kind):
    assert answered(host, kind=kind)


@pytest.mark.parametrize("host", ["evil.example:7860", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860",
                                  "evil.example:7860@localhost", "xlocalhost", "192.168.1.4:7860", "[::2]:7860", "0.0.0.0:7860",
                                  "[", "", "localhost evil", None])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_any_other_name_is_refused(host, kind):
    assert not answered(host, kind=kind)


def test_names_can_be_allowed_and_no_others_with_them():
    allowed = ("--allow-host", "studio.example", "--allow-host", "https://other.example/app")
    assert answered("studio.example", *allowed) and answered("Studio.example:443", *allowed) and answered("other.example", *allowed)
    assert not answered("x.studio.example", *allowed) and not answered("evil.example", *allowed)


@pytest.mark.parametrize("options", [("--public",), ("--host", "0.0.0.0"), ("--host", "192.168.1.4"), ("--host", "::")])
def test_a_public_page_answers_to_every_name(options):
    assert answered("evil.example", *options) and app.is_public(app.options(options))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_a_host_of_this_machine_is_not_public(host):
    assert not app.is_public(app.options(["--host", host])) and answered(f"{host_of(host)}:7860", "--host", host)
    assert not answered("evil.example", "--host", host)


def test_what_gradio_takes_from_the_environment_counts(monkeypatch):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "https://proxy.example/studio")
    assert answered("proxy.example") and not answered("evil.example")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    assert app.is_public(app.options([])) and answered("0123.gradio.live")
    monkeypatch.delenv("GRADIO_SHARE")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert app.is_public(app.options([]))


@pytest.mark.parametrize(("text", "host"), [("a.example:80", "a.example"), ("::1", "[::1]"), ("[::1]:7860", "[::1]"), ("", ""),
                                            ("http://A.example:1/x", "a.example"), ("/studio", ""), ("a b", ""), ("[", "")])
def test_the_host_of_a_text(text, host):
    assert host_of(text) == host


@pytest.mark.parametrize(("host", "address"), [("::1", "[::1]"), ("[::1]", "[::1]"), ("::", "[::]"), ("localhost", "localhost"),
                                               ("127.0.0.1", "127.0.0.1"), (None, None), ("", "")])
def test_an_ipv6_host_is_served_in_brackets(host, address):
    """Without them the page's own first request to itself has no valid address, and nothing starts."""
    assert app.address(host) == address
