"""One tensor of several models, block by block: stored bytes in one buffer that stays in the cache, where loops find them.

    blocks = Blocks(name, models)
    for start, n in blocks:                                       # blocks.rows now hold these n numbers of every model
        compiled.loops().sum_changes(blocks.rows, blocks.codes, n, sums)

Price: one read of every byte; digests of what was read are almost free on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from fusion import compiled
from fusion.checkpoint import Checkpoint
from fusion.compiled.twins import STRETCH
from fusion.digest import CHUNK_BYTES, KEYS, TensorDigest, read_dtype
from fusion.dtypes import FLOATS, ITEM_BYTES, stored_type
from fusion.errors import CheckpointError
from fusion.files import Span

SPACE = 192  # bytes between rows, so that the same place of all does not share the few lines of one set of the cache


class Row:
    """The tensor `name` of one model as stored numbers: `dtype` and its `code`, the place in `dtypes.FLOATS`.

    A tensor that is computed while it is read is float32. `digest` sees what is read.
    """

    def __init__(self, name: str, model: Checkpoint, digest: TensorDigest | None = None):
        self.name, self.model, self.digest = name, model, digest
        self.dtype = read_dtype(model, name)
        self.code, self.item = FLOATS.index(self.dtype), ITEM_BYTES[self.dtype]
        self._plain = model.plain(name)

    def fill(self, start: int, stop: int, row: np.ndarray, digested: bool = True) -> None:
        """Read the numbers start … stop into the first bytes of `row` (uint8)."""
        part = row[:(stop - start) * self.item]
        if self._plain:
            self.model.raw_into(self.name, start, stop, part)
        else:
            self.model.read(self.name, start, stop, part.view(np.float32))
        if digested and self.digest is not None:
            self.digest.update(start * self.item, part)


class Blocks:
    """Iterating gives (first element, count) and fills `rows` [models, bytes] uint8 with the stored numbers of that block.

    `codes` [models] are the rows' dtypes. `digests`: one or None for each model. For one thread; `rows` are filled again.
    """

    def __init__(self, name: str, models: Sequence[Checkpoint], digests: Sequence[TensorDigest | None] = ()):
        self.name, self.models = name, models
        self.sources = [Row(name, *pair) for pair in zip(models, digests or [None] * len(models), strict=True)]
        self.numel = models[0].info[name].numel
        self.codes = np.array([source.code for source in self.sources], np.int64)
        self._block = compiled.block()
        size, item = min(self._block, max(self.numel, 1)), max(source.item for source in self.sources)
        self.rows = np.empty((len(models), -(-size * item // 8) * 8 + SPACE), np.uint8)
        spans = [model.span(name) for model in models]
        self._spans = None if None in spans else spans  # they keep the maps
        self._files = None if None in spans else np.array(
            [_place(span, source) for span, source in zip(spans, self.sources, strict=True)], np.int64)
        self._places = np.empty(len(models), np.int64)
        chunks = -(-min(STRETCH, self.numel) * item // CHUNK_BYTES)
        self._hashes = np.empty((len(models), chunks, 2), np.uint64)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.numel, self._block):
            yield start, self.fill(start)

    def fill(self, start: int) -> int:
        """Read the block that begins at `start` into `rows`; returns how many numbers it has."""
        stop, streams = min(start + self._block, self.numel), compiled.streaming()
        if streams is not None and self._files is not None \
                and streams.fill(self._files, self.codes, start, stop - start, self.rows, self._places, KEYS, self._hashes, 0):
            self._take(start, stop - start)
            return stop - start
        for source, row in zip(self.sources, self.rows, strict=True):
            source.fill(start, stop, row)
        return stop - start

    def stretch(self, loop: str, start: int, *arguments: object) -> int:
        """Let a loop of `compiled.streams` read and handle numbers from `start` on, to the next multiple of `STRETCH` at most;
        returns how many it did: 0 where there are no such loops, or the first block is one for `fill`.
        """
        streams = compiled.streaming()
        if streams is None or self._files is None:
            return 0
        n = min(STRETCH - start % STRETCH, self.numel - start)
        done = getattr(streams, loop)(self._files, self.codes, start, n, self.rows, self._places, KEYS, self._hashes, *arguments)
        if done < 0:
            raise self._lost()
        self._take(start, done)
        return done

    def _lost(self) -> CheckpointError:
        """The error of a page that a mapped file did not give."""
        for source, row in zip(self.sources, self.rows, strict=True):
            for start in range(0, self.numel, self._block):  # what is wrong is said where it is read
                source.fill(start, min(start + self._block, self.numel), row, digested=False)
        return CheckpointError(f"{self.name} could not be read for a moment", where=self.models[0].name, todo="Try again.")

    def _take(self, start: int, n: int) -> None:
        """Let the digests take in what was read from `start` on."""
        for source, hashes in zip(self.sources, self._hashes, strict=True):
            if n and source.digest is not None:
                source.digest.take(start * source.item, n * source.item, hashes)

    def numbers(self, n: int) -> np.ndarray:
        """The block as float32, [models, n]."""
        out = np.empty((len(self.rows), n), np.float32)
        for row, code, values in zip(self.rows, self.codes, out, strict=True):
            compiled.loops().decode(row, code, n, values)
        return out

    def all_finite(self, m: int, n: int) -> bool:
        """Whether the block of model number `m` holds neither NaN nor Inf."""
        return compiled.loops().all_finite(self.rows[m], self.codes[m], n)


def _place(span: Span, source: Row) -> tuple[int, int, bool, int, int]:
    """A row of `files` for `compiled.streams`."""
    here = span.map if span.map is not None and (span.map.address + span.start) % 8 == 0 else None
    mapped = (here.address + span.start, here.lost) if here is not None else (0, 0)
    return span.file, span.start, source.digest is not None, *mapped


class Stored:
    """Rounds float32 numbers to the dtype `code` in memory that is used again; `finite` says whether the last ones were."""

    def __init__(self, code: str, size: int):
        self.code, self.finite = code, True
        self._item, self._type, self._index = ITEM_BYTES[code], stored_type(code), FLOATS.index(code)
        self._out = np.empty(size * self._item, np.uint8)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """The stored numbers of `values` [n] float32."""
        out = self._room(len(values))
        self.finite = compiled.loops().encode(np.ascontiguousarray(values), self._index, out)
        return out.view(self._type)

    def weigh(self, blocks: Blocks, n: int, weights: np.ndarray) -> np.ndarray:
        """Σⱼ wⱼ·modelⱼ of the `n` numbers in `blocks`, as `methods.weighted` gives it, never as float32 in memory.

        What is not finite in a model that has any weight makes the result not finite; others are looked at here.
        """
        out = self._room(n)
        self.finite = compiled.loops().weigh(blocks.rows, blocks.codes, n, weights, self._index, out)
        for m in np.flatnonzero(weights == 0):
            self.finite = blocks.all_finite(m, n) and self.finite
        return out.view(self._type)

    def weigh_stretch(self, blocks: Blocks, start: int, weights: np.ndarray) -> np.ndarray:
        """As `weigh`, of as many numbers from `start` on as compiled loops can read and weigh at once, perhaps none."""
        out = self._room(min(STRETCH, blocks.numel - start)) if compiled.streaming() else self._out
        done = blocks.stretch("weigh", start, weights, self._index, out)
        return out[:done * self._item].view(self._type)

    def _room(self, n: int) -> np.ndarray:
        if len(self._out) < n * self._item:
            self._out = np.empty(n * self._item, np.uint8)
        return self._out[:n * self._item]


def expect(name: str, models: Sequence[Checkpoint]) -> None:
    """Ask the system to begin reading this tensor of `models`, which will be read soon: a disk should never wait for work."""
    for span in [model.span(name) for model in models]:
        if span is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(span.file, span.start, span.nbytes, os.POSIX_FADV_WILLNEED)


def new_digests(name: str, models: Sequence[Checkpoint]) -> list[TensorDigest]:
    """An empty digest of this tensor for every model, to give to `Blocks`."""
    return [TensorDigest(read_dtype(model, name), model.info[name].shape) for model in models]
