"""The Chat tab's components, from top to bottom; what they do is bound in `handlers`."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from components.chat.columns import MAX_COLUMNS, MIN_COLUMNS, default_keys, header, letter
from components.state import LETTERS, Selection

MAX_PROMPT_CHARS = 8_000
MAX_SYSTEM_CHARS = 4_000
MAX_TOKENS = 1_024
MAX_SEED = 2**31 - 1
LATEX = [{"left": left, "right": right, "display": display}
         for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))]
EMPTY = """<div class="fc-empty"><strong>Nothing said yet</strong>
<span>Write a message below or pick an example: every column answers the same prompt with the same seed.</span></div>"""
# A live region must stand on the page before its text changes, or screen readers stay silent. The chat windows are live
# regions too and would read out every token of every column at once; Gradio calls four empty windows landmarks of one
# name, and leaves send and stop without any.
LIVE = "<div class='fc-live' role='status' aria-live='polite'></div>"
LIVE_JS = """const region = element.querySelector('.fc-live');
const set = (what, name, value) => document.querySelectorAll(what).forEach(e => e.setAttribute(name, value));
const tidy = () => {
  set('#chat-columns [role=log]', 'aria-live', 'off');
  set('#chat-columns [role=complementary]', 'role', 'note');
  set('#chat-prompt .submit-button', 'aria-label', 'Send to all models');
  set('#chat-prompt .stop-button', 'aria-label', 'Stop all models');
  if (element.isConnected && !document.querySelector('#chat-prompt button[aria-label]')) setTimeout(tidy, 200);
};
// Messages are Markdown with some letters as entities (markdown.py): who copies or edits one gets the letters.
const letter = code => code === 'A0' ? ' ' : String.fromCharCode(parseInt(code, 16));
const plain = text => text.replace(/&#x000(3C|26|5B|A0|5C|60);/g, (_, code) => letter(code));
const edited = () => document.querySelectorAll('#chat-columns textarea.edit-textarea:not([data-plain])').forEach(box => {
  box.dataset.plain = 'yes';
  if (plain(box.value) === box.value) return;
  box.value = plain(box.value);
  box.dispatchEvent(new Event('input', {bubbles: true}));
});
if (navigator.clipboard && !navigator.clipboard.plain) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = text => write(plain(text));
  navigator.clipboard.plain = plain;
}
new MutationObserver(edited).observe(document.querySelector('#chat-columns') || document.body, {childList: true, subtree: true});
const speak = () => { region.textContent = props.value || ''; setTimeout(tidy, 100); };
watch('value', speak); speak();"""


@dataclass(frozen=True)
class ChatTab:
    """The components of the Chat tab; lists have one entry per column, the hidden ones too."""

    conversation: gr.State
    seen_merges: gr.State
    count: gr.Radio
    boxes: list[gr.Column]
    models: list[gr.Dropdown]
    heads: list[gr.HTML]
    bots: list[gr.Chatbot]
    prompt: gr.Textbox
    stop: gr.Button
    retry: gr.Button
    undo: gr.Button
    clear: gr.Button
    export: gr.DownloadButton
    domain: gr.Radio
    examples: gr.Dataset
    settings: list[Any]  # system prompt, temperature, top-p, max tokens, seed
    rendered: list[gr.Code]
    live: gr.HTML

    @property
    def seed(self) -> gr.Number:
        """The seed that all columns share."""
        return self.settings[-1]


def lay_out(studio: Any, selection: Selection, count: int = 3) -> ChatTab:
    """Create the tab's components with the models of the selection already in their columns."""
    conversation, seen = gr.State(()), gr.State(tuple(merge.key for merge in selection.merges))
    with gr.Row(elem_id="chat-top"):
        gr.HTML("<p class='fc-lead'>One prompt to every model, side by side: the same seed and sampling, "
                "each with its own chat template.</p>", elem_id="chat-lead")
        number = gr.Radio([(str(n), n) for n in range(MIN_COLUMNS, MAX_COLUMNS + 1)], value=count, label="Columns",
                          elem_id="chat-count", min_width=150, scale=0)
    with gr.Row(elem_id="chat-columns", equal_height=True):
        columns = [_column(studio, selection, i, key, i < count) for i, key in enumerate(default_keys(selection))]
    prompt = gr.Textbox(placeholder="Message all models …", label="Message to all models", show_label=False, lines=1,
                        max_lines=8, max_length=MAX_PROMPT_CHARS, submit_btn=True, container=False,
                        elem_id="chat-prompt", interactive=True)
    with gr.Row(elem_id="chat-actions"):
        actions = [gr.Button(name, size="sm", interactive=False, min_width=72, scale=0, elem_id=f"chat-{name.lower()}")
                   for name in ("Stop", "Retry", "Undo", "Clear")]
        export = gr.DownloadButton("Export JSONL", size="sm", interactive=False, min_width=120, scale=0,
                                   elem_id="chat-export")
    domain, examples = _examples(studio)
    settings = _settings()
    with gr.Accordion("Rendered prompt — what each model really reads", open=False, elem_id="chat-rendered"), gr.Row():
        rendered = [gr.Code(value="", language=None, label=f"Prompt of {LETTERS[i]}", interactive=False, lines=4,
                            max_lines=16, wrap_lines=True, show_line_numbers=False, min_width=260, visible=i < count,
                            elem_id=f"chat-rendered-{LETTERS[i].lower()}") for i in range(MAX_COLUMNS)]
    live = gr.HTML("", html_template=LIVE, js_on_load=LIVE_JS, apply_default_css=False, elem_id="chat-live")
    boxes, models, heads, bots = (list(parts) for parts in zip(*columns, strict=True))
    return ChatTab(conversation, seen, number, boxes, models, heads, bots, prompt, *actions, export, domain, examples,
                   settings, rendered, live)


