"""fusion.merge over several stages, over killed and disturbed runs, and what it records of its inputs and its result."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

import fusion
from fusion.checkpoint import Checkpoint
from fusion.digest import digest_checkpoint
from fusion.errors import CheckpointError, FusionError, OutputError, RecipeError, ResourceError
from fusion.live import LiveMerge
from fusion.merge import RECIPE_FILE, merge
from fusion.plan import MergePlan
from fusion.progress import finish
from fusion.recipe import Recipe, Slice, load_stages
from fusion.stages import merge_stages
from tests.conftest import load_tensors, save_checkpoint, snapshot

UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]


@pytest.fixture
def models(tmp_path):
    """pivot 0, a 4, b 8, c 16: one number everywhere, in twelve layers."""
    return {name: str(save_checkpoint(tmp_path / name, {layer: np.full((40, 50), value, np.float32) for layer in NAMES}))
            for name, value in (("pivot", 0), ("a", 4), ("b", 8), ("c", 16))}


def two_stages(models) -> tuple[Recipe, Recipe]:
    """(a + b) / 2, then a quarter of the way from there to c."""
    return (Recipe(models["pivot"], (models["a"], models["b"]), method="linear", name="mean", dtype="float32"),
            Recipe("mean", (models["c"],), method="slerp", options={"t": .25}))


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_later_stage_merges_the_result_of_an_earlier_one(models, tmp_path):
    before = snapshot(tmp_path)
    result = finish(merge_stages(two_stages(models), tmp_path / "out"))
    assert all(value.unique().tolist() == [6 + .25 * (16 - 6)] for value in load_tensors(result.folder).values())
    assert snapshot(tmp_path).keys() - before.keys() == {"out", *(f"out/{path.name}" for path in result.folder.iterdir())}


def test_the_recipe_of_all_stages_is_kept_and_runs_again(models, tmp_path):
    finish(merge_stages(two_stages(models), tmp_path / "out"))
    stages = load_stages(tmp_path / "out" / RECIPE_FILE)
    assert [stage.name for stage in stages] == ["mean", ""] and stages[1].pivot == "mean"
    assert stages[1].revisions["pivot"] == stages[0].result["digest"]
    finish(merge_stages(stages, tmp_path / "again"))
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "out")


def test_an_earlier_stage_may_be_pivot_and_target_of_later_ones(models, tmp_path):
    first, _ = two_stages(models)
    last = Recipe("mean", ("mean", models["c"]), names=("mean", "c"), method="linear", weights=(3, 1))
    result = finish(merge_stages((first, last), tmp_path / "out"))
    assert load_tensors(result.folder)[UP].unique().tolist() == [6 * .75 + 16 * .25]


@pytest.mark.parametrize("steps", [0, 1, 8, 14, 20, 30, 40])
def test_closing_any_stage_leaves_nothing(models, tmp_path, steps):
    before, work = snapshot(tmp_path), merge_stages(two_stages(models), tmp_path / "new/out")
    for _ in range(steps):
        next(work)
    work.close()
    assert snapshot(tmp_path) == before


def test_a_mistake_in_the_last_stage_leaves_nothing_of_the_first(models, tmp_path):
    first, last = two_stages(models)
    before = snapshot(tmp_path)
    with pytest.raises(RecipeError, match="no tensor matches"):
        finish(merge_stages((first, last.with_(exclude=("nothing",))), tmp_path / "out"))
    assert snapshot(tmp_path) == before


def test_an_output_that_exists_is_found_before_the_first_stage_runs(models, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sys.modules["fusion.merge"], "compute", lambda *_: pytest.fail("it was merged"))
    with pytest.raises(OutputError, match="exists already"):
        finish(merge_stages(two_stages(models), tmp_path / "out"))


def test_what_a_killed_run_left_is_removed_by_the_next(models, tmp_path):
    before, work = snapshot(tmp_path), merge_stages(two_stages(models), tmp_path / "out", resume=True)
    while next(work).stage != "Merging" or not (tmp_path / ".out.stages/1").is_dir():
        pass
    work.close()  # with `resume` it leaves what a kill leaves
    assert (tmp_path / ".out.stages/1/model.safetensors").is_file()
    finish(merge_stages(two_stages(models), tmp_path / "out"))
    left = {name for name in snapshot(tmp_path).keys() - before.keys() if not name.startswith("out")}
    assert not {name for name in left if ".stages" in name}


def test_a_finished_stage_is_used_again_when_resumed(models, tmp_path, monkeypatch):
    stages = two_stages(models)
    wanted = finish(merge_stages(stages, tmp_path / "whole"))
    work = merge_stages(stages, tmp_path / "out", resume=True)
    while next(work).stage != "Merging" or not (tmp_path / ".out.stages/1.plan").is_file():
        pass
    work.close()
    merged = []
    monkeypatch.setattr(sys.modules["fusion.stages"], "merge", lambda recipe, *rest, **how: merged.append(recipe.name) or
                        merge(recipe, *rest, **how))
    finish(merge_stages(stages, tmp_path / "out", resume=True))
    assert merged == [""] and snapshot(tmp_path / "out") == snapshot(wanted.folder)
    assert not (tmp_path / ".out.stages").exists()


def test_a_stage_of_models_that_changed_is_merged_again_when_resumed(models, tmp_path):
    stages = two_stages(models)
    work = merge_stages(stages, tmp_path / "out", resume=True)
    while not (tmp_path / ".out.stages/1.plan").is_file():
        next(work)
    next(work)
    work.close()
    changed = {name: np.full((40, 50), 12, np.float32) for name in NAMES}
    (tmp_path / "a").rename(tmp_path / "old")
    save_checkpoint(tmp_path / "a", changed)
    for partial in tmp_path.glob(".out.journal"):
        partial.unlink()
    result = finish(merge_stages(stages, tmp_path / "out", resume=True))
    assert load_tensors(result.folder)[UP].unique().tolist() == [10 + .25 * 6]


def test_two_runs_into_one_folder_are_told_apart(models, tmp_path):
    work = merge_stages(two_stages(models), tmp_path / "out")
    next(work)
    with pytest.raises(OutputError, match="another merge is writing there"):
        finish(merge_stages(two_stages(models), tmp_path / "out"))
    finish(work)
    assert load_tensors(tmp_path / "out")[UP].unique().tolist() == [8.5]


def test_a_folder_that_is_not_ours_is_never_touched(models, tmp_path):
    (tmp_path / ".out.stages").mkdir()
    (tmp_path / ".out.stages/precious.txt").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="no folder of a merge"):
        finish(merge_stages(two_stages(models), tmp_path / "out"))
    assert snapshot(tmp_path) == before


# ── what is recorded ─────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("settings", [{}, {"granularity": "model"}, {"granularity": "parameter"}, {"method": "linear"},
                                      {"method": "ties"}, {"exclude": ("*.1.*",)}], ids=str)
def test_content_digests_of_inputs_and_result_are_recorded(models, tmp_path, settings):
    result = finish(merge(Recipe(models["pivot"], (models["a"], models["b"]), **settings), tmp_path / "out"))
    recorded = Recipe.load(result.folder / RECIPE_FILE)
    digests = {label: finish(digest_checkpoint(Checkpoint(models[label]))) for label in ("pivot", "a", "b")}
    assert recorded.revisions == digests and len(set(digests.values())) == 3
    assert recorded.result == {"engine": fusion.__version__, "digest": finish(digest_checkpoint(Checkpoint(result.folder)))}
    assert recorded.result["digest"] in (result.folder / "README.md").read_text()


def test_other_weights_than_the_recipe_was_run_on_are_refused(models, tmp_path):
    recipe = finish(merge(Recipe(models["pivot"], (models["a"],)), tmp_path / "out")).recipe
    before = snapshot(tmp_path)
    with pytest.raises(RecipeError, match="a: this is not the checkpoint the recipe was run on"):
        finish(merge(recipe.with_(targets=(models["b"],)), tmp_path / "other"))
    assert snapshot(tmp_path) == before


def test_nothing_measured_means_no_report_and_no_weights_means_no_table(models, tmp_path):
    linear = finish(merge(Recipe(models["pivot"], (models["a"], models["b"]), method="linear"), tmp_path / "linear"))
    sce = finish(merge(Recipe(models["pivot"], (models["a"], models["b"]), method="sce"), tmp_path / "sce"))
    assert linear.variation is None and not (linear.folder / "fusechat_variation.json").exists()
    assert linear.weights.tolist() == [[.5, .5]] * 12 and sce.weights.shape == (12, 0)
    assert "## Merge weights" in (linear.folder / "README.md").read_text()
    card = (sce.folder / "README.md").read_text()
    assert "## Merge weights" not in card and "without weights" in card and "fusechat_variation" not in card


def test_the_facts_of_a_merge_come_with_its_result(models, tmp_path):
    result = finish(merge(Recipe(models["pivot"], (models["a"],), method="passthrough",
                                 slices=(Slice({"a": (0, 12)}), Slice({"a": (0, 6)}))), tmp_path / "out"))
    assert (result.parameters, result.tensors, result.finite) == ((12 * 2000, 18 * 2000), 18, True)


def test_allowed_numbers_that_are_not_finite_are_counted_as_such(models, tmp_path):
    sick = save_checkpoint(tmp_path / "sick", {layer: np.full((40, 50), np.inf, np.float32) for layer in NAMES})
    result = finish(merge(Recipe(models["pivot"], (str(sick),), method="linear", allow_nonfinite=True), tmp_path / "out"))
    assert not result.finite


# ── disturbed ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("method", ["varm", "linear", "ties"])
def test_a_source_that_is_changed_meanwhile_is_found_by_name(models, tmp_path, method):
    file = tmp_path / "a/model.safetensors"
    before = snapshot(tmp_path)
    work = merge(Recipe(models["pivot"], (models["a"], models["b"]), method=method), tmp_path / "new/out")
    [next(work) for _ in range(5)]
    os.utime(file)
    with pytest.raises(CheckpointError, match=r"a: .*a/model\.safetensors was changed while it was merged"):
        finish(work)
    assert snapshot(tmp_path) == before


def test_a_source_that_goes_away_meanwhile_is_an_error_for_people(models, tmp_path):
    work = merge(Recipe(models["pivot"], (models["a"], models["b"])), tmp_path / "new/out")
    [next(work) for _ in range(5)]
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(FusionError, match="went away"):
        finish(work)
    assert not (tmp_path / "new").exists()


def test_a_merge_that_memory_cannot_hold_is_refused_before_any_work(models, tmp_path, monkeypatch):
    recipe = Recipe(models["pivot"], (models["a"],))
    needed = MergePlan.open(recipe, tmp_path / "out").report.peak_memory_bytes
    monkeypatch.setattr(sys.modules["fusion.preflight"], "available_memory_bytes", lambda: needed)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ResourceError, match="of memory"):
        finish(LiveMerge().update(recipe))
    monkeypatch.setattr(sys.modules["fusion.preflight"], "available_memory_bytes", lambda: needed - 1)
    before = snapshot(tmp_path)
    with pytest.raises(ResourceError, match="of memory"):
        finish(merge(recipe, tmp_path / "out"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("settings", [{}, {"granularity": "layer"}, {"method": "dare_linear", "options": {"density": .5}},
                                      {"method": "model_stock"}], ids=str)
def test_a_resumed_merge_is_the_merge_that_was_never_stopped(models, tmp_path, settings):
    recipe = Recipe(models["pivot"], (models["a"], models["b"]), **settings)
    wanted = finish(merge(recipe, tmp_path / "whole", max_shard_bytes=10_000))
    work = merge(recipe, tmp_path / "out", max_shard_bytes=10_000, resume=True)
    while next(work).stage != "Merging" or next(work).done < 5:
        pass
    work.close()
    assert not (tmp_path / "out").exists()
    shown = []
    known = wanted.variation  # must not be mixed with what the stopped run measured
    result = finish(merge(recipe, tmp_path / "out", variation=known, max_shard_bytes=10_000, resume=True), shown.append)
    assert next(progress for progress in shown if progress.stage == "Merging").done > 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole") and np.array_equal(result.weights, wanted.weights)


def test_the_pivot_may_be_averaged_too(models, tmp_path):
    recipe = Recipe(models["pivot"], (models["pivot"], models["a"]), ("base", "a"), method="linear", weights=(1, 3))
    result = finish(merge(recipe, tmp_path / "out"))
    assert load_tensors(result.folder)[UP].unique().tolist() == [3]
    assert torch.equal(load_tensors(result.folder)[UP], load_tensors(tmp_path / "a")[UP] * .75)
