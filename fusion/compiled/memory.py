"""Arrays for compiled loops, which know nothing of the interpreter: at an address, on the stack, or from the system."""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from fusion.compiled.registry import helper

LINE_BYTES = 64
_malloc = types.ExternalFunction("malloc", types.int64(types.uintp))
_free = types.ExternalFunction("free", types.void(types.int64))


def _at(kind):
    @intrinsic
    def pointer(context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
        return types.CPointer(kind)(types.int64), generate

    @helper
    def array(address, shape):
        """The numbers at an address as an array of this shape."""
        return numba.carray(pointer(address), shape)
    return array


halves_at, words_at, longs_at, ints_at, integers_at, floats_at, doubles_at = map(
    _at, (types.uint16, types.uint32, types.uint64, types.int32, types.int64, types.float32, types.float64))


@helper
def address(array):
    """Where the first number of an array lies."""
    return np.int64(array.ctypes.data)


@helper
def heap(nbytes):
    """The address of this much memory, not yet written; to be given to `release`."""
    return _malloc(types.uintp(nbytes))


@helper
def release(address):
    """Give memory back that came from `heap`."""
    _free(address)


def on_stack(kind: types.Type, n: int):
    """A function for loops: an array of n numbers that is gone, unwritten at first, when the loop that calls it returns."""
    @intrinsic
    def array(context):
        def generate(context, builder, signature, arguments):
            item = context.get_data_type(kind)
            room, made = cgutils.alloca_once(builder, ir.ArrayType(item, n)), context.make_array(signature.return_type)
            room.align, made = LINE_BYTES, made(context, builder)
            count, step = (context.get_constant(types.intp, value) for value in (n, context.get_abi_sizeof(item)))
            data = builder.bitcast(room, item.as_pointer())
            arrayobj.populate_array(made, data, shape=[count], strides=[step], itemsize=step, meminfo=None)
            return made._getvalue()
        return types.Array(kind, 1, "C")(), generate
    return array
