"""`python app.py` as a person starts it: it comes up, tells where, and talks to nobody outside this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import hear_interrupts

ROOT = Path(__file__).parents[1]
# Python runs this module at its start: it notes every address outside the loopback that is connected to or looked up.
WATCH = """
import os, socket
def note(address):
    host = str(address[0] if isinstance(address, tuple) else address)
    if not host.startswith(("127.", "::1", "localhost", "0.0.0.0", "/")):
        with open(os.environ["CALLS"], "a") as file: file.write(host + "\\n")
connect, look_up = socket.socket.connect, socket.getaddrinfo
def watched(self, address): note(address); return connect(self, address)
def looked_up(host, *rest, **more): note(host or "localhost"); return look_up(host, *rest, **more)
socket.socket.connect, socket.getaddrinfo = watched, looked_up
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def started(tmp_path):
    """A running app and the file that lists its calls to the outside."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    calls, port = tmp_path / "calls", free_port()
    calls.touch()
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "CALLS": str(calls), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "app.py", "--port", str(port), "--outputs", str(tmp_path / "outputs")]
    app = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           preexec_fn=hear_interrupts)
    yield app, f"http://127.0.0.1:{port}", calls
    app.kill()
    app.wait()


def wait_for(url: str, app: subprocess.Popen, seconds: float = 90) -> bytes:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and app.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(f"the app did not come up: {app.stdout.read() if app.poll() is not None else 'too slow'}")


def test_the_app_comes_up_calls_nobody_and_ends_on_interrupt(started):
    app, url, calls = started
    assert b"FuseChat Studio" in wait_for(f"{url}/config", app)
    page = urllib.request.urlopen(url, timeout=10).read().decode()
    assert "Content-Security-Policy" in page
    for path in ("/", "/config", "/gradio_api/info"):
        foreign = urllib.request.Request(url + path, headers={"Host": f"evil.example:{url.split(':')[-1]}"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign, timeout=10)
    time.sleep(2)
    app.send_signal(signal.SIGINT)
    app.wait(timeout=20)
    assert calls.read_text() == ""


def test_help_needs_no_page():
    done = subprocess.run([sys.executable, "app.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for option in ("--port", "--models", "--public", "--allow-host"):
        assert option in done.stdout
