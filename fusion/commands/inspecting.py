"""inspect, review and compare: look at models before a merge, at its result, and at two of either side by side."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.commands.console import models, open_models, print_json, show_progress
from fusion.errors import CheckpointError, RecipeError, nearest, printable
from fusion.progress import finish
from fusion.recipe import Recipe, load_stages
from fusion.sources import open_checkpoint
from fusion.tables import table

if TYPE_CHECKING:
    from fusion.compare import Comparison, Difference
    from fusion.inspection import Inspection, Preview
    from fusion.review import Review

WIDTH = 100
_SHOWN = 12  # rows of a table that is only an excerpt
_COLUMNS = 4  # targets that have columns of their own
_LEAST = float("-inf")
SORTS: dict[str, Callable[[dict], float]] = {
    "conflict": lambda row: row["conflict"],
    "cosine": lambda row: _LEAST if row["cosine"] is None else -row["cosine"],
    "change": lambda row: max((its["relative"] or 0.0) for its in row["targets"].values()),
    "lost": lambda row: _LEAST if row["mean_lost"] is None else row["mean_lost"],
}


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    look = command("inspect", _inspect, "Say how targets moved: relative change, cosines, sign conflict, stable rank, rounding.")
    models(look)
    look.add_argument("--granularity", metavar="G", default="matrix", help="model, layer, module or matrix (default matrix)")
    look.add_argument("--sort", metavar="BY", help=f"{', '.join(SORTS)}: the most striking first (default: the model's order)")
    look.add_argument("--dtype", metavar="D", help="what the result would be stored as (default: as the pivot)")
    look.add_argument("--no-rank", action="store_true", help="leave out the stable rank, which takes longer than all the rest")
    look.add_argument("--preview", action="store_true", help="only the variation ratios, from a sample, with error bars")
    look.add_argument("--seconds", metavar="S", type=float, default=1.5, help="how long a preview samples (default 1.5)")
    look.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and Inf in weights")
    look.add_argument("--csv", action="store_true", help="print comma-separated values")
    after = command("review", _review, "Check a merged folder: distance to its parents, rounding, tokenizer, five prompts.")
    after.add_argument("folder", metavar="FOLDER", help="a folder that `merge` made, or any checkpoint with --parents")
    after.add_argument("--parents", metavar="MODEL", nargs="+", default=[], help="what it was made of, the pivot first")
    after.add_argument("--no-smoke", action="store_true", help="do not load the model and ask it five prompts")
    both = command("compare", _compare, "Compare two recipes, or two merged folders or checkpoints.")
    both.add_argument("first", metavar="A", help="a recipe file or a folder")
    both.add_argument("second", metavar="B", help="a recipe file or a folder")
    both.add_argument("--pivot", metavar="DIR", default="", help="the model both come from (default: that of their recipes)")


def _inspect(options: argparse.Namespace) -> None:
    from fusion.inspection import check_granularity, inspect, preview

    check_granularity(options.granularity)
    if options.sort is not None and options.sort not in SORTS:
        raise RecipeError(f"unknown order {options.sort!r}", where="--sort", todo=nearest(options.sort, SORTS))
    pivot, targets = open_models(options, open_checkpoint)
    show = show_progress(options.json or options.csv)
    if options.preview:
        sample = finish(preview(pivot, targets, seconds=options.seconds, allow_nonfinite=options.allow_nonfinite), show)
        _print(options, lambda: sample.to_dict(options.granularity), lambda: _preview_rows(sample, options.granularity),
               lambda: preview_text(sample, options.granularity))
        return
    ranks = not options.no_rank and options.granularity == "matrix"
    report = finish(inspect(pivot, targets, dtype=options.dtype, spectral=ranks, allow_nonfinite=options.allow_nonfinite), show)
    rows = report.rows(options.granularity)
    if options.sort:
        rows.sort(key=SORTS[options.sort], reverse=True)
    _print(options, lambda: {**report.to_dict(options.granularity), "units": rows}, lambda: _inspection_rows(report, rows),
           lambda: inspection_text(report, rows))


def _print(options: argparse.Namespace, data: Callable, rows: Callable, text: Callable) -> None:
    """Print the form that was asked for: one JSON document, CSV or text."""
    if options.json:
        print_json(data())
    elif options.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([printable(cell) if isinstance(cell, str) else cell for cell in row]
                                                             for row in rows())
    else:
        print(text())


def inspection_text(report: Inspection, rows: Sequence[dict]) -> str:
    """A table in 100 columns, one line per unit, and the whole model in words."""
    ranks = any(its.get("stable_rank") is not None for row in rows for its in row["targets"].values())
    columns = _numbered(report, rows, "Δ", "relative", _percent)
    if len(report.targets) > 1:
        columns += [("cosine", [_number(row["cosine"], ".2f") for row in rows]),
                    ("conflict", [_percent(row["conflict"]) for row in rows])]
    if ranks:
        columns += _numbered(report, rows, "rank ", "stable_rank", lambda value: _number(value, ".0f"))
    columns.append(("lost", [_percent(row["mean_lost"]) for row in rows]))
    names = "   ".join(f"{j} = {_short(target, 40)}" for j, target in enumerate(report.targets, 1))
    note = "" if len(report.targets) <= _COLUMNS else "; Δ and rank are the largest of all targets"
    return "\n".join([_wrap(f"{names}{note}"), _laid_out("unit", [row["unit"] for row in rows], columns), "",
                      _wrap(_summary(report)), _wrap(
        "Δ: ‖Δ‖ ÷ ‖pivot‖ of a target. cosine: the lowest of two targets' changes. conflict: elements moved in opposite "
        "directions, of those that two or more moved. rank: directions that Δ has in effect, ‖Δ‖² ÷ σ₁². lost: what the plain "
        "average loses when it is stored.")])


def preview_text(sample: Preview, granularity: str) -> str:
    """A table in 100 columns: estimated variation ratios with twice their standard errors."""
    ratios, errors, units = sample.ratios(granularity), sample.error(granularity), sample.variation.units(granularity)
    first = {unit: t for t, unit in reversed(list(enumerate(units)))}
    chosen = [t for _, t in sorted(first.items(), key=lambda item: item[1])]
    columns = [(_short(target, 16), [f"{ratios[t, j]:.4f} ± {2 * errors[t, j]:.4f}" for t in chosen])
               for j, target in enumerate(sample.variation.targets)]
    share = float((sample.sampled * sample.variation.numel).sum() / max(sample.variation.numel.sum(), 1))
    return "\n".join([_laid_out("variation ratio of", [units[t] for t in chosen], columns), "", _wrap(
        f"From {sample.blocks:,} blocks, {share:.2%} of the elements; about 95 % of the exact ratios lie within the ±.")])


def review_text(report: Review) -> str:
    """Findings, distances of the farthest matrices, and the answers."""
    lines = [_wrap(f"{one.level:8}{one.text}", " " * 8) for one in report.findings]
    distance, order = report.distance, sorted(range(len(report.names)), key=lambda t: -_or_zero(report.distance[t, 0]))[:_SHOWN]
    columns = [(_short(parent, 14), [_percent(report.totals[p]), *(_percent(distance[t, p]) for t in order)])
               for p, parent in enumerate(report.parents)]
    columns.append(("outside", ["", *(_percent(report.hull[t]) for t in order)]))
    if report.lost is not None:
        columns.append(("lost", [_percent(report.lost_total), *(_percent(report.lost[t]) for t in order)]))
    lines += ["", _laid_out("distance to", ["whole model", *(report.names[t] for t in order)], columns)]
    for one in report.answers or ():
        perplexity = "–" if one.perplexity is None else f"{one.perplexity:.1f}"
        end = {"stop": "ended by itself", "length": "cut off"}.get(one.finish, one.finish)
        lines += ["", _wrap(f"> {one.prompt}"), _wrap(printable(one.text or one.error), "  ", "  "),
                  f"  {one.tokens} tokens, {end}, perplexity of the prompt {perplexity}"]
    return "\n".join(lines)


def comparison_text(report: Comparison) -> str:
    """Totals, differing settings, and the matrices that lie farthest apart."""
    total, (first, second) = report.totals, report.models
    lines = [f"{first} and {second} hold the same numbers." if report.same_weights else
             f"{second} lies {_percent(total['distance'])} of its norm from {first}"
             + (f"; cosine of what both changed in {report.pivot}: {_number(total['cosine'], '.4f')}" if report.pivot else "")]
    lines += [*report.notes, *(f"only in {name}: {', '.join(only[:3])}{' …' * (len(only) > 3)} ({len(only)})"
                               for name, only in zip(report.models, report.only, strict=True) if only)]
    kept = report.tokenizer
    if kept["same_vocabulary"] is False:
        lines.append(f"tokenizers: {kept['only_first']} tokens only in {first}, {kept['only_second']} only in {second}, "
                     f"{kept['renumbered']} numbered otherwise")
    if not kept["same_chat_template"]:
        lines.append("The chat templates differ.")
    for title, found in (("recipe", report.recipe or ()), ("config", report.config)):
        lines += ["", differences_text(title, found)] if found else []
    if not report.same_weights:
        distance, cosine = report.distance, report.cosine
        order = sorted(range(len(report.names)), key=lambda t: -_or_zero(distance[t]))[:_SHOWN]
        columns = [("distance", [_percent(distance[t]) for t in order])]
        columns += [("cosine", [_number(cosine[t], ".4f") for t in order])] if report.pivot else []
        lines += ["", _laid_out("farthest apart", [report.names[t] for t in order], columns)]
    if report.weights:
        rows = report.weights[:_SHOWN]
        names = [f"{row['tensor']}  {row['target']}" for row in rows]
        lines += ["", _laid_out(f"weights that differ ({len(report.weights)})", names,
                                [(_short(name, 14), [f"{row[which]:.4f}" for row in rows])
                                 for name, which in zip(report.models, ("first", "second"), strict=True)])]
    return "\n".join(_wrap(line) if "\n" not in line else line for line in lines)


def differences_text(title: str, found: Sequence[Difference]) -> str:
    """Settings that differ, one line each."""
    return table((title, "A", "B"), [(_short(one.setting, 34), *(_short("–" if value is None else str(value), 30)
                                                                for value in (one.first, one.second))) for one in found])


def _review(options: argparse.Namespace) -> None:
    from fusion.review import review

    report = finish(review(options.folder, options.parents, smoke=not options.no_smoke), show_progress(options.json))
    if options.json:
        print_json(report.to_dict())
    else:
        print(review_text(report))
    bad = next((one for one in report.findings if one.level == "bad"), None)
    if bad is not None:
        raise CheckpointError(bad.text, where=report.name)


def _compare(options: argparse.Namespace) -> None:
    from fusion.compare import compare, compare_recipes

    refs = (options.first, options.second)
    if not any(map(_is_file, refs)):
        report = finish(compare(*refs, options.pivot), show_progress(options.json))
        if options.json:
            print_json(report.to_dict())
        else:
            print(comparison_text(report))
        return
    found = compare_recipes(*map(_recipe, refs))
    if options.json:
        print_json({"recipe": [vars(one) for one in found]})
    else:
        print(differences_text("recipe", found) if found else "The two recipes say the same.")


def _is_file(ref: str) -> bool:
    return ref.endswith((".yaml", ".yml")) or os.path.isfile(ref)


def _recipe(ref: str) -> tuple[Recipe, ...]:
    """The stages of a recipe file, or of the recipe that a merged folder keeps."""
    from fusion.compare import recipe_of

    stages = load_stages(ref) if _is_file(ref) else recipe_of(Path(ref))
    if not stages:
        raise RecipeError("there is no recipe in this folder", where=ref, todo="Give two recipe files, or two folders.")
    return stages


def _summary(report: Inspection) -> str:
    row = report.rows("model")[0] if report.names else {}
    if not row:
        return "There is no matrix to look at."
    moved = ", ".join(f"{_percent(its['relative'])} {target}" for target, its in row["targets"].items())
    text = f"The whole model: Δ {moved}"
    if len(report.targets) > 1:
        chance = 1 - 2 ** (1 - len(report.targets))
        text += (f"; lowest cosine {_number(row['cosine'], '.2f')}; conflict {_percent(row['conflict'])} "
                 f"(changes without any relation would give {chance:.0%})")
    return (f"{text}; stored as {report.dtype}, the plain average loses {_percent(row['mean_lost'])} of its change, "
            f"and {_percent(row['mean_rounded_back'])} of the changed elements return to the pivot's value.")


def _numbered(report: Inspection, rows: Sequence[dict], title: str, quantity: str, form: Callable) -> list[tuple[str, list[str]]]:
    """One column for each target, or the largest of all when there are many."""
    values = [[its[quantity] for its in row["targets"].values()] for row in rows]
    if len(report.targets) <= _COLUMNS:
        return [(f"{title}{j + 1}", [form(row[j]) for row in values]) for j in range(len(report.targets))]
    return [(title.strip(), [form(max((value for value in row if value is not None), default=None)) for row in values])]


def _inspection_rows(report: Inspection, rows: Sequence[dict]) -> list[list]:
    shared = [name for name, value in (rows[0] if rows else {}).items() if not isinstance(value, (dict, list)) and name != "shape"]
    own = list(next(iter(rows[0]["targets"].values()))) if rows else []
    head = [*shared, *(f"{name} {target}" for target in report.targets for name in own),
            *(f"cosine {' · '.join(pair['targets'])}" for pair in (rows[0]["cosines"] if rows else ()))]
    return [head, *([*(row[name] for name in shared), *(row["targets"][target][name] for target in report.targets for name in own),
                     *(pair["cosine"] for pair in row["cosines"])] for row in rows)]


def _preview_rows(sample: Preview, granularity: str) -> list[list]:
    names = ("tensor", "unit", "target", "variation", "ratio", "error", "sampled")
    return [list(names), *([row[name] for name in names] for row in sample.to_dict(granularity)["tensors"])]


def _laid_out(title: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Names to the left, numbers to the right, within WIDTH."""
    padded = []
    for head, cells in columns:
        width = max(map(len, (head, *cells)))
        padded.append([text.rjust(width) for text in (head, *cells)])
    room = max(16, WIDTH - sum(len(column[0]) + 2 for column in padded))
    return table((title, *(column[0] for column in padded)),
                 [(_short(name, room), *(column[i] for column in padded)) for i, name in enumerate(names, 1)])


def _short(text: str, room: int) -> str:
    """A name within `room` characters: its middle gives way, since the ends tell more."""
    text = printable(text)
    if len(text) <= room:
        return text
    return f"{text[:room // 3]}…{text[len(text) - (room - room // 3 - 1):]}"


def _wrap(text: str, indent: str = "", first: str = "") -> str:
    return textwrap.fill(printable(text), WIDTH, initial_indent=first, subsequent_indent=indent,
                         break_on_hyphens=False)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)


def _percent(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return "0%" if value == 0 else f"{value:.2%}" if value < .0995 else f"{value:.1%}" if value < .9995 else f"{value:.0%}"


def _or_zero(value: float) -> float:
    return 0.0 if value != value else float(value)
