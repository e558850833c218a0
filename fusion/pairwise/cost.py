"""What a whole run will take, stage by stage, before it starts: from headers and the dialogues' lengths."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from fusion.distill.dialogues import Dialogue
from fusion.pairwise.place import Place
from fusion.pairwise.recipe import FuseRecipe
from fusion.pairwise.stages import Stage, encoder_of, plan, stored_dialogues
from fusion.sources import open_checkpoint, peek
from fusion.train import Estimate, estimate

FLOPS_PER_S = 3e10  # of two CPU cores, in float32
LOADING_S = 2.0  # a model, its tokenizer, and what must be imported
STEP_S = 0.06  # what a training step takes however small the model
HANDLED_S = 4e-6  # a token encoded, checked or aligned
MERGED_S = 4e-9  # a parameter of one model read, merged and written


@dataclass(frozen=True)
class Cost:
    """A run in numbers: `dialogues`, `tokens` and `steps` of training one target, `memory_bytes` at the peak, and the `seconds`
    each stage of its plan will take (0 when it is done); all rough, for two CPU cores."""

    dialogues: int
    tokens: int
    steps: int
    memory_bytes: int
    stages: tuple[Stage, ...]
    seconds: tuple[float, ...]

    @property
    def total_seconds(self) -> float:
        """Seconds of all that is still to do."""
        return sum(self.seconds)


def predict(recipe: FuseRecipe, out: str | os.PathLike, dialogues: Sequence[Dialogue] = ()) -> Cost | None:
    """Predict what is still to do of a run; `dialogues` stand for its data until the data stage is done. None without either.

    Reading off distributions takes 2 operations a parameter and token, training 6.
    """
    recipe.check()
    stored = Place(out).dialogues
    dialogues = stored_dialogues(stored) if stored.exists() else dialogues
    if not dialogues:
        return None
    encoder, pivot = encoder_of(recipe.pivot, recipe), open_checkpoint(recipe.pivot)
    lengths = [min(encoder.length(dialogue), recipe.max_tokens) for dialogue in dialogues]
    training = estimate(pivot, lengths, recipe.training, flops_per_s=FLOPS_PER_S)
    sizes = {"pivot": pivot.parameters}
    pivot.close()
    for name, source in zip(recipe.names, recipe.sources, strict=True):
        with closing(peek(source)) as checkpoint:
            sizes[name] = checkpoint.parameters
    known = _Known(sizes, sum(lengths), training, len(recipe.target_names))
    stages = tuple(plan(recipe, out))
    return Cost(len(dialogues), training.tokens, training.steps, training.memory_bytes, stages,
                tuple(0.0 if stage.done else known.seconds(stage) for stage in stages))


@dataclass(frozen=True)
class _Known:
    """What the time of a stage follows from: parameters by model, tokens of all dialogues, one training, how many targets."""

    sizes: Mapping[str, int]
    tokens: int
    training: Estimate
    targets: int

    def seconds(self, stage: Stage) -> float:
        handled = HANDLED_S * self.tokens
        if stage.name == "distributions":
            return 2.0 * self.sizes[stage.subject] * self.tokens / FLOPS_PER_S + LOADING_S
        if stage.name == "training":
            return self.training.seconds + STEP_S * self.training.steps + LOADING_S
        if stage.name == "merge":
            return self.sizes["pivot"] * (self.targets + 1) * MERGED_S + 0.5
        return handled * len(self.sizes) if stage.name == "data" else 3 * handled + 0.5
