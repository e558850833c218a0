"""What a closer look adds to the heatmap: five more quantities, the cards they stand on, and the red flags in words.

Numbers come from `fusion.inspection`; nothing is measured here. Some belong to a target, some to a pair, some to all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from components.state import COLORS, LETTERS
from fusion import GRANULARITIES, place
from fusion.inspection import Inspection

QUANTITIES = ("relative", "stable_rank", "lost", "cosine", "conflict")
MAX_FLAGS = 3
_CONFLICT, _LOST, _COSINE, _FAR = 0.3, 0.05, -0.05, 0.5  # from here on a number is worth a sentence
_ALL = "#64748b"  # the card of all targets together
_WHERE = {"embedding": "the embedding", "head": "the head", "norm": "the norms", "mlp": "the MLPs", "attention": "attention",
          "other": "the other matrices"}


@dataclass(frozen=True)
class Card:
    """One card of the heatmap: its title, letters and colours, the target it stands for (None: several), [T] values and one
    number of the whole model (NaN where there is none)."""

    title: str
    letters: str
    colors: tuple[str, ...]
    target: int | None
    values: np.ndarray
    whole: float


@dataclass(frozen=True)
class Closer:
    """The cards of every quantity; `dtype` is what rounding is judged for, `cosines` [T, J, J] of the task vectors."""

    dtype: str
    cards: dict[str, tuple[Card, ...]]

    def column(self, quantity: str, card: int = 0) -> np.ndarray:
        """The values of one card, [T]."""
        return self.cards[quantity][card].values


def closer_look(report: Inspection, titles: Sequence[str], granularity: str) -> Closer:
    """Lay an inspection out in cards at a granularity; stable ranks stay those of single matrices."""
    unit = "matrix" if granularity == GRANULARITIES[-1] else granularity  # single parameters would be a map of the whole model
    pairs = [(i, j) for i in range(len(titles)) for j in range(i + 1, len(titles))]
    cosines, whole_cosines = report.cosines(unit), report.cosines("model")

    def own(quantity: str, unit: str = unit) -> list[Card]:
        values = report.values(quantity, unit)
        whole = report.values(quantity, "model")[0] if quantity != "stable_rank" else _middle(values)
        return [Card(title, LETTERS[j], (COLORS[j],), j, values[:, j], float(whole[j])) for j, title in enumerate(titles)]

    def together(quantity: str, title: str) -> Card:
        return Card(title, LETTERS[:len(titles)], COLORS[:len(titles)], None, report.values(quantity, unit),
                    float(report.values(quantity, "model")[0]))

    cards = {"relative": own("relative"), "lost": own("lost"),
             "cosine": [Card(f"{titles[i]} and {titles[j]}", LETTERS[i] + LETTERS[j], (COLORS[i], COLORS[j]), None,
                             cosines[:, i, j], float(whole_cosines[0, i, j])) for i, j in pairs],
             "conflict": [together("conflict", "All targets")] if pairs else []}
    if pairs:
        cards["lost"].append(together("mean_lost", "Their plain average"))
    if report.sigma is not None:
        cards["stable_rank"] = own("stable_rank", "matrix")
    return Closer(report.dtype, {name: tuple(cards[name]) for name in QUANTITIES if cards.get(name)})


def _middle(values: np.ndarray) -> np.ndarray:
    """The median over tensors, [J]; NaN where all are."""
    return np.array([np.median(column[np.isfinite(column)]) if np.isfinite(column).any() else np.nan for column in values.T])


def red_flags(report: Inspection, titles: Sequence[str]) -> list[str]:
    """What a person should know before merging, the most striking first, at most MAX_FLAGS sentences."""
    found = [*_still(report, titles), *_conflicts(report), *_losses(report, titles), *_directions(report),
             *_distances(report, titles)]
    return [text for _, text in sorted(found, key=lambda one: -one[0])[:MAX_FLAGS]]


def _still(report: Inspection, titles: Sequence[str]):
    moved = report.changed.sum(axis=0)
    yield from ((9.0, f"{LETTERS[j]} ({title}) is the pivot: no number of it differs.") for j, title in enumerate(titles)
                if not moved[j])


def _conflicts(report: Inspection):
    """The kind of matrix in which the targets disagree most."""
    if len(report.targets) < 2:
        return
    kinds, moved, against = np.array([place(name).kind for name in report.names]), report.moved, report.conflict
    shares = {kind: against[kinds == kind].sum() / moved[kinds == kind].sum() for kind in dict.fromkeys(kinds)
              if moved[kinds == kind].sum()}
    if shares and (worst := max(shares, key=shares.__getitem__)) and shares[worst] >= _CONFLICT:
        chance = 1 - 2 ** (1 - len(report.targets))
        yield shares[worst] / chance, (f"The targets disagree in sign on {shares[worst]:.0%} of {_WHERE.get(worst, worst)}; "
                                       f"changes without any relation would give {chance:.0%}.")


def _losses(report: Inspection, titles: Sequence[str]):
    """Whose change suffers most from rounding."""
    losses = {f"{LETTERS[j]}'s change": float(report.values("lost", "model")[0, j]) for j in range(len(titles))}
    if len(titles) > 1:
        losses["the change of their plain average"] = float(report.values("mean_lost", "model")[0])
    whose = max(losses, key=losses.__getitem__)
    if losses[whose] >= _LOST:
        yield 1 + losses[whose], f"Rounding to {report.dtype} loses {losses[whose]:.0%} of {whose}; a float32 result keeps it."


def _directions(report: Inspection):
    cosines = report.cosines("model")[0]
    pairs = [(cosines[i, j], i, j) for i in range(len(cosines)) for j in range(i + 1, len(cosines)) if cosines[i, j] <= _COSINE]
    if pairs:
        cosine, i, j = min(pairs)
        yield 1 - cosine, f"{LETTERS[i]} and {LETTERS[j]} pull against each other: the cosine of their changes is {cosine:.2f}."


def _distances(report: Inspection, titles: Sequence[str]):
    moved = report.values("relative", "model")[0]
    far = int(np.nanargmax(np.nan_to_num(moved)))
    if moved[far] >= _FAR:
        yield 0.5 + moved[far], (f"{LETTERS[far]} ({titles[far]}) lies {moved[far]:.0%} of the pivot's norm away from it, "
                                 "farther than fine-tunes usually do.")
