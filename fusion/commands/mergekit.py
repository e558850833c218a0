"""import, lint and export: mergekit's recipes in and out."""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np

from fusion import documents
from fusion.commands.console import print_json, show_progress
from fusion.errors import OutputError, RecipeError
from fusion.merge import RECIPE_FILE
from fusion.mergekit import Note, export_text, import_text, is_mergekit, lint, tensor_names
from fusion.plan import MergePlan
from fusion.progress import finish
from fusion.recipe import Recipe, read_text, stages_from_yaml
from fusion.variation import measure

MERGEKIT_FILE = "mergekit_config.yml"  # what mergekit leaves in the folder of a merge

def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    read = command("import", _import, "Translate a mergekit file into a recipe that means the same, and say what differs.")
    read.add_argument("file", metavar="MERGEKIT.yaml", help="the file, or the folder of a model that mergekit made")
    read.add_argument("--out", metavar="RECIPE.yaml", help="write the recipe here instead of printing it; the file must not exist")
    check = command("lint", _lint, "Explain every line of a mergekit file and warn of its traps.")
    check.add_argument("file", metavar="MERGEKIT.yaml", help="the file, or the folder of a model that mergekit made")
    write = command("export", _export, "Write a recipe as a mergekit file; measured weights are measured and written out.")
    write.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe, or the folder of a merge, which holds one")
    write.add_argument("--out", metavar="MERGEKIT.yaml", help="write it here instead of printing it; the file must not exist")


def stages_of(path: str) -> tuple[Recipe, ...]:
    """The stages in a file, be it a recipe or a mergekit file, whose warnings are then printed on stderr."""
    text = read_text(path)
    if not is_mergekit(text):
        return stages_from_yaml(text, path)
    recipes, notes = import_text(text, where=path, opener=tensor_names)
    for note in notes:
        if note.level == "warning":
            print(f"warning: {path}: {note}", file=sys.stderr)
    return recipes


def _inside(path: str, name: str) -> str:
    """The file of this name in a folder; any other path as it is."""
    if not os.path.isdir(path):
        return path
    if not os.path.isfile(os.path.join(path, name)):
        raise RecipeError(f"there is no {name} in this folder", where=path, todo="Give the recipe's own path.")
    return os.path.join(path, name)


def _import(options: argparse.Namespace) -> None:
    file = _inside(options.file, MERGEKIT_FILE)
    recipes, notes = import_text(read_text(file), where=file, opener=tensor_names)
    text = documents.write([recipe.to_dict() for recipe in recipes])
    if options.out:
        _write(options.out, text)
    if options.json:
        print_json({"recipes": [recipe.to_dict() for recipe in recipes], "notes": [vars(note) for note in notes]})
        return
    comments = "".join(f"# {note.level:8}{note}\n" for note in notes)
    print(comments + (f"written to {options.out}" if options.out else text), end="" if not options.out else "\n")


def _lint(options: argparse.Namespace) -> None:
    notes = lint(read_text(_inside(options.file, MERGEKIT_FILE)))
    if options.json:
        print_json([vars(note) for note in notes])
    else:
        print("\n".join(_line(note) for note in notes))
    errors = sum(note.level == "error" for note in notes)
    if errors:
        raise RecipeError(f"{errors} error{'s' * (errors > 1)}; it cannot be imported as it is", where=options.file)


def _line(note: Note) -> str:
    return f"{note.line:5}  {note.level:8} {note.text}"


def _export(options: argparse.Namespace) -> None:
    file = _inside(options.recipe, RECIPE_FILE)
    stages = stages_from_yaml(read_text(file), file)
    named = {stage.name for stage in stages}
    parts = []
    for stage in stages:
        standing_on = sorted(named.intersection((stage.pivot, *stage.targets)) - {""})
        parts.append(export_text(stage) if standing_on else export(stage, options.json))
    text = "---\n".join(parts)
    if options.out:
        _write(options.out, text)
    if options.json:
        print_json({"file": options.out, "mergekit": text})
    else:
        print(f"written to {options.out}" if options.out else text, end="" if not options.out else "\n")


def export(recipe: Recipe, quiet: bool = True) -> str:
    """Export a recipe whose models are there: names from the headers, weights measured where the recipe says so."""
    plan = MergePlan.open(recipe)
    try:
        shares = np.zeros((len(plan.weights.names), len(plan.targets)))
        if plan.weights.measured:
            variation = finish(measure(plan.pivot, plan.targets, allow_nonfinite=recipe.allow_nonfinite), show_progress(quiet))
            shares = plan.ratios(variation)
        weights = plan.weights.table(shares) if plan.weights.kind else None
        return export_text(recipe, weights, plan.weights.names, plan.dtype)
    finally:
        for model in plan.models:
            model.close()


def _write(path: str, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise OutputError("there is a file of this name already", where=path, todo="Choose another name.") from error
    except OSError as error:
        raise OutputError(f"cannot be written ({error})", where=path) from error
