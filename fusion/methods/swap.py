"""Methods that take single numbers of one target over into the pivot: `nearswap` and `arcee_fusion`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np

from fusion.methods.method import About
from fusion.methods.select import Selection, magnitude_bits
from fusion.methods.stack import Block, Stack, row_length, steady


def nearswap(tensor: Stack, weights: np.ndarray, *,
             t: Annotated[float, About("The farthest that a number moves; about 0.0001, not a share.", low=0)] = 1e-4,
             ) -> Iterator[np.ndarray]:
    """Move every number of the pivot towards the target's by at most `t`: θ = θ₀ + clip(Δ, −t, t).

    A number that lies nearer than `t` becomes the target's own. mergekit divides by at least 1e-6 and so stops short of
    targets that are nearer than that when `t` is smaller still. Source: the model card of QuartetAnemoi-70B-t0.0001.
    """
    limit = np.float32(t)
    for block in steady(tensor):
        target = block.models[0]
        delta = target - block.pivot
        near = np.abs(delta) <= limit
        np.clip(delta, -limit, limit, out=delta)
        delta += block.pivot
        np.copyto(delta, target, where=near)
        yield delta


def arcee_fusion(tensor: Stack, weights: np.ndarray) -> Iterator[np.ndarray]:
    """Take the target's number where |Δ|·KL(row) is at least median + 1.5·IQR of the tensor; elsewhere the pivot's stays.

    KL(row) = KL divergence of the softmax of the target's row from that of the pivot's, both + 1e-8, in float64. The
    quartiles are exact; mergekit takes those of a random million numbers. Source: mergekit `arcee_fusion`.
    """
    length = row_length(tensor)
    divergence = np.concatenate([np.empty(0), *(divergences(block, length) for block in steady(tensor, length))])
    threshold = fence(tensor, length, divergence)
    for block in steady(tensor, length):
        taken = importance(block, length, divergence) >= threshold
        np.copyto(block.pivot, block.models[0], where=taken)
        yield block.pivot


def divergences(block: Block, length: int) -> np.ndarray:
    """KL of each row of the target from the pivot's row, [rows] float64."""
    target, pivot = (softmax(its.reshape(-1, length)) for its in (block.models[0], block.pivot))
    return np.maximum((target * np.log(target / pivot)).sum(axis=1), 0)


def softmax(rows: np.ndarray) -> np.ndarray:
    """Softmax of each row + 1e-8, [rows, length] float64."""
    wide = np.exp(rows - rows.max(axis=1, keepdims=True), dtype=np.float64)
    return wide / wide.sum(axis=1, keepdims=True) + 1e-8


def importance(block: Block, length: int, divergence: np.ndarray) -> np.ndarray:
    """|Δ|·KL(row) of every number of a block of whole rows, [n] float32."""
    first = block.start // length
    change = np.abs(block.models[0] - block.pivot).reshape(-1, length)
    return (change * divergence[first:first + len(change), None]).astype(np.float32).reshape(-1)


def fence(tensor: Stack, length: int, divergence: np.ndarray) -> np.float32:
    """median + 1.5·IQR of the importance, where a quantile q is the number at int(q·(n−1)) in ascending order."""
    size, chosen = math.prod(tensor.shape), Selection()
    for block in steady(tensor, length):
        chosen.count(magnitude_bits(importance(block, length, divergence)))
    chosen.aim([size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)] if size else [])
    for block in steady(tensor, length):
        chosen.refine(magnitude_bits(importance(block, length, divergence)))
    if not size:
        return np.float32(0)
    low, median, high = np.array([cut.bits for cut in chosen.cuts()], np.uint32).view(np.float32)
    return median + np.float32(1.5) * (high - low)
