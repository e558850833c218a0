"""One tensor of open checkpoints as the Stack that a merge method reads, and the digests of what is read by the way.

Blocks are read into the same buffers again, so a method's memory is a few blocks. What goes wrong while reading (Stop, a
number that is not finite, a file that became shorter) ends the method's pass. Price: a pass per statistic; the second finds
the files in the page cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from fusion import compiled
from fusion.blocks import Blocks, Row
from fusion.checkpoint import Checkpoint
from fusion.digest import TensorDigest, read_dtype
from fusion.errors import Stopped
from fusion.methods.stack import BLOCK, Block
from fusion.slices import origin_of
from fusion.variation import nonfinite


class InputDigests:
    """Digests of the tensors of `sources` (name → checkpoint) that were read from start to end, collected while merging."""

    def __init__(self, sources: Mapping[str, Checkpoint]):
        self._labels = {id(model): label for label, model in sources.items()}
        self.values: dict[str, dict[str, str]] = {label: {} for label in sources}

    def begin(self, model: Checkpoint, name: str) -> tuple[str, str, TensorDigest] | None:
        """The digest to begin for a tensor of a model of the merge; None when the bytes are not those of a source's tensor."""
        model, name = origin_of(model, name)
        label = self._labels.get(id(model))
        if label is None:
            return None
        return label, name, TensorDigest(read_dtype(model, name), model.info[name].shape)

    @contextmanager
    def tapping(self, models: Sequence[Checkpoint], name: str) -> Iterator[list[TensorDigest | None]]:
        """The digests that must see every byte of this tensor of `models`; taken in unless something goes wrong meanwhile."""
        begun = [self.begin(model, name) for model in models]
        yield [entry and entry[2] for entry in begun]
        self.end(begun)

    def end(self, begun: Sequence[tuple[str, str, TensorDigest] | None]) -> None:
        """Take in the digests of tensors that were read whole."""
        for entry in begun:
            if entry is not None:
                label, name, digest = entry
                self.values[label][name] = digest.value()


@dataclass
class Stretch:
    """A Part of open checkpoints, read when a loop is called with it; `n` numbers of it were handled.

    `checked`: CheckpointError for a number that is NaN or Inf.
    """

    start: int
    blocks: Blocks
    checked: bool
    n: int = 0

    def run(self, loop: str, *arguments: object) -> int:
        """See `methods.stack.Part`."""
        self.n = self.blocks.stretch(loop, self.start, self.checked, *arguments)
        if not self.n:
            self.n = self.blocks.fill(self.start)
            if self.checked and not all(self.blocks.all_finite(m, self.n) for m in range(len(self.blocks.models))):
                raise nonfinite(self.blocks.name, self.blocks.models)
            getattr(compiled.loops(), loop)(self.blocks.rows, self.blocks.codes, self.n, *arguments)
        return self.n


class CheckpointStack:
    """A Stack over the tensor `name` of open checkpoints; `reads_pivot` False leaves the pivot's part of a block empty.

    CheckpointError for a number that is NaN or Inf unless `allow_nonfinite`; Stopped when `stop` is set.
    """

    def __init__(self, name: str, pivot: Checkpoint, reads_pivot: bool, targets: Sequence[Checkpoint], keys: tuple[int, ...],
                 stop: threading.Event, digests: InputDigests | None = None, allow_nonfinite: bool = False):
        self.shape, self.count, self.keys = pivot.info[name].shape, len(targets), keys
        self._name, self._models, self._reads_pivot = name, (pivot, *targets), reads_pivot
        self._stop, self._digests, self._unchecked = stop, digests, not allow_nonfinite

    def blocks(self, multiple: int = 1) -> Iterator[Block]:
        """See Stack; the first pass that ends has seen that all numbers are finite, and gives the digests."""
        numel = math.prod(self.shape)
        size = min(max(multiple, BLOCK // multiple * multiple), max(numel, 1))
        base = np.empty(size if self._reads_pivot else 0, np.float32)
        models = np.empty((self.count, size), np.float32)
        read = self._models[not self._reads_pivot:]
        digests, self._digests = self._digests, None
        with digests.tapping(read, self._name) if digests else nullcontext([None] * len(read)) as taps:
            rows = [Row(self._name, *pair) for pair in zip(read, taps, strict=True)]
            stored = np.empty(size * max(row.item for row in rows), np.uint8)
            for start in range(0, numel, size):
                if self._stop.is_set():
                    raise Stopped("stopped")
                n = min(size, numel - start)
                for row, out in zip(rows, [*([base] if self._reads_pivot else []), *models], strict=True):
                    self._read(row, start, stored, out[:n])
                yield Block(start, base[:n], models[:, :n])
        self._unchecked = False

    def stored(self) -> Iterator[Stretch]:
        """See `methods.stack.stored`; the pivot is always read."""
        digests, self._digests = self._digests, None
        with digests.tapping(self._models, self._name) if digests else nullcontext(()) as taps:
            blocks, start = Blocks(self._name, self._models, taps), 0
            while start < blocks.numel:
                if self._stop.is_set():
                    raise Stopped("stopped")
                part = Stretch(start, blocks, self._unchecked)
                yield part
                start += part.n
        self._unchecked = False

    def _read(self, row: Row, start: int, stored: np.ndarray, out: np.ndarray) -> None:
        row.fill(start, start + len(out), stored)
        finite = compiled.loops().decode(stored, row.code, len(out), out)
        if self._unchecked and not finite:
            raise nonfinite(self._name, self._models[not self._reads_pivot:])
