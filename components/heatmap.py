"""The heatmap of variation ratios and merge weights: one grid of layers × matrices per target, and every edit made in it.

Python lays the tensors out into blocks and checks what comes back; assets/heatmap.js draws. The numbers travel as the
component's value and never through a template, because Gradio runs `${…}` inside template data as JavaScript. Price: the
layout is worked out twice per edit, once to draw and once to find the tensors an edit means (cached by tensor names).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from json import dumps
from pathlib import Path

import gradio as gr
import numpy as np

from components.closer import Closer
from components.state import COLORS, LETTERS
from fusion.anatomy import Place, place
from fusion.errors import RecipeError

QUANTITIES = ("ratio", "variation", "weight")
SCALES = ("shared", "own")
ACTIONS = ("set", "lock", "reset")
MAX_COLUMNS = 24  # beyond this, experts of one matrix share a column

_ASSETS = Path(__file__).parents[1] / "assets"
_SCRIPTS = ("heatmap_scale.js", "heatmap_quantities.js", "heatmap_tip.js", "heatmap_editor.js", "heatmap.js")
_KIND_ORDER = {"attention": 0, "mlp": 1, "embedding": 2, "other": 3, "head": 4, "norm": 5}
_READING_ORDER = ("q_", "k_", "v_", "o_", "gate", "up_", "down_")
_EXPERT = re.compile(r"(expert\w*\.)\d+(?=\.|$)")
_MOUNT = """
const view = fuseHeatmap(element.querySelector('.hm'), (edit) => trigger('edit', edit));
view.update(props.value);
watch('value', () => view.update(props.value));
"""


WAITING = {"waiting": "Measuring how far every matrix moved …"}  # shown until there is a payload
REFUSED = {"waiting": "These models cannot be measured together; what is in the way stands above."}


@dataclass(frozen=True)
class Grid:
    """Everything the heatmap shows, as plain numbers: T tensors, J targets, float [T, J] unless said otherwise."""

    targets: tuple[str, ...]  # the names people see, J of them
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ratio: np.ndarray  # variation ratio at this granularity; NaN = not there
    variation: np.ndarray  # mean square (or absolute) change at this granularity
    weight: np.ndarray  # effective merge weight
    fixed: np.ndarray  # bool: edited or locked by the person
    excluded: np.ndarray  # bool [T]: kept from the pivot
    granularity: str = "matrix"
    measure: str = "square"
    closer: Closer | None = None  # what a closer look found, at this granularity
    error: np.ndarray | None = None  # standard errors of the ratios while they are estimated from a sample
    sampled: float = 1.0  # share of all elements that was read for them
    weightless: str = ""  # why there are no weights

    def sizes(self) -> np.ndarray:
        """The number of parameters of every tensor: float [T]."""
        return np.array([math.prod(shape) for shape in self.shapes], dtype=float)

    def present(self) -> np.ndarray:
        """Where a target has the tensor at all: bool [T, J]."""
        return np.isfinite(self.ratio) | np.isfinite(self.variation) | np.isfinite(self.weight)


@dataclass(frozen=True)
class Edit:
    """One checked request of a person: act on these tensors of this target."""

    target: int
    tensors: tuple[str, ...]
    action: str
    weight: float | None


@dataclass(frozen=True)
class Block:
    """One table of the layout: labelled rows and columns, and in each cell the indices of the tensors it stands for."""

    title: str
    layers: bool  # rows are layers; otherwise there is one row, of what is outside them
    rows: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]  # (group, label)
    cells: dict[tuple[int, int], tuple[int, ...]]


@lru_cache(maxsize=32)
def layout(tensors: tuple[str, ...]) -> tuple[Block, ...]:
    """Lay tensor names out: what is outside the layers in one row, then one block per stack of layers."""
    stacks: dict[str, list[int]] = {}
    for index, name in enumerate(tensors):
        where = place(name)
        stacks.setdefault("" if where.layer is None else where.stack, []).append(index)
    outside = stacks.pop("", None)
    blocks = [_outside(tensors, outside)] if outside else []
    return (*blocks, *(_stack(title, tensors, indices) for title, indices in stacks.items()))


def _outside(tensors: tuple[str, ...], indices: list[int]) -> Block:
    columns, cells = [], {}
    for index in indices:
        # A tensor that shares its short name with another (towers of a multimodal model) goes by its whole name.
        short = place(tensors[index]).matrix
        twins = sum(place(tensors[i]).matrix == short for i in indices)
        columns.append(("", short if twins == 1 else tensors[index].removesuffix(".weight")))
        cells[0, len(columns) - 1] = (index,)
    return Block("Outside the layers", False, ("all",), tuple(columns), cells)


def _stack(title: str, tensors: tuple[str, ...], indices: list[int]) -> Block:
    places = {index: place(tensors[index]) for index in indices}
    keys = {index: _column(where) for index, where in places.items()}
    if len(set(keys.values())) > MAX_COLUMNS:
        keys = {index: (group, _collapsed(group, label)) for index, (group, label) in keys.items()}
    rank: dict[str, int] = {}
    for index, (group, _) in keys.items():
        rank[group] = min(rank.get(group, 9), _KIND_ORDER[places[index].kind])
    groups = sorted(rank, key=rank.__getitem__)  # stable: within a kind, order of first appearance
    columns = sorted(dict.fromkeys(keys.values()), key=lambda key: (groups.index(key[0]), _reading_rank(key[1])))
    layers = sorted({where.layer for where in places.values()})
    row_of = {layer: row for row, layer in enumerate(layers)}
    column_of = {key: column for column, key in enumerate(columns)}
    cells: dict[tuple[int, int], tuple[int, ...]] = {}
    for index, where in places.items():
        at = row_of[where.layer], column_of[keys[index]]
        cells[at] = (*cells.get(at, ()), index)
    return Block(title, True, tuple(map(str, layers)), tuple(columns), cells)


def _reading_rank(label: str) -> int:
    """Where people expect a matrix among its neighbours: files are often sorted by name, q, k, v, o is how they are read."""
    word = label.removesuffix(".bias").rpartition(".")[2]
    return next((rank for rank, start in enumerate(_READING_ORDER) if word.startswith(start)), len(_READING_ORDER))


def _column(where: Place) -> tuple[str, str]:
    """(group, label) of a matrix; a module that is its own matrix (input_layernorm, fc1) is grouped by its kind."""
    if where.matrix.removesuffix(".bias") == where.module:
        return ("norms" if where.kind == "norm" else where.kind), where.matrix
    return where.module, where.matrix


def _collapsed(group: str, label: str) -> str:
    return _EXPERT.sub(r"\1*", f"{group}.{label}").removeprefix(f"{group}.")


def payload(grid: Grid, quantity: str = "ratio", scale: str = "shared") -> dict:
    """Return the component's value: JSON-able, five significant digits, null where there is no number."""
    sizes, present = grid.sizes(), grid.present()
    everything = range(len(grid.tensors))
    targets = [{"name": name, "letter": LETTERS[j % len(LETTERS)], "color": COLORS[j % len(COLORS)],
                "mean": {q: _mean(getattr(grid, q)[:, j], sizes, everything) for q in QUANTITIES}}
               for j, name in enumerate(grid.targets)]
    return {"quantity": quantity, "scale": scale, "granularity": grid.granularity, "measure": grid.measure,
            "targets": targets, "weightless": grid.weightless, "preview": _preview(grid), "closer": _closer(grid.closer),
            "blocks": [_block_payload(grid, block, sizes, present) for block in layout(grid.tensors)]}