def _column(studio: Any, selection: Selection, i: int, key: str | None, visible: bool
            ) -> tuple[gr.Column, gr.Dropdown, gr.HTML, gr.Chatbot]:
    name = LETTERS[i].lower()
    with gr.Column(visible=visible, min_width=240, elem_id=f"chat-column-{name}",
                   elem_classes=["fc-column", f"fc-column-{name}"]) as box:
        with gr.Row(elem_classes="fc-title"):
            gr.HTML(letter(i), min_width=30, scale=0, elem_classes="fc-letter-box")
            model = gr.Dropdown([(studio.title(k), k) for k in selection.chat_keys()], value=key, filterable=False,
                                label=f"Model in column {LETTERS[i]}", show_label=False, container=False,
                                min_width=120, interactive=True, elem_id=f"chat-model-{name}")
        head = gr.HTML(header(studio.role(key, selection) if key else "", None), elem_id=f"chat-head-{name}")
        bot = gr.Chatbot(label=f"Conversation with model {LETTERS[i]}", show_label=False, height=440, editable="user",
                         buttons=["copy"], sanitize_html=True, latex_delimiters=LATEX, feedback_options=None,
                         placeholder=EMPTY, layout="bubble",
                         elem_id=f"chat-bot-{name}")
    return box, model, head, bot


def _examples(studio: Any) -> tuple[gr.Radio, gr.Dataset]:
    domains = list(studio.examples)
    first = domains[0] if domains else None
    with gr.Column(elem_id="chat-ideas", visible=bool(domains)):
        domain = gr.Radio(domains, value=first, label="Example prompts", elem_id="chat-domain", container=False)
        # Samples of a textbox would be cut after 60 characters; those of HTML are shown whole.
        examples = gr.Dataset(components=["html"], samples=samples(studio.examples.get(first, [])), type="index",
                              label="Example prompts", show_label=False, container=False, samples_per_page=24,
                              elem_id="chat-examples")
    return domain, examples


def samples(prompts: list[str]) -> list[list[str]]:
    """Example prompts as rows of the dataset, escaped, since it shows them as HTML."""
    return [[escape(prompt)] for prompt in prompts]


def _settings() -> list[Any]:
    with gr.Accordion("Sampling — the same for every column", open=False, elem_id="chat-settings"):
        system = gr.Textbox(label="System prompt", placeholder="Optional: how the models should behave", lines=2,
                            max_lines=6, max_length=MAX_SYSTEM_CHARS, elem_id="chat-system")
        with gr.Row():
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", min_width=200,
                                    info="0 takes the likeliest token; higher is freer", elem_id="chat-temperature")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", min_width=200,
                              info="Sample from the likeliest tokens that hold this share", elem_id="chat-top-p")
            tokens = gr.Slider(1, MAX_TOKENS, value=256, step=1, label="Max tokens", min_width=200,
                               info="Where an answer is cut at the latest", elem_id="chat-max-tokens")
            seed = gr.Number(value=0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", min_width=120,
                             info="Same seed, same text", elem_id="chat-seed")
    return [system, temperature, top_p, tokens, seed]
