"""What the Chat tab does. Every handler is a public endpoint: what comes in is looked up or checked before it is used.

The conversation is kept in a gr.State of frozen turns and never read back from the chat windows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from components.chat.columns import checked_keys, header, next_keys, spoken
from components.chat.history import Conversation, Turn, messages_for, transcripts, turn_at, view
from components.chat.layout import MAX_PROMPT_CHARS, MAX_SEED, MAX_SYSTEM_CHARS, MAX_TOKENS, ChatTab, samples
from components.chat.markdown import original
from components.chat.running import Running
from components.state import LETTERS, Selection
from fusion.chat import Request, Sampling, conversation_jsonl, stream
from fusion.errors import FusionError, RecipeError

MAX_TURNS = 40
Update = dict[Any, Any]
Updates = Generator[Update, None, None]


@contextmanager
def politely(title: str = "Not sent") -> Iterator[None]:
    """Show what a person can solve as a message on the page; anything else is a bug and keeps its traceback."""
    try:
        yield
    except FusionError as error:
        raise gr.Error(str(error), title=title, print_exception=False) from None


class Handlers:
    """The handlers of one Chat tab; all visitors share them, so nothing of a visitor is kept here but stop events.

    `given` stands for the values of `ChatTab.asked`: conversation, selection, number of columns, four keys, settings.
    """

    def __init__(self, studio: Any, tab: ChatTab):
        self.studio, self.tab, self.running = studio, tab, Running()

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────

    def chat(self, request: gr.Request, prompt: str, conversation: Conversation, selection: Selection, columns: int,
             model_a: str | None, model_b: str | None, model_c: str | None, model_d: str | None, system: str,
             temperature: float, top_p: float, max_tokens: int, seed: int) -> Updates:
        """Ask the models of all visible columns the same thing and stream their answers side by side.

        `columns` is 2 to 4; `model_a` to `model_d` are keys of models, one per column; system prompt, temperature,
        top-p, max tokens and seed hold for all. The conversation goes on within one session.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            yield {self.tab.prompt: gr.skip()}
            return
        with politely():
            turn = Turn(prompt, _sampling(system, temperature, top_p, max_tokens, seed))
            yield from self._ask(request, turn, conversation, selection, columns, (model_a, model_b, model_c, model_d))

    def example(self, request: gr.Request, domain: str, index: int, *given: Any) -> Updates:
        """Send the example prompt with this index in this domain."""
        prompts = self.studio.examples.get(domain, [])
        if isinstance(index, int) and 0 <= index < len(prompts):
            yield from self.chat(request, prompts[index], *given)

    def retry(self, request: gr.Request, *given: Any) -> Updates:
        """Ask the last question again."""
        yield from self._again(request, len(given[0]) - 1, None, *given)

    def retry_at(self, event: gr.RetryData, request: gr.Request, *given: Any) -> Updates:
        """Ask the question of this message again and forget what came after it."""
        yield from self._again(request, self._place(event, given[0], given[3:]), None, *given)

    def edit(self, event: gr.EditData, request: gr.Request, *given: Any) -> Updates:
        """Ask a changed question in place of an earlier one and forget what came after it."""
        prompt = original(event.value) if isinstance(event.value, str) else event.value
        yield from self._again(request, self._place(event, given[0], given[3:]), prompt, *given)

    def _again(self, request: gr.Request, at: int, prompt: str | None, conversation: Conversation,
               selection: Selection, count: int, *values: Any) -> Updates:
        if at < 0:
            yield {self.tab.prompt: gr.skip()}
            return
        *keys, system, temperature, top_p, max_tokens, seed = values
        with politely():
            sampling, old = _sampling(system, temperature, top_p, max_tokens, seed), conversation[at]
            if prompt is None and sampling == old.sampling and sampling.temperature and _all_answered(old, keys[:count]):
                # Equal settings and an equal seed would only write the same answers once more.
                sampling = replace(sampling, seed=(sampling.seed + 1) % MAX_SEED)
            # Answers of models that are not asked now stay comparable as long as the question is the same.
            same = prompt is None and sampling == old.sampling
            turn = old if same else Turn(old.prompt if prompt is None else prompt, sampling)
            if sampling.seed != seed:
                yield {self.tab.seed: sampling.seed}
            yield from self._ask(request, turn, conversation[:at], selection, count, keys)

    def _ask(self, request: gr.Request, turn: Turn, conversation: Conversation, selection: Selection, count: int,
             keys: Sequence[str | None]) -> Updates:
        """Stream one turn into all columns; the tab is locked meanwhile, and the state is written once, at the end."""
        asked = dict.fromkeys(checked_keys(selection, keys, count))
        _check_prompt(turn.prompt, conversation)
        requests = [Request(partial(self.studio.chat_model, key, selection),
                            messages_for(conversation, key, turn.prompt)) for key in asked]
        session, sent = request.session_hash or "", {}
        stop = self.running.begin(session)
        try:
            yield self._locked(True) | {self.tab.prompt: gr.Textbox(value="", submit_btn=False, stop_btn=True)}
            with closing(stream(requests, turn.sampling, stop)) as replies_so_far:
                for replies in replies_so_far:
                    turn = turn.with_replies(dict(zip(asked, replies, strict=True)))
                    shown = self._columns((*conversation, turn), selection, keys)
                    shown[self.tab.live] = self._spoken(turn, keys[:count])
                    news = {part: value for part, value in shown.items() if part not in sent or sent[part] != value}
                    sent |= news
                    if news:
                        yield news
        finally:
            self.running.end(session)
        talk = (*conversation, turn)
        yield (self._columns(talk, selection, keys) | self._settled(talk) | self._cutting(False)
               | {self.tab.prompt: gr.Textbox(submit_btn=True, stop_btn=False)})

    # ── the rest of the conversation ──────────────────────────────────────────────────────────────────────────────

    def stop(self, request: gr.Request) -> None:
        """Stop the answers of this visitor; what was written stays."""
        self.running.stop(request.session_hash or "")

    def undo(self, request: gr.Request, *given: Any) -> Update:
        """Take back the last question, in all columns, and put it into the prompt box again."""
        return self._cut(request, len(given[0]) - 1, *given)

    def undo_at(self, event: gr.UndoData, request: gr.Request, *given: Any) -> Update:
        """Take back this question and what came after it."""
        return self._cut(request, self._place(event, given[0], given[2:]), *given)

    def _place(self, event: gr.EventData, conversation: Conversation, keys: Sequence[str | None]) -> int:
        """The turn that an event of one of the chat windows is about."""
        column = next((i for i, bot in enumerate(self.tab.bots) if bot is event.target), 0)
        return turn_at(conversation, event.index, keys[column])

    def clear(self, request: gr.Request, *given: Any) -> Update:
        """Begin a new conversation."""
        return self._cut(request, 0, *given) | {self.tab.prompt: ""}

    def _cut(self, request: gr.Request, at: int, conversation: Conversation, selection: Selection,
             *keys: str | None) -> Update:
        with politely("Not now"):
            self.running.check(request.session_hash or "")
        if not 0 <= at < len(conversation):
            return {self.tab.prompt: gr.skip()}
        left = conversation[:at]
        return (self._settled(left) | self._columns(left, selection, keys)
                | {self.tab.prompt: conversation[at].prompt})

    # ── columns ───────────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self, conversation: Conversation, selection: Selection, *keys: str | None) -> Update:
        """Show the conversation again with the models that stand in the columns now."""
        return self._columns(conversation, selection, keys)

    def settle(self, conversation: Conversation, selection: Selection, *keys: str | None) -> Update:
        """The same after an answer; only then may the conversation be cut, or this would show again what was taken away."""
        return self._columns(conversation, selection, keys) | self._cutting(bool(conversation))

    def recount(self, count: int) -> Update:
        """Show two to four columns."""
        parts = [(box, gr.Column) for box in self.tab.boxes], [(code, gr.Code) for code in self.tab.rendered]
        return {part: kind(visible=i < count) for column in parts for i, (part, kind) in enumerate(column)}

    def select(self, conversation: Conversation, selection: Selection, seen: Sequence[str], *keys: str | None
               ) -> Update:
        """Offer the models of a changed selection; a merge that is new takes the first column."""
        keys = tuple(next_keys(selection, keys, seen))
        choices = [(self._title(key), key) for key in selection.chat_keys()]
        menus = {menu: gr.Dropdown(choices=choices, value=key) for menu, key in zip(self.tab.models, keys, strict=True)}
        return (menus | self._columns(conversation, selection, keys)
                | {self.tab.seen_merges: tuple(merge.key for merge in selection.merges)})

    def suggest(self, domain: str) -> Update:
        """Show the example prompts of a domain."""
        return {self.tab.examples: gr.Dataset(samples=samples(self.studio.examples.get(domain, [])))}

    # ── what the page shows ───────────────────────────────────────────────────────────────────────────────────────

    def _columns(self, conversation: Conversation, selection: Selection, keys: Sequence[str | None]) -> Update:
        """Conversation, line under the name and rendered prompt of all four columns."""
        shown: Update = {}
        for key, head, bot, rendered in zip(keys, self.tab.heads, self.tab.bots, self.tab.rendered, strict=True):
            reply = conversation[-1].reply(key) if conversation else None
            known = bool(key) and key in selection.chat_keys()
            shown[head] = header(self.studio.role(key, selection) if known else "", reply)
            shown[bot] = view(conversation, key)
            shown[rendered] = reply.prompt if reply else ""
        return shown

    def _settled(self, conversation: Conversation) -> Update:
        """Buttons, state and the file to export when nothing is running."""
        return self._locked(False) | {
            self.tab.conversation: conversation, self.tab.export: self._export(conversation),
            self.tab.live: "All answers are complete." if conversation else "The conversation is empty."
        } | self._cutting(bool(conversation))

    def _cutting(self, allowed: bool) -> Update:
        """The buttons that change what was said."""
        return {part: gr.Button(interactive=allowed) for part in (self.tab.retry, self.tab.undo, self.tab.clear)}

    def _locked(self, busy: bool) -> Update:
        """While models answer only Stop can be pressed."""
        idle = [gr.Button, gr.Button, gr.Button, gr.DownloadButton]
        parts = [self.tab.retry, self.tab.undo, self.tab.clear, self.tab.export]
        return ({part: kind(interactive=False) for part, kind in zip(parts, idle, strict=True)}
                | {menu: gr.Dropdown(interactive=not busy) for menu in self.tab.models}
                | {self.tab.count: gr.Radio(interactive=not busy), self.tab.stop: gr.Button(interactive=busy)})

    def _export(self, conversation: Conversation) -> Any:
        keys = dict.fromkeys(key for turn in conversation for key, _ in turn.replies)
        if not keys:
            return gr.DownloadButton(value=None, interactive=False)
        lines = conversation_jsonl(transcripts(conversation, [(key, self._title(key)) for key in keys]))
        path = save_bytes_to_cache(lines.encode(), "fusechat-conversation.jsonl", self.tab.export.GRADIO_CACHE)
        return gr.DownloadButton(value=path, interactive=True)

    def _spoken(self, turn: Turn, keys: Sequence[str | None]) -> str:
        """Progress in words, changed only when a model ends, so that a screen reader is not flooded."""
        ended = [spoken(i, self._title(key), reply) for i, key in enumerate(keys)
                 if key and (reply := turn.reply(key)) and reply.finish]
        return " ".join(ended) or f"Asking {', '.join(LETTERS[i] for i, key in enumerate(keys) if key)}."

    def _title(self, key: str) -> str:
        try:
            return self.studio.title(key)
        except FusionError:  # a merge that was forgotten since: its answers are still worth exporting
            return key


