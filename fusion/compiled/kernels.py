"""The loops of `twins`, compiled by numba: import only through `fusion.compiled`, importing takes half a second.

No fastmath: sums keep their written order, no multiply-add is contracted, so every bit equals the twin's. Signatures are
given, so that all is compiled (or loaded from the cache) on import. The loops run without the interpreter's lock, on tiles
that stay in the first-level cache.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fusion.compiled.twins import LANES
from fusion.dtypes import FLOATS

TILE = 2048  # numbers; a multiple of LANES
_F64, _F32, _F16, _BF16 = (FLOATS.index(code) for code in ("F64", "F32", "F16", "BF16"))
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_INFINITE, _SIGN, _NAN = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF), np.uint32(0x7FC00000)


def _read_only(item: types.Type, dimensions: int) -> types.Array:
    return types.Array(item, dimensions, "C", readonly=True)


ROW, ROWS, CODES = _read_only(types.uint8, 1), _read_only(types.uint8, 2), _read_only(types.int64, 1)
NUMBERS, BYTES, WORDS = types.float32[::1], types.uint8[::1], types.uint32[::1]
DELTAS = _read_only(types.float32, 2)


def _compile(*signatures):
    def decorate(function):
        options = {"nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(list(signatures), cache=True, **options)(function)
        except RuntimeError:  # no folder to cache in: neither beside this file nor the user's own
            return numba.njit(list(signatures), **options)(function)
    return decorate


_helper = numba.njit(nogil=True, error_model="numpy")  # compiled into those that call it, so that nothing is loaded for it


@intrinsic
def _half_to_float(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
    return types.float32(types.uint16), generate


@intrinsic
def _float_to_half(context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))
    return types.uint16(types.float32), generate


@_helper
def _tile(row, code, start, n, out):
    """Decode the numbers start … start + n of a row."""
    bits = out.view(np.uint32)
    if code == _BF16:
        halves = row.view(np.uint16)[start:start + n]
        for i in range(n):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    elif code == _F32:
        whole = row.view(np.uint32)[start:start + n]
        for i in range(n):
            bits[i] = whole[i]
    elif code == _F16:
        halves = row.view(np.uint16)[start:start + n]
        for i in range(n):
            out[i] = _half_to_float(halves[i])
    else:
        doubles = row.view(np.float64)[start:start + n]
        for i in range(n):
            out[i] = np.float32(doubles[i])


@_compile(types.boolean(ROW, types.int64, types.int64, NUMBERS))
def decode(row, code, n, out):
    """See `twins.decode`."""
    bits, worst = out.view(np.uint32), np.uint32(0)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(row, code, start, m, out[start:start + m])
        part = bits[start:start + m]
        for i in range(m):
            worst = max(worst, part[i] & _SIGN)
    return worst < _INFINITE


@_helper
def _store(values, code, out, start, n):
    """Encode n numbers as the elements start … start + n of `out`; the twin of dtypes.encode and dtypes.overflowed."""
    bits, worst = values.view(np.uint32), np.uint32(0)
    if code == _BF16:
        halves = out.view(np.uint16)[start:start + n]
        for i in range(n):
            b = bits[i]
            rounded = np.uint32(b + np.uint32(np.uint32(0x7FFF) + (b >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
            if b & _SIGN > _INFINITE:
                rounded = np.uint32(0x7FC0)
            halves[i] = rounded
            worst = max(worst, rounded & np.uint32(0x7FFF))
        return worst < np.uint32(0x7F80)
    if code == _F16:
        halves = out.view(np.uint16)[start:start + n]
        for i in range(n):
            half = np.uint32(_float_to_half(values[i]))
            if bits[i] & _SIGN > _INFINITE:
                half = np.uint32(0x7E00)
            halves[i] = half
            worst = max(worst, half & np.uint32(0x7FFF))
        return worst < np.uint32(0x7C00)
    if code == _F32:
        whole = out.view(np.uint32)[start:start + n]
        for i in range(n):
            b = bits[i]
            whole[i] = _NAN if b & _SIGN > _INFINITE else b
            worst = max(worst, b & _SIGN)
    else:
        doubles = out.view(np.float64)[start:start + n]
        for i in range(n):
            doubles[i] = np.nan if bits[i] & _SIGN > _INFINITE else np.float64(values[i])
            worst = max(worst, bits[i] & _SIGN)
    return worst < _INFINITE


@_compile(types.boolean(NUMBERS, types.int64, BYTES))
def encode(values, code, out):
    """See `twins.encode`."""
    return _store(values, code, out, 0, len(values))


@_compile(types.boolean(ROW, types.int64, types.int64))
def all_finite(row, code, n):
    """See `twins.all_finite`."""
    if code == _BF16:
        halves, most = row.view(np.uint16)[:n], np.uint16(0)
        for i in range(n):
            most = max(most, np.uint16(halves[i] & np.uint16(0x7FFF)))
        return most < np.uint16(0x7F80)
    values, worst = np.empty(min(TILE, n), np.float32), np.uint32(0)
    bits = values.view(np.uint32)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(row, code, start, m, values)
        for i in range(m):
            worst = max(worst, bits[i] & _SIGN)
    return worst < _INFINITE


@_helper
def _fold(lanes):
    half = len(lanes) // 2
    while half:
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
        half //= 2
    return lanes[0]


@_compile(types.void(ROWS, CODES, types.int64, types.float64[:, ::1]))
def sum_changes(rows, codes, n, sums):
    """See `twins.sum_changes`."""
    count = len(rows) - 1
    pivot, moved = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    lanes = np.zeros((2 * count + 1, LANES))
    own = lanes[2 * count]
    sums[:] = 0
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[0], codes[0], start, m, pivot)
        padded = -(-m // LANES) * LANES
        pivot[m:padded] = 0
        for r in range(0, padded, LANES):
            for lane in range(LANES):
                value = np.float64(pivot[r + lane])
                own[lane] += value * value
        for j in range(count):
            _tile(rows[j + 1], codes[j + 1], start, m, moved)
            moved[m:padded] = 0
            square, absolute, changed = lanes[2 * j], lanes[2 * j + 1], np.int32(0)
            for r in range(0, padded, LANES):
                for lane in range(LANES):
                    delta = np.float64(moved[r + lane]) - np.float64(pivot[r + lane])
                    square[lane] += delta * delta
                    absolute[lane] += abs(delta)
            for i in range(m):
                changed += np.int32(moved[i] != pivot[i])
            sums[j, 2] += changed
    for j in range(count):
        sums[j, 0], sums[j, 1] = _fold(lanes[2 * j]), _fold(lanes[2 * j + 1])
    sums[count, 0] = _fold(own)


@_compile(types.boolean(ROWS, CODES, types.int64, _read_only(types.float64, 1), types.int64, BYTES))
def weigh(rows, codes, n, weights, code, out):
    """See `twins.weigh`."""
    base = np.argmax(weights)
    heaviest, model, shift = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    finite = True
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[base], codes[base], start, m, heaviest)
        shift[:m] = 0
        for j in range(len(rows)):
            if j != base and weights[j] != 0:
                weight = np.float32(weights[j])
                _tile(rows[j], codes[j], start, m, model)
                for i in range(m):
                    shift[i] += (model[i] - heaviest[i]) * weight
        for i in range(m):
            heaviest[i] += shift[i]
        finite &= _store(heaviest, code, out, start, m)
    return finite


@_compile(types.float64(_read_only(types.float32, 1)), types.float64(_read_only(types.float64, 1)))
def lane_sum(values):
    """See `twins.lane_sum`."""
    lanes, whole = np.zeros(LANES), len(values) // LANES * LANES
    for r in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += np.float64(values[r + lane])
    for i in range(whole, len(values)):
        lanes[i - whole] += np.float64(values[i])
    return _fold(lanes)


@_compile(types.float64(_read_only(types.float32, 1)))
def lane_squares(values):
    """See `twins.lane_squares`."""
    lanes, whole = np.zeros(LANES), len(values) // LANES * LANES
    for r in range(0, whole, LANES):
        for lane in range(LANES):
            value = np.float64(values[r + lane])
            lanes[lane] += value * value
    for i in range(whole, len(values)):
        value = np.float64(values[i])
        lanes[i - whole] += value * value
    return _fold(lanes)


@_compile(types.float64(_read_only(types.float64, 1), _read_only(types.float64, 1)))
def lane_product(one, other):
    """See `twins.lane_product`."""
    lanes, whole = np.zeros(LANES), len(one) // LANES * LANES
    for r in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += one[r + lane] * other[r + lane]
    for i in range(whole, len(one)):
        lanes[i - whole] += one[i] * other[i]
    return _fold(lanes)


@_compile(types.void(types.uint32, types.uint32, WORDS))
def draw(low, high, out):
    """See `twins.draw`."""
    for i in range(len(out)):  # numba widens sums and products of 32 bits to 64
        x = np.uint32(i + low)
        x = np.uint32((x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D))
        x = np.uint32(x + high)
        x = np.uint32((x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B))
        x = np.uint32((x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D))
        out[i] = x ^ x >> np.uint32(15)


@_compile(types.void(_read_only(types.uint32, 1), types.int64[::1]))
def count_upper(bits, out):
    """See `twins.count_upper`."""
    for i in range(len(bits)):
        out[bits[i] >> np.uint32(16)] += 1


@_compile(types.void(_read_only(types.uint32, 1), types.uint32, types.int64[::1]))
def count_lower(bits, upper, out):
    """See `twins.count_lower`."""
    for i in range(len(bits)):
        if bits[i] >> np.uint32(16) == upper:
            out[bits[i] & np.uint32(0xFFFF)] += 1


@_compile(types.void(DELTAS, WORDS))
def majority(deltas, sign):
    """See `twins.majority`."""
    total = np.empty(TILE, np.float32)
    for start in range(0, len(sign), TILE):
        m = min(TILE, len(sign) - start)
        total[:m] = deltas[0, start:start + m]
        for j in range(1, len(deltas)):
            its = deltas[j, start:start + m]
            for i in range(m):
                total[i] += its[i]
        part = sign[start:start + m]
        for i in range(m):
            part[i] = np.uint32(0x80000000) if total[i] < 0 else np.uint32(0)


@_compile(types.void(DELTAS, _read_only(types.uint32, 1), _read_only(types.float32, 1), NUMBERS))
def add_agreeing(deltas, sign, table, total):
    """See `twins.add_agreeing`."""
    turned, which = np.empty(TILE, np.uint32), np.empty(TILE, np.int32)
    values, zero = turned.view(np.float32), np.float32(0)
    for start in range(0, len(sign), TILE):
        m = min(TILE, len(sign) - start)
        out, its_sign = total[start:start + m], sign[start:start + m]
        out[:], which[:] = 0, 0
        for j in range(len(deltas)):
            bits = deltas[j].view(np.uint32)[start:start + m]
            for i in range(m):
                turned[i] = bits[i] ^ its_sign[i]
            for i in range(m):
                out[i] += zero if values[i] <= zero else values[i]
            if len(table):
                for i in range(m):
                    which[i] |= np.int32(values[i] > zero) << j
        if len(table):
            for i in range(m):
                out[i] /= table[which[i]]
        turned_out = out.view(np.uint32)
        for i in range(m):
            turned_out[i] ^= its_sign[i]


@_helper
def _delta(rows, codes, start, m, pivot, j, out):
    """The change of target j in the numbers start … start + m, of which `pivot` holds the pivot's."""
    _tile(rows[j + 1], codes[j + 1], start, m, out)
    for i in range(m):
        out[i] -= pivot[i]