def _block_payload(grid: Grid, block: Block, sizes: np.ndarray, present: np.ndarray) -> dict:
    cells = list(block.cells.values())
    names = [grid.tensors[c[0]] if len(c) == 1 else _EXPERT.sub(r"\1*", grid.tensors[c[0]]) for c in cells]
    values = [{**{q: [_mean(getattr(grid, q)[:, j], sizes, c) for c in cells] for q in QUANTITIES},
               "fixed": [int(grid.fixed[list(c), j].any()) for c in cells],
               "present": [int(present[list(c), j].any()) for c in cells],
               "error": None if grid.error is None else [_mean(grid.error[:, j], sizes, c) for c in cells]}
              for j in range(len(grid.targets))]
    closer = {} if grid.closer is None else {
        quantity: [[_mean(card.values, sizes, c) for c in cells] for card in its] for quantity, its in grid.closer.cards.items()}
    return {"title": block.title, "layers": block.layers, "rows": list(block.rows),
            "columns": [{"group": group, "label": label} for group, label in block.columns],
            "row": [row for row, _ in block.cells], "column": [column for _, column in block.cells],
            "name": names, "shape": [" × ".join(map(str, grid.shapes[c[0]])) or "scalar" for c in cells],
            "count": [len(c) for c in cells], "excluded": [int(grid.excluded[list(c)].all()) for c in cells],
            "values": values, "closer": closer}


def _preview(grid: Grid) -> dict | None:
    """How much of the models an estimate has seen, and how far its worst ratio may be off."""
    if grid.error is None:
        return None
    return {"sampled": float(f"{grid.sampled:.3g}"), "error": float(f"{np.nanmax(grid.error, initial=0.0):.3g}")}


