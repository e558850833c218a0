"""mergekit files read and explained: every form, every trap with its line, and nothing that raises but FusionError."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import FusionError
from fusion.mergekit import import_text, is_mergekit, lint
from fusion.mergekit.catalogue import as_kind
from fusion.mergekit.linting import row_value
from fusion.mergekit.reading import read
from fusion.methods import METHODS

FULL = """\
models:
  - model: a/base@v1
  - model: a/one+a/adapter@v2
    parameters:
      density: [0.2, 0.8]          # a gradient
      weight:
        - filter: self_attn
          value: [0, 0.5, 1]
        - {filter: mlp, value: 1e-1}
        - value: 0.3
  - model: {model: {path: a/two, revision: main}, lora: a/other, override_architecture: LlamaForCausalLM}
    parameters: {weight: yes}
merge_method: ties
base_model: a/base@v1
parameters:
  normalize: true
  int8_mask: true
dtype: torch.bfloat16
out_dtype: float16
tokenizer:
  source: union
  pad_to_multiple_of: 64
chat_template: auto
"""


def notes(text: str, level: str) -> list[tuple[int, str]]:
    return [(note.line, note.text) for note in lint(text) if note.level == level]


def said(text: str, level: str, line: int, *words: str) -> None:
    """There is a note of this level in this line with these words."""
    found = [its for number, its in notes(text, level) if number == line]
    assert any(all(word in its for word in words) for its in found), notes(text, level)


def merge_of(method: str, more: str = "", weight: str = "{weight: 1}") -> str:
    models = "".join(f"- {{model: {name}, parameters: {weight}}}\n" for name in "ab")
    return f"merge_method: {method}\nbase_model: p\nmodels:\n{models}{more}"


def slice_of(method: str, *ranges: str, more: str = "") -> str:
    """One slice in line 3 with sources a, b … that have these layer ranges."""
    sources = ", ".join(f"{{model: {name}, layer_range: {layers}}}" for name, layers in zip("abc", ranges, strict=False))
    return f"merge_method: {method}\nslices:\n- sources: [{sources}]\n{more}"


def test_every_form_is_read_with_its_line():
    (document,), found = read(FULL)
    assert not found
    base, one, two = document.models
    assert (base.model.text, one.model.text, two.model.text) == ("a/base@v1", "a/one+a/adapter@v2", "a/two@main+a/other")
    assert (one.line, two.line, two.model.architecture) == (3, 11, "LlamaForCausalLM")
    assert [(row.line, row.filter, row.values, row.gradient) for row in one.parameters["weight"]] == [
        (7, "self_attn", (0, 0.5, 1), True), (9, "mlp", ("1e-1",), False), (10, None, (0.3,), False)]
    assert one.parameters["density"][0].values == (0.2, 0.8) and one.parameters["density"][0].line == 5
    assert two.parameters["weight"][0].values == (True,)
    assert (document.method, document.base.text, document.dtype, document.out_dtype) == ("ties", "a/base@v1", "bfloat16", "float16")
    assert (document.tokenizer.source, document.tokenizer.pad_to_multiple_of, document.chat_template) == ("union", 64, "auto")
    assert document.lines["out_dtype"] == 19


def test_slices_modules_and_stages_are_read():
    text = """\
name: first
merge_method: passthrough
slices:
- sources: [{model: x, layer_range: [0, 8]}]
- sources: [{model: y, layer_range: [4, 12], parameters: {scale: 0.5}}]
  residual_weight: 0.3
---
merge_method: linear
modules:
  text_decoder:
    models: [{model: first, parameters: {weight: 1}}, {model: z}]
    parameters: {weight: 2}
