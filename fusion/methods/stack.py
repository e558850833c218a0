"""One tensor of every model, seen in blocks: what a merge method reads, as often as it likes.

A method never sees a whole tensor, so its memory does not grow with the model. It first gathers what it must know of the
whole tensor (norms, thresholds) in one or more passes, then yields the result in order in a last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

BLOCK = 65_536  # elements


@dataclass(frozen=True)
class Block:
    """The flat elements from `start` on: `pivot` [n] and `models` [J, n], float32, overwritten by the next block."""

    start: int
    pivot: np.ndarray
    models: np.ndarray


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
        flat, models = self.pivot.reshape(-1), self.models.reshape(self.count, -1)
        size = max(multiple, self.block // multiple * multiple)
        for start in range(0, flat.size, size):
            yield Block(start, flat[start:start + size].copy(), models[:, start:start + size].copy())
