"""The Merge tab: method, options and exclusions; the recipe they make; try it in memory or save it as a folder."""

from __future__ import annotations

import asyncio
import math
import shlex
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from components.state import LETTERS, MAX_TARGETS, Selection, Settings
from components.status import bar, error_note, note
from components.studio import Studio
from fusion import GRANULARITIES, MEASURES, METHODS, FusionError, Recipe, merge
from fusion.preflight import mergeable_names
from fusion.recipe import short_names
from fusion.weights import WeightPlan

POLL_S = 0.25
MAX_RECIPE_CHARS = 1_000_000
_DTYPES = [("as the pivot", ""), *((name, name) for name in ("bfloat16", "float16", "float32"))]


@dataclass(frozen=True)
class MergeTab:
    """The components of the tab; `inputs` are the controls in the order of `Settings`."""

    method: gr.Radio
    granularity: gr.Radio
    measure: gr.Radio
    weights: list[gr.Number]
    exclude: gr.Textbox
    dtype: gr.Dropdown
    donor: gr.Dropdown
    formula: gr.HTML
    weights_row: gr.Row
    run: gr.Button
    name: gr.Textbox
    save: gr.Button
    stop: gr.Button
    status: gr.HTML
    recipe: gr.Code
    command: gr.Code
    paste: gr.Code
    load: gr.Button

    @property
    def controls(self) -> list:
        """The controls that make the settings."""
        return [self.method, self.granularity, self.measure, *self.weights, self.exclude, self.dtype, self.donor]


def build(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, job: gr.BrowserState,
          tabs: gr.Tabs) -> tuple[MergeTab, Dependency, Dependency]:
    """Lay out the tab and bind its events; `job` keeps the id of a save in the browser, `tabs` jumps to Chat.

    Returns the tab and the two events that end with a saved folder: saving now, and a page that came back to a job.
    """
    tab = _lay_out(studio, selection.value)
    _bind_settings(studio, page, selection, settings, tab)
    _bind_running(studio, selection, settings, tab, tabs)
    return tab, *_bind_saving(studio, page, selection, settings, job, tab)


def _lay_out(studio: Studio, now: Selection) -> MergeTab:
    with gr.Row(elem_id="merge-row"):
        with gr.Column(scale=5, min_width=300):
            controls = _controls(studio, now)
        with gr.Column(scale=6, min_width=300):
            return MergeTab(**controls, **_actions(studio), **_recipe_boxes())


def _controls(studio: Studio, now: Selection) -> dict:
    method = gr.Radio([(entry.title, name) for name, entry in METHODS.items()], value="varm", label="Method", elem_id="method")
    formula = gr.HTML(_formula("varm"), elem_id="formula", padding=False)
    granularity = gr.Radio(list(GRANULARITIES), value="matrix", label="Granularity", elem_id="merge-granularity",
                           info="The unit m that shares one weight. The paper's choice is the matrix.")
    measure = gr.Radio(list(MEASURES), value="square", label="Measure", elem_id="merge-measure",
                       info="Mean of Δ² or of |Δ| over a unit.")
    with gr.Row(visible=False) as weights_row:
        weights = [gr.Number(1, label=f"Weight of {LETTERS[i]}", minimum=0, step=0.1, elem_id=f"weight-{LETTERS[i].lower()}",
                             visible=i < len(now.targets), min_width=90) for i in range(MAX_TARGETS)]
    exclude = gr.Textbox(label="Keep from the pivot", lines=2, placeholder="*norm*\nmodel.embed_tokens.weight",
                         elem_id="exclude", info="Tensor names or patterns with *, one per line. Empty: merge everything.")
    with gr.Row():
        dtype = gr.Dropdown(_DTYPES, value="", label="Stored dtype", elem_id="dtype", min_width=150,
                            info="float32 arithmetic, rounded once.")
        donor = gr.Dropdown(_donors(studio, now), value="pivot", label="Donor", elem_id="donor", min_width=150,
                            info="Gives tokenizer, template, stop tokens.")
    return {"method": method, "formula": formula, "granularity": granularity, "measure": measure, "weights_row": weights_row,
            "weights": weights, "exclude": exclude, "dtype": dtype, "donor": donor}


