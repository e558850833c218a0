"""fusion.verify: a folder is what its recipe makes, or it is said what is not."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, FusionError, RecipeError, ResourceError
from fusion.merge import RECIPE_FILE, merge
from fusion.plan import MergePlan
from fusion.progress import finish
from fusion.recipe import Curve, Recipe, Slice
from fusion.stages import merge_stages
from fusion.verify import Verdict, verify
from fusion.version import VERSION
from tests.conftest import save_checkpoint, snapshot

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"


@pytest.fixture
def models(tmp_path) -> dict[str, str]:
    """A pivot and two targets of two layers, made of random numbers."""
    random = np.random.default_rng(5)
    base = {name: random.normal(size=(6, 8)).astype(np.float32) for name in (UP, DOWN, HEAD)}
    moved = {name: {tensor: value + random.normal(size=value.shape, scale=.1).astype(np.float32) for tensor, value in base.items()}
             for name in "ab"}
    config = {"num_hidden_layers": 2}
    return {name: str(save_checkpoint(tmp_path / name, tensors, "bfloat16", config))
            for name, tensors in {"pivot": base, **moved}.items()}


@pytest.fixture
def merged(models, tmp_path) -> Path:
    """A DARE-TIES merge, which draws random numbers."""
    recipe = Recipe(models["pivot"], (models["a"], models["b"]), method="dare_ties", options={"density": .5}, seed=7)
    return finish(merge(recipe, tmp_path / "out")).folder


def verdict_of(folder: Path) -> Verdict:
    return finish(verify(folder))


def rewrite(folder: Path, change) -> None:
    """Write the weights of a folder anew after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# ── what is equal ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("settings", [
    {}, {"granularity": "layer"}, {"granularity": "parameter", "measure": "absolute"}, {"rule": "softmax", "dtype": "float32"},
    {"method": "linear", "weights": (.3, "variation"), "exclude": ("lm_head*",)},
    {"method": "slerp", "options": {"t": Curve((0, 1))}}, {"method": "sce", "options": {"select_topk": .5}},
    {"method": "della", "options": {"density": (.5, Curve((.3, .7)))}, "seed": 3},
    {"method": "passthrough", "slices": (Slice({"a": (0, 2)}), Slice({"b": (1, 2)}))}], ids=str)
def test_every_merge_is_what_its_recipe_makes(models, tmp_path, settings):
    result = finish(merge(Recipe(models["pivot"], (models["a"], models["b"]), **settings), tmp_path / "out"))
    before = snapshot(tmp_path)
    verdict = verdict_of(result.folder)
    assert verdict.equal and verdict.findings == [] and verdict.again == result.recipe.result["digest"]
    assert (verdict.engine, verdict.ours) == (VERSION, VERSION)
    assert snapshot(tmp_path) == before


def test_a_merge_of_several_stages_is_run_again_stage_by_stage(models, tmp_path):
    stages = (Recipe(models["pivot"], (models["a"], models["b"]), method="linear", name="mean"),
              Recipe(models["pivot"], (models["a"],), method="nearswap", options={"t": .05}, name="near"),
              Recipe("mean", ("near", models["b"]), method="ties", options={"density": .5}))
    folder = finish(merge_stages(stages, tmp_path / "out")).folder
    before = snapshot(tmp_path)
    assert verdict_of(folder).findings == [] and snapshot(tmp_path) == before
    rewrite(Path(models["a"]), lambda tensors: tensors[UP].add_(1))
    verdict = verdict_of(folder)
    assert verdict.changed == ("mean: a", "near: a", "pivot", "near") and set(verdict.differing) == {UP} and not verdict.equal


def test_shards_do_not_matter(merged, tmp_path):
    again = finish(merge(Recipe.load(merged / RECIPE_FILE), tmp_path / "sharded", max_shard_bytes=128)).folder
    assert len(list(again.glob("*.safetensors"))) == 3
    assert verdict_of(again).equal


