"""Distribution fusion: choose (MinCE) or mix (AvgCE) the distributions of several models, position by position: pure.

Whose word counts is decided by how well each model predicts the gold reply: by its cross-entropy there. Models with other
vocabularies cut the text into other tokens, so their cross-entropies are compared for equal text, per token of the pivot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("mince", "avgce")
LEVELS = ("dialogue", "turn", "token")


@dataclass(frozen=True)
class Distributions:
    """One model's distributions at the pivot's L label positions.

    `ids` [L, k] int32 over pivot ids (−1 = empty), `logprobs` [L, k] float32; what the entries lack of 1 is the chance of all
    other tokens, the tail; `nats` [L] float64: the model's own −log p of the gold text that each label stands for (NaN where
    nothing corresponds).
    """

    ids: np.ndarray
    logprobs: np.ndarray
    nats: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Which positions have a distribution, [L]."""
        return (self.ids >= 0).any(axis=1)


def rewards(loss: np.ndarray) -> np.ndarray:
    """exp(−loss): 1 for a model that is sure of the gold text, 0 for one that has no idea. Any shape."""
    return np.exp(-np.asarray(loss, np.float64))


def mixture_weights(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """AvgCE weights of J models from their mean losses [J, …]: the softmax of their rewards. Source: FuseLLM, arXiv 2401.10491."""
    reward = rewards(losses)
    reward = np.where(np.isnan(reward), -np.inf, reward)
    shifted = np.exp(reward - np.max(reward, axis=0))
    return shifted / shifted.sum(axis=0)


def unit_losses(nats: Sequence[float], characters: Sequence[int], unit: np.ndarray, count: int) -> np.ndarray:
    """Mean loss in each of `count` units, [count]: Σ nats ÷ Σ characters over the labels of a unit.

    `nats` [L] of one model at its own labels, `characters` [L] it spells there (an end token counts as one), or ones for a
    loss per token; `unit` [L] which unit (dialogue 0, or turn) a label belongs to. NaN for a unit without labels.
    """
    total = np.bincount(unit, weights=np.asarray(nats, np.float64), minlength=count)
    length = np.bincount(unit, weights=np.asarray(characters, np.float64), minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(length > 0, total / length, np.nan)


def fuse(models: Sequence[Distributions], losses: np.ndarray, rule: str = "mince") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fused targets at L positions: ids [L, K] int32 (−1 = empty), probabilities [L, K] float32, choice [L] int32.

    `models`: J candidates, the pivot first; `losses` [J, L]: what decides at each position (the loss of its dialogue, turn or
    token; NaN = not a candidate there). "mince" takes the whole distribution of the model with the lowest loss, the first of
    equals; "avgce" mixes all with `mixture_weights`; a token that one of them does not list counts as 0 there, so its tail stays
    in the tail. Only models that have a distribution at a position are candidates; the
    pivot always is one. `choice` is the chosen model, or the heaviest one. Source: FuseChat, arXiv 2402.16107, eq. 3.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    losses = np.where([model.present for model in models], losses, np.nan)
    lost = np.isnan(losses).all(axis=0)
    losses[0, lost] = 0.0
    choice = np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=0).astype(np.int32)
    if rule == "mince":
        ids, chances = _chosen(models, choice)
        return ids, chances, choice
    weights = mixture_weights(losses)
    ids, chances = _mixed(models, weights)
    return ids, chances, weights.argmax(axis=0).astype(np.int32)


def _chosen(models: Sequence[Distributions], choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = max(model.ids.shape[1] for model in models)
    ids, chances = np.full((len(choice), width), -1, np.int32), np.zeros((len(choice), width), np.float32)
    for j, model in enumerate(models):
        mine, k = choice == j, model.ids.shape[1]
        ids[mine, :k] = model.ids[mine]
        chances[mine, :k] = np.where(model.ids[mine] >= 0, np.exp(model.logprobs[mine]), 0)
    return ids, chances


def _mixed(models: Sequence[Distributions], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mixture over the union of all ids, the most probable first."""
    ids = np.concatenate([model.ids for model in models], axis=1)
    parts = [np.where(model.ids >= 0, np.exp(model.logprobs.astype(np.float64)), 0) * weights[j][:, None]
             for j, model in enumerate(models)]
    chances = np.concatenate(parts, axis=1)
    order = np.argsort(ids, axis=1, kind="stable")
    ids, chances = np.take_along_axis(ids, order, 1), np.take_along_axis(chances, order, 1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = np.cumsum(first, axis=1) - 1
    united, total = np.full(ids.shape, -1, np.int32), np.zeros(ids.shape)
    rows = np.arange(len(ids))[:, None]
    united[rows, slot] = ids
    np.add.at(total, (np.broadcast_to(rows, slot.shape), slot), np.where(ids >= 0, chances, 0))
    total[united < 0] = 0
    order = np.argsort(-total, axis=1, kind="stable")
    return np.take_along_axis(united, order, 1), np.take_along_axis(total, order, 1).astype(np.float32)
