"""The Merge tab: method, its form, what else a recipe can say; the recipe they make; try it in memory or save it as a folder."""

from __future__ import annotations

import gradio as gr
from gradio.events import Dependency

from components import comparing, reports
from components.merging import running, setting
from components.merging.layout import MergeTab, lay_out
from components.studio import Studio

__all__ = ["MergeTab", "build"]


def build(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, job: gr.BrowserState,
          tabs: gr.Tabs) -> tuple[MergeTab, Dependency, Dependency, Dependency]:
    """Lay out the tab and bind its events; `job` keeps the id of a save in the browser, `tabs` jumps to Chat.

    Returns the tab, the event that loads a recipe, and the two that end with a saved folder: saving now, and a page that came
    back to a job.
    """
    tab = lay_out(studio, selection.value)
    loaded = setting.bind(studio, page, selection, settings, tab)
    running.bind_trying(studio, selection, settings, tab, tabs)
    saved = running.bind_saving(studio, page, selection, settings, job, tab)
    comparing.build(studio, page, selection)
    reports.bind(studio, page, selection, tab.report, saved[0], tab.name)
    return tab, loaded, *saved
