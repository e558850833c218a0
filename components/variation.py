"""The Variation tab: how far every matrix moved, the weights that follow, and editing them before anything is merged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gradio as gr
import numpy as np
import pandas as pd
from gradio.processing_utils import save_bytes_to_cache

from components import figures
from components.heatmap import Grid, heatmap, parse_edit, payload, standalone_html
from components.models import at_a_glance
from components.state import Selection, Settings
from components.status import bar, error_note
from components.studio import Studio
from fusion import GRANULARITIES, MEASURES, METHODS, FusionError, RecipeError, Variation, effective_weights
from fusion.weights import WeightPlan, give_weight

GRANULARITY_HINT = "The unit that shares one weight; its change is pooled over all its elements."
MEASURE_HINT = "Mean of Δ² (the paper's) or of |Δ| over a unit."


@dataclass(frozen=True)
class VariationTab:
    """The components of the tab."""

    granularity: gr.Radio
    measure: gr.Radio
    reset: gr.Button
    status: gr.HTML
    heat: gr.HTML
    depth: gr.Plot
    share: gr.Plot
    glance: gr.HTML
    table: gr.Dataframe
    downloads: list[gr.DownloadButton]


def build(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State,
          glance: gr.HTML) -> VariationTab:
    """Lay out the tab and bind its events; edits and switches go into `settings`, a summary into `glance`."""
    with gr.Row(elem_id="variation-controls"):
        granularity = gr.Radio(list(GRANULARITIES), value="matrix", label="Granularity", info=GRANULARITY_HINT,
                               elem_id="granularity", scale=3, min_width=280)
        measure = gr.Radio(list(MEASURES), value="square", label="Measure", info=MEASURE_HINT, elem_id="measure", scale=2,
                           min_width=220)
    status = gr.HTML("", elem_id="variation-status", visible=False)
    heat = heatmap(elem_id="heatmap")
    with gr.Row(elem_id="variation-tools"):
        ask = gr.Button("Measure these models", variant="primary", visible=False, elem_id="measure-now", scale=0, min_width=200)
        reset = gr.Button("Reset all edits", size="sm", interactive=False, elem_id="reset-edits", scale=0, min_width=130)
        downloads = [gr.DownloadButton(f"Download {kind}", size="sm", interactive=False, scale=0, min_width=140,
                                       elem_id=f"download-{kind.lower()}") for kind in ("CSV", "JSON", "HTML")]
    with gr.Row():
        depth = gr.Plot(show_label=False, elem_id="ratio-by-depth", min_width=320)
        share = gr.Plot(show_label=False, elem_id="share-per-module", min_width=320)
    with gr.Accordion("Every number in a table", open=False, elem_id="variation-table-box"):
        table = gr.Dataframe(elem_id="variation-table", interactive=False, show_search="filter", max_height=420, label="Weights",
                             show_label=False, wrap=True)
    tab = VariationTab(granularity, measure, reset, status, heat, depth, share, glance, table, downloads)
    _bind(studio, page, selection, settings, tab, ask)
    return tab


def _bind(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, tab: VariationTab,
          ask: gr.Button) -> None:
    shown = [tab.status, ask, tab.heat, tab.reset]
    details = [tab.glance, tab.depth, tab.share, tab.table, *tab.downloads]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}

    def look(now: Selection, wish: Settings) -> Iterator[list]:
        yield from _look(studio, now, wish, asked=False)

    def measure_now(now: Selection, wish: Settings) -> Iterator[list]:
        yield from _look(studio, now, wish, asked=True)

    def detail(now: Selection, wish: Settings) -> list:
        grid = grid_of(studio, now, wish)
        if grid is None:
            return ["", None, None, None, *(gr.DownloadButton(value=None, interactive=False) for _ in tab.downloads)]
        files = _files(grid, studio.recipe(now, wish).to_yaml(), tab.heat.GRADIO_CACHE)
        return [at_a_glance(grid), figures.ratio_by_depth(grid), figures.share_per_module(grid), _frame(grid),
                *(gr.DownloadButton(value=path, interactive=True) for path in files)]

    def edit(now: Selection, wish: Settings, event: gr.EventData) -> Settings:
        """Set, lock or reset the merge weight of a cell, a row or a column of the heatmap."""
        grid = grid_of(studio, now, wish)
        try:
            if grid is None:
                raise gr.Error("Measure the variation first.")
            return edited(wish, parse_edit(event._data, grid), grid, now.targets)
        except FusionError as error:
            raise gr.Error(str(error)) from error

    def switch(granularity: str, measured_by: str, wish: Settings) -> Settings:
        return replace(wish, granularity=_known(granularity, GRANULARITIES), measure=_known(measured_by, MEASURES))

    changed = [page.load, selection.change, settings.change]
    gr.on(changed, look, [selection, settings], shown, trigger_mode="always_last", **quiet).then(
        detail, [selection, settings], details, **quiet)
    ask.click(measure_now, [selection, settings], shown, **quiet).then(detail, [selection, settings], details, **quiet)
    tab.heat.edit(edit, [selection, settings], settings, **quiet)
    tab.reset.click(lambda wish: replace(wish, edits=()), settings, settings, **quiet)
    gr.on([tab.granularity.input, tab.measure.input], switch, [tab.granularity, tab.measure, settings], settings, **quiet)
    settings.change(lambda wish: (wish.granularity, wish.measure), settings, [tab.granularity, tab.measure], **quiet)


def _known(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise gr.Error(f"Unknown choice {value!r}.")
    return value


def _look(studio: Studio, now: Selection, wish: Settings, asked: bool) -> Iterator[list]:
    """Measure a selection if it is small or was asked for, and show its heatmap; yields [status, ask, heatmap, reset]."""
    edits = gr.Button(interactive=bool(wish.edits))
    try:
        if not now.pivot or not now.targets:
            yield [gr.HTML("", visible=False), gr.Button(visible=False), None, edits]
            return
        if studio.measured(now) is None:
            studio.preflight(now).raise_if_bad()
            if not asked and not studio.measures_at_once(now):
                note = "<p class='fs-note fs-warning'>These models are large: measuring reads every byte of them once.</p>"
                yield [gr.HTML(note, visible=True), gr.Button(visible=True), None, edits]
                return
            for progress in studio.measure(now):
                yield [gr.HTML(bar(progress), visible=True), gr.Button(visible=False), gr.skip(), edits]
        yield [gr.HTML("", visible=False), gr.Button(visible=False), payload(grid_of(studio, now, wish)), edits]
    except FusionError as error:
        yield [gr.HTML(error_note(str(error)), visible=True), gr.Button(visible=False), None, edits]


def grid_of(studio: Studio, now: Selection, wish: Settings) -> Grid | None:
    """Everything the heatmap shows of a measured selection; None while it is not measured."""
    if not now.pivot or not now.targets:
        return None
    variation = studio.measured(now)
    if variation is None:
        return None
    titles = tuple(studio.title(key) for key in now.targets)
    return _grid(variation, titles, wish, *_weighed(studio, now, wish, variation))


def _weighed(studio: Studio, now: Selection, wish: Settings, variation: Variation) -> tuple[WeightPlan | None, np.ndarray]:
    """The plan and the effective weights [T, J] of the pivot's own tensors; no plan and NaN where the method has no weights."""
    unknown = np.full((len(variation.names), len(variation.targets)), np.nan)
    if not METHODS[wish.method].weights or wish.slices:  # stacked layers are other tensors than the measured ones
        return None, unknown
    plan, weights = effective_weights(studio.recipe(now, wish), variation)
    return plan, weights


