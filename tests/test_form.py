"""The method form: what it shows of every method, what it takes from the page, and layer stacks as people write them."""

from __future__ import annotations

import json

import pytest

from components.form import parse_change, payload
from components.merging.layout import FAMILIES, method_choices
from components.merging.setting import command_line
from components.merging.stacking import parse_stack, picture, write_stack
from components.state import Settings, starting_value
from fusion import METHODS, Recipe, RecipeError
from fusion.__main__ import main
from fusion.settings import VARIATION, Curve, Table

TWO = ("A name", "<b>B</b>")


def test_every_method_stands_in_one_family():
    listed = [name for names in FAMILIES.values() for name in names]
    assert sorted(listed) == sorted(METHODS) and len(set(listed)) == len(listed)
    assert [name for family in FAMILIES for _, name in method_choices(family)] == listed


@pytest.mark.parametrize("method", METHODS)
def test_the_form_shows_every_option_of_a_method(method):
    wish = Settings().with_method(method)
    shown = payload(wish, TWO, 4)
    json.dumps(shown, allow_nan=False)
    assert [field["name"] for field in shown["fields"]] == [option.name for option in METHODS[method].options]
    for field, option in zip(shown["fields"], METHODS[method].options, strict=True):
        assert field["value"] == starting_value(option) and not option.problem(field["value"])
    assert (shown["weights"] is None) == (not METHODS[method].weights)
    assert [stage["title"] for stage in shown["stages"]] == list(METHODS[method].stages)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_form_starts_with_is_a_recipe(method):
    targets = ("a", "b")[:METHODS[method].max_targets or 2]
    wish = Settings().with_method(method)
    assert Recipe("pivot", targets, method=method, options=dict(wish.options)).problems() == []


@pytest.mark.parametrize(("method", "change", "wanted"), [
    ("ties", {"field": "density", "value": 0.3}, ("density", 0.3)),
    ("ties", {"field": "density", "value": [0.3, {"curve": [0, 1]}]}, ("density", (0.3, Curve((0, 1))))),
    ("ties", {"field": "density", "value": {"patterns": "* = 0.5\n*.mlp.* = 0.1, 0.9"}},
     ("density", Table((("*", 0.5), ("*.mlp.*", Curve((0.1, 0.9))))))),
    ("ties", {"field": "normalize", "value": False}, ("normalize", False)),
    ("sce", {"field": "compat", "value": "mergekit"}, ("compat", "mergekit")),
    ("slerp", {"field": "t", "value": {"curve": [0, 0.5, 1]}}, ("t", Curve((0, 0.5, 1)))),
])
def test_options_come_back_as_the_recipe_has_them(method, change, wanted):
    wish = parse_change(change, Settings().with_method(method), 2)
    assert wanted in wish.options
    assert parse_change({"field": change["field"], "value": None}, wish, 2).options == Settings().with_method(method).options


@pytest.mark.parametrize(("value", "wanted"), [
    ([1, 3], (1, 3)), ([VARIATION, 0.3], (VARIATION, 0.3)), ([{"curve": [0, 1]}, 1], (Curve((0, 1)), 1)),
    ([{"patterns": "* = 1\nlm_head.weight = 0"}, 1], (Table((("*", 1.0), ("lm_head.weight", 0.0))), 1)), (None, ())])
def test_weights_of_all_kinds(value, wanted):
    wish = parse_change({"field": "weights", "value": value}, Settings().with_method("linear"), 2)
    assert wish.weights == wanted and hash(wish)
    shown = payload(wish, TWO, 4)["weights"]
    assert shown["changed"] == bool(wanted) and len(shown["values"]) == 2
    assert wish.measured == (VARIATION in wanted)


