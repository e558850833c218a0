"""Carry a source model's top-k distributions over to the pivot's positions and vocabulary.

What is carried over keeps its mass: chances are out of 1, and what they lack is the chance of everything else, the tail.
"""

from __future__ import annotations

import numpy as np

from fusion.align.sequence import Alignment

LEAST = 0.5  # of what a source said, so much must have a counterpart; below that its words are not its meaning


def remap(links: Alignment, ids: np.ndarray, logprobs: np.ndarray, table: np.ndarray, *, duplicates: str = "first",
          least: float = LEAST) -> tuple[np.ndarray, np.ndarray]:
    """Distributions over pivot ids for every pivot position: ids [M, k] int32 (−1 = empty), log-probabilities [M, k] float32.

    `ids`, `logprobs` [N, k]: a source's top-k at each of its positions, best first (position j predicts token j + 1), −1 for
    an empty place. `table` [V_source]: pivot id of every source id, −1 for none; ids beyond it have none. Mass without a
    counterpart goes to the tail; a position where less than the share `least` of the k entries' mass is left, or to which no
    source position corresponds, is empty: the pivot's own distribution is used there. `duplicates`: of source tokens with one
    pivot token keep the "first" (most probable; the papers) or their "sum". Source: FuseLLM, arXiv 2401.10491; FuseChat 2.0,
    arXiv 2408.07990.
    """
    count, k = len(links), ids.shape[1]
    found = np.full((count, k), -1, np.int32)
    chances = np.zeros((count, k))
    at = np.flatnonzero(links.usable >= 0)
    if len(at):
        theirs = ids[links.usable[at]]
        given = np.where(theirs >= 0, np.exp(logprobs[links.usable[at]].astype(np.float64)), 0)
        found[at], chances[at] = gathered(looked_up(table, theirs), given, duplicates)
        poor = at[chances[at].sum(axis=1) < least * given.sum(axis=1)]
        found[poor], chances[poor] = -1, 0
    with np.errstate(divide="ignore"):
        return found, np.log(chances).astype(np.float32)


def looked_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The pivot id of every source id, −1 for none. Models may have more rows than their tokenizers have tokens."""
    inside = (ids >= 0) & (ids < len(table))
    return np.where(inside, table[np.where(inside, ids, 0)], -1) if len(table) else np.full(ids.shape, -1, np.int32)


def gathered(mapped: np.ndarray, chances: np.ndarray, duplicates: str = "first") -> tuple[np.ndarray, np.ndarray]:
    """One entry for every pivot id, the most probable first: ids [M, k], chances [M, k], −1 and 0 where there is none.

    `mapped` [M, k]: a pivot id for each entry, −1 for none. `duplicates`: see `remap`.
    """
    if duplicates not in ("first", "sum"):
        raise ValueError(f"duplicates must be first or sum, not {duplicates!r}")
    mapped, chances = mapped.copy(), np.where(mapped >= 0, chances, 0.0)
    for column in range(1, mapped.shape[1]):  # k is small; rows are many
        same = (mapped[:, :column] == mapped[:, column:column + 1]) & (mapped[:, column:column + 1] >= 0)
        rows = np.flatnonzero(same.any(axis=1))
        if duplicates == "sum":
            chances[rows, same[rows].argmax(axis=1)] += chances[rows, column]
        mapped[rows, column], chances[rows, column] = -1, 0
    order = np.argsort(-chances, axis=1, kind="stable")
    mapped, chances = np.take_along_axis(mapped, order, 1), np.take_along_axis(chances, order, 1)
    return np.where(chances > 0, mapped, -1).astype(np.int32), chances


def tell(mapped: np.ndarray, chances: np.ndarray, gold: np.ndarray, first: np.ndarray, rest: np.ndarray
         ) -> tuple[np.ndarray, np.ndarray]:
    """Give the pivot's label the chance that a source gives to its whole text, however the source writes it.

    `mapped`, `chances` [M, k]: the source's entries and the pivot id of each, −1 for none; `gold` [M] the pivot's labels;
    `first` [M] the entry with which the source really begins the label's text, −1 where nothing is to be done; `rest` [M] −log p
    of the tokens with which it goes on to the label's end, 0 where there are none. The label's chance, chances[first] ·
    exp(−rest), is taken from that entry, which would otherwise teach the pivot to begin as the source does, and stands in a
    further entry: mapped, chances [M, k + 1].
    """
    rows = np.flatnonzero((first >= 0) & np.isfinite(rest))
    mapped = np.pad(mapped, ((0, 0), (0, 1)), constant_values=-1)
    chances = np.pad(np.asarray(chances, np.float64), ((0, 0), (0, 1)))
    given = chances[rows, first[rows]] * np.exp(-np.maximum(rest[rows], 0.0))
    chances[rows, first[rows]] -= given
    mapped[rows, -1], chances[rows, -1] = gold[rows], given
    return mapped, chances
