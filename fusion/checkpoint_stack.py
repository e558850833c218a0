"""One tensor of open checkpoints as the Stack that a merge method reads, and the digests of what is read by the way.

Blocks are read into the same buffers again, so a method's memory is a few blocks. What goes wrong while reading (Stop, a
number that is not finite, a file that became shorter) ends the method's pass. Price: a pass per statistic; the second finds
the files in the page cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fusion import dtypes
from fusion.checkpoint import Checkpoint
from fusion.digest import TensorDigest, read_dtype
from fusion.errors import Stopped
from fusion.methods.stack import BLOCK, Block
from fusion.slices import Restacked
from fusion.variation import nonfinite


class InputDigests:
    """Digests of the tensors of `sources` (name → checkpoint) that were read from start to end, collected while merging."""

    def __init__(self, sources: Mapping[str, Checkpoint]):
        self._labels = {id(model): label for label, model in sources.items()}
        self.values: dict[str, dict[str, str]] = {label: {} for label in sources}

    def begin(self, model: Checkpoint, name: str) -> tuple[str, str, TensorDigest] | None:
        """The digest to begin for a tensor of a model of the merge; None when the bytes are not those of a source's tensor."""
        model, name = model.owned[name] if isinstance(model, Restacked) else (model, name)
        label = self._labels.get(id(model))
        if label is None:
            return None
        return label, name, TensorDigest(read_dtype(model, name), model.info[name].shape)

    def end(self, begun: Sequence[tuple[str, str, TensorDigest] | None]) -> None:
        """Take in the digests of tensors that were read whole."""
        for entry in begun:
            if entry is not None:
                label, name, digest = entry
                self.values[label][name] = digest.value()


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
        models, check = np.empty((self.count, size), np.float32), self._unchecked
        digests, self._digests = self._digests, None
        read = self._models[not self._reads_pivot:]
        taps = [digests.begin(model, self._name) if digests else None for model in read]
        for start in range(0, numel, size):
            if self._stop.is_set():
                raise Stopped("stopped")
            n = min(size, numel - start)
            outs = [*([base[:n]] if self._reads_pivot else []), *models[:, :n]]
            for model, tap, out in zip(read, taps, outs, strict=True):
                _read(model, self._name, start, out, tap[2] if tap else None)
            if check and not all(map(_finite, outs)):
                raise nonfinite(self._name, read)
            yield Block(start, base[:n], models[:, :n])
        self._unchecked = False
        if digests:
            digests.end(taps)


def _read(model: Checkpoint, name: str, start: int, out: np.ndarray, digest: TensorDigest | None) -> None:
    """Read into `out` [n] float32 from element `start` on; `digest` takes in the stored bytes, or else the numbers."""
    stop = start + len(out)
    if not model.plain(name):
        model.read(name, start, stop, out)
        if digest is not None:
            digest.update(4 * start, out)
        return
    code, raw = model.info[name].dtype, model.raw(name, start, stop)
    if digest is not None:
        digest.update(dtypes.ITEM_BYTES[code] * start, raw)
    dtypes.decode(raw, code, out)


def _finite(values: np.ndarray) -> bool:
    """Whether all are finite; their sum says so in one fast pass, unless it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())
