"""fusion.plan: what a recipe means for every tensor, and models that are not plain folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from fusion.checkpoint import Checkpoint
from fusion.digest import digest_checkpoint
from fusion.errors import CheckpointError, MismatchError
from fusion.live import LiveMerge, chat_model, state_dict
from fusion.merge import merge
from fusion.plan import MergePlan
from fusion.progress import finish
from fusion.recipe import Curve, Recipe, Slice
from fusion.sources import open_checkpoint
from tests.conftest import load_tensors, save_checkpoint, save_family, snapshot, tiny_tokenizer

UP0, UP1, EMBED = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def folders(tmp_path):
    """pivot 0, a 1, b 2 in two layers."""
    return [str(save_checkpoint(tmp_path / name, {up: np.full((2, 3), value, np.float32) for up in (UP0, UP1)}))
            for value, name in enumerate(("pivot", "a", "b"))]


def plan_of(folders, **settings) -> MergePlan:
    return MergePlan.open(Recipe(folders[0], tuple(folders[1:]), **settings))


# ── what is read, and what counts ────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("settings", "read"), [
    ({}, [1, 2]), ({"method": "linear"}, [1, 2]), ({"granularity": "parameter"}, [0, 1, 2]), ({"method": "ties"}, [0, 1, 2]),
    ({"method": "slerp"}, [1, 2]), ({"method": "nuslerp"}, [1, 2]),
    ({"method": "nuslerp", "options": {"space": "deltas"}}, [0, 1, 2]),
    ({"method": "ties", "exclude": (UP0,)}, [0]),
    ({"method": "linear", "slices": (Slice({"b": (0, 1)}), Slice({"a": (0, 1), "b": (1, 2)}))}, [2]),
    ({"method": "linear", "slices": (Slice({"pivot": (1, 2)}), Slice({"a": (0, 1), "b": (1, 2)}))}, [0]),
], ids=str)
def test_only_what_counts_is_read(folders, settings, read):
    plan = plan_of(folders, **settings)
    assert plan.readers(plan.number[UP0]) == read and plan.read_bytes(UP0) == 24 * len(read)


def test_slerp_of_one_target_reads_the_pivot(folders):
    assert plan_of(folders[:2], method="slerp").readers(0) == [0, 1]


def test_weights_of_targets_that_take_no_part_go_to_the_others(folders):
    plan = plan_of(folders, method="linear", weights=(1, 3), slices=(Slice({"a": (0, 1), "b": (0, 1)}), Slice({"b": (0, 1)})))
    assert [plan.row(plan.number[up], plan.no_ratio()).tolist() for up in (UP0, UP1)] == [[.25, .75], [0, 1]]
    plan = plan_of(folders, method="ties", weights=(2, 3), options={"density": (.1, Curve((.2, .4)))},
                   slices=(Slice({"a": (0, 1), "b": (0, 1)}), Slice({"b": (0, 1)})))
    assert [plan.row(plan.number[up], plan.no_ratio()).tolist() for up in (UP0, UP1)] == [[2, 3], [0, 3]]
    assert [plan.arguments(plan.number[up])["density"].tolist() for up in (UP0, UP1)] == [[.1, .2], [.4]]


def test_the_plans_digest_tells_recipes_and_files_apart(folders, tmp_path):
    digest = plan_of(folders).digest
    assert plan_of(folders).digest == digest == plan_of(folders, revisions={"a": "fc1:0"}, result={"engine": "1"}).digest
    others = [plan_of(folders, seed=1).digest, plan_of(folders, granularity="layer").digest, plan_of(folders[:2]).digest]
    (tmp_path / "a/model.safetensors").touch()
    assert len({digest, *others, plan_of(folders).digest}) == 5


def test_a_config_that_says_tied_beside_a_head_of_its_own_is_put_right(tmp_path):
    tensors = {EMBED: np.ones((3, 2), np.float32), "lm_head.weight": np.zeros((3, 2), np.float32)}
    folders = [str(save_checkpoint(tmp_path / name, tensors, config={"tie_word_embeddings": True})) for name in ("pivot", "a")]
    plan = plan_of(folders)
    assert plan.config["tie_word_embeddings"] is False and plan.pivot.config["tie_word_embeddings"] is True
    assert {name for name, _, _ in plan.outputs()} == set(tensors)


# ── models that are not plain folders ────────────────────────────────────────────────────────────────────────────────

def agrees(recipe: Recipe, out) -> dict[str, torch.Tensor]:
    """Merge to disk and in memory; both agree, and the digests are those of the models as they are opened."""
    result = finish(merge(recipe, out))
    stored, live = load_tensors(result.folder), state_dict(finish(LiveMerge().update(recipe)))
    assert stored.keys() == live.keys() and all(torch.equal(live[name], value) for name, value in stored.items())
    for label, ref in zip(("pivot", *recipe.names), (recipe.pivot, *recipe.targets), strict=True):
        assert result.recipe.revisions[label] == finish(digest_checkpoint(open_checkpoint(ref)))
    again = finish(merge(Recipe.load(out / "fusechat_recipe.yaml"), out.with_name("again")))
    assert snapshot(again.folder) == snapshot(result.folder)
    return stored


@pytest.mark.parametrize("method", ["varm", "linear", "ties"])
def test_an_adapter_is_a_target_like_any_other(folders, tmp_path, method):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    part = "base_model.model.model.layers.0.mlp.up_proj"
    save_file({f"{part}.lora_A.weight": np.ones((1, 3), np.float32), f"{part}.lora_B.weight": np.ones((2, 1), np.float32)},
              adapter / "adapter_model.safetensors")
    recipe = Recipe(folders[0], (f"{folders[0]}+{adapter}", folders[2]), ("tuned", "b"), method=method)
    got = agrees(recipe, tmp_path / "out")
    if method == "linear":
        assert got[UP0].unique().tolist() == [2] and got[UP1].unique().tolist() == [1]


def other_words(folder, count: int = 3) -> None:
    """Give a real model `count` more tokens than the family has, at the end of its tables."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|new {i}|>" for i in range(count)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("mode", ["pivot", "common", "union"])
