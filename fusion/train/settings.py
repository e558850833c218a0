"""How to train, and what it will take: plain data and arithmetic on headers, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fusion.checkpoint import Checkpoint
from fusion.distill.heads import SLICE_LOGITS
from fusion.distill.losses import KINDS
from fusion.dtypes import ITEM_BYTES
from fusion.errors import RecipeError, nearest
from fusion.train.packing import pack

PROGRAM_BYTES = 600 * 2**20  # Python, torch and transformers before any model


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
    """Predict memory and time from headers and dialogue lengths; on one device that shards nothing.

    Memory: weights as they are loaded, gradients and two AdamW moments of what is trained, activations of the largest batch,
    logits of one slice, and the stored copy that takes in what was learnt. Time: 6 operations a parameter and token at
    `flops_per_s` (the default is two CPU cores). Steps are counted as `transformers.Trainer` does.
    """
    rows = [sum(lengths[i] for i in row) for row in pack(lengths, training.max_tokens)] if training.pack else list(lengths)
    per_epoch = math.ceil(math.ceil(len(rows) / training.rows_a_batch) / training.accumulate)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.epochs)
    tokens = int(sum(lengths) * (steps / per_epoch if training.max_steps > 0 and per_epoch else training.epochs))
    held = _held(pivot, training) + _activations(pivot, training.rows_a_batch * max(rows, default=0), training)
    memory = max(held, pivot.parameters * _item(pivot, training) + pivot.nbytes)
    return Estimate(tokens, steps, PROGRAM_BYTES + memory, 6.0 * pivot.parameters * tokens / flops_per_s)


def _held(pivot: Checkpoint, training: Training) -> int:
    """Bytes that stay: weights as loaded, and for what is trained gradients and both moments (an adapter is float32)."""
    item = _item(pivot, training)
    if training.lora_rank:
        return pivot.parameters * item + _adapter(pivot, training.lora_rank) * 16
    return pivot.parameters * (4 * item + (2 if training.bf16 else 0))  # autocast keeps a copy of the weights


def _item(pivot: Checkpoint, training: Training) -> int:
    """Bytes of a weight as it is loaded."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(training.dtype, ITEM_BYTES[pivot.dtype])


def _adapter(pivot: Checkpoint, rank: int) -> int:
    """Parameters of a LoRA adapter on every matrix but those at the ends."""
    ends = ("embed", "lm_head", "wte", "wpe", "output")
    return sum(rank * sum(its.shape) for name, its in pivot.info.items()
               if len(its.shape) == 2 and not any(word in name for word in ends))


def activation_width(model: Checkpoint) -> int:
    """Numbers that a token has on its way through one layer, about."""
    text = model.config.get("text_config") or model.config
    width = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 1024)
    inner = int(text.get("intermediate_size") or text.get("n_inner") or text.get("ffn_dim") or 4 * width)
    return 16 * width + 5 * inner


def _activations(pivot: Checkpoint, tokens: int, training: Training) -> int:
    """Bytes of what a batch of so many tokens keeps for the backward pass, and of a slice of its logits."""
    layers, item = max(pivot.layers, 1), 4 if training.exact else 2
    layer = activation_width(pivot)
    kept = layers * layer // 16 + layer if training.gradient_checkpointing else layers * layer
    logits = min(max(SLICE_LOGITS, pivot.vocab_size or 0), tokens * (pivot.vocab_size or 0))
    return tokens * kept * item + 4 * logits * 4
