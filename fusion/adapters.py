"""A LoRA adapter merged into its base while reading: W + scale · B·A in float32, tensor by tensor, and never a copy on disk.

    Adapted(Checkpoint("base"), Path("adapter"))

An adapter folder (as peft saves it) holds two thin matrices per changed matrix. Price: 2 · rank operations a number; the sum
over the rank runs in its order, so that blocks, threads and machines do not change a bit. Sources: LoRA, arXiv 2106.09685,
eq. 3; rank-stabilised scale, 2312.03732; DoRA, 2402.09353, eq. 5.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from fusion import compiled, dtypes
from fusion.adapter_settings import CONFIG, MERGE_IT, SAVE_AGAIN, read_settings, scale_of, wants_text, weights_file
from fusion.anatomy import place
from fusion.checkpoint import Checkpoint, file_marks, resized, sampled
from fusion.errors import CheckpointError, MismatchError, nearest
from fusion.files import Files, Span
from fusion.header import TensorInfo, read_header
from fusion.view import View

_CHUNK = 16_384  # elements whose sum over the rank stays in the cache
_PART = re.compile(r"^(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?$")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")


@dataclass(frozen=True)
class Thin:
    """What an adapter does to one matrix: `down` [r, in], `up` [out, r], DoRA's `magnitude` [out] or None, `scale`;
    `across` says that the base stores the matrix as [in, out]."""

    down: TensorInfo
    up: TensorInfo
    magnitude: TensorInfo | None
    scale: float
    across: bool


@dataclass(frozen=True)
class _Parts:
    """The tensors of an adapter, sorted: thin ones by module, whole ones by the base's tensor name."""

    thin: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)


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
        self._alias: dict[str, str] = {}  # a head that a tied base has only as its embedding
        parts = self._sorted()
        self._whole = parts.whole
        self._thin = {target: self._understand(target, its) for target, its in parts.thin.items()}
        self.info = {**base.info, **{name: replace(base.info[own], name=name) for name, own in self._alias.items()},
                     **{name: self._replaced(name, tensor) for name, tensor in parts.whole.items()}}
        self.config = _config(base, self.info)
        self._factors = lru_cache(maxsize=4)(self._read_factors)
        self._norms = lru_cache(maxsize=4)(self._read_norms)

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint; float32: base + scale · B·A, each sum in the order of the rank."""
        block = self._before(name, start, stop, out)
        if name not in self._thin:
            return block
        self._add(name, start, block)
        if self._thin[name].magnitude is not None:
            columns = self.info[name].shape[-1]
            rows = np.arange(start // columns, -(-stop // columns))
            block *= np.repeat(self._norms(name)[rows], columns)[start % columns:][:len(block)]
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
        """See Checkpoint; an adapter that replaces the embedding brings its own tokenizer."""
        own = self.adapter / name
        return own if own.is_file() and any(place(tensor).kind == "embedding" for tensor in self._whole) else self.model.file(name)

    def close(self) -> None:
        """See Checkpoint."""
        self._open.close()
        self.model.close()

    @cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        """See Checkpoint."""
        return Checkpoint.vocabulary.func(self)

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """See Checkpoint."""
        return self._tokens[1]

    @cached_property
    def tied_copies(self) -> frozenset[str]:
        """See Checkpoint; a head that the adapter changes is no copy any more, one that it leaves follows the embedding."""
        return self.model.tied_copies - self._whole.keys() - self._thin.keys()

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

    def _sorted(self) -> _Parts:
        parts = _Parts()
        for name, tensor in self._tensors.items():
            if tensor.dtype not in dtypes.FLOATS:
                raise CheckpointError(f"{name} is {tensor.dtype}, which is not a weight dtype", where=str(self.adapter),
                                      todo=MERGE_IT)
            found = _PART.fullmatch(name)
            if found:
                parts.thin.setdefault(self._target(found[1], ".weight", name), {})[found[2]] = tensor
            else:
                parts.whole[self._target(_WRAPPED.sub("", name), "", name)] = tensor
        return parts

    def _target(self, module: str, tail: str, tensor: str) -> str:
        """The base's tensor that an adapter's tensor belongs to; bases may be saved with or without their outer names."""
        wanted = module.removeprefix("base_model.model.") + tail
        if wanted in self.model.info:
            return wanted
        close = [name for name in self.model.info if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")]
        if len(close) == 1:
            return close[0]
        if place(wanted).kind == "head" and self.model.tied:
            tables = [name for name in self.model.info if place(name).kind == "embedding"]
            self._alias[wanted] = tables[0]
            return wanted
        raise MismatchError(f"{tensor} belongs to no tensor of {self.model.name}", where=str(self.adapter),
                            todo=f"{nearest(wanted, self.model.info)} {wants_text(self.adapter)}")

    def _understand(self, target: str, its: dict[str, TensorInfo]) -> Thin:
        inside = "lora_embedding_A" in its or "lora_embedding_B" in its
        down, up = its.get("lora_embedding_A" if inside else "lora_A"), its.get("lora_embedding_B" if inside else "lora_B")
        shape, where = (self._whole.get(target) or self.model.info[self._alias.get(target, target)]).shape, str(self.adapter)
        if down is None or up is None:
            raise CheckpointError(f"one of the two matrices for {target} is missing", where=where, todo=SAVE_AGAIN)
        if len(shape) != 2 or len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            raise CheckpointError(f"the adapter of {target} has shapes {list(down.shape)} and {list(up.shape)} for a weight of "
                                  f"shape {list(shape)}; only matrices are known here", where=where, todo=MERGE_IT)
        full = (up.shape[0], down.shape[1])
        turned = full == shape[::-1]
        across = inside or (turned and (full != shape or bool(self.settings.get("fan_in_fan_out"))))
        if shape != (full[::-1] if across else full):
            raise MismatchError(f"{target} has shape {list(shape)} in {self.model.name}, the adapter is for {list(full)}",
                                where=where, todo=wants_text(self.adapter))
        magnitude = self._magnitude(target, its.get("lora_magnitude_vector"), across, shape[0])
        return Thin(down, up, magnitude, scale_of(self.settings, target.removesuffix(".weight"), down.shape[0], where), across)

    def _magnitude(self, target: str, tensor: TensorInfo | None, across: bool, rows: int) -> TensorInfo | None:
        if tensor is not None and (across or tensor.numel != rows):
            raise CheckpointError(f"DoRA on {target} is not known here", where=str(self.adapter), todo=MERGE_IT)
        if bool(self.settings.get("use_dora")) != (tensor is not None):
            raise CheckpointError(f"use_dora does not agree with the tensors of {target}", where=str(self.adapter), todo=SAVE_AGAIN)
        return tensor

    def _replaced(self, name: str, tensor: TensorInfo) -> TensorInfo:
        """A tensor that the adapter brings whole; it is stored again as the base's is."""
        base = self.model.info[self._alias.get(name, name)]
        if tensor.shape != base.shape and (place(name).kind not in ("embedding", "head") or tensor.shape[1:] != base.shape[1:]):
            raise MismatchError(f"{name} has shape {list(base.shape)} in {self.model.name}, {list(tensor.shape)} in the adapter",
                                where=str(self.adapter), todo=wants_text(self.adapter))
        return replace(tensor, name=name, dtype=base.dtype)


def _config(base: Checkpoint, info: Mapping[str, TensorInfo]) -> dict:
    """The base's config with the vocabulary size of an embedding that the adapter has resized."""
    rows = {info[name].shape[0] for name in info if place(name).kind == "embedding" and name in base.info
            and info[name].shape != base.info[name].shape}
    return resized(base.config, rows.pop()) if len(rows) == 1 else base.config


