"""Recipes as YAML: there and back without a change, several stages in a file, and no text that ends in a traceback."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusion.anatomy import GRANULARITIES
from fusion.errors import FusionError, RecipeError
from fusion.methods import METHODS
from fusion.recipe import Curve, Override, Recipe, Slice, Table, load_stages, stages_from_yaml
from fusion.recipe_rules import VOCABULARIES
from fusion.variation import MEASURES

PLAIN = "fusechat: 1\npivot: pivot\ntargets: [a, b]\n"
LINEAR = PLAIN + "method: linear\n"


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────

LETTERS = st.characters(exclude_categories=("Cs",))
NAMES = st.text(LETTERS, min_size=1, max_size=8).filter(lambda name: name not in ("pivot", ".", "..", "/"))
PATTERNS = st.text(LETTERS, max_size=5)


def settings_of(values: st.SearchStrategy, numbers: bool) -> st.SearchStrategy:
    """Plain values, curves of them where they are numbers, and tables of both."""
    curves = st.builds(Curve, st.lists(values, min_size=2, max_size=4), st.none() | values) if numbers else st.nothing()
    return values | curves | st.builds(Table, st.lists(st.tuples(PATTERNS, values | curves), min_size=1, max_size=3))


def option_values(option) -> st.SearchStrategy:
    """Any setting that an option takes."""
    if option.kind == "flag":
        return settings_of(st.booleans(), False)
    if option.kind == "choice":
        return settings_of(st.sampled_from(option.choices), False)
    low, high = (-9 if option.low is None else option.low), (9 if option.high is None else option.high)
    if option.kind == "integer":
        return settings_of(st.integers(int(low), int(high)), False)
    return settings_of(st.floats(low, high), True)


@st.composite
def recipes(draw) -> Recipe:
    """Valid recipes of every method that say anything a recipe can say."""
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    count = draw(st.integers(method.min_targets, method.max_targets or 3))
    paths = draw(st.lists(NAMES, min_size=count + 1, max_size=count + 1, unique=True))
    names = tuple(draw(st.lists(NAMES, min_size=count, max_size=count, unique=True)))
    options = {}
    for option in method.options:
        if not option.name.startswith("normalize") and draw(st.booleans()):
            one = option_values(option)
            options[option.name] = draw(one | st.tuples(*[one] * count) if option.per_target else one)
    weights = draw(st.sampled_from([(), "variation"]) | st.tuples(*[settings_of(st.floats(.1, 1 / 3), True)] * count))
    layers = {name: tuple(sorted(draw(st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True)))) for name in names[:1]}
    slices = tuple(Slice({name: layers[names[0]]}) for name in names) if draw(st.booleans()) else ()
    return Recipe(
        paths[0], tuple(paths[1:]), names, method.name, draw(st.sampled_from(GRANULARITIES)), draw(st.sampled_from(MEASURES)),
        temperature=draw(st.floats(.001, 9)), weights=weights if method.weights else (), options=options, slices=slices,
        overrides=(Override(draw(PATTERNS), {names[0]: draw(st.floats(0, 1))}),) if method.weights and count > 1 else (),
        exclude=draw(st.tuples(PATTERNS) | st.just(())), seed=draw(st.integers(0, 2**63 - 1)),
        vocabulary=draw(st.sampled_from(VOCABULARIES)), dtype=draw(st.sampled_from(["", "bfloat16", "float32"])),
        donor=draw(st.sampled_from(["pivot", *names])), allow_nonfinite=draw(st.booleans()), name=draw(st.just("") | NAMES),
        revisions=draw(st.dictionaries(NAMES, NAMES, max_size=2)), result=draw(st.dictionaries(NAMES, NAMES, max_size=2)))


@settings(max_examples=150)
@given(recipes())
@example(Recipe("\x85", ("\u2028", "a\u2029b"), ("\x85 ", "1"), exclude=("\u2028", "1e-4", "no")))
@example(Recipe("ü", ("模型", "é 1"), ("ß", "1.5"), rule="softmax", overrides=(Override("*ü", {"1.5": 1}),)))
def test_yaml_gives_back_the_same_recipe(recipe):
    assert recipe.problems() == []
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and again.to_yaml() == recipe.to_yaml()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


@given(recipes())
def test_a_recipe_with_every_default_written_out_is_valid_and_says_them(recipe):
    explicit = recipe.explicit().check()
    assert set(explicit.options) == {option.name for option in METHODS[recipe.method].options}
    assert explicit.options.items() >= recipe.options.items()
    assert bool(explicit.weights) == bool(METHODS[recipe.method].weights) and explicit.measured == recipe.measured
    assert Recipe.from_yaml(explicit.to_yaml()) == explicit == explicit.explicit()


def test_a_recipe_says_its_own_settings_and_leaves_out_the_others():
    assert Recipe("p", ("a", "b")).to_yaml() == (
        "fusechat: 1\npivot: p\ntargets:\n- name: a\n  path: a\n- name: b\n  path: b\nmethod: varm\ngranularity: matrix\n"
        "measure: square\ndonor: pivot\n")
    ties = Recipe("p", ("a", "b"), method="ties", options={"density": (.2, Curve((0, 1)))}, weights=(1, 2.5), name="s")
    assert ties.to_yaml() == (
        "fusechat: 1\nname: s\npivot: p\ntargets:\n- name: a\n  path: a\n- name: b\n  path: b\nmethod: ties\nweights: [1, 2.5]\n"
        "options:\n  density:\n  - 0.2\n  - curve: [0, 1]\ndonor: pivot\n")
    assert "weights: variation" in Recipe("p", ("a", "b"), method="linear", weights="variation").to_yaml()


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────

STAGES = """\
fusechat: 1
name: soup
pivot: p
targets: [a, b]
method: linear
---
fusechat: 1
pivot: p
targets: [soup, c]
method: ties
"""


def test_stages_are_read_in_their_order(tmp_path):
    soup, last = stages_from_yaml(STAGES)
    assert soup == Recipe("p", ("a", "b"), method="linear", name="soup")
    assert last == Recipe("p", ("soup", "c"), method="ties") and last.names == ("soup", "c")
    (tmp_path / "stages.yaml").write_text(STAGES)
    assert load_stages(tmp_path / "stages.yaml") == (soup, last)
    assert stages_from_yaml(LINEAR) == (Recipe.from_yaml(LINEAR),)
    with pytest.raises(RecipeError, match="it holds 2 stages, not one recipe"):
        Recipe.load(tmp_path / "stages.yaml")


@pytest.mark.parametrize(("old", "new", "said"), [
    ("name: soup\n", "", "line 1: stage 1 has no name. Give it one, so that a later stage can refer to it."),
    ("[soup, c]", "[c, d]", "line 2: name: no later stage uses 'soup'. Use it where a path stands, or take it out."),
    ("[a, b]", "[soup, b]", "line 4: targets: 'soup' is stage 1; only an earlier stage can be used."),
    ("---\nfusechat: 1\n", "---\nfusechat: 1\nname: soup\n", "line 8: name: stage 1 is called 'soup' too."),
    ("targets: [soup, c]", "targets: [soup, c]\nname: end", None),
    ("pivot: p\ntargets: [soup, c]", "pivot: soup\ntargets: [c]", None),
    ("method: ties\n", "method: ties\n---\n", "line 12: a recipe is a table of settings"),
    ("method: ties", "method: tise", "line 10: method: unknown 'tise'"),
])
def test_stages_that_do_not_fit_together_are_refused(old, new, said):
    text = STAGES.replace(old, new)
    if said is None:
        assert len(stages_from_yaml(text)) == 2
        return
    with pytest.raises(RecipeError) as caught:
        stages_from_yaml(text)
    assert said in str(caught.value)


def test_a_later_stage_cannot_be_used_by_an_earlier_one():
    with pytest.raises(RecipeError) as caught:
        stages_from_yaml("fusechat: 1\nname: x\npivot: p\ntargets: [y]\n---\nfusechat: 1\nname: y\npivot: p\ntargets: [a]\n")
    assert str(caught.value) == (
        "recipe, 2 problems: line 2: name: no later stage uses 'x'. Use it where a path stands, or take it out.\n"
        "line 4: targets: 'y' is stage 2; only an earlier stage can be used.")


# ── anything at all ──────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = st.sampled_from([
    "fusechat", "pivot", "targets", "weights", "overrides", "exclude", "revisions", "method", "linear", "1", "a", "~", "tensors",
    "options", "slices", "curve", "table", "variation",
    "name", "path", ".inf", "true", "!!int ", "!!set ", "!!binary ", "&x ", "*x", "<<", ": ", "\n", "- ", "[", "]", "{", "}", ", ",
    "'", "#", "|\n", "? ", "%YAML 1.1\n", "---\n", "  ", "1e400", "0o9", "1:30", "2020-01-01"])
TEXTS = st.text(max_size=60) | st.lists(WORDS, max_size=25).map("".join)
SETTINGS = st.sampled_from(["pivot", "targets", "names", "method", "weights", "overrides", "exclude", "revisions", "donor",
                            "options", "slices", "seed", "rule", "temperature", "vocabulary", "name", "result"])
KEYS = st.sampled_from(["tensors", "weights", "path", "name", "a", "curve", "table", "value", "density", 1, None])
PLAIN_DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() |
    st.sampled_from(["a", "b", "linear", "ties", "passthrough", "*", 10**400, "variation"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)


@settings(max_examples=150)
@given(TEXTS | TEXTS.map(lambda text: PLAIN + text))
@example("!!map [1, 2]")
@example("<<: {a: 1}")
def test_any_text_ends_in_a_recipe_or_in_an_error_for_people(text):
    with contextlib.suppress(FusionError):
        assert Recipe.from_yaml(text).problems() == []


@settings(max_examples=150)
@given(st.dictionaries(SETTINGS, PLAIN_DATA, max_size=4))
def test_any_data_ends_in_a_recipe_or_in_an_error_for_people(data):
    with contextlib.suppress(FusionError):
        recipe = Recipe.from_dict({"fusechat": 1, "pivot": "p", "targets": ["a", "b"], **data})
        assert Recipe.from_yaml(recipe.to_yaml()).names == recipe.names
