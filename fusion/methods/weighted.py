"""Weighted averages of the targets: one weight per tensor (`weighted`) or one per element (`elementwise`)."""

from __future__ import annotations

import numpy as np


def weighted(pivot: np.ndarray, models: np.ndarray, weights: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write pivot + Σⱼ wⱼ·(modelⱼ − pivot) into `out`.

    `pivot`, `out` [n] float32, `models` [J, n] float32, `weights` [J] that sum to 1. With weights that sum to 1 this is
    Σⱼ wⱼ·modelⱼ, yet small updates of large weights keep their digits. A model of weight 1 is copied exactly.
    """
    alone = np.flatnonzero(weights)
    if len(alone) == 1 and weights[alone[0]] == 1:
        np.copyto(out, models[alone[0]])
        return out
    np.copyto(out, pivot)
    step = np.empty_like(out)
    for model, weight in zip(models, weights, strict=True):
        np.subtract(model, pivot, out=step)
        step *= np.float32(weight)
        out += step
    return out


def elementwise(pivot: np.ndarray, models: np.ndarray, fixed: np.ndarray, out: np.ndarray, *, power: int = 2) -> np.ndarray:
    """Write pivot + Σⱼ Wⱼ·Δⱼ with Wⱼ = |Δⱼ|ᵖ / Σᵢ |Δᵢ|ᵖ for every element by itself into `out`.

    `fixed` [J] holds weights that are given (NaN = free); the free targets share what is left. An element that no free
    target changed keeps the pivot's value: the reference code sets it to 0 and destroys the model. `power` 2 = square,
    1 = absolute. Source: FuseChat, arXiv 2402.16107, section 4.5 (parameter granularity).
    """
    deltas = models - pivot
    free = np.isnan(fixed)
    given = np.where(free, 0, fixed).astype(np.float32)
    np.copyto(out, pivot)
    for delta, weight in zip(deltas[~free], given[~free], strict=True):
        out += weight * delta
    size = np.abs(deltas[free])
    if not len(size):
        return out
    largest = size.max(axis=0)
    np.divide(size, largest, out=size, where=largest > 0)
    if power == 2:
        np.square(size, out=size)
    total = size.sum(axis=0)
    rest = np.float32(max(0.0, 1.0 - float(given.sum())))
    share = np.einsum("jn,jn->n", size, deltas[free])
    out += rest * np.divide(share, total, out=np.zeros_like(share), where=total > 0)
    return out
