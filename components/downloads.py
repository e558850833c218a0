"""What the Variation tab shows as numbers and writes for download: table, CSV, JSON, a page of its own."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pandas as pd
from gradio.processing_utils import save_bytes_to_cache

from components.heatmap import Grid, standalone_html

HEAD = ("tensor", "shape", "target", "variation", "ratio", "weight", "state")
_CLOSER_HEAD = {"relative": "relative change", "stable_rank": "stable rank", "lost": "rounding loss"}


def as_table(grid: Grid) -> pd.DataFrame:
    """Every number, a row for each tensor and target."""
    return pd.DataFrame(_rows(grid), columns=_head(grid))


def _head(grid: Grid) -> list[str]:
    """The columns that are known."""
    if grid.closer is None:
        return list(HEAD)
    own = [title for name, title in _CLOSER_HEAD.items() if name in grid.closer.cards]
    pairs = [f"cosine {'·'.join(card.letters)}" for card in grid.closer.cards.get("cosine", ())]
    shared = ["rounding loss of the average", "sign conflict"] if pairs else []
    return [*HEAD, *own, *shared, *pairs]


def _rows(grid: Grid) -> list[list]:
    def state(t: int, j: int) -> str:
        return "kept from pivot" if grid.excluded[t] else "edited" if grid.fixed[t, j] else ""

    return [[name, "×".join(map(str, grid.shapes[t])), target, _number(grid.variation[t, j]), _number(grid.ratio[t, j]),
             _number(grid.weight[t, j]), state(t, j), *_closer_cells(grid, t, j)]
            for t, name in enumerate(grid.tensors) for j, target in enumerate(grid.targets)]


def _closer_cells(grid: Grid, t: int, j: int) -> list[float | None]:
    """One row's part of what a closer look found, in the order of `_head`."""
    if grid.closer is None:
        return []
    cards = grid.closer.cards
    chosen = [cards[name][j] for name in _CLOSER_HEAD if name in cards]
    if "cosine" in cards:
        chosen += [cards["lost"][-1], cards["conflict"][0], *cards["cosine"]]
    return [_number(card.values[t]) for card in chosen]


def _number(value: float) -> float | None:
    """Six significant digits; None where there is no number, which JSON could not say otherwise."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def as_files(grid: Grid, recipe: str, cache: str) -> list[str]:
    """Write the report as CSV, JSON and a standalone page into Gradio's cache; returns their paths."""
    head, rows = _head(grid), _rows(grid)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([head, *([_plain(cell) for cell in row] for row in rows)])
    data = {"granularity": grid.granularity, "measure": grid.measure, "targets": list(grid.targets),
            **({"rounded to": grid.closer.dtype} if grid.closer else {}),
            "tensors": [dict(zip(head, row, strict=True)) for row in rows]}
    page = standalone_html(grid, title="Variation and merge weights", recipe_text=recipe)
    contents = (("fusechat-variation.csv", text.getvalue()), ("fusechat-variation.json", json.dumps(data, indent=1)),
                ("fusechat-heatmap.html", page))
    return [save_bytes_to_cache(content.encode(), name, cache) for name, content in contents]


def _plain(cell: object) -> object:
    """A spreadsheet must not take a tensor's name for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@" and cell else cell
