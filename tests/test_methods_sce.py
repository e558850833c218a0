"""SCE: the worked example, its three readings, and what it has in common with VARM."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.methods import apply

ZERO = np.zeros((2, 3), np.float32)
ONE, TWO = [[1, -1, .5], [0, 2, .1]], [[2, 1, .5], [0, -1, .1]]


@pytest.mark.parametrize(("compat", "topk", "merged"), [
    ("paper", 1.0, [[1.5, .5, .5], [0, 1, .1]]), ("paper", .5, [[0, 0, 0], [0, 1.6, 0]]),
    ("mergekit", 1.0, [[1.5, 1, .5], [0, 2, .1]]), ("mergekit", .5, [[0, 0, 0], [0, 2, 0]]),
    ("authors", 1.0, [[1.5, 1, .5], [0, 2, .1]]), ("authors", .5, [[1.2, 1, .5], [0, 2, .1]])])
def test_the_worked_example(compat, topk, merged):
    """Half of the three numbers that differ is one: (1, 1). There the weights are 4 : 1."""
    assert apply("sce", ZERO, [ONE, TWO], select_topk=topk, compat=compat) == pytest.approx(np.array(merged), abs=1e-6)


def test_the_paper_is_the_default():
    assert apply("sce", ZERO, [ONE, TWO]).tolist() == apply("sce", ZERO, [ONE, TWO], compat="paper").tolist()


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1.0])
def test_small_changes_are_weighed_as_large_ones_are(size):
    """mergekit takes equal weights below a sum of mean squares of 1e-6: changes of 1e-4 and 3e-4 then count the same."""
    models = np.array([[size] * 4, [3 * size] * 4])
    assert apply("sce", np.zeros(4), models) == pytest.approx(np.full(4, 2.8 * size), rel=1e-6)
    uniform = apply("sce", np.zeros(4), models, compat="mergekit")
    assert uniform == pytest.approx(np.full(4, (2 if size < 1e-3 else 2.8) * size), rel=1e-6)


def test_mergekits_threshold_is_on_mean_squares():
    models = np.array([[5e-4] * 100, [8e-4] * 100])  # mean squares sum to 0.89e-6, squares to 89e-6
    assert apply("sce", np.zeros(100), models, compat="mergekit") == pytest.approx(np.full(100, 6.5e-4), rel=1e-6)


def test_without_conflicts_it_is_varm():
    random = np.random.default_rng(0)
    pivot = random.normal(size=(5, 7)).astype(np.float32)
    delta = np.abs(random.normal(size=(3, 5, 7))) * [[[1]], [[2]], [[3]]] * .01
    models = (pivot + delta).astype(np.float32)
    moved = np.square(models.astype(float) - pivot).sum(axis=(1, 2))
    assert apply("sce", pivot, models) == pytest.approx(apply("varm", pivot, models, moved / moved.sum()), rel=1e-6)


@given(st.integers(2, 5), st.integers(2, 60), st.floats(0.01, 0.99))
def test_exactly_the_numbers_that_differ_most_are_selected(count, size, topk):
    random = np.random.default_rng(size)
    models = random.normal(size=(count, size)).astype(np.float32) * (random.random(size) < .8)
    spread = models.astype(float).std(axis=0)
    kept = max(1, int(topk * np.count_nonzero(spread))) if spread.any() else size
    merged = apply("sce", np.zeros(size), np.abs(models) + np.float32(1e-3) * (models > 0), select_topk=topk)
    spread = (np.abs(models) + np.float32(1e-3) * (models > 0)).astype(float).std(axis=0)
    chosen = np.argsort(-spread.astype(np.float32), kind="stable")[:kept]
    assert set(np.flatnonzero(merged)) == set(chosen)


def test_equal_numbers_are_selected_in_order():
    models = np.array([[1, 2, 1, 2, 1], [2, 1, 2, 1, 2]])
    assert np.count_nonzero(apply("sce", np.zeros(5), models, select_topk=.6)) == 3
    assert apply("sce", np.zeros(5), models, select_topk=.6)[3:].tolist() == [0, 0]


def test_at_least_one_number_is_selected_and_none_at_0():
    models = [[1, 2, 3], [1, 4, 3]]
    assert apply("sce", np.zeros(3), models, select_topk=.1) == pytest.approx([0, 3.6, 0])
    assert apply("sce", np.zeros(3), models, select_topk=.1, compat="mergekit").tolist() == [0, 0, 0]
    assert apply("sce", np.zeros(3), models, select_topk=0.0).tolist() == [0, 0, 0]


def test_where_no_number_differs_there_is_nothing_to_select_by():
    assert apply("sce", np.zeros(3), [[1, 2, 3]], select_topk=.1).tolist() == [1, 2, 3]
    assert apply("sce", np.zeros(2), [[1, 2]] * 3, select_topk=.1) == pytest.approx([1, 2])
    assert apply("sce", np.zeros(3), [[1, 2, 3]], select_topk=.1, compat="mergekit").tolist() == [0, 0, 0]


def test_a_sum_of_0_elects_plus():
    assert apply("sce", np.zeros(1), [[1], [-1]]).tolist() == [.5]
