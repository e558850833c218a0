"""From stored distributions to fused targets: align every source with the pivot, carry its distributions over, choose or mix.

The result says for every label of the pivot which tokens to expect and how much, and whose word it was. Price: one pass over
the stored rows; nothing is run through a model again, so another rule, mapping or a further source costs seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fusion.align import MAPPINGS, Alignment, by_offsets, count_pairs, map_vocabulary, remap, surface, tell, tokenizer_kind, warp
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.fuse import LEVELS, Distributions, fuse, unit_losses
from fusion.distill.store import Rows
from fusion.errors import RecipeError, nearest

ALIGNMENTS = ("offsets", "warp")


@dataclass(frozen=True)
class Blend:
    """How distributions are aligned and fused; the defaults are exact where the papers approximate.

    `alignment` "offsets" (exact, equal reply texts) or "warp" (the papers' dynamic programme), `mapping` of the vocabulary
    (see `align.map_vocabulary`; with "spelling" a label that the source writes in several tokens also gets the chance of all of
    them, see `align.tell`), `rule` "mince" or "avgce", `level` at which losses are compared: "dialogue" (the paper),
    "turn" or "token". `per_character`: compare nats per character (right across vocabularies) instead of per token.
    `fallback` where nothing corresponds: the "pivot"'s own distribution or the "gold" label alone (the papers).
    """

    alignment: str = "offsets"
    mapping: str = "spelling"
    rule: str = "mince"
    level: str = "dialogue"
    per_character: bool = True
    fallback: str = "pivot"
    with_pivot: bool = True
    duplicates: str = "first"

    @property
    def sums(self) -> bool:
        """Whether the chances of source tokens with one pivot token are added up."""
        return self.duplicates == "sum" or self.mapping == "spelling"

    def check(self) -> Blend:
        """Return self, or raise RecipeError for the first unknown word."""
        known = {"alignment": ALIGNMENTS, "mapping": MAPPINGS, "rule": ("mince", "avgce"),
                 "level": LEVELS, "fallback": ("pivot", "gold"), "duplicates": ("first", "sum")}
        for name, words in known.items():
            value = getattr(self, name)
            if value not in words:
                raise RecipeError(f"unknown {name} {value!r}", where=name, todo=nearest(str(value), words))
        return self


@dataclass(frozen=True)
class Fused:
    """Fused targets of one dialogue at the pivot's L labels.

    `ids` [L, K] (−1 = empty), `chances` [L, K] sum to 1 or are 0 (gold label alone); `choice` [L] 0 = pivot, j = source j;
    `links` the label alignment with each source, `losses` [1 + J, turns] nats per character (or token) of every model,
    `models` what each of them said over pivot ids, `deciding` [1 + J, L] the losses that were compared at every label.
    """

    ids: np.ndarray
    chances: np.ndarray
    choice: np.ndarray
    links: tuple[Alignment, ...] = field(repr=False)
    losses: np.ndarray
    models: tuple[Distributions, ...] = field(repr=False)
    deciding: np.ndarray = field(repr=False)


class Vocabulary:
    """The surfaces of a tokenizer's ids and its end tokens, as alignment compares them."""

    def __init__(self, encoder: Encoder):
        self._tokenizer = tokenizer = encoder.tokenizer
        entries = tokenizer.get_vocab()
        kind = tokenizer_kind(entries)
        self.surfaces: list[str | None] = [None] * (max(entries.values(), default=-1) + 1)
        special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for token, i in entries.items():
            if i not in special:
                self.surfaces[i] = surface(token, kind)

    def begin(self, text: str) -> int:
        """The id with which this tokenizer begins to write a text, −1 where it cannot write just that."""
        if any("\udc80" <= sign <= "\udcff" for sign in text):  # bytes that are no whole character: no tokenizer takes them
            return -1
        for written in (text, text.removeprefix(" ")):  # some put a space before every text
            ids = self._tokenizer(written, add_special_tokens=False)["input_ids"] if written else []
            if ids and "".join(self.of(ids)) == text:
                return ids[0]
        return -1

    def of(self, ids: np.ndarray) -> list[str]:
        """The surfaces of some ids; "" for marks."""
        return [self.surfaces[i] or "" if i < len(self.surfaces) else "" for i in ids]


def link_labels(pivot: Encoded, source: Encoded, words: tuple[Vocabulary, Vocabulary] | None = None,
                alignment: str = "offsets") -> Alignment:
    """Align the labels of one dialogue in two tokenisations: `usable[i]` is the source label predicted after the same text.

    "warp" needs the `words` of pivot and source. Replies are aligned one by one, so an error cannot run on.
    """
    lists: list[list[int]] = []
    usable: list[int] = []
    for turn in range(int(pivot.turn.max(initial=-1)) + 1):
        mine, theirs = np.flatnonzero(pivot.turn == turn), np.flatnonzero(source.turn == turn)
        if not len(theirs):
            lists += [[] for _ in mine]
            usable += [-1] * len(mine)
            continue
        if alignment == "offsets":
            part = by_offsets(pivot.reached[mine], source.reached[theirs])
        else:
            part = _warped(pivot, source, mine, theirs, words)
        lists += [[int(theirs[j]) for j in its] for its in part.lists()]
        usable += [int(theirs[j]) if j >= 0 else -1 for j in part.usable]
    starts = np.concatenate(([0], np.cumsum([len(its) for its in lists]))).astype(np.int32)
    return Alignment(starts, np.array([j for its in lists for j in its], np.int32), np.array(usable, np.int32))


def _warped(pivot: Encoded, source: Encoded, mine: np.ndarray, theirs: np.ndarray,
            words: tuple[Vocabulary, Vocabulary]) -> Alignment:
    """Warp the tokens, then move on by one: what stands after token i predicts label i + 1."""
    ended = pivot.ends[mine[-1]] and source.ends[theirs[-1]]
    pairs = [(len(mine) - 1, len(theirs) - 1)] if ended else []
    links = warp(words[0].of(pivot.targets[mine]), words[1].of(source.targets[theirs]), pairs=pairs)
    usable = np.full(len(mine), -1, np.int32)
    usable[0] = 0
    after = links.usable[:-1]
    usable[1:] = np.where((after >= 0) & (after + 1 < len(theirs)), after + 1, -1)
    return Alignment(links.starts, links.sources, usable)


def vocabulary_table(pivot: Vocabulary, source: Vocabulary, blend: Blend, seen: set[int], ends: dict[int, int],
                     counts: Counter | None = None) -> np.ndarray:
    """Pivot id of every source id that was `seen`; `ends` maps the source's end tokens to the pivot's."""
    return map_vocabulary(source.surfaces, pivot.surfaces, blend.mapping, counts=counts, forced=ends,
                          begin=pivot.begin, only=[i for i in seen if 0 <= i < len(source.surfaces)])


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


def fuse_dialogue(pivot: tuple[Encoded, Rows], sources: Sequence[tuple[Encoded, Rows, np.ndarray]], blend: Blend,
                  words: Sequence[tuple[Vocabulary, Vocabulary]] = ()) -> Fused:
    """Fuse one dialogue: the pivot's (encoded, rows) and each source's (encoded, rows, vocabulary table)."""
    encoded, own = pivot
    models = [Distributions(own.ids, _whole(own.logprobs), own.nats.astype(np.float64))]
    links = []
    for j, (theirs, rows, table) in enumerate(sources):
        link = link_labels(encoded, theirs, words[j] if words else None, blend.alignment)
        ids, logprobs = remap(link, rows.ids, rows.logprobs, table, duplicates="sum" if blend.sums else "first")
        if blend.mapping == "spelling":
            ids, logprobs = tell(ids, logprobs, encoded.targets, *_begun(link, encoded, theirs, rows, table))
        models.append(Distributions(ids, logprobs, _gold_nats(link, encoded, theirs, rows)))
        links.append(link)
    turns = int(encoded.turn.max(initial=-1)) + 1
    by_turn = np.stack([_turn_losses(its, rows, turns, blend) for its, rows in
                        [(encoded, own), *((theirs, rows) for theirs, rows, _ in sources)]])
    losses = _compared(models, by_turn, encoded, [encoded, *(theirs for theirs, _, _ in sources)],
                       [own, *(rows for _, rows, _ in sources)], blend)
    if not blend.with_pivot and len(models) > 1:
        losses[0] = np.nan
    ids, chances, choice = fuse(models, losses, blend.rule)
    if blend.fallback == "gold":
        alone = ~np.any([model.present for model in models[1:]], axis=0) if len(models) > 1 else np.zeros(len(choice), bool)
        chances = np.where(alone[:, None], 0, chances)
    return Fused(ids, chances.astype(np.float32), choice, tuple(links), by_turn, tuple(models), losses)


def _whole(logprobs: np.ndarray) -> np.ndarray:
    """The kept entries renormalised to sum to 1, [L, k]."""
    values = logprobs.astype(np.float64)
    return (values - np.logaddexp.reduce(values, axis=1, keepdims=True)).astype(np.float32)


def _spelt(encoded: Encoded) -> np.ndarray:
    """Characters that each label adds to its reply, [L]; an end token counts as one."""
    if encoded.letters is not None:
        return np.where(encoded.ends, 1, encoded.letters)
    after = np.append(encoded.reached[1:], 0)
    last = np.append(encoded.turn[1:] != encoded.turn[:-1], True) if len(encoded.turn) else np.zeros(0, bool)
    return np.where(encoded.ends | last, 1, np.maximum(after - np.maximum(encoded.reached, 0), 0))


def _turn_losses(encoded: Encoded, rows: Rows, turns: int, blend: Blend) -> np.ndarray:
    size = _spelt(encoded) if blend.per_character else np.ones(len(encoded.labels))
    return unit_losses(rows.nats, size, encoded.turn, turns)


def _compared(models: Sequence[Distributions], by_turn: np.ndarray, pivot: Encoded, encoded: Sequence[Encoded],
              rows: Sequence[Rows], blend: Blend) -> np.ndarray:
    """What decides at each of the pivot's labels: [1 + J, L]."""
    if blend.level == "token":
        return np.stack([model.nats for model in models])
    if blend.level == "turn":
        return by_turn[:, pivot.turn]
    whole = []
    for its, row in zip(encoded, rows, strict=True):
        size = _spelt(its) if blend.per_character else np.ones(len(its.labels))
        whole.append(unit_losses(row.nats, size, np.zeros(len(its.labels), int), 1)[0])
    return np.repeat(np.array(whole)[:, None], len(pivot.labels), axis=1)


def cut_labels(link: Alignment, pivot: Encoded, source: Encoded) -> dict[int, range]:
    """The labels of the pivot that the source writes in several tokens: number → the source's labels, the last of which may
    reach beyond."""
    ending = {int(turn): i + 1 for i, turn in enumerate(source.turn)}  # one past the last label of every reply
    found = {}
    for i in np.flatnonzero(link.usable[:-1] >= 0):
        begin, turn = int(link.usable[i]), int(pivot.turn[i])
        if pivot.turn[i + 1] == turn:
            stop = begin + 1 + int(np.searchsorted(source.reached[begin + 1:ending[turn]], pivot.reached[i + 1]))
            if stop - begin > 1:
                found[int(i)] = range(begin, stop)
    return found


def _begun(link: Alignment, pivot: Encoded, source: Encoded, rows: Rows, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every label that the source cuts: the pivot id of the first piece, [L], −1 elsewhere; −log p of all pieces, [L]: of
    that text, or at least of one that begins so."""
    running = np.concatenate(([0.0], np.cumsum(rows.nats, dtype=np.float64)))
    first, nats = np.full(len(link), -1, np.int64), np.full(len(link), np.nan)
    for i, pieces in cut_labels(link, pivot, source).items():
        token = source.targets[pieces.start]
        if token < len(table):
            first[i], nats[i] = table[token], running[pieces.stop] - running[pieces.start]
    return first, nats


def _gold_nats(link: Alignment, pivot: Encoded, source: Encoded, rows: Rows) -> np.ndarray:
    """The source's −log p of the text that each pivot label stands for, [L]; NaN unless both its ends correspond."""
    running = np.concatenate(([0.0], np.cumsum(rows.nats, dtype=np.float64)))
    begin = link.usable.astype(np.int64)
    last = np.append(pivot.turn[1:] != pivot.turn[:-1], True) if len(begin) else np.zeros(0, bool)
    stop = np.append(begin[1:], -1)
    ending = {int(turn): i + 1 for i, turn in enumerate(source.turn)}  # one past the last label of every reply
    whole = {int(turn) for turn in source.turn[source.ends]}
    for i in np.flatnonzero(last):
        turn = int(pivot.turn[i])
        stop[i] = ending[turn] if pivot.ends[i] and turn in whole else -1
    known = (begin >= 0) & (stop > begin)
    return np.where(known, running[np.maximum(stop, 0)] - running[np.maximum(begin, 0)], np.nan)
