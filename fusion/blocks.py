"""One tensor of several models, block by block: stored bytes in one buffer that stays in the cache, where loops find them.

    blocks = Blocks(name, models)
    for start, n in blocks:                                       # blocks.rows now hold these n numbers of every model
        compiled.loops().sum_changes(blocks.rows, blocks.codes, n, sums)

Price: one read of every byte; digests of what was read are almost free on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fusion import compiled
from fusion.checkpoint import Checkpoint
from fusion.digest import TensorDigest, read_dtype
from fusion.dtypes import FLOATS, ITEM_BYTES

BLOCK = 65_536  # numbers: one block of every model stays in the second-level cache, and sums are rounded per block


class Blocks:
    """Iterating gives (first element, count) and fills `rows` [models, bytes] uint8 with the stored numbers of that block.

    `codes` [models]: the place in `dtypes.FLOATS` of each row's dtype; a tensor that is computed while it is read is float32.
    `digests`, one per model or none, see every byte. Use it in one thread; the same `rows` are filled again and again.
    """

    def __init__(self, name: str, models: Sequence[Checkpoint], digests: Sequence[TensorDigest] = ()):
        self.name, self.models, self.digests = name, models, digests
        self.numel = models[0].info[name].numel
        self.dtypes = [read_dtype(model, name) for model in models]
        self.codes = np.array([FLOATS.index(dtype) for dtype in self.dtypes], np.int64)
        self._plain = [model.plain(name) for model in models]
        size = min(BLOCK, max(self.numel, 1))
        self.rows = np.empty((len(models), size * max(ITEM_BYTES[dtype] for dtype in self.dtypes)), np.uint8)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.numel, BLOCK):
            stop = min(start + BLOCK, self.numel)
            for m in range(len(self.models)):
                self._fill(m, start, stop)
            yield start, stop - start

    def numbers(self, n: int, out: np.ndarray | None = None) -> np.ndarray:
        """The block as float32, [models, n]."""
        out = np.empty((len(self.rows), n), np.float32) if out is None else out
        for row, code, values in zip(self.rows, self.codes, out, strict=True):
            compiled.loops().decode(row, code, n, values)
        return out

    def _fill(self, m: int, start: int, stop: int) -> None:
        model, row = self.models[m], self.rows[m]
        if self._plain[m]:
            data = model.raw_into(self.name, start, stop, row)
        else:
            data = model.read(self.name, start, stop, row[:4 * (stop - start)].view(np.float32)).view(np.uint8)
        if self.digests:
            self.digests[m].update(start * ITEM_BYTES[self.dtypes[m]], data)


def new_digests(name: str, models: Sequence[Checkpoint]) -> list[TensorDigest]:
    """An empty digest of this tensor for every model, to give to `Blocks`."""
    return [TensorDigest(read_dtype(model, name), model.info[name].shape) for model in models]
