"""From stored distributions to fused targets: align every source with the pivot, carry its distributions over, choose or mix.

The result says for every label of the pivot which tokens to expect and how much, and whose word it was. Price: one pass over
the stored rows; nothing is run through a model again, so another rule, mapping or a further source costs seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fusion.align import MAPPINGS, Alignment
from fusion.distill.carrying import Carried, carry, link_labels
from fusion.distill.encoding import Encoded
from fusion.distill.fuse import LEVELS, Distributions, fuse, unit_losses
from fusion.distill.spelling import Vocabulary, end_tokens, pair_counts, vocabulary_table
from fusion.distill.store import Rows
from fusion.errors import RecipeError, nearest

__all__ = ["ALIGNMENTS", "TAILS", "Blend", "Fused", "Vocabulary", "end_tokens", "fuse_dialogue", "link_labels", "pair_counts",
           "vocabulary_table"]
ALIGNMENTS = ("offsets", "warp")
TAILS = ("bucket", "renormalise")


@dataclass(frozen=True)
class Blend:
    """How distributions are aligned and fused; the defaults are exact where the papers approximate.

    `alignment` "offsets" (exact, equal reply texts) or "warp" (the papers' dynamic programme), `mapping` of the vocabulary
    (see `align.map_vocabulary`; with "spelling" a label also gets the chance that the source gives to its whole text, and a
    source is heard inside its tokens, see `carrying`), `rule` "mince" or "avgce", `level` at which losses are compared:
    "dialogue" (the paper), "turn" or "token". `per_character`: compare nats for equal text (right across vocabularies), as
    nats per token of the pivot, instead of per token of each model's own.
    `fallback` where nothing corresponds: the "pivot"'s own distribution or the "gold" label alone (the papers). `tail`: what
    the kept entries lack of 1 is a "bucket" of its own in the loss, or the entries are made to sum to 1 ("renormalise", the
    papers).
    """

    alignment: str = "offsets"
    mapping: str = "spelling"
    rule: str = "mince"
    level: str = "dialogue"
    per_character: bool = True
    fallback: str = "pivot"
    with_pivot: bool = True
    duplicates: str = "first"
    tail: str = "bucket"

    @property
    def sums(self) -> bool:
        """Whether the chances of source tokens with one pivot token are added up."""
        return self.duplicates == "sum" or self.mapping == "spelling"

    def check(self) -> Blend:
        """Return self, or raise RecipeError for the first unknown word."""
        known = {"alignment": ALIGNMENTS, "mapping": MAPPINGS, "rule": ("mince", "avgce"),
                 "level": LEVELS, "fallback": ("pivot", "gold"), "duplicates": ("first", "sum"), "tail": TAILS}
        for name, words in known.items():
            value = getattr(self, name)
            if value not in words:
                raise RecipeError(f"unknown {name} {value!r}", where=name, todo=nearest(str(value), words))
        return self


@dataclass(frozen=True)
class Fused:
    """Fused targets of one dialogue at the pivot's L labels.

    `ids` [L, K] (−1 = empty), `chances` [L, K] out of 1: what they lack is the chance of all other tokens, zeros are the gold
    label alone; `choice` [L] 0 = pivot, j = source j; `links` the label alignment with each source, `losses` [1 + J, turns]
    of every model, in nats per token of the pivot (or per token of each model's own), `models` what each of them said over
    pivot ids, `deciding` [1 + J, L] the losses that were compared at every label; `carried`: how each source's words came over.
    """

    ids: np.ndarray
    chances: np.ndarray
    choice: np.ndarray
    links: tuple[Alignment, ...] = field(repr=False)
    losses: np.ndarray
    models: tuple[Distributions, ...] = field(repr=False)
    deciding: np.ndarray = field(repr=False)
    carried: tuple[Carried, ...] = field(repr=False, default=())


def fuse_dialogue(pivot: tuple[Encoded, Rows], sources: Sequence[tuple[Encoded, Rows, np.ndarray]], blend: Blend,
                  words: Sequence[tuple[Vocabulary, Vocabulary]] = ()) -> Fused:
    """Fuse one dialogue: the pivot's (encoded, rows) and each source's (encoded, rows, vocabulary table).

    Without the `words` of (pivot, source) for every source, texts of tokens are not known: see `carrying.carry`.
    """
    encoded, own = pivot
    models = [Distributions(own.ids, _tailed(np.exp(own.logprobs.astype(np.float64)), blend), own.nats.astype(np.float64))]
    links, carried = [], []
    for j, (theirs, rows, table) in enumerate(sources):
        both = words[j] if words else None
        links.append(link_labels(encoded, theirs, both, blend.alignment))
        its = carry(links[-1], encoded, theirs, rows, table, both, mapping=blend.mapping, alignment=blend.alignment,
                    duplicates="sum" if blend.sums else "first")
        ids, chances = (np.where(its.present[:, None], values, none) for values, none in ((its.ids, -1), (its.chances, 0)))
        models.append(Distributions(ids, _tailed(chances, blend), _gold_nats(links[-1], encoded, theirs, rows)))
        carried.append(its)
    everyone = [(encoded, own), *((theirs, rows) for theirs, rows, _ in sources)]
    turns = int(encoded.turn.max(initial=-1)) + 1
    by_turn = _losses(everyone, [its.turn for its, _ in everyone], turns, blend)
    losses = _compared(models, by_turn, everyone, blend)
    if not blend.with_pivot and len(models) > 1:
        losses[0] = np.nan
    ids, chances, choice = fuse(models, losses, blend.rule)
    if blend.fallback == "gold":
        alone = ~np.any([model.present for model in models[1:]], axis=0) if len(models) > 1 else np.zeros(len(choice), bool)
        chances = np.where(alone[:, None], 0, chances)
    return Fused(ids, chances.astype(np.float32), choice, tuple(links), by_turn, tuple(models), losses, tuple(carried))


def _tailed(chances: np.ndarray, blend: Blend) -> np.ndarray:
    """Log-probabilities [L, k] of entries: out of 1, or renormalised to sum to 1."""
    total = chances.sum(axis=1, keepdims=True)
    whole = total if blend.tail == "renormalise" else np.maximum(total, 1.0)  # rounding may have brought them above 1
    with np.errstate(divide="ignore"):
        return np.log(chances / np.where(whole > 0, whole, 1.0)).astype(np.float32)


def _spelt(encoded: Encoded) -> np.ndarray:
    """Characters that each label adds to its reply, [L]; an end token counts as one."""
    if encoded.letters is not None:
        return np.where(encoded.ends, 1, encoded.letters)
    after = np.append(encoded.reached[1:], 0)
    last = np.append(encoded.turn[1:] != encoded.turn[:-1], True) if len(encoded.turn) else np.zeros(0, bool)
    return np.where(encoded.ends | last, 1, np.maximum(after - np.maximum(encoded.reached, 0), 0))


def _losses(everyone: Sequence[tuple[Encoded, Rows]], units: Sequence[np.ndarray], count: int, blend: Blend) -> np.ndarray:
    """The loss of every model in each of `count` units, [1 + J, count]; `units` [L] of each: the unit of its labels.

    Nats per character, times the characters that a token of the pivot has in that unit, so that models that read equal texts
    are compared, on the scale of the pivot's cross-entropy; or nats per token of each model's own.
    """
    if not blend.per_character:
        return np.stack([unit_losses(rows.nats, np.ones(len(unit)), unit, count)
                         for (_, rows), unit in zip(everyone, units, strict=True)])
    sizes = [_spelt(encoded) for encoded, _ in everyone]
    token = unit_losses(sizes[0], np.ones(len(units[0])), units[0], count)  # the pivot's characters a label
    return np.stack([token * unit_losses(rows.nats, size, unit, count)
                     for (_, rows), size, unit in zip(everyone, sizes, units, strict=True)])


def _compared(models: Sequence[Distributions], by_turn: np.ndarray, everyone: Sequence[tuple[Encoded, Rows]],
              blend: Blend) -> np.ndarray:
    """What decides at each of the pivot's labels: [1 + J, L]."""
    pivot = everyone[0][0]
    if blend.level == "token":
        return np.stack([model.nats for model in models])
    if blend.level == "turn":
        return by_turn[:, pivot.turn]
    whole = _losses(everyone, [np.zeros(len(encoded.labels), int) for encoded, _ in everyone], 1, blend)
    return np.repeat(whole, len(pivot.labels), axis=1)


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
