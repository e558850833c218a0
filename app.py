"""FuseChat Studio: `python app.py` opens the page on http://127.0.0.1:7860. See --help for options."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: no request leaves this machine
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from components.page import build
from components.studio import Studio
from components.theme import ASSETS, HEAD, css, theme

ON_SPACES = bool(os.getenv("SPACE_ID"))


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="See how far chat models moved, merge them by it, and chat with the result.")
    parser.add_argument("--port", type=int, help="port to listen on (default: 7860 or the next free one)")
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--models", type=Path, metavar="DIR", help="a folder of checkpoints to offer")
    parser.add_argument("--outputs", type=Path, metavar="DIR", default=Path("outputs"),
                        help="where saved merges go (default: outputs)")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="memory for loaded models (default: half of the machine's)")
    parser.add_argument("--public", action="store_true", default=ON_SPACES, help="strangers use this page: no paths, no saving")
    return parser.parse_args()


def main() -> None:
    """Build the page and serve it until it is interrupted."""
    chosen = options()
    public = chosen.public or chosen.host not in (None, "127.0.0.1", "localhost", "::1")  # whoever can reach it is a stranger
    budget = int(chosen.memory_gb * 1e9) if chosen.memory_gb else None
    page = build(Studio(chosen.models, chosen.outputs, public=public, budget_bytes=budget))
    page.queue(max_size=64, default_concurrency_limit=8)
    page.launch(server_name=chosen.host, server_port=chosen.port, theme=theme(), css=css(), head=HEAD, footer_links=["api"],
                run_history=False, enable_monitoring=False, max_file_size="1mb", ssr_mode=False, show_error=False,
                favicon_path=ASSETS / "logo.svg")


if __name__ == "__main__":
    main()
