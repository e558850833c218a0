"""fusion.weights: measured or given numbers, then overrides, then exclusions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import RecipeError
from fusion.methods import METHODS
from fusion.recipe import Curve, Override, Recipe, Table
from fusion.variation import Variation, normalise
from fusion.weights import OptionPlan, WeightPlan, effective_weights, measured_weights

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


# ── numbers, curves, tables and measured weights together ────────────────────────────────────────────────────────────

def test_given_numbers_leave_the_rest_to_variation():
    assert table(weights=(.4, "variation", "variation")) == pytest.approx(np.array([[.4, .225, .375], [.4, .3, .3], [.4, .3, .3]]))
    assert table(weights="variation", method="linear") == pytest.approx(RATIOS)
    assert table(weights=(1, 2, 1)).tolist() == [[.25, .5, .25]] * 3  # varm measures only what is not given


def test_a_curve_and_a_table_give_every_tensor_its_own_numbers():
    assert table(method="linear", weights=(Curve((0, 1)), .5, .5)) == pytest.approx(
        np.array([[0, .5, .5], [.5, .25, .25], [.5, .25, .25]]))
    heads = Table((("*", "variation"), ("lm_head.*", .5)))
    assert table(weights=("variation", heads, "variation")) == pytest.approx(np.array([*RATIOS[:2], [.5, .5, 0]]))


def test_an_override_goes_over_numbers_and_variation_alike():
    rows = table(Override(NAMES[0], {"b": .5}), weights=(.4, "variation", "variation"))
    assert rows[0] == pytest.approx([.5 * .4 / .775, .5, .5 * .375 / .775])
    assert table(Override("*", {"c": .5}), Override(NAMES[0], {"b": .25}), weights=(2, 1, 1))[0] == pytest.approx([.5, .25, .25])


def test_factors_are_taken_as_they_are():
    assert table(method="ties").tolist() == [[1, 1, 1]] * 3
    assert table(method="ties", weights=(.3, -2, 1.5)).tolist() == [[.3, -2, 1.5]] * 3
    assert table(method="ties", weights=("variation", 2, Curve((0, 1)))) == pytest.approx(
        np.array([[.2, 2, 0], [.6, 2, 1], [1, 2, 1]]))


def test_an_override_of_factors_sets_what_it_names_and_nothing_else():
    both = (Override("*", {"a": -3}), Override("*layers.1.*", {"b": 7}), Override("lm_head.weight", {"a": 0}))
    assert table(*both, method="ties", weights=(1, 2, "variation"), exclude=(NAMES[0],)) == pytest.approx(
        np.array([[0, 0, 0], [-3, 7, .2], [0, 2, 0]]))


def test_shares_that_must_not_be_divided_by_their_sum_are_factors():
    given = {"method": "linear", "weights": (.3, .3, .3)}
    assert table(**given) == pytest.approx(np.full((3, 3), 1 / 3))
    assert table(**given, options={"normalize": False}).tolist() == [[.3, .3, .3]] * 3


def test_a_method_without_weights_has_none():
    plan = WeightPlan.of(Recipe("pivot", ("a", "b", "c"), method="sce", exclude=("lm_head*",)).check(), NAMES)
    assert plan.kind == "" and not plan.measured and plan.excluded.tolist() == [False, False, True]
    assert plan.row(0, RATIOS[0]).shape == (0,) and plan.table(RATIOS).shape == (3, 0)


@pytest.mark.parametrize(("settings", "said"), [
    ({"weights": (Curve((0, 1)), 0, 0), "method": "linear"},
     f"weights: the weights of {NAMES[0]} are 0, 0, 0; their sum must be above 0"),
    ({"weights": (Curve((0, 1)), .5, "variation")},
     f"weights: the weights of {NAMES[1]} are 1, 0.5, variation; beside variation, numbers must be from 0 to 1"),
    ({"weights": (Curve((0, -1)), .5, "variation")}, f"weights: the weights of {NAMES[1]} are -1, 0.5, variation; beside"),
    ({"weights": (Table((("*head*", 1),)), 1, 1)}, f"weights: a: no row of the table matches {NAMES[0]}"),
    ({"weights": (1, Table((("*", 1), ("*haed*", 1))), 1)}, "weights: b: no tensor matches '*haed*'"),
    ({"overrides": (Override("x", {"a": 1}),)}, "overrides: no tensor matches 'x'"),
    ({"exclude": ("x",)}, "exclude: no tensor matches 'x'"),
    ({"method": "sce", "options": {"select_topk": Table((("x", 1),))}}, "options: select_topk: no tensor matches 'x'")])
def test_what_makes_no_sense_in_some_tensor_is_refused_with_its_name(settings, said):
    with pytest.raises(RecipeError) as caught:
        recipe = Recipe("pivot", ("a", "b", "c"), **settings).check()
        WeightPlan.of(recipe, NAMES), OptionPlan.of(recipe, NAMES)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("settings", "measured"), [
    ({}, True), ({"weights": (1, 1, 1)}, False), ({"weights": (0, .5, "variation")}, True), ({"method": "ties"}, False),
    ({"method": "ties", "weights": "variation"}, True), ({"exclude": ("*",)}, False),
    ({"overrides": (Override("*", {"a": 1, "b": 0, "c": 0}),)}, False), ({"overrides": (Override("*", {"a": 1}),)}, True)])
def test_variation_is_asked_for_only_where_it_counts(settings, measured):
    assert WeightPlan.of(Recipe("pivot", ("a", "b", "c"), **settings).check(), NAMES).measured is measured


def test_what_is_fixed_for_single_parameters():
    def fixed(*overrides, **settings):
        plan = WeightPlan.of(Recipe("pivot", ("a", "b", "c"), overrides=overrides, **settings).check(), NAMES)
        return plan.fixed(0, RATIOS[0])

    nan = float("nan")
    assert fixed() == pytest.approx([nan] * 3, nan_ok=True)
    assert fixed(Override("*", {"c": .8})) == pytest.approx([nan, nan, .8], nan_ok=True)
    assert fixed(weights=(.4, "variation", "variation")) == pytest.approx([.4, nan, nan], nan_ok=True)
    assert fixed(Override("*", {"b": .5}), weights=(.4, "variation", "variation")) == pytest.approx(
        [.5 * .4 / .775, .5, nan], nan_ok=True)
    assert fixed(Override("*", {"a": .2, "b": .3, "c": .5})) == pytest.approx([.2, .3, .5])


SETTINGS = st.floats(.05, .3) | st.just("variation") | st.builds(Curve, st.lists(st.floats(.05, .3), min_size=2, max_size=3))


@given(weights=st.tuples(SETTINGS, SETTINGS, SETTINGS), fixed=st.none() | st.floats(0, 1), raw=st.lists(
    st.integers(0, 50), min_size=9, max_size=9))
def test_shares_of_any_settings_sum_to_one_and_are_never_negative(weights, fixed, raw):
    ratios = normalise(np.array(raw, float).reshape(3, 3))
    overrides = () if fixed is None else (Override("*", {"b": fixed}),)
    rows = table(*overrides, weights=weights, ratios=ratios)
    assert (rows >= 0).all() and rows.sum(axis=1) == pytest.approx(np.ones(3))
    assert fixed is None or (rows[:, 1] == fixed).all()


# ── how variation becomes a weight ───────────────────────────────────────────────────────────────────────────────────

def measured(square, **settings) -> np.ndarray:
    square = np.array(square, float)
    ones = np.ones_like(square)
    variation = Variation(NAMES[:len(square)], ((1,),) * len(square), ("a", "b"), square, ones, ones, ones[:, 0])
    return measured_weights(Recipe("pivot", ("a", "b"), **settings).check(), variation)


def test_softmax_is_taken_of_the_variation_over_its_largest():
    near, far = 1 / (1 + np.exp(8 / 9)), 1 / (1 + np.exp(80 / 9))
    assert measured([[.01, .09]]) == pytest.approx(np.array([[.1, .9]]))
    assert measured([[.01, .09]], rule="softmax") == pytest.approx(np.array([[near, 1 - near]]))
    assert measured([[.01, .09]], rule="softmax", temperature=.1) == pytest.approx(np.array([[far, 1 - far]]))
    assert measured([[1e-10, 9e-10], [0, 0]], rule="softmax") == pytest.approx(np.array([[near, 1 - near], [.5, .5]]))
    assert measured([[1, 9]], rule="softmax", temperature=1e-9).tolist() == [[0, 1]]
    # the published code's softmax of v itself is this one at temperature T / max v
    assert measured([[.01, .09]], rule="softmax", temperature=.01 / .09)[0] == pytest.approx([.000335, .999665], abs=1e-6)


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def options(method: str, **given) -> OptionPlan:
    return OptionPlan.of(Recipe("pivot", ("a", "b"), method=method, options=given).check(), NAMES)


def test_options_are_arguments_of_the_method_for_every_tensor():
    plan = options("ties", density=(.2, Curve((0, 1))), **{"lambda": Table((("*", 1), ("*head*", 2)))}, rescale=True)
    assert [plan.row(t)["density"].tolist() for t in range(3)] == [[.2, 0], [.2, 1], [.2, 1]]
    assert plan.row(0)["density"].dtype == np.float64
    assert [plan.row(t)["lambda_"] for t in range(3)] == [1, 1, 2]
    assert plan.row(1)["rescale"] is True and plan.row(1)["normalize"] is True


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_those_of_the_method(method):
    row = options(method).row(0) if METHODS[method].max_targets != 1 else OptionPlan.of(
        Recipe("pivot", ("a",), method=method), NAMES).row(0)
    assert {name: np.unique(value).tolist() for name, value in row.items()} == {
        option.argument: [option.default] for option in METHODS[method].options}
    assert all(row[option.argument].shape == (METHODS[method].max_targets or 2,) for option in METHODS[method].options
               if option.per_target)
