"""Merging: in memory to try it at once, or as a job that saves a folder and outlives the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from components.inspecting import paced
from components.merging.layout import MergeTab
from components.state import Selection, Settings
from components.status import bar, error_note, note
from components.studio import Studio
from fusion import FusionError, merge

POLL_S = 0.25


def bind_trying(studio: Studio, selection: gr.State, settings: gr.State, tab: MergeTab, tabs: gr.Tabs) -> None:
    """Bind the button that merges in memory and opens Chat."""
    def merge_and_try(now: Selection, wish: Settings) -> Iterator[tuple]:
        """Merge the selected models in memory and open the result in Chat."""
        work = paced(studio.try_merge(now, wish))
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


def bind_saving(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, job: gr.BrowserState,
                 tab: MergeTab) -> tuple[Dependency, Dependency]:
    buttons = [tab.status, tab.save, tab.stop]

    def begin(name: str, now: Selection, wish: Settings) -> str:
        """Start saving the selected merge as a folder; returns the id to follow it by."""
        try:
            folder = studio.output_folder(name)
            recipe = studio.recipe(now, wish)
            variation = studio.measured(now) if recipe.measured and not recipe.slices else None
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
        contents = "weights, tokenizer, recipe and model card"
        return note("good", f"Saved as {outputs.name}/{saving.title}: {contents}."), False
    if saving.state == "stopped":
        return note("warning", f"Saving {saving.title} was stopped; nothing was left behind."), False
    if saving.state == "failed":
        return error_note(saving.error), False
    return bar(saving.progress, f"Saving {saving.title}"), True
