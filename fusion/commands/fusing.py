"""fuse: the whole pairwise fusion pipeline from one recipe; what is already done is not done again."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from fusion.commands.console import print_json, show_progress
from fusion.progress import finish
from fusion.tables import bytes_text, table

if TYPE_CHECKING:
    from fusion.pairwise.cost import Cost


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    fuse = command("fuse", _fuse, "Fuse source models of any architecture into targets of the pivot's shape, and merge them.")
    fuse.add_argument("recipe", metavar="RECIPE.yaml", help="a fusion recipe: pivot, sources, data, and how to train")
    fuse.add_argument("--out", metavar="DIR", required=True, help="the folder of this run; give it again to go on")
    fuse.add_argument("--plan", action="store_true", help="only show the stages, which of them are done, and what the others take")


def _fuse(options: argparse.Namespace) -> None:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is not accelerate's own, the teachers for one, keeps to it as well

    from fusion.pairwise import FuseRecipe, run
    from fusion.pairwise.cost import forecast

    recipe = FuseRecipe.load(options.recipe)
    if options.plan:
        _show(forecast(recipe, options.out), options.json)
        return
    result = finish(run(recipe, options.out), show_progress(options.json))
    if int(os.environ.get("RANK", 0)):
        return
    if options.json:
        print_json({"targets": {name: str(folder) for name, folder in result.targets.items()},
                    "merged": str(result.merged) if result.merged else None, "data": result.report,
                    "alignment": result.statistics})
        return
    made = {**result.targets, **({result.merged.name: result.merged} if result.merged else {})}
    print(f"{result.report['used']} dialogues; " + ", ".join(f"{name} in {os.path.relpath(its)}" for name, its in made.items()))


def _show(cost: Cost, as_json: bool) -> None:
    """The stages with their price, and what is better known before."""
    if as_json:
        stages = [{**vars(stage), "seconds": seconds, "memory_bytes": peak}
                  for stage, seconds, peak in zip(cost.stages, cost.seconds, cost.peaks, strict=True)]
        print_json({"stages": stages, "training": {"tokens": cost.tokens, "steps": cost.steps}, "dialogues": cost.dialogues,
                    "memory_bytes": cost.memory_bytes, "seconds": cost.total_seconds, "guessed": cost.guessed,
                    "warnings": cost.warnings})
        return
    rows = [(its.name, its.subject, "–" if its.done else _minutes(seconds), "–" if its.done else bytes_text(peak),
             "done" if its.done else "to do") for its, seconds, peak in zip(cost.stages, cost.seconds, cost.peaks, strict=True)]
    print(table(("stage", "of", "about", "memory", "state"), rows))
    print(f"\ntraining one target: {cost.tokens:,} tokens in {cost.steps:,} steps; all that is left: peak memory about "
          f"{bytes_text(cost.memory_bytes)}, roughly {_minutes(cost.total_seconds)} on two CPU cores"
          + (f"\n(estimated {cost.guessed})" if cost.guessed else ""))
    for note in (*(f"{its.name}: {its.note}" for its in cost.stages if its.note), *cost.warnings):
        print(f"note: {note}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
