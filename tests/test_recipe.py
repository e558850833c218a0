"""fusion.recipe: a value that is checked as a whole, and YAML both ways."""

from __future__ import annotations

import pytest

from fusion.errors import RecipeError
from fusion.methods import METHODS
from fusion.recipe import Recipe, Slice, Table

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


def test_a_changed_copy_leaves_the_recipe_alone():
    recipe = Recipe("pivot", ("a",))
    assert recipe.with_(granularity="layer").granularity == "layer" and recipe.granularity == "matrix"


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


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_problem_of_a_file_is_told_at_once_with_its_line():
    assert problem("""\
fusechat: 2
pivot: 5
targets: []
granularty: layer
weights: x
overrides: [1]
exclude: 7
allow_nonfinite: 1
revisions: [a]
seed: 0.5
slices: {a: 3}
temperature: hot
options: [density]
seed: 1
""") == """\
recipe, 14 problems: line 1: fusechat: the version is 2, this program reads 1.
line 2: pivot: 5 should be text.
line 3: targets: there is none. Give at least one.
line 4: granularty: unknown setting. Did you mean 'granularity'?
line 5: weights: should be a list with one number, curve, table or `variation` for each target, or the one word `variation`.
line 6: overrides: every entry needs `tensors` (a pattern) and `weights` (target: number).
line 7: exclude: should be a list of patterns.
line 8: allow_nonfinite: 1 should be true or false.
line 9: revisions: should be a table of names and texts.
line 10: seed: 0.5 should be a whole number.
line 11: slices: every entry names models and their layers, like `{target-a: [0, 12]}`; the last layer is not included.
line 12: temperature: 'hot' should be a number.
line 13: options: should be a table of the method's options.
line 14: 'seed' is given twice"""


def test_values_that_make_no_sense_are_told_with_shapes_that_make_none():
    assert problem("""\
fusechat: 1
pivot: pivot
targets: [a, b]
method: dare_ties
dtype: bfloat
donor: c
weights: [1, .nan]
options:
  density:
  - 1.4
  - table:
    - {tensors: '*', value: {curve: [0.1, -1]}}
    - {tensors: '*mlp*', value: true}
  rescale: 1
  lamda: 1
  t: 0.5
exclude: 3
""") == """\
recipe, 10 problems: line 5: dtype: unknown 'bfloat'. Did you mean 'bfloat16'?
line 6: donor: unknown 'c'. Known: a, b, pivot.
line 7: weights: b: nan should be a finite number or `variation`.
line 10: options: density: a: must be a number from 0 to 1, not 1.4.
line 12: options: density: b: *: curve: must be a number from 0 to 1, not -1.
line 13: options: density: b: *mlp*: True should be a number from 0 to 1.
line 14: options: rescale: must be true or false, not 1.
line 15: options: lamda: dare_ties has no such option. Did you mean 'lambda'?
line 16: options: t: dare_ties has no such option. These methods do: slerp, nearswap.
line 17: exclude: should be a list of patterns."""


def test_words_are_refused_with_the_nearest():
    text = problem(PLAIN + "method: vram\ngranularity: matrx\nmeasure: squre\nrule: sotfmax\nvocabulary: unoin\ndtype: bfloat\n")
    assert text.startswith("recipe, 6 problems")
    assert all(f"Did you mean '{word}'" in text for word in ("varm", "matrix", "square", "softmax", "union", "bfloat16"))


