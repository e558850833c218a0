"""Tables like the paper's: models in rows, domains in columns, an average, the change from a baseline, and how sure each is."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fusion.evaluate.scores import Scores
from fusion.evaluate.statistics import DRAWS, percentiles
from fusion.tables import table as plain_table


@dataclass(frozen=True)
class Cell:
    """A value and its 95 % interval; NaN where there is nothing."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def to_dict(self) -> dict:
        """Plain data; None where there is nothing."""
        return {key: None if math.isnan(value) else value for key, value in vars(self).items()}


@dataclass(frozen=True)
class Row:
    """One model: a cell for every column, the change from the baseline in percent with its p, and what was counted.

    `versus`, `p` are None for the baseline itself; `truncated` is None where that is not known.
    """

    model: str
    cells: tuple[Cell, ...]
    versus: Cell | None
    p: float | None
    answers: int
    truncated: int | None
    missing: int = 0


@dataclass(frozen=True)
class Table:
    """A table with its intervals; `notes` say how they were made, `summary` names the column that is compared and tested.

    `better` says which values are good: "high", "low", or "" where that is not known.
    """

    title: str
    unit: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    digits: int
    notes: tuple[str, ...] = ()
    baseline: str | None = None
    summary: str = ""
    better: str = ""

    def best(self, column: str) -> frozenset[str]:
        """The models with the best value of a column, as it is shown; none where all agree or nobody knows what is good."""
        place, values = self.columns.index(column), {}
        for row in self.rows:
            if not math.isnan(value := row.cells[place].value):
                values[row.model] = round(value, self.digits)
        if not self.better or len(set(values.values())) < 2:
            return frozenset()
        top = (max if self.better == "high" else min)(values.values())
        return frozenset(model for model, value in values.items() if value == top)

    def to_dict(self) -> dict:
        """Plain data for a page or a JSON file."""
        return {"title": self.title, "unit": self.unit, "columns": list(self.columns), "baseline": self.baseline,
                "summary": self.summary,
                "notes": list(self.notes), "rows": [
                    {"model": row.model,
                     "cells": {name: cell.to_dict() for name, cell in zip(self.columns, row.cells, strict=True)},
                     "versus_percent": row.versus.to_dict() if row.versus else None, "p": row.p, "answers": row.answers,
                     "truncated": row.truncated, "missing": row.missing} for row in self.rows]}

    def markdown(self) -> str:
        """The table with intervals in small brackets, and its notes below."""
        head, rows = self._texts()
        lines = [f"| {' | '.join(_escaped(head))} |", "|---|" + "---:|" * (len(head) - 1)]
        lines += [f"| {' | '.join(_escaped(row))} |" for row in rows]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}" + (f" ({self.unit})" if self.unit else ""), "", *lines, "", *notes, ""])

    def text(self) -> str:
        """The table for a terminal, which is narrow: of many columns only the summary has its interval."""
        short = set(self.columns) - {self.summary} if self.summary and len(self.columns) > 2 else ()
        head, rows = self._texts(short)
        title = self.title + (f" ({self.unit})" if self.unit else "")
        return "\n".join([title, "", plain_table(head, rows), "", *self.notes])

    def csv(self) -> str:
        """One line per model and column: model, column, value, low, high, then what was counted."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["model", "column", "value", "low", "high", "p", "answers", "truncated", "missing"])
        for row in self.rows:
            cells = [*zip(self.columns, row.cells, strict=True)]
            cells += [(f"vs {self.baseline} %", row.versus)] if row.versus else []
            for column, cell in cells:
                p = row.p if column in (self.summary, f"vs {self.baseline} %") else None
                writer.writerow([_safe(row.model), _safe(column), *map(_number, (cell.value, cell.low, cell.high, p)), row.answers,
                                 "" if row.truncated is None else row.truncated, row.missing])
        return out.getvalue()

    def _texts(self, short: Iterable[str] = ()) -> tuple[list[str], list[list[str]]]:
        """Head and rows; the columns in `short` go without their intervals."""
        compared = any(row.versus for row in self.rows)
        tested = any(row.p is not None for row in self.rows)
        missing = any(row.missing for row in self.rows)
        head = ["model", *self.columns, *([f"vs {self.baseline}"] if compared else []), *(["p"] if tested else []), "cut off",
                *(["missing"] if missing else [])]
        rows = []
        for row in self.rows:
            versus = [self._text(row.versus, "%", sign=True) if row.versus else ""] if compared else []
            p = ["" if row.p is None else _p_text(row.p)] if tested else []
            cut = "–" if row.truncated is None else f"{row.truncated}/{row.answers}" + (" ⚠" if row.truncated else "")
            cells = [self._text(Cell(cell.value) if name in short else cell)
                     for name, cell in zip(self.columns, row.cells, strict=True)]
            rows.append([row.model, *cells, *versus, *p, cut, *([str(row.missing)] if missing else [])])
        return head, rows

    def _text(self, cell: Cell, unit: str = "", sign: bool = False) -> str:
        if math.isnan(cell.value):
            return "–"
        digits, plus = 1 if unit == "%" else self.digits, "+" if sign else ""
        value = f"{cell.value:{plus}.{digits}f}{unit}"
        return value if math.isnan(cell.low) else f"{value} [{cell.low:{plus}.{digits}f}, {cell.high:{plus}.{digits}f}]"


def from_scores(scores: Scores, baseline: str | None = None, *, digits: int = 1, notes: Iterable[str] = (), draws: int = DRAWS,
                seed: int = 0) -> Table:
    """The table of some scores; with a baseline, what each model's summary differs from it in percent, with a paired test."""
    samples, points = scores.resampled(draws, seed), scores.means()
    columns = tuple(points)
    against = scores.models.index(baseline) if baseline is not None else None
    rows, answers = [], scores.answers()
    for m, model in enumerate(scores.models):
        cells = tuple(Cell(*(scores.scale * number for number in (points[name][0, m], *scores.interval(name, m, samples))))
                      for name in columns)
        other = against is not None and m != against
        versus = _change(points[scores.summary][0], samples[scores.summary], m, against) if other else None
        p = scores.p_value(m, against, seed) if other or (against is None and scores.even is not None) else None
        cut, missing = int(scores.truncated[m, answers].sum()), int(np.isnan(scores.values[m, answers]).sum())
        rows.append(Row(model, cells, versus, p, len(answers), cut, missing))
    notes = (*_notes(scores, baseline, draws, seed), *notes)
    return Table(scores.title, scores.unit, columns, tuple(rows), digits, notes, baseline, scores.summary,
                 scores.better if scores.even is None else "")


