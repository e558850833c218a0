"""fusion.cluster: tasks on two workers write the bytes that one process writes; dead workers are replaced; Stop leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fusion import cluster as module
from fusion.__main__ import main
from fusion.cluster import Job, StopFile, merge_on_ray
from fusion.errors import CheckpointError, FusionError, ResourceError, Stopped
from fusion.header import read_header
from fusion.merge import merge
from fusion.plan import MergePlan
from fusion.progress import Meter, finish
from fusion.recipe import Recipe, Slice
from fusion.shards import Shard, plan_shards
from fusion.stages import merge_stages
from tests.conftest import save_checkpoint, snapshot

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parent.parent
SHARD_BYTES = 70_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two machines with one processor each, as far as Ray can tell; this process is connected to it."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=options)
    made.add_node(**{name: value for name, value in options.items() if name != "include_dashboard"})
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made.address
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in memory where there is one: the file system that all workers share."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def models(folder: Path, shape: tuple[int, int], layers: int, sick: bool = False) -> dict:
    """A pivot and two targets; the words of a Recipe that name them."""
    random = np.random.default_rng(0)
    for name in ("pivot", "a", "b"):
        tensors = {f"model.layers.{i}.mlp.{part}_proj.weight": random.normal(size=shape).astype(np.float32)
                   for i in range(layers) for part in ("up", "down")}
        if sick and name == "b":
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
        save_checkpoint(folder / name, {**tensors, "count": np.arange(5), "model.norm.weight": random.normal(size=3)})
    return {"pivot": str(folder / "pivot"), "targets": (str(folder / "a"), str(folder / "b"))}


@pytest.fixture
def small(shared) -> dict:
    return models(shared, (64, 128), 3)


@pytest.fixture
def large(shared) -> dict:
    """So large that a task can be met while it works; by a slow method."""
    return {**models(shared, (1500, 1500), 3), "method": "della", "options": {"density": 0.5}}


LARGE_SHARD_BYTES = 10_000_000  # one tensor of 9 MB in each


def on_ray(recipe: Recipe, out: Path, max_shard_bytes: int = SHARD_BYTES, **options):
    return merge_on_ray(recipe, out, max_shard_bytes=max_shard_bytes, **options)


SETTINGS = [{}, {"granularity": "model"}, {"granularity": "parameter"}, {"method": "linear", "weights": (1, 3)},
            {"method": "dare_ties", "options": {"density": 0.5}, "seed": 7}, {"dtype": "bfloat16", "exclude": ("*norm*",)},
            {"method": "passthrough", "slices": (Slice({"a": (0, 2)}), Slice({"b": (1, 3)}))}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: json.dumps(settings, default=str)[:60])
def test_the_bytes_are_those_of_one_process(address, small, shared, monkeypatch, settings):
    recipe = Recipe(**small, **settings)
    finish(merge(recipe, shared / "local", max_shard_bytes=SHARD_BYTES))
    monkeypatch.setattr(module, "merge_tensor", lambda *_: pytest.fail("this process did the work"))
    monkeypatch.setattr(module, "sum_tensor", lambda *_: pytest.fail("this process did the work"))
    shown = []
    result = finish(on_ray(recipe, shared / "out"), shown.append)
    assert snapshot(shared / "out") == snapshot(shared / "local") and len(list((shared / "out").glob("*.safetensors"))) > 1
    assert result.folder == shared / "out" and result.finite
    stages = list(dict.fromkeys(progress.stage for progress in shown))
    assert stages[:-1] == (["Measuring variation", "Merging"] if settings.get("granularity") == "model" else ["Merging"])
    last = [progress for progress in shown if progress.stage == "Merging"][-1]
    assert last.done == last.total and last.bytes_done == last.bytes_total
    assert sorted(os.listdir(shared)) == ["a", "b", "local", "out", "pivot"]


def test_stages_and_relative_paths(address, small, shared, monkeypatch):
    monkeypatch.chdir(shared)
    stages = (Recipe("pivot", ("a",), name="first", method="linear"), Recipe("first", ("b",), granularity="model"))
    finish(merge_stages(stages, "local", max_shard_bytes=SHARD_BYTES))
    finish(merge_on_ray(stages, "out", max_shard_bytes=SHARD_BYTES))
    assert snapshot(shared / "out") == snapshot(shared / "local")
    assert sorted(os.listdir(shared)) == ["a", "b", "local", "out", "pivot"]


# ── workers that die ─────────────────────────────────────────────────────────────────────────────────────────────────

def busy_workers() -> list[int]:
    """Process ids of the workers that are writing a shard right now."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(b"ray::_write_shard"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def meanwhile(work: Callable[[], bool]) -> threading.Thread:
    """Try `work` in a thread until it says that it is done."""
    def repeat() -> None:
        end = time.monotonic() + 60
        while not work() and time.monotonic() < end:
            time.sleep(0.002)

    thread = threading.Thread(target=repeat)
    thread.start()
    return thread


def kill_one(killed: list[int]) -> bool:
    for worker in busy_workers()[:1]:
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)
    return bool(killed)


def test_a_worker_that_is_killed_is_replaced(address, large, shared):
    recipe, killed = Recipe(**large), []
    finish(merge(recipe, shared / "local", max_shard_bytes=LARGE_SHARD_BYTES))
    killer = meanwhile(lambda: kill_one(killed))
    finish(on_ray(recipe, shared / "out", LARGE_SHARD_BYTES))
    killer.join()
    assert len(killed) == 1 and snapshot(shared / "out") == snapshot(shared / "local")


