"""One pass over the same tensors of several models, block by block: what every way of looking at weights shares.

Two threads, one tensor each. Price: every byte is read once; memory is a few blocks per thread, whatever the model's size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol, TypeVar

import numpy as np

from fusion.checkpoint import Checkpoint
from fusion.errors import Stopped
from fusion.progress import Meter, Work
from fusion.threads import THREADS
from fusion.variation import nonfinite

BLOCK = 32_768  # elements; the float64 work of four models stays in the cache
WAKE_S = 0.2  # a generator can only be closed where it yields


class Sums(Protocol):
    """What is kept of one tensor."""

    def add(self, blocks: np.ndarray, bad: np.ndarray) -> None:
        """Add one block: `blocks` [M, n] float32, all finite; `bad` [M] how many numbers were not, before they were mended."""


Kept = TypeVar("Kept", bound=Sums)
Result = TypeVar("Result")


def fold(stage: str, models: Sequence[Checkpoint], names: Sequence[str], make: Callable[[str], Kept], *,
         allow_nonfinite: bool = False) -> Work[dict[str, Kept]]:
    """Read these tensors of all models once, and let `make(name)` of each tensor add them up; yields Progress.

    Closing the generator ends the work within a block. Raises CheckpointError (naming tensor and model) for NaN or Inf unless
    `allow_nonfinite`; then such an element counts as the first model's value, or as 0 in all where the first is at fault.
    """
    stop, lock, kept, read = threading.Event(), threading.Lock(), {}, [0]

    def one(name: str) -> Kept:
        sums = make(name)
        for blocks, nbytes in _blocks(name, models, stop):
            sums.add(*mended(name, models, blocks, allow_nonfinite))
            with lock:
                read[0] += nbytes
        return sums

    meter = Meter(stage, len(names), "tensors", sum(model.info[name].nbytes for model in models for name in names))
    yield meter.step()
    with closing(in_threads(one, names, stop)) as jobs:
        for name, sums in jobs:
            if name is not None:
                kept[name] = sums
            yield meter.step(int(name is not None), read[0] - meter.bytes_done, name or "")
    return kept


def in_threads(work: Callable[[str], Result], names: Iterable[str], stop: threading.Event
               ) -> Generator[tuple[str, Result] | tuple[None, None], None, None]:
    """Yield each name with its `work(name)` as they get done, and (None, None) when nothing did for a moment.

    The caller can therefore be closed at any time: `stop` is set then, which `work` should obey.
    """
    done: queue.SimpleQueue[Future] = queue.SimpleQueue()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            jobs = {pool.submit(work, name): name for name in names}
            for job in jobs:
                job.add_done_callback(done.put)
            left = len(jobs)
            while left:
                try:
                    job = done.get(timeout=WAKE_S)
                except queue.Empty:
                    yield None, None
                    continue
                left -= 1
                yield jobs[job], job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _blocks(name: str, models: Sequence[Checkpoint], stop: threading.Event):
    """Yield [M, n] float32 blocks of a tensor, in one buffer that is used again, and how many stored bytes they were."""
    numel = models[0].info[name].numel
    nbytes = sum(model.info[name].nbytes for model in models)
    buffer = np.empty((len(models), min(BLOCK, numel)), np.float32)
    for start in range(0, numel, BLOCK):
        if stop.is_set():
            raise Stopped("stopped")
        end = min(start + BLOCK, numel)
        for row, model in zip(buffer, models, strict=True):
            model.read(name, start, end, row)
        yield buffer[:, :end - start], nbytes * end // numel - nbytes * start // numel


def mended(name: str, models: Sequence[Checkpoint], blocks: np.ndarray, allowed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [M, …] without NaN and Inf, as `fold` says, and how many each model had, [M]; CheckpointError if not `allowed`."""
    sound = np.isfinite(blocks)
    if sound.all():
        return blocks, np.zeros(len(blocks), np.int64)
    if not allowed:
        raise nonfinite(name, models)
    first = np.where(sound[0], blocks[0], 0)
    whole = np.where(sound & sound[0], blocks, first)
    return whole, np.count_nonzero(~sound.reshape(len(blocks), -1), axis=1)