def _grid(variation: Variation, titles: tuple[str, ...], wish: Settings, plan: WeightPlan | None, weights: np.ndarray) -> Grid:
    fixed = np.zeros(weights.shape, bool) if plan is None else ~np.isnan(plan.given)
    excluded = np.zeros(len(weights), bool) if plan is None else plan.excluded
    return Grid(titles, variation.names, variation.shapes, variation.ratios(wish.granularity, wish.measure),
                variation.means(wish.granularity, wish.measure), weights, fixed, excluded, wish.granularity, wish.measure)


def edited(wish: Settings, edit, grid: Grid, targets: tuple[str, ...]) -> Settings:
    """Settings after one edit of the heatmap; `targets` are the keys in the grid's order.

    Shares make room for the newest, factors stand by themselves. RecipeError with one target, and for a method without weights.
    """
    kind, edits = METHODS[wish.method].weights, wish.given()
    if not kind:
        raise RecipeError(f"{METHODS[wish.method].title} has no weights to give", todo="Choose another method in Merge.")
    key, number = targets[edit.target], {name: t for t, name in enumerate(grid.tensors)}
    for tensor in edit.tensors:
        given = {name: weight for name, weight in edits.pop(tensor, {}).items() if name in targets}
        if edit.action == "reset":
            given.pop(key, None)
        else:
            weight = edit.weight if edit.action == "set" else float(grid.weight[number[tensor], edit.target])
            given = give_weight(given, key, weight, targets) if kind == "shares" else {**given, key: weight}
        if given:
            edits[tensor] = given
    return wish.with_given(edits)


def _frame(grid: Grid) -> pd.DataFrame:
    return pd.DataFrame(_rows(grid), columns=["tensor", "shape", "target", "variation", "ratio", "weight", "state"])


def _rows(grid: Grid) -> list[list]:
    def state(t: int, j: int) -> str:
        return "kept from pivot" if grid.excluded[t] else "edited" if grid.fixed[t, j] else ""

    return [[name, "×".join(map(str, grid.shapes[t])), target, float(f"{grid.variation[t, j]:.6g}"),
             round(float(grid.ratio[t, j]), 6), round(float(grid.weight[t, j]), 6), state(t, j)]
            for t, name in enumerate(grid.tensors) for j, target in enumerate(grid.targets)]


def _files(grid: Grid, recipe: str, cache: str) -> list[str]:
    """Write the report as CSV, JSON and a standalone page into Gradio's cache; returns their paths."""
    head = ["tensor", "shape", "target", "variation", "ratio", "weight", "state"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([head, *([_plain(cell) for cell in row] for row in _rows(grid))])
    data = {"granularity": grid.granularity, "measure": grid.measure, "targets": list(grid.targets),
            "tensors": [dict(zip(head, row, strict=True)) for row in _rows(grid)]}
    page = standalone_html(grid, title="Variation and merge weights", recipe_text=recipe)
    contents = (("fusechat-variation.csv", text.getvalue()), ("fusechat-variation.json", json.dumps(data, indent=1)),
                ("fusechat-heatmap.html", page))
    return [save_bytes_to_cache(content.encode(), name, cache) for name, content in contents]


def _plain(cell: object) -> object:
    """A spreadsheet must not take a tensor's name for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@" and cell else cell
