"""A merge in memory seen as a checkpoint, so that it can be reviewed as a saved one is.

Price: none of its own; numbers are decoded from the bytes that the merge keeps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusion import dtypes
from fusion.live import LiveResult
from fusion.view import View


class LiveView(View):
    """The result of a merge in memory under a `name`; `folder` holds its small files."""

    def __init__(self, result: LiveResult, folder: Path, name: str):
        super().__init__(result.plan.pivot)
        self.folder, self.name, self.config = folder, name, result.plan.config
        self._tensors = result.tensors
        self.info = {tensor: replace(self.model.info[tensor], dtype=code, nbytes=result.tensors[tensor].nbytes)
                     for tensor, code, _ in result.plan.outputs()}

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        code = self.info[name].dtype
        size, stored = dtypes.ITEM_BYTES[code], self._tensors[name].view(np.uint8)
        return dtypes.decode(stored[start * size:stop * size], code, out[:stop - start])

    def file(self, name: str) -> Path:
        """See Checkpoint."""
        return self.folder / name


@contextmanager
def live_view(result: LiveResult, name: str) -> Iterator[LiveView]:
    """Lend a merge in memory as a checkpoint; its tokenizer lies in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="fusechat-") as scratch:
        result.plan.write_small_files(Path(scratch))
        yield LiveView(result, Path(scratch), name)
