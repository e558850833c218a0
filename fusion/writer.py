"""A checkpoint is written whole or not at all: into a hidden sibling folder that gets its name by one rename at the end.

Blocks of different tensors can be written in any order, from any thread. Finished shards are flushed to the disk while others
are still written, and noted in the journal: what a killed writer left is removed by the next one, or resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fusion.errors import OutputError
from fusion.files import INDEX
from fusion.journal import Journal, replaced, sync_folder
from fusion.shards import MAX_SHARD_BYTES, Shard, disk_error, lost, plan_shards

__all__ = ["MAX_SHARD_BYTES", "CheckpointWriter"]

FLUSH_BYTES = 1 << 28  # of a shard that is still written: the disk works meanwhile, the end has less to wait for


class CheckpointWriter:
    """Writes tensors and small files into a folder that appears on `finish` and never otherwise.

    `tensors` lists (name, safetensors dtype code, shape). Use it as a context manager: leaving it without `finish` removes
    everything. `resume` continues what a killed writer of the same tensors and the same `plan_digest` began: `finished` maps
    the tensors of its finished shards to the notes that were given to `done`; what it finishes itself then also outlives it.
    Another process may write and seal `shard(file)` in its place, then `adopt` takes it in. Without `flush` the system writes to
    the disk when it likes: a power cut soon after `finish` may leave an incomplete folder, and nothing can be resumed.

    OutputError when the folder exists, cannot be made, is being written by another merge or was begun with another plan;
    ResourceError when the disk is full.
    """

    def __init__(self, out: str | os.PathLike, tensors: Sequence[tuple[str, str, tuple[int, ...]]],
                 max_shard_bytes: int = MAX_SHARD_BYTES, *, resume: bool = False, plan_digest: str = "", flush: bool = True):
        self.out = Path(out).absolute()
        self.headers, self.slots = plan_shards(tensors, max_shard_bytes)
        self.files = {file: [slot for slot in self.slots.values() if slot.file == file] for file in self.headers}
        self.finished: dict[str, dict] = {}
        self._plan = hashlib.sha256(b"\0".join([plan_digest.encode(), *self.headers.values()])).hexdigest()
        self._resume, self._durable = resume, flush
        self._journal, self._own = Journal(self.out), False
        self._sealed: set[str] = set()
        self._small: dict[str, Future] = {}
        self._small_bytes: dict[str, int] = {}
        self._shards: dict[str, Shard] = {}
        self._written = dict.fromkeys(self.slots, 0)
        self._notes: dict[str, dict[str, dict]] = {file: {} for file in self.headers}
        self._unflushed = dict.fromkeys(self.headers, 0)
        self._early: dict[str, list[Future]] = {file: [] for file in self.headers}
        self._seals: dict[str, Future] = {}
        self._flush = ThreadPoolExecutor(4)  # its threads wait for the disk, no more
        self._lock = threading.Lock()
        self._made: list[Path] = []
        self._hidden: int | None = None  # a descriptor of the hidden folder: none that takes its name meanwhile is touched

    def __enter__(self) -> CheckpointWriter:
        if "\0" in str(self.out):
            raise OutputError("cannot be written (a null character)", where=repr(str(self.out)), todo="Choose another folder.")
        self._refuse_existing("exists already; nothing is ever overwritten")
        try:
            with self._disk():
                self._take_name()
                self._take_folder()
                for file in self.headers:
                    if file not in self._sealed:
                        self._shards[file] = self.shard(file)
                        self._shards[file].make()
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.abort()

    @property
    def folder(self) -> Path:
        """The hidden folder that becomes `out`."""
        return self._journal.folder

    @property
    def todo(self) -> tuple[str, ...]:
        """The tensors that are not finished, one shard after the other, the largest first in each: the order to write them in."""
        return tuple(slot.name for slots in self.files.values() for slot in sorted(slots, key=lambda slot: -slot.nbytes)
                     if slot.name not in self.finished)

    def shard(self, file: str) -> Shard:
        """The shard of this file name, not yet opened."""
        return Shard(self.folder / file, self.headers[file], self.files[file], self._hidden)

    def write(self, name: str, start: int, stored: np.ndarray | bytes) -> None:
        """Write stored numbers as the flat elements of `name` from `start` on."""
        slot = self.slots[name]
        shard = self._shards[slot.file]
        with self._disk():
            nbytes = shard.write(slot, start, stored)
        with self._lock:
            self._written[name] += nbytes
            self._unflushed[slot.file] += nbytes
            if self._durable and self._unflushed[slot.file] >= FLUSH_BYTES:
                self._unflushed[slot.file] = 0
                self._early[slot.file].append(self._flush.submit(shard.flush))

    def done(self, name: str, notes: Mapping | None = None) -> None:
        """Say that every block of `name` is written; `notes` is plain data that a resumed merge finds in `finished`."""
        slot = self.slots[name]
        with self._lock:
            if self._written[name] != slot.nbytes:
                raise RuntimeError(f"{name} is incomplete: {self._written[name]} of {slot.nbytes} bytes")
            known = self._notes[slot.file]
            known[name] = dict(notes or {})
            if len(known) == len(self.files[slot.file]):
                self._seals[slot.file] = self._flush.submit(self._seal, slot.file)

    def adopt(self, file: str, notes: Mapping[str, Mapping]) -> None:
        """Take in a shard that another process sealed; `notes` maps each of its tensors to plain data."""
        if not self.shard(file).sealed() or notes.keys() != {slot.name for slot in self.files[file]}:
            raise RuntimeError(f"{file} is not the shard that was planned")
        self._shards[file].close()
        self._notes[file] = {name: dict(its) for name, its in notes.items()}
        with self._disk():
            self._record(file)

    def write_file(self, name: str, content: str | bytes) -> None:
        """Write a small file beside the weights, or into a folder there."""
        data = content.encode() if isinstance(content, str) else content
        with self._disk():
            if "/" in name:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name.split("/")[0], dir_fd=self._hidden)
            with self._opened(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
                file.write(data)
        self._small_bytes[name] = len(data)
        self._small[name] = self._flush.submit(self._sync, name)

    def finish(self) -> Path:
        """Check that every tensor is complete, make the files durable and give the folder its name."""
        for name, slot in self.slots.items():
            if name not in self._notes[slot.file]:
                self.done(name)
        for file in self.headers.keys() - self._sealed - self._seals.keys():  # of a checkpoint without a tensor
            self._seals[file] = self._flush.submit(self._seal, file)
        if len(self.headers) > 1:
            total = sum(slot.nbytes for slot in self.slots.values())
            index = {"metadata": {"total_size": total}, "weight_map": {name: slot.file for name, slot in self.slots.items()}}
            self.write_file(INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        for flushed in (*self._seals.values(), *self._small.values()):
            flushed.result()
        with self._disk():
            self._close_shards()
            self._tidy({*self.headers, *self._small})
            if self._durable:
                os.fsync(self._hidden)
            self._refuse_losses()
            self._refuse_existing("appeared while this merge ran")  # somebody else was faster
            os.rename(self.folder, self.out)
            self._close()
        if self._durable:
            with contextlib.suppress(OSError):  # it has its name; there is no way back from here
                sync_folder(self.out.parent)
        self._journal.release()
        self._made.clear()
        return self.out

    def abort(self) -> None:
        """Remove everything that was written, but in a resumed merge its finished shards; after `finish` there is nothing."""
        self._close()
        if self._journal.folder is None or (self._own and not (self._resume and self._sealed)):
            with contextlib.suppress(OSError):
                self._journal.discard()
                self._journal.release()
        self._journal.keep()  # what stays is the next merge's
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        self._made.clear()

    def _refuse_existing(self, found: str) -> None:
        if os.path.lexists(self.out):
            raise OutputError(found, where=str(self.out), todo="Choose another folder.")

    def _refuse_losses(self) -> None:
        """Make sure that all that was written is there: whoever cleans up may have removed or cut a file meanwhile."""
        if not self._journal.ours():
            raise replaced(self.folder)
        gone = [*(file for file in self.headers if not self.shard(file).sealed()),
                *(name for name, nbytes in self._small_bytes.items() if self._size(name) != nbytes)]
        if gone:
            raise lost(self.folder / gone[0])

    def _take_name(self) -> None:
        for attempts_left in reversed(range(10)):
            self._make_parents()
            try:
                self._journal.take()
                break
            except FileNotFoundError:  # another merge has just removed the parents that it had made
                if not attempts_left:
                    raise

    def _make_parents(self) -> None:
        missing = [parent for parent in self.out.parents if not parent.exists()]
        for parent in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another merge made it meanwhile, so it is not ours to remove
                parent.mkdir()
                self._made.append(parent)

    def _take_folder(self) -> None:
        journal = self._journal
        if self._resume and journal.records and journal.plan != self._plan:
            raise OutputError("what is left of the last merge was begun with another recipe, other models or another layout",
                              where=str(self.out), todo="Begin again without --resume.")
        self._own = True
        if self._resume and journal.folder is not None and journal.plan == self._plan:
            self._hidden = journal.open_folder()
            for record in journal.records:
                self._take_shard(record.get("shard"), record.get("tensors"))
            self._tidy(self._sealed)
        else:
            journal.discard()
            journal.begin(self._plan)
            self._hidden = journal.open_folder()

    def _take_shard(self, file: object, notes: object) -> None:
        names = {slot.name for slot in self.files.get(file, ())} if isinstance(file, str) else set()
        if isinstance(notes, dict) and notes.keys() == names != set() and self.shard(file).sealed():
            self._sealed.add(file)
            self._notes[file] = notes
            self.finished.update(notes)

    def _tidy(self, kept: set[str]) -> None:
        """Remove what a dead process left in the hidden folder."""
        kept = {name.split("/")[0] for name in kept}
        for entry in list(os.scandir(self._hidden)):
            if entry.name not in kept and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.name, dir_fd=self._hidden)
            elif entry.name not in kept:
                os.unlink(entry.name, dir_fd=self._hidden)

    def _opened(self, name: str, flags: int) -> BinaryIO:
        """A small file in the hidden folder, or in a folder of it; no link is followed."""
        folder, _, file = name.rpartition("/")
        within = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._hidden)
        try:
            mode = "rb" if flags == os.O_RDONLY else "wb"
            return open(os.open(file, flags | os.O_NOFOLLOW, 0o666, dir_fd=within), mode)
        finally:
            os.close(within)

    def _size(self, name: str) -> int:
        """Bytes of a small file, -1 when it is gone."""
        try:
            with self._opened(name, os.O_RDONLY) as file:
                return os.fstat(file.fileno()).st_size
        except OSError:
            return -1

    def _seal(self, file: str) -> None:
        with self._disk():
            for flushed in self._early[file]:
                flushed.result()
            self._shards[file].seal(self._durable)
            self._record(file)

    def _sync(self, name: str) -> None:
        if self._durable:
            with self._disk(), self._opened(name, os.O_RDONLY) as file:
                os.fsync(file.fileno())
                if "/" in name:
                    sync_folder(name.split("/")[0], self._hidden)

    def _record(self, file: str) -> None:
        with self._lock:
            if self._durable:
                self._journal.add({"shard": file, "tensors": self._notes[file]})
            self._sealed.add(file)

    def _close(self) -> None:
        self._close_shards()
        if self._hidden is not None:
            os.close(self._hidden)
            self._hidden = None

    def _close_shards(self) -> None:
        self._flush.shutdown(cancel_futures=True)
        for shard in self._shards.values():
            shard.close()

    @contextlib.contextmanager
    def _disk(self):
        try:
            yield
        except OSError as error:
            kept = "what is finished is kept for --resume" if self._resume and self._sealed else "nothing was left behind"
            raise disk_error(error, self.out, kept) from error
