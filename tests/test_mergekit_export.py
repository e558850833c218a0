"""A recipe becomes a file for stock mergekit; what mergekit itself made of the same files stands in golden/mergekit_files.json."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from fusion import Recipe, finish, measure, merge
from fusion.__main__ import main
from fusion.commands.mergekit import export
from fusion.errors import FusionError
from fusion.mergekit import export_text, import_text, tensor_names
from fusion.methods import METHODS
from fusion.plan import MergePlan
from fusion.settings import Curve, Override, Slice, Table, resolve
from fusion.sources import open_checkpoint
from tests.benchmarks import parity
from tests.conftest import load_tensors

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mergekit_files.json").read_text())
NAMES = [*(f"model.layers.{n}.{its}.weight" for n in range(12) for its in ("mlp.up_proj", "self_attn.q_proj")), "model.norm.weight",
         "model.embed_tokens.weight", "lm_head.weight", "norm.weight"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a pivot, three targets and a stranger with four layers."""
    folder = tmp_path_factory.mktemp("models")
    parity.make_models(folder)
    return folder


def mergekit_value(rows: list[dict], name: str) -> float:
    """mergekit's rule on a file's own data: the first filter that is a piece of the name."""
    return next(row["value"] for row in rows if "filter" not in row or row["filter"] in name)


# ── what mergekit makes of the same files ────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", GOLDEN)
def test_the_merge_is_the_one_that_mergekit_makes(name, models, tmp_path):
    """Our merge of an imported file, and of an exported recipe, has the sums over every tensor that mergekit's merge has."""
    recipe = parity.exported(name.removeprefix("export "), models) if name.startswith("export ") else \
        import_text(parity.resolved(parity.FILES[name], models), opener=tensor_names)[0][0]
    finish(merge(recipe, tmp_path / "out"))
    np.testing.assert_allclose(parity.signature(tmp_path / "out"), GOLDEN[name], rtol=0, atol=4e-6)


def test_every_file_was_recorded():
    assert set(GOLDEN) == {*parity.FILES, *(f"export {name}" for name in parity.EXPORTS)}
    assert {import_text(text)[0][0].method for text in parity.FILES.values()} == set(METHODS) - {"varm"}


@pytest.mark.skipif(not shutil.which("mergekit-yaml"), reason="mergekit is not installed")
def test_mergekit_itself_makes_our_varm_merge(models, tmp_path):
    recipe = parity.exported("varm", models)
    parity.run_mergekit(shutil.which("mergekit-yaml"), export(recipe), tmp_path / "theirs")
    finish(merge(recipe, tmp_path / "ours"))
    assert parity.compare(tmp_path / "ours", tmp_path / "theirs")[0] < 1e-6


# ── the text ─────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_varm_merge_is_linear_with_a_filter_for_every_tensor(models):
    recipe = parity.exported("varm", models)
    data = yaml.safe_load(export(recipe))
    pivot, one, two = data["models"]
    assert (data["merge_method"], data["base_model"]) == ("linear", recipe.pivot)
    assert data["dtype"] == data["out_dtype"] == "float32"
    assert pivot == {"model": recipe.pivot, "parameters": {"weight": 0}}
    variation = finish(measure(open_checkpoint(recipe.pivot), [open_checkpoint(path) for path in recipe.targets]))
    for t, name in enumerate(variation.names):
        wanted = variation.ratios("matrix")[t]
        assert [mergekit_value(its["parameters"]["weight"], name) for its in (one, two)] == pytest.approx(wanted, rel=1e-8)


def test_longer_names_come_first_so_that_every_tensor_meets_its_own():
    weights = np.random.default_rng(0).uniform(size=(len(NAMES), 2))
    data = yaml.safe_load(export_text(Recipe("p", ("a", "b")), weights, NAMES))
    for j, its in enumerate(data["models"][1:]):
        got = [mergekit_value(its["parameters"]["weight"], name) for name in NAMES]
        assert got == pytest.approx(weights[:, j], rel=1e-8)


def test_excluded_tensors_have_the_pivots_weight():
    weights = np.array([[0.3, 0.7]] * len(NAMES))
    weights[3] = 0
    data = yaml.safe_load(export_text(Recipe("p", ("a", "b"), exclude=(NAMES[3],)), weights, NAMES))
    rows = [[mergekit_value(its["parameters"]["weight"], name) for its in data["models"]] for name in NAMES]
    assert rows == [[1, 0, 0] if t == 3 else [0, 0.3, 0.7] for t in range(len(NAMES))]


def test_small_numbers_are_numbers_to_yaml():
    data = yaml.safe_load(export_text(Recipe("p", ("a",), method="nearswap", options={"t": 1e-7})))
    assert data["parameters"] == {"t": 1e-7}
    weights = np.array([[1e-12, 1 - 1e-12], [1.5e-9, 1]])
    data = yaml.safe_load(export_text(Recipe("p", ("a", "b")), weights, ["x.weight", "y.weight"]))
    assert {row["value"] for row in data["models"][1]["parameters"]["weight"]} == {1e-12, 1.5e-9}


