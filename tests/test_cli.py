"""python -m fusion: the forms that scripts rely on, their exit status, and what goes to which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.merge import merge
from fusion.methods import METHODS
from fusion.preflight import preflight
from fusion.progress import finish
from fusion.recipe import Override, Recipe
from fusion.variation import MEASURES, measure
from tests.conftest import save_checkpoint, snapshot
from tests.test_adapters import pair, save_adapter

ROOT = Path(__file__).parent.parent
UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


@pytest.fixture
def folders(tmp_path) -> list[str]:
    tensors = [{UP: np.full((2, 4), value, np.float32), HEAD: np.full((2, 2), value, np.float32)} for value in (0, 1, 3)]
    return [str(save_checkpoint(tmp_path / name, its)) for name, its in zip(("pivot", "a", "b"), tensors, strict=True)]


@pytest.fixture
def run(capsys):
    """`run("preflight", …)`: exit status, stdout, stderr."""
    def call(*argv):
        status = main([str(word) for word in argv])
        return status, *capsys.readouterr()
    return call


def strict(text: str):
    """One JSON document without NaN and Infinity."""
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(text, parse_constant=refuse)


# ── what the commands do ─────────────────────────────────────────────────────────────────────────────────────────────

def test_preflight_says_in_words_and_in_json_what_the_library_says(run, folders):
    status, out, err = run("preflight", *folders)
    assert (status, err) == (0, "") and "LlamaForCausalLM" in out and "needs" not in out
    status, out, _ = run("preflight", *folders, "--json")
    pivot, *targets = map(Checkpoint, folders)
    expected = preflight(pivot, targets).to_dict()
    assert status == 0 and {**strict(out), "free_disk_bytes": 0} == {**json.loads(json.dumps(expected)), "free_disk_bytes": 0}


@pytest.mark.parametrize("command", ["preflight", "variation", "inspect"])
def test_a_base_with_an_adapter_is_named_as_any_model(run, folders, tmp_path, command):
    lora = save_adapter(tmp_path / "lora", pair(UP, np.ones((1, 4), np.float32), np.ones((2, 1), np.float32)))
    status, out, err = run(command, folders[0], f"{folders[0]}+{lora}", "--json")
    assert (status, err) == (0, "")
    if command == "variation":
        assert {row["tensor"]: row["variation"] for row in strict(out)["tensors"]} == {UP: 4.0, HEAD: 0.0}  # (2 ÷ 1 · 1)²


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_preflight_of_models_that_cannot_be_merged_is_exit_2_with_the_reason_on_stderr(run, folders, tmp_path, json_too):
    other = save_checkpoint(tmp_path / "c", {UP: np.ones((2, 5), np.float32), HEAD: np.ones((2, 2), np.float32)})
    status, out, err = run("preflight", *folders, other, *json_too)
    assert status == 2 and err.startswith(f"error: c: {UP} has shape") and "needs pairwise fusion first" in err
    if json_too:
        assert strict(out)["mergeable"] is False


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("granularity", ["model", "layer", "module", "matrix", "parameter"])
def test_variation_prints_the_ratios_of_the_library(run, folders, granularity, by):
    pivot, *targets = map(Checkpoint, folders)
    known = finish(measure(pivot, targets, elements=True))
    status, out, err = run("variation", *folders, "--granularity", granularity, "--measure", by, "--json")
    assert (status, err) == (0, "") and strict(out) == known.to_dict(granularity, by)
    status, out, _ = run("variation", *folders, "--granularity", granularity, "--measure", by)
    share = .9 if by == "square" else .75
    assert status == 0 and f"{share:.4f}" in out


def test_variation_by_default_is_of_matrices_and_squares(run, folders):
    report = strict(run("variation", *folders, "--json")[1])
    assert (report["granularity"], report["measure"], report["targets"]) == ("matrix", "square", ["a", "b"])
    assert {(row["tensor"], row["target"]): row["ratio"] for row in report["tensors"]}[UP, "b"] == pytest.approx(.9)


def test_variation_refuses_unknown_names_before_it_reads(run, folders, monkeypatch):
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    assert run("variation", *folders, "--granularity", "matrx")[0] == 2


def test_variation_stays_json_where_nan_is_allowed(run, folders, tmp_path):
    sick = save_checkpoint(tmp_path / "sick", {UP: np.full((2, 4), np.nan, np.float32), HEAD: np.full((2, 2), np.inf, np.float32)})
    status, out, err = run("variation", folders[0], sick, "--json")
    assert (status, out) == (2, "") and "NaN or Inf" in err and "--allow-nonfinite" in err
    status, out, _ = run("variation", folders[0], sick, "--allow-nonfinite", "--json")
    assert status == 0 and strict(out)


def test_merge_writes_the_folder_of_the_library(run, folders, tmp_path):
    status, out, err = run("merge", *folders, "--method", "varm", "--granularity", "layer", "--out", tmp_path / "cli",
                           "--dtype", "bfloat16")
    assert (status, err) == (0, "") and str(tmp_path / "cli") in out
    finish(merge(Recipe(folders[0], tuple(folders[1:]), granularity="layer", dtype="bfloat16"), tmp_path / "lib"))
    assert snapshot(tmp_path / "cli") == snapshot(tmp_path / "lib")


def test_every_option_reaches_the_recipe(run, folders, tmp_path):
    status, out, _ = run("merge", *folders, "--method", "linear", "--weights", "1,3", "--override", f"{UP}:a=0.7",
                         "--exclude", "lm_*", "--dtype", "float32", "--donor", "b", "--max-shard-gb", "0.001",
                         "--allow-nonfinite", "--json", "--out", tmp_path / "out")
    recipe = Recipe.load(tmp_path / "out/fusechat_recipe.yaml")
    assert status == 0 and recipe.with_(revisions={}, result={}) == Recipe(
        folders[0], tuple(folders[1:]), method="linear", weights=(1, 3), overrides=(Override(UP, {"a": .7}),), exclude=("lm_*",),
        dtype="float32", donor="b", allow_nonfinite=True, options={"normalize": True})
    told = strict(out)
    assert [warning.partition(":")[0] for warning in told["warnings"]][:2] == ["a", "b"]
    assert "no tokenizer.json" in told["warnings"][0] and "the result has none" in told["warnings"][-1]
    assert told == {"folder": str(tmp_path / "out"), "recipe": recipe.to_dict(), "tensors": 2,
                    "parameters": {"pivot": 12, "result": 12}, "finite": True, "warnings": told["warnings"]}


def test_merge_runs_a_recipe_file(run, folders, tmp_path):
    assert run("merge", *folders, "--out", tmp_path / "first")[0] == 0
    assert run("merge", tmp_path / "first/fusechat_recipe.yaml", "--out", tmp_path / "again")[0] == 0
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "again")
    assert run("merge", tmp_path / "first/fusechat_recipe.yaml", "--granularity", "layer", "--out", tmp_path / "other")[0] == 0
    assert Recipe.load(tmp_path / "other/fusechat_recipe.yaml").granularity == "layer"


def test_methods_lists_every_method(run):
    status, out, _ = run("methods")
    assert status == 0 and all(method.formula in out for method in METHODS.values())
    assert set(strict(run("methods", "--json")[1])) == set(METHODS)


# ── what a person can get wrong ──────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("argv", "words"), [
    (["preflight", "gone", "gone too"], "gone: there is no such folder"),
    (["variation", "{0}", "{1}", "--granularity", "matrx"], "Did you mean 'matrix'?"),
    (["variation", "{0}", "{1}", "--measure", "squre"], "Did you mean 'square'?"),
    (["variation", "{0}", "{0}"], "same folder is given twice"),
    (["merge", "{0}", "{1}", "--method", "vram", "--out", "out"], "Did you mean 'varm'?"),
    (["merge", "{0}", "{1}", "--weights", "1;2", "--method", "linear", "--out", "out"], "'1;2' is not a list of numbers or words"),
    (["merge", "{0}", "{1}", "--weights", "nan", "--method", "linear", "--out", "out"], "a finite number"),
    (["merge", "{0}", "{1}", "--weights", "1,1", "--out", "out"], "2 numbers for 1 targets"),
    (["merge", "{0}", "{1}", "--override", "x", "--out", "out"], "'x' is no override"),
    (["merge", "{0}", "{1}", "--override", "x:a=b", "--out", "out"], "is no override"),
    (["merge", "{0}", "{1}", "--override", "x:=1", "--out", "out"], "is no override"),
    (["merge", "{0}", "{1}", "--override", "lm_haed.weight:a=1", "--out", "out"], "Did you mean 'lm_head.weight'?"),
    (["merge", "{0}", "{1}", "--exclude", "", "--out", "out"], "no tensor matches ''"),
    (["merge", "{0}", "{1}", "--max-shard-gb", "nan", "--out", "out"], "no sensible shard size"),
    (["merge", "{0}", "{1}", "--dtype", "int8", "--out", "out"], "dtype: unknown 'int8'"),
    (["merge", "{0}", "{1}", "--out", "{0}"], "exists already"),
    (["merge", "{0}", "--out", "out"], "one argument that is no recipe file"),
    (["merge", "gone.yaml", "--out", "out"], "gone.yaml: cannot be read"),
    (["demo"], None), (["merge", "{0}", "{1}"], None), (["nonsense"], None), ([], None),
], ids=str)
def test_a_mistake_is_exit_2_with_words_on_stderr_and_nothing_written(capsys, folders, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    try:
        status = main([word.format(*folders) for word in argv])
    except SystemExit as usage:
        status = usage.code
        assert words is None
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and "Traceback" not in err
    assert err.startswith("error: ") and words in err if words else "usage: " in err
    assert snapshot(tmp_path) == before


def test_an_interrupt_is_exit_130_and_leaves_nothing(run, folders, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fusion.merge"], "side_files", interrupt)
    before = snapshot(tmp_path)
    status, out, err = run("merge", *folders, "--out", tmp_path / "new/out")
    assert (status, out) == (130, "") and "nothing was left behind" in err
    assert snapshot(tmp_path) == before


# ── as a process ─────────────────────────────────────────────────────────────────────────────────────────────────────

def python(*argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, env={**os.environ, **env}, timeout=120)


def test_it_runs_as_a_process_with_clean_streams(folders, tmp_path):
    done = python("-m", "fusion", "merge", *folders, "--out", str(tmp_path / "out"), "--json")
    assert (done.returncode, done.stderr) == (0, b"") and strict(done.stdout.decode())["tensors"] == 2
    failed = python("-m", "fusion", "merge", *folders, "--out", str(tmp_path / "out"))
    assert (failed.returncode, failed.stdout) == (2, b"")
    assert b"exists already" in failed.stderr and b"Traceback" not in failed.stderr


def test_a_console_without_greek_letters_still_gets_its_answer():
    done = python("-m", "fusion", "methods", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"\\u03b8" in done.stdout


@pytest.mark.parametrize("argv", [
    ["preflight", "{0}", "{1}"], ["variation", "{0}", "{1}"], ["methods"], ["--help"], ["demo", "train", "--help"],
    ["merge", "{0}", "{1}", "--out", "{0}-out"]], ids=lambda argv: argv[0])
def test_light_commands_load_neither_torch_nor_transformers(folders, argv):
    script = ("import sys; from fusion.__main__ import main\n"
              "try: status = main(sys.argv[1:])\n"
              "except SystemExit as usage: status = usage.code\n"
              "heavy = {'torch', 'transformers', 'gradio', 'pandas'} & set(sys.modules)\n"
              "assert status == 0 and not heavy, (status, heavy)")
    done = python("-c", script, *(word.format(*folders) for word in argv))
    assert done.returncode == 0, done.stderr.decode()