@pytest.mark.parametrize("settings", [{}, {"method": "linear"}, {"method": "ties"},
                                      {"method": "linear", "slices": (Slice({"target-a": (0, 2), "target-b": (0, 2)}),) * 2}],
                         ids=str)
def test_models_of_other_vocabularies_merge_load_and_answer(tmp_path, mode, settings):
    folders = save_family(tmp_path / "models", "llama")
    other_words(folders[2])
    recipe = Recipe(str(folders[0]), tuple(map(str, folders[1:])), vocabulary=mode, **settings)
    with pytest.raises(MismatchError, match="vocabulary differs"):
        MergePlan.open(recipe.with_(vocabulary=""))
    agrees(recipe, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    words = set(tokenizer.get_vocab()) - set(tiny_tokenizer().get_vocab())
    assert words == ({"<|new 0|>", "<|new 1|>", "<|new 2|>"} if mode == "union" else set())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    live = chat_model(finish(LiveMerge().update(recipe)), "live")
    ids = tokenizer("how are you <|new 1|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, live.model(ids).logits) and model(ids).logits.isfinite().all()
    assert live.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_the_tokenizer_of_the_result_does_not_come_from_a_donor_with_other_tokens(tmp_path):
    folders = save_family(tmp_path / "models", "llama")
    other_words(folders[1])
    (folders[1] / "vocab.json").write_text("{}")
    (folders[1] / "chat_template.jinja").write_text("the donor's")
    recipe = Recipe(str(folders[0]), tuple(map(str, folders[1:])), vocabulary="pivot", donor="target-a")
    finish(merge(recipe, tmp_path / "out"))
    assert not (tmp_path / "out/vocab.json").exists() and (tmp_path / "out/chat_template.jinja").read_text() == "the donor's"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folders[0] / "tokenizer.json").read_bytes()


def test_a_missing_model_is_an_error_before_anything_is_read(folders):
    with pytest.raises(CheckpointError, match="gone"):
        plan_of([folders[0], "gone"])
    assert Checkpoint(folders[0]).parameters == 12
