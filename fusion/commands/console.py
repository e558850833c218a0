"""What every command shares: opening the models that were named, progress on stderr, one JSON document on stdout."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from fusion.anatomy import GRANULARITIES
from fusion.checkpoint import Checkpoint
from fusion.progress import Progress
from fusion.recipe import short_names
from fusion.variation import MEASURES

_NAMES = "a folder, a Hub id, or either with +ADAPTER behind it"


def models(sub: argparse.ArgumentParser) -> None:
    """Add the arguments PIVOT TARGET…"""
    sub.add_argument("pivot", metavar="PIVOT", help=f"the model that variation is measured from: {_NAMES}")
    sub.add_argument("targets", metavar="TARGET", nargs="+", help="the models to merge, named alike")


def weighing(sub: argparse.ArgumentParser) -> None:
    """Add the options that say how variation becomes weights."""
    sub.add_argument("--granularity", metavar="G", help=f"{', '.join(GRANULARITIES)} (default matrix)")
    sub.add_argument("--measure", metavar="M", help=f"{', '.join(MEASURES)} (default square)")
    sub.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf in weights")


def open_models(options: argparse.Namespace, opened: Callable[[str, str], Checkpoint]) -> tuple[Checkpoint, list[Checkpoint]]:
    """Open the checkpoints that PIVOT TARGET… name: `opened` is `open_checkpoint`, or `peek` where headers are enough."""
    refs = [options.pivot, *options.targets]
    pivot, *targets = (opened(ref, name) for ref, name in zip(refs, short_names(refs), strict=True))
    return pivot, targets


def show_progress(quiet: bool) -> Callable[[Progress], None]:
    """Print progress on one line of stderr, at most five times a second; nothing when it is not a terminal."""
    last = [0.0]

    def show(progress: Progress) -> None:
        now = time.monotonic()
        if not quiet and sys.stderr.isatty() and (now - last[0] > 0.2 or progress.fraction == 1):
            last[0] = now
            print(f"\r\033[K{progress}"[:160], end="\n" if progress.fraction == 1 else "", file=sys.stderr, flush=True)
    return show


def print_json(data: object) -> None:
    """Print one JSON document."""
    print(json.dumps(data, indent=1))
