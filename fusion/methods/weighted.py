"""Weighted averages of the targets: one weight per tensor (`weighted`) or one per element (`elementwise`).

Both start from a target, not from the pivot: with weights that sum to 1 that is the same number, but a value that moved far
from the pivot keeps all its digits, equal targets stay exactly as they are, and no result leaves the range of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def weighted(models: Sequence[np.ndarray], weights: np.ndarray, out: np.ndarray,
             work: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Write Σⱼ wⱼ·modelⱼ into `out`, as the heaviest model + Σⱼ wⱼ·(modelⱼ − heaviest).

    `models` [J, n] float32, `weights` [J] that sum to 1, `out` [n] float32, `work` two arrays [n] to compute in.
    """
    base = int(np.argmax(weights))
    shift, step = work or (np.empty_like(out), np.empty_like(out))
    shift[:] = 0
    for j, weight in enumerate(weights):
        if j != base and weight:
            np.subtract(models[j], models[base], out=step)
            step *= np.float32(weight)
            shift += step
    return np.add(models[base], shift, out=out)


def combine(models: Sequence[np.ndarray], coefficients: np.ndarray, out: np.ndarray,
            work: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Write Σⱼ cⱼ·modelⱼ into `out`: as `weighted` when the coefficients [J] sum to 1, term by term otherwise."""
    if abs(coefficients.sum() - 1) < 1e-12:
        return weighted(models, coefficients, out, work)
    step = work[0] if work else np.empty_like(out)
    np.multiply(models[0], np.float32(coefficients[0]), out=out)
    for model, coefficient in zip(models[1:], coefficients[1:], strict=True):
        out += np.multiply(model, np.float32(coefficient), out=step)
    return out


def elementwise(pivot: np.ndarray, models: np.ndarray, fixed: np.ndarray, out: np.ndarray, *, power: int = 2) -> np.ndarray:
    """Write Σⱼ Wⱼ·modelⱼ with Wⱼ = |Δⱼ|ᵖ / Σᵢ |Δᵢ|ᵖ for every element by itself into `out`; Δⱼ = modelⱼ − pivot.

    `fixed` [J] holds weights that are given (NaN = free); the free targets share what is left. An element that no free
    target changed keeps the pivot's value: the reference code sets it to 0 and destroys the model. `power` 2 = square,
    1 = absolute. Source: FuseChat, arXiv 2402.16107, section 4.5 (parameter granularity).
    """
    free = np.isnan(fixed)
    size = np.abs(models[free] - pivot)
    largest = size.max(axis=0, initial=0)
    still = largest == 0
    size[:, still] = largest[still] = 1  # all free targets have the pivot's value here, so any shares give it
    size /= largest  # before squaring: the square of a small change may be 0
    if power == 2:
        size *= size
    size /= size.sum(axis=0)
    size *= np.float32(max(0.0, 1.0 - float(fixed[~free].sum())))
    weights = np.repeat(fixed.astype(np.float32)[:, None], models.shape[1], axis=1)
    weights[free] = size
    weights *= models
    weights.sum(axis=0, out=out)
    return np.clip(out, models.min(axis=0), models.max(axis=0), out=out)
