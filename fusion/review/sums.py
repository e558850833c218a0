"""What is added up of one tensor of a merge and its parents, and what rounding lost of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fusion import dtypes
from fusion.checkpoint import Checkpoint
from fusion.inspection.deltas import gram, squares
from fusion.merge import compute
from fusion.plan import MergePlan
from fusion.progress import Work


class ReviewSums:
    """Sums over one tensor: blocks are [P + 1, n] float32, the pivot first and the result last.

    `distance` [P] Σ (result − parent)²; `parent_square` [P]; `gram` [P, P] products of the targets' and the result's task
    vectors from the pivot; `beyond` elements outside the range of the parents' values; `bad` elements of the result that are
    not finite.
    """

    def __init__(self, parents: int):
        self.distance, self.parent_square, self.gram = np.zeros(parents), np.zeros(parents), np.zeros((parents, parents))
        self.beyond = self.bad = 0

    def add(self, blocks: np.ndarray, bad: np.ndarray) -> None:
        """Add one block; see `streaming.Sums`."""
        self.bad += int(bad[-1])
        parents, result = blocks[:-1], blocks[-1]
        for p, parent in enumerate(parents):
            self.parent_square[p] += squares(parent.astype(np.float64))
            self.distance[p] += squares(np.subtract(result, parent, dtype=np.float64))
        self.gram += gram(np.subtract(blocks[1:], blocks[0], dtype=np.float64))
        self.beyond += int(np.count_nonzero((result > parents.max(axis=0)) | (result < parents.min(axis=0))))


@dataclass
class Rounding:
    """Of one tensor: Σ (stored − exact)² and Σ (exact − pivot)²."""

    lost: float = 0.0
    change: float = 0.0


@dataclass
class _Comparer:
    """A sink of `compute` that keeps nothing but how far its numbers are from those of the stored result."""

    todo: Sequence[str]
    pivot: Checkpoint
    result: Checkpoint
    found: dict[str, Rounding]
    finished: Mapping[str, Mapping] = field(default_factory=dict)

    def write(self, name: str, start: int, stored: np.ndarray | bytes) -> None:
        """Compare the exact numbers from `start` on with the stored ones."""
        if name not in self.found:
            return
        exact, end = np.asarray(stored, np.float64), start + len(stored)
        rounded = self.result.read(name, start, end, np.empty(len(stored), np.float32))
        pivot = self.pivot.read(name, start, end, np.empty(len(stored), np.float32))
        with np.errstate(invalid="ignore"):
            error, change = rounded - exact, exact - pivot
        sound = np.isfinite(error) & np.isfinite(change)
        self.found[name].lost += squares(np.where(sound, error, 0.0))
        self.found[name].change += squares(np.where(sound, change, 0.0))

    def done(self, name: str, notes: Mapping) -> None:
        """Nothing to keep."""


def rounding_of(plan: MergePlan, result: Checkpoint) -> Work[dict[str, Rounding] | None]:
    """Run a plan's recipe in float32 and compare; None when the result is not what the recipe makes now.

    The result's own dtype decides what was lost: a result in float32 lost nothing worth a second run.
    """
    outputs = {name: tensor.shape for name, tensor in result.info.items()}
    if any(outputs.get(name) != plan.pivot.info[name].shape for name in plan.number):
        return None
    if all(result.info[name].dtype in ("F32", "F64") for name in plan.number):
        return {name: Rounding() for name in plan.number}
    exact = MergePlan.open(plan.recipe.with_(dtype="float32", revisions={}, result={}))
    try:
        names = [name for name, _, _ in exact.outputs()]
        sink = _Comparer(names, exact.pivot, result, {name: Rounding() for name in plan.number
                                                      if result.info[name].dtype in dtypes.FLOATS})
        yield from compute(exact, sink)
        return sink.found
    finally:
        exact.close()
