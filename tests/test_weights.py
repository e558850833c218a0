"""fusion.weights: measured or given numbers, then overrides, then exclusions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.recipe import Override, Recipe
from fusion.variation import Variation
from fusion.weights import WeightPlan, effective_weights

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight")
RATIOS = np.array([[.2, .3, .5], [.6, .2, .2], [1, 0, 0]])


def table(*overrides: Override, ratios=RATIOS, **settings) -> np.ndarray:
    recipe = Recipe("pivot", ("a", "b", "c"), overrides=overrides, **settings).check()
    return WeightPlan.of(recipe, NAMES).table(ratios)


def test_measured_ratios_are_the_weights():
    assert np.array_equal(table(), RATIOS)


def test_linear_weights_are_the_numbers_divided_by_their_sum():
    assert table(method="linear", weights=(1, 2, 1)).tolist() == [[.25, .5, .25]] * 3
    assert table(method="linear") == pytest.approx(np.full((3, 3), 1 / 3))


def test_an_override_fixes_its_targets_and_the_others_share_the_rest_as_before():
    assert table(Override(NAMES[0], {"c": .8}))[0] == pytest.approx([.08, .12, .8])
    assert table(Override(NAMES[0], {"a": .1, "b": .2, "c": .7}))[0] == pytest.approx([.1, .2, .7])
    assert np.array_equal(table(Override(NAMES[0], {"c": .8}))[1:], RATIOS[1:])


def test_weights_given_to_all_are_divided_by_their_sum():
    assert table(Override(NAMES[0], {"a": .3, "b": .3, "c": .4000005}))[0].sum() == pytest.approx(1, abs=1e-12)


def test_the_rest_is_shared_equally_where_it_had_no_weight():
    assert table(Override("lm_head.weight", {"a": .4}))[2] == pytest.approx([.4, .3, .3])


def test_a_later_override_wins_and_an_exclusion_wins_over_all():
    both = (Override("*", {"a": 1}), Override("*layers.1.*", {"b": 1}))
    assert table(*both).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert table(*both, exclude=("*layers.0*",)).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_no_pattern_excludes_nothing():
    assert not WeightPlan.of(Recipe("pivot", ("a",)), NAMES).excluded.any()


@given(raw=st.lists(st.integers(0, 50), min_size=3, max_size=3),
       given_weights=st.dictionaries(st.sampled_from("abc"), st.floats(0, 1 / 3), max_size=2))
def test_rows_always_sum_to_one(raw, given_weights):
    ratio = np.array(raw, float) / sum(raw) if sum(raw) else np.full(3, 1 / 3)
    overrides = (Override("*", given_weights),) if given_weights else ()
    for settings in ({}, {"method": "linear", "weights": (3, 1, -1)}):
        rows = table(*overrides, ratios=np.tile(ratio, (3, 1)), **settings)
        assert np.allclose(rows.sum(axis=1), 1)
        assert all(rows[0]["abc".index(name)] == value for name, value in given_weights.items())


def test_effective_weights_are_known_before_merging():
    ones = np.ones((3, 3))
    variation = Variation(NAMES, ((2,),) * 3, ("a", "b", "c"), RATIOS, ones, ones, ones[:, 0])
    plan, weights = effective_weights(Recipe("pivot", ("a", "b", "c"), exclude=("lm_head*",)), variation)
    assert plan.excluded.tolist() == [False, False, True]
    assert weights == pytest.approx(np.array([RATIOS[0], RATIOS[1], [0, 0, 0]]))
