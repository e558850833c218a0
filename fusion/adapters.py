"""A LoRA adapter merged into its base while reading: W + scale · B·A in float32, tensor by tensor, and never a copy on disk.

    Adapted(Checkpoint("base"), Path("adapter"))

An adapter folder (as peft saves it) holds two thin matrices per changed matrix. Price: 2 · rank operations a number; the sum
over the rank runs in its order, so that blocks, threads and machines do not change a bit. Sources: LoRA, arXiv 2106.09685,
eq. 3; rank-stabilised scale, 2312.03732; DoRA, 2402.09353, eq. 5.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from fusion import compiled, dtypes
from fusion.adapter_files import AdapterFiles
from fusion.adapter_parts import embedding_of, sort_parts
from fusion.adapter_settings import CONFIG, read_settings, weights_file
from fusion.checkpoint import Checkpoint, file_marks, resized, sampled, untied
from fusion.files import Files, Span
from fusion.header import TensorInfo, read_header
from fusion.view import View

_CHUNK = 16_384  # elements whose sum over the rank stays in the cache


class Adapted(View):
    """The base with an adapter in it; `name` defaults to "base+adapter".

    CheckpointError for an adapter that cannot be read or is of another kind than LoRA, MismatchError when its tensors do
    not belong to this base.
    """

    def __init__(self, base: Checkpoint, folder: Path, name: str | None = None, revision: str = ""):
        super().__init__(base)
        self.revision = "+".join(filter(None, (base.revision, revision)))
        self.adapter = folder
        self.settings = read_settings(folder)
        self.name = name or f"{base.name}+{folder.resolve().name}"
        self._tensors = {tensor.name: tensor for tensor in read_header(weights_file(folder))}
        self._open = Files()
        parts = sort_parts(base, folder, self.settings, self._tensors)
        self._alias, self._whole, self._thin = parts.alias, parts.whole, parts.thin
        self.info = {**base.info, **{name: replace(base.info[own], name=name) for name, own in self._alias.items()},
                     **{name: self._replaced(name, tensor) for name, tensor in parts.whole.items()}}
        self._small = AdapterFiles(base, folder, self.info, bool({embedding_of(base)} & self._whole.keys()))
        self.config = self._config()
        self._factors = lru_cache(maxsize=4)(self._read_factors)
        self._norms: dict[str, np.ndarray] = {}  # a number a row: small enough to keep, dear enough to take once
        self._norming = threading.Lock()

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint; float32: base + scale · B·A, each sum in the order of the rank."""
        block = self._before(name, start, stop, out)
        if name not in self._thin:
            return block
        self._add(name, start, block)
        if self._thin[name].magnitude is not None:
            columns = self.info[name].shape[-1]
            rows = np.arange(start // columns, -(-stop // columns))
            block *= np.repeat(self._norm(name)[rows], columns)[start % columns:][:len(block)]
        return block

    def _before(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """The numbers that the thin matrices are added to: the adapter's own where it brings them, else the base's."""
        if name not in self._whole:
            return self.model.read(self._alias.get(name, name), start, stop, out)
        own = self._whole[name]
        return dtypes.decode(self._open.tensor(own, start, stop), own.dtype, out[:stop - start])

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Checkpoint."""
        if name in self._whole:
            return self._open.tensor(self._whole[name], start, stop)
        return self.model.raw(self._alias.get(name, name), start, stop)

    def raw_into(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        if name in self._whole:
            return self._open.tensor_into(self._whole[name], start, stop, out)
        return self.model.raw_into(self._alias.get(name, name), start, stop, out)

    def plain(self, name: str) -> bool:
        """See Checkpoint."""
        if name in self._thin:
            return False
        own = self._whole.get(name)
        return own.dtype == self.info[name].dtype if own else self.model.plain(self._alias.get(name, name))

    def span(self, name: str) -> Span | None:
        """See Checkpoint."""
        if not self.plain(name):
            return None
        return self._open.span(self._whole[name]) if name in self._whole else self.model.span(self._alias.get(name, name))

    def file(self, name: str) -> Path:
        """See Checkpoint; tokens and chat template are the adapter's where it brings its own."""
        return self._small.file(name)

    def small_names(self) -> list[str]:
        """See Checkpoint."""
        return self._small.names()

    def close(self) -> None:
        """See Checkpoint."""
        self._open.close()
        self.model.close()

    @cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        """See Checkpoint."""
        return self._tokens[0]

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """See Checkpoint."""
        return self._tokens[1]

    @cached_property
    def tied_copies(self) -> frozenset[str]:
        """See Checkpoint; a head that the adapter changes or leaves behind is no copy any more, else it follows the embedding."""
        return self.model.tied_copies - self._whole.keys() - self._thin.keys() - self._alias.keys()

    @property
    def origin(self) -> str:
        """See Checkpoint."""
        return f"{self.model.origin}+{self.adapter.resolve()}"

    @cached_property
    def fingerprint(self) -> str:
        """See Checkpoint."""
        return hashlib.sha256((self.model.fingerprint + sampled(self.settings, self._tensors, self._open)).encode()).hexdigest()

    @property
    def stamps(self) -> dict[Path, tuple[int, int, int]]:
        """See Checkpoint."""
        return {**self.model.stamps, **file_marks([*{tensor.file for tensor in self._tensors.values()}, self.adapter / CONFIG])}

    def _add(self, name: str, start: int, block: np.ndarray) -> None:
        """Add scale · left·right to the flat elements of `block` from `start` on, in place."""
        left, right = self._factors(name)
        columns, stop = right.shape[1], start + len(block)
        step = max(1, _CHUNK // columns)
        for first in range(start // columns, -(-stop // columns), step):
            rows = left[first:min(first + step, -(-stop // columns))]
            delta = np.empty((len(rows), columns), np.float32)
            compiled.loops().multiply(rows, right, delta)
            delta *= np.float32(self._thin[name].scale)
            begin, end = max(start, first * columns), min(stop, (first + len(rows)) * columns)
            block[begin - start:end - start] += delta.reshape(-1)[begin - first * columns:end - first * columns]

    def _read_factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """left [rows, r] and right [r, columns], whose product has the stored shape."""
        thin = self._thin[name]
        down, up = self._numbers(thin.down), self._numbers(thin.up)
        return (np.ascontiguousarray(down.T), np.ascontiguousarray(up.T)) if thin.across else (up, down)

    def _norm(self, name: str) -> np.ndarray:
        if name not in self._norms:
            with self._norming:
                if name not in self._norms:  # nobody else took them meanwhile
                    self._norms[name] = self._read_norms(name)
        return self._norms[name]

    def _read_norms(self, name: str) -> np.ndarray:
        """DoRA: magnitude ÷ norm of every row of W + scale · B·A, [out] float32."""
        rows, columns = self.info[name].shape
        norms, step = np.empty(rows), max(1, 65_536 // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            block = self._before(name, first * columns, (first + count) * columns, np.empty(count * columns, np.float32))
            self._add(name, first * columns, block)
            norms[first:first + count] = np.sqrt(np.square(block.reshape(count, columns), dtype=np.float64).sum(axis=1))
        magnitude = self._numbers(self._thin[name].magnitude).reshape(-1)
        return np.divide(magnitude, norms, out=np.zeros(rows), where=norms > 0).astype(np.float32)

    def _numbers(self, tensor: TensorInfo) -> np.ndarray:
        return dtypes.decode(self._open.tensor(tensor), tensor.dtype, np.empty(tensor.numel, np.float32)).reshape(tensor.shape)

    def _replaced(self, name: str, tensor: TensorInfo) -> TensorInfo:
        """A tensor that the adapter brings whole; it is stored again as the base's is."""
        return replace(tensor, name=name, dtype=self.model.info[self._alias.get(name, name)].dtype)

    def _config(self) -> dict:
        """The base's config with the rows of an embedding that the adapter has resized, untied where it parts the head from it."""
        table = embedding_of(self.model)
        config, base = self.model.config, self.model.info.get(table)
        if base is not None and self.info[table].shape != base.shape:
            config = resized(config, self.info[table].shape[0])
        return untied(config) if self.model.tied and not self.tied else config
