"""Make the whole family: two models at a time, each in a process of its own, targets after their pivot."""

from __future__ import annotations

import multiprocessing
import queue
import shutil
import time
import traceback
from collections.abc import Sequence
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

from fusion.demo.cards import write_cards
from fusion.demo.family import FAMILY, RECIPES
from fusion.errors import CheckpointError, OutputError, RecipeError, nearest
from fusion.progress import Progress, Work

AT_ONCE = 2
REPORT_EVERY_STEPS = 20


def train(out: Path, only: Sequence[str] = (), seed: int = 0, steps_scale: float = 1.0) -> Work[list[Path]]:
    """Make the family, or `only` the named models, as folders under `out`; the same seed gives the same weights.

    Each folder appears whole or not at all. When the family is complete and trained in full, it is measured and the
    model cards show the accuracies. Raises OutputError if a folder exists, CheckpointError if a target has no pivot.
    """
    out = Path(out)
    names = _plan(out, only)
    out.mkdir(parents=True, exist_ok=True)
    steps = {name: max(1, round(RECIPES[name].steps * steps_scale)) for name in names}
    crew = _Crew(out, seed, steps_scale)
    began = time.perf_counter()
    try:
        waiting = list(names)
        done = dict.fromkeys(names, 0)
        while waiting or crew.running:
            crew.hire(waiting)
            name, count, note = crew.hear()
            done[name] = max(done[name], count)
            yield Progress("training", sum(done.values()), sum(steps.values()), "steps",
                           seconds=time.perf_counter() - began, note=f"{name} {note}")
    finally:
        crew.dismiss()
    yield from write_cards(out, measure=steps_scale >= 1 and all((out / member.name).is_dir() for member in FAMILY))
    return [out / name for name in names]


def _plan(out: Path, only: Sequence[str]) -> list[str]:
    """The names to train, in the family's order; refuse what cannot work before any work is done."""
    known = [member.name for member in FAMILY]
    for name in only:
        if name not in known:
            raise RecipeError(f"no model {name!r} in the demo family", todo=nearest(name, known))
    names = [name for name in known if not only or name in only]
    for name in names:
        if (out / name).exists():
            raise OutputError("the folder exists", where=str(out / name),
                              todo="Choose another folder or remove this one.")
        start = RECIPES[name].start
        if start and start not in names and not (out / start).is_dir():
            raise CheckpointError(f"{name} continues from {start}, which is not there", where=str(out),
                                  todo=f"Train {start} too.")
    return names


class _Crew:
    """At most AT_ONCE worker processes that train one model each and report through a queue."""

    def __init__(self, out: Path, seed: int, steps_scale: float):
        self.out, self.seed, self.steps_scale = out, seed, steps_scale
        self.context: SpawnContext = multiprocessing.get_context("spawn")
        self.reports = self.context.Queue()
        self.running: dict[str, SpawnProcess] = {}

    def hire(self, waiting: list[str]) -> None:
        """Start the next models whose beginning is there, and take them from the list."""
        for name in list(waiting):
            start = RECIPES[name].start
            if len(self.running) < AT_ONCE and (start is None or (self.out / start).is_dir()):
                waiting.remove(name)
                process = self.context.Process(
                    target=_make, args=(name, self.out, self.seed, self.steps_scale, self.reports), daemon=True)
                process.start()
                self.running[name] = process

    def hear(self) -> tuple[str, int, str]:
        """Wait for the next report: which model, how many steps, what to say. A worker's failure is raised here."""
        while True:
            try:
                name, count, note, failure = self.reports.get(timeout=2)
                break
            except queue.Empty:
                for name, process in self.running.items():
                    if process.exitcode:
                        raise RuntimeError(f"the process for {name} ended with code {process.exitcode}") from None
        if failure:
            raise RuntimeError(f"training {name} failed:\n{failure}")
        if note == "done":
            self.running.pop(name).join()
        return name, count, note

    def dismiss(self) -> None:
        """End the workers that still run and remove what they had begun."""
        for name, process in self.running.items():
            process.terminate()
            process.join()
            shutil.rmtree(_partial(self.out, name), ignore_errors=True)
        self.reports.close()


def _partial(out: Path, name: str) -> Path:
    return out / f".{name}.partial-train"


def _make(name: str, out: Path, seed: int, steps_scale: float, reports: multiprocessing.Queue) -> None:
    """The worker: train one model into a hidden sibling, then let it appear under its name."""
    try:
        from fusion.demo.fit import fit

        recipe, hidden, last = RECIPES[name], _partial(out, name), 0
        shutil.rmtree(hidden, ignore_errors=True)
        for progress in fit(recipe, hidden, out / recipe.start if recipe.start else None, seed, steps_scale):
            last = progress.done
            if last % REPORT_EVERY_STEPS == 0:
                reports.put((name, last, progress.note, None))
        hidden.rename(out / name)
        reports.put((name, last, "done", None))
    except BaseException:
        reports.put((name, 0, "", traceback.format_exc()))
        raise
