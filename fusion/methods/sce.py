"""SCE: select where the targets differ most, calculate their weights from the changes there, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import numpy as np

from fusion import compiled
from fusion.methods.lanes import lane_squares
from fusion.methods.method import About
from fusion.methods.pipeline import NO_TABLE, TABLED, KeepAll, agreeing_weights, changes, elected, majority, sum_agreeing
from fusion.methods.select import Cut, Selection, Top, magnitude_bits
from fusion.methods.stack import Stack, steady, stored

Divide = Callable[[np.ndarray], np.ndarray]
DIVIDE: dict[str, Divide | None] = {  # what the sum of the surviving weights is divided by
    "paper": None,
    "mergekit": lambda sums: np.maximum(sums, 1e-6),
    "authors": lambda sums: np.where(sums == 0, 1.0, sums),
}


def sce(tensor: Stack, weights: np.ndarray, *,
        select_topk: Annotated[float, About("Share of the numbers that differ between targets whose changes are kept: those "
                                            "that differ most.", low=0, high=1)] = 1.0,
        compat: Annotated[Literal["paper", "mergekit", "authors"],
                          About("As the paper defines it, or as mergekit or the authors' released code compute it.")] = "paper",
        ) -> Iterator[np.ndarray]:
    """Φ = θ₀ + Σⱼ ηⱼ·δ′ⱼ: δ̂ⱼ = the changes where their variance over the targets is among the int(τ·n) largest, n of which are
    not 0; ηⱼ = Σδ̂ⱼ² / ΣᵢΣδ̂ᵢ²; δ′ⱼ = δ̂ⱼ where it has the sign of Σᵢδ̂ᵢ (0 counts as +). Source: FuseChat, arXiv 2408.07990.

    At least one number is selected where τ > 0, and all are where no number differs between targets (one target, or equal
    ones): there is nothing to select by. ηⱼ are the shares of variation however small the changes are.

    `compat` "mergekit": divides by the sum of the surviving η (at least 1e-6), takes equal η when the mean squares sum to
    less than 1e-6, as they do for ordinary fine-tunes, and int(τ·n) = 0 selects nothing. "authors": the same division, but
    the selection only affects η, the changes of all numbers are merged; equal η when all changes are 0.
    """
    cut = select(tensor, select_topk, compat) if select_topk < 1 else None
    eta = shares_of(*energies(tensor, cut), compat)
    if cut is None and len(eta) <= TABLED:
        divide = DIVIDE[compat]
        yield from elected(tensor, eta, agreeing_weights(eta, divide) if divide else NO_TABLE, KeepAll(), vote_first=True)
        return
    top = Top(cut) if cut and compat != "authors" else None
    for block in steady(tensor):
        deltas = np.subtract(block.models, block.pivot, out=block.models)
        if top:
            deltas *= top.mask(spread_bits(deltas))
        sign = majority(deltas)
        deltas *= eta.astype(np.float32)[:, None]
        merged = sum_agreeing(deltas, sign, eta, DIVIDE[compat])
        merged += block.pivot
        yield merged


def select(tensor: Stack, topk: float, compat: str) -> Cut | None:
    """Where the variances that are selected end, exactly; None = all are selected."""
    chosen, differ = Selection(), 0
    for deltas in changes(tensor):
        bits = spread_bits(deltas)
        differ += int(np.count_nonzero(bits))
        chosen.count(bits)
    if compat == "paper":
        if not differ:
            return None
        count = max(1, int(topk * differ)) if topk > 0 else 0
    else:
        count = int(np.float32(differ) * np.float32(topk))  # as torch rounds it
    chosen.aim([count])
    for deltas in changes(tensor):
        chosen.refine(spread_bits(deltas))
    return chosen.cuts()[0]


def spread_bits(deltas: np.ndarray) -> np.ndarray:
    """The bits of the standard deviation over the targets of every element of [J, n], which sort as the variances do."""
    spread = np.empty(deltas.shape[1], np.float32)
    compiled.loops().spread(np.ascontiguousarray(deltas), spread)
    return magnitude_bits(spread)


def energies(tensor: Stack, cut: Cut | None) -> tuple[np.ndarray, int]:
    """Σδ̂ⱼ² of the selected changes [J] in float64, and the number of elements."""
    total, size = np.zeros(tensor.count), math.prod(tensor.shape)
    if cut is None:
        for part in stored(tensor):
            part.run("squares", total)
        return total, size
    top = Top(cut)
    for deltas in changes(tensor):
        deltas *= top.mask(spread_bits(deltas))
        total += [lane_squares(its) for its in deltas]
    return total, size


def shares_of(energy: np.ndarray, size: int, compat: str) -> np.ndarray:
    """η [J] from the energies; equal shares where they are 0 (for mergekit: where their means sum to less than 1e-6)."""
    total = energy.sum()
    if total <= 0 or (compat == "mergekit" and total / size < 1e-6):
        return np.full(len(energy), 1 / len(energy))
    return energy / total
