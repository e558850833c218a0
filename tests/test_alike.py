"""fusion.alike and fusion.naming: one model saved under several names merges; what no model reads stands in nobody's way."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from fusion import chat
from fusion.alike import Alike, alike
from fusion.checkpoint import Checkpoint
from fusion.compare import compare
from fusion.digest import digest_checkpoint
from fusion.errors import MismatchError
from fusion.inspection import inspect
from fusion.merge import merge
from fusion.naming import atoms, is_buffer, other_sense, plain_name, table, unread_names
from fusion.preflight import preflight
from fusion.progress import finish
from fusion.recipe import Recipe
from fusion.variation import measure
from fusion.verify import verify
from tests.conftest import load_tensors, save_checkpoint, tiny_tokenizer

TEXT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
         "patch_size": 14}
CONFIGS = {
    "gemma3": lambda: transformers.Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=SIGHT, mm_tokens_per_image=4,
                                                image_token_index=290, boi_token_index=291, eoi_token_index=292),
    "llava": lambda: transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT), image_token_index=290,
                                              vision_config=transformers.CLIPVisionConfig(**SIGHT)),
    "qwen2-vl": lambda: transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": {
        "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}, vision_config={
            "depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}, image_token_id=290),
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2,
                                                     moe_intermediate_size=16),
    "neox": lambda: transformers.GPTNeoXConfig(**{key: TEXT[key] for key in TEXT if key != "num_key_value_heads"}),
}
SEEING = ("gemma3", "llava", "qwen2-vl")


def made(config):
    auto = transformers.AutoModelForCausalLM if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING \
        else transformers.AutoModelForImageTextToText
    return auto.from_config(config, dtype=torch.bfloat16)


def saved(folder, model, in_memory: bool):
    """A checkpoint with the names of the Hub, or with those that the tensors have in memory."""
    model.save_pretrained(folder, save_original_format=not in_memory)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair(kind)`: pivot and target with the Hub's names, and both once more with those in memory."""
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = made(CONFIGS[kind]())
        folders = [saved(folder / "pivot", model, False), saved(folder / "pivot-memory", model, True)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return [*folders, saved(folder / "target", model, False), saved(folder / "target-memory", model, True)]
    return lru_cache(make)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_with_the_names_in_memory_merges_as_with_those_of_the_hub(pair, kind, tmp_path):
    pivot, memory, target, renamed = pair(kind)
    assert Checkpoint(target).info.keys() != Checkpoint(renamed).info.keys()
    report = preflight(Checkpoint(pivot), [Checkpoint(renamed)])
    assert report.level == "good" and "other names" in report.findings[0].text
    results = [finish(merge(Recipe(str(pivot), (str(one),), method="linear"), tmp_path / one.name)) for one in (target, renamed)]
    assert results[0].recipe.result == results[1].recipe.result
    assert load_tensors(tmp_path / "target-memory").keys() == load_tensors(pivot).keys()
    back = finish(merge(Recipe(str(memory), (str(target),), method="linear"), tmp_path / "back"))
    assert all(torch.equal(value, load_tensors(tmp_path / "back")[name]) for name, value in load_tensors(renamed).items())
    if kind == "gemma3":
        assert finish(verify(back.folder)).equal
    assert finish(digest_checkpoint(Checkpoint(renamed))) == results[1].recipe.revisions["target-memory"]


@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
def test_measuring_and_comparing_see_through_the_names(pair, kind):
    pivot, memory, target, renamed = (Checkpoint(folder) for folder in pair(kind))
    wanted, found = (finish(measure(pivot, [one])) for one in (target, renamed))
    assert wanted.names == found.names and np.array_equal(wanted.square, found.square)
    assert np.array_equal(*(finish(inspect(pivot, [one], spectral=False)).gram for one in (target, renamed)))
    other = finish(compare(pivot.folder, memory.folder))
    assert other.same_weights and other.only == ((), ())


@pytest.mark.parametrize("kind", ["gemma3", "qwen2-vl", "mixtral"])
def test_any_part_of_a_tensor_is_read_as_the_whole(pair, kind):
    pivot, memory, _, _ = (Checkpoint(folder) for folder in pair(kind))
    for one, other in ((pivot, memory), (memory, pivot)):
        seen = alike(one, other)
        assert isinstance(seen, Alike) and list(seen.info) == list(one.info)
        for name, tensor in one.info.items():
            whole, start, stop = one[name].reshape(-1), tensor.numel // 3, tensor.numel - 1
            assert (seen.info[name].shape, seen.info[name].nbytes) == (tensor.shape, tensor.nbytes)
            assert np.array_equal(seen.read(name, start, stop, np.empty(tensor.numel, np.float32)), whole[start:stop])
            assert seen.raw(name, start, stop) == one.raw(name, start, stop)
            assert seen.raw_into(name, start, stop, np.empty(tensor.nbytes, np.uint8)).tobytes() == one.raw(name, start, stop)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rules_name_what_transformers_renames(kind):
    with torch.device("meta"):
        model = made(CONFIGS[kind]())
    memory = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, dict(model.state_dict())).items()}
    assert memory.keys() != stored.keys()
    here, there = ({plain: part.shape for plain, part in table(one).items()} for one in (memory, stored))
    assert here == there
    assert sum(len(atoms(*one)) for one in memory.items()) == len(table(memory))