@_compile(types.void(ROWS, CODES, types.int64, types.float64[::1]))
def squares(rows, codes, n, out):
    """See `twins.squares`."""
    count = len(rows) - 1
    pivot, delta, lanes = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32), np.zeros((count, LANES))
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[0], codes[0], start, m, pivot)
        for j in range(count):
            delta[m:] = 0
            _delta(rows, codes, start, m, pivot, j, delta)
            its = lanes[j]
            for r in range(0, m, LANES):
                for lane in range(LANES):
                    value = np.float64(delta[r + lane])
                    its[lane] += value * value
    for j in range(count):
        out[j] += _fold(lanes[j])


@_helper
def _mark_above(bits, m, cut, inside):
    """Which magnitudes are among the largest, as 1 and 0; see `twins._dropped`."""
    limit, equal = np.uint32(cut[0]), 0
    for i in range(m):
        equal += np.int32((bits[i] & _SIGN) == limit)
    if cut[1] >= equal:
        cut[1] -= equal
        for i in range(m):
            inside[i] = np.uint32((bits[i] & _SIGN) >= limit)
        return
    for i in range(m):
        inside[i] = np.uint32((bits[i] & _SIGN) > limit)
    i = 0
    while cut[1] > 0:
        if (bits[i] & _SIGN) == limit:
            inside[i] = np.uint32(1)
            cut[1] -= 1
        i += 1


