"""Empty models of the family: ordinary transformers classes, small numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fusion.demo.family import Shape


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model of this shape with fresh weights and a generation config that stops at the end of a reply."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}
    same = {"vocab_size": len(tokenizer), "hidden_size": shape.width, "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "max_position_embeddings": shape.positions, **ids}
    match shape.kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**same, num_key_value_heads=shape.kv_heads, tie_word_embeddings=True))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**same, num_key_value_heads=shape.kv_heads, tie_word_embeddings=True))
        case "gpt_neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**same, tie_word_embeddings=False, rotary_pct=0.5))
        case "gemma":
            model = GemmaForCausalLM(GemmaConfig(**same, num_key_value_heads=shape.kv_heads, tie_word_embeddings=True,
                                                 head_dim=shape.width // shape.heads))
        case other:
            raise ValueError(f"no architecture {other!r}")
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=128)
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer as an ordinary transformers folder, weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
