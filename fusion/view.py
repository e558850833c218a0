"""A checkpoint seen through another: all answers are those of the model behind it, except those a subclass changes.

The base of adapters merged while reading and of remapped vocabularies. Price: one call more per block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fusion.checkpoint import Checkpoint
from fusion.files import Span


class View(Checkpoint):
    """`model` under the same name; a subclass replaces `info`, `config` or `name` and what reads them."""

    def __init__(self, model: Checkpoint):
        self.model = model
        self.folder, self.name, self.revision = model.folder, model.name, model.revision
        self.config, self.info = model.config, model.info

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        return self.model.read(name, start, stop, out)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Checkpoint."""
        return self.model.raw(name, start, stop)

    def raw_into(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        return self.model.raw_into(name, start, stop, out)

    def plain(self, name: str) -> bool:
        """See Checkpoint."""
        return self.model.plain(name)

    def span(self, name: str) -> Span | None:
        """See Checkpoint; a view whose tensors are those of files says so itself."""
        return None

    def file(self, name: str) -> Path:
        """See Checkpoint."""
        return self.model.file(name)

    def small_names(self) -> list[str]:
        """See Checkpoint."""
        return self.model.small_names()

    def close(self) -> None:
        """See Checkpoint."""
        self.model.close()

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """See Checkpoint."""
        return self.model.vocabulary

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """See Checkpoint."""
        return self.model.added_tokens

    @property
    def tied_copies(self) -> frozenset[str]:
        """See Checkpoint."""
        return self.model.tied_copies

    @property
    def fingerprint(self) -> str:
        """See Checkpoint."""
        return self.model.fingerprint

    @property
    def stamps(self) -> dict[Path, tuple[int, int, int]]:
        """See Checkpoint."""
        return self.model.stamps

    @property
    def origin(self) -> str:
        """See Checkpoint."""
        return self.model.origin
