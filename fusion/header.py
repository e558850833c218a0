"""The safetensors header: read it, and believe nothing in it that the file does not bear out.

A file is 8 bytes of header length, the header (JSON: name → dtype, shape, offsets), then the data without gaps.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from fusion.dtypes import ITEM_BYTES
from fusion.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 32
_BROKEN = "Download or save this file again."


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: `start` is its first byte in `file`, `nbytes` its length."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> list[TensorInfo]:
    """List the tensors of one safetensors file in file order; CheckpointError when the header lies or the file is cut."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"the file is cut short or is no safetensors file ({size} bytes, header of {length})",
                                      where=path.name, todo=_BROKEN)
            if not length:
                raise CheckpointError("the file was never finished: its header is empty", where=path.name, todo=_BROKEN)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=str(path)) from error
    return check_entries(_parse(text, path), path, 8 + length, size)


def check_entries(entries: dict, path: Path, data_start: int, size: int) -> list[TensorInfo]:
    """The tensors of a parsed header in file order; CheckpointError unless they fill the file from `data_start` to `size`."""
    tensors = [_tensor(name, entry, path, data_start) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_layout(tensors, path, data_start, size)
    return tensors


def _parse(text: bytes, path: Path) -> dict:
    def unique(pairs):
        names = dict(pairs)
        "".join(names).encode()  # half a surrogate pair is no text
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(entries, dict):
            raise ValueError("not a table of tensors")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not valid ({error})", where=path.name, todo=_BROKEN) from error
    return entries


def _tensor(name: str, entry: object, path: Path, data_start: int) -> TensorInfo:
    def whole(numbers: object) -> bool:
        return isinstance(numbers, list) and len(numbers) <= MAX_RANK and all(type(n) is int and 0 <= n < 2**63 for n in numbers)

    where = f"{path.name}: {name}"
    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        raise CheckpointError("the header does not say shape and offsets", where=where, todo=_BROKEN)
    dtype, offsets = entry.get("dtype"), entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"unknown dtype {dtype!r}", where=where, todo="Save the checkpoint as float32, float16 or bfloat16.")
    shape = tuple(entry["shape"])
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"shape {list(shape)} of {dtype} needs {nbytes} bytes, the offsets give {offsets}",
                              where=where, todo=_BROKEN)
    return TensorInfo(name, dtype, shape, path, data_start + offsets[0], nbytes)


def _check_layout(tensors: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(f"its data begins at byte {tensor.start}, not at {end}: tensors overlap or leave a gap",
                                  where=f"{path.name}: {tensor.name}", todo=_BROKEN)
        end += tensor.nbytes
    if end != size:
        state = "cut short" if size < end else "longer than its header says"
        raise CheckpointError(f"the file is {state} ({size} bytes, {end} expected)", where=path.name, todo=_BROKEN)
