"""Interpolation on the sphere and model stock: worked angles, directions that do not exist, vectors one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.methods import apply

ROOT = math.sqrt(.5)
VECTORS = arrays(np.float32, 4, elements=st.floats(-10, 10, width=32))


def angle(a, b) -> float:
    a, b = (np.asarray(its, float) / np.linalg.norm(np.asarray(its, float)) for its in (a, b))
    return 2 * math.atan2(np.linalg.norm(a - b), np.linalg.norm(a + b))


# ── two models ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_slerp_of_a_right_angle():
    assert apply("slerp", np.array([1, 0]), [[0, 1]], t=.5) == pytest.approx([ROOT, ROOT])
    assert apply("slerp", np.array([1, 0]), [[0, 1]], t=1 / 3) == pytest.approx([math.cos(math.pi / 6), .5])
    assert apply("slerp", np.array([9, 9]), [[2, 0], [0, 2]], t=1 / 3) == pytest.approx([2 * math.cos(math.pi / 6), 1])


@given(VECTORS, VECTORS)
def test_slerp_starts_at_the_first_and_ends_at_the_second(a, b):
    assert np.array_equal(apply("slerp", a, [b], t=0.0), a) and np.array_equal(apply("slerp", a, [b], t=1.0), b)
    assert np.array_equal(apply("slerp", a, [a], t=.3), a)


@given(VECTORS, VECTORS, st.floats(0, 1))
def test_slerp_divides_the_angle(a, b, t):
    assume(min(np.linalg.norm(a), np.linalg.norm(b)) > 1e-3 and .05 < angle(a, b) < math.pi - .05)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    merged = apply("slerp", a, [b], t=t)
    assert angle(a, merged) == pytest.approx(t * angle(a, b), abs=1e-5) and np.linalg.norm(merged) == pytest.approx(1, abs=1e-5)


def test_on_one_line_slerp_goes_straight():
    assert apply("slerp", np.array([1, 2]), [[-3, -6]], t=.25).tolist() == [0, 0]
    assert apply("slerp", np.array([1, 2]), [[3, 6]], t=.5).tolist() == [2, 4]


def test_nuslerp_takes_its_way_from_the_weights():
    pair = [[1, 0], [0, 1]]
    assert apply("nuslerp", np.zeros(2), pair, [2, 1]) == pytest.approx(apply("slerp", np.zeros(2), pair, t=1 / 3))
    assert apply("nuslerp", np.zeros(2), pair, [1, -1]) == pytest.approx([ROOT, ROOT])  # weights that sum to 0: the middle
    assert apply("nuslerp", np.array([1, 1]), [[2, 1], [1, 2]], space="deltas") == pytest.approx([1 + ROOT, 1 + ROOT])


def test_nuslerp_of_single_vectors():
    first, second = np.array([[1, 0], [0, 1]]), np.array([[0, 1], [0, 1]])
    rows = apply("nuslerp", np.zeros((2, 2)), [first, second], flatten=False)
    assert rows == pytest.approx(np.array([[ROOT, ROOT], [0, 1]]))
    columns = apply("nuslerp", np.zeros((2, 2)), [first.T, second.T], flatten=False, row_wise=True)
    assert columns == pytest.approx(rows.T)
    moved = apply("nuslerp", np.full((2, 2), 7), [first + 7, second + 7], flatten=False, space="deltas")
    assert moved == pytest.approx(rows + 7, rel=1e-6)


def test_vectors_that_reach_over_several_blocks():
    models = np.random.default_rng(0).normal(size=(2, 90_000, 2))
    columns = apply("nuslerp", np.zeros((90_000, 2)), models, flatten=False, row_wise=True)
    one_by_one = [apply("nuslerp", np.zeros(90_000), models[:, :, column]) for column in (0, 1)]
    assert columns == pytest.approx(np.array(one_by_one).T, rel=1e-5, abs=1e-6)
    rows = apply("nuslerp", np.zeros((2, 90_000)), models.transpose(0, 2, 1), flatten=False)
    assert rows == pytest.approx(columns.T, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("last", [-4, -4.0001, -4.002, -4.05])
def test_nuslerp_of_nearly_opposite_vectors_stays_between_them(last):
    """Along the arc their lengths, which differ, would be multiplied by 1/sin of an angle near 180°."""
    merged = apply("nuslerp", np.zeros(3), [[1, 2, 2], [-2, -4, last]])
    assert merged == pytest.approx([-.5, -1, (2 + last) / 2])


# ── any number ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_multislerp_is_the_mean_direction_at_the_mean_length():
    assert apply("multislerp", np.zeros(2), [[1, 0], [0, 3]]) == pytest.approx([2 * ROOT, 2 * ROOT])
    merged = apply("multislerp", np.zeros(2), [[1, 0], [0, 3]], [2, 2], normalize_weights=False)
    assert merged == pytest.approx([8 * ROOT, 8 * ROOT])
    assert apply("multislerp", np.array([1, 1]), [[2, 1], [1, 4]], space="deltas") == pytest.approx([1 + 2 * ROOT, 1 + 2 * ROOT])


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_targets_that_cancel_have_no_direction_so_the_average_is_taken(method):
    third = math.sqrt(.75)
    assert apply(method, np.zeros(2), [[1, 2], [-3, -6]]).tolist() == [-1, -2]
    assert apply(method, np.zeros(2), [[1, 0], [-.5, third], [-.5, -third]]) == pytest.approx([0, 0], abs=1e-7)
    assert apply(method, np.zeros(2), [[0, 0], [0, 0]]).tolist() == [0, 0]


@given(arrays(np.float32, (3, 4), elements=st.floats(0.5, 10, width=32)), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_karcher_is_where_the_weighted_pulls_cancel(models, weights):
    share = np.array(weights) / sum(weights)
    mean = apply("karcher", np.zeros(4), models, share, max_iter=100, tol=1e-9).astype(float)
    units = models / np.linalg.norm(models.astype(float), axis=1, keepdims=True)
    centre = mean / np.linalg.norm(mean)
    pull = np.zeros(4)
    for unit, weight in zip(units, share, strict=True):
        across = unit - (unit @ centre) * centre
        pull += weight * angle(unit, centre) * across / max(np.linalg.norm(across), 1e-12)
    assert np.linalg.norm(pull) < 1e-5
    assert np.linalg.norm(mean) == pytest.approx(share @ np.linalg.norm(models.astype(float), axis=1), rel=1e-5)


def test_karcher_of_two_is_the_middle_of_the_arc():
    assert apply("karcher", np.zeros(2), [[2, 0], [0, 2]]) == pytest.approx([2 * ROOT, 2 * ROOT])
    assert apply("karcher", np.zeros(2), [[2, 0], [0, 2]], [2 / 3, 1 / 3]) == pytest.approx([2 * math.cos(math.pi / 6), 1])


def test_a_target_of_zeros_has_no_direction_but_counts_in_the_length():
    assert apply("karcher", np.zeros(2), [[0, 0], [3, 4]]) == pytest.approx([1.5, 2])
    assert apply("multislerp", np.zeros(2), [[0, 0], [3, 4]]) == pytest.approx([1.5, 2])


def test_a_target_so_short_that_float32_has_no_factor_for_it_counts_as_0():
    for method in ("karcher", "multislerp"):
        assert apply(method, np.zeros(1), [[1e-38], [18]]) == pytest.approx([9])


def test_a_target_opposite_the_mean_pulls_nowhere():
    """The bisector of the first two is (2, 1); rounding alone says to which side of it the third lies."""
    opposite = [-2, np.nextafter(np.float32(-1), np.float32(-2))]
    merged = apply("karcher", np.zeros(2), [[1, 0], [.6, .8], opposite], [.4, .4, .2]).astype(float)
    assert merged[1] / merged[0] == pytest.approx(.5, abs=1e-5) and merged[0] > 0


def test_tiny_vectors_turn_as_large_ones_do():
    for method in ("multislerp", "karcher", "nuslerp", "model_stock"):
        models = np.array([[1, 0, .5], [0, 1, .5]], np.float32)
        right = apply(method, np.zeros(3), models) * 1e-9
        assert apply(method, np.zeros(3), models * 1e-9) == pytest.approx(right, rel=1e-5, abs=0)


# ── model stock ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_model_stock_by_hand():
    """cos 60° = 0.5: t = 2·0.5/(1 + 0.5) = 2/3 of the way to the average."""
    models = np.array([[1, 0], [.5, math.sqrt(.75)]])
    assert apply("model_stock", np.zeros(2), models) == pytest.approx(models.mean(axis=0) * 2 / 3)
    assert apply("model_stock", np.array([10, 10]), models + 10) == pytest.approx(10 + models.mean(axis=0) * 2 / 3)


def test_model_stock_of_orthogonal_or_opposed_changes_is_the_pivot():
    pivot = np.array([5, 6], np.float32)
    for other in ([0, 1], [-1, 0], [-1, .1], [-1, 1e-4], [-3, 0]):
        assert np.array_equal(apply("model_stock", pivot, pivot + np.array([[1, 0], other])), pivot)


@given(arrays(np.float32, (3, 2, 4), elements=st.floats(-10, 10, width=32)), st.booleans())
def test_model_stock_lies_between_pivot_and_average(models, filter_wise):
    pivot = np.ones((2, 4), np.float32)
    merged, mean = apply("model_stock", pivot, models, filter_wise=filter_wise), models.mean(axis=0)
    room = 1e-5 * np.abs(models).max() + 1e-5
    assert (np.minimum(pivot, mean) - room <= merged).all() and (merged <= np.maximum(pivot, mean) + room).all()


def test_model_stock_by_rows():
    models = np.array([[[1, 0], [1, 0]], [[1, 0], [0, 1]]])
    assert apply("model_stock", np.zeros((2, 2)), models, filter_wise=True) == pytest.approx(np.array([[1, 0], [0, 0]]), abs=1e-7)
