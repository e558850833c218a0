"""The safetensors files of a folder: found by their index or alone, read in pieces by any number of threads.

Reading goes through `pread` into small buffers, or from a map of the file where one is guarded: a file that shrinks under another
kills the process (see `maps`).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fusion.dtypes import ITEM_BYTES
from fusion.errors import CheckpointError
from fusion.header import TensorInfo, read_header
from fusion.maps import Map, mapped

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 200_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_json(path: Path) -> dict:
    """A JSON object from a file, {} when there is none; CheckpointError when it is something else."""
    if not os.path.isfile(path):
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES // 1_000_000} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({error})", where=str(path.parent)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", where=str(path.parent))
    return value


def list_tensors(folder: Path, read: Callable[[Path], list[TensorInfo]] = read_header,
                 names: Collection[str] | None = None) -> dict[str, TensorInfo]:
    """Name → header entry of every tensor stored in a folder; CheckpointError when shards are missing, broken or doubtful.

    `read` reads the header of one file; `names` are the files there are (default: those in the folder).
    """
    if names is None:  # a pipe or a device is no file: opening it may never end
        names = {name for name in file_names(folder, "") if os.path.isfile(folder / name)}
    promised = {} if WHOLE in names else read_index(folder / INDEX)  # beside a whole file, transformers reads no index
    files = sorted(set(promised.values())) if promised else _single_file(folder, names)
    info: dict[str, TensorInfo] = {}
    for file in files:
        if file not in names:
            raise CheckpointError(f"the index names {file}, which is missing", where=str(folder),
                                  todo="Download the missing shard, or the index that belongs to the shards that are there.")
        for tensor in read(folder / file):
            if tensor.name in info:
                raise CheckpointError(f"{tensor.name} is stored in two shards", where=str(folder))
            info[tensor.name] = tensor
    lost = next((name for name, file in promised.items() if name not in info or info[name].file.name != file), None)
    if lost is not None:
        raise CheckpointError(f"the index places {lost} in {promised[lost]}, but it is not there", where=str(folder),
                              todo="The index belongs to other shards; download both again.")
    if not info:
        raise CheckpointError("there is no tensor in it", where=str(folder))
    return info


def read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name as an index says, {} when there is none; no file name leads out of the folder."""
    index = read_json(path)
    weight_map = index.get("weight_map") if index else {}
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path.name} has no valid weight_map", where=str(path.parent))
    odd = next((file for file in weight_map.values() if Path(file).name != file or file.startswith(".")), None)
    if odd is not None:
        raise CheckpointError(f"the index names {odd!r}, which is not a plain file name", where=str(path.parent))
    return weight_map


def file_names(folder: Path, *ends: str) -> list[str]:
    """The names in a folder that have one of these ends, sorted; CheckpointError when it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(ends))
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=str(folder)) from error


def _single_file(folder: Path, names: Collection[str]) -> list[str]:
    if WHOLE in names:
        return [WHOLE]
    found = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("adapter"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{len(found)} safetensors files without {INDEX}", where=str(folder),
                              todo="Add the index that belongs to the shards.")
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(f"only pickle weights ({pickles[0]}), which can run code when loaded", where=str(folder),
                              todo="Open it by its path with `open_checkpoint`, which converts pickles safely.")
    raise CheckpointError("there are no safetensors weights", where=str(folder))


class Span(NamedTuple):
    """Where a tensor's stored numbers lie: an open file, the first byte and how many, and the file's map where there is one."""

    file: int
    start: int
    nbytes: int
    map: Map | None


class Files:
    """Open files by path, shared by reading threads: `pread` carries its own offset."""

    def __init__(self):
        self._open: dict[Path, int] = {}
        self._maps: dict[Path, Map | None] = {}
        self._lock = threading.Lock()

    def tensor(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> bytes:
        """The stored bytes of the flat elements start … stop of a tensor; CheckpointError when the file is shorter."""
        item = ITEM_BYTES[tensor.dtype]
        stop = tensor.numel if stop is None else stop
        data = self.read(tensor.file, tensor.start + start * item, (stop - start) * item)
        if len(data) != (stop - start) * item:
            raise CheckpointError("the file became shorter while it was read", where=str(tensor.file),
                                  todo="Do not change a checkpoint while it is merged.")
        return data

    def read(self, path: Path, start: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes of a file from `start` on."""
        try:
            descriptor = self._descriptor(path)
            data = os.pread(descriptor, nbytes, start)
            while len(data) < nbytes and (more := os.pread(descriptor, nbytes - len(data), start + len(data))):
                data += more  # one call returns at most 2 GiB
            return data
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", where=str(path)) from error

    def tensor_into(self, tensor: TensorInfo, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """As `tensor`, into the first bytes of `out` (uint8); returns that part of it. Nothing is allocated."""
        item = ITEM_BYTES[tensor.dtype]
        at, part = tensor.start + start * item, out[:(stop - start) * item]
        left = memoryview(part)
        try:
            descriptor = self._descriptor(tensor.file)
            while len(left) and (n := os.preadv(descriptor, [left], at)):
                left, at = left[n:], at + n
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", where=str(tensor.file)) from error
        if len(left):
            raise CheckpointError("the file became shorter while it was read", where=str(tensor.file),
                                  todo="Do not change a checkpoint while it is merged.")
        return part

    def span(self, tensor: TensorInfo) -> Span:
        """Where a tensor lies; its file is mapped when it lies there whole and compiled loops are ready to read it."""
        try:
            descriptor = self._descriptor(tensor.file)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", where=str(tensor.file)) from error
        with self._lock:
            here = self._maps.get(tensor.file) or mapped(descriptor)
            self._maps[tensor.file] = here
        whole = here is not None and tensor.start + tensor.nbytes <= here.size
        return Span(descriptor, tensor.start, tensor.nbytes, here if whole else None)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def close(self) -> None:
        """Close every file; the next read opens it again."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
            self._maps.clear()

    def __del__(self):
        self.close()
