"""How to train, and what it will take: plain data and arithmetic on headers, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fusion.checkpoint import Checkpoint
from fusion.distill.losses import KINDS
from fusion.errors import RecipeError, nearest


@dataclass(frozen=True)
class Training:
    """How to train; the defaults are the paper's. `lm_weight` is λ: 1 is plain fine-tuning, the SFT baseline.

    `batch` dialogues per device and step, `accumulate` such batches per update; `epochs` or `max_steps`; `warmup` a share of
    all steps (from 1 on: a number of steps); `lora_rank` > 0 trains a low-rank adapter and merges it at the end; `pack` joins
    dialogues into rows of `max_tokens`; `by_length` puts dialogues of similar length into a batch, which saves padding;
    `extra` are further TrainingArguments (fsdp, deepspeed …). Source: FuseChat, arXiv 2402.16107, section 4.1.
    """

    lm_weight: float = 0.9
    kind: str = "ce"
    learning_rate: float = 5e-6
    epochs: float = 3.0
    max_steps: int = -1
    batch: int = 4
    accumulate: int = 4
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: int = 16
    pack: bool = False
    by_length: bool = False
    max_tokens: int = 2048
    seed: int = 42
    save_steps: int = 200
    log_steps: int = 1
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def rows_a_batch(self) -> int:
        """How many rows a device reads at once: packed, one at a time."""
        return 1 if self.pack else self.batch

    @property
    def exact(self) -> bool:
        """Whether it reckons in float32."""
        return self.dtype == "float32" and not self.bf16

    def check(self) -> Training:
        """Return self, or raise RecipeError with everything that is wrong."""
        found = []
        if self.kind not in KINDS:
            found.append(f"kind: unknown {self.kind!r}. {nearest(str(self.kind), KINDS)}")
        if not 0 <= self.lm_weight <= 1:
            found.append(f"lm_weight: {self.lm_weight} is not from 0 to 1.")
        for name in ("learning_rate", "batch", "accumulate", "clip", "max_tokens", "save_steps", "log_steps"):
            if not getattr(self, name) > 0:
                found.append(f"{name}: {getattr(self, name)} is not above 0.")
        if not (self.epochs > 0 or self.max_steps > 0):
            found.append("epochs: give epochs or max_steps above 0.")
        if self.lora_rank < 0:
            found.append(f"lora_rank: {self.lora_rank} is below 0.")
        if found:
            raise RecipeError("\n".join(found), where="training")
        return self


@dataclass(frozen=True)
class Estimate:
    """What a training will take: `tokens` read, `steps`, `memory_bytes` at the peak on one device, `seconds` (a rough guess)."""

    tokens: int
    steps: int
    memory_bytes: int
    seconds: float


def estimate(pivot: Checkpoint, lengths: Sequence[int], training: Training, *, flops_per_s: float = 3e10) -> Estimate:
    """Predict memory and time from headers and dialogue lengths.

    Memory: weights, gradients and two AdamW moments in float32 (only the adapter's for LoRA), activations of one batch and
    its logits twice. Time: 6 operations a parameter and token at `flops_per_s` (the default is two CPU cores).
    """
    longest = max(lengths, default=0) if not training.pack else training.max_tokens
    width, layers = int(pivot.config.get("hidden_size", pivot.config.get("n_embd", 1024))), max(pivot.layers, 1)
    vocabulary = pivot.vocab_size or 0
    weights = pivot.parameters * (2 if training.bf16 and training.lora_rank else 4)
    trained = pivot.parameters if not training.lora_rank else 2 * training.lora_rank * width * layers * 7
    per_token = width * layers * (2 if training.gradient_checkpointing else 34)
    activations = training.batch * longest * (per_token * 4 + vocabulary * 4 * 2)
    tokens = int(sum(lengths) * training.epochs)
    per_step = training.batch * training.accumulate
    steps = training.max_steps if training.max_steps > 0 else math.ceil(len(lengths) * training.epochs / per_step)
    if training.max_steps > 0 and lengths:
        tokens = int(sum(lengths) / len(lengths) * per_step * training.max_steps)
    return Estimate(tokens, steps, weights + trained * 12 + activations, 6.0 * pivot.parameters * tokens / flops_per_s)
