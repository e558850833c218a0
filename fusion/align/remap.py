"""Carry a source model's top-k distributions over to the pivot's positions and vocabulary."""

from __future__ import annotations

import numpy as np

from fusion.align.sequence import Alignment

ROOM = 0.1  # what may be dropped for the true label: the least of ten entries never has more


def remap(links: Alignment, ids: np.ndarray, logprobs: np.ndarray, table: np.ndarray, *,
          duplicates: str = "first") -> tuple[np.ndarray, np.ndarray]:
    """Distributions over pivot ids for every pivot position: ids [M, k] int32 (−1 = empty), log-probabilities [M, k] float32.

    `ids`, `logprobs` [N, k]: a source's top-k at each of its positions, best first (position j predicts token j + 1), −1 for
    an empty place. `table` [V_source]: pivot id of every source id, −1 for none; ids beyond it have none. Mass without a
    counterpart is dropped and the rest renormalised; a position where nothing is left, or to which no source position
    corresponds, is empty: the pivot's own distribution is used there. `duplicates`: of source tokens with one pivot token keep
    the "first" (most probable; the papers) or their "sum". Source: FuseLLM, arXiv 2401.10491; FuseChat 2.0, arXiv 2408.07990.
    """
    if duplicates not in ("first", "sum"):
        raise ValueError(f"duplicates must be first or sum, not {duplicates!r}")
    count, k = len(links), ids.shape[1]
    found = np.full((count, k), -1, np.int32)
    chances = np.full((count, k), -np.inf, np.float64)
    at = np.flatnonzero(links.usable >= 0)
    if not len(at):
        return found, chances.astype(np.float32)
    theirs = links.usable[at]
    given, chance = ids[theirs], logprobs[theirs].astype(np.float64)
    inside = (given >= 0) & (given < len(table))  # models may have more rows than their tokenizers have tokens
    mapped = np.where(inside, table[np.where(inside, given, 0)], -1) if len(table) else np.full(given.shape, -1, np.int32)
    chance = np.where(mapped >= 0, chance, -np.inf)
    for column in range(1, k):  # k is small; rows are many
        same = (mapped[:, :column] == mapped[:, column:column + 1]) & (mapped[:, column:column + 1] >= 0)
        rows = np.flatnonzero(same.any(axis=1))
        if duplicates == "sum":
            first = same[rows].argmax(axis=1)
            chance[rows, first] = np.logaddexp(chance[rows, first], chance[rows, column])
        mapped[rows, column], chance[rows, column] = -1, -np.inf
    order = np.argsort(-chance, axis=1, kind="stable")
    mapped, chance = np.take_along_axis(mapped, order, 1), np.take_along_axis(chance, order, 1)
    total = np.logaddexp.reduce(chance, axis=1, keepdims=True)
    whole = np.isfinite(total[:, 0])
    found[at[whole]] = np.where(np.isfinite(chance), mapped, -1)[whole]
    chances[at[whole]] = (chance - np.where(np.isfinite(total), total, 0))[whole]
    return found, chances.astype(np.float32)


def tell(ids: np.ndarray, logprobs: np.ndarray, gold: np.ndarray, first: np.ndarray, nats: np.ndarray
         ) -> tuple[np.ndarray, np.ndarray]:
    """Give the pivot's label the chance that a source gives to its whole text, where it writes that in several tokens.

    `ids`, `logprobs` [M, k] as from `remap`; `gold` [M] the pivot's labels; `first` [M] the pivot id of the token with which
    the source begins them, −1 where nothing is to be done; `nats` [M] −log p of all its tokens there. The chance is taken from
    that one, which would otherwise teach the pivot to begin as the source does; where there is no room, the least probable entry
    makes it if it is less probable than the label or has less than `ROOM`.
    """
    ids, chances = ids.copy(), np.where(ids >= 0, np.exp(logprobs.astype(np.float64)), 0)
    for i in np.flatnonzero((first >= 0) & (first != gold) & np.isfinite(nats)):
        begun, known = np.flatnonzero(ids[i] == first[i]), np.flatnonzero(ids[i] == gold[i])
        if not len(begun):
            continue
        given, left = min(float(np.exp(-nats[i])), chances[i, begun[0]]), chances[i].copy()
        left[begun[0]] -= given
        place = known[0] if len(known) else int(np.argmin(left))
        if len(known) or left[place] < max(given, ROOM):
            left[place] = given + (left[place] if len(known) else 0)
            ids[i, place], chances[i] = gold[i], left / left.sum()
    order = np.argsort(-chances, axis=1, kind="stable")
    ids, chances = np.take_along_axis(ids, order, 1), np.take_along_axis(chances, order, 1)
    with np.errstate(divide="ignore"):
        return np.where(chances > 0, ids, -1).astype(np.int32), np.log(chances).astype(np.float32)
