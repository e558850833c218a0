"""fuse: the whole pairwise fusion pipeline from one recipe; what is already done is not done again."""

from __future__ import annotations

import argparse
import os

from fusion.commands.console import print_json, show_progress
from fusion.progress import finish
from fusion.tables import bytes_text, table


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    fuse = command("fuse", _fuse, "Fuse source models of any architecture into targets of the pivot's shape, and merge them.")
    fuse.add_argument("recipe", metavar="RECIPE.yaml", help="a fusion recipe: pivot, sources, data, and how to train")
    fuse.add_argument("--out", metavar="DIR", required=True, help="the folder of this run; give it again to go on")
    fuse.add_argument("--plan", action="store_true", help="only show the stages, which of them are done, and what training takes")


def _fuse(options: argparse.Namespace) -> None:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is not accelerate's own, the teachers for one, keeps to it as well

    from fusion.pairwise import FuseRecipe, plan, run
    from fusion.pairwise.stages import cost

    recipe = FuseRecipe.load(options.recipe)
    if options.plan:
        stages, estimate = plan(recipe, options.out), cost(recipe, options.out)
        if options.json:
            print_json({"stages": [vars(stage) for stage in stages], "training": vars(estimate) if estimate else None})
            return
        print(table(("stage", "of", "state"), [(s.name, s.subject, "done" if s.done else "to do") for s in stages]))
        if estimate:
            print(f"\ntraining one target: {estimate.tokens:,} tokens in {estimate.steps:,} steps, peak memory about "
                  f"{bytes_text(estimate.memory_bytes)}, roughly {estimate.seconds / 60:.0f} minutes on two CPU cores")
        return
    result = finish(run(recipe, options.out), show_progress(options.json))
    if int(os.environ.get("RANK", 0)):
        return
    if options.json:
        print_json({"targets": {name: str(folder) for name, folder in result.targets.items()},
                    "merged": str(result.merged) if result.merged else None, "data": result.report,
                    "alignment": result.statistics})
        return
    made = {**result.targets, **({"merged": result.merged} if result.merged else {})}
    print(f"{result.report['used']} dialogues; " + ", ".join(f"{name} in {os.path.relpath(its)}" for name, its in made.items()))
