"""What a whole run will take, stage by stage, before it starts: from headers and the dialogues' lengths."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from fusion.checkpoint import Checkpoint
from fusion.distill.dialogues import Dialogue, load
from fusion.distill.encoding import Encoder
from fusion.distill.heads import SLICE_LOGITS
from fusion.pairwise.data import stored_dialogues
from fusion.pairwise.place import Place
from fusion.pairwise.readers import encoders_of
from fusion.pairwise.recipe import FuseRecipe
from fusion.pairwise.stages import Stage, plan
from fusion.sources import peek
from fusion.train import PROGRAM_BYTES, Estimate, activation_width, estimate

FLOPS_PER_S = 3e10  # of two CPU cores, in float32
LOADING_S = 2.0  # a model, its tokenizer, and what must be imported
STEP_S = 0.06  # what a training step takes however small the model
HANDLED_S = 4e-6  # a token encoded, checked or aligned
MERGED_S = 4e-9  # a parameter of one model read, merged and written
MEASURED = 2000  # dialogues that are encoded for a price; more are taken to be like these
ASSUMED = 1000  # dialogues where nothing is known yet


@dataclass(frozen=True)
class Cost:
    """A run in numbers: `dialogues`, `tokens` and `steps` of training one target, `memory_bytes` at the peak, and the `seconds`
    each stage of its plan will take (0 when it is done); all rough, for two CPU cores.

    `peaks` are the bytes of each stage; `guessed` says what the numbers rest on where not every dialogue was looked at;
    `warnings` what is better known before.
    """

    dialogues: int
    tokens: int
    steps: int
    memory_bytes: int
    stages: tuple[Stage, ...]
    seconds: tuple[float, ...]
    peaks: tuple[int, ...] = ()
    guessed: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Seconds of all that is still to do."""
        return sum(self.seconds)