@_helper
def _drop(values, at, m, drop, inside, outside):
    """See `twins._dropped`; `values` are those from `at` on in their block."""
    if drop[0] == 1:
        bits = values.view(np.uint32)
        _mark_above(bits, m, drop[1:3], inside)
        _mark_above(bits, m, drop[3:5], outside)
        for i in range(m):
            values[i] *= np.float32(np.int32(inside[i] & ~outside[i]))
    elif drop[0] == 2:
        draw(np.uint32(drop[1] + at), np.uint32(drop[2]), inside[:m])
        chance = np.uint32(drop[3])
        for i in range(m):
            values[i] *= np.float32(np.int32(inside[i] < chance))


@_compile(types.void(ROWS, CODES, types.int64, types.int64[:, ::1], types.float64[:, ::1]))
def sizes(rows, codes, n, drops, out):
    """See `twins.sizes`."""
    count = len(rows) - 1
    pivot, delta = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    inside, outside, lanes = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32), np.zeros((2 * count, LANES))
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[0], codes[0], start, m, pivot)
        for j in range(count):
            delta[m:] = 0
            _delta(rows, codes, start, m, pivot, j, delta)
            whole, kept = lanes[2 * j], lanes[2 * j + 1]
            for r in range(0, m, LANES):
                for lane in range(LANES):
                    whole[lane] += np.float64(abs(delta[r + lane]))
            _drop(delta, start, m, drops[j], inside, outside)
            for r in range(0, m, LANES):
                for lane in range(LANES):
                    kept[lane] += np.float64(abs(delta[r + lane]))
    for j in range(count):
        out[j, 0] += _fold(lanes[2 * j])
        out[j, 1] += _fold(lanes[2 * j + 1])


