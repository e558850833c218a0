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


def models(sub: argparse.ArgumentParser) -> None:
    """Add the arguments PIVOT TARGET…"""
    sub.add_argument("pivot", metavar="PIVOT", help="folder of the checkpoint that variation is measured from")
    sub.add_argument("targets", metavar="TARGET", nargs="+", help="folders of the models to merge")


def weighing(sub: argparse.ArgumentParser) -> None:
    """Add the options that say how variation becomes weights."""
    sub.add_argument("--granularity", metavar="G", help=f"{', '.join(GRANULARITIES)} (default matrix)")
    sub.add_argument("--measure", metavar="M", help=f"{', '.join(MEASURES)} (default square)")
    sub.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf in weights")


def open_models(options: argparse.Namespace) -> tuple[Checkpoint, list[Checkpoint]]:
    """Open the checkpoints that PIVOT TARGET… name, headers only."""
    folders = [options.pivot, *options.targets]
    pivot, *targets = (Checkpoint(folder, name) for folder, name in zip(folders, short_names(folders), strict=True))
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
