"""A small file beside the output locks its name, says which hidden folder is ours, and remembers the finished shards.

    .NAME.journal             locked while its writer lives; line 1 says which folder and which plan, then a line per shard
    .NAME.partial-xxxxxxxx    the folder that becomes NAME by one rename

A folder that no journal names is not ours and is never touched, nor one that took the place of ours. The lock goes with the
process, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

from fusion.errors import OutputError

FORMAT = "fusechat partial 1"


class Journal:
    """The journal of one output; `take` locks it and reads what an earlier, dead writer left.

    `folder` is the hidden folder (None: there is none), `plan` the digest of what is written into it, `records` the plain
    data that was added.
    """

    def __init__(self, out: Path):
        self.path = out.parent / f".{out.name}.journal"
        self.folder: Path | None = None
        self.plan = ""
        self.records: list[dict] = []
        self._inode = (0, 0)  # of the hidden folder, when it was made or found
        self._prefix = out.parent / f".{out.name}.partial-"
        self._file: int | None = None
        self._end = 0

    def take(self) -> None:
        """Lock the output's name until `release` or `keep`; OutputError when another writer has it or a foreign file is there."""
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                _lock(file, self.path)
                if _is_at(file, self.path):  # else its last owner has just removed it
                    self._read(_content(file, self.path))
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)

    def begin(self, plan: str) -> Path:
        """Name a new hidden folder and make it; whatever was recorded before is forgotten."""
        token = secrets.token_hex(4)
        self.folder, self.plan, self.records, self._end = Path(f"{self._prefix}{token}"), plan, [], 0
        os.ftruncate(self._file, 0)
        self._append({"format": FORMAT, "token": token, "plan": plan})
        sync_folder(self.path.parent)
        self.folder.mkdir()
        self._inode = _inode(self.folder)
        return self.folder

    def open_folder(self) -> int:
        """A descriptor of the hidden folder, for work that no other folder can take the place of; OutputError where one has."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if _inode(folder) != self._inode:
            os.close(folder)
            raise replaced(self.folder)
        return folder

    def ours(self) -> bool:
        """Whether what is at the hidden folder's place is the folder that was made or found."""
        try:
            return _inode(self.folder) == self._inode
        except OSError:
            return False

    def add(self, record: dict) -> None:
        """Remember plain data for good: it is on the disk when this returns."""
        self._append(record)
        self.records.append(record)

    def discard(self) -> None:
        """Remove the hidden folder, but nothing that took its place; OSError when that fails."""
        if self.folder is not None and self.ours():
            shutil.rmtree(self.folder)

    def release(self) -> None:
        """Give the name back and remove the journal."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.keep()

    def keep(self) -> None:
        """Give the name back; journal and folder stay for a later writer."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, record: dict) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        write_all(self._file, line, self._end)
        os.fsync(self._file)
        self._end += len(line)

    def _read(self, content: bytes) -> None:
        *lines, _ = content.split(b"\n")  # a last line without its end was cut when the writer died
        records = list(map(_record, lines))
        whole = records.index(None) if None in records else len(records)
        if not records:
            self.folder, self.plan, self.records, self._end = None, "", [], 0
            return
        first = records[0] or {}
        if first.get("format") != FORMAT or not re.fullmatch("[0-9a-f]{8}", str(first.get("token"))):
            raise OutputError("is in the way: it is no journal of a merge", where=str(self.path),
                              todo="Move it away, or choose another folder.")
        self.folder, self.plan, self.records = Path(f"{self._prefix}{first['token']}"), str(first.get("plan")), records[1:whole]
        self._end = sum(len(line) + 1 for line in lines[:whole])
        if stat.S_ISDIR(_mode(self.folder)):
            self._inode = _inode(self.folder)
        else:
            self.folder, self.records = None, []


def replaced(folder: Path) -> OutputError:
    """The error for a hidden folder in whose place there is another one, or a link, or nothing."""
    return OutputError("was removed, or another folder took its place, while it was written", where=str(folder),
                       todo="Let nothing touch that folder while a merge runs, and merge again.")


def reclaimable_bytes(out: str | os.PathLike) -> int:
    """Bytes on disk that an earlier merge into `out` left when it was killed; the next one removes or uses them."""
    journal = Journal(Path(out).absolute())
    try:
        with open(os.open(journal.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            journal._read(_content(file.fileno(), journal.path))
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(journal.folder)) if journal.folder else 0
    except (OSError, OutputError, ValueError):
        return 0


def write_all(file: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` from byte `at` on; one call of the system may write less."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)


def sync_folder(folder: str | Path, within: int | None = None) -> None:
    """Make the names in a folder durable; `within`: a descriptor of the folder that its path begins at."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=within)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OutputError("another merge is writing there", where=_output(path),
                              todo="Wait for it, or choose another folder.") from error
        if os.fstat(file).st_size:  # a file system without locks: the living cannot be told from the dead
            raise OutputError("another merge is writing there, or was killed", where=_output(path),
                              todo=f"If none is running, remove {path}.") from error


def _output(path: Path) -> str:
    return str(path.parent / path.name[1:-len(".journal")])


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _content(file: int, path: Path) -> bytes:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OutputError("is in the way: it is no plain file", where=str(path), todo="Move it away, or choose another folder.")
    with open(os.dup(file), "rb") as copy:
        return copy.read()


def _record(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _inode(at: Path | int) -> tuple[int, int]:
    its = os.fstat(at) if isinstance(at, int) else os.lstat(at)
    return its.st_dev, its.st_ino


def _mode(path: Path) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0
