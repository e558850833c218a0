"""The innermost steps of `kernels`, written for LLVM where numba's own code takes twice as long: sums by lane, and whole
calculations from stored bfloat16 numbers to their result without a place in memory between.

No multiply-add is contracted and no order changed, so every bit is the one that the loop of `twins` gives.
"""

from __future__ import annotations

from contextlib import contextmanager

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusion.compiled.twins import LANES

WIDE = 16  # lanes whose sums are in registers at once; LANES is a multiple of it
AT_ONCE = 32  # numbers that `weigh_halves` and `elect_halves` handle at once: a line of the cache for each model
LINE = 8  # words in a line of the cache
AHEAD = 4096  # bytes: processors foresee reading within a page of memory, but not the page that follows
_BYTE, _HALF, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()


class Code:
    """Code that is written for one call: its arguments by number, and vectors of `wide` numbers."""

    def __init__(self, context, builder, signature, arguments, wide):
        self.context, self.builder, self.kinds, self.wide = context, builder, signature.args, wide
        self.arguments = [context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
                          for kind, value in zip(signature.args, arguments, strict=True)]
        self.size = context.get_value_type(types.intp)

    def all(self, kind, value):
        """A vector of `wide` times this constant."""
        return ir.Constant(ir.VectorType(kind, self.wide), [value] * self.wide)

    def spread(self, value):
        """A vector of `wide` times this value."""
        vector = ir.VectorType(value.type, self.wide)
        first = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_WORD, 0))
        return self.builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), self.all(_WORD, 0))

    def load(self, pointer, kind):
        """The vector of `wide` numbers of this kind at a pointer."""
        vector = ir.VectorType(kind, self.wide)
        return self.builder.load(self.builder.bitcast(pointer, vector.as_pointer()), align=self._align(kind))

    def store(self, values, pointer):
        """Write a vector to where a pointer points."""
        place = self.builder.bitcast(pointer, values.type.as_pointer())
        self.builder.store(values, place, align=self._align(values.type.element))

    def place(self, argument, at):
        """A pointer to element number `at` of an array of one dimension."""
        return self.builder.gep(self.arguments[argument].data, [at])

    def element(self, argument, at):
        """Element number `at` of an array of one dimension."""
        return self.builder.load(self.place(argument, at))

    def length(self, argument):
        """How many elements an array of one dimension has."""
        return cgutils.unpack_tuple(self.builder, self.arguments[argument].shape)[0]

    def numbers(self, argument, at):
        """`wide` numbers of an array from `at` on: those of float64 as they are, others as float32 (uint16 are bfloat16)."""
        kind, pointer = self.kinds[argument].dtype, self.place(argument, at)
        if kind == types.uint16:
            return self.halves(pointer)
        return self.load(pointer, self.context.get_data_type(kind))

    def halves(self, pointer):
        """`wide` stored bfloat16 numbers at a pointer as float32."""
        words = self.builder.zext(self.load(pointer, _HALF), ir.VectorType(_WORD, self.wide))
        return self.builder.bitcast(self.builder.shl(words, self.all(_WORD, 16)), ir.VectorType(_FLOAT, self.wide))

    def row(self, rows, row, at, ahead=False):
        """`wide` bfloat16 numbers from `at` on of one of the `rows` [models], which are addresses, as float32."""
        address = self.builder.add(self.element(rows, row), self.builder.shl(at, ir.Constant(at.type, 1)))
        place = self.builder.inttoptr(address, _HALF.as_pointer())
        if ahead:
            self.ask_ahead(place)
        return self.halves(place)

    def ask_ahead(self, pointer):
        """Let the line of memory that is read AHEAD bytes later be fetched meanwhile."""
        later = self.builder.gep(self.builder.bitcast(pointer, _BYTE.as_pointer()), [ir.Constant(self.size, AHEAD)])
        kind = ir.FunctionType(ir.VoidType(), [later.type, _WORD, _WORD, _WORD])
        fetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(fetch, [later, *(ir.Constant(_WORD, value) for value in (0, 2, 1))])  # to read; second level; data

    def double(self, values):
        """Numbers in float64."""
        wide = ir.VectorType(_DOUBLE, self.wide)
        return values if values.type == wide else self.builder.fpext(values, wide)

    def magnitude(self, values):
        """Numbers of float64 without their signs."""
        bits, kept = ir.VectorType(_LONG, self.wide), self.all(ir.IntType(64), 0x7FFF_FFFF_FFFF_FFFF)
        return self.builder.bitcast(self.builder.and_(self.builder.bitcast(values, bits), kept), values.type)

    def variable(self, kind):
        """Room for a vector, in a register while it can be."""
        return cgutils.alloca_once(self.builder, ir.VectorType(kind, self.wide))

    def add_to(self, room, values):
        """Add float numbers to those of a variable."""
        self.builder.store(self.builder.fadd(self.builder.load(room), values), room)

    @contextmanager
    def steps(self, count, step):
        """A loop over 0, `step` … below `count`."""
        first, by = ir.Constant(count.type, 0), ir.Constant(count.type, step)
        with cgutils.for_range_slice(self.builder, first, count, by, count.type) as (at, _):
            yield at

    def _align(self, kind):
        return kind.width // 8 if isinstance(kind, ir.IntType) else kind.get_abi_alignment(self.context.target_data)


