"""Stored numbers read and handled without the interpreter: many blocks of one tensor of several models in one call.

Each block is read into `rows`, which stay in the second-level cache, added to the digests, and handled there by the loop of
the same name in `kernels`, so every bit is the one that a block at a time gives. A loop returns how many numbers it handled:
it stops before a block that cannot be read whole or is not finite, and the caller, who can say what is wrong, does that one
by itself.

`files` [models, 3] int64: open file, first byte of the tensor, whether to take a digest; `hashes` [models, chunks, 2] gets
the sums of the digest's chunks from `start` on. There is no twin: `blocks` reads in Python where this cannot be had.

numba's cache looks at the file of a loop only, and these loops hold those of another one. KERNELS is the digest of that one (a
test says when it must be brought up to date), so that whoever gets new kernels gets a new file here.
"""

from __future__ import annotations

import numpy as np
from numba import types

from fusion.compiled import kernels
from fusion.compiled.kernels import (
    BYTES,
    CODES,
    DROPS,
    FACTORS,
    NUMBERS,
    all_finite,
    elect_at,
    hash_words,
    sizes_at,
)
from fusion.compiled.twins import BLOCK

KERNELS = "d865055ebc233def"
FILES, KEYS = kernels.read_only(types.int64, 2), kernels.read_only(types.uint64, 2)
HASHES, FILLED = types.uint64[:, :, ::1], types.uint8[:, ::1]
COUNT, SUMS = types.int64, types.float64[:, ::1]
WHERE = (FILES, CODES, COUNT, COUNT, FILLED, KEYS, HASHES)
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@kernels.helper
def _item(code):
    return 8 if code == kernels.F64 else 4 if code == kernels.F32 else 2


@kernels.compiled(types.boolean(*WHERE, COUNT))
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


@kernels.helper
def _next(files, codes, start, at, n, rows, keys, hashes, check):
    """Read the block behind the first `at` of the n numbers; returns its count, 0 at the end and where the caller must look:
    it cannot be read whole or, if `check`, is not finite."""
    m, sound = min(BLOCK, n - at), True
    if m == 0 or not fill(files, codes, start + at, m, rows, keys, hashes, at):
        return 0
    if check:
        for row in range(len(rows)):
            sound &= all_finite(rows[row], codes[row], m)
    return m if sound else 0


@kernels.compiled(COUNT(*WHERE, SUMS, SUMS))
def sum_changes(files, codes, start, n, rows, keys, hashes, part, sums):
    """Add the sums of every block to `sums` [J + 1, 3]; see `twins.sum_changes`. `part`: room for those of one block."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, keys, hashes, False)
        if not m:
            break
        size = 0.0
        kernels.sum_changes(rows, codes, m, part)
        for j in range(len(part)):
            size += part[j, 0]
        if not np.isfinite(size):
            break
        sums += part
        at += m
    return at


@kernels.compiled(COUNT(*WHERE, kernels.read_only(types.float64, 1), COUNT, BYTES))
def weigh(files, codes, start, n, rows, keys, hashes, weights, code, out):
    """Write the weighted average of every block into `out`; see `twins.weigh`."""
    at, item = 0, _item(code)
    while True:
        m = _next(files, codes, start, at, n, rows, keys, hashes, False)
        if not m:
            break
        finite = kernels.weigh(rows, codes, m, weights, code, out[at * item:(at + m) * item])
        for j in range(len(rows)):
            if weights[j] == 0:
                finite &= all_finite(rows[j], codes[j], m)
        if not finite:
            break
        at += m
    return at


@kernels.compiled(COUNT(*WHERE, types.boolean, types.float64[::1]))
def squares(files, codes, start, n, rows, keys, hashes, check, out):
    """Add the squares of the changes to `out`; see `twins.squares`. `check`: stop before a block that is not finite."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, keys, hashes, check)
        if not m:
            break
        kernels.squares(rows, codes, m, out)
        at += m
    return at


@kernels.compiled(COUNT(*WHERE, types.boolean, CODES, CODES, types.int64[:, ::1]))
def count_changes(files, codes, start, n, rows, keys, hashes, check, targets, uppers, out):
    """Count the changes of some targets in `out`; see `twins.count_changes`, and `squares`."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, keys, hashes, check)
        if not m:
            break
        kernels.count_changes(rows, codes, m, targets, uppers, out)
        at += m
    return at


@kernels.compiled(COUNT(*WHERE, types.boolean, DROPS, SUMS))
def sizes(files, codes, start, n, rows, keys, hashes, check, drops, out):
    """Add the magnitudes of the changes to `out`; see `twins.sizes`, and `squares`."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, keys, hashes, check)
        if not m:
            break
        sizes_at(at, rows, codes, m, drops, out)
        at += m
    return at


@kernels.compiled(COUNT(*WHERE, types.boolean, DROPS, FACTORS, types.boolean, FACTORS, types.float64, NUMBERS))
def elect(files, codes, start, n, rows, keys, hashes, check, drops, factors, vote_first, table, scale, out):
    """Write the pivot and the elected changes into `out`; see `twins.elect`, and `squares`."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, keys, hashes, check)
        if not m:
            break
        elect_at(at, rows, codes, m, drops, factors, vote_first, table, scale, out[at:])
        at += m
    return at
