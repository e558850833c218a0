"""A tiny model that answers every question with the same words, chunk after chunk, then the end token."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusion.chat import ChatModel, Reply, Request, Sampling, from_parts, stream

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<|go|>{% endif %}"
_MARKS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|go|>")


def scripted_tokenizer(chunks: Sequence[str], template: str | None, special: Sequence[str] = (), **marks
                       ) -> PreTrainedTokenizerFast:
    """Bytes, the marks of turns, and every chunk as one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in _MARKS])
    tokenizer.add_tokens([AddedToken(chunk, special=chunk in special, normalized=False) for chunk in chunks])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|end|>", **marks})
    fast.chat_template = template
    return fast


def scripted_weights(tokenizer: PreTrainedTokenizerFast, chain: Sequence[int], positions: int = 512) -> LlamaForCausalLM:
    """A Llama that writes the tokens of the chain (all different) one after the other."""
    size, width = len(tokenizer), 256
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=width, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
        max_position_embeddings=positions, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)).float()
    with torch.no_grad():
        codes = torch.nn.functional.normalize(torch.randn(size, width), dim=1)
        model.model.embed_tokens.weight.copy_(codes)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        head = torch.zeros(size, width)
        for before, after in pairwise(chain):
            head[after] += 20 * codes[before]
        model.lm_head.weight.copy_(head)
    return model


def scripted(chunks: Sequence[str], template: str | None = TEMPLATE, after: str = "<|go|>", special: Sequence[str] = (),
             last: str | None = "<|end|>", positions: int = 512, **marks) -> ChatModel:
    """A ChatModel that writes these chunks after the token `after`, then `last`; None: it begins with the first again."""
    tokenizer = scripted_tokenizer(chunks, template, special, **marks)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (after, *chunks, last or chunks[0])]
    return from_parts(scripted_weights(tokenizer, ids, positions), tokenizer, "scripted")


def lent(model: ChatModel, messages: Sequence[dict]) -> Request:
    """The request of a conversation with a model in memory."""
    @contextmanager
    def lease() -> Iterator[ChatModel]:
        yield model
    return Request(lease, messages)


def pictures(model: ChatModel, *said: str, **sampling) -> list[Reply]:
    """Every reply that is shown while the model answers the last of these messages, user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [shown[0] for shown in stream([lent(model, messages)], Sampling(**sampling), threading.Event())]


def ask(model: ChatModel, *said: str, **sampling) -> Reply:
    """The finished reply."""
    return pictures(model, *said, **sampling)[-1]
