"""Real architectures, made tiny by transformers: variation, merge, reload, forward pass, and the anatomy of their names."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fusion import Recipe, finish, measure, merge
from fusion.anatomy import place
from fusion.sources import open_checkpoint
from tests.conftest import load_tensors

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": 2,
         "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": None, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 4, "n_shared_experts": 1}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8, "vision_use_head": False}

ARCHITECTURES = {  # family: its settings
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Gemma2": SIZES,
    "Gemma3Text": SIZES,
    "Phi": SIZES,
    "Phi3": SIZES,
    "Olmo2": SIZES,
    "GPT2": GPT2,
    "GPTNeoX": SIZES,
    "Falcon": {**{key: SIZES[key] for key in SIZES if key != "head_dim"}, "multi_query": False},
    "Cohere": {**SIZES, "use_qk_norm": True},
    "StableLm": {**SIZES, "use_qkv_bias": True},
    "Mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {**SIZES, **EXPERTS},
    "DeepseekV3": {**SIZES, **DEEPSEEK},
    "OPT": {**SIZES, "word_embed_proj_dim": 16, "ffn_dim": 24},
    "Bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "Granite": SIZES,
    "Starcoder2": SIZES,
    "Nemotron": SIZES,
    "SmolLM3": SIZES,
    "Glm4": SIZES,
    "Gemma3": {"text_config": SIZES, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 60,
               "boi_token_index": 61, "eoi_token_index": 62},
}
TIED = {"Gemma3Text", "Gemma2", "GPT2", "Cohere", "OPT", "Bloom", "Falcon", "Starcoder2", "SmolLM3", "Gemma3"}


def save_models(folder: Path, family: str) -> list[Path]:
    """A pivot and two fine-tunes of it, float32 rounded through bfloat16."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**ARCHITECTURES[family])
    auto = transformers.AutoModelForImageTextToText if family == "Gemma3" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    folders = [folder / name for name in ("pivot", "target-a", "target-b")]
    for j, its in enumerate(folders):
        model.save_pretrained(its)
        torch.manual_seed(j + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02 * (j + 1))
    return folders


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(family)`: pivot, targets and their VARM merge, made once."""
    @lru_cache
    def made(family: str) -> tuple[list[Path], Path]:
        folder = tmp_path_factory.mktemp(family)
        folders = save_models(folder, family)
        result = finish(merge(Recipe(str(folders[0]), tuple(map(str, folders[1:]))), folder / "merged"))
        return folders, result.folder
    return made


every = pytest.mark.parametrize("family", ARCHITECTURES)


@every
def test_the_variation_of_every_matrix_is_measured(models, family):
    folders, _ = models(family)
    pivot, *targets = map(open_checkpoint, folders)
    variation = finish(measure(pivot, targets))
    learnt = [name for name in pivot if pivot.info[name].dtype == "BF16" and name not in pivot.tied_copies]
    assert set(learnt) <= set(variation.names)
    rows = [variation.names.index(name) for name in learnt]
    assert (variation.ratios("matrix")[rows, 1] > variation.ratios("matrix")[rows, 0]).mean() > 0.9  # it moved twice as far


@every
def test_the_merge_loads_and_answers(models, family):
    folders, merged = models(family)
    auto = transformers.AutoModelForImageTextToText if family == "Gemma3" else transformers.AutoModelForCausalLM
    loaded, report = auto.from_pretrained(merged, output_loading_info=True, dtype=torch.float32)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    pivot = auto.from_pretrained(folders[0])
    assert loaded.num_parameters() == pivot.num_parameters() and type(loaded) is type(pivot)
    with torch.no_grad():
        logits = loaded(torch.arange(4, 12)[None]).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


@every
def test_the_merge_is_the_weighted_sum(models, family):
    folders, merged = models(family)
    pivot, first, second = (load_tensors(folder) for folder in folders)
    got = load_tensors(merged)
    assert {name: (value.dtype, value.shape) for name, value in got.items()} == {
        name: (value.dtype, value.shape) for name, value in pivot.items()}
    for name, value in got.items():
        low, high = torch.minimum(first[name], second[name]), torch.maximum(first[name], second[name])
        assert ((low <= value) & (value <= high)).all(), name


@every
def test_the_anatomy_finds_layers_modules_and_kinds(models, family):
    folders, _ = models(family)
    pivot = open_checkpoint(folders[0])
    assert pivot.layers == 2
    kinds = {name: place(name).kind for name in pivot}
    assert {"attention", "mlp", "norm", "embedding"} <= set(kinds.values())
    assert ("head" in kinds.values()) == (family not in TIED)
    assert pivot.tied == (family in TIED)
    assert not [name for name, kind in kinds.items() if kind == "other" and place(name).layer is not None]
    modules = {place(name).module for name in pivot if place(name).layer == 0}
    assert len(modules) >= 3


def test_a_vision_tower_is_carried_along(models):
    _, merged = models("Gemma3")
    tower = [name for name in open_checkpoint(merged) if "vision_tower" in name]
    assert len(tower) > 20 and all(place(name).stack != "model.language_model.layers" for name in tower)


def test_experts_are_merged_each_by_its_own_variation(models):
    folders, _ = models("Qwen3Moe")
    pivot, *targets = map(open_checkpoint, folders)
    variation = finish(measure(pivot, targets))
    experts = [t for t, name in enumerate(variation.names) if "experts" in name]
    assert len(np.unique(variation.ratios("matrix")[experts, 0])) == len(experts)
