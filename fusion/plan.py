"""Plan purely, then touch the disk: what a recipe means for every tensor, and the arithmetic of one tensor in blocks.

`merge` writes these blocks to a folder, `live` keeps them in memory; both get the same bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusion import dtypes
from fusion.checkpoint import Checkpoint
from fusion.errors import MismatchError, RecipeError, Stopped
from fusion.methods import METHODS, elementwise, weighted
from fusion.preflight import Preflight, mergeable_names, preflight
from fusion.recipe import Recipe
from fusion.variation import BLOCK, Variation, nonfinite
from fusion.weights import WeightPlan


@dataclass(frozen=True)
class MergePlan:
    """A checked recipe with its checkpoints open; nothing was read but headers."""

    recipe: Recipe
    pivot: Checkpoint
    targets: tuple[Checkpoint, ...]
    weights: WeightPlan
    report: Preflight

    @classmethod
    def open(cls, recipe: Recipe, out: str | os.PathLike | None = None) -> MergePlan:
        """Open the checkpoints of a recipe and run the preflight; FusionError for the first thing in the way."""
        recipe.check()
        pivot = Checkpoint(recipe.pivot, recipe.pivot_name)
        targets = tuple(Checkpoint(path, name) for path, name in zip(recipe.targets, recipe.names, strict=True))
        report = preflight(pivot, targets, out=out, dtype=recipe.dtype or None).raise_if_bad()
        plan = cls(recipe, pivot, targets, WeightPlan.of(recipe, mergeable_names(pivot)), report)
        for label, fingerprint in recipe.revisions.items():
            if label in plan.labelled and plan.labelled[label].fingerprint != fingerprint:
                raise RecipeError("this is not the checkpoint the recipe was run on", where=label,
                                  todo="Give the same checkpoint, or remove `revisions` from the recipe.")
        return plan

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """Pivot first, then the targets."""
        return (self.pivot, *self.targets)

    @property
    def labelled(self) -> dict[str, Checkpoint]:
        """The checkpoints by the names that a recipe has for them: "pivot" and the targets' names."""
        return dict(zip(("pivot", *self.recipe.names), self.models, strict=True))

    @property
    def donor(self) -> Checkpoint:
        """The checkpoint that gives tokenizer, chat template and generation config."""
        return self.labelled[self.recipe.donor]

    @property
    def pools_tensors(self) -> bool:
        """Whether a tensor's weights depend on other tensors, so that all must be measured before the first is merged."""
        return METHODS[self.recipe.method].measured and self.recipe.granularity in ("layer", "module", "model")

    @property
    def per_element(self) -> bool:
        """Whether every element has weights of its own."""
        return METHODS[self.recipe.method].measured and self.recipe.granularity == "parameter"

    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype code and shape of every tensor of the result, in the pivot's order."""
        return [(name, self.code(name), tensor.shape) for name, tensor in self.pivot.info.items()
                if name not in self.pivot.tied_copies]

    @property
    def dtype(self) -> str:
        """Name of the dtype that most of the result is stored with."""
        return self.recipe.dtype or dtypes.name(self.pivot.dtype)

    def code(self, name: str) -> str:
        """The dtype code that a tensor is stored with."""
        stored = self.pivot.info[name].dtype
        return dtypes.code(self.recipe.dtype) if self.recipe.dtype and stored in dtypes.FLOATS else stored

    def read_bytes(self, name: str) -> int:
        """Bytes that merging this tensor reads, all models together."""
        return sum(model.info[name].nbytes for model in self.models)

    def ratios(self, variation: Variation) -> np.ndarray:
        """The measured ratios [T, J] at the recipe's granularity and measure."""
        if (variation.names, variation.targets) != (self.weights.names, self.recipe.names):
            raise MismatchError("the variation was measured on other models", todo="Measure these models again.")
        return variation.ratios(self.recipe.granularity, self.recipe.measure)

    def blocks(self, t: int, ratio: np.ndarray, stop: threading.Event) -> Iterator[tuple[int, np.ndarray]]:
        """Merge tensor number `t` whose measured ratios are `ratio` [J]; yields (first element, stored numbers).

        float32 arithmetic, one cast. CheckpointError when a number read or made is NaN or Inf and that is not allowed.
        """
        name = self.weights.names[t]
        numel, code = self.pivot.info[name].numel, self.code(name)
        size = min(BLOCK, max(numel, 1))
        base, result = np.empty(size, np.float32), np.empty(size, np.float32)
        models = np.empty((len(self.targets), size), np.float32)
        for start in range(0, numel, BLOCK):
            if stop.is_set():
                raise Stopped("stopped")
            n = min(BLOCK, numel - start)
            block = self.pivot.read(name, start, start + n, base)
            for j, target in enumerate(self.targets):
                target.read(name, start, start + n, models[j])
            with np.errstate(over="ignore", invalid="ignore"):  # found two lines below
                sound = np.isfinite(block).all() and np.isfinite(models[:, :n]).all()
                stored = dtypes.encode(self._merge(t, ratio, block, models[:, :n], result[:n]), code)
            if not self.recipe.allow_nonfinite and (not sound or dtypes.overflowed(stored, code)):
                raise nonfinite(name, self.models)
            yield start, stored

    def _merge(self, t: int, ratio: np.ndarray, pivot: np.ndarray, models: np.ndarray, out: np.ndarray) -> np.ndarray:
        if self.weights.excluded[t]:
            return pivot
        given = self.weights.given[t]
        if self.per_element and np.isnan(given).any():
            return elementwise(pivot, models, given, out, power=2 if self.recipe.measure == "square" else 1)
        return weighted(models, self.weights.row(t, ratio), out)
