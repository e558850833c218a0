"""merge: run a recipe."""

from __future__ import annotations

import argparse

from fusion.commands.console import print_json, show_progress, weighing
from fusion.errors import RecipeError
from fusion.merge import merge
from fusion.methods import METHODS
from fusion.progress import finish
from fusion.recipe import Override, Recipe


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    run = command("merge", _merge, "Merge targets into a new folder: from a recipe file, or from PIVOT TARGET … and options.")
    run.add_argument("models", metavar="RECIPE.yaml | PIVOT TARGET", nargs="+", help="a recipe file, or pivot and targets")
    run.add_argument("--out", metavar="DIR", required=True, help="the folder to make; it must not exist")
    run.add_argument("--method", metavar="M", help=f"{', '.join(METHODS)} (default varm)")
    weighing(run)
    run.add_argument("--weights", metavar="W,W", help="one number per target, for method linear")
    run.add_argument("--override", metavar="PATTERN:TARGET=W[,TARGET=W]", action="append", help="give weights by hand; repeatable")
    run.add_argument("--exclude", metavar="PATTERN", action="append", help="keep these tensors from the pivot; repeatable")
    run.add_argument("--dtype", metavar="D", help="stored dtype: bfloat16, float16, float32 (default: as the pivot)")
    run.add_argument("--donor", metavar="NAME", help="gives tokenizer, chat template, generation config (default: pivot)")
    run.add_argument("--max-shard-gb", metavar="GB", type=float, default=5.0, help="largest shard (default 5)")


def _merge(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    result = finish(merge(recipe, options.out, max_shard_bytes=int(options.max_shard_gb * 1e9)), show_progress(options.json))
    if options.json:
        print_json({"folder": str(result.folder), "recipe": result.recipe.to_dict(), "tensors": len(result.variation.names)})
    else:
        print(f"merged {len(result.variation.names)} tensors of {len(recipe.targets)} targets into {options.out}")


def _recipe(options: argparse.Namespace) -> Recipe:
    changes = {name: value for name, value in (
        ("method", options.method), ("granularity", options.granularity), ("measure", options.measure),
        ("dtype", options.dtype), ("donor", options.donor), ("weights", options.weights and _numbers(options.weights)),
        ("overrides", options.override and tuple(map(_override, options.override))),
        ("exclude", options.exclude and tuple(options.exclude)), ("allow_nonfinite", options.allow_nonfinite or None),
    ) if value is not None}
    if not 0.001 <= options.max_shard_gb <= 1000:
        raise RecipeError(f"{options.max_shard_gb} GB is no sensible shard size", where="--max-shard-gb")
    if len(options.models) == 1:
        if not options.models[0].endswith((".yaml", ".yml")):
            raise RecipeError("one argument that is no recipe file", where=options.models[0],
                              todo="Give RECIPE.yaml, or PIVOT and at least one TARGET.")
        return Recipe.load(options.models[0]).with_(**changes).check()
    pivot, *targets = options.models
    return Recipe(pivot, tuple(targets), **changes).check()


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{text!r} is not a list of numbers", where="--weights", todo="Write it like 0.3,0.7.") from error


def _override(text: str) -> Override:
    pattern, colon, pairs = text.rpartition(":")
    try:
        weights = {name: float(value) for name, _, value in (pair.rpartition("=") for pair in pairs.split(","))}
    except ValueError:
        weights = {}
    if not colon or not weights or "" in weights:
        raise RecipeError(f"{text!r} is no override", where="--override", todo="Write it like model.layers.0.*:target-a=0.7.")
    return Override(pattern, weights)
