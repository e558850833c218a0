"""Sums of float64 in one fixed order: number i in lane i mod 128, then the lanes by halves.

The order is part of the result, so it must not be numpy's own, which is not promised; and compiled code can follow it.
"""

from __future__ import annotations

import numpy as np

from fusion import compiled


def lane_sum(values: np.ndarray) -> float:
    """The sum of `values` [n] float32 or float64, in float64."""
    return compiled.loops().lane_sum(np.ascontiguousarray(values))


def lane_squares(values: np.ndarray) -> float:
    """The sum of the squares of `values` [n] float32, in float64."""
    return compiled.loops().lane_squares(np.ascontiguousarray(values))


def lane_product(one: np.ndarray, other: np.ndarray) -> float:
    """The inner product of two vectors [n] of float64."""
    return compiled.loops().lane_product(np.ascontiguousarray(one), np.ascontiguousarray(other))
