"""nearswap and arcee_fusion: numbers taken over one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.methods import apply

VALUES = arrays(np.float32, 9, elements=st.floats(-1e3, 1e3, width=32))


def test_nearswap_by_hand():
    assert apply("nearswap", np.array([0, 0, 0, 5]), [[.5, 2, -3, 5]], t=1.0).tolist() == [.5, 1, -1, 5]


@given(VALUES, VALUES, st.floats(0, 100))
def test_nearswap_moves_no_number_further_than_t_and_near_ones_all_the_way(a, b, t):
    merged = apply("nearswap", a, [b], t=t)
    near = np.abs(b - a) <= np.float32(t)
    assert np.array_equal(merged[near], b[near])
    assert (np.abs(merged - a.astype(float)) <= t * (1 + 1e-6) + np.spacing(np.abs(a) + np.float32(t))).all()
    assert (np.minimum(a, b) <= merged).all() and (merged <= np.maximum(a, b)).all()


def exact_fusion(pivot: np.ndarray, target: np.ndarray) -> np.ndarray:
    """arcee_fusion of whole float64 arrays."""
    def soft(rows):
        e = np.exp(rows.astype(float) - rows.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) + 1e-8
    p, q = soft(target), soft(pivot)
    score = (np.abs(target - pivot) * np.maximum((p * np.log(p / q)).sum(axis=-1, keepdims=True), 0)).astype(np.float32)
    ordered = np.sort(score.reshape(-1))
    low, median, high = (ordered[int(q * (ordered.size - 1))] for q in (.25, .5, .75))
    return np.where(score >= median + np.float32(1.5) * (high - low), target, pivot)


@pytest.mark.parametrize("shape", [(7,), (1, 5), (5, 1), (6, 9), (2, 3, 4), (3, 70_000), (300, 400)])
def test_arcee_fusion_takes_what_is_beyond_the_fence(shape):
    random = np.random.default_rng(0)
    pivot = random.normal(size=shape).astype(np.float32)
    target = (pivot + random.standard_t(2, size=shape) * .1).astype(np.float32)
    merged = apply("arcee_fusion", pivot, [target])
    assert np.array_equal(merged, exact_fusion(pivot, target))
    taken = (merged == target).mean()
    assert (taken <= .5 and (taken > 0 or merged.size < 10)) or shape[-1] == 1  # the softmax of one column cannot change