def test_filters_and_gradients_stay_what_they_are():
    """A table that mergekit can say is said so; one that it cannot is written out by name."""
    said = Table((("*", 0.3), ("*mlp*", Curve((0.0, 1.0), 0.0)), ("*layers.11.*", 0.5)))
    text = export_text(Recipe("p", ("a",), method="slerp", options={"t": said}), None, NAMES)
    assert yaml.safe_load(text)["parameters"]["t"] == [{"filter": "layers.11.", "value": 0.5}, {"filter": "mlp", "value": [0, 1]},
                                                       {"value": 0.3}]
    ours = Curve((0.0, 1.0))  # the final norm has 1 here, and in mergekit always the first point
    rows = yaml.safe_load(export_text(Recipe("p", ("a",), method="slerp", options={"t": ours}), None, NAMES))["parameters"]["t"]
    assert len(rows) == len(NAMES)
    assert [mergekit_value(rows, name) for name in NAMES] == pytest.approx(resolve(ours, NAMES), rel=1e-8)


def test_the_recipe_travels_as_comments_and_paths_are_quoted_where_needed():
    recipe = Recipe("no", ("models/my model: 1", "ünïcode"), method="task_arithmetic", name="stage")
    text = export_text(recipe)
    data = yaml.safe_load(text)
    assert [its["model"] for its in data["models"]] == ["no", "models/my model: 1", "ünïcode"] and data["base_model"] == "no"
    comments = "\n".join(line[4:] for line in text.splitlines() if line.startswith("#   "))
    assert Recipe.from_yaml(comments) == recipe and data["name"] == "stage"


@pytest.mark.parametrize(("recipe", "words"), [
    (Recipe("p", ("a",)), "measured weights are missing"),
    (Recipe("p", ("a",), method="sce"), "compat: mergekit"),
    (Recipe("p", ("a",), method="slerp", exclude=("*norm*",)), "no weight"),
    (Recipe("p", ("a",), method="ties", vocabulary="common"), "common"),
    (Recipe("p", ("a",), method="ties", weights=(Curve((0.0, 1.0)),)), "tensors' names"),
    (Recipe("p", ("a",), method="linear", overrides=(Override("x", {"a": 1.0}),)), "tensors' names"),
    (Recipe("p", ("a@b@c",), method="ties"), "Rename the folder"),
    (Recipe("p", ("a",), method="tise"), "'ties'")])
def test_what_mergekit_cannot_say_is_refused(recipe, words):
    with pytest.raises(FusionError, match=re.escape(words)):
        export_text(recipe)
    with pytest.raises(FusionError, match="single elements"):
        export_text(Recipe("p", ("a",), granularity="parameter"), np.ones((1, 1)), ["x"])


def test_what_it_cannot_carry_is_said_in_a_comment():
    assert "copy them from a afterwards" in export_text(Recipe("p", ("a",), method="ties", donor="a"))
    assert "--random-seed" in export_text(Recipe("p", ("a",), method="dare_ties"))
    assert "at random" in export_text(Recipe("p", ("a", "b"), method="nuslerp"))
    assert "tokenizer: {source: union}" in export_text(Recipe("p", ("a",), method="ties", vocabulary="union"))


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────

def values(recipe: Recipe) -> tuple[np.ndarray, list[dict]]:
    """The effective weights [T, J] of a recipe and the options of every tensor."""
    plan = MergePlan.open(recipe)
    ratios = np.zeros(plan.weights.given.shape)
    if plan.weights.measured:
        ratios = plan.ratios(finish(measure(plan.pivot, plan.targets)))
    return plan.weights.table(ratios), [plan.options.row(t) for t in range(len(plan.weights.names))]


@pytest.mark.parametrize("name", [name for name in parity.EXPORTS if name not in ("slerp-two", "passthrough")])
def test_export_and_import_give_every_tensor_the_same_values(name, models):
    recipe = parity.exported(name, models)
    (back,), _ = import_text(export(recipe), opener=tensor_names)
    kept = recipe.exclude  # an excluded tensor is one where the pivot, then a model like the others, has all the weight
    assert (back.pivot, back.dtype) == (recipe.pivot, "float32")
    for one, other in zip(back.slices, recipe.slices, strict=True):
        assert {model: layers for model, layers in one.ranges.items() if model != "pivot"} == other.ranges
    assert back.targets == ((recipe.pivot,) if kept else ()) + recipe.targets
    (ours, options), (theirs, imported) = values(recipe), values(back)
    np.testing.assert_allclose(theirs[:, 1:] if kept else theirs, ours, rtol=0, atol=1e-8)
    for one, other in zip(options, imported, strict=True) if recipe.method != "varm" else ():
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_stages_are_exported_one_after_another(tmp_path, capsys):
    stages = [Recipe("p", ("a",), method="linear", name="first"), Recipe("first", ("b",), method="ties")]
    back, _ = import_text("---\n".join(export_text(stage) for stage in stages), opener=tensor_names)
    assert [(stage.pivot, stage.targets, stage.name) for stage in back] == [("p", ("a",), "first"), ("first", ("b",), "")]


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────

