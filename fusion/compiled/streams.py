"""Stored numbers read and handled without the interpreter: many blocks of one tensor of several models in one call.

Each block is read into `rows`, which stay in the second-level cache, added to the digests, and handled there by the loops of
`kernels`, so every bit is the one that a block at a time gives. A loop returns how many numbers it handled: it stops before a
block that cannot be read whole or is not finite, and the caller, who can say what is wrong, does that one by itself.

`files` [models, 3] int64: open file, first byte of the tensor, whether to take a digest; `hashes` [models, chunks, 2] gets
the sums of the digest's chunks from `start` on. There is no twin: `blocks` reads in Python where this cannot be had.
"""

from __future__ import annotations

import numpy as np
from numba import types

from fusion.compiled.kernels import (
    _F32,
    _F64,
    BYTES,
    CODES,
    _compile,
    _helper,
    _read_only,
    all_finite,
    hash_words,
    sum_changes,
    weigh,
)
from fusion.compiled.twins import BLOCK

FILES, KEYS, HASHES, FILLED = _read_only(types.int64, 2), _read_only(types.uint64, 2), types.uint64[:, :, ::1], types.uint8[:, ::1]
COUNT, SUMS = types.int64, types.float64[:, ::1]
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@_helper
def _item(code):
    return 8 if code == _F64 else 4 if code == _F32 else 2


@_compile(types.boolean(FILES, CODES, COUNT, COUNT, FILLED, KEYS, HASHES, COUNT))
def fill(files, codes, start, n, rows, keys, hashes, at):
    """Read the numbers start … start + n of every model into `rows`, their hashes into `hashes` as those from `at` on."""
    for m in range(len(files)):
        item = _item(codes[m])
        nbytes, first, done = n * item, files[m, 1] + start * item, 0
        while done < nbytes:
            got = _pread(np.int32(files[m, 0]), types.uintp(rows[m].ctypes.data + done), types.uintp(nbytes - done), first + done)
            if got <= 0:
                return False
            done += got
        if files[m, 2]:
            whole, chunk = -(-nbytes // 8) * 8, keys.shape[1] * 8
            rows[m, nbytes:whole] = 0
            its = hashes[m, at * item // chunk:-(-(at * item + nbytes) // chunk)]
            its[:] = 0
            hash_words(rows[m, :whole].view(np.uint64), 0, keys, its)
    return True


@_compile(COUNT(FILES, CODES, COUNT, COUNT, FILLED, KEYS, HASHES, SUMS, SUMS))
def changes(files, codes, start, n, rows, keys, hashes, part, sums):
    """Add the sums of every block to `sums` [J + 1, 3]; see `twins.sum_changes`. `part`: room for those of one block."""
    at = 0
    while at < n:
        m, size = min(BLOCK, n - at), 0.0
        if not fill(files, codes, start + at, m, rows, keys, hashes, at):
            break
        sum_changes(rows, codes, m, part)
        for j in range(len(part)):
            size += part[j, 0]
        if not np.isfinite(size):
            break
        sums += part
        at += m
    return at


@_compile(COUNT(FILES, CODES, COUNT, COUNT, FILLED, KEYS, HASHES, _read_only(types.float64, 1), COUNT, BYTES))
def weighed(files, codes, start, n, rows, keys, hashes, weights, code, out):
    """Write the weighted average of every block into `out`; see `twins.weigh`."""
    at, item = 0, _item(code)
    while at < n:
        m = min(BLOCK, n - at)
        if not fill(files, codes, start + at, m, rows, keys, hashes, at):
            break
        finite = weigh(rows, codes, m, weights, code, out[at * item:(at + m) * item])
        for j in range(len(rows)):
            if weights[j] == 0:
                finite &= all_finite(rows[j], codes[j], m)
        if not finite:
            break
        at += m
    return at