def test_relative_paths_start_at_the_working_directory(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish(merge(Recipe("pivot", ("a", "b")), "out"))
    assert verdict_of(Path("out")).equal


def test_a_result_that_would_not_fit_into_memory_can_be_verified(merged, monkeypatch):
    recipe = Recipe.load(merged / RECIPE_FILE)
    needed = MergePlan.open(recipe, in_memory=False).report.peak_memory_bytes
    monkeypatch.setattr(importlib.import_module("fusion.preflight"), "available_memory_bytes", lambda: needed)
    with pytest.raises(ResourceError):
        MergePlan.open(recipe)
    assert verdict_of(merged).equal


# ── what is not ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_one_changed_bit_is_found_in_its_tensor(merged):
    file = merged / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    last = max(Checkpoint(merged).info.values(), key=lambda info: info.start)
    name = next(name for name, info in Checkpoint(merged).info.items() if info == last)
    verdict = verdict_of(merged)
    assert not verdict.equal and verdict.differing == {name: "differs"} and not verdict.changed and not verdict.files
    assert verdict.recorded == verdict.again != verdict.stored
    assert verdict.findings == [f"{name} differs", f"the recipe records the digest {verdict.recorded}, the weights in the folder "
                                                   f"have {verdict.stored}"]


def test_tensors_that_are_missing_or_too_many_are_named(merged):
    def change(tensors):
        tensors["model.layers.0.mlp.gate_proj.weight"] = tensors.pop(UP)

    rewrite(merged, change)
    assert verdict_of(merged).differing == {UP: "is missing in the folder",
                                            "model.layers.0.mlp.gate_proj.weight": "is in the folder, but not in the merge"}


def test_a_model_that_changed_is_named(merged, models):
    rewrite(Path(models["b"]), lambda tensors: tensors[DOWN].mul_(2))
    verdict = verdict_of(merged)
    assert verdict.changed == ("b",) and set(verdict.differing) == {DOWN} and verdict.recorded == verdict.stored != verdict.again
    assert verdict.findings[0] == "b has other weights than the merge was made of"


def test_a_model_that_changed_is_named_even_where_it_does_not_count(models, tmp_path):
    folder = finish(merge(Recipe(models["pivot"], (models["a"], models["b"]), method="linear"), tmp_path / "out")).folder
    rewrite(Path(models["pivot"]), lambda tensors: tensors[DOWN].mul_(2))
    verdict = verdict_of(folder)
    assert verdict.changed == ("pivot",) and not verdict.differing and verdict.stored == verdict.again and not verdict.equal


@pytest.mark.parametrize(("old", "new"), [
    ("seed: 7", "seed: 8"), ("density: 0.5", "density: 0.4"), ("rescale: true", "rescale: false")])
def test_another_recipe_does_not_make_the_same(merged, old, new):
    recipe = merged / RECIPE_FILE
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new))
    verdict = verdict_of(merged)
    assert verdict.recorded == verdict.stored != verdict.again and verdict.differing and not verdict.equal


def test_a_digest_that_was_written_over_is_found(merged):
    recipe = merged / RECIPE_FILE
    recipe.write_text(re.sub(r"(result:\n.*\n  digest: fc1:)\w{4}", r"\g<1>0000", recipe.read_text()))
    verdict = verdict_of(merged)
    assert verdict.stored == verdict.again != verdict.recorded and not verdict.equal and not verdict.differing


def test_a_small_file_that_was_changed_is_named(merged):
    config = merged / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 2', '"vocab_size": 3'))
    verdict = verdict_of(merged)
    assert verdict.files == ("config.json",) and verdict.recorded == verdict.stored == verdict.again and not verdict.equal
    assert verdict.findings == ["config.json is not the file that the recipe makes"]


def test_another_engine_is_said(merged, capsys):
    recipe = merged / RECIPE_FILE
    recipe.write_text(recipe.read_text().replace(f"engine: {VERSION}", "engine: 0.0.1"))
    assert main(["verify", str(merged)]) == 0
    assert f"(it was made by engine 0.0.1 and run again by {VERSION})" in capsys.readouterr().out


# ── what cannot be verified ──────────────────────────────────────────────────────────────────────────────────────────

def test_what_is_no_merge_is_refused(models, merged, tmp_path):
    for folder, kind, said in ((tmp_path / "gone", CheckpointError, "there is no such folder"),
                               (models["pivot"], RecipeError, f"there is no {RECIPE_FILE}. Only a folder made by `merge`")):
        with pytest.raises(kind, match=re.escape(said)):
            verdict_of(Path(folder))
    recipe = Recipe.load(merged / RECIPE_FILE)
    for change in ({"result": {}}, {"result": {"engine": VERSION}}, {"revisions": {}}, {"revisions": {"pivot": "fc1:0"}}):
        (merged / RECIPE_FILE).write_text(recipe.with_(**change).to_yaml())
        with pytest.raises(RecipeError, match="does not record the digests of its models and of its result"):
            verdict_of(merged)


def test_a_model_that_is_gone_is_an_error(merged, models, tmp_path):
    Path(models["a"]).rename(tmp_path / "elsewhere")
    with pytest.raises(FusionError, match="/a"):
        verdict_of(merged)


def test_closing_leaves_no_file_and_none_open(models, tmp_path):
    stages = (Recipe(models["pivot"], (models["a"],), method="linear", name="one"), Recipe("one", (models["b"],), method="ties"))
    folder = finish(merge_stages(stages, tmp_path / "out")).folder
    before, files = snapshot(tmp_path), len(os.listdir("/proc/self/fd"))
    for steps in range(0, 30, 3):
        work = verify(folder)
        for _ in zip(range(steps), work, strict=False):
            pass
        work.close()
        assert snapshot(tmp_path) == before and len(os.listdir("/proc/self/fd")) == files


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_command_is_0_only_when_equal(merged, models, capsys):
    assert main(["verify", str(merged)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{merged} is what its recipe makes, to the byte: fc1:") and err == ""
    rewrite(Path(models["a"]), lambda tensors: tensors[HEAD].zero_())
    assert main(["verify", str(merged)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {merged}: this is not what its recipe makes\na has other weights than the")
    assert f"\n{HEAD} differs\n" in err


def test_the_command_prints_one_document(merged, capsys):
    assert main(["verify", str(merged), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is True and found["recorded"] == found["stored"] == found["again"] and found["findings"] == []
    rewrite(merged, lambda tensors: tensors[UP].zero_())
    assert main(["verify", str(merged), "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["differing"] == {UP: "differs"} and err.startswith("error: ")