def _change(points: np.ndarray, samples: np.ndarray, model: int, against: int) -> Cell:
    """The change from the baseline in percent of the baseline; the interval is of the paired ratio."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = 100 * (samples[:, model] / samples[:, against] - 1)
        value = 100 * (points[model] / points[against] - 1)
    return Cell(float(value), *percentiles(ratios[np.isfinite(ratios)])) if np.isfinite(value) else Cell(math.nan)


def _notes(scores: Scores, baseline: str | None, draws: int, seed: int) -> list[str]:
    prompts = len(set(scores.prompts))
    made = f"{draws} bootstrap draws of {prompts} prompts within their domains, seed {seed}"
    notes = [f"Brackets: 95 % intervals; {'Wilson for a domain, ' if scores.right_or_wrong else ''}{made}."]
    if baseline is not None:
        test = "McNemar's exact test" if scores.right_or_wrong else "a sign-flip permutation test over prompts"
        notes.append(f"p: {test}, two-sided, against {baseline}, not corrected for several comparisons.")
    elif scores.even is not None:
        notes.append("p: a sign-flip permutation test over prompts, two-sided, not corrected for several comparisons.")
    cut = scores.truncated[:, scores.answers()]
    if cut.any():
        notes.append(f"⚠ {cut.sum()} of {cut.size} answers were cut off by their length and count as they stand.")
    return notes


def _escaped(cells: list[str]) -> list[str]:
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def _safe(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(float(value))


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