"""
    (first, second), found = read(text)
    assert [part.sources[0].layers for part in first.slices] == [(0, 8), (4, 12)] and first.name == "first"
    assert [(note.line, note.level) for note in found] == [(6, "warning")] and "no effect" in found[0].text
    assert (second.module, second.line, second.module_parameters["weight"][0].values) == ("text_decoder", 8, (2,))


def test_anchors_and_merge_keys_are_followed():
    (document,), found = read("merge_method: linear\nmodels:\n- {model: a, parameters: &p {weight: 1}}\n"
                              "- {model: b, parameters: *p}\n- {model: c, parameters: {<<: *p, normalize: true}}\n")
    assert not found and [source.parameters["weight"][0].values for source in document.models] == [(1,)] * 3


@pytest.mark.parametrize("parameters", [
    "{<<: *p, weight: 3}", "{weight: 3, <<: *p}",  # its own key wins, wherever it stands
    "{<<: [{weight: 3}, *p]}", "{<<: [*q, *p]}",  # of several the first
    "{<<: *p, <<: *q}", "{<<: {<<: *p, weight: 3}}"])  # of two merge keys the last; what is merged may merge
def test_merge_keys_give_way_as_yaml_has_it(parameters):
    (document,), found = read("merge_method: ties\nbase_model: p\nown: {p: &p {weight: 1, density: 0.5}, q: &q {weight: 3}}\n"
                              f"models:\n- {{model: a, parameters: {parameters}}}\n")
    values = {name: rows[0].values for name, rows in document.models[0].parameters.items()}
    assert not found and values["weight"] == (3,) and values.get("density", (0.5,)) == (0.5,)


def test_a_key_that_only_holds_anchors_is_not_called_unknown():
    body = "merge_method: linear\nmodels:\n- {model: a, parameters: *p}\n"
    assert not read(f"defaults: &p {{weight: 1}}\n{body}")[1] and not read(f"x: {{y: [&p {{weight: 1}}]}}\n{body}")[1]
    assert not read(f"common: &c {{dtype: float16}}\n<<: *c\n{body.replace('*p', '{weight: 1}')}")[1]
    (note,) = read(f"defaults: &p {{weight: 1}}\ndefault: *p\n{body}")[1]
    assert note.line == 2 and "knows no 'default'" in note.text


CHAIN = "x0: &x0 {a: 1}\n" + "".join(f"x{i}: &x{i} {{<<: *x{i - 1}}}\n" for i in range(1, 80)) + "<<: *x79\n"


@pytest.mark.parametrize("text", ["<<: 3\n", "<<: [3]\n", "a: &a {b: {<<: *a}}\n<<: {<<: *a, <<: 1}\n",
                                  "a: &a {<<: &b {<<: *a, x: 1}}\n<<: *a\n", CHAIN], ids=["3", "[3]", "1", "circle", "chain"])
def test_merge_keys_that_lead_nowhere_end_in_words(text):
    found = lint(text + "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    assert [note for note in found if note.level == "error" and note.text.startswith("<<")]


@pytest.mark.parametrize(("value", "kind", "wanted"), [
    ("1e-4", "number", 1e-4), (True, "number", 1.0), ("x", "number", None), ("nan", "number", None), (1e300, "number", None),
    (7.0, "integer", 7), (7.5, "integer", None), ("off", "flag", False), (1, "flag", True), ("2", "flag", None)])
def test_scalars_are_taken_as_leniently_as_mergekit_does(value, kind, wanted):
    assert as_kind(value, kind) == wanted


def test_gradients_worked_out_by_hand():
    (document,), _ = read(merge_of("linear", weight="{weight: [0, 0.5, 0.3, 0.7, 1]}"))
    row = document.models[0].parameters["weight"][0]
    assert [row_value(row, t, "number") for t in (0, 0.125, 0.25, 0.5, 0.875, 1)] == pytest.approx([0, 0.25, 0.5, 0.3, 0.85, 1])
    flags = read(merge_of("linear", "parameters: {normalize: [true, false, false]}"))[0][0].parameters["normalize"][0]
    assert [row_value(flags, t, "flag") for t in (0, 0.49, 0.5, 1)] == [True, True, False, False]


def test_lines_are_explained():
    text = FULL.replace("[0, 0.5, 1]", "[0, 0.5, 1.0]")
    said(text, "info", 7, "weight gradient [0, 0.5, 1]", "name contains 'self_attn'", "first layer 0, middle 0.5, last layer 1",
         "embeddings, final norm and head get 0")
    said(text, "info", 13, "ties", METHODS["ties"].summary)
    said(text, "info", 14, "a/base@v1 is the base")
    said(text, "info", 19, "stored as float16")
    said(text, "info", 17, "int8_mask has no effect")
    ranged = slice_of("slerp", "[8, 40]", "[8, 40]", more="base_model: a\nparameters: {t: [0, 1]}\n")
    said(ranged, "info", 5, "layer 0 0, layer 15 0.4839, layer 31 1")
    said(ranged, "info", 3, "a, layers 8 to 39", "the base itself")


HALF = "{weight: 1, density: 0.5}"
TRAPS = [  # what it is, the file, the line, words
    ("F3 small changes", "merge_method: sce\nbase_model: p\nmodels: [{model: a}, {model: b}]\n", 1, ("alike", "1e-6")),
    ("F4 wiped tensors", merge_of("breadcrumbs", weight=HALF), 1, ("0.1.4", "gamma")),
    ("F5 random donor", merge_of("linear").replace("base_model: p\n", ""), 1, ("without base_model", "here from the first, a")),
    ("F6 no generation config", merge_of("linear", "tokenizer_source: base\n"), 6, ("generation_config.json",)),
    ("padded rows are trimmed", merge_of("linear", "tokenizer_source: union\n"), 6, ("padded rows",)),
    ("F7 a typo at the top", merge_of("linear", "out_dtpe: float32\n"), 6, ("'out_dtpe'", "'out_dtype'")),
    ("F7 a parameter at the top", merge_of("ties", "normalize: false\n"), 6, ("'normalize'", "under `parameters:`")),
    ("F7 a typo in a parameter", merge_of("ties", "parameters:\n  lamda: 0.5\n"), 7, ("'lamda'", "'lambda'")),
    ("F7 another method's parameter", merge_of("linear", "parameters: {t: 0.5}\n"), 6, ("takes no t", "slerp")),
    ("F7 layer_range in models", "merge_method: passthrough\nmodels:\n- model: a\n  layer_range: [0, 4]\n", 4, ("slices",)),
    ("F8 no seed", merge_of("dare_ties", weight=HALF), 1, ("no seed",)),
    ("F8 sampled quantiles", "merge_method: arcee_fusion\nbase_model: p\nmodels: [{model: a}]\n", 1, ("samples", "no seed")),
    ("substring with a number", merge_of("linear", weight="{weight: [{filter: layers.1, value: 2}, {value: 1}]}"), 4,
     ("'layers.10'", "'layers.1.'")),
    ("a pattern as filter", merge_of("linear", weight="{weight: [{filter: '*mlp', value: 2}, {value: 1}]}"), 4,
     ("not a pattern",)),
    ("an unreachable filter", merge_of("linear", "parameters:\n  normalize:\n  - {filter: attn, value: true}\n"
                                       "  - {filter: self_attn.q, value: false}\n  - value: true\n"), 9,
     ("never reached", "line 8")),
    ("linear, base not listed", merge_of("linear"), 2, ("not among the models", "stops")),
    ("linear, base joins unseen", merge_of("linear", "parameters: {weight: 1}\n", "{}"), 2, ("too", "not listed")),
    ("karcher, base joins unseen", merge_of("karcher", weight="{}"), 2, ("too", "equal")),
    ("slerp, base is neither", merge_of("slerp", "parameters: {t: 0.5}\n", "{}"), 2, ("must be one of them",)),
    ("a slice without the base", slice_of("ties", "[0, 2]", more="base_model: p\nparameters: {weight: 1}\n"), 4,
     ("missing among a slice's sources",)),
    ("bf16 arithmetic", merge_of("linear", "dtype: bfloat16\n"), 6, ("before the arithmetic", "float32")),
    ("ignored under a model", merge_of("ties", weight="{weight: 1, normalize: false}"), 4, ("ignores it under a model",)),
    ("density without effect", merge_of("task_arithmetic", weight="{weight: 1, density: 0.5}"), 5, ("no effect",)),
    ("della's single columns", merge_of("della", weight=HALF), 1, ("single column",)),
    ("nearswap's t", "merge_method: nearswap\nbase_model: p\nmodels: [{model: a}]\nparameters: {t: 0.5}\n", 4, ("distance",)),
    ("filters without a rest", merge_of("linear", weight="{weight: [{filter: mlp, value: 1}]}"), 4, ("no filter names", "stops")),
    ("quantised by its name", merge_of("linear").replace("model: a", "model: x/a-GPTQ"), 4, ("quantised",)),
    ("chat template", merge_of("linear", "chat_template: chatml\n"), 6, ("not carried over",)),
    ("given twice", merge_of("linear", "dtype: float32\ndtype: float16\n"), 7, ("twice", "line 6")),
]


@pytest.mark.parametrize(("text", "line", "words"), [trap[1:] for trap in TRAPS], ids=[trap[0] for trap in TRAPS])
def test_traps_are_named_with_their_line(text, line, words):
    said(text, "warning", line, *words)


@pytest.mark.parametrize(("text", "words"), [
    (merge_of("dare_ties"), "no seed"), (merge_of("dare_linear", weight="{weight: 1, density: 1.0}"), "draws at random"),
    (merge_of("della"), "single column"), (merge_of("breadcrumbs_ties"), "0.1.4"),  # nothing is dropped at density 1
    ("merge_method: passthrough\nmodels: [{model: a}]\ndtype: bfloat16\n", "before the arithmetic"),
    ("merge_method: passthrough\nmodels: [{model: a}]\nchat_template: auto\n", "most models"),
    (merge_of("linear"), "changes are measured"), (merge_of("linear", "tokenizer_source: a\n"), "gives tokenizer"),
    (merge_of("linear", weight="{weight: [{filter: layers.31, value: 2}, {value: 1}]}"), "layers.310"),
    (merge_of("linear", weight="{weight: [{filter: mlp.w1, value: 2}, {value: 1}]}"), "w10"),
    (merge_of("linear", "tokenizer_source: union\n").replace("base_model: p\n", ""), "tokenizer, chat template"),
    (merge_of("linear", "tokenizer_source: union\n").replace("base_model: p\n", ""), "mean of those that have it")])
def test_notes_stand_only_where_they_apply(text, words):
    assert not [note for note in lint(text) if words in note.text]


@pytest.mark.parametrize(("text", "words"), [
    ("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 2}}]\ndtype: bfloat16\n", "before the arithmetic"),
    (merge_of("ties"), "p is the base: changes are measured from it; it gives tokenizer"),
    (merge_of("linear", "- {model: c, parameters: {weight: 1}}\ntokenizer_source: union\n").replace("base_model: p\n", ""),
     "gives a model that lacks a token the mean of those that have it; here it has the row of a"),
    (merge_of("ties", "parameters: {dtype: bfloat16}\n"), "It belongs to the top of the file"),
    ("merge_method: linear\nmodels: [{model: a, revision: x, parameters: {weight: 1}}]\n", "path@revision")])
def test_notes_stand_where_they_do(text, words):
    assert [note for note in lint(text) if words in note.text]


def test_a_sound_file_has_no_warning():
    text = merge_of("linear", "dtype: float32\nout_dtype: bfloat16\n").replace("base_model: p", "base_model: a")
    assert not notes(text, "warning") and not notes(text, "error")


WRONG = [  # what it is, the file, the line, words
    ("nothing", "", 1, "nothing"),
    ("no table", "- a\n- b\n", 1, "table"),
    ("no YAML", "models: [a\nb: {", 2, "YAML"),
    ("unknown tag", "merge_method: !!python/object:os.system linear\nmodels: [{model: a}]\n", 1, "merge_method"),
    ("nested too deeply", "[" * 5000, 1, "nested"),
    ("no method", "models: [{model: a}]\n", 1, "merge_method is missing"),
    ("another program's", "base_model: a\ngate_mode: hidden\nexperts: [{source_model: a}]\n", 1, "a file for mergekit-moe"),
    ("a search", "genome: {models: [a], merge_method: ties}\ntasks: []\n", 1, "a file for mergekit-evolve"),
    *((f"an empty method, {empty!r}", f"models: [{{model: a}}]\nmerge_method: {empty}\n", 2, "merge_method is missing")
      for empty in ("", "''", "null", "[]")),
    ("a dash in a method", merge_of("dare-ties"), 1, "'dare_ties'"),
    ("a method that is not here", merge_of("ram"), 1, "not offered"),
    ("models and slices", merge_of("linear", "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n"), 6, "exactly one"),
    ("neither", "merge_method: linear\n", 1, "exactly one"),
    ("several modules", "merge_method: linear\nmodules:\n  vision: {models: [{model: a}]}\n  text: {models: [{model: a}]}\n", 3,
     "2 parts"),
    ("models is no list", "merge_method: linear\nmodels: {model: a}\n", 2, "list"),
    ("a model is missing", "merge_method: linear\nmodels:\n- parameters: {weight: 1}\n", 3, "`model:` is missing"),
    ("a model is a number", "merge_method: linear\nmodels:\n- {model: 7, parameters: {weight: 1}}\n", 3, "folder or repository"),
    ("two adapters", "merge_method: linear\nmodels:\n- {model: a+b+c, parameters: {weight: 1}}\n", 3, "no model"),
    ("no weight", "merge_method: linear\nbase_model: a\nmodels:\n- {model: a}\n", 4, "weight is missing"),
    ("no t", "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n", 1, "t is missing"),
    ("a weight is text", merge_of("linear", weight="{weight: much}"), 4, "should be a number"),
    ("a weight is nothing", merge_of("linear", weight="{weight: null}"), 4, "no value"),
    ("a weight is a table", merge_of("linear", weight="{weight: {filter: x}}"), 4, "`value:` is missing"),
    ("a mixed list", merge_of("linear", weight="{weight: [1, {value: 2}]}"), 4, "not both"),
    ("an empty list", merge_of("linear", weight="{weight: []}"), 4, "empty"),
    ("a list in a list", merge_of("linear", weight="{weight: [[1]]}"), 4, "not both"),
    ("no base", "merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]\n", 1, "needs base_model"),
    ("too many", merge_of("nearswap", "parameters: {t: 0.0001}\n", "{}"), 4, "exactly 2"),
    ("too few", "merge_method: model_stock\nbase_model: p\nmodels: [{model: a}]\n", 3, "at least 3"),
    ("twice", "merge_method: karcher\nmodels: [{model: a}, {model: a}]\n", 2, "listed twice"),
    ("a density above 1", merge_of("ties", weight="{weight: 1, density: 50}"), 4, "share"),
    ("density ± epsilon", merge_of("della", weight="{weight: 1, density: 0.9}"), 4, "epsilon"),
    ("t beyond 1", "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 3}\n", 4,
     "from 0 to 1"),
    ("unequal ranges", slice_of("karcher", "[0, 2]", "[0, 3]"), 3, "equally many"),
    ("a backward range", slice_of("passthrough", "[5, 2]"), 3, "first below end"),
    ("no range", "merge_method: passthrough\nslices:\n- sources: [{model: a}]\n", 3, "layer_range"),
    ("no source", "merge_method: passthrough\nslices:\n- sources: []\n", 3, "at least one source"),
    ("an unknown dtype", merge_of("linear", "dtype: fp16\n"), 6, "float16"),
    ("whole numbers", merge_of("linear", "dtype: int64\n"), 6, "cut every weight"),
    ("both tokenizers", merge_of("linear", "tokenizer_source: base\ntokenizer: {source: base}\n"), 6, "not both"),
    ("single tokens", merge_of("linear", "tokenizer: {source: base, tokens: {x: {source: a}}}\n"), 6, "token by token"),
    ("a chat template's typo", merge_of("linear", "chat_template: chatlm\n"), 6, "'chatml'"),
    ("two results", merge_of("linear") + "---\n" + merge_of("linear"), 7, "no name"),
    ("a name twice", "name: x\n" + merge_of("linear") + "---\nname: x\n" + merge_of("linear"), 8, "two merges"),
]


@pytest.mark.parametrize(("text", "line", "words"), [wrong[1:] for wrong in WRONG], ids=[wrong[0] for wrong in WRONG])
def test_what_cannot_be_merged_is_refused_in_words(text, line, words):
    said(text, "error", line, words)
    with pytest.raises(FusionError) as caught:
        import_text(text, where="m.yaml")
    assert f"line {line}: " in str(caught.value) and "m.yaml" in str(caught.value)


def test_all_errors_come_at_once():
    text = "merge_method: tise\nbase_model: p\nmodels:\n- {model: a, parameters: {weight: []}}\n- {modl: b}\ndtype: fp8\n"
    with pytest.raises(FusionError) as caught:
        import_text(text)
    assert "4 problems" in str(caught.value) and all(f"line {n}: " in str(caught.value) for n in (1, 4, 5, 6))


def test_many_aliases_end_in_words():
    text = "a: &a [{model: x}]\n" + "merge_method: linear\nmodels: &m\n" + "- {model: a, parameters: {weight: 1}}\n" * 2001 \
        + "modules:\n" + "".join(f"  m{i}: {{models: *m}}\n" for i in range(3))
    assert any(note.level == "error" for note in lint(text))
    doubled = "".join(f"x{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}]}}\n" for i in range(1, 40))
    said(f"x0: &x0 {{a: 1}}\n{doubled}parameters: *x39\nmodels: [{{model: a}}]\nmerge_method: linear\n", "error", 1, "aliases")


def test_mergekit_files_are_told_from_recipes():
    assert is_mergekit(FULL) and not is_mergekit("fusechat: 1\nmethod: linear\n")
    assert not is_mergekit("# merge_method: linear\nfusechat: 1\n") and not is_mergekit("merge_method: x\nfusechat: 1\n")


@pytest.mark.parametrize(("text", "theirs"), [
    ("\ufeffmerge_method: linear\nmodels: []\n", True), ('"merge_method": linear\n', True),
    ("  merge_method: linear\n  models: []\n", True), ('{"models": [{"model": "a"}], "merge_method": "linear"}', True),
    ("models: []\nbase_model: a\n", True), ("name: a\nslices: []\nmerge_method: x\n", True),
    ("base_model: a\nexperts: []\ngate_mode: hidden\n", True), ("genome: {}\ntasks: []\n", True),
    ("merge_method: linear\nmodels: [\n", True),
    ("name: one\nmodels: []\n---\nmerge_method: linear\n", True),
    ("pivot: a\ntargets: []\nmethod: linear\nmerge_method: linear\n", False), ("pivot: a\ntargets: [\n", False),
    ("pivot: a\noptions:\n  merge_method: x\n", False), ("name: x\n", False), ("", False), ("- merge_method: x\n", False),
    ("? [merge_method]\n: x\n", False)])
def test_mergekit_files_are_recognised_by_their_keys(text, theirs):
    assert is_mergekit(text) is theirs


SCRAPS = [*FULL.splitlines(keepends=True), "---\n", "  - filter: x\n", "slices:\n", "[", "{", ": ", "\t", "&a *a\n"]


@given(st.lists(st.sampled_from(SCRAPS), max_size=30), st.text(max_size=20))
def test_no_text_raises_anything_but_fusion_errors(lines, more):
    text = "".join(lines) + more
    lint(text)
    with suppress(FusionError):
        import_text(text)
