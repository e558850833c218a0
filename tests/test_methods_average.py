"""Averages: checked against float64 and against what must hold for any numbers; linear, varm and passthrough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.methods import apply, elementwise, weighted
from fusion.methods.average import shares

FREE = np.nan
VALUES = st.floats(-1e6, 1e6, width=32)


@st.composite
def cases(draw, least: int = 1):
    """A pivot [n], models [J, n] and weights [J] that sum to 1."""
    count, n = draw(st.integers(least, 5)), draw(st.integers(1, 6))
    raw = np.array(draw(st.lists(st.integers(0, 100), min_size=count, max_size=count)), float)
    weights = raw / raw.sum() if raw.sum() else np.full(count, 1 / count)
    return draw(arrays(np.float32, n, elements=VALUES)), draw(arrays(np.float32, (count, n), elements=VALUES)), weights


def average(models: np.ndarray, weights) -> np.ndarray:
    return weighted(models, np.asarray(weights, float), np.empty(models.shape[1], np.float32))


def by_element(pivot: np.ndarray, models: np.ndarray, fixed=None, power: int = 2) -> np.ndarray:
    fixed = np.full(len(models), FREE) if fixed is None else np.array(fixed, float)
    return elementwise(pivot, models, fixed, np.empty_like(pivot), power=power)


def exact_by_element(pivot, models, power: int) -> np.ndarray:
    pivot, models = pivot.astype(float), models.astype(float)
    size = np.abs(models - pivot) ** power
    total = size.sum(axis=0)
    shares = np.divide(size, total, out=np.full_like(size, 1 / len(size)), where=total > 0)
    return (shares * models).sum(axis=0)


# ── one weight per tensor ────────────────────────────────────────────────────────────────────────────────────────────

def test_the_golden_merged_values():
    q0, up0 = np.array([[.1], [.3]], np.float32), np.array([[.2], [.1]], np.float32)
    assert average(q0, [.1, .9]) == pytest.approx([.28], abs=1e-7)
    assert average(up0, [.8, .2]) == pytest.approx([.18], abs=1e-7)


@given(cases())
def test_an_average_is_the_float64_sum_to_float32_precision(case):
    _, models, weights = case
    exact = (weights[:, None] * models.astype(float)).sum(axis=0)
    room = np.spacing(np.abs(models).max(axis=0)) * 4
    assert (np.abs(average(models, weights) - exact) <= room).all()


@given(cases())
def test_an_average_stays_within_the_range_of_the_targets(case):
    _, models, weights = case
    merged = average(models, weights)
    assert (models.min(axis=0) <= merged).all() and (merged <= models.max(axis=0)).all()


@given(cases())
def test_equal_targets_and_single_weights_are_copied_exactly(case):
    _, models, weights = case
    assert np.array_equal(average(np.repeat(models[:1], len(models), axis=0), weights), models[0])
    for j, alone in enumerate(np.eye(len(models))):
        assert np.array_equal(average(models, alone), models[j])


def test_small_differences_of_large_numbers_survive():
    models = np.array([[1000], [np.nextafter(np.float32(1000), np.float32(2000))]], np.float32)
    assert np.array_equal(average(models, [0, 1]), models[1]) and np.array_equal(average(models, [.9, .1]), models[0])


def test_weights_may_go_beyond_the_targets():
    assert average(np.array([[1], [3]], np.float32), [2, -1]).tolist() == [-1]


# ── one weight per element ───────────────────────────────────────────────────────────────────────────────────────────

@given(cases(), st.sampled_from([1, 2]))
def test_elements_are_weighed_by_their_own_change(case, power):
    pivot, models, _ = case
    room = np.spacing(np.maximum(np.abs(models).max(axis=0), np.abs(pivot))) * 16
    assert (np.abs(by_element(pivot, models, power=power) - exact_by_element(pivot, models, power)) <= room).all()


@given(cases(), st.sampled_from([1, 2]))
def test_elements_stay_within_the_range_of_the_targets(case, power):
    pivot, models, _ = case
    merged = by_element(pivot, models, power=power)
    assert (models.min(axis=0) <= merged).all() and (merged <= models.max(axis=0)).all()


@given(cases())
def test_elements_of_one_target_or_of_equal_targets_are_copied_exactly(case):
    pivot, models, _ = case
    for count in (1, 3):
        assert np.array_equal(by_element(pivot, np.repeat(models[:1], count, axis=0)), models[0])


@given(cases())
def test_elements_no_target_changed_keep_the_pivots_value(case):
    pivot, models, _ = case
    assert np.array_equal(by_element(pivot, np.repeat(pivot[None], len(models), axis=0)), pivot)


@pytest.mark.parametrize("delta", [1e-30, 1e-7, 1.0])
def test_the_smallest_changes_are_weighed_as_large_ones_are(delta):
    merged = by_element(np.zeros(1, np.float32), np.array([[delta], [3 * delta]], np.float32))
    assert merged == pytest.approx([2.8 * delta], rel=1e-6, abs=0)


def test_given_weights_leave_the_rest_to_the_free_targets():
    pivot, models = np.zeros(2, np.float32), np.array([[1, 1], [1, 0], [3, 0]], np.float32)
    assert by_element(pivot, models, [.5, FREE, FREE], power=1) == pytest.approx([.5 + .5 * (.25 + .75 * 3), .5])
    assert by_element(pivot, models, [.5, .5, 0]) == pytest.approx([1, .5])
    assert by_element(np.array([10], np.float32), np.array([[12], [10], [10]], np.float32), [.5, FREE, FREE]).tolist() == [11]


@pytest.mark.parametrize("call", [lambda p, m: average(m, [.3, .7]), by_element])
def test_a_method_changes_nothing_but_its_result(call):
    pivot, models = np.zeros(3, np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    before = pivot.copy(), models.copy()
    first = call(pivot, models).copy()
    assert np.array_equal(pivot, before[0]) and np.array_equal(models, before[1])
    assert np.array_equal(call(pivot, models), first)


# ── methods ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_linear_divides_by_the_sum_of_the_weights_unless_told_not_to():
    models = np.array([[1, 2], [3, 6]], np.float32)
    assert apply("linear", np.zeros(2), models, [1, 3]).tolist() == [2.5, 5]
    assert apply("linear", np.zeros(2), models, [1, 3], normalize=False).tolist() == [10, 20]
    assert apply("linear", np.zeros(2), models).tolist() == [2, 4]


def test_weights_that_sum_to_0_have_no_average_so_targets_count_the_same():
    assert shares(np.array([0.3, -0.1, -0.2])).tolist() == [1 / 3] * 3 and shares(np.zeros(2)).tolist() == [0.5, 0.5]
    assert apply("linear", np.zeros(1), [[1], [3]], [1, -1]).tolist() == [2]


def test_varm_is_linear_with_the_weights_it_is_given():
    models = np.random.default_rng(0).normal(size=(3, 4, 5))
    assert np.array_equal(apply("varm", models[0], models, [.2, .3, .5]), apply("linear", models[0], models, [.2, .3, .5]))


def test_passthrough_copies_and_scales():
    assert apply("passthrough", np.zeros(2), [[1, -3]]).tolist() == [1, -3]
    assert apply("passthrough", np.zeros(2), [[1, -3]], scale=np.array([.5])).tolist() == [.5, -1.5]