@pytest.mark.parametrize("kind", SEEING)
def test_layers_are_those_that_write_text(pair, kind):
    assert [Checkpoint(folder).layers for folder in pair(kind)] == [2, 2, 2, 2]


def test_what_reads_text_in_a_model_that_sees_merges_with_one_that_does_not(pair, tmp_path):
    sees, plain = pair("llava")[0], tmp_path / "plain"
    torch.manual_seed(7)
    saved(plain, transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TEXT), dtype=torch.bfloat16), False)
    for pivot, target in ((sees, plain), (plain, sees)):
        report = preflight(Checkpoint(pivot), [Checkpoint(target)])
        assert report.level == "warning" and any("same in both" in finding.text for finding in report.findings)
        out = tmp_path / f"out-{pivot.name}"
        finish(merge(Recipe(str(pivot), (str(target),), ("other",), method="linear"), out))
        merged, mine, theirs = load_tensors(out), load_tensors(pivot), table({k: v.shape for k, v in load_tensors(target).items()})
        assert merged.keys() == mine.keys()
        for name, value in merged.items():
            own = theirs.get(plain_name(name))
            assert torch.equal(value, mine[name] if own is None else load_tensors(target)[own.own])
        assert chat.load(out).model is not None


@pytest.mark.parametrize("pivot_is_bare", [True, False])
def test_a_class_without_a_head_gives_what_it_has(family, tmp_path, pivot_is_bare):
    whole, target, _ = family()
    bare = tmp_path / "bare"
    transformers.AutoModel.from_pretrained(target).save_pretrained(bare)
    tiny_tokenizer().save_pretrained(bare)
    assert "layers.0.mlp.up_proj.weight" in load_tensors(bare)
    pivot, other = (bare, whole) if pivot_is_bare else (whole, bare)
    report = preflight(Checkpoint(pivot), [Checkpoint(other)])
    assert report.level == "warning" and any("lm_head.weight" in finding.text for finding in report.findings)
    finish(merge(Recipe(str(pivot), (str(other),), ("other",), method="linear"), tmp_path / "out"))
    merged = load_tensors(tmp_path / "out")
    name = "layers.0.mlp.up_proj.weight" if pivot_is_bare else "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[name], load_tensors(whole if pivot_is_bare else target)["model.layers.0.mlp.up_proj.weight"])
    if not pivot_is_bare:
        assert torch.equal(merged["lm_head.weight"], load_tensors(whole)["lm_head.weight"])


UNREAD = {
    "frequencies": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)},
    "several tokens at once": {"mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 2), "mtp.norm.weight": torch.ones(2)},
    "a layer behind the last": {"model.layers.2.mlp.up_proj.weight": torch.ones(3, 2)},
    "a head that judges": {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)},
    "masks": {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4), "model.layers.0.attn.masked_bias": torch.tensor(-1e4)},
}


