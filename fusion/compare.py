"""What differs between two recipes, or between two merged folders: settings, weights, every matrix, config, tokenizer.

    compare_recipes(load_stages("a.yaml"), load_stages("b.yaml"))      # the settings that differ, nothing else is read
    finish(compare("merge-a", "merge-b")).distance                     # [tensors]: ‖second − first‖ ÷ ‖first‖

Price: recipes are plain data; folders are read once, with their common pivot where it is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.alike import alike
from fusion.anatomy import place
from fusion.checkpoint import Checkpoint
from fusion.configs import Difference, differences, flat, stop_tokens
from fusion.errors import FusionError, MismatchError
from fusion.inspection.deltas import gram, squares
from fusion.inspection.report import plain, share
from fusion.inspection.streaming import fold
from fusion.merge import RECIPE_FILE, VARIATION_FILE
from fusion.preflight import mergeable_names
from fusion.progress import Work
from fusion.recipe import Recipe, load_stages, short_names
from fusion.slices import is_lent
from fusion.sources import open_checkpoint


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints side by side, for the T tensors that both have in one shape.

    `square` [T] Σ (second − first)², `first_square` [T]; `products` [T, 2, 2] of both task vectors from the common `pivot`, None
    where none is known. `only` first → names that the other has not in this shape, likewise second. `weights` rows of
    effective weights that differ, where both merges recorded them; `notes` what could not be compared, and why.
    """

    models: tuple[str, str]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    square: np.ndarray
    first_square: np.ndarray
    pivot: str
    products: np.ndarray | None
    only: tuple[tuple[str, ...], tuple[str, ...]]
    recipe: tuple[Difference, ...] | None
    config: tuple[Difference, ...]
    tokenizer: Mapping[str, object]
    weights: tuple[dict, ...]
    notes: tuple[str, ...] = ()

    @property
    def distance(self) -> np.ndarray:
        """‖second − first‖ ÷ ‖first‖ of every tensor, [T]; NaN beside a first of zeros."""
        return np.sqrt(share(self.square, self.first_square))

    @property
    def cosine(self) -> np.ndarray:
        """Cosine of both task vectors from the common pivot, [T]; NaN where one did not move or there is no pivot."""
        if self.products is None:
            return np.full(len(self.names), np.nan)
        norms = np.sqrt(self.products[:, 0, 0] * self.products[:, 1, 1])
        return np.clip(share(self.products[:, 0, 1], norms, np.nan), -1, 1)

    @property
    def same_weights(self) -> bool:
        """Whether both hold the same tensors with the same numbers."""
        return not self.square.any() and not any(self.only)

    @property
    def totals(self) -> dict[str, float | None]:
        """Over all tensors: `distance` and `cosine`."""
        products = None if self.products is None else self.products.sum(axis=0)
        cosine = np.nan if products is None else share(products[0, 1], np.sqrt(products[0, 0] * products[1, 1]), np.nan)
        return {"distance": plain(np.sqrt(share(self.square.sum(), self.first_square.sum()))), "cosine": plain(cosine)}

    def rows(self) -> list[dict]:
        """One plain dict per tensor; numbers that are undefined are None."""
        distance, cosine = self.distance, self.cosine
        return [{"tensor": name, "layer": place(name).layer, "module": place(name).module, "matrix": place(name).matrix,
                 "shape": list(self.shapes[t]), "distance": plain(distance[t]), "cosine": plain(cosine[t])}
                for t, name in enumerate(self.names)]

    def to_dict(self) -> dict:
        """Plain data: what `--json` prints."""
        return {"models": list(self.models), "same_weights": self.same_weights, "total": self.totals, "pivot": self.pivot or None,
                "only_first": list(self.only[0]), "only_second": list(self.only[1]),
                "recipe": None if self.recipe is None else [vars(one) for one in self.recipe],
                "config": [vars(one) for one in self.config], "tokenizer": dict(self.tokenizer), "weights": list(self.weights),
                "notes": list(self.notes), "tensors": self.rows()}


def compare_recipes(first: Sequence[Recipe], second: Sequence[Recipe]) -> tuple[Difference, ...]:
    """The settings in which two recipes (each a sequence of stages) differ, defaults written out; paths of stages count from 1."""
    def table(stages: Sequence[Recipe]) -> dict[str, object]:
        if len(stages) == 1:
            return flat(_named(stages[0]))
        return {f"stage {n}.{key}": value for n, recipe in enumerate(stages, 1) for key, value in flat(_named(recipe)).items()}

    return _differences(table(first), table(second))


def compare(first: str | os.PathLike, second: str | os.PathLike, pivot: str | os.PathLike = "") -> Work[Comparison]:
    """Compare two checkpoints, merged or not; yields Progress.

    `pivot`: the model that both come from (default: that of their recipes, where these agree). Raises CheckpointError for
    folders that cannot be read, MismatchError when no tensor is common to both.
    """
    refs = [os.fspath(first), os.fspath(second)]
    models = [open_checkpoint(ref, name) for ref, name in zip(refs, short_names(refs), strict=True)]
    notes: list[str] = []
    base = open_checkpoint(pivot) if pivot else _common_pivot(models, notes)
    try:
        return (yield from _compared(models, base, notes))
    finally:
        for model in (*models, *([base] if base else [])):
            model.close()


def recipe_of(folder: Path) -> tuple[Recipe, ...]:
    """The stages recorded in a merged folder; none where there is no recipe."""
    return load_stages(folder / RECIPE_FILE) if (folder / RECIPE_FILE).is_file() else ()


