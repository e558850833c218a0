"""A digest of what the weights are: it costs little more than reading them, so that every merge can record it.

    finish(digest_checkpoint(Checkpoint("merged")))          # "fc1:…"

A tensor's stored bytes are cut into chunks of 4 KiB; two keyed sums of each chunk's 32-bit words (mod 2⁶⁴, fixed public keys)
go with dtype and shape into SHA-256, and the tensors' values with their names, sorted, into another. So the digest depends
neither on sharding nor on threads, order or block sizes. Whatever changes by accident is noticed: any change inside one word
for certain, any other but for about one in 2⁶⁴. It is no proof against forgery: the keys are known, so that somebody who
wants to can make other weights with the same digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

import numpy as np

from fusion import compiled
from fusion.dtypes import FLOATS, ITEM_BYTES
from fusion.progress import Meter, Work
from fusion.threads import THREADS

if TYPE_CHECKING:
    from fusion.checkpoint import Checkpoint
    from fusion.files import Span

CHUNK_BYTES = 4096
PREFIX = "fc1:"
_READ_BYTES, _MAPPED_BYTES = 1 << 18, 1 << 22
_WORDS = CHUNK_BYTES // 8  # 64-bit words, each of which is two of 32 bits
KEYS = np.frombuffer(hashlib.shake_256(b"fusechat content digest 1").digest(4 * 4 * _WORDS), "<u4")
KEYS = np.ascontiguousarray((KEYS | 1).reshape(2, _WORDS, 2).transpose(0, 2, 1).reshape(4, _WORDS), np.uint64)


class TensorDigest:
    """The digest of one tensor, from pieces in any order and of any size, from any thread.

    `dtype` is the safetensors code of the bytes that `update` gets: the stored ones, or "F32" for the numbers of a tensor
    that is computed while it is read.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, tuple(shape)
        self.nbytes = math.prod(self.shape) * ITEM_BYTES[dtype]
        self._sums = np.zeros((-(-self.nbytes // CHUNK_BYTES), 2), np.uint64)
        self._seen = 0
        self._lock = threading.Lock()

    def update(self, start_byte: int, data: bytes | memoryview | np.ndarray) -> None:
        """Add the bytes from `start_byte` on; every byte of the tensor must come exactly once."""
        stored = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
        if not len(stored):
            return
        stop = start_byte + len(stored)
        words, first = _aligned(stored, start_byte), start_byte // 8
        chunk, end = start_byte // CHUNK_BYTES, -(-stop // CHUNK_BYTES)
        if start_byte % CHUNK_BYTES == 0 and (stop % CHUNK_BYTES == 0 or stop == self.nbytes):  # whole chunks: nobody else's
            compiled.loops().hash_words(words, 0, KEYS, self._sums[chunk:end])
        else:
            sums = np.zeros((end - chunk, 2), np.uint64)
            compiled.loops().hash_words(words, first - chunk * _WORDS, KEYS, sums)
            with self._lock:
                self._sums[chunk:end] += sums
        with self._lock:
            self._seen += len(stored)

    def take(self, start_byte: int, nbytes: int, sums: np.ndarray) -> None:
        """As `update`, for whole chunks whose sums [chunks, 2] are known: `hash_words` with `KEYS`."""
        chunk = start_byte // CHUNK_BYTES
        count = -(-nbytes // CHUNK_BYTES)
        with self._lock:
            self._sums[chunk:chunk + count] += sums[:count]
            self._seen += nbytes

    def value(self) -> str:
        """The digest, 64 hexadecimal digits."""
        if self._seen != self.nbytes:
            raise RuntimeError(f"{self._seen} of {self.nbytes} bytes were seen")
        digest = hashlib.sha256(f"{self.dtype}|{self.shape}|".encode())
        digest.update(self._sums.astype("<u8", copy=False))
        return digest.hexdigest()


def _aligned(stored: np.ndarray, start_byte: int) -> np.ndarray:
    """The bytes as 64-bit words from a word's border on; zeros at the edges add nothing to the sums."""
    before = start_byte % 8
    if before or len(stored) % 8 or not stored.view("<u8").flags.aligned:
        padded = np.zeros(-(-(before + len(stored)) // 8) * 8, np.uint8)
        padded[before:before + len(stored)] = stored
        stored = padded
    return stored.view("<u8")


def checkpoint_digest(tensors: Mapping[str, str]) -> str:
    """The digest of a checkpoint whose tensors (name → `TensorDigest.value`) are known."""
    return PREFIX + hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()


def read_dtype(checkpoint: Checkpoint, name: str) -> str:
    """The dtype of the bytes that stand for a tensor in a digest: its own, or F32 when its numbers are computed on reading."""
    return checkpoint.info[name].dtype if _as_stored(checkpoint, name) else "F32"


def digest_tensor(checkpoint: Checkpoint, name: str, stop: threading.Event | None = None) -> str:
    """Read one tensor and return its digest; an unfinished one ("") when `stop` is set meanwhile."""
    span, dtype = checkpoint.span(name), read_dtype(checkpoint, name)
    if span is not None and span.map is not None:
        value = _value(checkpoint, name, dtype, _mapped(span), stop)
        if not span.map.broken:
            return value
    return _value(checkpoint, name, dtype, _pieces(checkpoint, name, dtype), stop)


def _value(checkpoint: Checkpoint, name: str, dtype: str, pieces: Iterator[tuple[int, np.ndarray]],
           stop: threading.Event | None) -> str:
    digest = TensorDigest(dtype, checkpoint.info[name].shape)
    for start_byte, data in pieces:
        if stop is not None and stop.is_set():
            return ""
        digest.update(start_byte, data)
    return digest.value()


def digest_checkpoint(checkpoint: Checkpoint, known: Mapping[str, str] | None = None) -> Work[str]:
    """Read every tensor that is not `known` (name → digest) and return the checkpoint's digest; yields Progress per tensor."""
    return checkpoint_digest((yield from digest_tensors(checkpoint, known)))


def digest_tensors(checkpoint: Checkpoint, known: Mapping[str, str] | None = None) -> Work[dict[str, str]]:
    """The digest of every tensor by its name; reads those that are not `known`."""
    values = {name: value for name, value in (known or {}).items() if name in checkpoint.info}
    todo = [name for name in checkpoint.info if name not in values]
    meter = Meter("Reading weights", len(todo), "tensors", sum(checkpoint.info[name].nbytes for name in todo))
    compiled.prepare(meter.bytes_total)
    stop = threading.Event()
    yield meter.step()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            jobs = {pool.submit(digest_tensor, checkpoint, name, stop): name for name in todo}
            for job in as_completed(jobs):
                name = jobs[job]
                values[name] = job.result()
                yield meter.step(1, checkpoint.info[name].nbytes, name)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return values


def _as_stored(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.plain(name) or checkpoint.info[name].dtype not in FLOATS


def _mapped(span: Span) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, span.nbytes, _MAPPED_BYTES):
        yield start, span.map.view(span.start + start, min(_MAPPED_BYTES, span.nbytes - start))


def _pieces(checkpoint: Checkpoint, name: str, dtype: str) -> Iterator[tuple[int, np.ndarray]]:
    item, numel = ITEM_BYTES[dtype], checkpoint.info[name].numel
    step, stored = _READ_BYTES // item, _as_stored(checkpoint, name)
    room = np.empty(min(numel, step) * item, np.uint8)  # used again: fresh memory would cost more than reading
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        yield start * item, (checkpoint.raw_into(name, start, stop, room) if stored
                             else checkpoint.read(name, start, stop, room.view(np.float32)))