@_compile(types.void(ROWS, CODES, types.int64, CODES, CODES, types.int64[:, ::1]))
def count_changes(rows, codes, n, targets, uppers, out):
    """See `twins.count_changes`."""
    pivot, delta = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = delta.view(np.uint32)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[0], codes[0], start, m, pivot)
        for k in range(len(targets)):
            _delta(rows, codes, start, m, pivot, targets[k], delta)
            its, upper = out[k], np.uint32(uppers[k])
            if uppers[k] < 0:
                for i in range(m):
                    its[(bits[i] & _SIGN) >> np.uint32(16)] += 1
            else:
                for i in range(m):
                    if (bits[i] & _SIGN) >> np.uint32(16) == upper:
                        its[bits[i] & np.uint32(0xFFFF)] += 1


@_compile(types.void(ROWS, CODES, types.int64, types.int64[:, ::1], _read_only(types.float32, 1), types.boolean,
                     _read_only(types.float32, 1), types.float64, NUMBERS))
def elect(rows, codes, n, drops, factors, vote_first, table, scale, out):
    """See `twins.elect`."""
    count, factor = len(rows) - 1, np.float32(scale)
    pivot, room, sign = np.empty(TILE, np.float32), np.empty(count * TILE, np.float32), np.empty(TILE, np.uint32)
    inside, outside = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[0], codes[0], start, m, pivot)
        deltas = room[:count * m].reshape(count, m)
        for j in range(count):
            _delta(rows, codes, start, m, pivot, j, deltas[j])
            _drop(deltas[j], start, m, drops[j], inside, outside)
        if vote_first:
            majority(deltas, sign[:m])
        for j in range(count):
            its, weight = deltas[j], factors[j]
            for i in range(m):
                its[i] *= weight
        if not vote_first:
            majority(deltas, sign[:m])
        part = out[start:start + m]
        add_agreeing(deltas, sign[:m], table, part)
        if scale != 1:
            for i in range(m):
                part[i] *= factor
        for i in range(m):
            part[i] += pivot[i]


@_compile(types.void(DELTAS, NUMBERS))
def spread(deltas, out):
    """See `twins.spread`."""
    mean, total, count = np.empty(TILE), np.empty(TILE), np.float64(len(deltas))
    for start in range(0, len(out), TILE):
        m = min(TILE, len(out) - start)
        mean[:m], total[:m] = 0, 0
        for j in range(len(deltas)):
            its = deltas[j, start:start + m]
            for i in range(m):
                mean[i] += np.float64(its[i])
        for i in range(m):
            mean[i] /= count
        for j in range(len(deltas)):
            its = deltas[j, start:start + m]
            for i in range(m):
                apart = np.float64(its[i]) - mean[i]
                total[i] += apart * apart
        part = out[start:start + m]
        for i in range(m):
            part[i] = np.float32(np.sqrt(total[i] / count))


@_compile(types.void(DELTAS, DELTAS, types.float32[:, ::1]))
def multiply(left, right, out):
    """See `twins.multiply`."""
    columns = right.shape[1]
    for start in range(0, columns, TILE):
        m = min(TILE, columns - start)
        for row in range(len(left)):
            part = out[row, start:start + m]
            part[:] = 0
            for k in range(len(right)):
                factor, its = left[row, k], right[k, start:start + m]
                for i in range(m):
                    part[i] += factor * its[i]


@_compile(types.void(_read_only(types.uint64, 1), types.int64, _read_only(types.uint64, 2), types.uint64[:, ::1]))
def hash_words(words, first, keys, sums):
    """See `twins.hash_words`."""
    size, at = keys.shape[1], 0
    while at < len(words):
        chunk, place = divmod(first + at, size)
        n = min(size - place, len(words) - at)
        a, b = np.uint64(0), np.uint64(0)
        part, key_a, key_b = words[at:at + n], keys[0, place:place + n], keys[1, place:place + n]
        key_c, key_d = keys[2, place:place + n], keys[3, place:place + n]
        for i in range(n):
            low, high = part[i] & _LOW, part[i] >> _SHIFT
            a += low * (key_a[i] & _LOW) + high * (key_b[i] & _LOW)
            b += low * (key_c[i] & _LOW) + high * (key_d[i] & _LOW)
        sums[chunk, 0] += a
        sums[chunk, 1] += b
        at += n