def _actions(studio: Studio) -> dict:
    run = gr.Button("Merge and try", variant="primary", size="lg", elem_id="merge-try")
    gr.HTML("<p class='fs-hint'>In memory: nothing is written, the merge opens in Chat beside its sources.</p>", padding=False)
    with gr.Row(elem_id="save-row", visible=not studio.public):
        name = gr.Textbox("my-merge", label="Save as", max_lines=1, max_length=64, elem_id="save-name", scale=3, min_width=160,
                          info=f"A new folder in {studio.outputs.name}/")
        save = gr.Button("Save", elem_id="save", scale=1, min_width=90)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="save-stop", scale=1, min_width=90)
    return {"run": run, "name": name, "save": save, "stop": stop, "status": gr.HTML("", elem_id="merge-status", padding=False)}


def _recipe_boxes() -> dict:
    recipe = gr.Code(language="yaml", label="Recipe", interactive=False, elem_id="recipe", max_lines=16,
                     buttons=["copy", "download"])
    command = gr.Code(language="shell", label="The same on the command line", interactive=False, elem_id="command", lines=2,
                      wrap_lines=True, buttons=["copy"])
    with gr.Accordion("Load a recipe", open=False, elem_id="load-recipe"):
        paste = gr.Code(language="yaml", label="Paste a recipe", interactive=True, elem_id="recipe-in", lines=6, max_lines=16)
        load = gr.Button("Load", size="sm", elem_id="recipe-load")
    return {"recipe": recipe, "command": command, "paste": paste, "load": load}


def _formula(method: str) -> str:
    entry = METHODS[method]
    return f"<div class='fs-formula'><code>{entry.formula}</code><p>{entry.summary}</p><small>{entry.source}</small></div>"


def _donors(studio: Studio, now: Selection) -> list[tuple[str, str]]:
    return [("the pivot", "pivot"), *((studio.title(key), key) for key in now.targets)]


def _bind_settings(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, tab: MergeTab) -> None:
    quiet = {"show_progress": "hidden", "api_visibility": "private"}

    def read(method, granularity, measure, *rest):
        *weights, exclude, dtype, donor, wish = rest
        try:
            return _settings(method, granularity, measure, weights, exclude, dtype, donor, wish)
        except FusionError as error:
            raise gr.Error(str(error)) from error

    def show(now: Selection, wish: Settings):
        measured = METHODS[wish.method].measured
        recipe, command = _recipe_and_command(studio, now, wish)
        numbers = [gr.Number(value=wish.weights[i] if i < len(wish.weights) else 1.0, visible=i < len(now.targets),
                             label=f"Weight of {LETTERS[i]}") for i in range(MAX_TARGETS)]
        donor = wish.donor if wish.donor in now.targets else "pivot"
        return [wish.method, gr.Radio(value=wish.granularity, visible=measured), gr.Radio(value=wish.measure, visible=measured),
                *numbers, "\n".join(wish.exclude), wish.dtype, gr.Dropdown(_donors(studio, now), value=donor),
                _formula(wish.method), gr.Row(visible=not measured), recipe, command]

    inputs = [*tab.controls, settings]
    gr.on([tab.method.input, tab.granularity.input, tab.measure.input, tab.exclude.blur, tab.dtype.input, tab.donor.input,
           *(number.input for number in tab.weights)], read, inputs, settings, trigger_mode="always_last", **quiet)
    gr.on([page.load, selection.change, settings.change], show, [selection, settings],
          [*tab.controls, tab.formula, tab.weights_row, tab.recipe, tab.command], trigger_mode="always_last", **quiet)

    def load(text: str, merges: Selection):
        try:
            if len(text or "") > MAX_RECIPE_CHARS:
                raise gr.Error("The recipe is too long.")
            now, wish = studio.adopt(Recipe.from_yaml(text or ""))
        except FusionError as error:
            raise gr.Error(str(error)) from error
        gr.Info("The recipe is loaded.")
        return replace(now, merges=merges.merges), wish

    tab.load.click(load, [tab.paste, selection], [selection, settings], show_progress="hidden", api_name="load_recipe")


def _settings(method, granularity, measure, weights, exclude, dtype, donor, wish: Settings) -> Settings:
    """Settings from the controls' values, which come from outside; the recipe checks what they mean."""
    numbers = tuple(float(w) if isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 else 0.0 for w in weights)
    patterns = tuple(dict.fromkeys(line.strip() for line in str(exclude or "").splitlines()[:200] if line.strip()))
    changed = replace(wish, method=str(method), granularity=str(granularity), measure=str(measure), exclude=patterns,
                      weights=numbers if method == "linear" else wish.weights, dtype=str(dtype or ""), donor=str(donor))
    Recipe("pivot", ("target",), method=changed.method, granularity=changed.granularity, measure=changed.measure,
           dtype=changed.dtype).check()
    return changed


