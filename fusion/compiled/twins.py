"""The loops of `kernels` in numpy: the same functions, the same bytes, a third to a tenth of the speed.

Rows of stored numbers are uint8 arrays; a `code` is the place of their dtype in `dtypes.FLOATS`. What is summed in float64 is
summed in a fixed order: element i in lane i mod 128, then the lanes by halves.
"""

from __future__ import annotations

import threading

import numpy as np

from fusion import dtypes

LANES = 128
F32 = dtypes.FLOATS.index("F32")
BLOCK = 65_536  # numbers: one block of every model stays in the second-level cache, and sums are rounded per block
STRETCH = 8 * BLOCK  # numbers that one call of a loop in `streams` handles: what it writes is the size that disks like
PLACES = np.arange(1 << 16, dtype=np.uint32)
_held = threading.local()


def _numbers(name: str, n: int, dtype: type = np.float32) -> np.ndarray:
    """Memory for `n` numbers that this thread keeps: fresh pages for every block would cost more than the arithmetic."""
    if name not in vars(_held) or len(getattr(_held, name)) < n:
        setattr(_held, name, np.empty(max(n, 1), dtype))
    return getattr(_held, name)[:n]


def decode(row: np.ndarray, code: int, n: int, out: np.ndarray) -> bool:
    """Write `n` stored numbers as float32 into `out`; returns whether all of them are finite."""
    its, values = dtypes.FLOATS[code], out[:n]
    dtypes.decode(row[:n * dtypes.ITEM_BYTES[its]], its, values)
    with np.errstate(over="ignore", invalid="ignore"):  # the sum says it in one fast pass, unless it overflows
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def encode(values: np.ndarray, code: int, out: np.ndarray) -> bool:
    """Round `values` [n] float32 to the dtype, write the bytes into `out` (uint8); returns whether all of them are finite."""
    its = dtypes.FLOATS[code]
    stored = dtypes.encode(values, its)
    out[:stored.nbytes] = stored.view(np.uint8)
    return not dtypes.overflowed(stored, its)


def all_finite(row: np.ndarray, code: int, n: int) -> bool:
    """Whether `n` stored numbers are finite in float32."""
    return decode(row, code, n, _numbers("first", n))


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


def lane_sum(values: np.ndarray) -> float:
    """The sum of `values` [n] (float32 or float64) in float64."""
    return _lanes(values, len(values))


def lane_squares(values: np.ndarray) -> float:
    """The sum of the squares of `values` [n] float32, squared and summed in float64."""
    wide = _numbers("delta", len(values), np.float64)
    np.copyto(wide, values)
    return _lanes(np.square(wide, out=wide), len(values))


def lane_product(one: np.ndarray, other: np.ndarray) -> float:
    """The inner product of two vectors [n] of float64."""
    return _lanes(one * other, len(one))


