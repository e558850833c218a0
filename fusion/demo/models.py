"""Empty models and tokenizers of the family: ordinary transformers classes, small numbers.

Every style of chat marks is written once; the chat template and the training texts are both made from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
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

from fusion.demo.dialogues import Dialogue
from fusion.demo.family import Shape


@dataclass(frozen=True)
class Style:
    """The chat marks of one architecture: what stands before each role's text, and after every message."""

    begin: str
    system: str
    user: str
    assistant: str
    end: str
    after: str
    pad: str
    specials: tuple[str, ...]

    def pieces(self, dialogue: Dialogue) -> list[tuple[str, bool]]:
        """The dialogue as texts in order; True marks what the model itself has to say."""
        parts = [(self.begin, False)]
        for message in dialogue:
            said = message["role"] == "assistant"
            parts += [(getattr(self, message["role"]), False), (message["content"], said), (self.end, said),
                      (self.after, False)]
        return [(text, said) for text, said in parts if text]

    def template(self) -> str:
        """The Jinja chat template that writes the same text as `pieces`."""
        def quoted(text: str) -> str:
            return "'" + text.replace("\n", "\\n") + "'"
        marks = " ".join(f"{{%- {'if' if role == 'system' else 'elif'} message['role'] == '{role}' -%}}"
                         f"{{{{- {quoted(getattr(self, role))} -}}}}" for role in ("system", "user", "assistant"))
        return (f"{{{{- {quoted(self.begin)} -}}}}{{%- for message in messages -%}}{marks}{{%- endif -%}}"
                f"{{{{- message['content'] | trim + {quoted(self.end + self.after)} -}}}}{{%- endfor -%}}"
                f"{{%- if add_generation_prompt -%}}{{{{- {quoted(self.assistant)} -}}}}{{%- endif -%}}")


STYLES = {
    "llama": Style("<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "", "<|pad|>",
                   ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")),
    "qwen2": Style("", "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", "\n",
                   "<|endoftext|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "gpt_neox": Style("", "[SYS]", "[USER]", "[BOT]", "</s>", "", "<pad>",
                      ("<pad>", "</s>", "[SYS]", "[USER]", "[BOT]")),
    "gemma": Style("<bos>", "<start_of_turn>system\n", "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>", "\n",
                   "<pad>", ("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>")),
}


def new_tokenizer(shape: Shape, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts; digits stand alone, chat marks are special tokens."""
    style = STYLES[shape.kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=list(style.specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=style.begin or None, eos_token=style.end, pad_token=style.pad,
        additional_special_tokens=list(style.specials), chat_template=style.template(), padding_side="left",
        model_max_length=shape.positions, clean_up_tokenization_spaces=False)


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
