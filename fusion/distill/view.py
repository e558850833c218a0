"""One dialogue as two models read it, for people to look at: tokens side by side, what each model expects, who was heard.

    seen = view(teacher_of_pivot, teacher_of_source, Dialogue((("Hi!", "Hello."),)))
    seen.positions[0].chosen                       # 0: the pivot's own distribution stays, 1: the source's is taken

Everything comes from the functions that make the training data. Price: one forward pass of both models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fusion.distill.carrying import Carried, link_labels
from fusion.distill.dialogues import Dialogue
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.fuse import Distributions
from fusion.distill.spelling import Vocabulary, end_tokens, pair_counts, vocabulary_table
from fusion.distill.store import Rows
from fusion.distill.targets import Blend, Fused, fuse_dialogue
from fusion.distill.teacher import Teacher
from fusion.errors import MismatchError


@dataclass(frozen=True)
class Token:
    """A token of a reply as its model spells it; `mark` is true for one that stands for no text, such as the end."""

    text: str
    mark: bool
    turn: int


@dataclass(frozen=True)
class Expected:
    """One entry of a distribution over the pivot's tokens; `gold` is the token that really follows."""

    text: str
    chance: float
    gold: bool


@dataclass(frozen=True)
class Heard:
    """One entry of the source's own top-k: its share of them, the pivot token it `becomes` (None: there is none), whether it is
    `kept` (of several with one pivot token only the first may be) and `respelt`: stands for a token with another text."""

    text: str
    chance: float
    becomes: str | None
    kept: bool
    respelt: bool


@dataclass(frozen=True)
class Position:
    """A label of the pivot: its `token`; the `source` label that is heard here (−1: none), predicted after the same text or, if
    `inside`, before a token that the pivot is in the middle of; the distributions of the pivot, of the source after mapping and
    after fusion, out of 1; the source's own words with the share that was `lost` on the way; their mass that was `read`, `kept`
    (0 where too little was), and lies on tokens that the pivot does not write (`unwritten`).

    `chosen`: 0 = pivot, 1 = source; `deciding`: the two losses that were compared, `nats`: what each lost on this very token
    (None = not to be had); `pieces`: the source's tokens for this one where they are several and it gets the chance of all.
    """

    token: Token
    source: int
    pivot: tuple[Expected, ...]
    mapped: tuple[Expected, ...]
    fused: tuple[Expected, ...]
    heard: tuple[Heard, ...]
    lost: float
    chosen: int
    deciding: tuple[float | None, float | None]
    nats: tuple[float | None, float | None]
    pieces: tuple[str, ...]
    inside: bool = False
    read: float = 0.0
    kept: float = 0.0
    unwritten: float = 0.0

    @property
    def respelt(self) -> float:
        """Share of the source's words that the pivot writes otherwise."""
        return sum(its.chance for its in self.heard if its.respelt)


@dataclass(frozen=True)
class Group:
    """Tokens that belong together and to no others: positions of `pivot` and `source`, and the `links` between them."""

    pivot: tuple[int, ...]
    source: tuple[int, ...]
    links: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AlignmentView:
    """A dialogue as pivot and source read it: the pivot's `positions`, the source's `tokens`, and the `groups` that link them."""

    names: tuple[str, str]
    blend: Blend
    positions: tuple[Position, ...]
    tokens: tuple[Token, ...]
    groups: tuple[Group, ...]

    @property
    def carried(self) -> float:
        """Share of the pivot's labels at which the source's distribution could stand."""
        return sum(bool(its.mapped) for its in self.positions) / max(len(self.positions), 1)

    @property
    def taken(self) -> float:
        """Share of the pivot's labels whose target is the source's."""
        return sum(its.chosen for its in self.positions) / max(len(self.positions), 1)

    @property
    def lost(self) -> float:
        """Mean share of the source's words that have no pivot token, over the labels where it is heard."""
        return self._mean([its.lost for its in self.positions if its.source >= 0])

    @property
    def respelt(self) -> float:
        """Mean share of the source's words that the pivot writes otherwise, over the labels where it is heard."""
        return self._mean([its.respelt for its in self.positions if its.source >= 0])

    @property
    def kept(self) -> float:
        """Mean mass of the source's words that the pivot's tokens have, out of 1, over the labels where it is heard."""
        return self._mean([its.kept for its in self.positions if its.source >= 0])

    @property
    def read(self) -> float:
        """Mean mass of the words that were read of the source, out of 1, over the labels where it is heard."""
        return self._mean([its.read for its in self.positions if its.source >= 0])

    @property
    def unwritten(self) -> float:
        """Mean mass of them on tokens that the pivot does not write for their own text, such as byte pieces."""
        return self._mean([its.unwritten for its in self.positions if its.source >= 0])

    @property
    def emptied(self) -> float:
        """Share of the labels where the source is heard, but too little of its words has a pivot token."""
        return self._mean([float(not its.mapped) for its in self.positions if its.source >= 0])

    @staticmethod
    def _mean(found: Sequence[float]) -> float:
        return sum(found) / len(found) if found else 0.0

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(self), **{name: getattr(self, name) for name in
                                   ("carried", "taken", "lost", "respelt", "read", "kept", "unwritten", "emptied")}}


