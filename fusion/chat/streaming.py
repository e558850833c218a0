"""Ask several models at once and watch them write: one worker thread each, one queue, one generator for all columns.

A generator that serves every column is the shape that can be stopped and closed in one place, and that costs one
allocation where GPUs are lent per call.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from fusion.chat.model import ChatModel
from fusion.chat.prompt import Messages, Prompt, fit
from fusion.chat.sampling import Sampling, processors
from fusion.chat.thoughts import Part, split, spoken
from fusion.errors import FusionError, ResourceError

FLUSH_S = 0.06  # about 16 pictures a second
WAKE_S = 0.2  # a generator can only be closed where it yields, so it yields this often even when nothing happened
GRACE_S = 0.4  # how long a stop waits for a worker that cannot be interrupted: one that loads or reads a long prompt
LOADING, READING, WRITING = "loading the model …", "reading the prompt …", "writing …"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One column's question: `open` lends the model (loading it if need be), `messages` is the conversation so far."""

    open: Callable[[], AbstractContextManager[ChatModel]]
    messages: Messages


@dataclass(frozen=True)
class Reply:
    """One model's answer so far.

    `finish` is "" while it runs, then "stop" (the model ended it), "length", "stopped" (by the person) or "error";
    `tokens` were written in `seconds`, counted from when the model began to read, without the time for loading;
    `prompt` is the rendered prompt, `notes` are remarks about it, `status` says what happens while nothing is written.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    finish: str = ""
    error: str = ""
    prompt: str = ""
    notes: tuple[str, ...] = ()
    status: str = LOADING

    @property
    def parts(self) -> tuple[Part, ...]:
        """Thoughts and words for the person, in order."""
        return split(self.text, self.prompt)

    @property
    def spoken(self) -> str:
        """The text without thoughts: all that later questions tell the model about."""
        return spoken(self.text, self.prompt)

    @property
    def tokens_per_s(self) -> float:
        """Tokens written per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def stream(requests: Sequence[Request], sampling: Sampling, stop: threading.Event
           ) -> Generator[list[Reply], None, list[Reply]]:
    """Yield the replies of all models, in order, while they grow, and return the last ones.

    Setting `stop` or closing the generator ends the work; a model that fails ends in its own Reply and stops nobody.
    """
    replies = [Reply() for _ in requests]
    news: queue.Queue[tuple[int, Reply]] = queue.Queue()
    workers = [threading.Thread(target=_work, args=(request, sampling, stop, lambda reply, i=i: news.put((i, reply))),
                                name=f"chat-{i}", daemon=True) for i, request in enumerate(requests)]
    try:
        for worker in workers:
            worker.start()
        yield list(replies)
        deadline = None
        while not all(reply.finish for reply in replies):
            _collect(news, replies)
            if stop.is_set():
                deadline = deadline or time.perf_counter() + GRACE_S
                if time.perf_counter() > deadline:
                    replies = [r if r.finish else replace(r, finish="stopped", status="") for r in replies]
            yield list(replies)
        return replies
    finally:
        stop.set()
        until = time.perf_counter() + GRACE_S
        for worker in workers:
            worker.join(max(0.0, until - time.perf_counter()))


def _collect(news: queue.Queue[tuple[int, Reply]], replies: list[Reply]) -> None:
    """Take in what the workers report within one picture; returns after WAKE_S when they report nothing."""
    until = time.perf_counter() + WAKE_S
    while (left := until - time.perf_counter()) > 0 and not all(reply.finish for reply in replies):
        try:
            i, replies[i] = news.get(timeout=left)
        except queue.Empty:
            return
        until = min(until, time.perf_counter() + FLUSH_S)


def _work(request: Request, sampling: Sampling, stop: threading.Event, report: Callable[[Reply], None]) -> None:
    """Answer one request; every way it can end is a Reply with `finish`."""
    writer = _Writer(report)
    try:
        with request.open() as chat_model:
            _answer(chat_model, request.messages, sampling, stop, writer)
    except FusionError as error:
        writer.fail(str(error))
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            writer.fail(str(ResourceError("There is not enough memory for this answer",
                                          todo="Use fewer columns or a smaller model.")))
        else:  # a bug: the log keeps the traceback, the page gets its name, the other columns go on
            log.exception("A chat worker failed")
            writer.fail(f"Something went wrong in the app itself ({type(error).__name__}). The log says more.")


def _answer(chat_model: ChatModel, messages: Messages, sampling: Sampling, stop: threading.Event,
            writer: _Writer) -> None:
    import torch

    prompt = fit(chat_model, messages, sampling.system, sampling.max_new_tokens)
    writer.begin(chat_model, prompt)
    if not stop.is_set():
        ids = torch.tensor([prompt.ids], device=chat_model.model.device)
        pad = min(chat_model.stop_ids, default=0)
        chat_model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=writer, use_cache=True,
            do_sample=False, num_beams=1, max_new_tokens=prompt.room, pad_token_id=pad,
            eos_token_id=sorted(chat_model.stop_ids) or None, logits_processor=processors(sampling),
            stopping_criteria=[lambda ids, *_, **__: torch.full((len(ids),), stop.is_set() or writer.ended, device=ids.device)])
    writer.finish(prompt.room < sampling.max_new_tokens)


class _Writer:
    """Receives tokens from `generate` (its streamer), counts them, and reports readable text at most every FLUSH_S."""

    def __init__(self, report: Callable[[Reply], None]):
        self.report, self.reply = report, Reply()
        self.ended = False  # by the label of the next speaker

    def begin(self, chat_model: ChatModel, prompt: Prompt) -> None:
        self.chat_model, self.prompt, self.ids, self.prompt_seen = chat_model, prompt, [], False
        self.reply = replace(self.reply, prompt=prompt.text, notes=prompt.notes, status=READING)
        self.report(self.reply)
        self.started = self.flushed = time.perf_counter()

    def put(self, value: Any) -> None:
        """Take the prompt (first call) or new tokens: a tensor of ids of any shape."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids.extend(value.flatten().tolist())
        self.ended = self.prompt.end is not None and self.prompt.end.reached(self.chat_model.decode, self.ids)
        if len(self.ids) == 1 or time.perf_counter() - self.flushed >= FLUSH_S:
            self.report(self._updated(status=WRITING))
            self.flushed = time.perf_counter()

    def end(self) -> None:
        """Nothing to do: `finish` knows how it ended."""

    def finish(self, cramped: bool) -> None:
        """Report the end; `cramped` says that the context left less room than was asked for."""
        how = "stopped"
        if self.ended or (self.ids and self.ids[-1] in self.chat_model.stop_ids):
            how = "stop"
        elif len(self.ids) >= self.prompt.room:
            how = "length"
        notes = self.reply.notes
        if how == "length" and cramped:
            notes += (f"The context of {self.chat_model.context:,} tokens had room for {self.prompt.room:,} more.",)
        self.report(self._updated(finish=how, status="", notes=notes))

    def fail(self, message: str) -> None:
        self.report(replace(self.reply, finish="error", error=message, status=""))

    def _updated(self, finish: str = "", **changes: Any) -> Reply:
        """The reply with all tokens so far, without stop marks, another speaker's turn and the half of a character."""
        words = [i for i in self.ids if i not in self.chat_model.stop_ids]
        text = self.chat_model.decode(words).rstrip("\ufffd")
        if self.prompt.end is not None:
            text = self.prompt.end.whole(text, finish) if finish else self.prompt.end.safe(text)
        seconds = time.perf_counter() - self.started
        self.reply = replace(self.reply, text=text, tokens=len(words), seconds=seconds, finish=finish, **changes)
        return self.reply