@pytest.mark.parametrize("side", ["pivot", "target"])
@pytest.mark.parametrize("what", UNREAD)
def test_what_no_model_reads_never_stops_a_merge(family, tmp_path, what, side):
    pivot, target, _ = family()
    odd = tmp_path / "odd"
    shutil.copytree(pivot if side == "pivot" else target, odd)
    save_file({**load_tensors(odd), **UNREAD[what]}, odd / "model.safetensors", {"format": "pt"})
    models = (odd, target) if side == "pivot" else (pivot, odd)
    report = preflight(Checkpoint(models[0]), [Checkpoint(models[1])])
    assert report.level != "bad" and any(next(iter(sorted(UNREAD[what]))) in finding.text for finding in report.findings)
    recipe = Recipe(str(models[0]), (str(models[1]), str(pivot.parent / "target-b")), method="varm", granularity="layer")
    finish(merge(recipe, tmp_path / "out"))
    merged = load_tensors(tmp_path / "out")
    assert set(merged) == set(load_tensors(models[0]))
    if side == "pivot":
        assert all(torch.equal(merged[name], value) for name, value in UNREAD[what].items())
    assert chat.load(tmp_path / "out").model is not None


def test_what_is_lent_is_stored_as_the_recipe_says(family, tmp_path):
    pivot, target, _ = family()
    odd = tmp_path / "odd"
    shutil.copytree(pivot, odd)
    extra = UNREAD["several tokens at once"] | UNREAD["frequencies"]
    save_file({**load_tensors(pivot), **extra}, odd / "model.safetensors", {"format": "pt"})
    finish(merge(Recipe(str(odd), (str(target),), method="linear", dtype="float16"), tmp_path / "out"))
    merged = load_tensors(tmp_path / "out")
    assert merged["mtp.norm.weight"].dtype == torch.float16
    assert merged["model.layers.0.self_attn.rotary_emb.inv_freq"].dtype == torch.float32  # a model's own table, not a weight


def test_what_one_model_has_and_reads_still_stops_a_merge(tmp_path):
    name = "model.layers.0.self_attn.q_norm.weight"
    pivot = save_checkpoint(tmp_path / "a", {"model.norm.weight": np.ones(2, np.float32), name: np.ones(2, np.float32)})
    target = save_checkpoint(tmp_path / "b", {"model.norm.weight": np.ones(2, np.float32)})
    for models in ((pivot, target), (target, pivot)):
        with pytest.raises(MismatchError, match=name):
            preflight(Checkpoint(models[0]), [Checkpoint(models[1])]).raise_if_bad()


def test_two_tensors_of_one_plain_name_are_not_guessed_at():
    assert table({"model.a.weight": (2,), "language_model.a.weight": (2,), "model.b.weight": (3,)}).keys() == {"b.weight"}


def test_experts_of_one_tensor_lie_one_after_the_other():
    found = atoms("model.layers.0.mlp.experts.gate_up_proj", (2, 6, 4))
    assert [(name.split("experts.")[1], part.start, part.shape) for name, part in found] == [
        ("0.gate_proj.weight", 0, (3, 4)), ("0.up_proj.weight", 12, (3, 4)),
        ("1.gate_proj.weight", 24, (3, 4)), ("1.up_proj.weight", 36, (3, 4))]
    assert [name for name, _ in atoms("model.layers.0.block_sparse_moe.experts.1.w2.weight", (3, 4))] == [
        "layers.0.mlp.experts.1.down_proj.weight"]


def test_names_that_only_some_models_have():
    for hub, memory in (("embed_out.weight", "lm_head.weight"),
                        ("model.layers.1.mlp.e_score_correction_bias", "model.layers.1.mlp.gate.e_score_correction_bias"),
                        ("model.layers.1.block_sparse_moe.e_score_correction_bias", "model.layers.1.mlp.e_score_correction_bias")):
        assert plain_name(hub) == plain_name(memory)
    without_gate = table({"model.layers.1.mixer.experts.up_proj": (2, 6, 4)})
    assert without_gate["layers.1.mixer.experts.1.up_proj.weight"].start == 24


def test_names_say_what_is_a_table_and_what_sees():
    assert is_buffer("h.0.attn.bias", (1, 1, 8, 8)) and not is_buffer("h.0.attn.bias", (8,))
    assert other_sense("visual.blocks.0.attn.proj.weight") and not other_sense("model.layers.0.visual_gate.weight")
    names = {f"model.layers.{i}.w": (1,) for i in range(3)} | {f"vision_tower.layers.{i}.w": (1,) for i in range(9)}
    assert unread_names(names, {"num_hidden_layers": 2}) == {"model.layers.2.w"}
    assert unread_names(names, json.loads('{"text_config": {"num_hidden_layers": 3}}')) == frozenset()
