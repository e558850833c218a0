"""Long work is a generator that yields Progress and returns its result; closing it stops the work and leaves nothing behind.

    result = finish(merge(recipe, out))                    # a script that only wants the result
    result = finish(merge(recipe, out), print)             # … and wants to see it happen
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

from fusion.errors import printable

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is.

    `stage` names what is done now; `done` of `total` counts `unit` ("tensors", "prompts" …); `bytes_done` of
    `bytes_total` counts what was read and written; `seconds` is the time since the work began.
    """

    stage: str
    done: int = 0
    total: int = 0
    unit: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def fraction(self) -> float:
        """The share that is done, 0 to 1: by bytes when they are known, else by count."""
        done, total = (self.bytes_done, self.bytes_total) if self.bytes_total else (self.done, self.total)
        return min(1.0, done / total) if total else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes handled per second so far."""
        return self.bytes_done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the present pace; None while that cannot be known."""
        part = self.fraction
        return self.seconds * (1 - part) / part if part > 0 and self.seconds > 0 else None

    def __str__(self) -> str:
        text = f"{self.stage} {self.fraction:4.0%}"
        if self.total:
            text += f"  {self.done}/{self.total} {self.unit}"
        if self.bytes_total:
            text += f"  {self.bytes_done / 1e9:.2f}/{self.bytes_total / 1e9:.2f} GB  {self.bytes_per_s / 1e9:.2f} GB/s"
        if self.seconds_left is not None:
            text += f"  {self.seconds_left:.0f} s left"
        return f"{text}  {printable(self.note)}" if self.note else text


Work = Generator[Progress, None, Result]


@dataclass
class Meter:
    """Counts work and makes the Progress values of one stage."""

    stage: str
    total: int = 0
    unit: str = ""
    bytes_total: int = 0
    done: int = 0
    bytes_done: int = 0
    started: float = field(default_factory=time.perf_counter)

    def step(self, count: int = 0, nbytes: int = 0, note: str = "") -> Progress:
        """Add what was done and return where the work stands."""
        self.done += count
        self.bytes_done += nbytes
        return Progress(self.stage, self.done, self.total, self.unit, self.bytes_done, self.bytes_total,
                        time.perf_counter() - self.started, note)


def finish(work: Work[Result], show: Callable[[Progress], object] | None = None) -> Result:
    """Run the work to its end and return its result, handing each Progress to `show`."""
    try:
        while True:
            progress = next(work)
            if show is not None:
                show(progress)
    except StopIteration as end:
        return end.value
    finally:
        work.close()