@pytest.mark.parametrize(("text", "words"), [
    ("", "a recipe is a table of settings"), ("- a", "a recipe is a table"), ("a: [", "not valid YAML"),
    ("a: &x [1]\nb: *x", "aliases are not allowed"), ("a: 1\nb: 2\na: 3", "'a' is given twice"),
    (PLAIN + "revisions: {x: a, x: b}", "'x' is given twice"), ("a: !!python/object:os.system {}", "os.system is not allowed"),
    ("a: !!int ''", "2002:int is not allowed"), ("a: !!bool x", "2002:bool is not allowed"), ("a: ! x", "the tag ! is not allowed"),
    ("a: 2020-13-45", "a: unknown setting"), ("[" * 20_000, "nested too deeply"), ("? [1]\n: 2", "a key must be a word"),
    ("a: 1" + "0" * 9000, "a number of 9001 digits"),
    ("\0", "not valid YAML"), ("a" * 4_000_001, "longer than 4 MB"), 
    ("pivot: x", "the version is None"), ("fusechat: true", "the version is True"),
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
    ("fusechat: 1\npivot: a\ntargets: [a]\nmethod: ties", "a is given twice"),
    ("fusechat: 1\npivot: p\ntargets: [{path: x, name: n}, {path: y, name: n}]", "a name of its own"),
    ("fusechat: 1\npivot: p\ntargets: [{path: x, name: pivot}]", "none may be `pivot`"),
    ("fusechat: 1\npivot: p\ntargets: [5]", "5 should be a path"),
    ("fusechat: 1\npivot: p\ntargets: [{name: x}]", "should be a path"),
    (f"fusechat: 1\npivot: p\ntargets: [{', '.join('abcdefghijklmnoqr')}]", "17 are too many"),
    # weights
    (PLAIN + "weights: [0.5, variaton]", "line 4: weights: b: 'variaton' should be a finite number or `variation`"),
    (PLAIN + "weights: [0.7, {curve: [1]}]", "line 4: weights: b: a curve needs at least two points"),
    (PLAIN + "weights: [1.2, variation]", "beside `variation`, numbers must be from 0 to 1"),
    (PLAIN + "weights: [1, {curve: [0, variation]}]", "line 4: weights: b: curve: 'variation' should be a finite number"),
    ("fusechat: 1\npivot: p\ntargets: [a, b, c]\nweights: [.6, .6, variation]", "must be from 0 to 1 and sum to at most 1"),
    (PLAIN + "weights: [{table: []}, 1]", "weights: a: the table has no row"),
    (PLAIN + "weights: [{tabel: []}, 1]", "weights: unknown setting 'tabel'. Did you mean 'table'?"),
    (PLAIN + "weights: [{table: [{tensor: '*', value: 1}]}, 1]", "every row of a table needs `tensors` (a pattern) and `value`"),
    (PLAIN + "weights: [{table: [{tensors: '*', value: {table: []}}]}, 1]", "unknown setting 'table'. Known: curve, outside"),
    (PLAIN + "weights: [{curve: [0, 1], outside: x}, 1]", "weights: a: outside: 'x' should be a finite number"),
    (PLAIN + "weights: [{curve: 1}, 1]", "weights: {'curve': 1} should be a value, {curve: [numbers]} or {table: [rows]}"),
    (PLAIN + "weights: [~, 1]", "weights: None should be a value"),
    (PLAIN + "method: sce\nweights: [1, 1]", "line 5: weights: sce has no weights. These methods do: varm, linear"),
    (PLAIN + "method: sce\noverrides: [{tensors: '*', weights: {a: 1}}]", "line 5: overrides: sce has no weights"),
    (PLAIN + "method: ties\noverrides: [{tensors: '*', weights: {a: .inf}}]", "overrides: *: every weight must be a finite number"),
    (PLAIN + "granularity: parameter\nrule: softmax", "rule: softmax weighs units, not single parameters"),
    (PLAIN + "temperature: 0", "temperature: 0 should be a number above 0"), (PLAIN + "temperature: true", "should be a number"),
    # options
    (LINEAR + "options: {normalize: {table: [{tensors: '*', value: true}]}}", "options: normalize: it is the same for all tensors"),
    (PLAIN + "options: {density: 1}", "options: density: varm has no such option. These methods do: ties, dare_linear"),
    (PLAIN + "options: {x: 1}", "options: x: varm has no such option. It has none."),
    (PLAIN + "method: ties\noptions: {lambda: [1, 2]}", "lambda: it is the same for all targets. Give one value, not a list"),
    (PLAIN + "method: ties\noptions: {density: [1, 1, 1]}", "options: density: 3 values for 2 targets. Give one for each, or one"),
    (PLAIN + "method: sce\noptions: {compat: mergkit}", "options: compat: must be one of paper, mergekit, authors, not 'mergkit'"),
    (PLAIN + "method: sce\noptions: {compat: {curve: [0, 1]}}", "options: compat: only numbers can follow a curve"),
    (PLAIN + "method: karcher\noptions: {max_iter: 1.5}", "options: max_iter: must be a whole number from 1 to 1000, not 1.5"),
    # targets and slices
    (PLAIN + "method: slerp\ntargets: [a, b, c]", "'targets' is given twice"),
    ("fusechat: 1\npivot: p\ntargets: [a, b, c]\nmethod: slerp", "line 3: targets: slerp takes 1 to 2, not 3"),
    ("fusechat: 1\npivot: p\ntargets: [a]\nmethod: model_stock", "targets: model_stock takes at least 2, not 1"),
    (PLAIN + "method: passthrough", "targets: passthrough takes 1, not 2. Give one, or say with `slices` which layers each gives"),
    (PLAIN + "method: passthrough\nslices:\n- a: [0, 1]\n- a: [0, 1]\n  b: [0, 1]", "line 7: slices: slice 2: passthrough takes"),
    (PLAIN + "method: passthrough\nslices: [{a: [0, 1]}]", "slices: no slice has layers of b. Leave it out of the targets"),
    (PLAIN + "slices: [{a: [0, 1], b: [0, 2]}]", "slices: slice 1: all models must give equally many layers"),
    (PLAIN + "slices: [{a: [1, 1], b: [0, 1]}]", "slice 1: a: [1, 1] should be two whole numbers, the first layer and the one"),
    (PLAIN + "slices: [{a: [0, 1], c: [0, 1], b: [0, 1]}]", "slices: slice 1: unknown model 'c'. Known: a, b, pivot"),
    (PLAIN + "slices: [{a: [0, true], b: [0, 1]}]", "a: [0, True] should be two whole numbers"),
    (PLAIN + "slices: [{}, {a: [0, 1], b: [0, 1]}]", "slices: slice 1: it names no model"),
    (PLAIN + "seed: 9223372036854775808", "seed: 9223372036854775808 should be a whole number from 0 to"),
    (PLAIN + "seed: -1", "seed: -1 should be a whole number from 0 to 9223372036854775807"),
], ids=lambda value: value[:40])
def test_a_recipe_that_makes_no_sense_is_refused_in_words(text, words):
    assert words in problem(text)


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("gone.yaml", "binary.yaml", ""):
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            Recipe.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_recipe_file_is_named_with_its_problems(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(PLAIN + "seed: -1\n")
    with pytest.raises(RecipeError, match=r"wrong\.yaml: line 4: seed: -1 should be"):
        Recipe.load(file)


def test_softmax_is_no_matter_where_nothing_is_measured():
    assert Recipe("p", ("a", "b"), method="ties", granularity="parameter", rule="softmax").problems() == []


def test_what_could_not_be_read_brings_no_other_complaints():
    text = "fusechat: 1\npivot: p\ntargets: 5\ndonor: a\nweights: [1, 2]\noverrides: [{tensors: x, weights: {a: 1}}]\nseed: -1\n"
    assert problem(text) == ("recipe, 2 problems: line 3: targets: 5 should be a path, or a table with `path` and `name`.\n"
                             "line 7: seed: -1 should be a whole number from 0 to 9223372036854775807.")
    assert problem(PLAIN + "method: 7\nweights: [1]\noptions: {x: 1}") == "recipe: line 4: method: 7 should be text."


def test_slices_may_take_one_of_many_models_each():
    slices = (Slice({"a": (0, 2)}), Slice({"b": (1, 4)}), Slice({"pivot": (0, 1)}))
    assert Recipe("p", ("a", "b"), method="passthrough", slices=slices).problems() == []
    slices = (Slice({"a": (0, 2)}), Slice({"pivot": (1, 4), "b": (1, 4), "c": (2, 5)}))
    assert Recipe("p", ("a", "b", "c"), method="slerp", slices=slices).problems() == []


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp", "multislerp", "karcher", "passthrough"])
def test_the_pivot_may_be_among_the_models_where_it_is_only_one_of_them(method):
    count = METHODS[method].max_targets or 2
    assert Recipe("p", ("p", "b")[:count], ("own", "b")[:count], method).problems() == []


def test_weights_given_to_varm_replace_what_is_measured():
    assert Recipe("p", ("a", "b")).measured and not Recipe("p", ("a", "b"), weights=(1, 2)).measured
    assert Recipe("p", ("a", "b"), weights=(.2, "variation")).measured
    assert Recipe("p", ("a",), method="ties", weights=(Table((("*", 1), ("x", "variation"))),)).measured
    assert not Recipe("p", ("a",), method="ties").measured


def test_an_option_without_a_default_must_be_given(monkeypatch):
    from dataclasses import replace

    method = METHODS["slerp"]
    needed = replace(method)
    object.__setattr__(needed, "options", (replace(method.options[0], default=None),))
    monkeypatch.setitem(METHODS, "slerp", needed)
    (only,) = Recipe("p", ("a",), method="slerp").problems()
    assert only.startswith("options: t: slerp needs it. ")
    assert Recipe("p", ("a",), method="slerp", options={"t": .5}).problems() == []
