"""Looks at a selection's weights that go beyond its variation: an estimate from a sample for large families, and inspections.

Kept by the checkpoints' stamps, so a changed file is looked at again. Price: an inspection reads every byte once and takes a
few times as long as measuring; small families are looked at without being asked.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import gradio as gr

from components.state import Selection, Settings
from components.status import bar, error_note, note
from components.studio import Studio
from fusion.errors import FusionError, Stopped
from fusion.inspection import Inspection, Preview, inspect, preview
from fusion.progress import Progress, Work
from fusion.variation import Variation

AT_ONCE_BYTES = 500_000_000  # of a family that is inspected as soon as it is chosen
SAMPLING_S = 1.0
_KEPT = 16
_WAKE_S = 0.2
PACE_S = 0.2  # between two Progress that a page shows

Found = TypeVar("Found")


class Looks:
    """One per process; every method may be called from any thread. The same look is never taken twice at a time."""

    def __init__(self, studio: Studio):
        self._studio, self._kept = studio, OrderedDict()
        self._lock, self._turns = threading.Lock(), {}

    def at_once(self, now: Selection) -> bool:
        """Whether a selection is small enough to be inspected without being asked."""
        return sum(self._studio.checkpoint(key).nbytes for key in (now.pivot, *now.targets)) <= AT_ONCE_BYTES

    def inspected(self, now: Selection, wish: Settings) -> Inspection | None:
        """The inspection of a selection for the dtype that is wished, if it is known."""
        return self._known(self._inspection_key(now, wish))

    def inspect(self, now: Selection, wish: Settings) -> Work[Inspection]:
        """Inspect a selection, once for these checkpoints and this dtype; yields Progress."""
        return self._once(self._inspection_key(now, wish), lambda pivot, targets: inspect(
            pivot, targets, dtype=wish.dtype or None, allow_nonfinite=wish.allow_nonfinite), now)

    def sampled(self, now: Selection) -> Preview | None:
        """The estimate of a selection's variation, if there is one."""
        return self._known(("preview", *self._stamps(now)))

    def sample(self, now: Selection) -> Work[Preview]:
        """Estimate a selection's variation within a second or two; yields Progress."""
        return self._once(("preview", *self._stamps(now)), lambda pivot, targets: preview(pivot, targets, seconds=SAMPLING_S), now)

    def measure(self, now: Selection) -> Work[Variation]:
        """Measure a selection as Studio does, once at a time."""
        turn = self._turn(("measure", *self._stamps(now)))
        yield from _wait(turn)
        try:
            return (yield from self._studio.measure(now))
        finally:
            turn.release()

    def measuring(self, now: Selection) -> bool:
        """Whether somebody measures this selection now."""
        return self._turn(("measure", *self._stamps(now))).locked()

    def _once(self, key: Hashable, work: Callable[..., Work[Found]], now: Selection) -> Work[Found]:
        turn = self._turn(key)
        yield from _wait(turn)
        try:
            found = self._known(key)
            if found is None:
                pivot, *targets = (self._studio.checkpoint(one) for one in (now.pivot, *now.targets))
                try:
                    found = yield from work(pivot, targets)
                finally:
                    for model in (pivot, *targets):
                        model.close()
                self._keep(key, found)
            return found
        finally:
            turn.release()

    def _stamps(self, now: Selection) -> tuple[str, ...]:
        return tuple(self._studio.checkpoint(key).stamp for key in (now.pivot, *now.targets))

    def _inspection_key(self, now: Selection, wish: Settings) -> tuple:
        return "inspection", wish.dtype, wish.allow_nonfinite, *self._stamps(now)

    def _turn(self, key: Hashable) -> threading.Lock:
        with self._lock:
            while len(self._turns) > 4 * _KEPT and (idle := next((k for k, t in self._turns.items() if not t.locked()), None)):
                del self._turns[idle]
            return self._turns.setdefault(key, threading.Lock())

    def _known(self, key: Hashable):
        with self._lock:
            return self._kept.get(key)

    def _keep(self, key: Hashable, found: object) -> None:
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)


class Stops:
    """Long work that visitors can stop, by session; unlike with Gradio's `cancels=` the work has the last word on the page."""

    def __init__(self):
        self._events: dict[threading.Event, str] = {}

    def drive(self, work: Work[Found], session: str | None) -> Work[Found]:
        """Run work until this session stops it, which raises Stopped."""
        event = threading.Event()
        self._events[event] = session or ""
        try:
            while not event.is_set():
                yield next(work)
            raise Stopped("stopped")
        except StopIteration as end:
            return end.value
        finally:
            work.close()
            del self._events[event]

    def stop(self, request: gr.Request) -> None:
        """Ask everything of this visitor to stop at its next step."""
        for event, session in tuple(self._events.items()):
            if session == (request.session_hash or ""):
                event.set()


def paced(work: Work[Found]) -> Work[Found]:
    """The same work with few enough Progress for a page: each that is yielded there is an event with all its outputs."""
    shown = float("-inf")
    try:
        while True:
            progress = next(work)
            if time.monotonic() >= shown + PACE_S:
                shown = time.monotonic()
                yield progress
    except StopIteration as end:
        return end.value
    finally:
        work.close()


def watched(work: Work[Found], drawn: Callable[[Found], str]) -> Iterator[tuple[str, bool]]:
    """Long work as HTML and whether it still runs: a bar, then what was found, what went wrong, or that it was stopped."""
    work = paced(work)
    try:
        while True:
            yield bar(next(work)), True
    except StopIteration as end:
        yield drawn(end.value), False
    except Stopped:
        yield note("warning", "Stopped."), False
    except FusionError as error:
        yield error_note(str(error)), False
    finally:
        work.close()


def _wait(turn: threading.Lock) -> Work[None]:
    """Wait for a turn without becoming deaf to Stop."""
    while not turn.acquire(timeout=_WAKE_S):
        yield Progress("Waiting for the same look of somebody else")
