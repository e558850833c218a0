"""Small tokenizers of the kinds that real models have, trained on the fly on four languages.

    made("llama")    SentencePiece BPE with byte fallback that puts a "▁" before every text and has no token for a new line
    made("gemma")    the same without that "▁", with tokens for runs of new lines
    made("qwen")     byte-level BPE that splits digits, as `GPT-2` and its heirs

Rare characters are bytes to all of them. Each has a chat template of its kind and the end token that it uses.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.benchmarks.heard import TEXTS

KINDS = ("llama", "gemma", "qwen")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
SPECIALS = {"llama": ("<unk>", "<s>", "</s>", "<|end_of_turn|>"), "gemma": ("<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"),
            "qwen": ("<|endoftext|>", "<|im_end|>")}
_TURNS = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}%s{% endif %}"
TEMPLATES = {
    "llama": _TURNS.replace("%s", "{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|end_of_turn|>' }}", 1)
                   .replace("%s", "{{ 'GPT4 Correct Assistant:' }}"),
    "gemma": _TURNS.replace("%s", "{{ 'Turn of ' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}", 1)
                   .replace("%s", "{{ 'Turn of assistant\n' }}"),
    "qwen": _TURNS.replace("%s", "{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}", 1)
                  .replace("%s", "{{ 'assistant\n' }}")}
_DIGITS = pre_tokenizers.Split(Regex(r"\d"), "isolated")
_WORDS = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?[^\p{L}\p{N}\s▁]+|▁+(?=▁\p{L})|▁+|\n+|\p{N}"), "isolated")


@cache
def made(kind: str, size: int = 900) -> PreTrainedTokenizerFast:
    """A tokenizer of about `size` tokens; see the module."""
    tokenizer = _bytes(size) if kind == "qwen" else _pieces(kind, size)
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in SPECIALS[kind]])
    unknown = {"unk_token": "<unk>"} if kind != "qwen" else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[kind][-1], chat_template=TEMPLATES[kind],
                                   clean_up_tokenization_spaces=False, **unknown)


def _texts() -> list[str]:
    return [text for its in TEXTS.values() for text in its]


def _bytes(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(_texts(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=[], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def _pieces(kind: str, size: int) -> Tokenizer:
    """Learnt within words, then cut without looking at words, as SentencePiece does."""
    before = [normalizers.Prepend("▁")] if kind == "llama" else []
    spaces = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = spaces
    lines = [pre_tokenizers.Split(Regex(r"\n"), "removed")] if kind == "llama" else []
    learner.pre_tokenizer = pre_tokenizers.Sequence([_WORDS, *lines])
    learner.train_from_iterator(_texts(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIALS[kind], *BYTES], show_progress=False, limit_alphabet=220))
    model = json.loads(learner.to_str())["model"]
    tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = spaces
    strip = [decoders.Strip(" ", 1, 0)] if kind == "llama" else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer
