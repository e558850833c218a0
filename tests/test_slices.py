"""fusion.slices: which layer of which model stands where, in numbers small enough to check by eye."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from fusion.anatomy import main_stack
from fusion.checkpoint import Checkpoint
from fusion.digest import digest_checkpoint
from fusion.errors import MismatchError, RecipeError
from fusion.live import LiveMerge, chat_model, state_dict
from fusion.merge import merge
from fusion.plan import MergePlan
from fusion.progress import finish
from fusion.recipe import Override, Recipe, Slice
from fusion.slices import restack
from tests.conftest import load_tensors, save_checkpoint, save_family, snapshot

EMBED, FINAL, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def up(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def model(folder, base: float, layers: int, **config):
    """Layer i holds base + i, the embedding base + .25, the final norm base + .5, the head base + .75."""
    values = {EMBED: .25, **{up(i): float(i) for i in range(layers)}, FINAL: .5, HEAD: .75}
    kinds = [f"{folder.name}{i}" for i in range(layers)]
    return save_checkpoint(folder, {name: np.full((2, 2), base + value, np.float32) for name, value in values.items()},
                           config={"num_hidden_layers": layers, "layer_types": kinds, **config})


@pytest.fixture
def three(tmp_path):
    """pivot: 0 …, a: 100 …, b: 200 …; 4, 4 and 6 layers."""
    return [model(tmp_path / name, base, layers) for name, base, layers in (("pivot", 0, 4), ("a", 100, 4), ("b", 200, 6))]


def merged(folders, out, slices, **settings) -> dict[str, float]:
    """Tensor → the one number in it, after merging the targets that the slices name."""
    used = [folder for folder in folders[1:] if any(folder.name in ranges for ranges in slices)]
    recipe = Recipe(folders[0], tuple(used), slices=tuple(map(Slice, slices)), **settings)
    tensors = load_tensors(finish(merge(recipe, out)).folder)
    assert all(value.unique().numel() == 1 for value in tensors.values())
    return {name: value[0, 0].item() for name, value in tensors.items()}


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_passthrough_stacks_layers_of_several_models(three, tmp_path):
    got = merged(three, tmp_path / "out", [{"a": (0, 2)}, {"b": (1, 4)}, {"pivot": (3, 4)}], method="passthrough")
    assert got == {EMBED: 100.25, up(0): 100, up(1): 101, up(2): 201, up(3): 202, up(4): 203, up(5): 3, FINAL: .5, HEAD: .75}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 6 and config["layer_types"] == ["a0", "a1", "b1", "b2", "b3", "pivot3"]


def test_a_layer_may_come_twice(three, tmp_path):
    got = merged(three[:2], tmp_path / "out", [{"a": (0, 3)}, {"a": (1, 4)}], method="passthrough")
    assert [got[up(i)] for i in range(6)] == [100, 101, 102, 101, 102, 103] and (got[EMBED], got[HEAD]) == (100.25, 100.75)


def test_slices_are_averaged_where_they_name_several(three, tmp_path):
    got = merged(three, tmp_path / "out", [{"a": (0, 2), "b": (4, 6)}, {"a": (3, 4)}], method="linear", weights=(1, 3))
    assert [got[up(i)] for i in range(3)] == [.25 * 100 + .75 * 204, .25 * 101 + .75 * 205, 103]
    assert got[EMBED] == .25 * 100.25 + .75 * 200.25 and (got[FINAL], got[HEAD]) == (100.5, 100.75)


def test_task_vectors_start_from_the_pivot_layer_that_the_slice_names(three, tmp_path):
    got = merged(three, tmp_path / "out", [{"pivot": (2, 4), "a": (0, 2), "b": (0, 2)}], method="task_arithmetic",
                 weights=(.5, .25))
    assert [got[up(i)] for i in range(2)] == [2 + .5 * 98 + .25 * 198, 3 + .5 * 98 + .25 * 198]


def test_without_a_pivot_range_the_targets_common_one_is_taken(three, tmp_path):
    got = merged(three, tmp_path / "out", [{"a": (1, 3), "b": (1, 3)}], method="task_arithmetic", weights=(.5, .25))
    assert [got[up(i)] for i in range(2)] == [1 + .5 * 100 + .25 * 200, 2 + .5 * 100 + .25 * 200]


def test_a_slice_of_the_pivot_alone_stays_as_it_is(three, tmp_path):
    got = merged(three, tmp_path / "out", [{"pivot": (0, 1)}, {"pivot": (1, 2), "a": (1, 2), "b": (1, 2)}], method="linear")
    assert (got[EMBED], got[up(0)], got[up(1)], got[HEAD]) == (.25, 0, 151, 150.75)


def test_varm_weighs_by_the_layers_that_the_slice_names(three, tmp_path):
    got = merged(three, tmp_path / "out", [{"pivot": (0, 1), "a": (0, 1), "b": (0, 1)}, {"pivot": (1, 2), "a": (3, 4)}])
    shares = 100 ** 2 / (100 ** 2 + 200 ** 2)
    assert got[up(0)] == pytest.approx(100 * shares + 200 * (1 - shares)) and got[up(1)] == 103
    report = json.loads((tmp_path / "out/fusechat_variation.json").read_text())
    weights = {(row["tensor"], row["target"]): row["weight"] for row in report["tensors"]}
    assert weights[up(1), "a"] == 1 and weights[up(1), "b"] == 0 and weights[up(0), "a"] == pytest.approx(.2)


def test_overrides_and_exclusions_use_the_names_of_the_result(three, tmp_path):
    got = merged(three, tmp_path / "out", [{"a": (0, 2), "b": (0, 2)}, {"a": (0, 2), "b": (0, 2)}], method="linear",
                 overrides=(Override(up(3), {"a": 1}),), exclude=(up(2),))
    assert [got[up(i)] for i in range(4)] == [150, 151, 0, 101]


def test_weights_and_options_of_a_target_stay_its_own(three, tmp_path):
    settings = {"method": "ties", "options": {"density": (0, 1)}, "weights": (7, 2)}
    got = merged(three, tmp_path / "out", [{"b": (0, 2)}, {"a": (2, 4)}], **settings)
    assert [got[up(i)] for i in range(4)] == [200, 201, 2, 3]  # density 1 is b's, density 0 is a's


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt-neox", "mixtral", "qwen2"])
def test_a_model_of_doubled_layers_runs(family, tmp_path, arch):
    pivot, target, _ = family(arch)
    depth = Checkpoint(pivot).layers
    recipe = Recipe(pivot, (target,), method="passthrough", slices=(Slice({"target-a": (0, depth)}), Slice({"pivot": (0, depth)})))
    result = finish(merge(recipe, tmp_path / "out"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    live = chat_model(finish(LiveMerge().update(recipe)), "live").model
    with torch.no_grad():
        ids = torch.arange(3, 23)[None]
        logits = model(ids).logits
        assert logits.isfinite().all() and torch.equal(logits, live(ids).logits)
    assert Checkpoint(result.folder).layers == 2 * depth and result.parameters[1] > result.parameters[0]


@pytest.mark.parametrize("method", ["linear", "varm", "ties", "passthrough"])
def test_memory_and_disk_agree_and_the_recipe_runs_again(tmp_path, method):
    folders = save_family(tmp_path / "models", "llama")
    names = ("target-a",) if method == "passthrough" else ("target-a", "target-b")
    slices = tuple(Slice(dict.fromkeys(names, layers)) for layers in ((0, 2), (0, 1)))
    recipe = Recipe(folders[0], tuple(folders[1:1 + len(names)]), method=method, slices=slices)
    result = finish(merge(recipe, tmp_path / "out"))
    ours, stored = state_dict(finish(LiveMerge().update(recipe))), load_tensors(result.folder)
    assert ours.keys() == stored.keys() and all(torch.equal(ours[name], value) for name, value in stored.items())
    again = finish(merge(Recipe.load(result.folder / "fusechat_recipe.yaml"), tmp_path / "again"))
    assert snapshot(again.folder) == snapshot(result.folder)
    assert "| layers of the result | come from |" in (result.folder / "README.md").read_text()


def test_the_inputs_are_digested_whole_though_only_some_layers_are_read(three, tmp_path):
    merged(three, tmp_path / "out", [{"a": (0, 1)}, {"b": (5, 6)}], method="passthrough")
    recipe = Recipe.load(tmp_path / "out/fusechat_recipe.yaml")
    for label, folder in zip(("pivot", "a", "b"), three, strict=True):
        assert recipe.revisions[label] == finish(digest_checkpoint(Checkpoint(folder)))
    assert recipe.result["digest"] == finish(digest_checkpoint(Checkpoint(tmp_path / "out")))


def test_only_what_a_slice_changes_is_computed_again(three):
    def recipe(*slices):
        return Recipe(three[0], tuple(three[1:]), slices=tuple(map(Slice, slices)), method="passthrough")
    live = LiveMerge()
    assert finish(live.update(recipe({"a": (0, 2)}, {"b": (0, 2)}))).computed == 7
    assert finish(live.update(recipe({"a": (0, 2)}, {"b": (0, 2)}))).computed == 0
    changed = finish(live.update(recipe({"a": (0, 2)}, {"b": (2, 4)})))
    anew = finish(LiveMerge().update(recipe({"a": (0, 2)}, {"b": (2, 4)})))
    assert changed.computed == 2
    assert all(np.array_equal(changed.tensors[name], value) for name, value in anew.tensors.items())


# ── configs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def config_of(folder, slices, **config) -> tuple[dict, tuple[str, ...]]:
    pivot = Checkpoint(model(folder, 0, 3, **config), "pivot")
    stacked = restack({"pivot": pivot, "a": pivot}, tuple(map(Slice, slices)), False)
    return stacked.models["pivot"].config, stacked.warnings


def test_lists_of_layer_numbers_and_lists_with_an_entry_per_layer_follow(tmp_path):
    config, warnings = config_of(tmp_path / "m", [{"a": (0, 3)}, {"a": (1, 3)}], mlp_only_layers=[1],
                                 no_rope_layers=[1, 0, 1], eos_token_id=[1, 2, 3])
    assert (config["num_hidden_layers"], config["mlp_only_layers"], config["no_rope_layers"]) == (5, [1, 3], [1, 0, 1, 0, 1])
    assert config["eos_token_id"] == [1, 2, 3] and not warnings


def test_settings_inside_text_config_follow_and_the_sources_config_does_not_change(tmp_path):
    pivot = Checkpoint(model(tmp_path / "m", 0, 3, text_config={"num_hidden_layers": 3, "n_layer": 3}), "pivot")
    stacked = restack({"pivot": pivot, "a": pivot}, (Slice({"a": (0, 1)}),), False)
    assert stacked.models["pivot"].config["text_config"] == {"num_hidden_layers": 1, "n_layer": 1}
    assert pivot.config["text_config"] == {"num_hidden_layers": 3, "n_layer": 3}


def test_what_counts_layers_by_their_number_is_said(tmp_path):
    _, warnings = config_of(tmp_path / "m", [{"a": (0, 1)}], max_window_layers=2)
    assert len(warnings) == 1 and "max_window_layers (2)" in warnings[0]


def test_the_largest_stack_is_the_one_that_is_cut():
    names = [f"visual.blocks.{i}.w" for i in range(2)] + [f"model.layers.{i}.w" for i in range(3)] + ["lm_head.weight"]
    assert main_stack(names) == ("model.layers", 3) and main_stack(["w"]) == ("", 0)


# ── what a person can get wrong ──────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("slices", "settings", "words"), [
    ([{"a": (3, 5)}, {"b": (0, 1)}], {"method": "passthrough"}, "slices, number 1: a has 4 layers, 3 to 5 were asked for"),
    ([{"a": (0, 1)}, {"b": (6, 7)}], {"method": "passthrough"}, "number 2: b has 6 layers"),
    ([{"a": (0, 1), "b": (1, 2)}], {"method": "ties"}, "not clear which layers of the pivot"),
    ([{"a": (0, 1), "b": (1, 2)}], {}, "not clear which layers of the pivot"),
    ([{"b": (5, 6)}, {"a": (0, 1), "b": (0, 1)}], {"method": "task_arithmetic"}, "number 1: it is not clear which layers"),
    ([{"a": (0, 1), "b": (0, 1)}, {"a": (0, 1)}], {"method": "nuslerp"}, "has 1 target, nuslerp merges at least 2"),
])
def test_slices_that_make_no_sense_are_refused(three, tmp_path, slices, settings, words):
    before = snapshot(tmp_path)
    with pytest.raises(RecipeError, match=words):
        finish(merge(Recipe(three[0], tuple(three[1:]), slices=tuple(map(Slice, slices)), **settings), tmp_path / "out"))
    assert snapshot(tmp_path) == before


def test_layers_of_other_shapes_are_refused(three, tmp_path):
    other = save_checkpoint(tmp_path / "c", {EMBED: np.ones((2, 2), np.float32), up(0): np.ones((2, 3), np.float32),
                                             FINAL: np.ones((2, 2), np.float32), HEAD: np.ones((2, 2), np.float32)})
    with pytest.raises(MismatchError, match=r"model.layers.1.mlp.up_proj.weight has shape \[2, 3\]"):
        MergePlan.open(Recipe(three[0], (three[1], other), method="passthrough",
                              slices=(Slice({"a": (0, 1)}), Slice({"c": (0, 1)}))))
