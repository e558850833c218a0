"""The page: header, tabs in their order, and the two states they share."""

from __future__ import annotations

import gradio as gr

from components import chat, evaluating, fusing, merging, models, variation
from components.state import Settings
from components.studio import Studio
from components.theme import ASSETS

HEADER = f"""<header class="fs-header">{(ASSETS / "logo.svg").read_text(encoding="utf-8")}
<div><h1>FuseChat Studio</h1>
<p>See how far chat models moved, merge them by it, and chat with the result beside its sources.</p></div></header>"""


def build(studio: Studio) -> gr.Blocks:
    """Build the page for a studio; launch it with the theme, style and head of `components.theme`."""
    first = studio.first_selection()
    with gr.Blocks(title="FuseChat Studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        selection, settings = gr.State(first), gr.State(Settings())
        job = gr.BrowserState(None, storage_key="fusechat-save")  # not inside a tab: those are mounted only when opened
        fusion_job = gr.BrowserState(None, storage_key="fusechat-fuse")
        evaluation = gr.BrowserState(None, storage_key="fusechat-evaluation")
        gr.HTML(HEADER, elem_id="header")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("1 · Models", id="models"):
                picked = models.build(studio, selection)
            with gr.Tab("2 · Variation", id="variation"):
                variation.build(studio, page, selection, settings, picked.glance)
            with gr.Tab("3 · Merge", id="merge"):
                _, *merged = merging.build(studio, page, selection, settings, job, tabs)
            with gr.Tab("4 · Chat", id="chat"):
                chat.build(studio, selection)
            with gr.Tab("5 · Fuse", id="fuse") as fuse:
                fused = fusing.build(studio, page, fuse, selection, fusion_job)
            with gr.Tab("6 · Evaluate", id="evaluate"):
                evaluating.build(studio, page, selection, evaluation)
        menus = [picked.pivot, picked.targets, picked.sources, picked.table]
        for event in (*merged, *fused):  # a loaded recipe is picked; a saved merge, or what a fusion made, can be
            event.then(lambda now: models.follow(studio, now), selection, menus, show_progress="hidden", api_visibility="private")
    return page
