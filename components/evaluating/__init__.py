"""The Evaluate tab: which models, against which one, by what; then a table, a chart, every answer, and files to keep."""

from __future__ import annotations

import gradio as gr

from components.evaluating import running
from components.evaluating.layout import EvaluateTab, lay_out
from components.studio import Studio

__all__ = ["EvaluateTab", "build"]


def build(studio: Studio, page: gr.Blocks, selection: gr.State, job: gr.BrowserState) -> EvaluateTab:
    """Lay out the tab and bind its events; `job` keeps the id of an evaluation in the browser."""
    tab = lay_out(studio, selection.value)
    running.bind_menus(studio, page, selection, tab)
    running.bind_running(studio, page, selection, job, tab)
    return tab
