"""The loops of `twins`, compiled by numba: import only through `fusion.compiled`, importing takes half a second.

No fastmath: sums keep their written order, no multiply-add is contracted, so every bit equals the twin's. Signatures are
given, so that all is compiled (or loaded from the cache) on import. The loops run without the interpreter's lock.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def _read_only(item: types.Type, dimensions: int) -> types.Array:
    return types.Array(item, dimensions, "C", readonly=True)


def _compile(*signatures):
    def decorate(function):
        for cache in (True, False):
            try:
                return numba.njit(list(signatures), nogil=True, cache=cache, error_model="numpy")(function)
            except RuntimeError:  # no folder to cache in: neither beside this file nor the user's own
                if not cache:
                    raise
        return None
    return decorate


@_compile(types.void(_read_only(types.uint64, 1), types.int64, _read_only(types.uint64, 2), types.uint64[:, ::1]))
def hash_words(words, first, keys, sums):
    """See `twins.hash_words`."""
    size, at = keys.shape[1], 0
    while at < len(words):
        chunk, place = divmod(first + at, size)
        n = min(size - place, len(words) - at)
        a, b = np.uint64(0), np.uint64(0)
        part, its = words[at:at + n], keys[:, place:place + n]
        for i in range(n):
            low, high = part[i] & _LOW, part[i] >> _SHIFT
            a += low * (its[0, i] & _LOW) + high * (its[1, i] & _LOW)
            b += low * (its[2, i] & _LOW) + high * (its[3, i] & _LOW)
        sums[chunk, 0] += a
        sums[chunk, 1] += b
        at += n
