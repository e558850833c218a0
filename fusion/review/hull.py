"""How far a merge lies from every mix of its parents: the distance to their convex hull, from the products of task vectors.

With the pivot as origin a mix is Σ wⱼ·Δⱼ, w ≥ 0, Σ w ≤ 1 (the rest is the pivot's share), so J + 1 numbers a tensor decide and
no weight is read again. For one target the hull is the segment between pivot and target. Solved for all tensors at once by
projected gradient steps with momentum (Beck & Teboulle 2009); the projection is Duchi et al. 2008.
"""

from __future__ import annotations

import numpy as np

STEPS = 400


def nearest_mix(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [T, J] of the mix of parents that lies nearest to the result, and its distance [T].

    `gram` [T, J + 1, J + 1] float64: products of the targets' task vectors and, last, the result's.
    """
    if gram.shape[1] == 1:  # nothing but the pivot
        return np.zeros((len(gram), 0)), np.sqrt(gram[:, 0, 0])
    scale = np.maximum(np.einsum("tjj->tj", gram).max(axis=1), np.finfo(np.float64).tiny)[:, None, None]
    scaled = gram / scale
    inner, cross, own = scaled[:, :-1, :-1], scaled[:, :-1, -1], scaled[:, -1, -1]
    step = 1 / np.maximum(np.einsum("tjj->t", inner), 1e-300)[:, None]  # the trace is not below the largest eigenvalue
    weights = ahead = np.zeros_like(cross)
    pace = 1.0
    for _ in range(STEPS):
        last, weights = weights, _onto_simplex(ahead - step * (np.einsum("tij,tj->ti", inner, ahead) - cross))
        following = (1 + np.sqrt(1 + 4 * pace**2)) / 2
        ahead, pace = weights + (pace - 1) / following * (weights - last), following
    left = own - 2 * np.einsum("tj,tj->t", cross, weights) + np.einsum("ti,tij,tj->t", weights, inner, weights)
    left = np.where(left > 1e-14, left, 0.0)  # what rounding leaves of a result inside
    return weights, np.sqrt(left * scale[:, 0, 0])


def _onto_simplex(points: np.ndarray) -> np.ndarray:
    """The nearest points [T, J] with all coordinates ≥ 0 and a sum of at most 1."""
    clipped = np.maximum(points, 0)
    ordered = -np.sort(-points, axis=1)
    excess = (np.cumsum(ordered, axis=1) - 1) / np.arange(1, points.shape[1] + 1)
    count = np.count_nonzero(ordered > excess, axis=1)
    level = excess[np.arange(len(points)), np.maximum(count, 1) - 1][:, None]
    return np.where(clipped.sum(axis=1, keepdims=True) > 1, np.maximum(points - level, 0), clipped)