# ── sums by lane ─────────────────────────────────────────────────────────────────────────────────────────────────────

def _by_lane(numbers, step):
    """Code that adds something to one sum in each of LANES lanes, the sums being in registers meanwhile.

    Arguments of the call are `numbers` arrays, how many of their numbers to take (the rest of the last LANES of them must be
    0), and arrays of sums [LANES]. `step` makes new sums of numbers and sums, WIDE lanes of each at once.
    """
    def generate(context, builder, signature, arguments):
        code = Code(context, builder, signature, arguments, WIDE)
        n, sums = code.arguments[numbers], range(numbers + 1, len(arguments))
        kinds = [context.get_data_type(signature.args[k].dtype) for k in sums]
        held = [code.variable(kind) for kind in kinds]
        with code.steps(ir.Constant(n.type, LANES), WIDE) as lane:
            for k, room, kind in zip(sums, held, kinds, strict=True):
                builder.store(code.load(code.place(k, lane), kind), room)
            with code.steps(n, LANES) as row:
                at = builder.add(row, lane)
                values = [code.numbers(k, at) for k in range(numbers)]
                for room, new in zip(held, step(code, values, [builder.load(room) for room in held]), strict=True):
                    builder.store(new, room)
            for k, room in zip(sums, held, strict=True):
                code.store(builder.load(room), code.place(k, lane))
        return context.get_dummy_value()
    return generate


def _square(code, values):
    wide = code.double(values)
    return code.builder.fmul(wide, wide)


@intrinsic
def add_squares(context, values, n, squares):
    """Add the squares of the first n of `values` to the lanes of `squares`."""
    def step(code, values, sums):
        return [code.builder.fadd(sums[0], _square(code, values[0]))]
    return types.void(values, n, squares), _by_lane(1, step)


@intrinsic
def add_change_squares(context, moved, pivot, n, squares):
    """Add the squares of moved − pivot, taken in float32, to the lanes of `squares`."""
    def step(code, values, sums):
        return [code.builder.fadd(sums[0], _square(code, code.builder.fsub(*values)))]
    return types.void(moved, pivot, n, squares), _by_lane(2, step)


@intrinsic
def add_sizes(context, values, n, sizes):
    """Add the magnitudes of the first n of `values` to the lanes of `sizes`."""
    def step(code, values, sums):
        return [code.builder.fadd(sums[0], code.magnitude(code.double(values[0])))]
    return types.void(values, n, sizes), _by_lane(1, step)


@intrinsic
def add_changes(context, moved, pivot, wide, n, squares, sizes, changed):
    """Add squares and magnitudes of moved − pivot, taken in float64, to the lanes of these, and count what is not equal.

    `wide` is `pivot` in float64: it is taken from all models, and widening takes time.
    """
    def step(code, values, sums):
        builder = code.builder
        apart = builder.fsub(code.double(values[0]), values[2])
        differs = builder.sext(builder.fcmp_unordered("!=", *values[:2]), sums[2].type)
        return [builder.fadd(sums[0], builder.fmul(apart, apart)), builder.fadd(sums[1], code.magnitude(apart)),
                builder.sub(sums[2], differs)]
    return types.void(moved, pivot, wide, n, squares, sizes, changed), _by_lane(3, step)


# ── from stored bfloat16 numbers to their result ─────────────────────────────────────────────────────────────────────

@intrinsic
def weigh_halves(context, rows, base, others, weights, start, n, out, worst):
    """Write the weighted average of the numbers start … start + n, a multiple of AT_ONCE, as such behind the address `out`.

    `base` is the heaviest row, `others` are the rest and `weights` theirs; `worst` [AT_ONCE] uint32 gets the largest
    magnitudes that were stored.
    """
    def generate(context, builder, signature, arguments):
        code = Code(context, builder, signature, arguments, AT_ONCE)
        _, base, _, _, start, n, out, _ = code.arguments
        shift, worst = code.variable(_FLOAT), code.variable(_WORD)
        builder.store(code.all(_WORD, 0), worst)
        with code.steps(n, AT_ONCE) as step:
            at = builder.add(start, step)
            heaviest = code.row(0, base, at, ahead=True)
            builder.store(code.all(_FLOAT, 0.0), shift)
            with code.steps(code.length(2), 1) as k:
                apart = builder.fsub(code.row(0, code.element(2, k), at, ahead=True), heaviest)
                code.add_to(shift, builder.fmul(apart, code.spread(code.element(3, k))))
            rounded = _rounded(code, builder.fadd(heaviest, builder.load(shift)))
            size, most = builder.and_(rounded, code.all(_WORD, 0x7FFF)), builder.load(worst)
            builder.store(builder.select(builder.icmp_unsigned(">", size, most), size, most), worst)
            place = builder.inttoptr(builder.add(out, builder.shl(at, ir.Constant(at.type, 1))), _HALF.as_pointer())
            code.store(builder.trunc(rounded, ir.VectorType(_HALF, AT_ONCE)), place)
        code.store(builder.load(worst), code.place(7, ir.Constant(code.size, 0)))
        return context.get_dummy_value()
    return types.void(rows, base, others, weights, start, n, out, worst), generate