def predict(recipe: FuseRecipe, out: str | os.PathLike, dialogues: Sequence[Dialogue] = ()) -> Cost | None:
    """Predict what is still to do of a run; `dialogues` stand for its data until the data stage is done. None without either.

    Reading off distributions takes 2 operations a parameter and token, training 6. CheckpointError names models without a
    chat template.
    """
    recipe.check()
    stored = Place(out).dialogues
    dialogues = stored_dialogues(stored) if stored.exists() else dialogues
    if not dialogues:
        return None
    encoders = encoders_of(recipe)
    looked_at = dialogues[::-(-len(dialogues) // MEASURED)]
    lengths = [_split(encoders["pivot"].length(dialogue), encoders["pivot"].max_tokens, len(dialogue.turns))
               for dialogue in looked_at]
    guessed = f"from {len(lengths):,} of the {len(dialogues):,} dialogues" if len(lengths) < len(dialogues) else ""
    return _priced(recipe, out, encoders, [part for i in range(len(dialogues)) for part in lengths[i % len(lengths)]], guessed)


def forecast(recipe: FuseRecipe, out: str | os.PathLike) -> Cost:
    """As `predict`, before the data stage too: from the file or folder that the recipe names, unsplit and unchecked; for data
    that are not here yet, a price for so many dialogues."""
    recipe.check()
    if Place(out).dialogues.exists():
        return predict(recipe, out)
    if Path(recipe.data).expanduser().exists():
        dialogues, _ = load(recipe.data, split=recipe.split, subset=recipe.subset, limit=recipe.limit or None)
        cost = predict(recipe, out, dialogues)
        return replace(cost, guessed=", ".join(filter(None, (cost.guessed, "before they are split and checked"))))
    encoders, count = encoders_of(recipe), recipe.limit or ASSUMED
    length = encoders["pivot"].max_tokens // 2
    return _priced(recipe, out, encoders, [length] * count,
                   f"as if there were {count:,} dialogues of {length:,} tokens: {recipe.data} is not here yet")


def _split(length: int, most: int, turns: int) -> list[int]:
    """Tokens of the parts that a dialogue is split into, about: one of a single turn is cut."""
    whole, rest = divmod(length, most)
    return [min(length, most)] if turns == 1 or not whole else [most] * whole + [rest] * bool(rest)


def _priced(recipe: FuseRecipe, out: str | os.PathLike, encoders: Mapping[str, Encoder], lengths: Sequence[int],
            guessed: str) -> Cost:
    models = {}
    for name, source in (("pivot", recipe.pivot), *zip(recipe.names, recipe.sources, strict=True)):
        with closing(peek(source)) as checkpoint:
            models[name] = _Model.of(checkpoint)
            if name == "pivot":
                training = estimate(checkpoint, lengths, recipe.training, flops_per_s=FLOPS_PER_S)
    known, stages = _Known(recipe, models, lengths, training), tuple(plan(recipe, out))
    peaks = tuple(known.bytes(stage) for stage in stages)
    left = [peak for stage, peak in zip(stages, peaks, strict=True) if not stage.done]
    return Cost(len(lengths), training.tokens, training.steps, max(left, default=max(peaks)), stages,
                tuple(0.0 if stage.done else known.seconds(stage) for stage in stages), peaks, guessed,
                tuple(_warnings(recipe, models, encoders)))


@dataclass(frozen=True)
class _Model:
    """What counts of a model: parameters, bytes stored, vocabulary, numbers a token has on its way through a layer, dtype."""

    parameters: int
    nbytes: int
    vocabulary: int
    width: int
    dtype: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Model:
        return cls(checkpoint.parameters, checkpoint.nbytes, checkpoint.vocab_size or 0, activation_width(checkpoint),
                   checkpoint.dtype)


@dataclass(frozen=True)
class _Known:
    """What time and memory of a stage follow from: the recipe, its models by name, dialogue lengths, one training."""

    recipe: FuseRecipe
    models: Mapping[str, _Model]
    lengths: Sequence[int]
    training: Estimate

    def seconds(self, stage: Stage) -> float:
        tokens = sum(self.lengths)
        handled = HANDLED_S * tokens
        if stage.name == "distributions":
            return 2.0 * self.models[stage.subject].parameters * tokens / FLOPS_PER_S + LOADING_S
        if stage.name == "training":
            return self.training.seconds + STEP_S * self.training.steps + LOADING_S
        if stage.name == "merge":
            return self.models["pivot"].parameters * (len(self.recipe.target_names) + 1) * MERGED_S + 0.5
        return handled * len(self.models) if stage.name == "data" else 3 * handled + 0.5

    def bytes(self, stage: Stage) -> int:
        """The peak of a stage; reading off holds the weights, and while loading the file that they come from, afterwards one
        layer of a batch and logits of a slice three times."""
        if stage.name == "training":
            return self.training.memory_bytes
        if stage.name != "distributions" or stage.subject in self.recipe.servers:
            return PROGRAM_BYTES
        its = self.models[stage.subject]
        item = 2 if self.recipe.teacher_dtype in ("bfloat16", "float16") else 4
        tokens = min(max(self.recipe.batch_tokens, max(self.lengths)), sum(self.lengths))
        logits = min(max(SLICE_LOGITS, its.vocabulary), tokens * its.vocabulary)
        return PROGRAM_BYTES + its.parameters * item + max(its.nbytes, tokens * its.width * item + 3 * logits * 4)


def _warnings(recipe: FuseRecipe, models: Mapping[str, _Model], encoders: Mapping[str, Encoder]) -> Iterator[str]:
    training = recipe.training
    for name, encoder in encoders.items():
        if encoder.max_tokens < encoders["pivot"].max_tokens or (name == "pivot" and encoder.max_tokens < recipe.max_tokens):
            yield f"{name} reads {encoder.max_tokens:,} tokens of a dialogue, as many as its context holds"
    if training.dtype in ("bfloat16", "float16") and models["pivot"].dtype == "F32" and not training.lora_rank:
        yield f"the pivot is stored in float32; training in {training.dtype} rounds all of it"
    if "bfloat16" in (training.dtype, recipe.teacher_dtype) or training.bf16:
        times = slowness_of_bfloat16()
        if times > 1.5:
            yield f"bfloat16 is {times:.0f} times as slow as float32 on this processor: leave `bf16` out"


def slowness_of_bfloat16() -> float:
    """How many times as long as float32 it takes here, measured on a small product; 0 where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return 0.0

    def seconds(dtype: torch.dtype) -> float:
        one, other, best = torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype), float("inf")
        for _ in range(3):
            begin = time.thread_time()
            torch.nn.functional.linear(one, other)
            best = min(best, time.thread_time() - begin)
        return best

    return seconds(torch.bfloat16) / seconds(torch.float32)
