"""Measuring commands: wall time, processor time, peak anonymous memory of the whole process tree; the page cache; the floor.

The floor is what no merge can go below: every input byte read once, the output written once and flushed, by two threads.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PIECE = 1 << 18  # bytes of one read: the buffer stays in the second-level cache
WRITE = 1 << 20
SHARD = 1_000_000_000
THREADS = 2


class Failed(Exception):
    """A command that was to be measured did not work; the text is the end of what it said."""


@dataclass(frozen=True)
class Run:
    """One run of a command: wall seconds, seconds of processor time, peak anonymous bytes, what it printed."""

    seconds: float
    processor: float
    anonymous: int
    output: str


def run(command: Sequence[str], **environment: str) -> Run:
    """Run a command to its end, looking at its memory fifty times a second; Failed when it does not succeed."""
    around = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as people run it
    before, started = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**around, **environment})
    peak = 0
    with ThreadPoolExecutor(1) as reader:
        said = reader.submit(process.communicate)
        while not said.done():
            peak = max(peak, sum(map(_anonymous, _tree(process.pid))))
            time.sleep(0.02)
    seconds, after = time.perf_counter() - started, os.times()
    output, errors = said.result()
    if process.returncode:
        raise Failed(f"{' '.join(command)}: {(errors or output)[-1500:]}")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, processor, peak, output)


def median(runs: Iterable[Run]) -> float:
    """The median of the wall seconds."""
    return statistics.median(run.seconds for run in runs)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(inner for child in children for inner in _tree(int(child)))]


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def weights_of(folders: Iterable[Path]) -> list[Path]:
    """The safetensors files of checkpoints."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def floor(folders: Sequence[Path], scratch: Path, written: int) -> tuple[float, float]:
    """Seconds to read every byte of the checkpoints once, and seconds to write so many bytes to `scratch` and flush them."""
    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_read, weights_of(folders)))
    middle = time.perf_counter()
    scratch.mkdir()
    sizes = [min(SHARD, written - start) for start in range(0, written, SHARD)]
    try:
        with ThreadPoolExecutor(max(THREADS, len(sizes))) as pool:  # more threads than cores only wait for the disk
            list(pool.map(_write, (scratch / str(n) for n in range(len(sizes))), sizes))
        return middle - started, time.perf_counter() - middle
    finally:
        for file in scratch.iterdir():
            file.unlink()
        scratch.rmdir()


def _read(path: Path) -> None:
    buffer, file = memoryview(bytearray(PIECE)), os.open(path, os.O_RDONLY)
    try:
        at = 0
        while n := os.preadv(file, [buffer], at):
            at += n
    finally:
        os.close(file)


def _write(path: Path, size: int) -> None:
    piece, file = memoryview(bytearray(WRITE)), os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(file, 0, size)
        for start in range(0, size, WRITE):
            os.pwrite(file, piece[:min(WRITE, size - start)], start)
        os.fsync(file)
    finally:
        os.close(file)


def read_in_order(folders: Iterable[Path]) -> float:
    """Seconds to read the files one after the other, from their beginnings to their ends, in one thread."""
    started = time.perf_counter()
    for path in weights_of(folders):
        _read(path)
    return time.perf_counter() - started


def drop_cache(folders: Iterable[Path]) -> float:
    """Ask the system to forget these files; returns the share of their bytes that it still holds."""
    kept = total = 0
    for path in weights_of(folders):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            resident, pages = _resident(file)
        finally:
            os.close(file)
        kept, total = kept + resident, total + pages
    return kept / max(total, 1)


def _resident(file: int) -> tuple[int, int]:
    """Pages of an open file that are in the page cache, and all its pages."""
    size, libc = os.fstat(file).st_size, ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    seen = bytearray(-(-size // mmap.PAGESIZE))
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)  # mapped only to be asked about, never touched
    libc.mincore(address, size, ctypes.addressof(ctypes.c_char.from_buffer(seen)))
    libc.munmap(address, size)
    return sum(page & 1 for page in seen), len(seen)
