"""Several pieces of long work at once, each in a process of its own that reports through one queue.

Every process computes on one thread: for models this small two processes do twice as much as two threads, and the same seed
gives the same weights.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Mapping

from fusion.progress import Progress, Work

AT_ONCE = 2
Job = tuple[Callable[..., Work], tuple]
_EVERY_S = 0.5  # between two reports of a job


def together(jobs: Mapping[str, Job], stage: str) -> Work[dict[str, object]]:
    """Run `jobs` (name → a function that makes the work, and its arguments), AT_ONCE at a time; returns name → result.

    Functions, arguments and results must be picklable. A job's failure ends all others and is raised here with its
    traceback. Closing the generator ends the processes.
    """
    context, began = multiprocessing.get_context("spawn"), time.perf_counter()
    reports, waiting, running, parts, results = context.Queue(), list(jobs), {}, dict.fromkeys(jobs, 0.0), {}
    try:
        while len(results) < len(jobs):
            while waiting and len(running) < AT_ONCE:
                name = waiting.pop(0)
                process = context.Process(target=_work, args=(name, *jobs[name], reports), daemon=True)
                process.start()
                running[name] = process
            name, kind, said = _hear(reports, running)
            if kind == "failed":
                raise RuntimeError(f"{name} failed:\n{said}")
            if kind == "done":
                results[name] = said
                parts[name] = 1.0
                running.pop(name).join()
            else:
                parts[name] = max(parts[name], said.fraction)
            note = "done" if kind == "done" else f"{said.stage} {said.note}".strip()
            yield Progress(stage, round(100 * sum(parts.values())), 100 * len(jobs), "%", seconds=time.perf_counter() - began,
                           note=f"{name}: {note}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
        reports.close()
    return results


def _hear(reports: multiprocessing.Queue, running: Mapping) -> tuple[str, str, object]:
    """Wait for the next report; RuntimeError when a process ended without a word."""
    while True:
        try:
            return reports.get(timeout=2)
        except queue.Empty:
            for name, process in running.items():
                if process.exitcode:
                    raise RuntimeError(f"the process for {name} ended with code {process.exitcode}") from None


def _work(name: str, make: Callable[..., Work], arguments: tuple, reports: multiprocessing.Queue) -> None:
    try:
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)
        last, work = 0.0, make(*arguments)
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                reports.put((name, "done", end.value))
                return
            if time.perf_counter() - last > _EVERY_S:
                last = time.perf_counter()
                reports.put((name, "progress", progress))
    except BaseException:
        reports.put((name, "failed", traceback.format_exc()))
        raise
