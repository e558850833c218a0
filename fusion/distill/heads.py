"""The head of a causal model at the positions that are learnt only, some at a time.

Logits of a whole batch over a large vocabulary would take gigabytes, of which most are never looked at: 8,192 tokens times
262,144 entries are 8.6 GB in float32. What a model does to its logits after the head (a cap, a scale) is taken from its
config and compared with its own logits in every call; a model that does something else gives its full logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

SLICE_LOGITS = 2**25  # at a time: 128 MiB in float32
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")

Found = TypeVar("Found")
Use = Callable[["torch.Tensor", slice], Found]


class Head:
    """A causal model of transformers that is asked about some positions only; `model` is the model itself, not its wrapper.

    Where gradients are wanted and there are several slices, each is computed again in the backward pass, so that one at a time
    is held. May be called inside the forward pass of what wraps the model (DDP, FSDP, DeepSpeed, LoRA), and by several threads.
    """

    def __init__(self, model: torch.nn.Module):
        self._model, self.whole = model, False

    def __call__(self, places: torch.Tensor, use: Use[Found], **inputs) -> list[Found]:
        """What `use(logits, part)` says of every slice: logits [n, V] at `places[part]`.

        `places` [N] count through the flattened batch `inputs["input_ids"]` [B, T].
        """
        run = None if self.whole else self._shortened(places, **inputs)
        if run is None:
            self.whole = True
            logits = type(self._model).forward(self._model, **inputs).logits.flatten(0, 1)
            return [use(logits[places[part]], part) for part in _parts(len(places), logits.shape[-1])]
        hidden, answer, width = run
        parts = _parts(len(places), width, self._model.get_output_embeddings())
        return [_kept_small(lambda rows, part=part: use(answer(rows), part), hidden[part], len(parts) > 1) for part in parts]

    def _shortened(self, places: torch.Tensor, **inputs) -> tuple[torch.Tensor, Callable, int] | None:
        """The head's input at `places` [N, D], what makes logits of such rows, and how wide they are; None where the model
        cannot be taken apart. The model runs as ever, but its own head sees one position, to be compared."""
        import torch

        head = self._model.get_output_embeddings()
        name = next((name for name, module in self._model.named_children() if module is head), None)
        if name is None:
            return None
        first = places[:1] if len(places) else places.new_zeros(1)
        model, short = copy.copy(self._model), _Shortened(head, inputs["input_ids"].shape, first)  # shares all but its head
        model.__dict__[name] = short
        own = type(model).forward(model, **inputs).logits
        if short.hidden is None or own.shape[:2] != (1, 1):
            return None
        with torch.no_grad():
            raw = head(short.hidden[first]).to(own.dtype)
            finish = next((its for its in _finishes(model) if _alike(its(raw), own[0])), None)
        if finish is None:
            return None
        return short.hidden[places], lambda rows: finish(head(rows).to(own.dtype)), own.shape[-1]


class _Shortened:
    """A head that keeps what it is given, `hidden` [B · T, D], and answers for the position `first` [1] alone."""

    def __init__(self, head: torch.nn.Module, shape: torch.Size, first: torch.Tensor):
        self._head, self._shape, self._first, self.hidden = head, shape, first, None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:-1] != self._shape:
            return self._head(hidden)
        self.hidden = hidden.flatten(0, 1)
        return self._head(self.hidden[self._first][None])

    def __getattr__(self, name: str):
        return getattr(self._head, name)


def _kept_small(work: Callable[[torch.Tensor], Found], rows: torch.Tensor, sliced: bool) -> Found:
    """`work(rows)`; where it is one of several and gradients are wanted, only `rows` are kept for the backward pass."""
    import torch

    if not (sliced and torch.is_grad_enabled()):
        return work(rows)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(work, rows, use_reentrant=False)


def _parts(count: int, width: int, head: torch.nn.Module | None = None) -> list[slice]:
    """Slices of `count` positions whose logits, `width` each, are at most SLICE_LOGITS; at least one slice.

    Under ZeRO-3 all processes gather the head's weight for each slice, so all have as many; some may be empty.
    """
    step = max(SLICE_LOGITS // width, 1)
    needed = max(-(-count // step), 1)
    if head is not None and any(hasattr(its, "ds_id") for its in head.parameters()):
        needed = _most(needed, next(head.parameters()).device)
    return [slice(min(at * step, count), min(at * step + step, count)) for at in range(needed)]


def _most(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    import torch

    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def _finishes(model: torch.nn.Module) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """What a model may do to its logits after the head, as far as its config tells; nothing comes last."""
    import torch

    config = model.config.get_text_config()
    for name in _CAPS:
        if cap := getattr(config, name, None):
            yield lambda logits, cap=cap: torch.tanh(logits / cap) * cap
    for name in _SCALES:
        if scale := getattr(config, name, None):
            yield lambda logits, scale=scale: logits * scale
            yield lambda logits, scale=scale: logits / scale
    yield lambda logits: logits


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two pieces of logits are the same but for rounding; what is no number counts as such in both."""
    import torch

    if one.shape != other.shape:
        return False
    largest = other.float().nan_to_num(0, 0, 0).abs().max()
    tolerance = 1e-5 if other.dtype == torch.float32 else 2e-2
    return torch.allclose(one.float(), other.float(), rtol=0, atol=float(tolerance * largest), equal_nan=True)
