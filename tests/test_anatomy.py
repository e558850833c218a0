"""fusion.anatomy: the place of a tensor read off its name, for any architecture."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusion.anatomy import GRANULARITIES, place

TABLE = [  # name, stack, layer, module, matrix, kind
    ("model.layers.3.self_attn.q_proj.weight", "model.layers", 3, "self_attn", "q_proj", "attention"),  # Llama
    ("model.layers.31.mlp.down_proj.weight", "model.layers", 31, "mlp", "down_proj", "mlp"),
    ("model.layers.0.input_layernorm.weight", "model.layers", 0, "input_layernorm", "input_layernorm", "norm"),
    ("model.embed_tokens.weight", "", None, "embed_tokens", "embed_tokens", "embedding"),
    ("model.norm.weight", "", None, "norm", "norm", "norm"),
    ("lm_head.weight", "", None, "lm_head", "lm_head", "head"),
    ("model.layers.1.self_attn.k_proj.bias", "model.layers", 1, "self_attn", "k_proj.bias", "attention"),  # Qwen2
    ("model.layers.1.self_attn.q_norm.weight", "model.layers", 1, "self_attn", "q_norm", "norm"),  # Qwen3
    ("transformer.h.11.attn.c_attn.bias", "transformer.h", 11, "attn", "c_attn.bias", "attention"),  # GPT-2
    ("transformer.h.0.mlp.c_fc.weight", "transformer.h", 0, "mlp", "c_fc", "mlp"),
    ("h.0.ln_1.weight", "h", 0, "ln_1", "ln_1", "norm"),
    ("h.0.ln_1.bias", "h", 0, "ln_1", "ln_1.bias", "norm"),
    ("transformer.wte.weight", "", None, "wte", "wte", "embedding"),
    ("transformer.wpe.weight", "", None, "wpe", "wpe", "embedding"),
    ("transformer.ln_f.bias", "", None, "ln_f", "ln_f.bias", "norm"),
    ("gpt_neox.layers.5.attention.query_key_value.weight", "gpt_neox.layers", 5, "attention", "query_key_value", "attention"),
    ("gpt_neox.layers.5.mlp.dense_h_to_4h.bias", "gpt_neox.layers", 5, "mlp", "dense_h_to_4h.bias", "mlp"),
    ("gpt_neox.layers.5.post_attention_layernorm.weight", "gpt_neox.layers", 5, "post_attention_layernorm",
     "post_attention_layernorm", "norm"),
    ("gpt_neox.embed_in.weight", "", None, "embed_in", "embed_in", "embedding"),
    ("embed_out.weight", "", None, "embed_out", "embed_out", "head"),
    ("transformer.h.7.self_attention.query_key_value.weight", "transformer.h", 7, "self_attention", "query_key_value", "attention"),
    ("transformer.h.7.ln_attn.weight", "transformer.h", 7, "ln_attn", "ln_attn", "norm"),  # Falcon
    ("transformer.word_embeddings.weight", "", None, "word_embeddings", "word_embeddings", "embedding"),
    ("model.layers.2.block_sparse_moe.experts.7.w1.weight", "model.layers", 2, "block_sparse_moe", "experts.7.w1", "mlp"),
    ("model.layers.2.block_sparse_moe.gate.weight", "model.layers", 2, "block_sparse_moe", "gate", "mlp"),  # Mixtral
    ("model.layers.4.mlp.experts.127.up_proj.weight", "model.layers", 4, "mlp", "experts.127.up_proj", "mlp"),  # Qwen3-MoE
    ("model.layers.4.mlp.experts.gate_up_proj", "model.layers", 4, "mlp", "experts.gate_up_proj", "mlp"),
    ("model.layers.9.pre_feedforward_layernorm.weight", "model.layers", 9, "pre_feedforward_layernorm",
     "pre_feedforward_layernorm", "norm"),  # Gemma 2
    ("model.layers.0.self_attn.dense.weight", "model.layers", 0, "self_attn", "dense", "attention"),  # Phi
    ("model.layers.0.mlp.fc1.bias", "model.layers", 0, "mlp", "fc1.bias", "mlp"),
    ("model.final_layernorm.weight", "", None, "final_layernorm", "final_layernorm", "norm"),
    ("model.decoder.layers.6.fc2.weight", "model.decoder.layers", 6, "fc2", "fc2", "mlp"),  # OPT
    ("model.decoder.layers.6.self_attn.out_proj.weight", "model.decoder.layers", 6, "self_attn", "out_proj", "attention"),
    ("model.decoder.layers.6.self_attn_layer_norm.bias", "model.decoder.layers", 6, "self_attn_layer_norm",
     "self_attn_layer_norm.bias", "norm"),
    ("model.decoder.embed_positions.weight", "", None, "embed_positions", "embed_positions", "embedding"),
    ("backbone.layers.10.mixer.A_log", "backbone.layers", 10, "mixer", "A_log", "attention"),  # Mamba
    ("backbone.layers.10.mixer.conv1d.bias", "backbone.layers", 10, "mixer", "conv1d.bias", "attention"),
    ("backbone.layers.10.norm.weight", "backbone.layers", 10, "norm", "norm", "norm"),
    ("backbone.embeddings.weight", "", None, "embeddings", "embeddings", "embedding"),
    ("backbone.norm_f.weight", "", None, "norm_f", "norm_f", "norm"),
    ("vision_tower.vision_model.encoder.layers.2.self_attn.v_proj.weight", "vision_tower.vision_model.encoder.layers", 2,
     "self_attn", "v_proj", "attention"),
    ("language_model.model.layers.2.mlp.up_proj.weight", "language_model.model.layers", 2, "mlp", "up_proj", "mlp"),
    ("model.layers.0.feed_forward.w2.weight", "model.layers", 0, "feed_forward", "w2", "mlp"),  # InternLM
    ("output.weight", "", None, "output", "output", "head"),
    ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer", 0, "output", "dense", "other"),
    ("0.auto_model.layers.3.mlp.up_proj.weight", "0.auto_model.layers", 3, "mlp", "up_proj", "mlp"),
    ("encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.block", 1, "layer", "0.SelfAttention.q", "attention"),  # T5
    ("decoder.block.0.layer.2.DenseReluDense.wi.weight", "decoder.block", 0, "layer", "2.DenseReluDense.wi", "mlp"),
    ("decoder.block.0.layer.2.layer_norm.weight", "decoder.block", 0, "layer", "2.layer_norm", "norm"),
    ("shared.weight", "", None, "shared", "shared", "embedding"),
    ("model.layers.1.mlp.shared_expert.up_proj.weight", "model.layers", 1, "mlp", "shared_expert.up_proj", "mlp"),
    ("model.layers.0.temporal_block.q_proj.weight", "model.layers", 0, "temporal_block", "q_proj", "attention"),  # RecurrentGemma
    ("model.layers.0.conv.in_proj.weight", "model.layers", 0, "conv", "in_proj", "attention"),  # LFM2
    ("multi_modal_projector.linear_1.weight", "", None, "linear_1", "linear_1", "other"),
]


@pytest.mark.parametrize(("name", "stack", "layer", "module", "matrix", "kind"), TABLE, ids=[row[0] for row in TABLE])
def test_a_name_says_its_place(name, stack, layer, module, matrix, kind):
    found = place(name)
    assert (found.stack, found.layer, found.module, found.matrix, found.kind) == (stack, layer, module, matrix, kind)


def test_units_nest_from_model_to_matrix():
    name = "model.layers.3.self_attn.q_proj.weight"
    assert [place(name).unit(granularity, name) for granularity in GRANULARITIES] == [
        "model", "model.layers.3", "model.layers.3.self_attn", name, name]


def test_a_tensor_outside_the_layers_is_a_unit_of_its_own():
    name = "lm_head.weight"
    assert [place(name).unit(granularity, name) for granularity in GRANULARITIES] == ["model", name, name, name, name]


def test_equal_layer_numbers_of_two_stacks_are_two_units():
    text, vision = "language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert place(text).unit("layer", text) != place(vision).unit("layer", vision)


def test_experts_of_one_layer_share_a_module_but_no_matrix():
    names = [f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(3)]
    assert len({place(name).unit("module", name) for name in names}) == 1
    assert len({place(name).unit("matrix", name) for name in names}) == 3


PARTS = st.sampled_from(["layers", "h", "0", "12", "attn", "weight", "bias", "", "norm", "٣", "²", "-1"])


@given(st.text() | st.lists(PARTS).map(".".join))
@example("")
@example(".")
@example("..weight")
@example("bias")
@example("layers.0")
@example("layers.0.weight")
@example("layers." + "9" * 5000 + ".mlp.weight")
@example("layers.0.\ud800.weight")
def test_no_name_is_too_odd(name):
    found = place(name)
    assert found.kind in ("attention", "mlp", "norm", "embedding", "head", "other")
    assert all(isinstance(found.unit(granularity, name), str) for granularity in GRANULARITIES)
