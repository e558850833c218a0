"""verify: run the recipe of a finished merge again and compare."""

from __future__ import annotations

import argparse

from fusion.commands.console import print_json, show_progress
from fusion.errors import MismatchError
from fusion.progress import finish
from fusion.verify import Verdict, verify

_SHOWN = 20  # findings


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    run = command("verify", _verify, "Run the recipe of an output folder again, keep nothing, and compare every tensor.")
    run.add_argument("folder", metavar="FOLDER", help="a folder made by merge")


def _verify(options: argparse.Namespace) -> None:
    verdict = finish(verify(options.folder), show_progress(options.json))
    if options.json:
        print_json(verdict.to_dict())
    elif verdict.equal:
        print(f"{verdict.folder} is what its recipe makes, to the byte: {verdict.again}{_engines(verdict)}")
    if not verdict.equal:
        found = verdict.findings
        more = [f"… and {len(found) - _SHOWN} more; --json lists all"] if len(found) > _SHOWN else []
        raise MismatchError("\n".join(["this is not what its recipe makes", *found[:_SHOWN], *more]) + _engines(verdict),
                            where=verdict.folder)


def _engines(verdict: Verdict) -> str:
    same = verdict.engine == verdict.ours
    return "" if same else f"\n(it was made by engine {verdict.engine} and run again by {verdict.ours})"
