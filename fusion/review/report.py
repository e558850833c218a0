"""A review as plain data, and the findings in words that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.anatomy import place
from fusion.inspection.report import plain, share
from fusion.preflight import LEVELS, Finding
from fusion.review.smoke import Answer
from fusion.review.tokens import RoundTrip

_FAR, _ROUNDED = 0.05, 0.25  # of the parents' own spread; of the merge's change: from here on they are worth a warning


@dataclass(frozen=True)
class Review:
    """A merge beside its P parents (the pivot first), for the T tensors that all of them have in one shape.

    `parts` [T, P] which parents take part; `square` [T, P] Σ (result − parent)², `parent_square` [T, P]; `hull` [T] distance to
    the nearest mix of the parents (less what rounding explains) ÷ largest distance of a target from the pivot, `mix` [T, P]
    that mix; `beyond` [T] share of elements outside the range of the parents' values; `lost` [T] ‖stored − exact‖ ÷ ‖exact −
    pivot‖ of the merge in float32, None when it was not run again; `parameters` and `tied` of pivot and result; `nonfinite`
    tensor → NaN or Inf in it; `reshaped`: the recipe changes layers or vocabulary; `averages`: its weights are shares of one,
    or it is not known; `tokens` None without tokenizer.json, empty when it is broken; `answers` None when it was not asked.
    """

    folder: Path
    name: str
    parents: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    numel: np.ndarray
    parts: np.ndarray
    square: np.ndarray
    parent_square: np.ndarray
    hull: np.ndarray
    mix: np.ndarray
    beyond: np.ndarray
    lost: np.ndarray | None
    lost_total: float | None
    parameters: tuple[int, int]
    tied: tuple[bool, bool]
    dtype: str
    nonfinite: dict[str, int]
    reshaped: bool
    averages: bool
    left_out: tuple[str, ...]
    tokens: tuple[RoundTrip, ...] | None = None
    donor_tokens: tuple[RoundTrip, ...] | None = None
    answers: tuple[Answer, ...] | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def distance(self) -> np.ndarray:
        """‖result − parent‖ ÷ ‖parent‖ of every tensor, [T, P]; NaN for a parent without part, or of zeros."""
        return np.where(self.parts, np.sqrt(share(self.square, self.parent_square)), np.nan)

    @property
    def totals(self) -> np.ndarray:
        """The same over all tensors in which the parent takes part, [P]."""
        return np.sqrt(share((self.square * self.parts).sum(axis=0), (self.parent_square * self.parts).sum(axis=0)))

    @property
    def level(self) -> str:
        """The worst level of all findings."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="good")

    def rows(self) -> list[dict]:
        """One plain dict per tensor; numbers that are undefined are None."""
        distance = self.distance
        return [{"tensor": name, "layer": place(name).layer, "module": place(name).module, "matrix": place(name).matrix,
                 "shape": list(self.shapes[t]),
                 "distance": {parent: plain(distance[t, p]) for p, parent in enumerate(self.parents)},
                 "mix": {parent: plain(self.mix[t, p]) for p, parent in enumerate(self.parents)},
                 "hull": plain(self.hull[t]), "beyond": plain(self.beyond[t]),
                 "lost": None if self.lost is None else plain(self.lost[t])} for t, name in enumerate(self.names)]

    def to_dict(self) -> dict:
        """Plain data: what `--json` prints."""
        findings = [{"level": one.level, "topic": one.topic, "text": one.text, "tensor": one.tensor} for one in self.findings]
        trips = None if self.tokens is None else [{**vars(trip), "ids": list(trip.ids), "same": trip.same} for trip in self.tokens]
        return {"folder": str(self.folder), "level": self.level, "findings": findings, "parents": list(self.parents),
                "distance": {parent: plain(value) for parent, value in zip(self.parents, self.totals, strict=True)},
                "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
                "tied": {"before": self.tied[0], "after": self.tied[1]}, "dtype": self.dtype, "nonfinite": dict(self.nonfinite),
                "lost": self.lost_total, "tokenizer": trips, "left_out": list(self.left_out),
                "answers": None if self.answers is None else [{**vars(one), "sound": one.sound} for one in self.answers],
                "tensors": self.rows()}


def findings(report: Review) -> Iterator[Finding]:
    """What a review says in words, the numbers first."""
    def found(level: str, topic: str, text: str, tensor: str = "") -> Finding:
        return Finding(level, report.name, topic, text, tensor)

    for check in (_numbers, _size, _distances, _rounding, _tokenizer, _answers):
        yield from (found(*parts) for parts in check(report))


def _numbers(report: Review) -> Iterator[tuple]:
    if report.nonfinite:
        worst, count = max(report.nonfinite.items(), key=lambda item: item[1])
        yield "bad", "finite", f"{sum(report.nonfinite.values()):,} numbers are NaN or Inf, {count:,} of them in {worst}.", worst
    else:
        yield "good", "finite", "All numbers are finite."