def _lanes(values: np.ndarray, n: int) -> float:
    whole = n // LANES * LANES
    lanes = values[:whole].reshape(-1, LANES).sum(axis=0, dtype=np.float64)
    lanes[:n - whole] += values[whole:]
    while len(lanes) > 1:
        lanes = lanes[:len(lanes) // 2] + lanes[len(lanes) // 2:]
    return float(lanes[0])


def draw(low: int, high: int, out: np.ndarray) -> None:
    """Fill `out` [n] with 32 random bits each, of a key whose lower half is moved on by the first element; see `methods.draws`."""
    shifted = np.empty_like(out)
    np.add(PLACES[:out.size] if out.size <= PLACES.size else np.arange(out.size, dtype=np.uint32), np.uint32(low), out=out)
    out ^= np.right_shift(out, np.uint32(16), out=shifted)
    out *= np.uint32(0x7FEB352D)
    out += np.uint32(high)
    out ^= np.right_shift(out, np.uint32(15), out=shifted)
    out *= np.uint32(0x846CA68B)
    out ^= np.right_shift(out, np.uint32(16), out=shifted)
    out *= np.uint32(0x7FEB352D)
    out ^= np.right_shift(out, np.uint32(15), out=shifted)


def count_upper(bits: np.ndarray, out: np.ndarray) -> None:
    """Add to `out` [32768] how many of `bits` (uint32, sign bit clear) have each value of their upper 15 bits."""
    places = _numbers("places", bits.size, np.intp)
    np.add.at(out, np.right_shift(bits, np.uint32(16), out=places, casting="unsafe"), 1)


def count_lower(bits: np.ndarray, upper: int, out: np.ndarray) -> None:
    """Add to `out` [65536] how many of those `bits` whose upper bits are `upper` have each value of their lower 16 bits."""
    inside = np.flatnonzero((bits >> np.uint32(16)) == np.uint32(upper))
    if inside.size:
        np.add.at(out, (bits[inside] & np.uint32(0xFFFF)).astype(np.intp), 1)


def majority(deltas: np.ndarray, sign: np.ndarray) -> None:
    """Write the sign bits [n] uint32 of the sum of `deltas` [J, n] in the order of the targets; 0 counts as +."""
    total = _numbers("first", len(sign))
    np.copyto(total, deltas[0])
    for its in deltas[1:]:
        total += its
    np.left_shift(total < 0, np.uint32(31), out=sign, dtype=np.uint32)


def add_agreeing(deltas: np.ndarray, sign: np.ndarray, table: np.ndarray, total: np.ndarray) -> None:
    """Write the sum of those of `deltas` [J, n] float32 (used up) that have the `sign` bit [n], in the order of the targets.

    `table` [2ᴶ] float32 holds what to divide by, at the sum of 2ʲ over the targets that were added; empty: nothing.
    """
    which = _numbers("which", len(total), np.uint16)
    which[:] = 0
    for j, its in enumerate(deltas):
        its.view(np.uint32)[:] ^= sign  # from here on those that agree are above 0
        if len(table):
            which |= np.left_shift(its > 0, np.uint16(j), dtype=np.uint16)
    np.maximum(deltas[0], 0, out=total)
    total += np.float32(0)  # so that there is but one zero
    for its in deltas[1:]:
        total += np.maximum(its, 0, out=its)
    if len(table):
        total /= table.take(which, mode="clip")
    total.view(np.uint32)[:] ^= sign


def squares(rows: np.ndarray, codes: np.ndarray, n: int, out: np.ndarray) -> None:
    """Add Σ Δⱼ² of the changes from the pivot, taken in float32 and squared in float64, to `out` [J]; `rows` [1 + J, bytes]."""
    out += [lane_squares(its) for its in _changes(rows, codes, n)[1]]


def sizes(rows: np.ndarray, codes: np.ndarray, n: int, drops: np.ndarray, out: np.ndarray) -> None:
    """Add Σ |Δⱼ| of all changes and of those that `drops` [J, 5] keeps to `out` [J, 2] float64; see `_dropped`."""
    for its, drop, sums in zip(_changes(rows, codes, n)[1], drops, out, strict=True):
        sums[0] += lane_sum(np.abs(its, out=its))
        _dropped(its, drop)
        sums[1] += lane_sum(its)


def count_changes(rows: np.ndarray, codes: np.ndarray, n: int, targets: np.ndarray, uppers: np.ndarray,
                  out: np.ndarray) -> None:
    """For each of some targets count the magnitudes of its changes in `out` [k, 65536] as `count_lower` does for these
    `uppers` [k], or as `count_upper` does where they are below 0."""
    for j, upper, its in zip(targets, uppers, out, strict=True):
        delta = np.subtract(_number_row(rows, codes, n, j + 1, "second"), _number_row(rows, codes, n, 0, "first"),
                            out=_numbers("second", n))
        bits = delta.view(np.uint32)
        bits &= np.uint32(0x7FFFFFFF)
        if upper < 0:
            count_upper(bits, its)
        else:
            count_lower(bits, upper, its)


def elect(rows: np.ndarray, codes: np.ndarray, n: int, drops: np.ndarray, factors: np.ndarray, vote_first: bool,
          table: np.ndarray, scale: float, out: np.ndarray) -> None:
    """Write pivot + scale · `add_agreeing` of the changes into the first `n` of `out` float32.

    `rows` [1 + J, bytes], the pivot first; `drops` [J, 5] says what is set to 0, see `_dropped`; `factors` [J] float32 weigh
    the changes before their majority is taken, or after it if `vote_first`.
    """
    pivot, deltas = _changes(rows, codes, n)
    out = out[:n]
    for its, drop in zip(deltas, drops, strict=True):
        _dropped(its, drop)
    sign = np.empty(n, np.uint32)
    if vote_first:
        majority(deltas, sign)
    deltas *= factors[:, None]
    if not vote_first:
        majority(deltas, sign)
    add_agreeing(deltas, sign, table, out)
    if scale != 1:
        out *= np.float32(scale)
    out += pivot


def _dropped(values: np.ndarray, drop: np.ndarray) -> None:
    """Multiply those of `values` [n] float32 by 0 that are dropped; `drop` [5] int64 says which.

    (0, …): none. (1, kept, left, skipped, left): keep the magnitudes above the bits `kept` and the first `left` with just
    these bits, but for those that are above `skipped` in the same way; what is left is counted down. (2, low, high, chance,
    …): keep those whose `draw` is below the chance.
    """
    if drop[0] == 1:
        bits = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
        values *= _above(bits, drop[1:3]) & ~_above(bits, drop[3:5])
    elif drop[0] == 2:
        draw(int(drop[1]), int(drop[2]), bits := np.empty(len(values), np.uint32))
        values *= bits < np.uint32(drop[3])


def _above(bits: np.ndarray, cut: np.ndarray) -> np.ndarray:
    inside = bits > np.uint32(cut[0])
    if cut[1]:
        equal = np.flatnonzero(bits == np.uint32(cut[0]))[:cut[1]]
        inside[equal] = True
        cut[1] -= equal.size
    return inside


def _changes(rows: np.ndarray, codes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The pivot [n] and the changes from it [J, n], float32."""
    pivot = _number_row(rows, codes, n, 0, "pivot")
    deltas = _numbers("deltas", n * (len(rows) - 1)).reshape(len(rows) - 1, n)
    for row, code, its in zip(rows[1:], codes[1:], deltas, strict=True):
        decode(row, code, n, its)
        its -= pivot
    return pivot, deltas


def _number_row(rows: np.ndarray, codes: np.ndarray, n: int, m: int, name: str) -> np.ndarray:
    decode(rows[m], codes[m], n, out := _numbers(name, n))
    return out


def spread(deltas: np.ndarray, out: np.ndarray) -> None:
    """Write the standard deviation over the targets of every element of `deltas` [J, n] float32 into `out` [n] float32.

    Computed in float64 from the deviations, in the order of the targets.
    """
    n = len(out)
    mean, total, apart = (_numbers(name, n, np.float64) for name in ("mean", "total", "apart"))
    np.copyto(mean, deltas[0])
    for its in deltas[1:]:
        mean += its
    mean /= len(deltas)
    total[:] = 0
    for its in deltas:
        np.subtract(its, mean, out=apart)
        total += np.square(apart, out=apart)
    total /= len(deltas)
    np.copyto(out, np.sqrt(total, out=total), casting="same_kind")


def multiply(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """Write the product of `left` [rows, r] and `right` [r, columns] into `out`, float32, added up in the order of r.

    For a few rows at a time; no BLAS, whose results depend on the number of threads.
    """
    term = np.empty_like(out)
    out[:] = 0
    for k in range(len(right)):
        np.multiply(left[:, k, None], right[k], out=term)
        out += term


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