class _PairSums:
    """Sums over one tensor: blocks are [2 or 3, n], the common pivot last."""

    def __init__(self):
        self.square, self.first_square, self.products = 0.0, 0.0, np.zeros((2, 2))

    def add(self, blocks: np.ndarray, bad: np.ndarray) -> None:
        """Add one block; see `streaming.Sums`."""
        self.square += squares(np.subtract(blocks[1], blocks[0], dtype=np.float64))
        self.first_square += squares(blocks[0].astype(np.float64))
        if len(blocks) > 2:
            self.products += gram(np.subtract(blocks[:2], blocks[2], dtype=np.float64))


def _compared(models: Sequence[Checkpoint], base: Checkpoint | None, notes: list[str]) -> Work[Comparison]:
    first, second = models[0], alike(models[0], models[1])
    base = base and alike(first, base)
    wanted, given = mergeable_names(first), [name for name in mergeable_names(second) if not is_lent(second, name)]
    names = [name for name in wanted if name in set(given) and second.info[name].shape == first.info[name].shape]
    if not names:
        raise MismatchError(f"no matrix has the same name and shape in {first.name}", where=second.name)
    if base is not None and any(name not in base.info or is_lent(base, name) or base.info[name].shape != first.info[name].shape
                                for name in names):
        notes.append(f"Directions were not compared: {base.name} has not the shape of both.")
        base = None
    read = (first, second) if base is None else (first, second, base)
    sums = yield from fold("Comparing", read, names, lambda name: _PairSums())

    def table(field: str) -> np.ndarray:
        return np.array([getattr(sums[name], field) for name in names])

    known = set(names)
    recipes = [recipe_of(model.folder) for model in models]
    return Comparison(
        (first.name, second.name), tuple(names), tuple(first.info[name].shape for name in names), table("square"),
        table("first_square"), base.name if base else "", table("products") if base else None,
        (tuple(name for name in wanted if name not in known), tuple(name for name in given if name not in known)),
        compare_recipes(*recipes) if all(recipes) else None, _configs(first, second),
        _tokenizers(first, second), tuple(_weights(first, second)), tuple(notes))


def _configs(first: Checkpoint, second: Checkpoint) -> tuple[Difference, ...]:
    """What the configs say otherwise, and where replies end."""
    ends = [{f"eos_token_id ({file})": list(ids) for file, ids in stop_tokens(model).items()} for model in (first, second)]
    return (*differences(first.config, second.config), *_differences(*ends))


def _common_pivot(models: Sequence[Checkpoint], notes: list[str]) -> Checkpoint | None:
    """The pivot of both recipes where they agree; says in `notes` why there is none."""
    recipes = [recipe_of(model.folder)[-1:] for model in models]
    if not all(recipes):
        return None
    (first,), (second,) = recipes
    digests = [recipe.revisions.get("pivot") for recipe in (first, second)]
    if digests[0] != digests[1] if all(digests) else first.pivot != second.pivot:
        notes.append("Directions were not compared: the two merges have different pivots.")
        return None
    try:
        return open_checkpoint(first.pivot, first.pivot_name)
    except FusionError as error:
        notes.append(f"Directions were not compared, as the pivot cannot be read. {error}")
        return None


def _tokenizers(first: Checkpoint, second: Checkpoint) -> dict[str, object]:
    """How tokenizer and chat template differ: counts of tokens, None where one has no tokenizer.json."""
    mine, theirs = first.vocabulary, second.vocabulary
    found: dict[str, object] = {"same_chat_template": first.chat_template == second.chat_template}
    if mine is None or theirs is None:
        return {**found, "same_vocabulary": None}
    common = mine.keys() & theirs.keys()
    return {**found, "same_vocabulary": mine == theirs, "tokens": [len(mine), len(theirs)],
            "only_first": len(mine) - len(common), "only_second": len(theirs) - len(common),
            "renumbered": sum(mine[token] != theirs[token] for token in common)}


def _weights(first: Checkpoint, second: Checkpoint):
    """Effective weights that both merges recorded and that differ, the largest difference of a tensor's targets first."""
    mine, theirs = (_recorded(model.folder) for model in (first, second))
    rows = [{"tensor": tensor, "target": target, "first": mine[tensor, target], "second": theirs[tensor, target]}
            for tensor, target in mine if (tensor, target) in theirs and mine[tensor, target] != theirs[tensor, target]]
    return sorted(rows, key=lambda row: -abs(row["first"] - row["second"]))


def _recorded(folder: Path) -> dict[tuple[str, str], float]:
    """Tensor, target → effective weight of a merged folder; nothing where none was measured or the file is not ours."""
    try:
        rows = json.loads((folder / VARIATION_FILE).read_text(encoding="utf-8"))["tensors"]
        return {(row["tensor"], row["target"]): float(row["weight"]) for row in rows if "weight" in row}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _named(recipe: Recipe) -> dict:
    """A recipe as plain data with its targets by their names, so that their order alone is one difference."""
    data = recipe.explicit().to_dict()
    return {**data, "targets": {one["name"]: one["path"] for one in data["targets"]}, "order": list(recipe.names)}


def _differences(first: Mapping[str, object], second: Mapping[str, object]) -> tuple[Difference, ...]:
    keys = dict.fromkeys([*first, *second])
    return tuple(Difference(key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key))
