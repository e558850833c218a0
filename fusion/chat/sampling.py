"""How the next token is chosen: the same numbers and the same randomness for every model that is compared.

Threads share torch's global generator, so two models that sample at the same time would disturb each other. Each answer
therefore has its own generator and samples by the Gumbel-max trick: argmax(logits + Gumbel noise) is an exact draw from
softmax(logits), and `generate` can stay greedy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fusion.errors import CheckpointError, RecipeError

MAX_TEMPERATURE = 5.0
MAX_NEW_TOKENS = 32_768
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """System prompt and sampling of one question, equal for all models; temperature 0 takes the likeliest token.

    `top_p` keeps the likeliest tokens that together hold this probability; raises RecipeError for numbers out of range.
    """

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.system, str):
            raise RecipeError("The system prompt is not text", todo="Write it as text, or leave it empty.")
        _check("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RecipeError("top_p is 0", todo="Give a share above 0; for the likeliest token set temperature to 0.")
        _check("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS, whole=True)
        _check("seed", self.seed, 0, MAX_SEED, whole=True)


def _check(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise RecipeError(f"{name} is {value!r}", todo=f"Give {kind} from {low} to {high}.")


class GumbelSampler:
    """Adds Gumbel noise to the scores (logits: [batch, vocabulary]) from a generator of its own, seeded once."""

    def __init__(self, seed: int):
        import torch

        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        # The noise is drawn on the CPU on every device, so that one seed means one text wherever the model runs.
        noise = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=self.generator).log_().neg_()
        return scores + noise.to(scores.device)


class FiniteScores:
    """Passes scores on and raises CheckpointError for NaN, which `argmax` would turn into endless nonsense."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if scores.isnan().any():
            raise CheckpointError("The model computes values that are not numbers (NaN)",
                                  todo="Its weights are damaged, or the merge that made them went out of range.")
        return scores


def processors(sampling: Sampling) -> list[Any]:
    """The logits processors that turn greedy `generate` into this sampling."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return [FiniteScores()]
    chain: list[Any] = [FiniteScores(), TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(float(sampling.top_p)))
    return [*chain, GumbelSampler(sampling.seed)]
