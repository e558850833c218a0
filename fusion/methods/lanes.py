"""Sums of float64 in one fixed order: number i in lane i mod 128, then the lanes by halves.

The order is part of the result, so it must not be numpy's own, which is not promised; and compiled code can follow it.
"""

from __future__ import annotations

import numpy as np

LANES = 128


def lane_sum(values: np.ndarray) -> float:
    """The sum of `values` [n] of any float dtype, in float64."""
    whole = values.size // LANES * LANES
    lanes = values[:whole].reshape(-1, LANES).sum(axis=0, dtype=np.float64)
    lanes[:values.size - whole] += values[whole:]
    while lanes.size > 1:
        lanes = lanes[:lanes.size // 2] + lanes[lanes.size // 2:]
    return float(lanes[0])


def lane_product(one: np.ndarray, other: np.ndarray) -> float:
    """The inner product of two vectors [n] of float64."""
    return lane_sum(one * other)
