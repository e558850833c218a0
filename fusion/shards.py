"""The layout of a checkpoint's files, planned before the first byte, and one such file while it is written.

A shard gets its header last: until then no reader takes it for weights, whatever becomes of the process that writes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.dtypes import ITEM_BYTES
from fusion.errors import OutputError, ResourceError
from fusion.journal import write_all

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


class Shard:
    """One safetensors file of `nbytes` while it is written; `seal` writes the header. `folder`: a descriptor of its folder, so that
    none that takes the folder's name meanwhile is written to."""

    def __init__(self, path: Path, header: bytes, slots: Sequence[Slot], folder: int | None = None):
        self.path, self.header, self.slots, self._folder = path, header, slots, folder
        self.nbytes = len(header) + sum(slot.nbytes for slot in slots)
        self._file: int | None = None

    def make(self) -> None:
        """Make the file, empty and of its full size: a disk that is too small is found out now, not at the end."""
        self._file = self._opened(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file, 0, self.nbytes)
        os.ftruncate(self._file, self.nbytes)  # where no space can be reserved

    def open(self) -> None:
        """Open the file that somebody else has made, perhaps on another machine."""
        self._file = self._opened(os.O_RDWR)

    def write(self, slot: Slot, start: int, stored: np.ndarray | bytes) -> int:
        """Write stored numbers as the flat elements of a tensor from `start` on; returns how many bytes they are."""
        self._refuse_loss()
        data = memoryview(stored).cast("B")
        write_all(self._file, data, slot.start + start * ITEM_BYTES[slot.dtype])
        return len(data)

    def flush(self) -> None:
        """Wait until what is written so far is on the disk."""
        os.fdatasync(self._file)

    def seal(self, flush: bool = True) -> None:
        """Write the header and, if `flush`, wait until everything is on the disk."""
        self._refuse_loss()
        write_all(self._file, self.header, 0)
        if flush:
            os.fsync(self._file)
        self.close()

    def sealed(self) -> bool:
        """Whether the file on the disk is this shard, finished."""
        try:
            with open(self._opened(os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                return os.fstat(file.fileno()).st_size == self.nbytes and file.read(len(self.header)) == self.header
        except OSError:
            return False

    def _opened(self, flags: int) -> int:
        path = self.path if self._folder is None else self.path.name
        return os.open(path, flags | os.O_NOFOLLOW, 0o644, dir_fd=self._folder)

    def _refuse_loss(self) -> None:
        """OutputError when somebody removed or cut the file: what is written later would give it its size again, with a hole."""
        its = os.fstat(self._file)
        if its.st_nlink == 0 or its.st_size != self.nbytes:
            raise lost(self.path)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


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


def lost(path: Path) -> OutputError:
    """The error for a file that was touched by somebody else while it was written."""
    return OutputError(f"{path.name} was removed or changed while it was written", where=str(path.parent),
                       todo="Let nothing touch that folder while a merge runs, and merge again.")


def disk_error(error: OSError, out: Path, kept: str = "nothing was left behind") -> OutputError | ResourceError:
    """The error of the system in words for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError("the disk is full", where=str(out), todo=f"Free some space; {kept}.")
    todo = "Make the shards smaller." if error.errno == errno.EFBIG else "Choose a folder you may write to."
    return OutputError(f"cannot be written ({error.strerror})", where=str(out), todo=todo)
