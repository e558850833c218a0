"""fusion.configs: what configs say, whatever version of transformers wrote them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fusion.checkpoint import Checkpoint
from fusion.configs import Difference, differences, in_words, settings, stop_tokens, told
from fusion.preflight import preflight
from tests.conftest import save_checkpoint
from tests.test_vocabulary import byte_level

LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "hidden_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 4.0]}


def said(first: dict, second: dict) -> set[str]:
    return {one.setting for one in differences({**LLAMA, **first}, {**LLAMA, **second})}


@pytest.mark.parametrize(("old", "new"), [
    ({}, {"rope_theta": 10000.0}), ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
     {"rope_parameters": {"rope_theta": 500000, "rope_type": "linear", "factor": 2.0}}),
    ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": None}),
    ({"rope_scaling": {"type": "dynamic", "factor": 3.0}}, {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0,
                                                                              "rope_theta": 10000.0}}),
    ({"rope_scaling": {**YARN, "type": "yarn"}}, {"rope_parameters": {**YARN, "beta_fast": 32, "beta_slow": 1.0,
                                                                      "attention_factor": 0.1 * math.log(4) + 1}}),
    ({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, {"rope_scaling": {**YARN, "attention_factor": 1.0}}),
    ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 2048}}, {"rope_scaling": YARN}),  # 8192 ÷ 2048
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"rope_parameters": {"type": "llama3", **LLAMA3, "rope_theta": 1e4}}),
    ({"original_max_position_embeddings": 4096, "rope_scaling": {"type": "su", **LONG}},
     {"rope_parameters": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 4096,
                          "attention_factor": math.sqrt(1 + math.log(2) / math.log(4096))}}),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
     {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}),
    ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ({"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000}, {"model_type": "gpt_neox"}),
    ({"model_type": "mixtral"}, {"model_type": "mixtral", "rope_theta": 1000000.0}),
    ({"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8}},
     {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                                       "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}}, {}),
])
def test_equal_rotary_positions_are_equal_however_they_are_kept(old, new):
    assert said(old, new) == said(new, old) == set()


@pytest.mark.parametrize(("first", "second", "settings"), [
    ({"rope_theta": 1e6}, {}, {"rope_theta"}), ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e4}}, {"rope_theta"}),
    ({"rope_scaling": YARN}, {"rope_scaling": {**YARN, "factor": 8}}, {"rope_factor", "rope_attention_factor"}),
    ({"rope_scaling": YARN}, {"rope_scaling": {**YARN, "beta_fast": 16}}, {"rope_beta_fast"}),
    ({"rope_scaling": {"type": "llama3", **LLAMA3}}, {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 2}},
     {"rope_high_freq_factor"}),
    ({"original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", **LONG}},
     {"original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", **LONG, "long_factor": [2.0, 5.0]}},
     {"rope_long_factor"}),
    ({"partial_rotary_factor": 0.5}, {}, {"partial_rotary_factor"}),
    ({"model_type": "gemma3_text"}, {"model_type": "gemma3_text", "rope_local_base_freq": 2e4},
     {"rope_theta (sliding_attention)"}),
])
def test_other_rotary_positions_are_named(first, second, settings):
    assert {one.setting for one in told({**LLAMA, **first}, {**LLAMA, **second})} == settings


@pytest.mark.parametrize(("key", "one", "other"), [
    ("_model_name_or_path", "a", "b"), ("_name_or_path", "a", "b"), ("transformers_version", "4.43.1", "5.24.0"),
    ("use_cache", True, False), ("attention_dropout", 0.0, 0.1), ("initializer_range", 0.02, 0.01), ("unsloth_fixed", True, False),
    ("pad_token_id", 0, 1), ("architectures", ["A"], ["B"]), ("rms_norm_eps", 1e-6, 9.999999974752427e-07),
    ("temperature", 1.0, 0.6), ("auto_map", {"AutoConfig": "x.C"}, {"AutoConfig": "y.C"}), ("vocab_size", 10, 12),
    ("use_sliding_window", False, None), ("attention_bias", False, None), ("layer_types", ["full_attention"] * 4, None)])
def test_what_changes_no_number_is_not_told(key, one, other):
    assert said({key: one}, {key: other}) == set()


def test_the_names_of_dtypes_are_one():
    assert said({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}) == set()
    assert said({"dtype": "bfloat16"}, {"torch_dtype": "float32"}) == {"dtype"} and not told({"dtype": "a"}, {"dtype": "b"})


def test_the_text_models_settings_stand_at_the_top_and_others_under_their_name():
    vision = {"model_type": "x", "text_config": {**LLAMA, "rope_theta": 1e6}, "vision_config": {"depth": 3}}
    found = differences({**LLAMA, "rope_theta": 1e6}, vision)
    assert found == [Difference("vision_config.depth", None, 3)]


@pytest.mark.parametrize(("first", "second", "words"), [
    ({"sliding_window": 4096}, {"sliding_window": None}, "sliding_window is 4096 here and not set in the pivot"),
    ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": 512, "use_sliding_window": False}, None),
    ({"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 21}, {"model_type": "qwen2", "sliding_window": None},
     None),
    ({"sliding_window_pattern": 6, "num_hidden_layers": 12},
     {"num_hidden_layers": 12, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2}, None),
    ({"layer_types": ["full_attention"] * 29 + ["sliding_attention"]}, {"layer_types": ["sliding_attention"] * 30},
     "layer_types differs in 29 of 30 entries, first in number 0 (full_attention here, sliding_attention in the pivot)"),
    ({"layer_types": ["a"] * 30}, {"layer_types": ["a"] * 32}, "layer_types has 30 entries here and 32 in the pivot"),
    ({"rope_theta": 1000000.0}, {}, "rope_theta is 1000000 here and 10000 in the pivot"),
    ({"custom": "x" * 500}, {"custom": "y"}, f"custom is {'x' * 59}… here and y in the pivot")])
def test_differences_are_told_in_few_words(first, second, words):
    assert list(map(in_words, told({**LLAMA, **first}, {**LLAMA, **second}))) == ([words] if words else [])


def test_odd_values_end_in_nothing_worse_than_a_difference():
    deep: dict = {}
    for _ in range(400):
        deep = {"a": deep}
    odd = {"rope_scaling": {"rope_type": ["yarn"], "factor": "x", "mscale": math.inf, "mscale_all_dim": math.nan}, "deep": deep,
           "layer_types": 3, "sliding_window_pattern": 10**9, "num_hidden_layers": 10**9, "rope_theta": True, "text_config": [],
           "max_position_embeddings": 0, "original_max_position_embeddings": 0, "x": [{"y": 1}, 2]}
    assert settings(odd)["x.1.y"] == 1 and not differences(odd, odd) and differences(odd, LLAMA)
    for kind in ("yarn", "longrope", "llama3", "dynamic", "linear"):
        for factor in (0, -1, 1e308, None):
            assert settings({**LLAMA, "rope_scaling": {"rope_type": kind, "factor": factor, "original_max_position_embeddings": 1}})


# ── where replies end ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def pair(tmp_path):
    """`pair(config, generation)`: the pivot, whose replies end at 256, and a target of other settings, opened."""
    def make(config: dict, generation: dict | None) -> tuple[Checkpoint, Checkpoint]:
        tokenizer, found = byte_level(marks=("<end>", "<turn>")), []
        for name, its, more in (("pivot", {"eos_token_id": 256}, None), ("target", config, generation)):
            folder = save_checkpoint(tmp_path / name, {"model.embed_tokens.weight": np.ones((258, 2), np.float32)},
                                     config={"vocab_size": 258, "tie_word_embeddings": True, **its})
            tokenizer.save(str(folder / "tokenizer.json"))
            if more is not None:
                (folder / "generation_config.json").write_text(json.dumps(more))
            found.append(Checkpoint(folder))
        return tuple(found)
    return make


@pytest.mark.parametrize(("config", "generation", "words"), [
    ({"eos_token_id": 256}, None, None), ({"eos_token_id": [256]}, None, None),
    ({"eos_token_id": 256}, {"eos_token_id": 256}, None),
    ({"eos_token_id": 256}, {"temperature": 1}, None), ({"text_config": {"eos_token_id": 256}}, None, None),
    ({"eos_token_id": [257, 256]}, None,
     "is 256 ('<end>') and 257 ('<turn>') here and 256 ('<end>') in the pivot (config.json). The merge has"),
    ({"eos_token_id": 256}, {"eos_token_id": [256, 257]},
     "is 256 ('<end>') and 257 ('<turn>') here and 256 ('<end>') in the pivot (generation_config.json). The merge has"),
    ({"eos_token_id": 257}, {"eos_token_id": 256},
     "is 257 ('<turn>') here and 256 ('<end>') in the pivot (config.json). The merge has"),
    ({}, None, "is not set here and 256 ('<end>') in the pivot (config.json). The merge has")])
def test_other_ends_of_replies_are_told(pair, config, generation, words):
    pivot, target = pair(config, generation)
    found = [one.text for one in preflight(pivot, [target]).findings if one.topic == "stop tokens"]
    assert len(found) == bool(words) and all(words in text for text in found)


def test_a_generation_config_that_is_none_does_not_stop_a_preflight(pair):
    pivot, target = pair({"eos_token_id": 256}, None)
    (target.folder / "generation_config.json").write_text("{broken")
    assert stop_tokens(target) == {"config.json": (256,), "generation_config.json": (256,)}
    assert preflight(pivot, [target]).level != "bad"
