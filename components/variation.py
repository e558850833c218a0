"""The Variation tab: how far every matrix moved, the weights that follow, and editing them before anything is merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import gradio as gr
import numpy as np
from gradio.events import Dependency

from components import figures
from components.closer import closer_look, red_flags
from components.downloads import as_files, as_table
from components.heatmap import REFUSED, WAITING, Grid, heatmap, parse_edit, payload
from components.inspecting import Looks, Stops, paced
from components.models import at_a_glance
from components.state import Selection, Settings
from components.status import as_comment, bar, error_note, note
from components.studio import Studio
from fusion import GRANULARITIES, MEASURES, METHODS, FusionError, RecipeError, Variation, effective_weights
from fusion.errors import Stopped
from fusion.inspection import Inspection, Preview
from fusion.progress import Work, finish
from fusion.weights import WeightPlan, give_weight

GRANULARITY_HINT = "The unit that shares one weight; its change is pooled over all its elements."
MEASURE_HINT = "Mean of Δ² (the paper's) or of |Δ| over a unit."

_QUIET = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class VariationTab:
    """The components of the tab."""

    granularity: gr.Radio
    measure: gr.Radio
    status: gr.HTML
    stop: gr.Button
    flags: gr.HTML
    heat: gr.HTML
    ask: gr.Button
    closer: gr.Button
    reset: gr.Button
    downloads: list[gr.DownloadButton]
    depth: gr.Plot
    share: gr.Plot
    table: gr.Dataframe
    glance: gr.HTML
    drawn: gr.State  # the models that are shown

    @property
    def shown(self) -> list:
        """What `_look` yields."""
        return [self.status, self.stop, self.flags, self.heat, self.ask, self.closer, self.reset]


def build(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State,
          glance: gr.HTML) -> VariationTab:
    """Lay out the tab and bind its events; edits and switches go into `settings`, a summary into `glance`."""
    with gr.Row(elem_id="variation-controls"):
        granularity = gr.Radio(list(GRANULARITIES), value="matrix", label="Granularity", info=GRANULARITY_HINT,
                               elem_id="granularity", scale=3, min_width=280)
        measure = gr.Radio(list(MEASURES), value="square", label="Measure", info=MEASURE_HINT, elem_id="measure", scale=2,
                           min_width=220)
    status = gr.HTML("", elem_id="variation-status", visible=False)
    stop = gr.Button("Stop", variant="stop", size="sm", visible=False, elem_id="variation-stop", scale=0, min_width=120)
    flags = gr.HTML("", elem_id="variation-flags", visible=False)
    first = studio.first_selection()
    heat = heatmap(WAITING if first.pivot and first.targets else None)  # on a server that has just started it takes seconds
    with gr.Row(elem_id="variation-tools"):
        ask = gr.Button("Measure exactly", variant="primary", size="sm", visible=False, elem_id="measure-now", scale=0,
                        min_width=160)
        closer = gr.Button("Look closer", variant="primary", size="sm", visible=False, elem_id="look-closer", scale=0,
                           min_width=140)
        reset = gr.Button("Reset all edits", size="sm", interactive=False, elem_id="reset-edits", scale=0, min_width=130)
        downloads = [gr.DownloadButton(f"Download {kind}", size="sm", interactive=False, scale=0, min_width=140,
                                       elem_id=f"download-{kind.lower()}") for kind in ("CSV", "JSON", "HTML")]
    with gr.Row():
        depth = gr.Plot(show_label=False, elem_id="ratio-by-depth", min_width=320)
        share = gr.Plot(show_label=False, elem_id="share-per-module", min_width=320)
    with gr.Accordion("Every number in a table", open=False, elem_id="variation-table-box"):
        table = gr.Dataframe(elem_id="variation-table", interactive=False, show_search="filter", max_height=420, label="Weights",
                             show_label=False, wrap=True)
    tab = VariationTab(granularity, measure, status, stop, flags, heat, ask, closer, reset, downloads, depth, share, table, glance,
                       gr.State(()))
    _bind(studio, page, selection, settings, tab)
    return tab


def _bind(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, tab: VariationTab) -> None:
    looks, found = Looks(studio), gr.State(0)  # `found` counts looks that ended: each shows the tab anew
    details = [tab.glance, tab.depth, tab.share, tab.table, *tab.downloads]

    def nothing() -> list:
        return ["", None, None, None, *(gr.DownloadButton(value=None, interactive=False) for _ in tab.downloads)]

    def look(now: Selection, wish: Settings, drawn: tuple[str, ...]) -> Iterator[list]:
        same = models_of(now) == drawn  # of other models nothing stays while these are looked at
        rest = [gr.skip()] * len(details) if same else nothing()
        yield from ([*shown, *rest] for shown in _look(studio, looks, now, wish, gr.skip() if same else WAITING))

    def detail(now: Selection, wish: Settings) -> list:
        grid = grid_of(studio, now, wish, looks)
        if grid is None:
            return [*nothing(), models_of(now)]
        files = as_files(grid, _recipe_text(studio, now, wish), tab.heat.GRADIO_CACHE)
        return [at_a_glance(grid), figures.ratio_by_depth(grid), figures.share_per_module(grid), as_table(grid),
                *(gr.DownloadButton(value=path, interactive=True) for path in files), models_of(now)]

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

    changed = [page.load, selection.change, settings.change, found.change]
    looked = gr.on(changed, look, [selection, settings, tab.drawn], [*tab.shown, *details], trigger_mode="always_last", **_QUIET)
    seen = looked.then(detail, [selection, settings], [*details, tab.drawn], **_QUIET)
    _bind_work(studio, looks, selection, settings, found, seen, tab)
    tab.heat.edit(edit, [selection, settings], settings, **_QUIET)
    tab.reset.click(lambda wish: replace(wish, edits=()), settings, settings, **_QUIET)
    gr.on([tab.granularity.input, tab.measure.input], switch, [tab.granularity, tab.measure, settings], settings, **_QUIET)
    settings.change(lambda wish: (wish.granularity, wish.measure), settings, [tab.granularity, tab.measure], **_QUIET)


def _bind_work(studio: Studio, looks: Looks, selection: gr.State, settings: gr.State, found: gr.State, seen: Dependency,
               tab: VariationTab) -> None:
    """Bind what takes long: an estimate is refined by itself unless it was stopped, the rest is asked for."""
    halted, stops = gr.State(()), Stops()  # `halted`: the models whose measuring this visitor stopped

    def refine(now: Selection, count: int, halted: tuple, request: gr.Request) -> Iterator[list]:
        try:
            wanted = bool(now.pivot and now.targets) and models_of(now) != halted and studio.measured(now) is None \
                and looks.sampled(now) is not None and not looks.measuring(now)
        except FusionError:  # `_look` says what is wrong
            wanted = False
        yield from _working(stops.drive(looks.measure(now), request.session_hash), count, now) if wanted else [[gr.skip()] * 5]

    def measure_now(now: Selection, count: int, request: gr.Request) -> Iterator[list]:
        """Measure the selected models exactly."""
        yield from _working(stops.drive(looks.measure(now), request.session_hash), count, now)

    def look_closer(now: Selection, wish: Settings, count: int, request: gr.Request) -> Iterator[list]:
        """Inspect the selected models: relative change, stable rank, rounding, cosines, sign conflict."""
        yield from _working(stops.drive(looks.inspect(now, wish), request.session_hash), count, now)

    outputs = [tab.status, tab.stop, tab.ask, found, halted]
    seen.then(refine, [selection, found, halted], outputs, **_QUIET)
    tab.ask.click(measure_now, [selection, found], outputs, concurrency_limit=2, **_QUIET)
    tab.closer.click(look_closer, [selection, settings, found], [tab.status, tab.stop, tab.closer, found, halted],
                     concurrency_limit=2, **_QUIET)
    tab.stop.click(stops.stop, None, None, queue=False, **_QUIET)


def _working(work: Work, count: int, now: Selection) -> Iterator[list]:
    """Show long work; yields [status, stop, the button that began it, count of looks that ended, models that were stopped]."""
    idle, work = [gr.Button(visible=False), gr.Button(interactive=True)], paced(work)
    try:
        while True:
            yield [gr.HTML(bar(next(work)), visible=True), gr.Button(visible=True), gr.Button(interactive=False), gr.skip(), ()]
    except StopIteration:
        yield [gr.HTML("", visible=False), *idle, count + 1, ()]
    except Stopped:
        text = note("warning", "Stopped. What was known before is still shown.")
        yield [gr.HTML(text, visible=True), *idle, gr.skip(), models_of(now)]
    except FusionError as error:
        yield [gr.HTML(error_note(str(error)), visible=True), *idle, gr.skip(), ()]
    finally:
        work.close()


def models_of(now: Selection) -> tuple[str, ...]:
    """The models that are measured together."""
    return (now.pivot, *now.targets)


def _known(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise gr.Error(f"Unknown choice {value!r}.")
    return value


def _look(studio: Studio, looks: Looks, now: Selection, wish: Settings, before: dict | None = None) -> Iterator[list]:
    """Show a selection, as exactly as it is known, and what is quickly found of it; yields the tab's `shown`.

    `before` is the heatmap until there is one. What was yielded for a component stands in every later yield too: Gradio's page
    takes a later value apart from the one before, and loses that where it has not drawn it yet.
    """
    edits, gone = gr.Button(interactive=bool(wish.edits)), gr.Button(visible=False)
    hidden = gr.HTML("", visible=False)
    heat = before or gr.skip()

    def measuring(work: Work) -> Iterator[list]:
        yield from ([gr.HTML(bar(progress), visible=True), gone, hidden, heat, gone, gone, edits] for progress in paced(work))

    try:
        if not now.pivot or not now.targets:
            yield [hidden, gone, hidden, None, gone, gone, edits]
            return
        if studio.measured(now) is None:
            studio.preflight(now).raise_if_bad()
            if not studio.measures_at_once(now):
                work = [gr.skip()] * 2 if looks.sampled(now) else [hidden, gone]  # of an estimate that is being refined
                yield from measuring(looks.sample(now))
                grid = _estimated(studio, now, wish, looks.sampled(now))
                yield [*work, hidden, payload(grid), gr.Button(visible=True), gone, edits]
                return
            yield from measuring(studio.measure(now))
        grid, report, soon = grid_of(studio, now, wish, looks), looks.inspected(now, wish), looks.at_once(now)
        ask = gr.Button(visible=report is None and not soon)
        yield [hidden, gone, _flags(studio, now, report), payload(grid), gone, ask, edits]
        if report is None and soon:
            finish(looks.inspect(now, wish))  # nothing to show meanwhile; and whoever leaves takes nothing from the next
            grid, report = grid_of(studio, now, wish, looks), looks.inspected(now, wish)
            yield [hidden, gone, _flags(studio, now, report), payload(grid), gone, gone, edits]
    except FusionError as error:
        yield [gr.HTML(error_note(str(error)), visible=True), gone, hidden, REFUSED, gone, gone, edits]


def _flags(studio: Studio, now: Selection, report: Inspection | None) -> gr.HTML:
    """The red flags of an inspection in words."""
    if report is None:
        return gr.HTML("", visible=False)
    titles = [studio.title(key) for key in now.targets]
    found = "".join(note("warning", text) for text in red_flags(report, titles))
    return gr.HTML(f"<div class='fs-flags'>{found or note('good', 'A closer look found no red flags.')}</div>", visible=True)


def _estimated(studio: Studio, now: Selection, wish: Settings, sample: Preview) -> Grid:
    """The grid of an estimate: ratios with their standard errors, and no weights yet."""
    unit = "matrix" if wish.granularity == GRANULARITIES[-1] else wish.granularity  # single parameters cannot be estimated
    variation = sample.variation
    unknown = np.full((len(variation.names), len(variation.targets)), np.nan)
    sampled = float((sample.sampled * variation.numel).sum() / max(variation.numel.sum(), 1))
    grid = _grid(variation, tuple(studio.title(key) for key in now.targets), replace(wish, granularity=unit), None, unknown)
    return replace(grid, error=sample.error(unit, wish.measure), sampled=sampled,
                   weightless="The weights follow from exact numbers, which are being measured or wait for Measure exactly.")


def grid_of(studio: Studio, now: Selection, wish: Settings, looks: Looks | None = None) -> Grid | None:
    """Everything the heatmap shows of a measured selection, with what `looks` knows; None while it is not measured."""
    if not now.pivot or not now.targets:
        return None
    variation = studio.measured(now)
    if variation is None:
        return None
    titles = tuple(studio.title(key) for key in now.targets)
    grid = _grid(variation, titles, wish, *_weighed(studio, now, wish, variation))
    report = looks.inspected(now, wish) if looks else None
    return replace(grid, closer=closer_look(report, titles, wish.granularity) if report else None, weightless=_weightless(wish))


def _weightless(wish: Settings) -> str:
    """Why a merge has no weights to show, in words."""
    if not METHODS[wish.method].weights:
        return f"{METHODS[wish.method].title} has no weights, it works from its options alone."
    return "Stacked layers are other matrices than the measured ones; their weights stand in the recipe." if wish.slices else ""


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


def _recipe_text(studio: Studio, now: Selection, wish: Settings) -> str:
    """The recipe for the report; as a comment what is still wrong with it, since the numbers do not need it."""
    try:
        return studio.recipe(now, wish).to_yaml()
    except FusionError as error:
        return as_comment(error)
