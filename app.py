"""FuseChat Studio: `python app.py` opens the page on http://127.0.0.1:7860. See --help for options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: no request leaves this machine
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from starlette.middleware import Middleware

from components.hosts import LOCAL, KnownHosts
from components.page import build
from components.studio import Studio
from components.theme import ASSETS, HEAD, css, theme

ON_SPACES = bool(os.getenv("SPACE_ID"))


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: this process's)."""
    parser = argparse.ArgumentParser(description="See how far chat models moved, merge them by it, and chat with the result.")
    parser.add_argument("--port", type=int, help="port to listen on (default: 7860 or the next free one)")
    parser.add_argument("--host", default=os.getenv("GRADIO_SERVER_NAME"), metavar="ADDRESS",
                        help="address to listen on (default: this machine only); another than this machine's makes the page public")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="a name that a proxy of yours calls this page by; a page that is not public answers only to "
                             "localhost, 127.0.0.1, [::1] and these, on any port, so that no web page can use it by a browser")
    parser.add_argument("--models", type=Path, metavar="DIR", help="a folder of checkpoints to offer")
    parser.add_argument("--outputs", type=Path, metavar="DIR", default=Path("outputs"),
                        help="where saved merges go (default: outputs)")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="memory for loaded models (default: half of the machine's)")
    parser.add_argument("--public", action="store_true", default=ON_SPACES,
                        help="strangers use this page, under any name: no paths, no saving")
    return parser.parse_args(words)


def is_public(chosen: argparse.Namespace) -> bool:
    """Whether strangers can reach the page: asked for, on other addresses than this machine's, or by a share link."""
    shared = os.getenv("GRADIO_SHARE", "").lower() == "true"
    return chosen.public or shared or chosen.host not in (None, "", "127.0.0.1", "localhost", "::1", "[::1]")


def address(host: str | None) -> str | None:
    """A host as Gradio puts it into an address: IPv6 in brackets."""
    return f"[{host}]" if host and ":" in host and not host.startswith("[") else host


def guards(chosen: argparse.Namespace) -> list[Middleware]:
    """What stands before the page: nothing before a public one."""
    names = (*LOCAL, chosen.host or "", *chosen.allow_host, os.getenv("GRADIO_ROOT_PATH", ""))
    return [] if is_public(chosen) else [Middleware(KnownHosts, names=names)]


def main() -> None:
    """Build the page and serve it until it is interrupted."""
    chosen = options()
    public = is_public(chosen)
    budget = int(chosen.memory_gb * 1e9) if chosen.memory_gb else None
    studio = Studio(chosen.models, chosen.outputs, public=public, budget_bytes=budget)
    if studio.nothing:
        print(f"--models {chosen.models}: {studio.nothing}", file=sys.stderr)
    page = build(studio)
    page.queue(max_size=64, default_concurrency_limit=8)
    page.launch(server_name=address(chosen.host), server_port=chosen.port, theme=theme(), css=css(), head=HEAD,
                footer_links=["api"], run_history=False, enable_monitoring=False, max_file_size="1mb", ssr_mode=False,
                show_error=False, favicon_path=ASSETS / "logo.svg", app_kwargs={"middleware": guards(chosen)})


if __name__ == "__main__":
    main()
