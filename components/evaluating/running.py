"""Running an evaluation as a job that outlives the page, and showing what it found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from components.evaluating import asking, showing
from components.evaluating.chart import chart
from components.evaluating.layout import EvaluateTab
from components.jobs import Job, Jobs
from components.state import Selection
from components.status import bar, error_note, note
from components.studio import Studio
from fusion import FusionError, evaluate

POLL_S = 0.25
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def bind_menus(studio: Studio, page: gr.Blocks, selection: gr.State, tab: EvaluateTab) -> None:
    """Bind what keeps the menus in step with the visitor's selection, and the panel of the chosen kind."""
    before = gr.State(selection.value)

    def follow(now: Selection, was: Selection, picked: list[str], reference: str | None) -> list:
        keys = _followed(studio, now, was, tuple(picked or ()))
        menu = _menu(asking.choices(studio, now), list(keys), picked)
        return [now, menu, _reference(studio, now, keys, reference)]

    def pick(now: Selection, picked: list[str], reference: str | None) -> gr.Dropdown:
        return _reference(studio, now, tuple(picked or ()), reference)

    def turn(kind: str) -> list[gr.Column]:
        return [gr.Column(visible=name == kind) for name in tab.panels]

    gr.on([page.load, selection.change], follow, [selection, before, tab.models, tab.reference],
          [before, tab.models, tab.reference], **_QUIET)
    tab.models.change(pick, [selection, tab.models, tab.reference], tab.reference, **_QUIET)
    tab.kind.input(turn, tab.kind, list(tab.panels.values()), **_QUIET)


def _followed(studio: Studio, now: Selection, was: Selection, picked: tuple[str, ...]) -> tuple[str, ...]:
    """Who is picked after the selection changed: the usual ones, or a person's own choice and what was merged since."""
    if picked == asking.usual(was) or not picked:
        return asking.usual(now)
    known = {key for _, key in asking.choices(studio, now)}
    new = [merge.key for merge in now.merges if merge not in was.merges]
    return tuple(dict.fromkeys((*new, *(key for key in picked if key in known))))[:asking.MAX_MODELS]


def _reference(studio: Studio, now: Selection, picked: tuple[str, ...], reference: str | None) -> gr.Dropdown:
    kept = reference if reference in (*picked, asking.NONE) else asking.usual_reference(now, picked)
    return _menu(asking.references(studio, now, picked), kept, reference)


def _menu(choices: list[tuple[str, str]], wanted: object, shown: object) -> gr.Dropdown:
    """A menu's new choices; its value only where it changes, so that a slow answer takes nothing back that was picked meanwhile."""
    return gr.Dropdown(choices) if wanted == shown else gr.Dropdown(choices, value=wanted)


def bind_running(studio: Studio, page: gr.Blocks, selection: gr.State, job: gr.BrowserState, tab: EvaluateTab) -> None:
    """Bind Evaluate and Stop; a page that is opened again finds its evaluation by the id that its browser keeps."""
    jobs = Jobs()  # beside those that save: an evaluation is long and must not keep a save waiting
    shown = [tab.status, tab.run, tab.stop, tab.results, tab.table, tab.chart, tab.command, *tab.downloads, tab.notes, tab.answers]

    def begin(now: Selection, *values) -> str:
        """Start evaluating models (keys) by domains, perplexity, a judge or lm-eval; returns the id to follow it by."""
        try:
            wanted = asking.asked(studio, asking.Form(*values), now)
            return jobs.start(wanted.title, wanted.work).id
        except FusionError as error:
            raise gr.Error(str(error)) from error

    async def attach(job_id: str | None) -> AsyncIterator[list]:
        running, last = jobs.get(job_id), None
        yield [gr.skip()] * len(shown)
        while running is not None:
            view = _stands(running)
            if view != last:
                last = view
                yield _view(running, view, tab)
            if view[1]:
                return
            await asyncio.sleep(POLL_S)

    follow = {**_QUIET, "concurrency_limit": None}
    started = tab.run.click(begin, [selection, *tab.asked], job, api_name="evaluate", show_progress="hidden", concurrency_limit=4)
    started.success(attach, job, shown, **follow)
    page.load(attach, job, shown, **follow)
    tab.stop.click(jobs.stop, job, None, queue=False, **_QUIET)


def _stands(job: Job) -> tuple[str, bool]:
    """What is said of a job, and whether it has ended."""
    if job.state == "done":
        return showing.summary(job.result.evaluation), True
    if job.state == "stopped":
        kept = " What was answered and judged is kept: the same again goes on from there." * (job.title == "A judge")
        return note("warning", f"Stopped.{kept}"), True
    if job.state == "failed":
        return error_note(job.error), True
    if job.stop.is_set():
        return note("warning", "Stopping: the answers that are being written come to their end first …"), False
    progress = job.progress
    return bar(progress, f"{progress.stage} {progress.note}".strip() if progress else job.title), False


def _view(job: Job, view: tuple[str, bool], tab: EvaluateTab) -> list:
    """The whole tab as a job stands."""
    text, ended = view
    buttons = [text, gr.Button(visible=ended), gr.Button(visible=not ended, interactive=not job.stop.is_set())]
    if job.state != "done":
        return [*buttons, gr.Column(visible=False), *[gr.skip()] * (len(tab.downloads) + 5)]
    done: evaluate.Evaluation = job.result.evaluation
    figure = chart(done.table)
    files = [gr.DownloadButton(value=path) for path in _files(done, tab.table.GRADIO_CACHE)]
    return [*buttons, gr.Column(visible=True), showing.table_html(done.table), gr.Plot(figure, visible=figure is not None),
            job.result.command, *files, showing.notes_html(done.table), showing.answers_html(done)]


def _files(done: evaluate.Evaluation, cache: str) -> list[str]:
    """Table and answers in Gradio's cache; returns their paths."""
    contents = (("fusechat-evaluation.csv", done.table.csv()), ("fusechat-evaluation.md", done.table.markdown()),
                ("fusechat-evaluation.json", evaluate.document(done)))
    return [save_bytes_to_cache(text.encode("utf-8", "replace"), name, cache) for name, text in contents]
