"""The chat marks of each architecture, written once; the chat template and the training texts are both made from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fusion.demo.dialogues import Dialogue


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
    unknown: str = ""

    def pieces(self, dialogue: Dialogue) -> list[tuple[str, bool]]:
        """The dialogue as texts in order; True marks what the model itself has to say."""
        parts = [(self.begin, False)]
        for message in dialogue:
            said = message["role"] == "assistant"
            parts += [(getattr(self, message["role"]), False), (message["content"], said), (self.end, said),
                      (self.after, False)]
        return [(text, said) for text, said in parts if text]

    def words(self, dialogue: Dialogue) -> list[str]:
        """The dialogue's texts without the marks that are special tokens: what a tokenizer has to cut."""
        special = "|".join(map(re.escape, self.specials))
        return [word for text, _ in self.pieces(dialogue) for word in re.split(special, text) if word]

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
                   ("<unk>", "<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"), "<unk>"),
    "qwen2": Style("", "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", "\n",
                   "<|endoftext|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>"),
    "gpt_neox": Style("", "[SYS]", "[USER]", "[BOT]", "</s>", "", "<pad>",
                      ("<pad>", "</s>", "[SYS]", "[USER]", "[BOT]")),
    "gemma": Style("<bos>", "<start_of_turn>system\n", "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>", "\n",
                   "<pad>", ("<pad>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), "<unk>"),
}
