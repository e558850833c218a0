"""A checkpoint is written whole or not at all: into a hidden sibling folder that gets its name by one rename at the end.

The layout of every shard is planned first, so blocks of different tensors can be written in any order, from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.checkpoint import INDEX
from fusion.dtypes import ITEM_BYTES
from fusion.errors import OutputError, ResourceError

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Slot:
    """Where one tensor goes: shard file name, first byte in it, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


class CheckpointWriter:
    """Writes tensors and small files into a folder that appears on `finish` and never otherwise.

    `tensors` lists (name, safetensors dtype code, shape). Use it as a context manager: leaving it without `finish` removes
    everything. OutputError when the folder exists or cannot be made, ResourceError when the disk is full.
    """

    def __init__(self, out: str | os.PathLike, tensors: Sequence[tuple[str, str, tuple[int, ...]]],
                 max_shard_bytes: int = MAX_SHARD_BYTES):
        self.out = Path(out).absolute()
        self.headers, self.slots = plan_shards(tensors, max_shard_bytes)
        self._written = dict.fromkeys(self.slots, 0)
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._made: list[Path] = []

    def __enter__(self) -> CheckpointWriter:
        if os.path.lexists(self.out):
            raise OutputError("exists already; nothing is ever overwritten", where=str(self.out), todo="Choose another folder.")
        if "\0" in str(self.out):
            raise OutputError("cannot be written (a null character)", where=repr(str(self.out)), todo="Choose another folder.")
        try:
            with _disk(self.out):
                self._make_parents()
                self.folder = self.out.parent / f".{self.out.name}.partial-{secrets.token_hex(4)}"
                self.folder.mkdir()
                for file, header in self.headers.items():
                    self._open_shard(file, header)
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.abort()

    def write(self, name: str, start: int, stored: np.ndarray | bytes) -> None:
        """Write stored numbers as the flat elements of `name` from `start` on."""
        slot = self.slots[name]
        data = memoryview(stored).cast("B")
        at = slot.start + start * ITEM_BYTES[slot.dtype]
        with _disk(self.out):
            done = 0
            while done < len(data):
                done += os.pwrite(self._files[slot.file], data[done:], at + done)
        with self._lock:
            self._written[name] += len(data)

    def write_file(self, name: str, content: str | bytes) -> None:
        """Write a small file beside the weights."""
        with _disk(self.out):
            (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def finish(self) -> Path:
        """Check that every tensor is complete, make the files durable and give the folder its name."""
        short = next((name for name, slot in self.slots.items() if self._written[name] != slot.nbytes), None)
        if short is not None:
            raise RuntimeError(f"{short} is incomplete: {self._written[short]} of {self.slots[short].nbytes} bytes")
        if len(self.headers) > 1:
            total = sum(slot.nbytes for slot in self.slots.values())
            index = {"metadata": {"total_size": total}, "weight_map": {name: slot.file for name, slot in self.slots.items()}}
            self.write_file(INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        with _disk(self.out):
            for descriptor in self._files.values():
                os.fsync(descriptor)
            self._close()
            if os.path.lexists(self.out):  # somebody else was faster
                raise OutputError("appeared while this merge ran", where=str(self.out), todo="Choose another folder.")
            os.rename(self.folder, self.out)
        self._made.clear()
        return self.out

    def abort(self) -> None:
        """Remove everything that was written; after `finish` there is nothing to remove."""
        self._close()
        folder = getattr(self, "folder", None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        self._made.clear()

    def _make_parents(self) -> None:
        missing = [parent for parent in self.out.parents if not parent.exists()]
        for parent in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another merge made it meanwhile, so it is not ours to remove
                parent.mkdir()
                self._made.append(parent)

    def _open_shard(self, file: str, header: bytes) -> None:
        descriptor = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files[file] = descriptor
        size = len(header) + sum(slot.nbytes for slot in self.slots.values() if slot.file == file)
        if hasattr(os, "posix_fallocate"):  # also finds out now, not at the end, that the disk is too small
            os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, header, 0)

    def _close(self) -> None:
        for descriptor in self._files.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._files.clear()


def plan_shards(tensors: Sequence[tuple[str, str, tuple[int, ...]]],
                max_shard_bytes: int) -> tuple[dict[str, bytes], dict[str, Slot]]:
    """Lay tensors out in shards of at most `max_shard_bytes` (a larger tensor has its own); returns headers and slots."""
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    room = max_shard_bytes
    for name, dtype, shape in tensors:
        nbytes = int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]
        if shards[-1] and nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, dtype, shape, nbytes))
        room -= nbytes
    headers, slots = {}, {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape, nbytes in shard:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        for name, dtype, shape, nbytes in shard:
            start = len(headers[file]) + header[name]["data_offsets"][0]
            slots[name] = Slot(name, dtype, shape, file, start, nbytes)
    return headers, slots


@contextlib.contextmanager
def _disk(out: Path):
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError("the disk is full", where=str(out), todo="Free some space; nothing was left behind.") from error
        raise OutputError(f"cannot be written ({error.strerror})", where=str(out),
                          todo="Choose a folder you may write to.") from error
