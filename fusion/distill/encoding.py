"""From a dialogue to token ids and the positions that are learnt: the replies and the tokens that end them.

Where a reply stands is found by rendering the dialogue twice, with the reply and with a stand-in in its place; the text is
never searched. Which tokens are the reply comes from character offsets, not from counting, and is checked: decoding the learnt
ids must give exactly the replies and their end tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusion.distill.dialogues import Dialogue
from fusion.errors import CheckpointError, MismatchError
from fusion.template import ChatTemplate, stand_ins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A plain template that any tokenizer can read; the turn ends with the tokenizer's own end token.
PLAIN = ("{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n"
         "{% else %}{{ 'User' if m['role'] == 'user' else 'System' }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}Assistant:{% endif %}")
_FORMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)  # what templates do to a reply


class Fault(NamedTuple):
    """Why a reply cannot be taught to a model: a `reason` in the same words for all such replies, and what was seen here."""

    reason: str
    example: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.example})" if self.example else self.reason


Span = tuple[int, int]  # first character of a reply in the rendered text, and one past its last


@dataclass(frozen=True)
class Encoded:
    """A dialogue as one model reads it.

    `text`, `ids` [T]; `labels` [L]: the positions in `ids` that are learnt, each predicted from the position before it;
    `turn` [L]: which reply a label belongs to; `reached` [L]: how many characters of its reply (without white space around it)
    have been read where the label is predicted: equal numbers in two models mean equal prefixes, and below 0 the first token
    begins with so many characters before the reply; `ends` [L]: is it an end token? `letters` [L]: how many characters of its
    reply each label adds; None: as `reached` rises, with one for what cannot be told from that.
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

    `template` is a Jinja chat template for all models; None means the tokenizer's own. `max_tokens` cuts the end off. `rows`: so
    many rows its embedding has, None where that is not known.
    CheckpointError when the tokenizer is not a fast one (no offsets) or has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, max_tokens: int | None = None,
                 rows: int | None = None):
        if not tokenizer.is_fast:
            raise CheckpointError("its tokenizer gives no character offsets", where=tokenizer.name_or_path,
                                  todo="Use a checkpoint with tokenizer.json.")
        self.tokenizer, self.max_tokens, self.rows = tokenizer, max_tokens, rows
        self._template = ChatTemplate(tokenizer, template)
        self.template = self._template.text
        self._marks = _marks(tokenizer)

    def length(self, dialogue: Dialogue) -> int:
        """How many tokens the dialogue has for this model, uncut."""
        return len(self._tokens(self._render(dialogue) + self._closing)[0])

    def encode(self, dialogue: Dialogue) -> Encoded:
        """Encode one dialogue; MismatchError when the template does not show a reply that is learnt as it is."""
        text, spans = self._placed(dialogue)
        for turn in dialogue.learnt:
            if isinstance(spans[turn], Fault):
                raise _refusal(dialogue, spans[turn])
        return self._labelled(dialogue, text, spans)

    def check(self, dialogue: Dialogue, encoded: Encoded) -> None:
        """MismatchError unless the learnt ids decode to the replies and their end tokens."""
        fault = next((fault for turn in dialogue.learnt if (fault := self._misread(dialogue, encoded, turn))), None)
        if fault:
            raise _refusal(dialogue, fault)

    def examine(self, dialogue: Dialogue) -> tuple[Encoded, dict[int, Fault]]:
        """The dialogue without the replies that this model cannot be taught as they are, and these: turn → why.

        What `encode` and `check` refuse, all at once; MismatchError when nothing of the dialogue can be shown.
        """
        text, spans = self._placed(dialogue)
        encoded = self._labelled(dialogue, text, spans)
        found = {turn: spans[turn] if isinstance(spans[turn], Fault) else self._misread(dialogue, encoded, turn)
                 for turn in dialogue.learnt}
        return encoded, {turn: fault for turn, fault in found.items() if fault}

    def cuts(self, encoded: Encoded) -> bool:
        """Whether the end of a dialogue may be missing."""
        return self.max_tokens is not None and len(encoded.ids) >= self.max_tokens

    def _render(self, dialogue: Dialogue, instead: dict[int, str] | None = None) -> str:
        """The dialogue as text; `instead`: turn → what to write in place of its reply."""
        try:
            return self._template.render(dialogue.messages(instead))
        except CheckpointError as error:
            if self._template.habits.works:  # only this dialogue is refused
                raise MismatchError(error.found, where=dialogue.origin, todo=error.todo) from error
            raise

    # ── where the replies stand ──────────────────────────────────────────────────────────────────────────────────────────

    def _placed(self, dialogue: Dialogue) -> tuple[str, list[Span | Fault]]:
        """The text that the model reads, and where each reply stands in it."""
        text = self._render(dialogue)
        spans = self._together(dialogue, text) or [self._alone(dialogue, text, turn) for turn in range(len(dialogue.turns))]
        if self._closing and not isinstance(spans[-1], Fault) and not text[spans[-1][1]:].strip():
            text = text[:spans[-1][1]] + self._closing
        return text, spans

    def _together(self, dialogue: Dialogue, text: str) -> list[Span | Fault] | None:
        """All replies at once: the frame around stand-ins, filled with the replies, is the text. None when it is not."""
        names = stand_ins(len(dialogue.turns), text)
        frame, rest = [], self._render(dialogue, dict(enumerate(names)))
        for name in names:
            before, found, rest = rest.partition(name)
            if not found:
                return None
            frame.append(before)
        for form in _FORMS:
            replies = [form(answer) for _, answer in dialogue.turns]
            if "".join(chain(*zip(frame, replies, strict=True), [rest])) == text:
                return list(_spans(frame, replies))
        return None

    def _alone(self, dialogue: Dialogue, text: str, turn: int) -> Span | Fault:
        """One reply: it stands where the text with a stand-in begins or ends to differ."""
        (name,) = stand_ins(1, text)
        frame = self._render(dialogue, {turn: name})
        if frame.count(name) != 1:
            return Fault("the chat template leaves out a reply" if name not in frame else "the chat template repeats a reply")
        before, _, after = frame.partition(name)
        begin = len(before) if text.startswith(before) else None
        end = len(text) - len(after) if text.endswith(after) else None
        answer = dialogue.turns[turn][1]
        if begin is not None and end is not None:
            shown = text[begin:max(begin, end)]
            if shown.strip() == answer.strip():
                return _core(shown, begin)
            return Fault("the chat template does not show a reply as it is", f"it shows {_short(shown)}")
        for reply in (form(answer) for form in _FORMS):
            start = begin if begin is not None else end - len(reply) if end is not None else -1
            if start >= 0 and text.startswith(reply, start):
                return _core(reply, start)
        return Fault("the chat template does not show a reply as it is")

    @cached_property
    def _closing(self) -> str:
        """What a template writes to end a turn when another turn follows, but not after the last reply; "" for most."""
        asked, answer, again, more = stand_ins(4)
        last = self._after(Dialogue(((asked, answer),)), answer)
        return "" if last else self._after(Dialogue(((asked, answer), (again, more))), answer)

    def _after(self, dialogue: Dialogue, answer: str) -> str:
        """What stands between a reply and the end of the token that ends it, "" without one."""
        rest = self._template.render(dialogue.messages()).partition(answer)[2]
        ids, offsets = self._tokens(rest)
        at = next((i for i, token in enumerate(ids.tolist()) if token in self._marks), None)
        return rest[:offsets[at, 1]] if at is not None and not rest[:offsets[at, 0]].strip() else ""

    # ── which tokens are the replies ─────────────────────────────────────────────────────────────────────────────────────

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids [T] and character offsets [T, 2]; MismatchError for half of a surrogate pair, which no tokenizer takes."""
        try:
            made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except (TypeError, UnicodeError) as error:
            raise MismatchError("a sign that no tokenizer can read (half of a surrogate pair)", where=ascii(text[:60]),
                                todo="Leave this text out.") from error
        return np.array(made["input_ids"], np.int64), np.array(made["offset_mapping"], np.int64).reshape(-1, 2)

    def _labelled(self, dialogue: Dialogue, text: str, spans: Sequence[Span | Fault]) -> Encoded:
        ids, offsets = self._tokens(text)
        if self.max_tokens is not None:
            ids, offsets = ids[:self.max_tokens], offsets[:self.max_tokens]
        if self.rows is not None and (ids >= self.rows).any():
            raise MismatchError(beyond(self.rows), where=dialogue.origin,
                                todo="Use the tokenizer that the model was trained with.")
        marks = np.fromiter((token in self._marks for token in ids.tolist()), bool, len(ids))
        parts = [(turn, spans[turn], *_positions(text, offsets, marks, spans[turn])) for turn in dialogue.learnt
                 if not isinstance(spans[turn], Fault)]
        labels = [np.arange(max(first, 1), stop) for _, _, first, stop, _ in parts]
        read = [offsets[its - 1, 1] - begin for its, (_, (begin, _), *_) in zip(labels, parts, strict=True)]
        reached = [np.minimum(its, end - begin) for its, (_, (begin, end), *_) in zip(read, parts, strict=True)]
        letters = [np.clip(offsets[its, 1] - begin, 0, end - begin) - np.maximum(before, 0)
                for its, before, (_, (begin, end), *_) in zip(labels, reached, parts, strict=True)]
        ends = [(its == stop - 1) & ended for its, (*_, stop, ended) in zip(labels, parts, strict=True)]
        turns = [np.full(len(its), turn) for its, (turn, *_) in zip(labels, parts, strict=True)]
        return Encoded(text, ids, _joined(labels, np.int64), _joined(turns, np.int32), _joined(reached, np.int64),
                       _joined(ends, bool), _joined(letters, np.int64))

    # ── whether they say what was written ────────────────────────────────────────────────────────────────────────────────

    def _misread(self, dialogue: Dialogue, encoded: Encoded, turn: int) -> Fault | None:
        """What the learnt tokens of a reply say otherwise than it is written, after the tokenizer's own normalisation."""
        mine = encoded.ids[encoded.labels[(encoded.turn == turn) & ~encoded.ends]]
        decoded = self.tokenizer.decode(mine, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        said, meant = self._normal(decoded.strip()), self._normal(dialogue.turns[turn][1].strip())
        cut = self.cuts(encoded)
        if not len(mine) and not cut:  # only signs that its normalisation takes away
            return Fault("its tokenizer makes no token of a reply", ascii(dialogue.turns[turn][1][:40]))
        if said == meant or (cut and meant.startswith(said.rstrip("\ufffd"))):
            return None
        if self.tokenizer.unk_token_id in mine and self.tokenizer.unk_token_id != self.tokenizer.eos_token_id:
            return Fault("its tokenizer has no token for a sign of a reply", _short(meant))
        if meant and meant in said:
            return Fault("a token holds the beginning or end of a reply together with text of the chat template", _short(said))
        at = next((i for i, (one, other) in enumerate(zip_longest(said, meant)) if one != other), 0)
        said, meant = (_short(text[max(at - 8, 0):]) for text in (said, meant))
        return Fault("the learnt tokens decode to something else than the reply", f"{said} instead of {meant}")

    def _normal(self, text: str) -> str:
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return (normalizer.normalize_str(text) if normalizer else text).strip()


def _marks(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that may end a turn: special tokens but those for unknown signs and beginnings, and other added tokens that are no
    white space."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or token.content.strip()}
    others = {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    return frozenset((added | set(tokenizer.all_special_ids)) - others)


def _positions(text: str, offsets: np.ndarray, marks: np.ndarray, span: Span) -> tuple[int, int, bool]:
    """First token of a reply, one past its last, and whether that last one is the token that ends it.

    Tokens of no width between two others of the reply belong to it (tokenizers that trim offsets give none to white space);
    so does white space between the reply and its end token.
    """
    begins, ends = offsets[:, 0], offsets[:, 1]
    inside = np.flatnonzero((ends > span[0]) & (begins < span[1]) & (ends > begins))
    if not len(inside):
        return 1, 1, False
    first, stop = int(inside[0]), int(inside[-1]) + 1
    following = np.flatnonzero(marks[stop:])
    if len(following) and not text[span[1]:begins[stop + following[0]]].strip():
        return first, stop + int(following[0]) + 1, True
    return first, stop, False


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _spans(frame: Sequence[str], replies: Sequence[str]) -> Iterator[Span]:
    at = 0
    for before, reply in zip(frame, replies, strict=True):
        yield _core(reply, at + len(before))
        at += len(before) + len(reply)


def _core(reply: str, begin: int) -> Span:
    """Where a reply that begins there stands without the white space around it."""
    begin += len(reply) - len(reply.lstrip())
    return begin, begin + len(reply.strip())


def beyond(rows: int) -> str:
    """Why a model cannot read what its tokenizer wrote."""
    return f"its tokenizer writes tokens beyond the {rows:,} rows of its embedding"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def _refusal(dialogue: Dialogue, fault: Fault) -> MismatchError:
    return MismatchError(str(fault), where=dialogue.origin, todo="Leave this dialogue out, or use a shared template.")
