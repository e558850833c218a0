"""The loops of `kernels` in numpy: the same functions, the same bytes, about a third of the speed.

What is summed in float64 is summed in a fixed order: 128 lanes, element i of a grain in lane i mod 128, then lane by lane.
"""

from __future__ import annotations

import numpy as np


def hash_words(words: np.ndarray, first: int, keys: np.ndarray, sums: np.ndarray) -> None:
    """Add Σ wordᵢ·keyᵢ mod 2⁶⁴ to the two sums of every chunk; see `fusion.digest`.

    `words` [n] uint64 (two 32-bit words each), `first` the place of the first one, `keys` [4, c] uint64 of 32-bit numbers:
    for the low and the high word of the first sum, then of the second; `sums` [chunks, 2] uint64.
    """
    size = keys.shape[1]
    low, high = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
    at = 0
    while at < len(words):
        chunk, place = divmod(first + at, size)
        whole = (len(words) - at) // size if place == 0 else 0
        n = whole * size or min(size - place, len(words) - at)
        part = slice(place, place + n) if not whole else slice(None)
        rows = slice(chunk, chunk + max(1, whole))
        for half, its in ((low, 0), (high, 1)):
            block = half[at:at + n].reshape(max(1, whole), -1)
            for s in (0, 1):
                sums[rows, s] += np.einsum("ij,j->i", block, keys[2 * s + its, part])
        at += n
