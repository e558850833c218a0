"""fusion.merge stopped: bad input is refused before any work, and whatever stops a merge leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from fusion.errors import CheckpointError, FusionError, OutputError, RecipeError, ResourceError
from fusion.merge import merge
from fusion.progress import finish
from fusion.recipe import Override, Recipe
from tests.conftest import save_checkpoint, snapshot

UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
TENSORS = {UP: np.ones((4, 4), np.float32), HEAD: np.ones((2, 4), np.float32)}


@pytest.fixture
def folders(tmp_path):
    return [save_checkpoint(tmp_path / name, {key: value * i for key, value in TENSORS.items()}, shards=2)
            for i, name in enumerate(("pivot", "a", "b"))]


def stopped(folders: list[Path], kind: type[FusionError], words: str, out: str = "new/deep/out", **options) -> None:
    """Merging raises `kind` with `words` in it, and changes nothing beside the models."""
    beside = folders[0].parent
    before = snapshot(beside)
    with pytest.raises(kind) as caught:
        finish(merge(Recipe(folders[0], tuple(folders[1:]), **options), beside / out))
    assert words in str(caught.value)
    assert snapshot(beside) == before


def damage(folder: Path, what: str) -> None:
    shard, index = folder / "model-00002-of-00002.safetensors", folder / "model.safetensors.index.json"
    config = folder / "config.json"
    if what == "missing shard":
        shard.unlink()
    elif what == "truncated shard":
        os.truncate(shard, shard.stat().st_size - 1)
    elif what == "index names a missing file":
        index.write_text(json.dumps({"weight_map": {UP: "gone.safetensors"}}))
    elif what == "index leads out":
        index.write_text(json.dumps({"weight_map": {UP: "../a/model-00001-of-00002.safetensors"}}))
    elif what == "lying offsets":
        shard.write_bytes(re.sub(rb'"data_offsets":\[0,(\d+)\]', rb'"data_offsets":[0,99]', shard.read_bytes()))
    elif what == "quantised":
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}))
    elif what == "no config":
        config.unlink()


@pytest.mark.parametrize("broken", [0, 2])
@pytest.mark.parametrize(("what", "words"), [
    ("missing shard", "which is missing"), ("truncated shard", "cut short"), ("index names a missing file", "gone.safetensors"),
    ("index leads out", "not a plain file name"), ("lying offsets", "the offsets give [0, 99]"), ("quantised", "bitsandbytes"),
    ("no config", "there is no config.json")])
def test_a_broken_checkpoint_is_refused_before_any_work(folders, what, words, broken):
    damage(folders[broken], what)
    stopped(folders, CheckpointError, words)


@pytest.mark.parametrize(("options", "words"), [
    ({"exclude": ("lm_haed*",)}, "no tensor matches 'lm_haed*'. Did you mean 'lm_head.weight'?"),
    ({"overrides": (Override("model.layers.0.mlp.up.weight", {"a": 1}),)}, f"Did you mean '{UP}'?"),
    ({"granularity": "matrices"}, "Did you mean 'matrix'?"), ({"method": "var"}, "Did you mean 'varm'?"),
    ({"dtype": "bfloat61"}, "Did you mean 'bfloat16'?"), ({"donor": "c"}, "donor: unknown 'c'"),
    ({"weights": (1, 2, 3)}, "3 numbers for 2 targets")])
def test_a_recipe_that_does_not_fit_is_refused_before_any_work(folders, monkeypatch, options, words):
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    stopped(folders, RecipeError, words, **options)


def test_no_targets_and_duplicate_targets_are_refused(folders, tmp_path):
    stopped(folders[:1], RecipeError, "targets: there is none")
    stopped([*folders, folders[1]], RecipeError, "is given twice")
    stopped([*folders, Path(f"{folders[1]}/../a")], RecipeError, "twice")


def test_other_shapes_are_refused_before_any_work(folders, tmp_path):
    other = save_checkpoint(tmp_path / "c", {**TENSORS, UP: np.ones((4, 5), np.float32)})
    stopped([*folders, other], FusionError, f"c: {UP} has shape [4, 5], in the pivot it is [4, 4]")


def test_an_output_that_exists_is_never_touched(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("x")
    stopped(folders, OutputError, "exists already", out="out")
    stopped(folders, OutputError, "exists already", out="pivot")


def test_too_small_a_disk_is_refused_or_found_before_merging(folders, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(100, 90, 10))
    stopped(folders, ResourceError, "10 bytes free")
    monkeypatch.undo()

    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    stopped(folders, ResourceError, "the disk is full")


OPTIONS = [{}, {"granularity": "layer"}, {"granularity": "parameter"}, {"exclude": ("*",)},
           {"method": "ties"}, {"method": "sce"}, {"method": "task_arithmetic", "weights": (1, 0)}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("broken", ["pivot", "b"])
def test_nan_and_inf_are_refused_by_name_and_leave_nothing(tmp_path, recwarn, options, broken):
    for value in (np.nan, np.inf):
        root = tmp_path / str(value)
        sick = {**TENSORS, UP: np.where(np.eye(4) > 0, value, 1).astype(np.float32)}
        folders = [save_checkpoint(root / name, sick if name == broken else TENSORS) for name in ("pivot", "a", "b")]
        stopped(folders, CheckpointError, f"{broken}: {UP} holds 4 values that are NaN or Inf", **options)
        result = finish(merge(Recipe(folders[0], tuple(folders[1:]), allow_nonfinite=True, **options), root / "out"))
        if result.variation is not None:
            assert json.dumps(json.loads((result.folder / "fusechat_variation.json").read_text()), allow_nan=False)
    assert not recwarn


@pytest.mark.parametrize("options", [{"method": "linear"}, {"method": "linear", "weights": (1, 0)}])
def test_a_method_that_does_not_read_the_pivot_minds_only_the_targets(tmp_path, options):
    sick = {**TENSORS, UP: np.where(np.eye(4) > 0, np.inf, 1).astype(np.float32)}
    pivot, a, b, c = [save_checkpoint(tmp_path / name, sick if name in "pivot c" else TENSORS) for name in ("pivot", "a", "b", "c")]
    assert finish(merge(Recipe(pivot, (a, b), **options), tmp_path / "out")).finite
    stopped([pivot, a, c], CheckpointError, f"c: {UP} holds 4 values that are NaN or Inf", **options)


def test_inf_is_refused_even_where_the_result_would_be_finite(tmp_path):
    sick = {**TENSORS, UP: np.full((4, 4), np.inf, np.float32)}
    folders = [save_checkpoint(tmp_path / name, tensors) for name, tensors in (("pivot", TENSORS), ("a", sick))]
    stopped(folders, CheckpointError, f"a: {UP} holds 16 values that are NaN or Inf", method="nearswap")
    recipe = Recipe(folders[0], (folders[1],), method="nearswap", allow_nonfinite=True)
    assert finish(merge(recipe, tmp_path / "out")).finite


def test_numbers_beyond_the_stored_dtype_are_refused_in_words(tmp_path):
    folders = [save_checkpoint(tmp_path / name, {UP: np.full(4, 1e6, np.float32)}) for name in ("pivot", "a")]
    stopped(folders, CheckpointError, f"{UP} becomes NaN or Inf when merged. Store the result as float32", dtype="float16")


# ── stopped midway ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def deep(tmp_path):
    """Models of many tensors, so that a merge can be stopped between them."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(40)]
    return [save_checkpoint(tmp_path / folder, {name: np.full((50, 50), i, np.float32) for name in names})
            for i, folder in enumerate(("pivot", "a", "b"))]