FILE = "merge_method: ties\nbase_model: {0}/pivot\nmodels:\n- {{model: {0}/target-a, parameters: {{weight: 0.5, densty: 1}}}}\n"


def test_import_prints_a_recipe_that_can_be_run(models, tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(FILE.format(models))
    assert main(["import", str(tmp_path / "m.yaml")]) == 0
    out = capsys.readouterr().out
    assert "# warning line 4: ties knows no 'densty'" in out and Recipe.from_yaml(out).method == "ties"
    assert main(["import", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "r.yaml")]) == 0
    assert Recipe.load(tmp_path / "r.yaml") == Recipe.from_yaml(out)
    assert main(["import", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "r.yaml")]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "m.yaml"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["recipes"][0]["method"] == "ties" and {"level", "line", "text"} == set(data["notes"][0])


def test_lint_ends_with_2_only_for_errors(models, tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(FILE.format(models))
    assert main(["lint", str(tmp_path / "m.yaml")]) == 0
    assert re.search(r"^    4  warning  ties knows no 'densty'", capsys.readouterr().out, re.M)
    (tmp_path / "m.yaml").write_text(FILE.format(models).replace("ties", "tise"))
    assert main(["lint", str(tmp_path / "m.yaml")]) == 2
    out, err = capsys.readouterr()
    assert "error    merge_method: unknown 'tise'" in out and "1 error" in err
    assert main(["lint", str(tmp_path / "missing.yaml")]) == 2 and main(["lint", str(models)]) == 2


def test_a_mergekit_file_can_be_merged_as_it_is(models, tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(FILE.format(models))
    assert main(["merge", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "one")]) == 0
    assert "warning: " in (err := capsys.readouterr().err) and "line 4: ties knows no 'densty'" in err
    finish(merge(import_text(FILE.format(models), opener=tensor_names)[0][0], tmp_path / "two"))
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    assert all((one[name] == two[name]).all() for name in two)


@pytest.mark.parametrize(("name", "encoding"), [("m.yaml", "utf-8-sig"), ("m.yml", "utf-16"), ("mergekit config.txt", "utf-8")])
def test_a_mergekit_file_is_one_whatever_it_is_called_and_however_it_was_saved(models, tmp_path, capsys, name, encoding):
    (tmp_path / name).write_text(FILE.format(models), encoding=encoding)
    assert main(["merge", str(tmp_path / name), "--out", str(tmp_path / "one")]) == 0
    assert main(["lint", str(tmp_path / name)]) == 0 and main(["import", str(tmp_path / name)]) == 0


def test_a_folder_stands_for_the_recipe_in_it(models, tmp_path, capsys):
    recipe = Recipe(str(models / "pivot"), (str(models / "target-a"),), method="linear")
    folder = finish(merge(recipe, tmp_path / "made")).folder
    (folder / "mergekit_config.yml").write_text(FILE.format(models))
    assert main(["export", str(folder)]) == 0
    assert import_text(capsys.readouterr().out)[0][0].method == "linear"
    assert main(["lint", str(folder)]) == 0 and main(["import", str(folder)]) == 0
    assert Recipe.from_yaml(capsys.readouterr().out.partition("fusechat:")[2].join(("fusechat:", ""))).method == "ties"
    assert main(["export", str(models / "pivot")]) == 2
    assert "there is no fusechat_recipe.yaml in this folder" in capsys.readouterr().err


def test_export_measures_and_writes(models, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(Recipe(str(models / "pivot"), (str(models / "target-a"), str(models / "target-b"))).to_yaml())
    assert main(["export", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "m.yaml")]) == 0
    (back,), _ = import_text((tmp_path / "m.yaml").read_text(), opener=tensor_names)
    assert back.method == "linear" and isinstance(back.weights[0], Table) and len(back.weights[0].rows) == 39
    assert main(["export", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "m.yaml")]) == 2
    capsys.readouterr()
    assert main(["export", str(tmp_path / "r.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mergekit"] == (tmp_path / "m.yaml").read_text()


def test_slices_name_layers_as_their_sources_do():
    recipe = Recipe("p", ("a", "b"), method="task_arithmetic", weights=(Table((("*", 1.0), ("model.layers.1.*", 2.0))), 1.0),
                    slices=(Slice({"pivot": (0, 1), "a": (4, 5), "b": (0, 1)}), Slice({"pivot": (1, 2), "a": (7, 8), "b": (1, 2)})))
    names = ["model.embed_tokens.weight", "model.layers.0.x.weight", "model.layers.0.y.weight", "model.layers.1.x.weight",
             "model.layers.1.y.weight", "model.norm.weight"]
    first, second = yaml.safe_load(export_text(recipe, None, names))["slices"]
    assert [its["model"] for its in second["sources"]] == ["p", "a", "b"]
    assert first["sources"][1] == {"model": "a", "layer_range": [4, 5], "parameters": {"weight": 1.0}}
    rows = second["sources"][1]["parameters"]["weight"]
    assert {row["filter"]: row["value"] for row in rows} == {"model.layers.7.x.weight": 2, "model.layers.7.y.weight": 2,
                                                             "model.norm.weight": 1}
