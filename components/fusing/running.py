"""Running a fusion as a job that outlives the page: its stages and loss curves as they come, Stop, and new models at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from components.fusing.curves import drawn
from components.fusing.layout import FuseTab, menu
from components.fusing.planning import card
from components.fusing.setting import NAMES, read
from components.jobs import Job, Jobs
from components.status import bar, error_note, note
from components.studio import Studio
from fusion import FusionError, RecipeError
from fusion.pairwise import FuseRecipe, FuseResult, plan, run
from fusion.pairwise.cost import Cost, predict
from fusion.pairwise.place import begin, curves, recipe_of

POLL_S = 0.4


def bind(studio: Studio, page: gr.Blocks, selection: gr.State, job: gr.BrowserState, tab: FuseTab) -> tuple[Dependency, ...]:
    """Bind Fuse and Stop; returns the events that end with new models."""
    jobs = Jobs()  # not the studio's: saving a merge need not wait for a training
    running: dict[str, Job] = {}
    shown = [tab.status, tab.run, tab.stop, tab.curves, tab.plan]

    def fuse(*values) -> str:
        """Start a fusion run, or go on with one; returns the id to follow it by."""
        try:
            return _start(studio, jobs, running, values).id
        except FusionError as error:
            raise gr.Error(str(error)) from error

    async def attach(job_id: str | None) -> AsyncIterator[list]:
        its = jobs.get(job_id)
        yield [gr.skip()] * len(shown)
        if its is None:
            return
        try:
            watch = await asyncio.to_thread(_Watch, its, studio.outputs)
        except FusionError as error:  # somebody removed the folder
            yield [error_note(str(error)), *[gr.skip()] * (len(shown) - 1)]
            return
        stands = ["", "", ""]
        while True:
            ended, changed = its.ended, await asyncio.to_thread(watch.changes)
            if any(changed):
                stands = [old if text is None else text for text, old in zip(changed, stands, strict=True)]
                yield [stands[0], gr.Button(visible=ended), gr.Button(visible=not ended), *stands[1:]]
            if ended:
                return
            await asyncio.sleep(POLL_S)

    follow = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    inputs = [tab.controls[name] for name in NAMES]
    started = tab.run.click(fuse, inputs, job, api_name="fuse", show_progress="hidden", concurrency_limit=4)
    tab.stop.click(jobs.stop, job, None, queue=False, show_progress="hidden", api_visibility="private")
    ended = started.success(attach, job, shown, **follow), page.load(attach, job, shown, **follow)
    menus = [tab.controls["pivot"], tab.controls["sources"], tab.source]
    for event in ended:
        event.then(lambda: [gr.Dropdown(choices=menu(studio)) for _ in menus], None, menus, **follow)
    return ended


def _start(studio: Studio, jobs: Jobs, running: dict[str, Job], values: tuple) -> Job:
    if studio.public:
        raise RecipeError("nothing is trained on a public page", todo="Copy the recipe and run it on your own machine.")
    wish = read(studio, values)
    name = wish.out.name
    if name in running and not running[name].ended:
        raise RecipeError("this run is going on already", where=name, todo="Wait for it, stop it, or choose another name.")
    begin(wish.recipe, wish.out, wish.records)

    def offer(result: FuseResult) -> None:
        for folder in (*result.targets.values(), *([result.merged] if result.merged else [])):
            studio.offer_output(folder)

    running[name] = jobs.start(name, lambda: run(wish.recipe, wish.out), offer)
    return running[name]


class _Watch:
    """What a page has to show of a job, and what of that has changed since it was last asked."""

    def __init__(self, job: Job, outputs: Path):
        self._job, self._outputs, self._out = job, outputs, outputs / job.title
        self._recipe: FuseRecipe = recipe_of(self._out)
        self._price: Cost | None = _priced(self._recipe, self._out)
        self._before: tuple[str, ...] = ("", "", "")

    def changes(self) -> list[str | None]:
        """Status, loss curves and stages as HTML; None for what is as before."""
        stage = self._job.progress.stage if self._job.progress and not self._job.ended else ""
        stages = plan(self._recipe, self._out)
        if self._price is None and stages[0].done:
            self._price = _priced(self._recipe, self._out)
        now = (self._status(), drawn(curves(self._recipe, self._out), self._recipe.training.lm_weight),
               card(stages, self._price if not self._job.ended else None, stage, ended=self._job.ended))
        changed = [text if text != before else None for text, before in zip(now, self._before, strict=True)]
        self._before = now
        return changed

    def _status(self) -> str:
        job, folder = self._job, f"{self._outputs.name}/{self._job.title}"
        if job.state == "done":
            made = ", ".join([*self._recipe.target_names, *([job.result.merged.name] if job.result.merged else [])])
            return note("good", f"{made} lie in {folder} and are in the menus of Models.")
        if job.state == "stopped":
            return note("warning", f"{job.title} was stopped; press Fuse to go on with what is not yet done.")
        if job.state == "failed":
            return error_note(job.error)
        return bar(job.progress, job.progress.stage if job.progress else job.title)


def _priced(recipe: FuseRecipe, out: Path) -> Cost | None:
    try:
        return predict(recipe, out)
    except FusionError:  # the run itself says what is wrong
        return None