def test_workers_that_die_again_and_again_are_an_error_for_people(address, large, shared, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 0)
    before, killed = sorted(os.listdir(shared)), []
    killer = meanwhile(lambda: kill_one(killed))
    with pytest.raises(ResourceError, match="workers died again and again"):
        finish(on_ray(Recipe(**large), shared / "out", LARGE_SHARD_BYTES))
    killer.join()
    assert sorted(os.listdir(shared)) == before


def test_stop_leaves_nothing_and_ends_the_tasks(address, large, shared):
    before = sorted(os.listdir(shared))
    for _ in range(10):
        work = on_ray(Recipe(**large), shared / "new/out", LARGE_SHARD_BYTES)
        try:
            next(work)
            while not busy_workers():
                next(work)
            break
        except StopIteration:  # it ended before a worker was seen at work
            shutil.rmtree(shared / "new")
    else:
        pytest.fail("no merge could be stopped midway")
    work.close()
    assert sorted(os.listdir(shared)) == before
    assert not busy_workers()


def test_tasks_that_nobody_waits_for_end_soon(small, shared):
    class Idle:
        """A Ray that never gets anything done."""

        def wait(self, pending, **_):
            return [], list(pending)

    plan = MergePlan.open(Recipe(**small))
    job = Job(plan.recipe, {}, shared / "out", shared / "hidden", plan.digest)
    headers, slots = plan_shards(plan.outputs(), 10**9)
    job.folder.mkdir()
    shard = Shard(job.folder / "model.safetensors", headers["model.safetensors"], tuple(slots.values()))
    shard.make()
    shard.close()
    stop = StopFile(job.folder)
    work = module._gather(Idle(), {"task": "key"}, pytest.fail, Meter("Merging"), stop)
    next(work)
    assert not StopFile(job.folder).is_set()
    work.close()
    assert StopFile(job.folder).is_set() and StopFile(shared / "gone").is_set()
    for task in (lambda: module._write_shard(job, "model.safetensors", shard.header, shard.slots, None),
                 lambda: module._sum_tensors(job, plan.weights.names)):
        with pytest.raises(Stopped):
            task()
    with pytest.raises(CheckpointError, match="never finished"):
        read_header(shard.path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_command_that_is_ended_midway(address, large, shared, number, status):
    recipe = Recipe(**large)
    (shared / "x.yaml").write_text(recipe.to_yaml())
    finish(merge(recipe, shared / "local", max_shard_bytes=LARGE_SHARD_BYTES))
    argv = ["merge", "x.yaml", "--out", "new/out", "--max-shard-gb", "0.01", "--engine", "ray", "--ray-address", address]
    before, journal = sorted(os.listdir(shared)), shared / "new/.out.journal"
    with subprocess.Popen([sys.executable, "-m", "fusion", *argv], cwd=shared, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while not journal.exists() or len(journal.read_text().splitlines()) < 3:  # two shards are finished
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate()
    assert (process.returncode, "Traceback" in err) == (status, False), err
    if number == signal.SIGTERM:
        assert sorted(os.listdir(shared)) == before
    else:  # what the cluster had finished, one process can continue
        shown = []
        finish(merge(recipe, shared / "new/out", max_shard_bytes=LARGE_SHARD_BYTES, resume=True), shown.append)
        assert shown[0].done >= 2 and os.listdir(shared / "new") == ["out"]
        assert snapshot(shared / "new/out") == snapshot(shared / "local")


# ── what can be wrong ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("settings", [{}, {"granularity": "layer"}])
def test_what_a_worker_finds_is_told_as_it_is_here(address, shared, settings):
    recipe = Recipe(**models(shared, (64, 128), 3, sick=True), **settings)
    said = []
    for run in (merge, merge_on_ray):
        with pytest.raises(CheckpointError) as caught:
            finish(run(recipe, shared / "new/out"))
        said.append((str(caught.value), caught.value.where, caught.value.todo))
    assert said[0] == said[1] and "holds 1 values that are NaN or Inf" in said[0][0]
    assert not (shared / "new").exists()


def test_a_recipe_that_does_not_fit_is_refused_before_any_task(address, small, shared):
    for work in (on_ray(Recipe(**small, exclude=("lairs.*",)), shared / "out"), on_ray(Recipe(**small), shared / "pivot")):
        with pytest.raises(FusionError):
            finish(work)
    assert sorted(os.listdir(shared)) == ["a", "b", "pivot"]


def test_a_worker_that_sees_other_files_says_so(small, shared):
    with pytest.raises(CheckpointError, match="other files lie under these paths"):
        module._plan(Job(Recipe(**small), {}, shared / "out", shared, "another digest"))


def test_a_shard_that_was_never_made_is_an_error_for_people(small, shared):
    job = Job(Recipe(**small), {}, shared / "out", shared / "gone", MergePlan.open(Recipe(**small)).digest)
    with pytest.raises(FusionError, match="cannot be written"):
        module._write_shard(job, "model.safetensors", b"", (), None)


def test_without_ray_it_says_how_to_get_it(small, shared, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["merge", small["pivot"], *small["targets"], "--out", str(shared / "out"), "--engine", "ray"]) == 2
    assert "pip install ray" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["127.0.0.1:1", "nowhere.invalid:5", "127.0.0.1:99999999", "nonsense"])
def test_a_cluster_that_is_not_there_is_said_so_at_once(small, shared, monkeypatch, capsys, where):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def refuse(*_, **__):
        if where == "nonsense":
            raise ConnectionError("no such cluster")
        pytest.fail("Ray itself tries for minutes")

    monkeypatch.setattr(ray, "init", refuse)
    argv = ["merge", small["pivot"], *small["targets"], "--out", str(shared / "out"), "--engine", "ray", "--ray-address", where]
    assert main(argv) == 2
    assert f"{where}: the cluster cannot be reached" in capsys.readouterr().err
    assert sorted(os.listdir(shared)) == ["a", "b", "pivot"]
