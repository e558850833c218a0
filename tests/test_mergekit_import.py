"""A mergekit file becomes a recipe that means the same: precedence, filters, gradients and slices worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import RecipeError
from fusion.mergekit import import_text, tensor_names
from fusion.mergekit.catalogue import Parameter
from fusion.mergekit.document import Row
from fusion.mergekit.outline import whole_model
from fusion.mergekit.patterns import setting, value_at
from fusion.recipe import Recipe
from fusion.settings import Curve, Slice, Table, resolve
from fusion.weights import OptionPlan, WeightPlan
from tests.benchmarks.parity import make_models

LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")


def llama(layers: int) -> list[str]:
    inside = [f"model.layers.{n}.{name}.weight" for n in range(layers) for name in LAYER]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def one(text: str) -> Recipe:
    (recipe,), _ = import_text(text, opener=tensor_names)
    return recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a pivot, three targets and a stranger with four layers."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def test_a_plain_file():
    recipe = one("merge_method: ties\nbase_model: x/base\nmodels:\n- {model: x/one, parameters: {weight: 0.5}}\n"
                 "- {model: x/two@v1, parameters: {weight: 1e-1, density: 0.4}}\n- {model: x/base}\n"
                 "parameters: {lambda: 0.9, int8_mask: true}\ndtype: bfloat16\nout_dtype: torch.float16\n")
    assert recipe == Recipe("x/base", ("x/one", "x/two@v1"), ("one", "two@v1"), "ties", weights=(0.5, 0.1),
                            options={"density": (1.0, 0.4), "lambda": 0.9}, dtype="float16")


def test_a_value_for_all_models_is_said_once_and_a_default_not_at_all():
    recipe = one("merge_method: ties\nbase_model: p\nmodels: [{model: a}, {model: b, parameters: {weight: 2}}]\n"
                 "parameters: {weight: 1, density: 0.3, normalize: true}\n")
    assert recipe.weights == (1.0, 2.0) and recipe.options == {"density": 0.3}


@pytest.mark.parametrize(("method", "more", "options"), [
    ("nuslerp", "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n", {"flatten": False, "row_wise": True}),
    ("nuslerp", "base_model: p\n", {"space": "deltas"}),
    ("multislerp", "parameters: {normalize_weights: false, eps: 1e-9}\n", {"normalize_weights": False}),
    ("multislerp", "base_model: p\n", {"space": "deltas"}),
    ("task_arithmetic", "base_model: p\nparameters: {density: 0.5, normalize: true}\n", {"normalize": True}),
    ("linear", "parameters: {normalize: 'off'}\n", {"normalize": False})])
def test_options_have_our_names(method, more, options):
    models = "".join(f"- {{model: {name}, parameters: {{weight: {weight}}}}}\n" for name, weight in (("a", 1), ("b", 3)))
    recipe = one(f"merge_method: {method}\nmodels:\n{models}{more}")
    assert recipe.options == options and recipe.targets == ("a", "b") and recipe.pivot == ("p" if "base" in more else "a")


def test_the_base_takes_part_where_mergekit_lets_it():
    listed = "models: [{model: a, parameters: {weight: 1}}, {model: p, parameters: {weight: %s}}]\nbase_model: p\n" \
             "merge_method: linear\n"
    assert one(listed % 2).targets == ("a", "p")
    assert one(listed % 0).targets == ("a",)  # it only gives tokenizer and config
    unlisted = "models: [{model: a%s}, {model: b%s}]\nbase_model: p\nmerge_method: %s\n"
    own = ", parameters: {weight: 1}"
    assert one(unlisted % (own, own, "linear")).targets == ("a", "b")
    assert one(unlisted % ("", own, "linear") + "parameters: {weight: 2}\n").weights == (2.0, 1.0, 2.0)
    assert one(unlisted % ("", "", "karcher")).targets == ("a", "b", "p")


def test_slerp_goes_from_the_base():
    text = "merge_method: slerp\nparameters: {t: 0.3}\nmodels: [{model: a}, {model: b}]\nbase_model: %s\n"
    assert (one(text % "b").pivot, one(text % "b").targets) == ("b", ("a",))
    between = one(text % "p")  # FuseChat's own file; mergekit stops at it
    assert (between.pivot, between.targets, between.options) == ("p", ("a", "b"), {"t": 0.3})


def test_sce_stays_mergekits_and_says_so():
    (recipe,), notes = import_text("merge_method: sce\nbase_model: p\nmodels: [{model: a}, {model: b}]\n"
                                   "parameters: {select_topk: 0.1}\n")
    assert recipe.options == {"select_topk": 0.1, "compat": "mergekit"}
    assert any("compat: mergekit" in note.text for note in notes)


def test_a_pivot_called_pivot_may_be_a_target():
    recipe = one("merge_method: karcher\nmodels: [{model: run/pivot}, {model: run/a}]\n")
    assert recipe.names == ("pivot itself", "a") and recipe.pivot == "run/pivot"


@pytest.mark.parametrize(("tokenizer", "donor", "vocabulary"), [
    ("", "pivot", ""), ("tokenizer_source: base\n", "pivot", "pivot"), ("tokenizer_source: union\n", "pivot", "union"),
    ("tokenizer: {source: p}\n", "pivot", "pivot"), ("tokenizer: {}\n", "pivot", "union"),
    ("tokenizer:\n", "pivot", ""), ("tokenizer_source: x/b\n", "b", ""),
    ("tokenizer: {pad_to_multiple_of: 8}\n", "pivot", "union")])
def test_the_tokenizer_becomes_donor_and_vocabulary(tokenizer, donor, vocabulary):
    recipe = one(f"merge_method: ties\nbase_model: p\nmodels: [{{model: x/b, parameters: {{weight: 1}}}}]\n{tokenizer}")
    assert (recipe.donor, recipe.vocabulary) == (donor, vocabulary)


def test_a_tokenizer_of_a_stranger_is_refused():
    with pytest.raises(RecipeError, match="line 4: a tokenizer comes from one of the models"):
        import_text("merge_method: ties\nbase_model: p\nmodels: [{model: x/b, parameters: {weight: 1}}]\ntokenizer_source: other\n")


# ── filters and gradients ────────────────────────────────────────────────────────────────────────────────────────────

def test_precedence_is_model_then_slice_then_file():
    """Of the rows for one tensor, the model's come first; what they do not match falls through to the slice and the file."""
    recipe = one("""\
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 1}]}}
  - {model: b, layer_range: [0, 2], parameters: {weight: 9}}
  parameters: {weight: [{filter: self_attn, value: 2}]}
parameters: {weight: [{filter: norm, value: 3}, {value: 4}]}
""")
    values = dict(zip(llama(2), resolve(recipe.weights[0], llama(2)), strict=True))
    assert [values[f"model.layers.1.{name}.weight"] for name in LAYER] == [3, 1, 2, 4]
    assert [values[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")] == [4, 3, 4]
    assert recipe.weights[1] == 9


def test_the_first_filter_wins_and_gradients_give_their_first_point_outside():
    recipe = one("""\
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 1]}
  - {filter: q_proj, value: 0.9}
  - {filter: mlp, value: 0.25}
  - {value: [0.1, 0.4]}
""")
    assert recipe.options["t"] == Table((("*", Curve((0.1, 0.4), 0.1)), ("*mlp*", 0.25), ("*q_proj*", 0.9),
                                         ("*self_attn*", Curve((0.0, 0.5, 1.0), 0.0))))
    values = dict(zip(llama(4), resolve(recipe.options["t"], llama(4)), strict=True))
    outside = [values[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")]
    assert outside == pytest.approx([0.1, 0.1, 0.1])
    assert [values[f"model.layers.{n}.self_attn.q_proj.weight"] for n in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [values[f"model.layers.{n}.input_layernorm.weight"] for n in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert values["model.layers.3.mlp.up_proj.weight"] == 0.25


def test_a_filter_hits_every_name_it_is_a_piece_of(models):
    text = f"merge_method: linear\nbase_model: {models}/pivot\nmodels:\n- model: {models}/target-a\n  parameters:\n    weight:\n" \
           f"    - {{filter: layers.1, value: 5}}\n    - {{filter: lm_hed, value: 7}}\n    - {{value: 1}}\n"
    recipe = one(text)
    assert recipe.weights == (Table((("*", 1), ("*layers.1*", 5))),)  # a filter that no tensor has is left out
    rows = (Row(1, "layers.1", (5,)), Row(2, None, (1,)))
    known = Parameter("number", "input", required=True)
    table = setting(whole_model(llama(12)), [rows], [0], known, "weight")
    values = dict(zip(llama(12), resolve(table, llama(12)), strict=True))
    assert [n for n in range(12) if values[f"model.layers.{n}.mlp.up_proj.weight"] == 5] == [1, 10, 11]


def test_a_filter_with_a_full_name_becomes_that_name(models):
    rows = "".join(f"    - {{filter: {name}, value: {n}}}\n" for n, name in enumerate(("lm_head.weight", "norm.weight")))
    recipe = one(f"merge_method: linear\nbase_model: {models}/pivot\nmodels:\n- model: {models}/target-a\n"
                 f"  parameters:\n    weight:\n{rows}    - {{value: 2}}\n")
    assert recipe.weights == (Table((("*", 2), ("*norm.weight*", 1), ("lm_head.weight", 0))),)


def test_slices_look_at_the_names_in_the_source(models):
    """Slice 2 begins with layer 2 of a and layer 1 of b; what was layer 1 of b is layer 2 of the result."""
    recipe = one(f"""\
merge_method: linear
slices:
- sources:
  - {{model: {models}/target-a, layer_range: [0, 2]}}
  - {{model: {models}/target-b, layer_range: [1, 3]}}
- sources:
  - {{model: {models}/target-a, layer_range: [2, 4], parameters: {{weight: [0, 1]}}}}
  - {{model: {models}/target-b, layer_range: [1, 3]}}
  parameters:
    weight: [{{filter: layers.1.mlp, value: 0.25}}, {{filter: norm, value: 0.5}}]
parameters:
  weight: 1
""")
    assert recipe.slices == (Slice({"target-a": (0, 2), "target-b": (1, 3)}), Slice({"target-a": (2, 4), "target-b": (1, 3)}))
    first, second = (dict(zip(llama(4), resolve(weight, llama(4)), strict=True)) for weight in recipe.weights)
    assert [first[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(4)] == [1, 1, 0, 1]
    assert [second[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(4)] == [1, 1, 0.25, 1]
    assert [second[f"model.layers.{n}.input_layernorm.weight"] for n in range(4)] == [1, 1, 0.5, 0.5]
    assert second["model.embed_tokens.weight"] == 1 and second["model.norm.weight"] == 0.5 and first["model.norm.weight"] == 0


def test_layers_are_stacked_with_their_factors():
    recipe = one("""\
merge_method: passthrough
slices:
- sources: [{model: x/a, layer_range: [0, 3]}]
- sources: [{model: x/b, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}}]
""")
    assert recipe.slices == (Slice({"a": (0, 3)}), Slice({"b": (1, 3)}))
    assert (recipe.pivot, recipe.targets) == ("x/a", ("x/a", "x/b"))
    one_, other = (dict(zip(llama(5), resolve(scale, llama(5)), strict=True)) for scale in recipe.options["scale"])
    assert set(one_.values()) == {1.0}
    assert [other[f"model.layers.{n}.self_attn.{name}_proj.weight"] for n in (3, 4) for name in "oq"] == [0, 1, 0, 1]


def test_slices_that_are_the_whole_model_are_left_out(models):
    text = f"merge_method: karcher\nslices:\n- sources: [{{model: {models}/target-a, layer_range: [0, %s]}}, " \
           f"{{model: {models}/target-b, layer_range: [0, %s]}}]\n"
    assert one(text % (4, 4)).slices == ()
    assert one(text % (3, 3)).slices == (Slice({"target-a": (0, 3), "target-b": (0, 3)}),)


def test_what_cannot_be_opened_is_said(models, tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    _, notes = import_text(f"merge_method: karcher\nmodels: [{{model: {tmp_path}}}, {{model: {models}/target-a}}]\n",
                           opener=tensor_names)
    assert any(note.level == "warning" and "cannot be opened" in note.text for note in notes)


def test_a_single_layer_stands_at_the_end_of_a_gradient(models):
    sources = ", ".join(f"{{model: {models}/{name}, layer_range: [2, 3]}}" for name in ("pivot", "target-a"))
    recipe = one(f"merge_method: slerp\nbase_model: {models}/pivot\nslices:\n- sources: [{sources}]\n"
                 "parameters: {t: [0.2, 0.9]}\n")
    values = dict(zip(llama(1), resolve(recipe.options["t"], llama(1)), strict=True))
    assert values["model.layers.0.mlp.up_proj.weight"] == 0.9 and values["lm_head.weight"] == 0.2


def test_a_tensor_without_a_value_is_refused(models):
    with pytest.raises(RecipeError, match=r"no value for lm_head\.weight"):
        import_text(f"merge_method: linear\nmodels:\n- model: {models}/pivot\n"
                    "  parameters: {weight: [{filter: layers, value: 1}]}\n", opener=tensor_names)


FILTERS = st.sampled_from([None, "self_attn", "mlp", "layers.1", "layers.1.", "norm", "1.mlp", "s.2.self_attn.q", "model",
                           "lm_head", "weight"])
VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=4)
ROWS = st.lists(st.builds(lambda wanted, values: Row(1, wanted, tuple(values), len(values) > 1), FILTERS, VALUES), max_size=5)


@given(st.lists(ROWS, min_size=1, max_size=3), st.data())
def test_any_rows_give_every_tensor_mergekits_value(chains, data):
    """mergekit's rule, applied tensor by tensor, and the setting that was made of the rows agree everywhere."""
    from fusion.mergekit.document import Document, Reference, Source
    from fusion.mergekit.document import Slice as Part
    from fusion.mergekit.outline import spots

    lengths = [data.draw(st.integers(1, 4)) for _ in chains]
    ranges = [(start := data.draw(st.integers(0, 9)), start + length) for length in lengths]
    parts = tuple(Part(0, (Source(0, Reference(0, "a"), layers),)) for layers in ranges)
    found = spots(llama(13), Document(0, slices=parts), True)
    known = Parameter("number", "input", 1.0)
    made = setting(found, [tuple(rows) for rows in chains], [0] * len(chains), known, "weight")
    assert found.names and len(set(found.names)) == len(found.names) == len(llama(sum(lengths)))
    for spot, value in zip(found.spots, resolve(made, list(found.names)), strict=True):
        theirs = value_at(tuple(chains[spot.part]), spot.source_name(0, found.stack), spot.t, known)
        assert value == pytest.approx(theirs, abs=1e-12)


# ── several merges in one file ───────────────────────────────────────────────────────────────────────────────────────

def test_stages_stand_in_the_order_they_are_needed():
    stages, notes = import_text("""\
merge_method: linear
models: [{model: second, parameters: {weight: 1}}, {model: first, parameters: {weight: 1}}]
---
name: second
merge_method: ties
base_model: first
models: [{model: x/b, parameters: {weight: 1}}]
---
name: unused
merge_method: karcher
models: [{model: x/c}]
---
name: first
merge_method: passthrough
slices: [{sources: [{model: x/a, layer_range: [0, 2]}]}, {sources: [{model: x/a, layer_range: [1, 3]}]}]
""")
    assert [stage.name for stage in stages] == ["first", "second", ""]
    assert stages[2].pivot == "second" and stages[1].pivot == "first"
    assert any(note.level == "warning" and "'unused'" in note.text for note in notes)


def test_stages_that_need_each_other_are_refused():
    with pytest.raises(RecipeError, match="y → x → y goes round in a circle"):
        import_text("name: x\nmerge_method: karcher\nmodels: [{model: y}, {model: a}]\n---\nname: y\nmerge_method: karcher\n"
                    "models: [{model: x}, {model: b}]\n")


def test_an_imported_recipe_survives_yaml_and_can_be_planned(models):
    recipe = one(f"merge_method: della\nbase_model: {models}/pivot\nmodels:\n- model: {models}/target-a\n  parameters:\n"
                 f"    weight: [0.2, 0.7]\n    density: [{{filter: mlp, value: 0.5}}, {{value: 0.6}}]\n    epsilon: 0.1\n")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    names = [name for name in llama(4) if "o_proj" not in name]
    assert WeightPlan.of(recipe, names).numbers.shape == (len(names), 1)
    assert {float(values[0]) for values in OptionPlan.of(recipe, names).values["density"]} == {0.5, 0.6}