def view(pivot: Teacher, source: Teacher, dialogue: Dialogue, blend: Blend | None = None, *, top_k: int = 10,
         names: tuple[str, str] = ("pivot", "source")) -> AlignmentView:
    """Align and fuse one dialogue and say what happened at every label.

    With mapping "statistics" the counts are of this dialogue alone. MismatchError when a model cannot show the dialogue as it
    is, RecipeError for an unknown word in `blend`.
    """
    blend = (blend or Blend()).check()
    both = [_encoded(teacher.encoder, dialogue, name) for teacher, name in zip((pivot, source), names, strict=True)]
    rows = [teacher.rows([its], top_k)[0] for teacher, its in zip((pivot, source), both, strict=True)]
    words = Vocabulary(pivot.encoder), Vocabulary(source.encoder)
    counts = pair_counts([tuple(both)], words) if blend.mapping in ("statistics", "fusechat") else None
    table = vocabulary_table(*words, blend, set(np.unique(rows[1].ids).tolist()), end_tokens(*both), counts)
    fused = fuse_dialogue((both[0], rows[0]), [(both[1], rows[1], table)], blend, [words])
    spelt = _Speller(pivot.encoder, words[0]), _Speller(source.encoder, words[1])
    positions = tuple(_position(i, both, rows[1], fused, spelt, blend) for i in range(len(both[0].labels)))
    tokens = tuple(spelt[1].token(both[1], j) for j in range(len(both[1].labels)))
    links = token_links(*both, words, blend.alignment)
    return AlignmentView(names, blend, positions, tokens, tuple(grouped(len(positions), len(tokens), links)))


def token_links(pivot: Encoded, source: Encoded, words: tuple[Vocabulary, Vocabulary] | None = None,
                alignment: str = "offsets") -> list[tuple[int, int]]:
    """Which tokens of two tokenisations share text, as (pivot label, source label): by the characters they cover, or as
    "warp" pairs them (needs `words`)."""
    if alignment == "warp":
        return [(i, j) for i, its in enumerate(link_labels(pivot, source, words, alignment).lists()) for j in its]
    mine, theirs = _spans(pivot), _spans(source)
    return [(i, j) for i, (turn, begin, end) in enumerate(mine) for j, (their_turn, their_begin, their_end) in enumerate(theirs)
            if turn == their_turn and max(begin, their_begin) < min(end, their_end)]


def grouped(pivot_count: int, source_count: int, links: Sequence[tuple[int, int]]) -> list[Group]:
    """Cut two linked sequences into the smallest pieces that no link crosses, in reading order."""
    linked, found, i, j = {j for _, j in links}, [], 0, 0
    while i < pivot_count or j < source_count:
        ends = [i, j + 1] if i == pivot_count or (j < source_count and j not in linked) else [i + 1, j]
        while True:  # grow until no link leaves the piece
            reach = [(a, b) for a, b in links if i <= a < ends[0] or j <= b < ends[1]]
            wider = [max([ends[0], *(a + 1 for a, _ in reach)]), max([ends[1], *(b + 1 for _, b in reach)])]
            if wider == ends:
                break
            ends = wider
        found.append(Group(tuple(range(i, ends[0])), tuple(range(j, ends[1])), tuple(reach)))
        i, j = ends
    return found


def _encoded(encoder: Encoder, dialogue: Dialogue, name: str) -> Encoded:
    encoded = encoder.encode(dialogue)
    encoder.check(dialogue, encoded)
    if not len(encoded.labels):
        raise MismatchError("nothing of the reply fits into the tokens it reads", where=name, todo="Give a shorter dialogue.")
    return encoded


