"""Packing: several dialogues in one row, which must not see each other.

Position ids that begin anew are all that separates them. A model that takes no notice of these, or carries a state along (Mamba
and its kind), would read each dialogue as a continuation of the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusion.errors import RecipeError

if TYPE_CHECKING:
    import torch

_ROWS = (11, 13)  # tokens of the two rows that a model is tested with


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Join dialogues into rows of at most `max_tokens`: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room, at, before = np.zeros(len(lengths), np.int64), 0, None
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = _first_with(room, lengths[i], at if lengths[i] == before else 0, len(rows))  # none before it has got more room
        if at == len(rows):
            rows.append([])
            room[at] = max(max_tokens, lengths[i])
        rows[at].append(i)
        room[at] -= lengths[i]
        before = lengths[i]
    return rows


def _first_with(room: np.ndarray, wanted: int, begin: int, end: int) -> int:
    """The first of the rows from `begin` on that has room for `wanted` tokens, or `end`."""
    for at in range(begin, end, 4096):
        roomy = room[at:min(at + 4096, end)] >= wanted
        if roomy.any():
            return at + int(roomy.argmax())
    return end


def refuse_leaks(run: Callable, model: torch.nn.Module, exact: bool = True) -> None:
    """RecipeError when packed dialogues would see each other; runs two short rows, packed and alone.

    `run` is called like the model, and may be what wraps it; `exact`: it reckons in float32.
    """
    apart = leak(run, model)
    if not apart <= (1e-3 if exact else 3e-2):  # right ones differ by rounding, 1e-6 in float32; leaks begin at 6e-2
        raise RecipeError(f"{type(model).__name__} does not keep packed dialogues apart: the logits of the second change by "
                          f"{apart:.0%} with the first before it", where="training: pack",
                          todo="Leave `pack` out; `by_length: true` saves most of the padding.")


def leak(run: Callable, model: torch.nn.Module) -> float:
    """How much the logits of a row change when another stands before it, as a share of the largest."""
    import torch

    device, words = next(model.parameters()).device, model.get_input_embeddings().num_embeddings
    ids = (torch.arange(sum(_ROWS), device=device) * 7919 + 5) % words
    positions = torch.cat([torch.arange(count, device=device) for count in _ROWS])
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = run(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0, _ROWS[0]:].float()
            alone = run(input_ids=ids[None, _ROWS[0]:], use_cache=False).logits[0].float()
    finally:
        model.train(training)
    if not alone.isfinite().all():
        return 0.0  # broken weights, of which the first loss will tell
    return float((packed - alone).abs().max() / alone.abs().max())