def _sampling(system: str, temperature: float, top_p: float, max_tokens: int, seed: int) -> Sampling:
    """Sampling within the limits of a public page; raises RecipeError."""
    whole = [int(n) if isinstance(n, float) and n.is_integer() else n for n in (max_tokens, seed)]
    sampling = Sampling(system or "", temperature, top_p, *whole)
    if sampling.max_new_tokens > MAX_TOKENS or sampling.temperature > 2 or sampling.seed > MAX_SEED:
        raise RecipeError("The sampling is out of range",
                          todo=f"This page allows {MAX_TOKENS:,} tokens, temperature 2, seed {MAX_SEED:,}.")
    if len(sampling.system) > MAX_SYSTEM_CHARS:
        raise RecipeError(f"The system prompt has {len(sampling.system):,} characters",
                          todo=f"Shorten it to {MAX_SYSTEM_CHARS:,}.")
    return sampling


def _check_prompt(prompt: object, conversation: Conversation) -> None:
    if not isinstance(prompt, str) or not prompt.strip():  # an edited message can be anything
        raise RecipeError("The message is empty", todo="Write something to the models.")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise RecipeError(f"The message has {len(prompt):,} characters", todo=f"Shorten it to {MAX_PROMPT_CHARS:,}.")
    if len(conversation) >= MAX_TURNS:
        raise RecipeError(f"This conversation has {MAX_TURNS} turns", todo="Press Clear to begin a new one.")


def _all_answered(turn: Turn, keys: Sequence[str | None]) -> bool:
    """Whether no model stands in a column that has not ended its answer by itself."""
    replies = [turn.reply(key) for key in keys if key]
    return all(reply and reply.finish in {"stop", "length"} for reply in replies)