def _closer(closer: Closer | None) -> dict | None:
    if closer is None:
        return None
    return {"dtype": closer.dtype, "cards": {
        quantity: [{"name": card.title, "letters": card.letters, "colors": list(card.colors), "target": card.target,
                    "mean": float(f"{card.whole:.5g}") if math.isfinite(card.whole) else None} for card in cards]
        for quantity, cards in closer.cards.items()}}


def _mean(column: np.ndarray, sizes: np.ndarray, indices: Iterable[int]) -> float | None:
    """Mean per parameter over the finite entries, to five significant digits; None if there are none."""
    chosen = [i for i in indices if math.isfinite(column[i])]
    if not chosen:
        return None
    total = float(sum(sizes[i] for i in chosen))
    mean = sum(column[i] * sizes[i] for i in chosen) / total if total else float(np.mean(column[chosen]))
    return float(f"{mean:.5g}")


def heatmap(value: dict | None = None, elem_id: str = "heatmap") -> gr.HTML:
    """The component: give it a `payload` or `WAITING`, listen to `.edit(fn)`, read that with `parse_edit(evt._data, grid)`."""
    return gr.HTML(value=value, elem_id=elem_id, html_template="<div class='hm'></div>", apply_default_css=False,
                   css_template=(_ASSETS / "heatmap.css").read_text(encoding="utf-8"),
                   js_on_load=_script() + _MOUNT)


def _script() -> str:
    return "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)


def parse_edit(data: object, grid: Grid) -> Edit:
    """Check a request from the page, where nothing can be trusted, and name the tensors it means.

    `data`: {target, block, row | None, column | None, action, weight | None}; None stands for the whole row or column.
    Raises RecipeError for anything else, and for a request that would change nothing.
    """
    if not isinstance(data, dict):
        raise RecipeError("the edit is not an object", todo="Edit a cell of the heatmap.")
    blocks = layout(grid.tensors)
    target = _index(data.get("target"), len(grid.targets), "target")
    block = blocks[_index(data.get("block"), len(blocks), "block")]
    row, column = data.get("row"), data.get("column")
    row = None if row is None else _index(row, len(block.rows), "row")
    column = None if column is None else _index(column, len(block.columns), "column")
    action = data.get("action")
    if not isinstance(action, str) or action not in ACTIONS:
        raise RecipeError(f"unknown action {str(action)[:40]!r}", todo=f"Known: {', '.join(ACTIONS)}.")
    weight = _weight(data.get("weight"), action)
    present = grid.present()[:, target] & ~grid.excluded
    chosen = sorted(i for (r, c), cell in block.cells.items() if row in (None, r) and column in (None, c)
                    for i in cell if present[i])
    if not chosen:
        raise RecipeError("there is nothing to edit here: the matrices are missing or kept from the pivot",
                          where=block.title, todo="Pick another cell.")
    return Edit(target, tuple(grid.tensors[i] for i in chosen), action, weight)


def _index(value: object, count: int, what: str) -> int:
    if type(value) is not int or not 0 <= value < count:  # bool is an int too, and is refused
        raise RecipeError(f"{what} {str(value)[:40]!r} is not a whole number from 0 to {count - 1}",
                          todo="Edit a cell of the heatmap.")
    return value


def _weight(value: object, action: str) -> float | None:
    if action != "set":
        if value is not None:
            raise RecipeError(f"{action} takes no weight", todo="Leave the weight out, or use set.")
        return None
    if type(value) not in (int, float) or not 0 <= value <= 1:  # NaN fails the comparison
        raise RecipeError(f"weight {str(value)[:40]!r} is not a number from 0 to 1", todo="Give a number from 0 to 1.")
    return float(value)


def standalone_html(grid: Grid, quantity: str = "ratio", scale: str = "shared", title: str = "Merge weights",
                    recipe_text: str = "") -> str:
    """Return one self-contained, read-only HTML page with the figure; it makes no request and follows light and dark."""
    data = dumps(payload(grid, quantity, scale), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    recipe = f"<details><summary>Recipe</summary><pre>{escape(recipe_text)}</pre></details>" if recipe_text else ""
    parts = {"TITLE": escape(title), "CSS": (_ASSETS / "heatmap.css").read_text(encoding="utf-8"), "RECIPE": recipe,
             "JS": _script(), "DATA": data}
    # One pass over the page, so that a title or recipe that spells a placeholder stays as it is.
    page = (_ASSETS / "heatmap_page.html").read_text(encoding="utf-8")
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], page)
