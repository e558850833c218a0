"""The demo family: tiny chat models with different strengths, trained on dialogues that this package generates.

    finish(train(Path("assets/demo")), print)          # about an hour on two cores
    results = finish(check(Path("assets/demo")))       # {model: {domain: percent}}
    print(table(results), bars(results))               # bars: what the family misses, [] when all is well
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fusion.demo.family import FAMILY, Member

FOLDER = Path(__file__).parents[2] / "assets" / "demo"  # where the shipped family lies

__all__ = ["FAMILY", "FOLDER", "Member", "bars", "check", "compare", "examples", "table", "train", "write_dialogues"]
_HOMES = {"train": "training", "compare": "comparison", "write_dialogues": "fusing",
          "check": "checking", "table": "checking", "bars": "checking", "examples": "samples"}


def __getattr__(name: str):
    """Find the heavier doors when they are first used, so that importing this package does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
