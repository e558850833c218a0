"""python -m fusion merge: every option of every method from the command line, and recipe files of several stages."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from fusion.__main__ import main
from fusion.recipe import Curve, Recipe, load_stages
from tests.conftest import load_tensors, save_checkpoint, snapshot

UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


@pytest.fixture
def folders(tmp_path) -> list[str]:
    tensors = [{UP: np.full((2, 4), value, np.float32), HEAD: np.full((2, 2), value, np.float32)} for value in (0, 1, 3)]
    return [str(save_checkpoint(tmp_path / name, its)) for name, its in zip(("pivot", "a", "b"), tensors, strict=True)]


@pytest.fixture
def run(capsys):
    """`run("merge", …)`: exit status, stdout, stderr."""
    def call(*argv):
        status = main([str(word) for word in argv])
        return status, *capsys.readouterr()
    return call


def recorded(run, folders, out, *argv) -> Recipe:
    status, _, err = run("merge", *folders, *argv, "--out", out)
    assert (status, err) == (0, "")
    return Recipe.load(out / "fusechat_recipe.yaml")


@pytest.mark.parametrize(("method", "text", "name", "value"), [
    ("ties", "density=0.5", "density", .5), ("ties", "density=0.25,1", "density", (.25, 1)), ("ties", "lambda=2", "lambda", 2),
    ("ties", "density=curve:0,0.5,1", "density", Curve((0, .5, 1))), ("ties", "rescale=true", "rescale", True),
    ("ties", "density=curve:0,1;0.5", "density", (Curve((0, 1)), .5)), ("ties", "normalize=false", "normalize", False),
    ("multislerp", "space=deltas", "space", "deltas"), ("karcher", "tol=1e-3", "tol", .001)])
def test_options_reach_the_recipe(run, folders, tmp_path, method, text, name, value):
    assert recorded(run, folders, tmp_path / "out", "--method", method, "--option", text).options[name] == value


def test_no_flush_gives_the_same_result_and_waits_for_nothing_of_it(run, folders, tmp_path, monkeypatch):
    flushed, fsync, waits = [], os.fsync, {}
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(file) or fsync(file))
    for words in ((), ("--no-flush",)):
        recipe = recorded(run, folders, tmp_path / str(len(words)), *words)
        waits[words] = len(flushed), recipe.result["digest"]
        flushed.clear()
    (some, one), (few, other) = waits.values()
    assert one == other and few == 2 < some  # the journal says which hidden folder is its own


@pytest.mark.parametrize(("text", "weights"), [
    ("0.3,0.7", (.3, .7)), ("variation", ("variation",) * 2), ("variation,0.25", ("variation", .25)),
    ("curve:0,1;curve:1,0", (Curve((0, 1)), Curve((1, 0)))), ("curve:0.5,1;2", (Curve((.5, 1)), 2))])
def test_weights_may_be_numbers_variation_or_curves(run, folders, tmp_path, text, weights):
    assert recorded(run, folders, tmp_path / "out", "--method", "linear", "--weights", text).weights == weights


def test_seed_and_several_options_reach_the_recipe_and_the_numbers(run, folders, tmp_path):
    argv = ("--method", "dare_linear", "--option", "density=0.5", "--option", "rescale=false")
    first = recorded(run, folders, tmp_path / "one", *argv, "--seed", "3")
    assert (first.seed, first.options["density"], first.options["rescale"]) == (3, .5, False)
    other = recorded(run, folders, tmp_path / "other", *argv, "--seed", "4")
    assert first.result["digest"] != other.result["digest"]


def test_how_variation_becomes_weights_can_be_said(run, folders, tmp_path):
    recipe = recorded(run, folders, tmp_path / "out", "--rule", "softmax", "--temperature", "0.5", "--measure", "absolute")
    assert (recipe.rule, recipe.temperature, recipe.measure) == ("softmax", .5, "absolute")


def test_what_a_merge_says_of_its_result(run, folders, tmp_path):
    status, out, _ = run("merge", *folders, "--method", "linear", "--out", tmp_path / "out")
    recipe = Recipe.load(tmp_path / "out/fusechat_recipe.yaml")
    first, second, *warnings = out.splitlines()
    assert status == 0 and first == f"merged 2 tensors of 2 targets into {tmp_path}/out"
    assert second == f"12 parameters before, 12 after, all finite; content digest {recipe.result['digest']}"
    assert [text.split(":")[:2] for text in warnings] == [["warning", " a"], ["warning", " b"], ["warning", " pivot"]]
    told = json.loads(run("merge", *folders, "--method", "linear", "--out", tmp_path / "again", "--json")[1])["warnings"]
    assert [f"warning: {text}" for text in told] == warnings and "no tokenizer files" in warnings[-1]


def test_a_merge_can_be_reviewed_at_once(run, folders, tmp_path):
    status, out, _ = run("merge", *folders, "--method", "linear", "--out", tmp_path / "out", "--review", "--json")
    told = json.loads(run("review", tmp_path / "out", "--json")[1])
    assert status == 0 and json.loads(out)["review"] == told
    status, out, _ = run("merge", *folders, "--method", "linear", "--out", tmp_path / "again", "--review")
    assert status == 0 and out.startswith("merged 2 tensors") and run("review", tmp_path / "again")[1].strip() in out


STAGES = """fusechat: 1
name: mean
pivot: {0}
targets: [{1}, {2}]
method: linear
---
fusechat: 1
pivot: {0}
targets: [mean]
method: task_arithmetic
weights: [0.5]
"""


def test_a_recipe_file_may_have_several_stages(run, folders, tmp_path):
    (tmp_path / "two.yaml").write_text(STAGES.format(*folders))
    status, out, err = run("merge", tmp_path / "two.yaml", "--dtype", "float16", "--out", tmp_path / "out", "--json")
    assert (status, err) == (0, "") and json.loads(out)["recipe"]["dtype"] == "float16"
    merged = load_tensors(tmp_path / "out").values()
    assert {str(value.dtype): value.unique().tolist() for value in merged} == {"torch.float16": [1]}
    assert [stage.name for stage in load_stages(tmp_path / "out/fusechat_recipe.yaml")] == ["mean", ""]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("argv", "words"), [
    (["--option", "density"], "'density' is no option"), (["--option", "=1"], "'=1' is no option"),
    (["--option", "densty=1"], "ties has no such option"), (["--option", "density=2"], "from 0 to 1, not 2"),
    (["--option", "density=curve:0,x"], "'curve:0,x' is no curve"), (["--option", "density=a/b"], "'a/b' is not a list of numbers"),
    (["--option", "density=0.1,0.2,0.3"], "3 values for 2 targets"), (["--option", "rescale=maybe"], "true or false"),
    (["--weights", "1,x"], "'x' should be a finite number"), (["--weights", ""], "'' is not a list of numbers"),
    (["--engine", "lokal"], "Did you mean 'local'?"), (["--vocabulary", "both"], "vocabulary: unknown 'both'"),
    (["--seed", "-1"], "seed: -1 should be"),
], ids=str)
def test_a_mistake_is_exit_2_and_writes_nothing(run, folders, tmp_path, argv, words):
    before = snapshot(tmp_path)
    status, out, err = run("merge", *folders, "--method", "ties", *argv, "--out", tmp_path / "out")
    assert (status, out) == (2, "") and words in err and snapshot(tmp_path) == before
