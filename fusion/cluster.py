"""The same merge on many processes or machines: every shard of the result is one Ray task that writes it where it belongs.

    result = finish(merge_on_ray(Recipe("/shared/pivot", ("/shared/a", "/shared/b")), "/shared/merged", address="auto"))

Models and output lie on a file system that all machines share; only small plain data travels between them. A worker that dies
is replaced and writes the same bytes again. Price: Ray (`pip install ray`); no more tasks at once than the result has shards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from fusion import compiled
from fusion.errors import CheckpointError, FusionError, ResourceError
from fusion.merge import Computed, MergeResult, collect, merge_tensor
from fusion.plan import MergePlan
from fusion.progress import Meter, Progress, Work
from fusion.recipe import Recipe
from fusion.shards import MAX_SHARD_BYTES, Shard, Slot, disk_error
from fusion.stages import merge_stages
from fusion.variation import TensorSums, Variation, gather, sum_tensor
from fusion.writer import CheckpointWriter

RETRIES = 3  # of a task whose worker died
_MEASURED_AT_ONCE = 256_000_000  # bytes that one measuring task reads
_POLL_S, _PATIENCE_S = 0.5, 10.0
_STOP = "stopped"  # name of the file that says so


def merge_on_ray(recipes: Recipe | Sequence[Recipe], out: str | os.PathLike, *, max_shard_bytes: int = MAX_SHARD_BYTES,
                 resume: bool = False, flush: bool = True, address: str | None = None) -> Work[MergeResult]:
    """Run a recipe, or the stages of a recipe file, as tasks of a Ray cluster; yields Progress, returns the MergeResult.

    `address` of the cluster ("auto": the one this machine belongs to; default: $RAY_ADDRESS, else one that is started here and
    stopped at the end; a session that is open already is used as it is). The bytes are those of `merge`. Raises what `merge`
    raises, ResourceError when Ray is not installed or not to be reached, and when workers die again and again.
    """
    stages = (recipes,) if isinstance(recipes, Recipe) else tuple(recipes)
    ray = _ray()
    with _session(ray, address or os.environ.get("RAY_ADDRESS")):
        return (yield from merge_stages(stages, out, max_shard_bytes=max_shard_bytes, resume=resume, flush=flush,
                                        engine=partial(_compute, ray)))


@dataclass(frozen=True)
class Job:
    """What a task needs to open the plan by itself; `digest` is how it knows that it sees the same files."""

    recipe: Recipe
    places: Mapping[str, str]
    out: Path
    folder: Path
    digest: str


class ShardSink:
    """Takes the tensors of one shard, see `merge.Sink`."""

    def __init__(self, shard: Shard):
        self._shard, self._slots = shard, {slot.name: slot for slot in shard.slots}
        self.todo, self.finished = tuple(self._slots), {}

    def write(self, name: str, start: int, stored: np.ndarray | bytes) -> None:
        """See merge.Sink."""
        self._shard.write(self._slots[name], start, stored)

    def done(self, name: str, notes: Mapping) -> None:
        """See merge.Sink."""
        self.finished[name] = notes


class StopFile:
    """Stands for a threading.Event that is set on another machine: by a file, or by removing the folder it would lie in.

    Ray's own cancelling can end the process that cancels when the task ends at that moment (Ray 2.60).
    """

    def __init__(self, folder: Path):
        self._folder, self._next = folder, 0.0

    def set(self) -> None:
        """Tell all who look."""
        with contextlib.suppress(OSError):
            (self._folder / _STOP).touch()

    def is_set(self) -> bool:
        """Look, at most five times a second."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 0.2
        return not self._folder.exists() or (self._folder / _STOP).exists()


# ── what the workers do ──────────────────────────────────────────────────────────────────────────────────────────────

_plans: dict[str, MergePlan] = {}  # of this worker process, by digest


def _plan(job: Job) -> MergePlan:
    if job.digest not in _plans:
        plan = MergePlan.open(job.recipe, None, job.places, in_memory=False)
        if plan.digest != job.digest:
            raise CheckpointError("other files lie under these paths there, or they have changed", where=socket.gethostname(),
                                  todo="Put models and output on a file system that all machines share.")
        compiled.prepare(plan.report.bytes_read)
        while _plans:
            _plans.popitem()[1].close()
        _plans[job.digest] = plan
    return _plans[job.digest]


def _write_shard(job: Job, file: str, header: bytes, slots: Sequence[Slot], ratios: np.ndarray | None) -> Mapping[str, Mapping]:
    """Merge the tensors of one shard into its file; returns their notes. Doing it twice gives the same bytes."""
    plan, shard = _plan(job), Shard(job.folder / file, header, slots)
    sink, stop = ShardSink(shard), StopFile(job.folder)
    try:
        shard.open()
        for name in sink.todo:
            merge_tensor(plan, name, sink, stop, ratios)
        shard.seal()
    except OSError as error:
        raise disk_error(error, job.out) from error
    finally:
        shard.close()
    return sink.finished