def _rounded(code, values):
    """float32 numbers as bfloat16 ones in uint32: to the nearest, halves to even, one NaN for all."""
    builder = code.builder
    bits = builder.bitcast(values, ir.VectorType(_WORD, code.wide))
    odd = builder.and_(builder.lshr(bits, code.all(_WORD, 16)), code.all(_WORD, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, code.all(_WORD, 0x7FFF))), code.all(_WORD, 16))
    nan = builder.icmp_unsigned(">", builder.and_(bits, code.all(_WORD, 0x7FFFFFFF)), code.all(_WORD, 0x7F800000))
    return builder.select(nan, code.all(_WORD, 0x7FC0), rounded)


@intrinsic
def elect_halves(context, rows, votes, factors, scale, start, n, out):
    """Write pivot + scale · the sum of the changes that agree, of the numbers start … start + n, a multiple of AT_ONCE.

    `votes` [J] weigh the changes before the majority of their signs is taken, `factors` [J] those that are summed; `out` [n]
    float32.
    """
    def generate(context, builder, signature, arguments):
        code = Code(context, builder, signature, arguments, AT_ONCE)
        _, _, _, scale, start, n, _ = code.arguments
        zero, one, total = code.all(_FLOAT, 0.0), ir.Constant(code.size, 1), code.variable(_FLOAT)

        def sum_of(argument, its, at, pivot, ahead):
            builder.store(zero, total)
            with code.steps(code.length(argument), 1) as k:
                delta = builder.fsub(code.row(0, builder.add(k, one), at, ahead), pivot)
                code.add_to(total, its(builder.fmul(delta, code.spread(code.element(argument, k)))))
            return builder.load(total)

        with code.steps(n, AT_ONCE) as step:
            at = builder.add(start, step)
            pivot = code.row(0, ir.Constant(code.size, 0), at, ahead=True)
            minority = builder.fcmp_ordered("<", sum_of(1, lambda weighed: weighed, at, pivot, ahead=True), zero)
            side = builder.select(minority, code.all(_FLOAT, -1.0), code.all(_FLOAT, 1.0))

            def agreeing(weighed, side=side):
                turned = builder.fmul(weighed, side)
                return builder.select(builder.fcmp_ordered("<=", turned, zero), zero, turned)

            part = builder.fmul(sum_of(2, agreeing, at, pivot, ahead=False), code.spread(scale))
            code.store(builder.fadd(builder.fmul(part, side), pivot), code.place(6, step))
        return context.get_dummy_value()
    return types.void(rows, votes, factors, scale, start, n, out), generate


# ── digests ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@intrinsic
def hash_lines(context, words, keys, place, n, sums):
    """Add the keyed sums of the first n of `words`, a multiple of LINE, to `sums` [2]; see `twins.hash_words`.

    `keys` [4, …] from `place` on are those of these words.
    """
    def generate(context, builder, signature, arguments):
        code = Code(context, builder, signature, arguments, LINE)
        _, keys, place, n, _ = code.arguments
        low, shift = code.all(_LONG, 0xFFFF_FFFF), code.all(_LONG, 32)
        stride, totals = cgutils.unpack_tuple(builder, keys.strides)[0], [code.variable(_LONG) for _ in range(4)]
        for total in totals:
            builder.store(code.all(_LONG, 0), total)
        with code.steps(n, LINE) as at:
            here = code.place(0, at)
            code.ask_ahead(here)
            both, first = code.load(here, _LONG), builder.gep(keys.data, [builder.add(place, at)])
            halves = (builder.and_(both, low), builder.lshr(both, shift))
            for k, total in enumerate(totals):
                row = builder.gep(builder.bitcast(first, _BYTE.as_pointer()), [builder.mul(stride, ir.Constant(stride.type, k))])
                key = builder.and_(code.load(row, _LONG), low)
                builder.store(builder.add(builder.load(total), builder.mul(halves[k % 2], key)), total)
        for out in range(2):
            both = builder.add(*(builder.load(total) for total in totals[2 * out:2 * out + 2]))
            where = code.place(4, ir.Constant(code.size, out))
            value = builder.load(where)
            for lane in range(LINE):
                value = builder.add(value, builder.extract_element(both, ir.Constant(_WORD, lane)))
            builder.store(value, where)
        return context.get_dummy_value()
    return types.void(words, keys, place, n, sums), generate
