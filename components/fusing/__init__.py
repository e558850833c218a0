"""The Fuse tab: make targets of the pivot's shape out of models of any architecture, and see how their words are carried over."""

from __future__ import annotations

import gradio as gr
from gradio.events import Dependency

from components.fusing import aligning, planning, running
from components.fusing.layout import FuseTab, lay_out
from components.studio import Studio

__all__ = ["FuseTab", "build"]


def build(studio: Studio, page: gr.Blocks, here: gr.Tab, selection: gr.State, job: gr.BrowserState) -> tuple[Dependency, ...]:
    """Lay out the tab and bind its events; `here` is the tab itself, `job` keeps the id of a run in the browser.

    Returns the events that end with new models: a run that was started, and a page that came back to one.
    """
    tab = lay_out(studio)
    planning.bind(studio, page, here, tab)
    aligning.bind(studio, here, tab)
    return running.bind(studio, page, selection, job, tab)
