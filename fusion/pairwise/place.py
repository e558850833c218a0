"""The folder of a run: what lies where, whose it is, and how it is begun and looked at from outside.

    begin(recipe, "outputs/mine", records)         # recipe.data is records_file("outputs/mine")
    finish(run(recipe, "outputs/mine"))            # later, elsewhere, as often as needed
    curves(recipe, "outputs/mine")                 # meanwhile: the losses so far
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from fusion.distill.store import write_whole
from fusion.errors import FusionError, MismatchError, OutputError
from fusion.merge import RECIPE_FILE as MERGE_RECIPE
from fusion.pairwise.recipe import FuseRecipe
from fusion.recipe import Recipe
from fusion.train import history

RECIPE_FILE = "fuse_recipe.yaml"
_MAY_CHANGE = ("sources", "mode", "merge", "batch_tokens")


class Place:
    """The files of one run under its folder."""

    def __init__(self, out: str | os.PathLike):
        self.out = Path(out).absolute()
        self.dialogues = self.out / "work" / "dialogues.jsonl"
        self.report = self.out / "work" / "dialogues_report.json"

    def distributions(self, name: str) -> Path:
        return self.out / "work" / "distributions" / name.replace("/", "-")

    def fused(self, target: str) -> Path:
        return self.out / "work" / "fused" / target

    def target(self, target: str) -> Path:
        return self.out / "targets" / target

    def merges(self) -> list[Path]:
        """The folders of its merges, the latest first."""
        names = chain(["merged"], (f"merged-{number}" for number in count(2)))
        made = []
        while os.path.lexists(folder := self.out / next(names)):
            made.insert(0, folder)
        return made

    def next_merge(self) -> Path:
        """Where a new merge goes: nothing is ever overwritten."""
        return self.out / (f"merged-{len(made) + 1}" if (made := self.merges()) else "merged")


def current_merge(recipe: FuseRecipe, place: Place) -> Path | None:
    """The merge of just these targets by these settings, as its own recipe tells; None when there is none (yet).

    A run that was given one more source, or another method, has earlier merges, which stay where they are.
    """
    wanted = _settings(recipe.merge_recipe(recipe.pivot, recipe.target_names))
    return next((folder for folder in place.merges() if _merged_by(folder) == wanted), None)


def _merged_by(folder: Path) -> dict | None:
    try:
        return _settings(Recipe.load(folder / MERGE_RECIPE))
    except FusionError:
        return None


def _settings(recipe: Recipe) -> dict:
    """What a merge is made by; its targets by name, for a run's folder may be moved."""
    return recipe.explicit().with_(targets=recipe.names, revisions={}, result={}).to_dict()


def agree(recipe: FuseRecipe, place: Place) -> None:
    """Make sure that what lies in the folder, if anything, is of the same recipe; OutputError or MismatchError when not."""
    file = place.out / RECIPE_FILE
    if place.out.exists() and not file.exists() and any(place.out.iterdir()):
        raise OutputError("the folder is not empty and was not made by this program", where=str(place.out),
                          todo="Choose another folder.")
    if not file.exists():
        return
    now, before = recipe.to_dict(), FuseRecipe.load(file).to_dict()
    other = sorted(key for key in now.keys() | before.keys() if key not in _MAY_CHANGE and now.get(key) != before.get(key))
    if other:
        raise MismatchError(f"the folder was begun with another recipe ({', '.join(other)} differ)", where=str(place.out),
                            todo="Choose another folder, or give the recipe it was begun with.")


def claim(recipe: FuseRecipe, place: Place) -> None:
    """Make the folder, or make sure that what lies there is of the same recipe."""
    agree(recipe, place)
    try:
        (place.out / "work").mkdir(parents=True, exist_ok=True)
        write_whole(place.out / RECIPE_FILE, recipe.to_yaml().encode())
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(place.out)) from error


def records_file(out: str | os.PathLike) -> Path:
    """Where a run keeps dialogues that were made for it."""
    return Path(out) / "dialogues.jsonl"


def begin(recipe: FuseRecipe, out: str | os.PathLike, records: Sequence[dict] = ()) -> None:
    """Make the run's folder and keep its recipe there, and `records` of dialogues if there are any; may be done again.

    OutputError when something else lies there, MismatchError when the run was begun with another recipe or other dialogues.
    """
    recipe.check()
    file, text = records_file(out), "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if records and file.exists() and file.read_bytes() != text:
        raise MismatchError("the run was begun with other dialogues", where=str(out), todo="Choose another name.")
    claim(recipe, Place(out))
    if records and not file.exists():
        write_whole(file, text)


def is_run(folder: str | os.PathLike) -> bool:
    """Whether a folder is that of a run, which may be gone on with."""
    return (Path(folder) / RECIPE_FILE).is_file()


def recipe_of(out: str | os.PathLike) -> FuseRecipe:
    """The recipe that a run was begun with; RecipeError when there is none."""
    return FuseRecipe.load(Path(out) / RECIPE_FILE)


def curves(recipe: FuseRecipe, out: str | os.PathLike) -> dict[str, tuple[dict, ...]]:
    """The loss curve of every target so far, () before its training began: step, loss, clm, fusion, learning_rate."""
    return {target: history(Place(out).target(target)) for target in recipe.target_names}