def _spans(encoded: Encoded) -> list[tuple[int, int, int]]:
    """(turn, first character, one past the last) of every label in its reply; the end token stands after the text, and a token
    of no width (a further byte of a character) with that character."""
    spans = []
    for i, (turn, begin, end_token) in enumerate(zip(encoded.turn.tolist(), encoded.reached.tolist(), encoded.ends.tolist(),
                                                     strict=True)):
        follows = i + 1 < len(encoded.turn) and encoded.turn[i + 1] == turn
        begin = max(begin, 0)
        end = int(encoded.reached[i + 1]) if follows else begin + 1
        if end_token:
            begin, end = 1 << 40, (1 << 40) + 1  # beyond every text, the same place in both
        spans.append((turn, begin if end > begin else begin - 1, max(end, begin)))
    return spans


class _Speller:
    """Texts of token ids as people can read them."""

    def __init__(self, encoder: Encoder, words: Vocabulary):
        self._tokenizer, self._words = encoder.tokenizer, words

    def text(self, token_id: int) -> str:
        spelt = self._words.of([token_id])[0]
        # bytes that are no whole character are shown as escapes
        return spelt.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if spelt \
            else str(self._tokenizer.convert_ids_to_tokens(int(token_id)))

    def same(self, token_id: int, other: _Speller, its: int) -> bool:
        """Whether a token stands for the text of one of another model's; marks do not differ."""
        mine, theirs = self._words.of([token_id])[0], other._words.of([its])[0]
        return not mine or mine == theirs

    def writes(self, token_id: int) -> bool:
        """Whether this tokenizer ever writes a token: that is how it begins the token's own text. Marks, and parts of characters
        that nothing else stands for, count as written."""
        text = self._words.of([token_id])[0]
        whole = text and not any("\ud800" <= sign <= "\udfff" for sign in text)
        return not whole or self._words.begin(text) == token_id

    def token(self, encoded: Encoded, label: int) -> Token:
        token_id = int(encoded.targets[label])
        return Token(self.text(token_id), not self._words.of([token_id])[0], int(encoded.turn[label]))


def _position(i: int, both: Sequence[Encoded], rows: Rows, fused: Fused, spelt: tuple[_Speller, _Speller],
              blend: Blend) -> Position:
    carried, gold = fused.carried[0], int(both[0].targets[i])
    at = int(carried.at[i])
    heard = _heard(rows.ids[at], carried, i, spelt, blend) if at >= 0 else ()
    mine, theirs = (_entries(model, i, gold, spelt[0]) for model in fused.models)
    chances = list(zip(fused.ids[i].tolist(), fused.chances[i].tolist(), strict=True))
    whole = tuple(Expected(spelt[0].text(token), chance, token == gold) for token, chance in chances if token >= 0 and chance > 0)
    said = fused.models[1]
    odd = sum(chance for token, chance in zip(said.ids[i].tolist(), np.exp(said.logprobs[i].astype(float)).tolist(), strict=True)
              if token >= 0 and not spelt[0].writes(token))
    return Position(spelt[0].token(both[0], i), at, mine, theirs, whole, heard,
                    sum(its.chance for its in heard if not its.kept), int(fused.choice[i]),
                    tuple(_number(value) for value in fused.deciding[:, i]),
                    tuple(_number(model.nats[i]) for model in fused.models),
                    tuple(spelt[1].token(both[1], j).text for j in carried.pieces.get(i, ())),
                    bool(at >= 0 > fused.links[0].usable[i]), float(carried.read[i]),
                    float(carried.kept[i]) if carried.present[i] else 0.0, odd)


def _entries(model: Distributions, i: int, gold: int, spelt: _Speller) -> tuple[Expected, ...]:
    pairs = zip(model.ids[i].tolist(), np.exp(model.logprobs[i].astype(np.float64)).tolist(), strict=True)
    return tuple(Expected(spelt.text(token), chance, token == gold) for token, chance in pairs if token >= 0)


def _heard(ids: np.ndarray, carried: Carried, i: int, spelt: tuple[_Speller, _Speller], blend: Blend) -> tuple[Heard, ...]:
    found, seen = [], set()
    for token, mapped, chance in zip(ids.tolist(), carried.become[i].tolist(), carried.chance[i].tolist(), strict=True):
        if token < 0 or not chance > 0:  # not told by the source, or not possible after what the pivot has written
            continue
        kept = mapped >= 0 and (mapped not in seen or blend.sums)
        seen.add(mapped)
        becomes, respelt = spelt[0].text(mapped) if mapped >= 0 else None, kept and not spelt[1].same(token, spelt[0], mapped)
        found.append(Heard(spelt[1].text(token), chance / float(carried.read[i]), becomes, kept, respelt))
    return tuple(found)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
