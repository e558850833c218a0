"""Five prompts to a merged model: does it answer, does it stop, are its probabilities numbers? torch loads when it is asked."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from fusion import chat
from fusion.errors import FusionError
from fusion.progress import Meter, Work

PROMPTS = ("Hello! Who are you?", "What is the capital of Norway?", "What is 37 - 5?",
           "Write a sentence with the words bridge and farmer.", "Write a Python function that adds two numbers.")
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt: `finish` "stop" (it ended by itself), "length" (it was cut off) or "error"; `perplexity`
    of the prompt as the model reads it, None when it is no finite number."""

    prompt: str
    text: str
    tokens: int
    finish: str
    perplexity: float | None
    error: str = ""

    @property
    def sound(self) -> bool:
        """Whether it wrote something, ended by itself, and read the prompt with finite probabilities."""
        return self.finish == "stop" and bool(self.text.strip()) and self.perplexity is not None


def ask(folder: Path, prompts: Sequence[str] = PROMPTS, max_new_tokens: int = MAX_NEW_TOKENS) -> Work[tuple[Answer, ...]]:
    """Load the model of a folder and ask it, one prompt after the other, likeliest tokens only; yields Progress.

    Every way it can fail is an Answer with `error`; nothing that a model does raises.
    """
    yield Meter("Asking the merged model", len(prompts), "prompts").step()
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = chat.load(folder)
    except FusionError as error:
        return tuple(Answer(prompt, "", 0, "error", None, str(error)) for prompt in prompts)
    return (yield from ask_model(model, prompts, max_new_tokens))


def ask_model(model: chat.ChatModel, prompts: Sequence[str] = PROMPTS, max_new_tokens: int = MAX_NEW_TOKENS
              ) -> Work[tuple[Answer, ...]]:
    """The same with a model that is loaded already."""
    meter = Meter("Asking the merged model", len(prompts), "prompts")
    yield meter.step()
    answers = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        work = chat.stream([chat.Request(lambda: nullcontext(model), messages)], chat.Sampling(max_new_tokens=max_new_tokens),
                           threading.Event())
        try:
            while True:
                reply = next(work)[0]
                yield meter.step()
        except StopIteration as end:
            reply = end.value[0]
        finally:
            work.close()
        answers.append(Answer(prompt, reply.text, reply.tokens, reply.finish, _perplexity(model, messages), reply.error))
        yield meter.step(1)
    return tuple(answers)


def _perplexity(model: chat.ChatModel, messages: list[dict]) -> float | None:
    """exp of the mean surprise per token of a rendered prompt; None where that is not finite or the prompt is one token."""
    import torch

    try:
        ids = torch.tensor([chat.fit(model, messages, "", 1).ids], device=model.model.device)
    except FusionError:
        return None
    with torch.inference_mode():
        scores = model.model(input_ids=ids).logits[0, :-1].float()
    surprise = torch.nn.functional.cross_entropy(scores, ids[0, 1:]).item() if len(scores) else math.nan
    return math.exp(surprise) if surprise < 700 else None  # which NaN is not