def _size(report: Review) -> Iterator[tuple]:
    before, after = report.parameters
    if before == after:
        yield "good", "parameters", f"{after:,} parameters, as many as the pivot."
    else:
        why = "as its layers or its vocabulary were changed" if report.reshaped else \
            "as it has a head of its own" if report.tied == (True, False) else "and nothing in the recipe says why"
        yield "good" if report.reshaped else "warning", "parameters", f"{after:,} parameters; the pivot has {before:,}, {why}."
    said = {True: "tied to the embedding", False: "a matrix of its own"}
    if report.tied[0] == report.tied[1]:
        yield "good", "tied", f"The head is {said[report.tied[1]]}, as in the pivot."
    else:
        yield "warning", "tied", f"The head is {said[report.tied[1]]}; in the pivot it is {said[report.tied[0]]}."
    if report.left_out:
        yield "warning", "compared", f"{len(report.left_out)} matrices have no counterpart in every parent and were not " \
                                     f"compared, first {report.left_out[0]}.", report.left_out[0]


def _distances(report: Review) -> Iterator[tuple]:
    same = [parent for p, parent in enumerate(report.parents) if not (report.square[:, p] * report.parts[:, p]).any()]
    yield from (("warning", "distance", f"The result is {parent}: no matrix differs.") for parent in same)
    if not same:
        near = int(np.nanargmin(report.totals))
        yield "good", "distance", f"It lies nearest to {report.parents[near]}, at {report.totals[near]:.2%} of its norm."
    hull = np.nan_to_num(report.hull)
    far = int(hull.argmax())
    beyond = float((report.beyond * report.numel).sum() / max(report.numel.sum(), 1))
    text = f"{beyond:.2%} of the elements lie outside the range of the parents' values"
    if hull[far] <= _FAR:
        yield "good", "hull", f"Every matrix is a mix of its parents, or close to one; {text}."
    else:
        count = int(np.count_nonzero(hull > _FAR))
        level, why = ("warning", "") if report.averages else ("good", " (its method does not average)")
        yield level, "hull", f"{count} of {len(hull)} matrices lie outside every mix of their parents{why}, the farthest by " \
                             f"{hull[far]:.1%} of the parents' own distance: {report.names[far]}; {text}.", report.names[far]


def _rounding(report: Review) -> Iterator[tuple]:
    if report.lost_total is not None:
        level = "warning" if report.lost_total > _ROUNDED else "good"
        yield level, "rounding", f"Storing it as {report.dtype} loses {report.lost_total:.2%} of what the merge changed."


def _tokenizer(report: Review) -> Iterator[tuple]:
    if report.tokens is None:
        yield "warning", "tokenizer", "There is no tokenizer.json, so the tokenizer was not tried."
        return
    if not report.tokens:
        yield "bad", "tokenizer", "tokenizer.json cannot be read."
        return
    outside = next((trip for trip in report.tokens if not trip.within), None)
    changed = [trip for trip in report.tokens if not trip.same]
    donor = {trip.text: trip.decoded for trip in report.donor_tokens or ()}
    if outside is not None:
        yield "bad", "tokenizer", f"Token {max(outside.ids)} of {outside.text!r} has no row in the embedding."
    elif not changed:
        yield "good", "tokenizer", f"{len(report.tokens)} samples come back from the tokenizer as they were."
    elif all(donor.get(trip.text) == trip.decoded for trip in changed):
        yield "good", "tokenizer", f"{len(changed)} of {len(report.tokens)} samples come back changed, just as from the donor's."
    else:
        yield "warning", "tokenizer", f"{changed[0].text!r} comes back from the tokenizer as {changed[0].decoded!r}."


def _answers(report: Review) -> Iterator[tuple]:
    if report.answers is None:
        return
    failed = next((one for one in report.answers if one.finish == "error"), None)
    mute = [one for one in report.answers if one.finish != "error" and not one.text.strip()]
    cut = [one for one in report.answers if one.finish == "length"]
    wild = [one for one in report.answers if one.finish != "error" and one.perplexity is None]
    if failed is not None:
        yield "bad", "answers", f"It cannot answer {failed.prompt!r}: {failed.error}"
    if wild:
        yield "bad", "answers", f"Its probabilities for {wild[0].prompt!r} are not finite numbers."
    if mute:
        yield "warning", "answers", f"{len(mute)} of {len(report.answers)} answers are empty, first to {mute[0].prompt!r}."
    if cut:
        yield "warning", "answers", f"{len(cut)} of {len(report.answers)} answers did not end by themselves and were cut off."
    if all(one.sound for one in report.answers):
        yield "good", "answers", f"{len(report.answers)} prompts are answered, and every answer ends by itself."