def _recipe_and_command(studio: Studio, now: Selection, wish: Settings) -> tuple[str, str]:
    """The recipe as YAML and the command line for it; the reason instead while there is none."""
    try:
        recipe = studio.recipe(now, wish)
        WeightPlan.of(recipe, mergeable_names(studio.checkpoint(now.pivot)))
        return recipe.to_yaml(), command_line(recipe)
    except FusionError as error:
        return f"# {error}".replace("\n", "\n# "), ""


def command_line(recipe: Recipe, out: str = "my-merge") -> str:
    """The CLI command that does what a recipe says; by file when hand-given weights would make it too long."""
    if len(recipe.overrides) > 6 or recipe.names != tuple(short_names((recipe.pivot, *recipe.targets))[1:]):
        return f"python -m fusion merge recipe.yaml --out {out}   # with the recipe above saved as recipe.yaml"
    words = ["python", "-m", "fusion", "merge", recipe.pivot, *recipe.targets, "--method", recipe.method]
    if METHODS[recipe.method].measured:
        words += ["--granularity", recipe.granularity] + (["--measure", recipe.measure] if recipe.measure != "square" else [])
    elif recipe.weights:
        words += ["--weights", ",".join(f"{weight:g}" for weight in recipe.weights)]
    for override in recipe.overrides:
        pairs = ",".join(f"{name}={weight:.6g}" for name, weight in override.weights.items())
        words += ["--override", f"{override.tensors}:{pairs}"]
    for pattern in recipe.exclude:
        words += ["--exclude", pattern]
    words += ["--dtype", recipe.dtype] if recipe.dtype else []
    words += ["--donor", recipe.donor] if recipe.donor != "pivot" else []
    return shlex.join([*words, "--out", out])


def _bind_running(studio: Studio, selection: gr.State, settings: gr.State, tab: MergeTab, tabs: gr.Tabs) -> None:
    def merge_and_try(now: Selection, wish: Settings) -> Iterator[tuple]:
        """Merge the selected models in memory and open the result in Chat."""
        work = studio.try_merge(now, wish)
        try:
            while True:
                yield gr.skip(), bar(next(work)), gr.skip()
        except StopIteration as end:
            made = end.value
            yield now.with_merge(made), note("good", f"{made.title} is ready in Chat."), gr.Tabs(selected="chat")
        except FusionError as error:
            yield gr.skip(), error_note(str(error)), gr.skip()
        finally:
            work.close()

    tab.run.click(merge_and_try, [selection, settings], [selection, tab.status, tabs], api_name="merge_and_try",
                  show_progress="hidden", concurrency_limit=2)


def _bind_saving(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, job: gr.BrowserState,
                 tab: MergeTab) -> tuple[Dependency, Dependency]:
    buttons = [tab.status, tab.save, tab.stop]

    def begin(name: str, now: Selection, wish: Settings) -> str:
        """Start saving the selected merge as a folder; returns the id to follow it by."""
        try:
            folder = studio.output_folder(name)
            recipe, variation = studio.recipe(now, wish), studio.measured(now)
            return studio.jobs.start(folder.name, lambda: merge(recipe, folder, variation=variation),
                                     lambda result: studio.offer_output(result.folder)).id
        except FusionError as error:
            raise gr.Error(str(error)) from error

    async def attach(job_id: str | None) -> AsyncIterator[tuple]:
        saving, shown = studio.jobs.get(job_id), None
        yield [gr.skip()] * 3
        while saving is not None:
            view = _job_view(saving, studio.outputs)
            if view != shown:
                shown = view
                text, running = view
                yield gr.HTML(text), gr.Button(visible=not running), gr.Button(visible=running)
            if saving.ended:
                return
            await asyncio.sleep(POLL_S)

    follow = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    started = tab.save.click(begin, [tab.name, selection, settings], job, api_name="save", show_progress="hidden",
                             concurrency_limit=4)
    tab.stop.click(studio.jobs.stop, job, None, queue=False, show_progress="hidden", api_visibility="private")
    return started.success(attach, job, buttons, **follow), page.load(attach, job, buttons, **follow)


def _job_view(saving, outputs: Path) -> tuple[str, bool]:
    """What the page shows of a job, and whether it still runs."""
    if saving.state == "done":
        contents = "weights, tokenizer, recipe, variation report and model card"
        return note("good", f"Saved as {outputs.name}/{saving.title}: {contents}."), False
    if saving.state == "stopped":
        return note("warning", f"Saving {saving.title} was stopped; nothing was left behind."), False
    if saving.state == "failed":
        return error_note(saving.error), False
    return bar(saving.progress, f"Saving {saving.title}"), True
