"""Random numbers that depend on a key and on where an element stands, and on nothing else: no order, no block, no thread.

A hash of 32-bit lanes (multiply, shift, xor; the two halves of the key go in before and in the middle), which numpy does
eight at a time where 64-bit multiplication has no such instruction. The constants are those of Wellons' lowbias32.
"""

from __future__ import annotations

import numpy as np

LANES = 1 << 32


def draw(key: int, start: int, n: int) -> np.ndarray:
    """32 random bits for each of the elements start … start + n − 1, [n] uint32."""
    out = np.empty(n, np.uint32)
    done = 0
    while done < n:
        high, low = divmod(start + done, LANES)
        step = min(n - done, LANES - low)
        _fill((key + high * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF, low, out[done:done + step])
        done += step
    return out


def uniform(key: int, start: int, n: int) -> np.ndarray:
    """One number of [0, 1) for each of the elements start … start + n − 1, [n] float32, a multiple of 2⁻²⁴."""
    return (draw(key, start, n) >> np.uint32(8)).astype(np.float32) * np.float32(2.0 ** -24)


def _fill(key: int, low: int, out: np.ndarray) -> None:
    first, second = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    shifted = np.empty_like(out)
    out[:] = np.arange(low, low + out.size, dtype=np.int64)
    out += first
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        out ^= np.right_shift(out, np.uint32(shift), out=shifted)
        out *= np.uint32(multiplier)
        out += second
    out ^= np.right_shift(out, np.uint32(16), out=shifted)
    out *= np.uint32(0x7FEB352D)
    out ^= np.right_shift(out, np.uint32(15), out=shifted)
