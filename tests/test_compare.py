"""fusion.compare and the commands inspect and compare: what differs, in numbers, in words, and within 100 columns."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.compare import Difference, compare, compare_recipes
from fusion.errors import MismatchError
from fusion.inspection import inspect
from fusion.merge import merge
from fusion.progress import finish
from fusion.recipe import Override, Recipe
from tests.conftest import save_checkpoint, snapshot

ROOT = Path(__file__).parent.parent
Q0, UP0, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


@pytest.fixture
def run(capsys):
    """`run("compare", …)`: exit status, stdout, stderr."""
    def call(*argv):
        status = main([str(word) for word in argv])
        return status, *capsys.readouterr()
    return call


@pytest.fixture(scope="module")
def merges(family, tmp_path_factory) -> list[Path]:
    """The same models merged twice: weights by layer, and by matrix with one tensor by hand."""
    pivot, *targets = family("llama")
    out = tmp_path_factory.mktemp("merges")
    by_layer = Recipe(str(pivot), tuple(map(str, targets)), granularity="layer")
    by_hand = by_layer.with_(granularity="matrix", overrides=(Override(Q0, {"target-a": 1.0, "target-b": 0.0}),))
    return [finish(merge(recipe, out / name)).folder for recipe, name in ((by_layer, "one"), (by_hand, "two"))]


def saved(folder: Path, *models: dict, **config) -> list[str]:
    return [str(save_checkpoint(folder / name, {key: np.array(value, np.float32) for key, value in tensors.items()}, **config))
            for name, tensors in zip(("first", "second", "pivot"), models, strict=False)]


# ── recipes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_only_the_settings_that_differ_are_named_and_defaults_are_written_out():
    plain = Recipe("p", ("a", "b"), method="ties")
    assert compare_recipes([plain], [plain.with_(options={"density": 1.0})]) == ()  # the default, said aloud
    found = compare_recipes([plain], [plain.with_(options={"density": .5}, dtype="float16")])
    assert set(found) == {Difference("options.density", 1.0, .5), Difference("dtype", None, "float16")}
    assert compare_recipes([plain], [plain.with_(targets=("b", "a"), names=("b", "a"))]) == (
        Difference("order", ["a", "b"], ["b", "a"]),)
    assert Difference("targets.b", "b", "elsewhere/b") in compare_recipes([plain], [plain.with_(targets=("a", "elsewhere/b"))])


def test_stages_are_compared_one_by_one():
    first, last = Recipe("p", ("a",), method="linear", name="one"), Recipe("one", ("b",), method="linear")
    found = compare_recipes([first, last], [first, last.with_(dtype="bfloat16")])
    assert found == (Difference("stage 2.dtype", None, "bfloat16"),)


# ── numbers by hand ──────────────────────────────────────────────────────────────────────────────────────────────────

def test_distance_and_cosine_are_as_worked_out_by_hand(tmp_path):
    first, second, pivot = saved(tmp_path, {Q0: [[3, 4], [0, 0]], UP0: [[1, 0]]}, {Q0: [[3, 4], [0, 1]], UP0: [[1, 0]]},
                                 {Q0: [[3, 3], [0, 0]], UP0: [[1, 0]]})
    report = finish(compare(first, second, pivot))
    at = {name: t for t, name in enumerate(report.names)}
    assert report.distance[at[Q0]] == pytest.approx(1 / 5) and report.distance[at[UP0]] == 0
    assert report.cosine[at[Q0]] == pytest.approx(1 / np.sqrt(2)) and np.isnan(report.cosine[at[UP0]])
    assert report.totals == {"distance": pytest.approx(1 / np.sqrt(26)), "cosine": pytest.approx(1 / np.sqrt(2))}
    alone = finish(compare(first, second))
    assert alone.pivot == "" and np.isnan(alone.cosine).all() and alone.totals["cosine"] is None and alone.recipe is None
    assert not report.same_weights and finish(compare(first, first)).same_weights


def test_what_only_one_has_and_how_configs_differ(tmp_path):
    first, second = saved(tmp_path, {Q0: np.ones((2, 2)), UP0: np.ones((2, 3))}, {Q0: np.ones((2, 2)), UP0: np.ones((3, 2)),
                                                                                  HEAD: np.ones((2, 2))})
    config = json.loads((tmp_path / "second/config.json").read_text())
    (tmp_path / "second/config.json").write_text(json.dumps({**config, "rope": {"theta": 10}}))
    report = finish(compare(first, second))
    assert report.names == (Q0,) and [sorted(only) for only in report.only] == [[UP0], sorted((UP0, HEAD))]
    assert report.config == (Difference("rope.theta", None, 10),) and not report.same_weights
    other = saved(tmp_path / "other", {"x.weight": np.ones((2, 2))})[0]
    with pytest.raises(MismatchError, match="no matrix has the same name and shape"):
        finish(compare(first, other))


def test_a_pivot_of_another_shape_is_left_out_with_a_note(tmp_path):
    first, second, pivot = saved(tmp_path, {Q0: np.ones((2, 2))}, {Q0: np.zeros((2, 2))}, {Q0: np.ones((3, 3))})
    report = finish(compare(first, second, pivot))
    assert report.pivot == "" and "has not the shape" in report.notes[0]


# ── two merges ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_two_merges_are_compared_from_the_pivot_that_their_recipes_share(merges, family):
    before = [snapshot(folder) for folder in merges]
    report = finish(compare(*merges))
    assert report.pivot == "pivot" and report.models == ("one", "two") and report.config == ()
    assert report.tokenizer == {"same_chat_template": True, "same_vocabulary": True, "tokens": [286, 286], "only_first": 0,
                                "only_second": 0, "renumbered": 0}
    settings = {one.setting: (one.first, one.second) for one in report.recipe}
    assert settings["granularity"] == ("layer", "matrix") and settings["overrides.1.tensors"] == (None, Q0)
    assert set(settings) == {"granularity", "overrides.1.tensors", "overrides.1.weights.target-a", "overrides.1.weights.target-b",
                             "result.digest"}
    pivot, one, two = (Checkpoint(folder)[Q0].astype(np.float64) for folder in (family("llama")[0], *merges))
    t = report.names.index(Q0)
    assert report.distance[t] == pytest.approx(np.linalg.norm(two - one) / np.linalg.norm(one))
    deltas = [(two - pivot).ravel(), (one - pivot).ravel()]
    assert report.cosine[t] == pytest.approx(deltas[0] @ deltas[1] / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[1]))
    first = report.weights[0]
    assert first["tensor"] == Q0 and first["second"] in (0, 1) and abs(first["first"] - first["second"]) > .3
    assert [snapshot(folder) for folder in merges] == before


def test_recipes_with_different_pivots_have_no_common_origin(merges, tmp_path, family):
    pivot, a, b = map(str, family("llama"))
    other = finish(merge(Recipe(a, (pivot, b), names=("p", "b")), tmp_path / "other")).folder
    report = finish(compare(merges[0], other))
    assert report.pivot == "" and "different pivots" in report.notes[0]


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

def narrow(text: str) -> bool:
    return max(map(len, text.splitlines())) <= 100


def test_compare_prints_words_and_json(run, merges, family):
    status, out, err = run("compare", *merges)
    assert (status, err) == (0, "") and narrow(out)
    assert "granularity" in out and "farthest apart" in out and "weights that differ" in out and "cosine" in out
    report = json.loads(run("compare", *merges, "--json")[1])
    assert report["models"] == ["one", "two"] and report["total"]["distance"] > 0
    assert "hold the same numbers" in run("compare", merges[0], merges[0])[1]


def test_compare_takes_recipe_files_too(run, merges, family):
    status, out, _ = run("compare", merges[0] / "fusechat_recipe.yaml", merges[1])
    assert status == 0 and narrow(out) and "granularity" in out and "farthest" not in out
    found = json.loads(run("compare", merges[0] / "fusechat_recipe.yaml", merges[1], "--json")[1])["recipe"]
    assert {"setting": "granularity", "first": "layer", "second": "matrix"} in found
    assert "say the same" in run("compare", merges[0] / "fusechat_recipe.yaml", merges[0])[1]
    status, out, err = run("compare", merges[0] / "fusechat_recipe.yaml", family("llama")[0])
    assert (status, out) == (2, "") and "no recipe in this folder" in err


@pytest.mark.parametrize("granularity", ["model", "layer", "module", "matrix"])
def test_inspect_prints_a_narrow_table_and_the_library_s_json(run, family, granularity):
    pivot, *targets = family("llama")
    status, out, err = run("inspect", pivot, *targets, "--granularity", granularity)
    assert (status, err) == (0, "") and narrow(out) and "conflict" in out and ("rank 1" in out) == (granularity == "matrix")
    report = json.loads(run("inspect", pivot, *targets, "--granularity", granularity, "--no-rank", "--json")[1])
    known = finish(inspect(Checkpoint(pivot), [Checkpoint(target) for target in targets], spectral=False))
    assert report == json.loads(json.dumps(known.to_dict(granularity)))


@pytest.mark.parametrize(("by", "key"), [("conflict", lambda row: -row["conflict"]), ("cosine", lambda row: row["cosine"]),
                                         ("change", lambda row: -max(its["relative"] for its in row["targets"].values())),
                                         ("lost", lambda row: -row["mean_lost"])])
def test_inspect_sorts_the_most_striking_first(run, family, by, key):
    rows = json.loads(run("inspect", *family("llama"), "--sort", by, "--no-rank", "--json")[1])["units"]
    assert [key(row) for row in rows] == sorted(map(key, rows)) and len(rows) > 10


def test_inspect_writes_csv_with_a_column_for_every_number(run, family):
    status, out, err = run("inspect", *family("llama"), "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (status, err) == (0, "") and len(rows) == 21 and rows[0]["unit"]
    assert float(rows[0]["relative target-b"]) > 0 and float(rows[0]["cosine target-a · target-b"]) <= 1
    assert "stable_rank target-a" in rows[0]


def test_inspect_previews_with_error_bars(run, family):
    status, out, _ = run("inspect", *family("llama"), "--preview", "--granularity", "layer")
    assert status == 0 and narrow(out) and "±" in out and "100.00%" in out
    report = json.loads(run("inspect", *family("llama"), "--preview", "--json")[1])
    assert report["exact"] and {"ratio", "error", "sampled"} <= report["tensors"][0].keys()
    head = run("inspect", *family("llama"), "--preview", "--csv")[1].splitlines()[0]
    assert head == "tensor,unit,target,variation,ratio,error,sampled"


def test_many_targets_and_long_names_stay_within_100_columns(run, tmp_path):
    random, name = np.random.default_rng(0), f"model.layers.0.{'very_' * 12}long_name.weight"
    folders = [save_checkpoint(tmp_path / f"model-with-quite-a-long-name-{i}",
                               {name: random.normal(size=(4, 4)).astype(np.float32)}) for i in range(7)]
    for argv in (["inspect", *folders], ["inspect", *folders[:5]], ["inspect", *folders[:4], "--preview"],
                 ["compare", *folders[:2]]):
        status, out, _ = run(*argv)
        assert status == 0 and narrow(out) and ("…" in out or argv[0] == "compare") and "name.weight" in out


@pytest.mark.parametrize(("more", "words"), [
    (("--sort", "conflicts"), "Did you mean 'conflict'?"), (("--granularity", "matrx"), "Did you mean 'matrix'?"),
    (("--granularity", "parameter"), "unknown granularity 'parameter'")])
def test_inspect_refuses_unknown_names_before_it_reads(run, family, monkeypatch, more, words):
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    status, out, err = run("inspect", *family("llama"), *more)
    assert (status, out) == (2, "") and words in err


@pytest.mark.parametrize("argv", [["inspect", "{0}", "{1}", "{2}"], ["inspect", "{0}", "{1}", "--preview"],
                                  ["compare", "{0}", "{1}"],
                                  ["review", "{1}", "--parents", "{0}", "{2}", "--no-smoke"]], ids=lambda argv: argv[0])
def test_looking_at_weights_loads_neither_torch_nor_transformers(tmp_path, argv):
    folders = saved(tmp_path, {Q0: np.ones((2, 2))}, {Q0: np.zeros((2, 2))}, {Q0: np.eye(2)})
    script = ("import sys; from fusion.__main__ import main; status = main(sys.argv[1:])\n"
              "heavy = {'torch', 'transformers', 'gradio', 'pandas'} & set(sys.modules)\n"
              "assert status == 0 and not heavy, (status, heavy)")
    done = subprocess.run([sys.executable, "-c", script, *(word.format(*folders) for word in argv)], cwd=ROOT, capture_output=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr.decode()
