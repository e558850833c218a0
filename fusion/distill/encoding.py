"""From a dialogue to token ids and the positions that are learnt: the replies and the tokens that end them.

The mask comes from character offsets, not from counting tokens, and is checked: decoding the learnt ids must give exactly
the replies and their end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusion.distill.dialogues import Dialogue
from fusion.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A plain template that any tokenizer can read; the turn ends with the tokenizer's own end token.
PLAIN = ("{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n"
         "{% else %}{{ 'User' if m['role'] == 'user' else 'System' }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}Assistant:{% endif %}")


@dataclass(frozen=True)
class Encoded:
    """A dialogue as one model reads it.

    `text`, `ids` [T]; `labels` [L]: the positions in `ids` that are learnt, each predicted from the position before it;
    `turn` [L]: which reply a label belongs to; `reached` [L]: how many characters of its reply (after leading spaces) have
    been read where the label is predicted: equal numbers in two models mean equal prefixes, and below 0 the first token begins
    with so many characters before the reply; `ends` [L]: is it an end token? `letters` [L]: how many characters of its reply
    each label adds; None: as `reached` rises, with one for what cannot be told from that.
    """

    text: str
    ids: np.ndarray
    labels: np.ndarray
    turn: np.ndarray
    reached: np.ndarray
    ends: np.ndarray
    letters: np.ndarray | None = None

    @property
    def targets(self) -> np.ndarray:
        """The token ids that are learnt, [L]."""
        return self.ids[self.labels]


class Encoder:
    """Encodes dialogues for one model: its tokenizer, and its own chat template or a shared one.

    `template` is a Jinja chat template for all models; None means the tokenizer's own. `max_tokens` cuts the end off.
    CheckpointError when the tokenizer is not a fast one (no offsets) or has neither template nor end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, max_tokens: int | None = None):
        if not tokenizer.is_fast:
            raise CheckpointError("its tokenizer gives no character offsets", where=tokenizer.name_or_path,
                                  todo="Use a checkpoint with tokenizer.json.")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.template = template or tokenizer.chat_template
        self._marks = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if self.template is None:
            raise CheckpointError("its tokenizer has no chat template", where=tokenizer.name_or_path,
                                  todo="Give a shared template for all models.")

    def length(self, dialogue: Dialogue) -> int:
        """How many tokens the dialogue has for this model, uncut."""
        return len(self.tokenizer(self._render(dialogue.messages()), add_special_tokens=False)["input_ids"])

    def encode(self, dialogue: Dialogue) -> Encoded:
        """Encode one dialogue; MismatchError when the template does not show a reply as it is."""
        text = self._render(dialogue.messages())
        spans = self._spans(text, dialogue)
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = np.array(made["input_ids"], np.int64), np.array(made["offset_mapping"], np.int64).reshape(-1, 2)
        if self.max_tokens is not None:
            ids, offsets = ids[:self.max_tokens], offsets[:self.max_tokens]
        return self._labelled(text, ids, offsets, spans)

    def _render(self, messages: Sequence[dict]) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self.template, tokenize=False)
        except Exception as error:  # a template is a foreign program (in a sandbox): anything may be raised
            if messages and messages[0]["role"] == "system":  # many templates have no place for it
                first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
                return self._render([first, *messages[2:]])
            raise CheckpointError(f"the chat template cannot be rendered ({str(error)[:200]})",
                                  where=self.tokenizer.name_or_path) from error

    def _spans(self, text: str, dialogue: Dialogue) -> list[tuple[int, int]]:
        """Where each reply stands in the rendered text; looked for after the user's message before it."""
        spans, at = [], 0
        for asked, answer in dialogue.turns:
            for wanted in (asked.strip(), answer.strip()):
                found = text.find(wanted, at)
                if found < 0:
                    raise MismatchError("the chat template does not show this message as it is", where=dialogue.origin,
                                        todo="Use a shared template, or leave this dialogue out.")
                begin, at = found, found + len(wanted)
            spans.append((begin, at))
        return spans

    def _labelled(self, text: str, ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int]]) -> Encoded:
        begins, ends = offsets[:, 0], offsets[:, 1]
        labels, turn, reached, closing, letters = [], [], [], [], []
        for number, (begin, end) in enumerate(spans):
            inside = np.flatnonzero((ends > begin) & (begins < end) & (ends > begins)).tolist()
            after = inside[-1] + 1 if inside else len(ids)
            ended = after < len(ids) and int(ids[after]) in self._marks and not text[end:begins[after]].strip()
            for position in [*inside, *([after] if ended else [])]:
                if position:
                    labels.append(position)
                    turn.append(number)
                    reached.append(int(ends[position - 1]) - begin)
                    closing.append(position == after)
                    letters.append(min(int(ends[position]), end) - begin - max(reached[-1], 0))
        return Encoded(text, ids, np.array(labels, np.int64), np.array(turn, np.int32), np.array(reached, np.int64),
                       np.array(closing, bool), np.maximum(np.array(letters, np.int64), 0))

    def check(self, dialogue: Dialogue, encoded: Encoded) -> None:
        """MismatchError unless the learnt ids decode to the replies and their end tokens."""
        for number, (_, answer) in enumerate(dialogue.turns):
            mine = encoded.labels[(encoded.turn == number) & ~encoded.ends]
            cut = self.max_tokens is not None and len(encoded.ids) >= self.max_tokens
            said = self.tokenizer.decode(encoded.ids[mine], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if not (said.strip() == answer.strip() or (cut and answer.strip().startswith(said.strip().rstrip("\ufffd")))):
                raise MismatchError(f"the learnt tokens decode to {said[:80]!r} instead of {answer[:80]!r}",
                                    where=dialogue.origin, todo="Leave this dialogue out, or use a shared template.")
