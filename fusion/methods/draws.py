"""Random numbers that depend on a key and on where an element stands, and on nothing else: no order, no block, no thread.

The mixed key and the element go through three rounds of shift, xor and multiply in 32 bits, of which processors multiply
eight at a time, but 64-bit numbers only singly. One half of the key is added before the first round, the other after it, so
that two keys do not give the same sequence a little further on. Constants: Wellons' lowbias32, and Steele's splitmix64.
"""

from __future__ import annotations

import numpy as np

from fusion import compiled

LANES = 1 << 32
MASK = (1 << 64) - 1


def draw(key: int, start: int, n: int) -> np.ndarray:
    """32 random bits for each of the elements start … start + n − 1, [n] uint32; `key` 64 bits."""
    out = np.empty(n, np.uint32)
    done = 0
    while done < n:
        step = min(n - done, LANES - (start + done) % LANES)
        compiled.loops().draw(*begin(key, start + done), out[done:done + step])
        done += step
    return out


def begin(key: int, start: int) -> tuple[int, int]:
    """What the loops' `draw` needs to draw from element `start` on; for a stretch that no multiple of 2³² divides."""
    high, low = divmod(start, LANES)
    mixed = mix(int(key) + high)
    return (low + mixed) & 0xFFFFFFFF, mixed >> 32


def uniform(key: int, start: int, n: int) -> np.ndarray:
    """One number of [0, 1) for each of the elements start … start + n − 1, [n] float32, a multiple of 2⁻²⁴."""
    return (draw(key, start, n) >> np.uint32(8)).astype(np.float32) * np.float32(2.0 ** -24)


def mix(key: int) -> int:
    """A 64-bit number that looks like no other for any `key`."""
    key = (key + 0x9E3779B97F4A7C15) & MASK
    key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) & MASK
    key = ((key ^ key >> 27) * 0x94D049BB133111EB) & MASK
    return key ^ key >> 31
