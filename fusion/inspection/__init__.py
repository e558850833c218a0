"""Look at how targets moved before merging them: more than the ratio, and quickly.

    report = finish(inspect(pivot, targets))
    report.values("conflict")                      # [tensors]: how often the targets pull in opposite directions
    report.values("relative", "layer")             # [tensors, targets]
    finish(preview(pivot, targets)).error()        # a sample's standard errors, within a second or two

Price: `inspect` reads every byte of every model once; its stable ranks take longer than all the rest together and hold one
task vector in float32 in memory. Sources: task vectors arXiv 2212.04089; sign conflict as TIES counts it, arXiv 2306.01708;
stable rank Rudelson & Vershynin 2007.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion import dtypes
from fusion.checkpoint import Checkpoint
from fusion.inspection.deltas import DeltaSums
from fusion.inspection.report import QUANTITIES, Inspection, Quantity, check_granularity
from fusion.inspection.sampling import Preview, exact, preview, refine
from fusion.inspection.spectrum import largest_singular_values
from fusion.inspection.streaming import fold
from fusion.preflight import mergeable_names, preflight
from fusion.progress import Work
from fusion.untied import side_by_side

__all__ = ["QUANTITIES", "Inspection", "Preview", "Quantity", "check_granularity", "exact", "inspect", "preview", "refine"]


def inspect(pivot: Checkpoint, targets: Sequence[Checkpoint], *, dtype: str | None = None, spectral: bool = True,
            allow_nonfinite: bool = False) -> Work[Inspection]:
    """Read pivot and targets once and return their Inspection; yields Progress.

    `dtype` is what the result would be stored as (None: every tensor as in the pivot); it decides what rounding loses.
    `spectral` also measures stable ranks. Raises what `measure` raises: MismatchError when a target has not the pivot's shape,
    CheckpointError for NaN or Inf unless `allow_nonfinite`, RecipeError for an unknown dtype.
    """
    code = dtypes.code(dtype) if dtype else None
    pivot, targets = side_by_side(pivot, targets)
    preflight(pivot, targets).raise_if_bad()
    names = mergeable_names(pivot)

    def make(name: str) -> DeltaSums:
        return DeltaSums([target.info[name].dtype for target in targets], code or pivot.info[name].dtype)

    sums = yield from fold("Inspecting", (pivot, *targets), names, make, allow_nonfinite=allow_nonfinite)

    def table(field: str) -> np.ndarray:
        return np.array([getattr(sums[name], field) for name in names])

    square = np.einsum("tjj->tj", table("gram"))
    sigma = (yield from largest_singular_values(pivot, targets, names, square)) if spectral else None
    return Inspection(tuple(names), tuple(pivot.info[name].shape for name in names), tuple(target.name for target in targets),
                      dtype or dtypes.name(pivot.dtype), *map(table, (
                          "gram", "pivot_square", "changed", "moved", "conflict", "lost", "back", "mean_lost", "mean_back",
                          "mean_changed")), sigma)
