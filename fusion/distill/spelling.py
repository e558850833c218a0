"""How a tokenizer writes texts: the surfaces of its ids, the token with which it begins a text, and what stands for a source's ids.

Price: a second for a vocabulary of 150,000 tokens, and about ten for a mapping of all of them; texts are cut in one go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from fusion.align import by_surface, byte_piece, count_pairs, map_vocabulary, surfaces, warp
from fusion.distill.encoding import Encoded, Encoder

# What stands before a text when it is cut: alone, some tokenizers put a space before it, or join its white space.
ANCHORS = ("", "\n", "a", ".", "1")


class Vocabulary:
    """The tokens of a tokenizer by id, as alignment compares them: `tokens` as its vocabulary has them, their `surfaces` (None
    for marks such as end-of-turn), and `pieces`: the ids of byte pieces, which stand for a text only if nothing else does."""

    def __init__(self, encoder: Encoder):
        self._tokenizer = tokenizer = encoder.tokenizer
        entries = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        texts = surfaces(entries, {token.content for token in added.values()})
        self.tokens: list[str | None] = [None] * (max(entries.values(), default=-1) + 1)
        self.surfaces: list[str | None] = [None] * len(self.tokens)
        for token, i in entries.items():
            self.tokens[i] = token
            self.surfaces[i] = None if i in special else texts[token]
        self.pieces = frozenset(i for token, i in entries.items() if i not in special and byte_piece(token) is not None)
        self._begun: dict[str, int] = {}

    @cached_property
    def by_surface(self) -> dict[str, int]:
        """The id that stands for a whole text."""
        return by_surface(self.surfaces, self.pieces)

    def of(self, ids: Sequence[int]) -> list[str]:
        """The surfaces of some ids; "" for marks."""
        return [self.surfaces[i] or "" if i < len(self.surfaces) else "" for i in ids]

    def bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of some ids; none for marks and for −1."""
        return [self._spelt[i] if 0 <= i < len(self._spelt) else b"" for i in ids]

    @cached_property
    def _spelt(self) -> list[bytes]:
        return [(text or "").encode("utf-8", "surrogateescape") for text in self.surfaces]

    def begin(self, text: str) -> int:
        """The id with which this tokenizer begins to write a text, −1 where it cannot write just that."""
        return self.begins([text])[0]

    def begins(self, texts: Sequence[str]) -> list[int]:
        """The id with which this tokenizer begins to write each text, −1 where it cannot write just that.

        A text is cut behind the first of `ANCHORS` that is cut as it is alone, with the bytes of the text after it.
        """
        left = list(dict.fromkeys(text for text in texts if text not in self._begun and _whole(text)))
        for anchor, before in zip(ANCHORS, self._anchors if left else (), strict=False):
            for text, ids in zip(left, self._cut([anchor + text for text in left]), strict=True):
                after = ids[len(before):]
                if after and ids[:len(before)] == before and b"".join(self.bytes(after)) == text.encode():
                    self._begun[text] = after[0]
            left = [text for text in left if text not in self._begun]
        self._begun.update(dict.fromkeys(left, -1))
        return [self._begun.get(text, -1) for text in texts]

    def go_on(self, rests: Sequence[bytes], spell: bool) -> list[int]:
        """The ids with which texts go on: the token for all of one, else (`spell`) the one with which it is begun; −1 for none.

        Inside a character that is the token of its other bytes, or else of the first of them.
        """
        texts = [rest.decode("utf-8", "surrogateescape") for rest in rests]
        found = [self.by_surface.get(text, -1) for text in texts]
        missing = [i for i, token in enumerate(found) if token < 0 and spell]
        for i, token in zip(missing, self.begins([texts[i] for i in missing]), strict=True):
            found[i] = token if token >= 0 else self._inside(rests[i])
        return found

    def _inside(self, rest: bytes) -> int:
        """The id with which a text goes on that begins with the last bytes of a character, −1 for none."""
        other = next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), len(rest))
        heads = (rest[:count].decode("utf-8", "surrogateescape") for count in (other, 1) if other)
        return next((self.by_surface[head] for head in heads if head in self.by_surface), -1)

    @cached_property
    def _anchors(self) -> list[list[int]]:
        return self._cut(list(ANCHORS))

    def _cut(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        self._tokenizer("", add_special_tokens=False)  # nothing is to be cut off or padded, whatever was before
        return [made.ids for made in self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _whole(text: str) -> bool:
    """Whether a text has whole characters only: no tokenizer takes bytes of one."""
    return bool(text) and not any("\ud800" <= sign <= "\udfff" for sign in text)


def vocabulary_table(pivot: Vocabulary, source: Vocabulary, blend, seen: set[int], ends: dict[int, int],
                     counts: Counter | None = None) -> np.ndarray:
    """Pivot id of every source id that was `seen`; `ends` maps the source's end tokens to the pivot's.

    `blend.mapping` says how, see `align.map_vocabulary`. Equal vocabularies are copied, as the papers do.
    """
    same = {i for i, (mine, theirs) in enumerate(zip(pivot.tokens, source.tokens, strict=False))
            if mine is not None and mine == theirs and pivot.surfaces[i] == source.surfaces[i]}
    mapping = "exact" if pivot.tokens == source.tokens else blend.mapping
    return map_vocabulary(source.surfaces, pivot.surfaces, mapping, counts=counts, forced=ends, begin=pivot.begins,
                          only=[i for i in seen if 0 <= i < len(source.surfaces)], same=same, last=pivot.pieces)


def pair_counts(pairs: Sequence[tuple[Encoded, Encoded]], words: tuple[Vocabulary, Vocabulary]) -> Counter:
    """Mapping statistics over a corpus: how often (pivot id, source id) were aligned by `warp`."""
    def aligned():
        for pivot, source in pairs:
            for turn in range(int(pivot.turn.max(initial=-1)) + 1):
                mine, theirs = pivot.targets[pivot.turn == turn], source.targets[source.turn == turn]
                if len(mine) and len(theirs):
                    yield warp(words[0].of(mine), words[1].of(theirs)), mine, theirs
    return count_pairs(aligned())


def end_tokens(pivot: Encoded, source: Encoded) -> dict[int, int]:
    """Which end token of the source stands for which of the pivot, read off the labels."""
    mine = {int(turn): int(token) for turn, token, end in zip(pivot.turn, pivot.targets, pivot.ends, strict=True) if end}
    return {int(token): mine[int(turn)] for turn, token, end in zip(source.turn, source.targets, source.ends, strict=True)
            if end and int(turn) in mine}