@pytest.mark.parametrize(("change", "word"), [
    ("text", "not an object"), ({"field": 3}, "not an object"), ({"field": "densty", "value": 1}, "Did you mean 'density'"),
    ({"field": "density", "value": 2}, "from 0 to 1"), ({"field": "density", "value": "much"}, "from 0 to 1"),
    ({"field": "density", "value": float("nan")}, "density"), ({"field": "density", "value": [1, 1, 1]}, "3 values for 2"),
    ({"field": "density", "value": [1] * 99}, "one for each"), ({"field": "density", "value": {"curve": [0.5]}}, "two points"),
    ({"field": "density", "value": {"curve": [0] * 99}}, "33"), ({"field": "density", "value": {"patterns": ""}}, "no row"),
    ({"field": "density", "value": {"patterns": "* = x"}}, "line 1"),
    ({"field": "density", "value": {"patterns": "x" * 30_000}}, "long"),
    ({"field": "density", "value": {"__class__": 1}}, "density"), ({"field": "weights", "value": [1]}, "1 numbers for 2"),
    ({"field": "normalize", "value": 1}, "true or false"), ({"field": "weights", "value": "variaton"}, "weights")])
def test_nothing_from_the_page_is_trusted(change, word):
    with pytest.raises(RecipeError, match=word):
        parse_change(change, Settings().with_method("ties"), 2)


def test_methods_without_weights_take_none():
    with pytest.raises(RecipeError, match="no weights"):
        parse_change({"field": "weights", "value": [1, 1]}, Settings().with_method("sce"), 2)


def test_another_method_keeps_what_the_two_have_in_common():
    ties = parse_change({"field": "density", "value": 0.3}, Settings().with_method("ties"), 2)
    ties = parse_change({"field": "weights", "value": [1, 2]}, ties, 2)
    dare = ties.with_method("dare_ties")
    assert dict(dare.options)["density"] == 0.3 and dare.weights == (1, 2)
    back = dare.with_method("varm")
    assert back.weights == () and back.options == () and back.method == "varm"


def test_settings_of_every_kind_hash_and_differ():
    one = Settings(weights=(Curve((0, 1)), 1.0), options=(("density", Table((("*", 1),))),), slices=((("a", 0, 2),),))
    assert hash(one) != hash(Settings()) and len({one, Settings(), one}) == 2


# ── the command line that says the same ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", [
    {"method": "ties", "options": {"density": (0.5, 0.2), "normalize": False}, "weights": (1.0, 0.5)},
    {"method": "dare_ties", "options": {"density": 0.5}, "seed": 7}, {"method": "slerp", "options": {"t": Curve((0, 0.5, 1))}},
    {"method": "linear", "weights": (Curve((0, 1)), Curve((1, 0)))},
    {"method": "task_arithmetic", "weights": (VARIATION, VARIATION)},
    {"granularity": "layer", "exclude": ("*norm*",), "dtype": "float32"}])
def test_the_command_makes_the_recipe(change, monkeypatch):
    import shlex

    import fusion.commands.merging as merging

    recipe, seen = Recipe("x/pivot", ("x/a", "x/b"), **change).check(), []
    monkeypatch.setitem(merging.ENGINES, "local", lambda stages, *a, **k: seen.extend(stages) or iter(()))
    with pytest.raises(AttributeError):  # nothing was merged, so there is nothing to tell
        main(shlex.split(command_line(recipe))[3:])
    assert seen == [recipe]


# ── layer stacks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stacks_both_ways():
    text = "A 0-2\nB 1–3, pivot 1-3\npivot 3"
    slices = parse_stack(text.replace("pivot", "Pivot").replace("A", "a"), ("k/a", "k/b"))
    assert slices == ((("k/a", 0, 3),), (("k/b", 1, 4), ("pivot", 1, 4)), (("pivot", 3, 4),))
    assert parse_stack(write_stack(slices, ("k/a", "k/b")), ("k/a", "k/b")) == slices
    shown = picture(slices, ("k/a", "k/b"), TWO)
    assert "7 layers in all" in shown and "&lt;b&gt;B&lt;/b&gt; 1–3" in shown and "<b>B</b>" not in shown
    assert parse_stack("\n \n", ("k/a",)) == () and picture((), ("k/a",), ("A",)) == ""


@pytest.mark.parametrize(("text", "word"), [
    ("C 0-1", "one of pivot, A, B"), ("A", "no run"), ("A 3-1", "stands before"), ("A 0-1, A 2-3", "twice"),
    ("A 0-1\nA -1", "row 2"),
    ("A 0-99999999999", "no run"), ("x" * 20_000, "too many")])
def test_wrong_stacks_are_explained(text, word):
    with pytest.raises(RecipeError, match=word):
        parse_stack(text, ("k/a", "k/b"))
