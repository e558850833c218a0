"""The Chat tab: two to four models side by side, one prompt to all, streamed at once.

`build` is called inside a `gr.Tab`. It needs of the studio: `title(key)`, `role(key, selection)`,
`chat_model(key, selection)` (a context manager that lends a ChatModel) and `examples` (domain → prompts).
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from components.chat.handlers import Handlers
from components.chat.layout import ChatTab, lay_out
from components.state import Selection

__all__ = ["ChatTab", "build"]

CONCURRENT_CHATS = 4


def build(studio: Any, selection: gr.State) -> ChatTab:
    """Lay out the Chat tab and bind what it does; it follows `selection` by itself, new merges into the first column."""
    tab = lay_out(studio, selection.value or Selection())
    do = Handlers(studio, tab)
    columns = [*tab.heads, *tab.bots, *tab.rendered]
    _bind_asking(tab, do, selection, columns)
    shown = [tab.conversation, selection, *tab.models]
    cut = [tab.conversation, tab.export, tab.prompt, tab.live, tab.stop, tab.retry, tab.undo, tab.clear, tab.count,
           *tab.models, *columns]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([tab.stop.click, tab.prompt.stop], do.stop, queue=False, **quiet)
    tab.undo.click(do.undo, shown, cut, **quiet)
    gr.on([bot.undo for bot in tab.bots], do.undo_at, shown, cut, **quiet)
    gr.on([tab.clear.click, *[bot.clear for bot in tab.bots]], do.clear, shown, cut, **quiet)
    gr.on([menu.input for menu in tab.models], do.refresh, shown, columns, **quiet)
    tab.count.change(do.recount, tab.count, [*tab.boxes, *tab.rendered], **quiet)
    tab.domain.change(do.suggest, tab.domain, [tab.examples], **quiet)
    selection.change(do.select, [tab.conversation, selection, tab.seen_merges, *tab.models],
                     [tab.seen_merges, *tab.models, *columns], **quiet)
    return tab


def _bind_asking(tab: ChatTab, do: Handlers, selection: gr.State, columns: list[Any]) -> None:
    """The five ways to ask share one limit: answers cost processor time, whichever button started them."""
    given = [tab.conversation, selection, tab.count, *tab.models, *tab.settings]
    changed = [tab.conversation, tab.prompt, tab.stop, tab.retry, tab.undo, tab.clear, tab.export, tab.count, tab.seed,
               tab.live, *tab.models, *columns]
    busy = {"show_progress": "hidden", "concurrency_id": "chat", "concurrency_limit": CONCURRENT_CHATS}
    private = {**busy, "api_visibility": "private"}
    events = [
        tab.prompt.submit(do.chat, [tab.prompt, *given], changed, api_name="chat", **busy),
        tab.examples.click(do.example, [tab.domain, tab.examples, *given], changed, **private),
        tab.retry.click(do.retry, given, changed, **private),
        gr.on([bot.retry for bot in tab.bots], do.retry_at, given, changed, **private),
        gr.on([bot.edit for bot in tab.bots], do.edit, given, changed, **private),
    ]
    for event in events:  # a merge may have been made meanwhile: show the columns with the models they have now
        event.then(do.settle, [tab.conversation, selection, *tab.models], [*columns, tab.retry, tab.undo, tab.clear],
                   show_progress="hidden", api_visibility="private")
