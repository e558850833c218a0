"""The command line: every command calls the same function as the page's button.

Exit status 0 only when it was done, 2 for a FusionError (its text on stderr), 130 when it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from fusion.anatomy import GRANULARITIES
from fusion.checkpoint import Checkpoint
from fusion.errors import FusionError, RecipeError
from fusion.merge import merge
from fusion.methods import METHODS
from fusion.preflight import Preflight, preflight
from fusion.progress import Progress, finish
from fusion.recipe import Override, Recipe, short_names
from fusion.tables import bytes_text, table
from fusion.variation import MEASURES, measure


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console without Greek letters still gets its answer
    options = _parser().parse_args(argv)
    try:
        options.run(options)
        return 0
    except FusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was left behind", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusion", description="See how far chat models moved, and merge them by it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def models(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("pivot", metavar="PIVOT", help="folder of the checkpoint that variation is measured from")
        sub.add_argument("targets", metavar="TARGET", nargs="+", help="folders of the models to merge")

    check = command("preflight", _preflight, "Say from headers alone whether models can be merged, and what it costs.")
    models(check)
    check.add_argument("--out", metavar="DIR", help="also check that this folder can be written")
    report = command("variation", _variation, "Measure how far every matrix of every target moved from the pivot.")
    models(report)
    _weighing(report)
    run = command("merge", _merge, "Merge targets into a new folder: from a recipe file, or from PIVOT TARGET … and options.")
    run.add_argument("models", metavar="RECIPE.yaml | PIVOT TARGET", nargs="+", help="a recipe file, or pivot and targets")
    run.add_argument("--out", metavar="DIR", required=True, help="the folder to make; it must not exist")
    run.add_argument("--method", metavar="M", help=f"{', '.join(METHODS)} (default varm)")
    _weighing(run)
    run.add_argument("--weights", metavar="W,W", help="one number per target, for method linear")
    run.add_argument("--override", metavar="PATTERN:TARGET=W[,TARGET=W]", action="append", help="give weights by hand; repeatable")
    run.add_argument("--exclude", metavar="PATTERN", action="append", help="keep these tensors from the pivot; repeatable")
    run.add_argument("--dtype", metavar="D", help="stored dtype: bfloat16, float16, float32 (default: as the pivot)")
    run.add_argument("--donor", metavar="NAME", help="gives tokenizer, chat template, generation config (default: pivot)")
    run.add_argument("--max-shard-gb", metavar="GB", type=float, default=5.0, help="largest shard (default 5)")
    command("methods", _methods, "List the merge methods with their formulas.")
    _demo_parser(command("demo", _demo_help, "Train or check the embedded demo family."))
    for sub in commands.choices.values():
        sub.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _weighing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--granularity", metavar="G", help=f"{', '.join(GRANULARITIES)} (default matrix)")
    sub.add_argument("--measure", metavar="M", help=f"{', '.join(MEASURES)} (default square)")
    sub.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf in weights")


def _demo_parser(demo: argparse.ArgumentParser) -> None:
    actions = demo.add_subparsers(required=True, metavar="train | check")
    train = actions.add_parser("train", help="make the family from generated dialogues (about an hour on two cores)")
    train.set_defaults(run=_demo_train)
    train.add_argument("--out", metavar="DIR", required=True, help="the folder to fill; its models must not exist yet")
    train.add_argument("--only", metavar="MODEL", action="append", default=[], help="train only this model; repeatable")
    train.add_argument("--seed", type=int, default=0)
    check = actions.add_parser("check", help="measure every model's accuracy per domain on held-out prompts")
    check.set_defaults(run=_demo_check)
    check.add_argument("--folder", metavar="DIR", help="the family's folder (default: the shipped one)")
    check.add_argument("--prompts", type=int, default=200, metavar="N", help="held-out prompts per domain (default 200)")
    check.add_argument("--json", action="store_true", help="print one JSON document: model → domain → accuracy in percent")


def _open(options: argparse.Namespace) -> tuple[Checkpoint, list[Checkpoint]]:
    folders = [options.pivot, *options.targets]
    pivot, *targets = (Checkpoint(folder, name) for folder, name in zip(folders, short_names(folders), strict=True))
    return pivot, targets


def _show(quiet: bool) -> Callable[[Progress], None]:
    """Print progress on one line of stderr, at most five times a second; nothing when it is not a terminal."""
    last = [0.0]

    def show(progress: Progress) -> None:
        now = time.monotonic()
        if not quiet and sys.stderr.isatty() and (now - last[0] > 0.2 or progress.fraction == 1):
            last[0] = now
            print(f"\r\033[K{progress}"[:160], end="\n" if progress.fraction == 1 else "", file=sys.stderr, flush=True)
    return show


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=1))


def _preflight(options: argparse.Namespace) -> None:
    pivot, targets = _open(options)
    report = preflight(pivot, targets, out=options.out)
    if options.json:
        _print_json(report.to_dict())
    else:
        print(_preflight_text(report))
    report.raise_if_bad()


def _preflight_text(report: Preflight) -> str:
    head = ("model", "role", "architecture", "layers", "parameters", "dtype", "on disk", "vocabulary", "head")
    rows = [(m.name, m.role, m.architecture, m.layers, f"{m.parameters:,}", m.dtype, bytes_text(m.nbytes),
             m.vocabulary if m.vocabulary is not None else m.vocab_size, "tied" if m.tied else "own") for m in report.models]
    found = [f"{f.level:8}{f.model}: {f.text}" for f in report.findings]
    cost = (f"reads {bytes_text(report.bytes_read)}, writes {bytes_text(report.bytes_written)}, peak memory about "
            f"{bytes_text(report.peak_memory_bytes)}, free disk {bytes_text(report.free_disk_bytes)}")
    return "\n".join([table(head, rows), "", *found, cost])


def _variation(options: argparse.Namespace) -> None:
    pivot, targets = _open(options)
    granularity, measured_by = options.granularity or "matrix", options.measure or "square"
    _check_names(granularity, measured_by)
    variation = finish(measure(pivot, targets, elements=granularity == "parameter", allow_nonfinite=options.allow_nonfinite),
                       _show(options.json))
    if options.json:
        _print_json(variation.to_dict(granularity, measured_by))
        return
    means, ratios = variation.means(granularity, measured_by), variation.ratios(granularity, measured_by)
    head = (granularity if granularity != "parameter" else "tensor (mean over elements)",
            *(f"{kind} {name}" for kind in ("variation", "ratio") for name in variation.targets))
    units = variation.units(granularity)
    first = {unit: t for t, unit in reversed(list(enumerate(units)))}
    rows = [(unit, *(f"{value:.3e}" for value in means[t]), *(f"{value:.4f}" for value in ratios[t]))
            for unit, t in sorted(first.items(), key=lambda item: item[1])]
    print(table(head, rows))


def _check_names(granularity: str, measured_by: str) -> None:
    """Refuse unknown names before gigabytes are read."""
    Recipe("pivot", ("target",), granularity=granularity, measure=measured_by).check()


def _merge(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    result = finish(merge(recipe, options.out, max_shard_bytes=int(options.max_shard_gb * 1e9)), _show(options.json))
    if options.json:
        _print_json({"folder": str(result.folder), "recipe": result.recipe.to_dict(), "tensors": len(result.variation.names)})
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


def _methods(options: argparse.Namespace) -> None:
    if options.json:
        _print_json({name: vars(method) for name, method in METHODS.items()})
        return
    for name, method in METHODS.items():
        print(f"{name:10}{method.title}: {method.summary}\n{'':10}{method.formula}\n{'':10}{method.source}")


def _demo_help(options: argparse.Namespace) -> None:
    raise RecipeError("say what to do", where="demo", todo="Write demo train or demo check.")


def _demo_train(options: argparse.Namespace) -> None:
    from fusion import demo

    finish(demo.train(options.out, only=options.only, seed=options.seed), _show(False))
    print(f"trained into {options.out}")


def _demo_check(options: argparse.Namespace) -> None:
    from fusion import demo

    results = finish(demo.check(options.folder or demo.FOLDER, prompts_per_domain=options.prompts), _show(options.json))
    if options.json:
        _print_json(results)
        return
    print(demo.table(results))
    missed = demo.bars(results)
    print("\n".join(f"missed: {bar}" for bar in missed) or "every bar is met")


if __name__ == "__main__":
    sys.exit(main())
