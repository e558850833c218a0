"""The loops of `twins`, to be compiled by `build`; importing this takes half a second, and only that module should.

No fastmath: sums keep their written order, no multiply-add is contracted, so every bit equals the twin's. The loops run without
the interpreter's lock, on tiles that stay in the first-level cache.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fusion.compiled.memory import (
    address,
    doubles_at,
    floats_at,
    halves_at,
    heap,
    integers_at,
    ints_at,
    on_stack,
    release,
    words_at,
)
from fusion.compiled.registry import compiled, helper
from fusion.compiled.twins import LANES
from fusion.compiled.vectors import (
    AT_ONCE,
    LINE,
    add_change_squares,
    add_changes,
    add_sizes,
    add_squares,
    elect_halves,
    hash_lines,
    weigh_halves,
)
from fusion.dtypes import FLOATS

TILE = 2048  # numbers; a multiple of LANES and of AT_ONCE
F64, F32, _F16, _BF16 = (FLOATS.index(code) for code in ("F64", "F32", "F16", "BF16"))
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_INFINITE, _SIGN, _NAN = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF), np.uint32(0x7FC00000)

ROW, ROWS = types.uint8[::1], types.int64[::1]  # one row, and the addresses of all
CODES, COUNT = types.int64[::1], types.int64
NUMBERS, BYTES, WORDS, SUMS = types.float32[::1], types.uint8[::1], types.uint32[::1], types.float64[:, ::1]
DELTAS, FACTORS, DROPS, COUNTS = types.float32[:, ::1], types.float32[::1], types.int64[:, ::1], types.int64[:, ::1]
DOUBLES, KEYS = types.float64[::1], types.uint64[:, ::1]

_floats, _words, _ints = (on_stack(kind, TILE) for kind in (types.float32, types.uint32, types.int32))
_doubles, _lanes, _largest = on_stack(types.float64, TILE), on_stack(types.float64, LANES), on_stack(types.uint32, AT_ONCE)


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


@intrinsic
def _float_of(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())
    return types.float32(types.uint32), generate


@helper
def _words_of(numbers):
    """The bits of float32 numbers."""
    return words_at(address(numbers), len(numbers))


@helper
def _all_half(codes):
    """Whether all rows are bfloat16: then they go from stored numbers to the result in registers."""
    same = True
    for m in range(len(codes)):
        same &= codes[m] == _BF16
    return same


@helper
def _tile(row, code, start, n, out):
    """Decode the numbers start … start + n of a row."""
    bits = _words_of(out)
    if code == _BF16:
        halves = halves_at(row + 2 * start, n)
        for i in range(n):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    elif code == F32:
        whole = words_at(row + 4 * start, n)
        for i in range(n):
            bits[i] = whole[i]
    elif code == _F16:
        halves = halves_at(row + 2 * start, n)
        for i in range(n):
            out[i] = _half_to_float(halves[i])
    else:
        doubles = doubles_at(row + 8 * start, n)
        for i in range(n):
            out[i] = np.float32(doubles[i])


@helper
def _delta(row, code, start, n, pivot, out):
    """Decode the numbers start … start + n of a row and take those of `pivot` from them."""
    if code == _BF16:
        halves = halves_at(row + 2 * start, n)
        for i in range(n):
            out[i] = _float_of(np.uint32(halves[i]) << np.uint32(16)) - pivot[i]
        return
    _tile(row, code, start, n, out)
    for i in range(n):
        out[i] -= pivot[i]


@compiled(types.boolean(ROW, types.int64, types.int64, NUMBERS))
def decode(row, code, n, out):
    """See `twins.decode`."""
    bits, worst = _words_of(out), np.uint32(0)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(address(row), code, start, m, out[start:start + m])
        part = bits[start:start + m]
        for i in range(m):
            worst = max(worst, part[i] & _SIGN)
    return worst < _INFINITE


@helper
def _store(values, code, out, start, n):
    """Encode n numbers as the elements start … start + n of `out`; the twin of dtypes.encode and dtypes.overflowed."""
    bits, worst = _words_of(values), np.uint32(0)
    if code == _BF16:
        halves = halves_at(address(out) + 2 * start, n)
        for i in range(n):  # without the many casts numba reckons in 64 bits, half as fast
            b = bits[i]
            odd = np.uint32(b >> np.uint32(16)) & np.uint32(1)
            rounded = np.uint32(np.uint32(b + np.uint32(np.uint32(0x7FFF) + np.uint32(odd))) >> np.uint32(16))
            rounded = np.uint32(0x7FC0) if np.uint32(b & _SIGN) > _INFINITE else rounded
            halves[i] = np.uint16(rounded)
            worst = max(worst, np.uint32(rounded & np.uint32(0x7FFF)))
        return worst < np.uint32(0x7F80)
    if code == _F16:
        halves = halves_at(address(out) + 2 * start, n)
        for i in range(n):
            half = np.uint32(_float_to_half(values[i]))
            half = np.uint32(0x7E00) if np.uint32(bits[i] & _SIGN) > _INFINITE else half
            halves[i] = np.uint16(half)
            worst = max(worst, np.uint32(half & np.uint32(0x7FFF)))
        return worst < np.uint32(0x7C00)
    if code == F32:
        whole = words_at(address(out) + 4 * start, n)
        for i in range(n):
            b = bits[i]
            whole[i] = _NAN if b & _SIGN > _INFINITE else b
            worst = max(worst, b & _SIGN)
    else:
        doubles = doubles_at(address(out) + 8 * start, n)
        for i in range(n):
            doubles[i] = np.nan if bits[i] & _SIGN > _INFINITE else np.float64(values[i])
            worst = max(worst, bits[i] & _SIGN)
    return worst < _INFINITE


@compiled(types.boolean(NUMBERS, types.int64, BYTES))
def encode(values, code, out):
    """See `twins.encode`."""
    return _store(values, code, out, 0, len(values))


@helper
def all_finite_at(row, code, n):
    """As `all_finite`, of the numbers at an address."""
    if code == _BF16:
        halves, most = halves_at(row, n), np.uint16(0)
        for i in range(n):
            most = max(most, np.uint16(halves[i] & np.uint16(0x7FFF)))
        return most < np.uint16(0x7F80)
    values, worst = _floats(), np.uint32(0)
    bits = _words_of(values)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(row, code, start, m, values)
        for i in range(m):
            worst = max(worst, bits[i] & _SIGN)
    return worst < _INFINITE


@compiled(types.boolean(ROW, types.int64, types.int64))
def all_finite(row, code, n):
    """See `twins.all_finite`."""
    return all_finite_at(address(row), code, n)


@helper
def _fold(lanes):
    half = len(lanes) // 2
    while half:
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
        half //= 2
    return lanes[0]


@compiled(types.void(ROWS, CODES, types.int64, SUMS), of_rows=True)
def sum_changes(rows, codes, n, sums):
    """See `twins.sum_changes`."""
    count, halves = len(rows) - 1, _all_half(codes)
    pivot, moved, wide = _floats(), _floats(), _doubles()
    room, rest = heap(8 * LANES * (2 * count + 1)), heap(4 * LANES * count)
    lanes, changed = doubles_at(room, (2 * count + 1, LANES)), ints_at(rest, (count, LANES))
    lanes[:, :], changed[:, :] = 0, 0
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        if halves and m % LANES == 0:
            its = halves_at(rows[0] + 2 * start, m)
            for i in range(m):
                wide[i] = np.float64(_float_of(np.uint32(its[i]) << np.uint32(16)))
            add_squares(wide, m, lanes[2 * count])
            for j in range(count):
                add_changes(halves_at(rows[j + 1] + 2 * start, m), its, wide, m, lanes[2 * j], lanes[2 * j + 1], changed[j])
            continue
        pivot[m:], moved[m:] = 0, 0
        _tile(rows[0], codes[0], start, m, pivot)
        for i in range(TILE):
            wide[i] = np.float64(pivot[i])
        add_squares(wide, m, lanes[2 * count])
        for j in range(count):
            _tile(rows[j + 1], codes[j + 1], start, m, moved)
            add_changes(moved, pivot, wide, m, lanes[2 * j], lanes[2 * j + 1], changed[j])
    for j in range(count):
        sums[j, 0], sums[j, 1], sums[j, 2] = _fold(lanes[2 * j]), _fold(lanes[2 * j + 1]), 0
        for lane in range(LANES):
            sums[j, 2] += changed[j, lane]
    sums[count, 0], sums[count, 1], sums[count, 2] = _fold(lanes[2 * count]), 0, 0
    release(room)
    release(rest)


@compiled(types.boolean(ROWS, CODES, types.int64, DOUBLES, types.int64, BYTES), of_rows=True)
def weigh(rows, codes, n, weights, code, out):
    """See `twins.weigh`."""
    base, halves, count, finite = 0, _all_half(codes) and code == _BF16, 0, True
    heaviest, apart, shift, worst = _floats(), _floats(), _floats(), _largest()
    room, rest = heap(8 * len(rows)), heap(4 * len(rows))
    others, factors = integers_at(room, len(rows)), floats_at(rest, len(rows))
    for j in range(1, len(rows)):
        if weights[j] > weights[base]:
            base = j
    for j in range(len(rows)):
        if j != base and weights[j] != 0:
            others[count], factors[count] = j, np.float32(weights[j])
            count += 1
    others, factors = others[:count], factors[:count]
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        if halves and m % AT_ONCE == 0:
            weigh_halves(rows, base, others, factors, start, m, address(out), worst)
            for lane in range(AT_ONCE):
                finite &= worst[lane] < np.uint32(0x7F80)
            continue
        _tile(rows[base], codes[base], start, m, heaviest)
        shift[:m] = 0
        for k in range(len(others)):
            _delta(rows[others[k]], codes[others[k]], start, m, heaviest, apart)
            for i in range(m):
                shift[i] += apart[i] * factors[k]
        for i in range(m):
            heaviest[i] += shift[i]
        finite &= _store(heaviest, code, out, start, m)
    release(room)
    release(rest)
    return finite


@compiled(types.float64(FACTORS), types.float64(DOUBLES))
def lane_sum(values):
    """See `twins.lane_sum`."""
    lanes, whole = _lanes(), len(values) // LANES * LANES
    lanes[:] = 0
    for r in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += np.float64(values[r + lane])
    for i in range(whole, len(values)):
        lanes[i - whole] += np.float64(values[i])
    return _fold(lanes)


@compiled(types.float64(FACTORS))
def lane_squares(values):
    """See `twins.lane_squares`."""
    lanes, whole = _lanes(), len(values) // LANES * LANES
    lanes[:] = 0
    for r in range(0, whole, LANES):
        for lane in range(LANES):
            value = np.float64(values[r + lane])
            lanes[lane] += value * value
    for i in range(whole, len(values)):
        value = np.float64(values[i])
        lanes[i - whole] += value * value
    return _fold(lanes)


@compiled(types.float64(DOUBLES, DOUBLES))
def lane_product(one, other):
    """See `twins.lane_product`."""
    lanes, whole = _lanes(), len(one) // LANES * LANES
    lanes[:] = 0
    for r in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += one[r + lane] * other[r + lane]
    for i in range(whole, len(one)):
        lanes[i - whole] += one[i] * other[i]
    return _fold(lanes)


@compiled(types.void(types.uint32, types.uint32, WORDS))
def draw(low, high, out):
    """See `twins.draw`."""
    for i in range(len(out)):  # numba widens sums and products of 32 bits to 64
        x = np.uint32(i + low)
        x = np.uint32((x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D))
        x = np.uint32(x + high)
        x = np.uint32((x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B))
        x = np.uint32((x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D))
        out[i] = x ^ x >> np.uint32(15)


@compiled(types.void(WORDS, types.int64[::1]))
def count_upper(bits, out):
    """See `twins.count_upper`."""
    for i in range(len(bits)):
        out[bits[i] >> np.uint32(16)] += 1


@compiled(types.void(WORDS, types.uint32, types.int64[::1]))
def count_lower(bits, upper, out):
    """See `twins.count_lower`."""
    for i in range(len(bits)):
        if bits[i] >> np.uint32(16) == upper:
            out[bits[i] & np.uint32(0xFFFF)] += 1


@helper
def _vote(deltas, side):
    """−1 where the sum of the changes in the order of the targets is negative, else 1; see `twins.majority`."""
    last, one = len(deltas) - 1, np.float32(1)
    if not last:
        for i in range(len(side)):
            side[i] = -one if deltas[0, i] < 0 else one
        return
    for i in range(len(side)):
        side[i] = deltas[0, i] + deltas[1, i]
    for j in range(2, last + 1):
        its = deltas[j]
        for i in range(len(side)):
            side[i] += its[i]
    for i in range(len(side)):
        side[i] = -one if side[i] < 0 else one


@compiled(types.void(DELTAS, WORDS))
def majority(deltas, sign):
    """See `twins.majority`."""
    total = _floats()
    for start in range(0, len(sign), TILE):
        m = min(TILE, len(sign) - start)
        first = deltas[0, start:start + m]
        for i in range(m):
            total[i] = first[i]
        for j in range(1, len(deltas)):
            its = deltas[j, start:start + m]
            for i in range(m):
                total[i] += its[i]
        part = sign[start:start + m]
        for i in range(m):
            part[i] = np.uint32(0x80000000) if total[i] < 0 else np.uint32(0)


@compiled(types.void(DELTAS, WORDS, FACTORS, NUMBERS))
def add_agreeing(deltas, sign, table, total):
    """See `twins.add_agreeing`."""
    turned, which = _words(), _ints()
    values, zero = floats_at(address(turned), TILE), np.float32(0)
    for start in range(0, len(sign), TILE):
        m = min(TILE, len(sign) - start)
        out, its_sign = total[start:start + m], sign[start:start + m]
        out[:], which[:] = 0, 0
        for j in range(len(deltas)):
            bits = _words_of(deltas[j])[start:start + m]
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
        turned_out = _words_of(out)
        for i in range(m):
            turned_out[i] ^= its_sign[i]


@compiled(types.void(ROWS, CODES, types.int64, types.float64[::1]), of_rows=True)
def squares(rows, codes, n, out):
    """See `twins.squares`."""
    count, halves = len(rows) - 1, _all_half(codes)
    pivot, moved, room = _floats(), _floats(), heap(8 * LANES * count)
    lanes = doubles_at(room, (count, LANES))
    lanes[:, :] = 0
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        if halves and m % LANES == 0:
            its = halves_at(rows[0] + 2 * start, m)
            for j in range(count):
                add_change_squares(halves_at(rows[j + 1] + 2 * start, m), its, m, lanes[j])
            continue
        pivot[m:], moved[m:] = 0, 0
        _tile(rows[0], codes[0], start, m, pivot)
        for j in range(count):
            _tile(rows[j + 1], codes[j + 1], start, m, moved)
            add_change_squares(moved, pivot, m, lanes[j])
    for j in range(count):
        out[j] += _fold(lanes[j])
    release(room)


@helper
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


@helper
def _drop(values, at, m, drop, inside, outside):
    """See `twins._dropped`; `values` are those from `at` on in their block."""
    if drop[0] == 1:
        bits = _words_of(values)
        _mark_above(bits, m, drop[1:3], inside)
        _mark_above(bits, m, drop[3:5], outside)
        for i in range(m):
            values[i] *= np.float32(np.int32(inside[i] & ~outside[i]))
    elif drop[0] == 2:
        draw(np.uint32(drop[1] + at), np.uint32(drop[2]), inside[:m])
        chance = np.uint32(drop[3])
        for i in range(m):
            values[i] *= np.float32(np.int32(inside[i] < chance))


@helper
def sizes_at(at, rows, codes, n, drops, out):
    """As `sizes`, for the numbers from `at` on of those that `drops` speaks of."""
    count = len(rows) - 1
    pivot, delta, inside, outside = _floats(), _floats(), _words(), _words()
    room = heap(16 * LANES * count)
    lanes = doubles_at(room, (2 * count, LANES))
    lanes[:, :] = 0
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[0], codes[0], start, m, pivot)
        delta[m:] = 0
        for j in range(count):
            _delta(rows[j + 1], codes[j + 1], start, m, pivot, delta)
            add_sizes(delta, m, lanes[2 * j])
            _drop(delta, at + start, m, drops[j], inside, outside)
            add_sizes(delta, m, lanes[2 * j + 1])
    for j in range(count):
        out[j, 0] += _fold(lanes[2 * j])
        out[j, 1] += _fold(lanes[2 * j + 1])
    release(room)


@compiled(types.void(ROWS, CODES, types.int64, DROPS, SUMS), of_rows=True)
def sizes(rows, codes, n, drops, out):
    """See `twins.sizes`."""
    sizes_at(0, rows, codes, n, drops, out)


@compiled(types.void(ROWS, CODES, types.int64, CODES, CODES, COUNTS), of_rows=True)
def count_changes(rows, codes, n, targets, uppers, out):
    """See `twins.count_changes`."""
    pivot, delta = _floats(), _floats()
    bits = _words_of(delta)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        _tile(rows[0], codes[0], start, m, pivot)
        for k in range(len(targets)):
            _delta(rows[targets[k] + 1], codes[targets[k] + 1], start, m, pivot, delta)
            its, upper = out[k], np.uint32(uppers[k])
            if uppers[k] < 0:
                for i in range(m):
                    its[(bits[i] & _SIGN) >> np.uint32(16)] += 1
            else:
                for i in range(m):
                    if (bits[i] & _SIGN) >> np.uint32(16) == upper:
                        its[bits[i] & np.uint32(0xFFFF)] += 1


@helper
def elect_at(at, rows, codes, n, drops, factors, vote_first, table, scale, out):
    """As `elect`, for the numbers from `at` on of those that `drops` speaks of, into the first n of `out`."""
    count, factor, zero, one = len(rows) - 1, np.float32(scale), np.float32(0), np.float32(1)
    pivot, side, inside, outside, which = _floats(), _floats(), _words(), _words(), _ints()
    room, rest = heap(4 * count * TILE), heap(4 * count)
    votes, halves = floats_at(rest, count), _all_half(codes) and not len(table)
    for j in range(count):
        halves &= drops[j, 0] == 0
        votes[j] = one if vote_first else factors[j]
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        if halves and m % AT_ONCE == 0:
            elect_halves(rows, votes, factors, factor, start, m, out[start:start + m])
            continue
        part, deltas = out[start:start + m], floats_at(room, (count, m))
        _tile(rows[0], codes[0], start, m, pivot)
        for j in range(count):
            its, weight = deltas[j], factors[j]
            _delta(rows[j + 1], codes[j + 1], start, m, pivot, its)
            _drop(its, at + start, m, drops[j], inside, outside)
            if not vote_first:
                for i in range(m):
                    its[i] *= weight
        _vote(deltas, side[:m])
        part[:] = 0
        if len(table):
            which[:] = 0
        for j in range(count):
            its, weight = deltas[j], factors[j] if vote_first else one
            if len(table):
                for i in range(m):
                    which[i] |= np.int32(its[i] * weight * side[i] > zero) << j
            for i in range(m):
                agreeing = its[i] * weight * side[i]
                part[i] += zero if agreeing <= zero else agreeing
        if len(table):
            for i in range(m):
                part[i] /= table[which[i]]
        if scale != 1:
            for i in range(m):
                part[i] *= factor
        for i in range(m):
            part[i] = part[i] * side[i] + pivot[i]
    release(room)
    release(rest)


@compiled(types.void(ROWS, CODES, types.int64, DROPS, FACTORS, types.boolean, FACTORS, types.float64, NUMBERS), of_rows=True)
def elect(rows, codes, n, drops, factors, vote_first, table, scale, out):
    """See `twins.elect`."""
    elect_at(0, rows, codes, n, drops, factors, vote_first, table, scale, out)


@compiled(types.void(DELTAS, NUMBERS))
def spread(deltas, out):
    """See `twins.spread`."""
    mean, total, count = _doubles(), _doubles(), np.float64(len(deltas))
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


@compiled(types.void(DELTAS, DELTAS, types.float32[:, ::1]))
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


@compiled(types.void(types.uint64[::1], types.int64, KEYS, types.uint64[:, ::1]))
def hash_words(words, first, keys, sums):
    """See `twins.hash_words`."""
    size, at = keys.shape[1], 0
    while at < len(words):
        chunk, place = divmod(first + at, size)
        n = min(size - place, len(words) - at)
        whole = n // LINE * LINE
        its = sums[chunk]
        hash_lines(words[at:at + whole], keys, place, whole, its)
        for i in range(whole, n):
            low, high = words[at + i] & _LOW, words[at + i] >> _SHIFT
            key = keys[:, place + i]
            its[0] += low * (key[0] & _LOW) + high * (key[1] & _LOW)
            its[1] += low * (key[2] & _LOW) + high * (key[3] & _LOW)
        at += n
