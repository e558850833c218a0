"""One tensor of every model, seen in blocks: what a merge method reads, as often as it likes.

A method never sees a whole tensor, so its memory does not grow with the model. It first gathers what it must know of the
whole tensor (norms, thresholds) in one or more passes, then yields the result in order in a last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fusion import compiled
from fusion.compiled.twins import BLOCK, F32


@dataclass(frozen=True)
class Block:
    """The flat elements from `start` on: `pivot` [n] and `models` [J, n], float32, overwritten by the next block.

    Whoever asked for the block may overwrite it too. `pivot` may be empty for a method that does not read it.
    """

    start: int
    pivot: np.ndarray
    models: np.ndarray


class Part(Protocol):
    """The flat elements from `start` on as they are stored, for one loop that decodes them itself."""

    start: int

    def run(self, loop: str, *arguments: object) -> int:
        """Call a loop of `compiled.loops()`, whose first arguments are rows, codes and count, with the pivot's and the models'
        numbers; returns how many numbers it got, `compiled.most()` at most. To be called once."""


@dataclass
class Rows:
    """A Part in memory: `rows` [1 + J, bytes] of `n` stored numbers each, the pivot first, whose dtypes are `codes` [1 + J]."""

    start: int
    n: int
    rows: np.ndarray
    codes: np.ndarray

    def run(self, loop: str, *arguments: object) -> int:
        """See Part."""
        getattr(compiled.loops(), loop)(self.rows, self.codes, self.n, *arguments)
        return self.n


class Stack(Protocol):
    """One tensor of the pivot and of J models.

    `shape` of the tensor, `count` = J, `keys` [J] 64-bit numbers that seed what is random: equal for the same seed, tensor
    and target, whatever else is merged.
    """

    shape: tuple[int, ...]
    count: int
    keys: tuple[int, ...]

    def blocks(self, multiple: int = 1) -> Iterator[Block]:
        """A pass over the tensor in order; every block holds a multiple of `multiple` elements (whole rows)."""


class Arrays:
    """A Stack over arrays in memory: `pivot` [...], `models` [J, ...], any float dtype."""

    def __init__(self, pivot: np.ndarray, models: np.ndarray, keys: tuple[int, ...] = (), block: int = BLOCK):
        self.pivot = np.asarray(pivot, np.float32)
        self.models = np.asarray(models, np.float32).reshape(len(models), *self.pivot.shape)
        self.shape, self.count, self.block = self.pivot.shape, len(self.models), block
        self.keys = keys or tuple(range(1, self.count + 1))

    def blocks(self, multiple: int = 1) -> Iterator[Block]:
        """See Stack; the blocks are copies, so a method may overwrite them."""
        flat, models = self.pivot.reshape(-1), self.models.reshape(self.count, math.prod(self.shape))
        size = max(multiple, self.block // multiple * multiple)
        for start in range(0, flat.size, size):
            yield Block(start, flat[start:start + size].copy(), models[:, start:start + size].copy())


def row_length(tensor: Stack) -> int:
    """Elements of a row: of the last axis, or of the whole tensor when it has fewer than two; at least 1."""
    return max(tensor.shape[-1] if len(tensor.shape) > 1 else math.prod(tensor.shape), 1)


def steady(tensor: Stack, multiple: int = 1) -> Iterator[Block]:
    """A pass whose blocks are cut at the same elements whatever the stack's own are, so that sums round the same way.

    Blocks that already fit are handed on as they are; only others are copied together.
    """
    total, size = math.prod(tensor.shape), max(multiple, BLOCK // multiple * multiple)
    held, filled = Block(0, np.empty(0, np.float32), np.empty((tensor.count, 0), np.float32)), 0
    for block in tensor.blocks(multiple):
        n, taken = block.models.shape[1], 0
        while taken < n:
            start = block.start + taken
            whole = min(size, total - start)
            if not filled and n - taken >= whole:
                yield _part(block, taken, taken + whole)
                taken += whole
                continue
            if not filled:
                held = Block(start, np.empty(whole if block.pivot.size else 0, np.float32),
                             np.empty((tensor.count, whole), np.float32))
            step = min(held.models.shape[1] - filled, n - taken)
            held.models[:, filled:filled + step] = block.models[:, taken:taken + step]
            if block.pivot.size:
                held.pivot[filled:filled + step] = block.pivot[taken:taken + step]
            filled, taken = filled + step, taken + step
            if filled == held.models.shape[1]:
                yield held
                filled = 0


def stored(tensor: Stack) -> Iterator[Part]:
    """A pass over the numbers as they are stored; a stack that has such a pass of its own saves decoding them."""
    if hasattr(tensor, "stored"):
        yield from tensor.stored()
        return
    codes = np.full(1 + tensor.count, F32, np.int64)
    for block in steady(tensor):
        yield Rows(block.start, block.pivot.size, np.concatenate([block.pivot[None], block.models]).view(np.uint8), codes)


def _part(block: Block, start: int, stop: int) -> Block:
    if start == 0 and stop == block.models.shape[1]:
        return block
    return Block(block.start + start, block.pivot[start:stop], block.models[:, start:stop])