@pytest.mark.parametrize("granularity", ["matrix", "model"])
@pytest.mark.parametrize("steps", [0, 1, 2, 20, 42, 60])
def test_closing_it_at_any_step_leaves_nothing(deep, tmp_path, steps, granularity):
    before, files, threads = snapshot(tmp_path), len(os.listdir("/proc/self/fd")), threading.active_count()
    work = merge(Recipe(deep[0], tuple(deep[1:]), granularity=granularity), tmp_path / "new/out")
    for _ in range(min(steps, 40 if granularity == "matrix" else 80)):
        next(work)
    work.close()
    assert snapshot(tmp_path) == before
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


def test_while_it_works_the_folder_is_hidden(deep, tmp_path):
    work = merge(Recipe(deep[0], tuple(deep[1:])), tmp_path / "out")
    for _ in range(5):
        next(work)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.partial-")]
    work.close()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize("place", ["model_card", "side_files", "sum_tensor"])
def test_any_error_midway_leaves_nothing(deep, tmp_path, monkeypatch, place, error):
    def fail(*_, **__):
        raise error

    before = snapshot(tmp_path)
    monkeypatch.setattr(sys.modules["fusion.merge"], place, fail)
    with pytest.raises(type(error)):
        finish(merge(Recipe(deep[0], tuple(deep[1:])), tmp_path / "new/out"))
    assert snapshot(tmp_path) == before


def test_a_model_that_shrinks_midway_leaves_nothing(deep, tmp_path):
    work = merge(Recipe(deep[0], tuple(deep[1:])), tmp_path / "new/out")
    next(work)
    os.truncate(deep[2] / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file became shorter"):
        finish(work)
    assert not (tmp_path / "new").exists()


def test_two_merges_at_once_do_not_disturb_each_other(deep, tmp_path):
    def run(name: str) -> None:
        finish(merge(Recipe(deep[0], tuple(deep[1:])), tmp_path / "new" / name))

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    results = [snapshot(tmp_path / "new" / name) for name in "abc"]
    assert results[0] == results[1] == results[2] and "README.md" in results[0]


def test_progress_counts_up_to_the_end(deep, tmp_path):
    for granularity in ("matrix", "layer"):
        shown = []
        finish(merge(Recipe(deep[0], tuple(deep[1:]), granularity=granularity), tmp_path / granularity), shown.append)
        stages = list(dict.fromkeys(progress.stage for progress in shown))
        wanted = ["Merging"] if granularity == "matrix" else ["Measuring variation", "Merging"]
        assert stages == [*wanted, "Reading weights"]
        for stage in wanted:
            assert [progress.done for progress in shown if progress.stage == stage] == list(range(41))
            last = [progress for progress in shown if progress.stage == stage][-1]
            assert last.fraction == 1 and last.bytes_done == last.bytes_total
