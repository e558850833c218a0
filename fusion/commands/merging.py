"""merge: run a recipe, from a file or from options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

from fusion.commands.console import print_json, show_progress, weighing
from fusion.commands.inspecting import review_text
from fusion.commands.mergekit import stages_of
from fusion.errors import RecipeError, nearest, printable
from fusion.merge import MergeResult, compute
from fusion.methods import METHODS
from fusion.progress import Work, finish
from fusion.recipe import Curve, Override, Recipe
from fusion.review import review
from fusion.stages import merge_stages


def _on_ray(*args, **options) -> Work[MergeResult]:
    from fusion.cluster import merge_on_ray  # an optional extra

    return merge_on_ray(*args, **options)


ENGINES: dict[str, Callable[..., Work[MergeResult]]] = {"local": merge_stages, "ray": _on_ray}


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    run = command("merge", _merge, "Merge targets into a new folder: from a recipe file, or from PIVOT TARGET … and options.")
    run.add_argument("models", metavar="RECIPE.yaml | PIVOT TARGET", nargs="+",
                     help="a recipe, a mergekit file, or pivot and targets")
    run.add_argument("--out", metavar="DIR", required=True, help="the folder to make; it must not exist")
    run.add_argument("--method", metavar="M", help=f"{', '.join(METHODS)} (default varm)")
    weighing(run)
    run.add_argument("--weights", metavar="W,W", help="one per target: a number, `variation` (measured) or curve:0,0.5,1 (over the "
                     "depth); between curves stands a semicolon; the word variation alone is for all")
    run.add_argument("--rule", metavar="R", help="how variation becomes weights: ratio or softmax (default ratio)")
    run.add_argument("--temperature", metavar="T", type=float, help="of rule softmax (default 1)")
    run.add_argument("--option", metavar="NAME=VALUE", action="append", help="an option of the method, see `methods`: a number, "
                     "true, false, a word, curve:0,0.5,1, or a list with one for each target; repeatable")
    run.add_argument("--override", metavar="PATTERN:TARGET=W[,TARGET=W]", action="append", help="give weights by hand; repeatable")
    run.add_argument("--exclude", metavar="PATTERN", action="append", help="keep these tensors from the pivot; repeatable")
    run.add_argument("--seed", metavar="N", type=int, help="of what is random in a method (default 0)")
    run.add_argument("--vocabulary", metavar="V", help="for models whose tokens differ: pivot, common or union (default: refuse)")
    run.add_argument("--dtype", metavar="D", help="stored dtype: bfloat16, float16, float32 (default: as the pivot)")
    run.add_argument("--donor", metavar="NAME", help="gives tokenizer, chat template, generation config (default: pivot)")
    run.add_argument("--max-shard-gb", metavar="GB", type=float, default=5.0, help="largest shard (default 5)")
    run.add_argument("--engine", metavar="E", default="local", help=f"{', '.join(ENGINES)} (default local)")
    run.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda, or auto: a GPU where there is one (default cpu, "
                     "whose results are the same to the byte on every machine; a GPU's are the same to float32 rounding)")
    run.add_argument("--ray-address", metavar="A", help="of the Ray cluster: auto or HOST:PORT (default: one is started)")
    run.add_argument("--review", action="store_true", help="then look at the result: distances, rounding, tokenizer, five prompts")
    run.add_argument("--resume", action="store_true", help="go on with a merge into this folder that was killed")
    run.add_argument("--no-flush", action="store_true", help="do not wait for the disk: faster, but a power cut within the next "
                     "minute may leave the result incomplete")


def _merge(options: argparse.Namespace) -> None:
    stages = _stages(options)
    if options.engine not in ENGINES:
        raise RecipeError(f"unknown engine {options.engine!r}", where="--engine", todo=nearest(options.engine, ENGINES))
    if not 0.001 <= options.max_shard_gb <= 1000:
        raise RecipeError(f"{options.max_shard_gb} GB is no sensible shard size", where="--max-shard-gb")
    if options.device != "cpu" and options.engine != "local":
        raise RecipeError(f"engine {options.engine} computes on processors", where="--device", todo="Use --engine local.")
    where = {"address": options.ray_address} if options.engine == "ray" else {"engine": partial(compute, device=options.device)}
    work = ENGINES[options.engine](stages, options.out, max_shard_bytes=int(options.max_shard_gb * 1e9), resume=options.resume,
                                   flush=not options.no_flush, **where)
    result = finish(work, show_progress(options.json))
    report = finish(review(result), show_progress(options.json)) if options.review else None
    before, after = result.parameters
    if options.json:
        found = {"review": report.to_dict()} if report else {}
        print_json({"folder": str(result.folder), "recipe": result.recipe.to_dict(), "tensors": result.tensors,
                    "parameters": {"pivot": before, "result": after}, "finite": result.finite,
                    "warnings": list(result.warnings), **found})
    else:
        finite = "all finite" if result.finite else "some NaN or Inf"
        print(f"merged {result.tensors} tensors of {len(result.recipe.targets)} targets into {options.out}\n"
              f"{before:,} parameters before, {after:,} after, {finite}; content digest {result.recipe.result['digest']}")
        for text in result.warnings:
            print(printable(f"warning: {text}"))
        if report:
            print(f"\n{review_text(report)}")


def _stages(options: argparse.Namespace) -> tuple[Recipe, ...]:
    """The recipes to run; options change the last stage of a recipe file."""
    changes = {name: value for name, value in (
        ("method", options.method), ("granularity", options.granularity), ("measure", options.measure),
        ("dtype", options.dtype), ("donor", options.donor), ("seed", options.seed), ("vocabulary", options.vocabulary),
        ("rule", options.rule), ("temperature", options.temperature), ("options", options.option and _options(options.option)),
        ("weights", None if options.weights is None else _weights(options.weights)),
        ("overrides", options.override and tuple(map(_override, options.override))),
        ("exclude", options.exclude and tuple(options.exclude)), ("allow_nonfinite", options.allow_nonfinite or None),
    ) if value is not None}
    if len(options.models) > 1:
        pivot, *targets = options.models
        return (Recipe(pivot, tuple(targets), **changes).check(),)
    if not (options.models[0].endswith((".yaml", ".yml")) or os.path.isfile(options.models[0])):
        raise RecipeError("one argument that is no recipe file", where=options.models[0],
                          todo="Give RECIPE.yaml, or PIVOT and at least one TARGET.")
    *earlier, last = stages_of(options.models[0])
    return (*earlier, last.with_(**changes).check())


def _weights(text: str) -> str | tuple:
    """`variation` for all, or one value for each target."""
    values = _values(text, "--weights")
    return values[0] if values == ("variation",) else values


def _options(texts: list[str]) -> dict[str, object]:
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise RecipeError(f"{text!r} is no option", where="--option", todo="Write it like density=0.5.")
        values = _values(value, f"--option {name}")
        found[name] = values if len(values) > 1 else values[0]
    return found


def _values(text: str, where: str) -> tuple:
    """The settings in a text, between commas, or between semicolons where one is a curve."""
    parts = text.split(";") if "curve:" in text else text.split(",")
    return tuple(_value(part.strip(), where) for part in parts)


def _value(text: str, where: str) -> object:
    if text.startswith("curve:"):
        try:
            return Curve(tuple(map(float, text[len("curve:"):].split(","))))
        except ValueError as error:
            raise RecipeError(f"{text!r} is no curve", where=where, todo="Write it like curve:0,0.5,1.") from error
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if not text.replace("_", "").replace("-", "").isalnum():
        raise RecipeError(f"{text!r} is not a list of numbers or words", where=where, todo="Write it like 0.3,0.7.")
    return text


def _override(text: str) -> Override:
    pattern, colon, pairs = text.rpartition(":")
    try:
        weights = {name: float(value) for name, _, value in (pair.rpartition("=") for pair in pairs.split(","))}
    except ValueError:
        weights = {}
    if not colon or not weights or "" in weights:
        raise RecipeError(f"{text!r} is no override", where="--override", todo="Write it like model.layers.0.*:target-a=0.7.")
    return Override(pattern, weights)
