"""Tokenizers of the family: each keeps the parts of the class that AutoTokenizer will make of its folder, so that a text is cut
after loading exactly as it was in training.

Two are byte-level (Qwen2, GPT-NeoX); two are as SentencePiece's are, with byte pieces for what the vocabulary lacks: Llama writes
a "▁" before every text, Gemma only where a space stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, GPTNeoXTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from fusion.demo.family import Shape
from fusion.demo.styles import STYLES

BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
_DIGITS = pre_tokenizers.Split(Regex(r"\d"), "isolated")
_WORDS = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?[^\p{L}\p{N}\s▁]+|▁+(?=▁\p{L})|▁+|\n+|\p{N}"), "isolated")
_NO_LINES = pre_tokenizers.Split(Regex(r"\n"), "removed")  # Llama has no piece of its own for the end of a line


def new_tokenizer(shape: Shape, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as this architecture has it, trained on the texts; digits stand alone, chat marks are special tokens."""
    style = STYLES[shape.kind]
    settings = {"bos_token": style.begin or None, "eos_token": style.end, "pad_token": style.pad,
                "unk_token": style.unknown or None, "additional_special_tokens": list(style.specials),
                "chat_template": style.template(), "padding_side": "left", "model_max_length": shape.positions,
                "clean_up_tokenization_spaces": False}
    empty = _of_class(shape.kind, {mark: i for i, mark in enumerate(style.specials)}, [], settings)
    vocabulary, merges = _learnt(empty.backend_tokenizer, shape, texts)
    return _of_class(shape.kind, vocabulary, merges, settings)


def _of_class(kind: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], settings: dict) -> PreTrainedTokenizerFast:
    """The tokenizer that AutoTokenizer makes for this model type."""
    match kind:
        case "qwen2":
            return Qwen2Tokenizer(vocab=vocabulary, merges=merges, **settings)
        case "gpt_neox":
            return GPTNeoXTokenizer(vocab=vocabulary, merges=merges, **settings)
        case "gemma":
            return GemmaTokenizer(vocab=vocabulary, merges=merges, mask_token=None, add_bos_token=True, **settings)
    # Saving a LlamaTokenizer forgets `legacy`, its "▁" before every text; stored without a class, the file is read as it is.
    marks = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token")}
    llama = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=True, **marks).backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=llama, add_bos_token=True, **settings)


def _learnt(own: Tokenizer, shape: Shape, texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges for the class whose empty tokenizer is `own`.

    No merge crosses a word or takes a digit, so a class that splits no words before it merges cuts texts alike.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces, alphabet, splits = BYTES, [], [own.pre_tokenizer, _WORDS]
    match shape.kind:
        case "llama":
            splits += [_NO_LINES]
        case "gemma":
            tokenizer.normalizer = own.normalizer
        case _:
            pieces, alphabet, splits = (), pre_tokenizers.ByteLevel.alphabet(), [_DIGITS, own.pre_tokenizer]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=[*STYLES[shape.kind].specials, *pieces], show_progress=False,
        initial_alphabet=alphabet))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
