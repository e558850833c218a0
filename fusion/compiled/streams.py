"""Stored numbers read and handled without the interpreter: many blocks of one tensor of several models in one call.

Each block is added to the digests and handled by the loop of the same name in `kernels` while it is in the second-level cache,
so every bit is the one that a block at a time gives. It is taken from where its file is mapped (see `maps`), or read into
`rows`. A loop returns how many numbers it handled: it stops before a block that cannot be read whole or is not finite, and the
caller, who can say what is wrong, does that one by itself. It returns −1, and what it wrote is worthless, when the system could
not give a page of a mapped file.

`files` [models, 5] int64: open file, first byte of the tensor, whether to take a digest, the address of that byte where it is
mapped (else 0) and that of the word which says that a page was lost; `places` [models] gets the addresses of a block; `hashes`
[models, chunks, 2] gets the sums of the digest's chunks from `start` on. There is no twin: `blocks` reads in Python where this
cannot be had.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fusion.compiled import kernels
from fusion.compiled.kernels import (
    BYTES,
    CODES,
    COUNT,
    COUNTS,
    DOUBLES,
    DROPS,
    FACTORS,
    KEYS,
    NUMBERS,
    ROWS,
    SUMS,
    all_finite_at,
    elect_at,
    hash_words,
    sizes_at,
)
from fusion.compiled.memory import address, longs_at
from fusion.compiled.registry import compiled, helper
from fusion.compiled.twins import BLOCK

FILES, FILLED, HASHES = types.int64[:, ::1], types.uint8[:, ::1], types.uint64[:, :, ::1]
WHERE = (FILES, CODES, COUNT, COUNT, FILLED, ROWS, KEYS, HASHES)
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@helper
def _item(code):
    return 8 if code == kernels.F64 else 4 if code == kernels.F32 else 2


@intrinsic
def _word(context, address):
    """The word at an address as it is now, whatever was read there before."""
    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)
    return types.int64(types.int64), generate


@helper
def _done(files, n):
    """The n of a loop that handled as many numbers, or −1 where a page of a mapped file was lost."""
    for m in range(len(files)):
        if files[m, 3] and _word(files[m, 4]):
            return -1
    return n


@helper
def _read(file, first, nbytes, out):
    """Read these bytes of a file to an address; whether all were there."""
    done = 0
    while done < nbytes:
        got = _pread(np.int32(file), types.uintp(out + done), types.uintp(nbytes - done), first + done)
        if got <= 0:
            return False
        done += got
    return True


@helper
def _fill(files, codes, start, n, rows, places, keys, hashes, at, mapped):
    """See `fill`; where it may be `mapped`, `places` get addresses there and nothing is read."""
    for m in range(len(files)):
        item = _item(codes[m])
        nbytes, first, digested = n * item, start * item, files[m, 2]
        if mapped and files[m, 3] and nbytes % 8 == 0:
            places[m] = files[m, 3] + first
        else:
            places[m] = address(rows[m])
            if not _read(files[m, 0], files[m, 1] + first, nbytes, places[m]):
                return False
            rows[m, nbytes:-(-nbytes // 8) * 8] = 0
        if digested:
            chunk = keys.shape[1] * 8
            its = hashes[m, at * item // chunk:-(-(at * item + nbytes) // chunk)]
            its[:] = 0
            hash_words(longs_at(places[m], -(-nbytes // 8)), 0, keys, its)
    return True


@compiled(types.boolean(*WHERE, COUNT))
def fill(files, codes, start, n, rows, places, keys, hashes, at):
    """Read the numbers start … start + n of every model into `rows`, their hashes into `hashes` as those from `at` on."""
    return _fill(files, codes, start, n, rows, places, keys, hashes, at, False)


@helper
def _next(files, codes, start, at, n, rows, places, keys, hashes, check):
    """Get the block behind the first `at` of the n numbers to `places`; returns its count, 0 at the end and where the caller
    must look: it cannot be read whole or, if `check`, is not finite."""
    m, sound = min(BLOCK, n - at), True
    if m == 0 or not _fill(files, codes, start + at, m, rows, places, keys, hashes, at, True):
        return 0
    if check:
        for row in range(len(places)):
            sound &= all_finite_at(places[row], codes[row], m)
    return m if sound else 0


@compiled(COUNT(*WHERE, SUMS, SUMS))
def sum_changes(files, codes, start, n, rows, places, keys, hashes, part, sums):
    """Add the sums of every block to `sums` [J + 1, 3]; see `twins.sum_changes`. `part`: room for those of one block."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, places, keys, hashes, False)
        if not m:
            break
        size = 0.0
        kernels.sum_changes(places, codes, m, part)
        for j in range(len(part)):
            size += part[j, 0]
        if not np.isfinite(size):
            break
        sums += part
        at += m
    return _done(files, at)


@compiled(COUNT(*WHERE, DOUBLES, COUNT, BYTES))
def weigh(files, codes, start, n, rows, places, keys, hashes, weights, code, out):
    """Write the weighted average of every block into `out`; see `twins.weigh`."""
    at, item = 0, _item(code)
    while True:
        m = _next(files, codes, start, at, n, rows, places, keys, hashes, False)
        if not m:
            break
        finite = kernels.weigh(places, codes, m, weights, code, out[at * item:(at + m) * item])
        for j in range(len(places)):
            if weights[j] == 0:
                finite &= all_finite_at(places[j], codes[j], m)
        if not finite:
            break
        at += m
    return _done(files, at)


@compiled(COUNT(*WHERE, types.boolean, DOUBLES))
def squares(files, codes, start, n, rows, places, keys, hashes, check, out):
    """Add the squares of the changes to `out`; see `twins.squares`. `check`: stop before a block that is not finite."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, places, keys, hashes, check)
        if not m:
            break
        kernels.squares(places, codes, m, out)
        at += m
    return _done(files, at)


@compiled(COUNT(*WHERE, types.boolean, CODES, CODES, COUNTS))
def count_changes(files, codes, start, n, rows, places, keys, hashes, check, targets, uppers, out):
    """Count the changes of some targets in `out`; see `twins.count_changes`, and `squares`."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, places, keys, hashes, check)
        if not m:
            break
        kernels.count_changes(places, codes, m, targets, uppers, out)
        at += m
    return _done(files, at)


@compiled(COUNT(*WHERE, types.boolean, DROPS, SUMS))
def sizes(files, codes, start, n, rows, places, keys, hashes, check, drops, out):
    """Add the magnitudes of the changes to `out`; see `twins.sizes`, and `squares`."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, places, keys, hashes, check)
        if not m:
            break
        sizes_at(at, places, codes, m, drops, out)
        at += m
    return _done(files, at)


@compiled(COUNT(*WHERE, types.boolean, DROPS, FACTORS, types.boolean, FACTORS, types.float64, NUMBERS))
def elect(files, codes, start, n, rows, places, keys, hashes, check, drops, factors, vote_first, table, scale, out):
    """Write the pivot and the elected changes into `out`; see `twins.elect`, and `squares`."""
    at = 0
    while True:
        m = _next(files, codes, start, at, n, rows, places, keys, hashes, check)
        if not m:
            break
        elect_at(at, places, codes, m, drops, factors, vote_first, table, scale, out[at:])
        at += m
    return _done(files, at)