def _sum_tensors(job: Job, names: Sequence[str]) -> dict[str, TensorSums]:
    """Measure some tensors."""
    plan, stop = _plan(job), StopFile(job.folder)
    return {name: sum_tensor(name, plan.pivot, plan.targets, stop, plan.per_element, plan.recipe.allow_nonfinite)
            for name in names}


# ── what this process does ───────────────────────────────────────────────────────────────────────────────────────────

def _compute(ray: ModuleType, plan: MergePlan, writer: CheckpointWriter, variation: Variation | None = None) -> Work[Computed]:
    """As `merge.compute`, by tasks."""
    places = dict(zip((plan.recipe.pivot, *plan.recipe.targets), map(_absolute, plan.refs), strict=True))
    job = Job(plan.recipe, places, writer.out, writer.folder, plan.digest)
    if plan.pools_tensors and variation is None:
        variation = yield from _measure(ray, plan, job)
    ratios = ray.put(plan.ratios(variation) if plan.measured and variation is not None else None)
    notes = dict(writer.finished)
    sizes = {name: plan.read_bytes(name) + plan.output_bytes(name) for name in writer.slots}
    meter = Meter("Merging", len(sizes), "tensors", sum(sizes.values()))
    yield meter.step(len(notes), sum(sizes[name] for name in notes))
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_write_shard)
    tasks = {task.remote(job, file, writer.headers[file], slots, ratios): file
             for file, slots in writer.files.items() if not all(slot.name in notes for slot in slots)}

    def adopt(file: str, made: Mapping[str, Mapping]) -> Progress:
        writer.adopt(file, made)
        notes.update(made)
        return meter.step(len(made), sum(sizes[name] for name in made), file)

    yield from _gather(ray, tasks, adopt, meter, StopFile(job.folder))
    return collect(plan, notes, variation)


def _measure(ray: ModuleType, plan: MergePlan, job: Job) -> Work[Variation]:
    """As `variation.measure`, by tasks."""
    names = plan.weights.names
    sizes = {name: sum(model.info[name].nbytes for model in plan.models) for name in names}
    meter = Meter("Measuring variation", len(names), "tensors", sum(sizes.values()))
    yield meter.step()
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_sum_tensors)
    tasks = {task.remote(job, part): part for part in _parts(sizes, _MEASURED_AT_ONCE)}
    sums: dict[str, TensorSums] = {}

    def take(part: Sequence[str], measured: Mapping[str, TensorSums]) -> Progress:
        sums.update(measured)
        return meter.step(len(part), sum(sizes[name] for name in part), part[-1])

    yield from _gather(ray, tasks, take, meter, StopFile(job.folder))
    return gather(plan.pivot, plan.targets, names, sums, plan.per_element)


def _parts(sizes: Mapping[str, int], nbytes: int) -> list[list[str]]:
    """The names in lists of about so many bytes."""
    parts: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if room <= 0:
            parts.append([])
            room = nbytes
        parts[-1].append(name)
        room -= size
    return parts


def _gather(ray: ModuleType, tasks: Mapping[object, object], take: Callable[[object, object], Progress],
            meter: Meter, stop: StopFile) -> Work[None]:
    """Hand every task's key and result to `take` as they come; `stop` is set for the rest when this is closed."""
    pending = list(tasks)
    try:
        while pending:
            ready, pending = ray.wait(pending, timeout=_POLL_S)
            for done in ready:
                yield take(tasks[done], _result(ray, done))
            if not ready:
                yield meter.step()  # so that Stop is heard
    finally:
        if pending:
            stop.set()
            ray.wait(pending, num_returns=len(pending), timeout=_PATIENCE_S)


def _result(ray: ModuleType, task: object) -> object:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FusionError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ResourceError(f"workers died again and again ({type(error).__name__})", where="Ray",
                            todo="See that the machines have enough memory; smaller shards need no less.") from error


def _absolute(ref: str) -> str:
    """A model's path as other machines find it; names of the Hub stay as they are."""
    return "+".join(os.path.abspath(part) if os.path.exists(part) else part for part in ref.split("+"))


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ResourceError("Ray is not installed",
                            todo="Install it with `pip install ray`, or merge without --engine ray.") from error
    return ray


@contextlib.contextmanager
def _session(ray: ModuleType, address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    here = {"include_dashboard": False, "object_store_memory": 100_000_000}
    there = {"runtime_env": {"py_modules": [str(Path(__file__).parent)]}}  # workers elsewhere run this very code
    mine = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address or "")
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **(there if address else here))
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ResourceError(f"the cluster cannot be reached ({error})", where=address or "Ray",
                            todo="Start it with `ray start --head`, or leave the address out.") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, mine)  # Ray has put its own there, which ends without cleaning up
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """OSError at once when nobody listens at HOST:PORT; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
