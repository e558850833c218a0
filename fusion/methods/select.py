"""The k largest of a stream of numbers, exactly, without holding or sorting them.

Magnitudes of float32 numbers sort as their bits do. A first pass counts them by their upper 15 bits, a second one counts
those in the bin of the k-th by their lower 16. Of numbers equal to the k-th the first in order are taken, so exactly k are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion import compiled

MAGNITUDE = np.uint32(0x7FFFFFFF)
NOTHING = 1 << 32  # above the bits of every number


def magnitude_bits(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The bits of |values| (float32) as uint32, which sort as the magnitudes do."""
    return np.bitwise_and(values.view(np.uint32), MAGNITUDE, out=out)


@dataclass(frozen=True)
class Cut:
    """Where the k largest end: all numbers with bits above `bits` are among them, and the first `equal` with just these bits.

    `all_equal`: that is every number with these bits.
    """

    bits: int
    equal: int
    all_equal: bool


class Selection:
    """Finds cuts: `count` every block, `aim` at ranks, `refine` with every block again, then read `cuts`."""

    def __init__(self):
        self.size = 0
        self.upper = np.zeros(1 << 15, np.int64)
        self.lower: dict[int, np.ndarray] = {}
        self.ranks: tuple[int, ...] = ()
        self.bins: tuple[int, ...] = ()  # the upper bits at which the ranks lie, each once

    def count(self, bits: np.ndarray) -> None:
        """The first pass: take in a block of magnitude bits."""
        self.size += bits.size
        compiled.loops().count_upper(bits, self.upper)

    def aim(self, ranks: Sequence[int]) -> None:
        """Say how many of the largest are wanted, one number or several."""
        self.ranks = tuple(ranks)
        self.above = np.concatenate([np.cumsum(self.upper[::-1])[::-1], [0]])  # [b]: numbers in bin b or above
        self.bins = tuple(dict.fromkeys(self._bin(k) for k in self.ranks if 0 < k <= self.size))
        self.lower = {}

    def refine(self, bits: np.ndarray) -> None:
        """The second pass: the same blocks again."""
        for upper in self.bins:
            if upper not in self.lower:
                self.lower[upper] = np.zeros(1 << 16, np.int64)
            compiled.loops().count_lower(bits, upper, self.lower[upper])

    def cuts(self) -> tuple[Cut, ...]:
        """The cuts of the ranks that were aimed at."""
        return tuple(self._cut(k) for k in self.ranks)

    def _bin(self, k: int) -> int:
        """The upper bits of the k-th largest."""
        return int(np.searchsorted(-self.above, -k, side="right")) - 1

    def _cut(self, k: int) -> Cut:
        if k <= 0:
            return Cut(NOTHING, 0, True)
        if k > self.size:
            return Cut(0, self.size, True)
        upper = self._bin(k)
        counts = self.lower[upper]
        within = k - int(self.above[upper + 1])
        above = np.concatenate([np.cumsum(counts[::-1])[::-1], [0]])
        low = int(np.searchsorted(-above, -within, side="right")) - 1
        equal = within - int(above[low + 1])
        return Cut(upper << 16 | low, equal, equal == int(counts[low]))


class Top:
    """Says block by block, in order, which numbers are above a cut."""

    def __init__(self, cut: Cut):
        self.cut, self.left = cut, cut.equal

    def mask(self, bits: np.ndarray) -> np.ndarray:
        """Whether each number of the next block is among the k largest, [n] bool."""
        if self.cut.all_equal:
            return bits >= min(self.cut.bits, NOTHING - 1) if self.cut.equal else np.zeros(bits.shape, bool)
        threshold = np.uint32(self.cut.bits)
        inside = bits > threshold
        if self.left:
            equal = np.flatnonzero(bits == threshold)[:self.left]
            inside[equal] = True
            self.left -= equal.size
        return inside
