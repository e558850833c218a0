"""The loops of `kernels` in numpy: the same functions, the same bytes, a third to a tenth of the speed.

Rows of stored numbers are uint8 arrays; a `code` is the place of their dtype in `dtypes.FLOATS`. What is summed in float64 is
summed in a fixed order: element i in lane i mod 128, then the lanes by halves.
"""

from __future__ import annotations

import threading

import numpy as np

from fusion import dtypes

LANES = 128
_held = threading.local()


def _numbers(name: str, n: int, dtype: type = np.float32) -> np.ndarray:
    """Memory for `n` numbers that this thread keeps: fresh pages for every block would cost more than the arithmetic."""
    if len(getattr(_held, name, ())) < n:
        setattr(_held, name, np.empty(n, dtype))
    return getattr(_held, name)[:n]


def decode(row: np.ndarray, code: int, n: int, out: np.ndarray) -> None:
    """Write `n` stored numbers as float32 into `out`."""
    its = dtypes.FLOATS[code]
    dtypes.decode(row[:n * dtypes.ITEM_BYTES[its]], its, out[:n])


def encode(values: np.ndarray, code: int, out: np.ndarray) -> bool:
    """Round `values` [n] float32 to the dtype, write the bytes into `out` (uint8); returns whether all of them are finite."""
    its = dtypes.FLOATS[code]
    stored = dtypes.encode(values, its)
    out[:stored.nbytes] = stored.view(np.uint8)
    return not dtypes.overflowed(stored, its)


def all_finite(row: np.ndarray, code: int, n: int) -> bool:
    """Whether `n` stored numbers are finite in float32."""
    values = _numbers("first", n)
    decode(row, code, n, values)
    return bool(np.isfinite(values).all())


def sum_changes(rows: np.ndarray, codes: np.ndarray, n: int, sums: np.ndarray) -> None:
    """Write the sums of one grain: `sums` [J, 3] gets Σ Δ², Σ |Δ|, count of Δ ≠ 0; [J, 0] gets the sum of squares of the pivot.

    `rows` [1 + J, bytes] uint8 of `n` stored numbers each, the pivot first; `codes` [1 + J]; `sums` [J + 1, 3] float64.
    Differences are taken and squared in float64. A number that is not finite makes a square sum that is not finite.
    """
    pivot, moved = _numbers("first", n), _numbers("second", n)
    delta, count = _numbers("delta", -(-n // LANES) * LANES, np.float64), len(rows) - 1
    delta[n:] = 0
    decode(rows[0], codes[0], n, pivot)
    with np.errstate(invalid="ignore"):  # Inf − Inf, which the sums show
        for j in range(count):
            decode(rows[j + 1], codes[j + 1], n, moved)
            np.subtract(moved, pivot, out=delta[:n], dtype=np.float64)
            changed = np.count_nonzero(moved != pivot)
            absolute = _fold(np.abs(delta, out=delta))
            sums[j] = _fold(np.square(delta, out=delta)), absolute, changed
        delta[:n] = pivot
        sums[count] = _fold(np.square(delta, out=delta)), 0, 0


def _fold(values: np.ndarray) -> float:
    """Sum float64 numbers lane by lane, then the lanes by halves."""
    lanes = values.reshape(-1, LANES).sum(axis=0)
    while len(lanes) > 1:
        lanes = lanes[:len(lanes) // 2] + lanes[len(lanes) // 2:]
    return lanes[0]


def weigh(rows: np.ndarray, codes: np.ndarray, n: int, weights: np.ndarray, code: int, out: np.ndarray) -> bool:
    """Write Σⱼ wⱼ·modelⱼ, rounded to dtype `code`, into `out` (uint8); returns whether all of it is finite.

    The arithmetic of `methods.weighted`, bit for bit: `rows` [J, bytes] of `n` numbers each, `weights` [J] float64 that sum to 1.
    """
    base = int(np.argmax(weights))
    heaviest, model, shift = _numbers("first", n), _numbers("second", n), _numbers("third", n)
    shift[:] = 0
    decode(rows[base], codes[base], n, heaviest)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller sees that it is not finite
        for j, weight in enumerate(weights):
            if j != base and weight:
                decode(rows[j], codes[j], n, model)
                model -= heaviest
                model *= np.float32(weight)
                shift += model
        heaviest += shift
        return encode(heaviest, code, out)


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
