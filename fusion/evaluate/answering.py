"""Greedy answers of one model to many conversations at once, in batches of similar length, with the way each one ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion.chat import ChatModel, Prompt, Sampling, fit
from fusion.chat.ending import TextEnd
from fusion.chat.prompt import Messages
from fusion.chat.sampling import processors
from fusion.chat.thoughts import spoken, thought
from fusion.errors import RecipeError
from fusion.progress import Meter, Work

if TYPE_CHECKING:
    import torch

BATCH_ROWS = 32  # more is hardly faster, and work can be stopped only between batches
BATCH_TOKENS = 32_768  # prompt and answer together: what the attention cache of one batch holds
SMALL_BYTES = 64 << 20


@dataclass(frozen=True)
class Answer:
    """One reply: its text, its length in tokens, and how it ended: "stop", "length" (cut off) or "unread" (prompt too long).

    What the model thought before it spoke stands in `thought`, apart from the text that is judged.
    """

    text: str
    tokens: int
    finish: str
    thought: str = ""

    @property
    def truncated(self) -> bool:
        """Whether it is not the whole reply that the model would have given."""
        return self.finish != "stop"


def answer(model: ChatModel, conversations: Sequence[Messages], max_new_tokens: int, meter: Meter,
           keep: Callable[[int, Answer], None] | None = None) -> Work[list[Answer]]:
    """The likeliest reply to each conversation; `keep` receives the number and the answer as soon as they are there."""
    sampling = Sampling(max_new_tokens=max_new_tokens)
    found: dict[int, Answer] = {}
    prompts: dict[int, Prompt] = {}
    for number, messages in enumerate(conversations):
        try:
            prompts[number] = fit(model, messages, "", max_new_tokens)
        except RecipeError:  # its context is shorter than this prompt
            found[number] = Answer("", 0, "unread")
    for number, given in found.items():
        if keep:
            keep(number, given)
    yield meter.step(len(found), note=model.name)
    for batch in _batches(prompts):
        for number, given in zip(batch, _generate(model, [prompts[n] for n in batch], sampling), strict=True):
            found[number] = given
            if keep:
                keep(number, given)
        yield meter.step(len(batch), note=model.name)
    return [found[number] for number in range(len(conversations))]


def _batches(prompts: dict[int, Prompt]) -> Iterator[list[int]]:
    """Prompts of equal room and similar length."""
    group: list[int] = []
    for number in sorted(prompts, key=lambda n: (prompts[n].room, len(prompts[n].ids), n)):
        prompt = prompts[number]
        tokens = (len(prompt.ids) + prompt.room) * (len(group) + 1)
        if group and (prompts[group[0]].room != prompt.room or len(group) == BATCH_ROWS or tokens > BATCH_TOKENS):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _generate(model: ChatModel, prompts: list[Prompt], sampling: Sampling) -> list[Answer]:
    import torch

    longest, pad = max(len(prompt.ids) for prompt in prompts), min(model.stop_ids, default=0)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # answers begin where prompts end, so padding stands on the left
        ids[row, longest - len(prompt.ids):] = torch.tensor(prompt.ids)
        mask[row, longest - len(prompt.ids):] = 1
    device = model.model.device
    with _threads_for(model), torch.inference_mode():
        made = model.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=True, do_sample=False, num_beams=1,
            max_new_tokens=prompts[0].room, pad_token_id=pad, eos_token_id=sorted(model.stop_ids) or None,
            logits_processor=processors(sampling),
            stopping_criteria=[_labels(model, prompts[0].end, longest)] if prompts[0].end else [])
    return [_ended(model, prompt, row) for prompt, row in zip(prompts, made[:, longest:].tolist(), strict=True)]


def _labels(model: ChatModel, end: TextEnd, longest: int) -> Callable[..., torch.Tensor]:
    """Which rows have gone on to the next speaker's label, for models that no token stops."""
    import torch

    def reached(ids: torch.Tensor, *_, **__) -> torch.Tensor:
        return torch.tensor([end.reached(model.decode, row) for row in ids[:, longest:].tolist()], device=ids.device)
    return reached


def _ended(model: ChatModel, prompt: Prompt, ids: list[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in model.stop_ids), None)
    words, finish = ids[:end], "length" if end is None else "stop"
    text = model.decode(words).rstrip("\ufffd")
    if prompt.end is not None:
        finish = finish if prompt.end.place(text) is None else "stop"
        text = prompt.end.whole(text, finish)
    return Answer(spoken(text, prompt.text), len(words), finish, thought(text, prompt.text))


@contextlib.contextmanager
def _threads_for(model: ChatModel) -> Iterator[None]:
    """One thread for tiny models: a second costs them more than it brings."""
    import torch

    threads = torch.get_num_threads()
    if model.nbytes < SMALL_BYTES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
