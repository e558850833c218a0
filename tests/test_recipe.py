"""fusion.recipe: a value that is checked as a whole, and YAML both ways."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusion.anatomy import GRANULARITIES
from fusion.errors import FusionError, RecipeError
from fusion.recipe import Override, Recipe
from fusion.variation import MEASURES

PLAIN = "fusechat: 1\npivot: pivot\ntargets: [a, b]\n"
LINEAR = PLAIN + "method: linear\n"


def problem(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    return str(caught.value)


def test_a_short_recipe_has_sensible_defaults():
    recipe = Recipe.from_yaml(PLAIN)
    assert recipe == Recipe("pivot", ("a", "b"))
    assert (recipe.method, recipe.granularity, recipe.measure) == ("varm", "matrix", "square")
    assert (recipe.donor, recipe.dtype) == ("pivot", "")
    assert recipe.exclude == () and not recipe.allow_nonfinite


LETTERS = st.characters(exclude_categories=("Cs",))
NAMES = st.text(LETTERS, min_size=1, max_size=8).filter(lambda name: name not in ("pivot", ".", "..", "/"))


@given(paths=st.lists(NAMES, min_size=2, max_size=4, unique=True), names=st.lists(NAMES, min_size=3, max_size=3, unique=True),
       granularity=st.sampled_from(GRANULARITIES), measure=st.sampled_from(MEASURES), pattern=st.text(max_size=5),
       weight=st.floats(0, 1), dtype=st.sampled_from(["", "bfloat16", "float32"]), nonfinite=st.booleans())
@example(["\x85", "\u2028", "a\u2029b"], ["\x85 ", "1", "2"], "matrix", "square", "\u2028", 0.5, "", False)
@example(["ü", "模型", "é 1"], ["ß", "1", "2"], "matrix", "square", "*ü", 1.0, "", False)
def test_yaml_gives_back_the_same_recipe(paths, names, granularity, measure, pattern, weight, dtype, nonfinite):
    names = tuple(names[:len(paths) - 1])
    recipe = Recipe(paths[0], tuple(paths[1:]), names, granularity=granularity, measure=measure, dtype=dtype, donor=names[0],
                    exclude=(pattern,), allow_nonfinite=nonfinite, revisions={"pivot": "abc"},
                    overrides=(Override(pattern, {names[0]: weight}),) if len(names) > 1 else ())
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe.check()


def test_a_linear_recipe_keeps_its_numbers():
    recipe = Recipe("pivot", ("a", "b"), method="linear", weights=(1, 2.5))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert "granularity" not in recipe.to_yaml()
    silent = Recipe("pivot", ("a", "b"), method="linear")
    assert "weights" not in silent.to_yaml() and Recipe.from_yaml(silent.to_yaml()) == silent


def test_targets_are_called_by_the_shortest_end_that_tells_them_apart():
    assert Recipe("base", ("x/last", "y/last")).names == ("x/last", "y/last")
    assert Recipe.from_yaml("fusechat: 1\npivot: base\ntargets: [x/last, {path: y/last, name: mine}]").names == ("x/last", "mine")
    assert Recipe("x/same", ("y/same",)).names == ("y/same",) and Recipe("x/same", ("y/same",)).pivot_name != "y/same"


def test_several_problems_are_told_at_once():
    text = problem("fusechat: 2\npivot: 5\ntargets: []\ngranularty: layer\nweights: x\noverrides: [1]\nexclude: 7\n"
                   "allow_nonfinite: 1\nrevisions: [a]\n")
    assert text.startswith("recipe, 9 problems")
    assert "line 3: targets: there is none" in text
    for words in ("line 1: fusechat: the version is 2, this program reads 1", "line 2: pivot: 5 should be text",
                  "line 4: granularty: unknown setting. Did you mean 'granularity'", "line 5: weights: should be a list",
                  "line 6: overrides: every entry needs", "line 7: exclude: should be a list of patterns",
                  "line 8: allow_nonfinite: 1 should be true or false", "line 9: revisions: should be a table"):
        assert words in text
    text = problem(PLAIN + "method: vram\ngranularity: matrx\nmeasure: squre\ndtype: bfloat\ndonor: c\n")
    assert text.startswith("recipe, 5 problems")
    assert all(f"Did you mean '{word}'" in text for word in ("varm", "matrix", "square", "bfloat16"))


@pytest.mark.parametrize(("text", "words"), [
    ("", "a recipe is a table of settings"), ("- a", "a recipe is a table"), ("a: [", "not valid YAML"),
    ("a: &x [1]\nb: *x", "aliases are not allowed"), ("a: 1\nb: 2\na: 3", "'a' is given twice"),
    (PLAIN + "revisions: {x: a, x: b}", "'x' is given twice"), ("a: !!python/object:os.system {}", "os.system is not allowed"),
    ("a: !!int ''", "2002:int is not allowed"), ("a: !!bool x", "2002:bool is not allowed"), ("a: ! x", "the tag ! is not allowed"),
    ("a: 2020-13-45", "a: unknown setting"), ("[" * 20_000, "nested too deeply"), ("? [1]\n: 2", "a key must be a word"),
    ("a: 1" + "0" * 9000, "a number of 9001 digits"),
    ("\0", "not valid YAML"), ("a" * 4_000_001, "longer than 4 MB"), ("pivot: x", "the version is None"),
    (LINEAR + "weights: [1]", "1 numbers for 2 targets"), (LINEAR + "weights: [1, -1]", "a sum above 0"),
    (LINEAR + "weights: [.nan, 1]", "weights: a: nan should be a finite number"),
    (LINEAR + "weights: [1, true]", "weights: b: True should be a finite number"),
    (LINEAR + "weights: [1.0e+308, 1.0e+308]", "1e+308 should be"), (LINEAR + "weights: a", "should be a list"),
    (PLAIN + "overrides: [{tensors: '*', weights: {c: 1}}]", "unknown target 'c'"),
    (PLAIN + "overrides: [{tensors: '*', weights: {a: 1.5}}]", "a number from 0 to 1"),
    (PLAIN + "overrides: [{tensors: '*', weights: {a: x}}]", "a number from 0 to 1"),
    (PLAIN + "overrides: [{tensors: '*', weights: {}}]", "a number from 0 to 1"),
    (PLAIN + "overrides: [{tensors: '*', weights: {a: .5, b: .6}}]", "sum to 1.1, not to 1"),
    (PLAIN + "overrides: [{tensors: '*', weights: {a: .5, b: .4}}]", "sum to 0.9, not to 1"),
    (PLAIN + "overrides: [{tensors: '*', weights: {a: 1}, extra: 1}]", "every entry needs"),
    ("fusechat: 1\npivot: p\ntargets: []", "targets: there is none"), ("fusechat: 1\ntargets: [a]", "pivot: there is none"),
    ("fusechat: 1\npivot: p\ntargets: [a, a]", "a is given twice"), ("fusechat: 1\npivot: a\ntargets: [a]", "a is given twice"),
    ("fusechat: 1\npivot: p\ntargets: [{path: x, name: n}, {path: y, name: n}]", "a name of its own"),
    ("fusechat: 1\npivot: p\ntargets: [{path: x, name: pivot}]", "none may be `pivot`"),
    ("fusechat: 1\npivot: p\ntargets: [5]", "5 should be a path"),
    ("fusechat: 1\npivot: p\ntargets: [{name: x}]", "should be a path"),
    (f"fusechat: 1\npivot: p\ntargets: [{', '.join('abcdefghijklmnoqr')}]", "17 are too many"),
], ids=lambda value: value[:40])
def test_a_recipe_that_makes_no_sense_is_refused_in_words(text, words):
    assert words in problem(text)


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("gone.yaml", "binary.yaml", ""):
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            Recipe.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_changed_copy_leaves_the_recipe_alone():
    recipe = Recipe("pivot", ("a",))
    assert recipe.with_(granularity="layer").granularity == "layer" and recipe.granularity == "matrix"


WORDS = st.sampled_from([
    "fusechat", "pivot", "targets", "weights", "overrides", "exclude", "revisions", "method", "linear", "1", "a", "~", "tensors",
    "name", "path", ".inf", "true", "!!int ", "!!set ", "!!binary ", "&x ", "*x", "<<", ": ", "\n", "- ", "[", "]", "{", "}", ", ",
    "'", "#", "|\n", "? ", "%YAML 1.1\n", "---\n", "  ", "1e400", "0o9", "1:30", "2020-01-01"])
TEXTS = st.text(max_size=60) | st.lists(WORDS, max_size=25).map("".join)
SETTINGS = st.sampled_from(["pivot", "targets", "names", "method", "weights", "overrides", "exclude", "revisions", "donor"])
KEYS = st.sampled_from(["tensors", "weights", "path", "name", "a", 1, None])
PLAIN_DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["a", "b", "linear", "*"]),
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
