"""Everything that can happen to a merge, tried: full disk, kill −9, changed sources, read errors, Stop at any moment.

Whatever it is, a folder under the final name is the whole result or does not exist.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, FusionError, OutputError, ResourceError
from fusion.merge import merge
from fusion.progress import finish
from fusion.recipe import Recipe
from tests.conftest import hear_interrupts, save_checkpoint, snapshot, tiny_tokenizer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(60)
LAYERS, SHARD_BYTES = 6, 40_000  # six shards of two tensors of 16 kB
GRANULARITIES = ["matrix", "model"]  # measured tensor by tensor, or all before the first is merged


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where that can be: flushing hundreds of merges to a busy disk takes minutes, and only here that is no loss."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", ignore_cleanup_errors=True) as folder:
        (here := Path(folder) / "here").mkdir()
        yield here


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with a pivot and two targets of twelve tensors; never written into."""
    folder, random = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for name in ("pivot", "a", "b"):
        save_checkpoint(folder / name, {f"model.layers.{i}.mlp.{part}_proj.weight": random.normal(size=(64, 64)).astype(np.float32)
                                        for i in range(LAYERS) for part in ("up", "down")})
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What uninterrupted merges make, by granularity."""
    out = tmp_path_factory.mktemp("whole")
    return {granularity: snapshot(finish(run(sources, out / granularity, granularity)).folder) for granularity in GRANULARITIES}


def run(sources: Path, out: Path, granularity: str = "matrix", **options):
    recipe = Recipe(str(sources / "pivot"), (str(sources / "a"), str(sources / "b")), granularity=granularity)
    return merge(recipe, out, max_shard_bytes=SHARD_BYTES, **options)


def nothing_is_left(folder: Path) -> bool:
    """Neither a result nor anything hidden, in this folder or in a new one below it."""
    return snapshot(folder) == {}


# ── kill −9 ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPWISE = """
import sys, threading
from fusion.merge import merge
from fusion.recipe import Recipe
permits, module = threading.Semaphore(1), sys.modules["fusion.merge"]
def paced(*args, real=module.merge_tensor):
    permits.acquire()
    return real(*args)
module.merge_tensor = paced  # else its threads run ahead
sources, out, granularity, shard_bytes, resume = sys.argv[1:]
recipe = Recipe(f"{sources}/pivot", (f"{sources}/a", f"{sources}/b"), granularity=granularity)
for progress in merge(recipe, out, max_shard_bytes=int(shard_bytes), resume=resume == "resume"):
    print(progress.stage, flush=True)
    sys.stdin.readline()
    permits.release()
"""


def records(out: Path) -> list[dict]:
    """What the journal of an output says of finished shards."""
    return [json.loads(line) for line in (out.parent / f".{out.name}.journal").read_text().splitlines()[1:]]


def wait_for(out: Path, shards: int) -> None:
    """Wait until so many finished shards are on the disk; another thread flushes them."""
    while len(records(out)) < shards:
        time.sleep(0.01)


def killed(sources: Path, out: Path, granularity: str, steps: int, resume: bool = False, shards: int | None = None) -> None:
    """Merge in another process and kill that after so many steps of "Merging", when so many shards are finished."""
    argv = [sys.executable, "-c", STEPWISE, sources, out, granularity, str(SHARD_BYTES), "resume" if resume else ""]
    sure = (steps - 1) // 2 - 1  # at most one shard is open beside the one that is filled
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while steps:
            steps -= process.stdout.readline().startswith("Merging")
            if steps:
                print(file=process.stdin, flush=True)
        wait_for(out, sure if shards is None else shards)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("steps", [1, 8, 13])
def test_kill_9_midway(sources, whole, tmp_path, granularity, steps):
    killed(sources, tmp_path / "out", granularity, steps)
    assert not (tmp_path / "out").exists()
    partial = next(tmp_path.glob(".out.partial-*"))
    with pytest.raises(CheckpointError):
        Checkpoint(partial)
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")
    finish(run(sources, tmp_path / "out", granularity))  # the next start cleans up
    assert snapshot(tmp_path / "out") == whole[granularity] and os.listdir(tmp_path) == ["out"]

    folder = tmp_path.parent / f"{tmp_path.name}-copy"
    noted = records(folder / "out")
    before = {record["shard"]: os.stat(next(folder.glob(".out.partial-*")) / record["shard"]) for record in noted}
    shown = []
    finish(run(sources, folder / "out", granularity, resume=True), shown.append)
    merging = [progress for progress in shown if progress.stage == "Merging"]
    assert merging[0].done == sum(len(record["tensors"]) for record in noted)
    assert snapshot(folder / "out") == whole[granularity] and os.listdir(folder) == ["out"]
    for file, stat in before.items():
        now = os.stat(folder / "out" / file)
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_killed_again_and_again_a_resumed_merge_arrives(sources, whole, tmp_path):
    for turn in (1, 2):
        killed(sources, tmp_path / "out", "matrix", 5, resume=True, shards=turn)
    done = []
    finish(run(sources, tmp_path / "out", resume=True), lambda progress: done.append(progress.done))
    assert done[0] >= 4 and snapshot(tmp_path / "out") == whole["matrix"] and os.listdir(tmp_path) == ["out"]


def test_resuming_with_a_source_that_changed_is_refused(sources, tmp_path):
    models = Path(shutil.copytree(sources, tmp_path / "models"))
    killed(models, tmp_path / "new/out", "matrix", 8)
    os.utime(models / "a/model.safetensors")
    with pytest.raises(OutputError, match="begun with another recipe, other models"):
        finish(run(models, tmp_path / "new/out", resume=True))
    finish(run(models, tmp_path / "new/out"))
    assert os.listdir(tmp_path / "new") == ["out"]


# ── Stop, Ctrl-C, SIGTERM ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_stop_at_every_step_leaves_nothing(sources, tmp_path, granularity):
    files, threads, steps = len(os.listdir("/proc/self/fd")), threading.active_count(), 0
    while True:
        work = run(sources, tmp_path / "new/out", granularity)
        if [None for _ in range(steps)] != [next(work) and None for _ in range(steps)]:
            break
        last = next(work, None)
        work.close()
        if last is None:
            break
        assert nothing_is_left(tmp_path), f"after {steps} steps"
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)
        steps += 1
    assert steps > 2 * LAYERS


SLOW = """
import os, runpy, shutil, sys, time
def slow(real, word, seconds):
    def call(*args, **options):
        print(word, flush=True)
        time.sleep(seconds)
        return real(*args, **options)
    return call
os.pwrite = slow(os.pwrite, "writing", 0.02)
shutil.rmtree = slow(shutil.rmtree, "removing", 0.5)
sys.argv[0] = "fusion"
runpy.run_module("fusion", run_name="__main__", alter_sys=True)
"""


def command(sources: Path, out: Path, *options: str) -> list[str]:
    return ["merge", str(sources / "pivot"), str(sources / "a"), str(sources / "b"), "--out", str(out), *options]


def signalled(argv: list[str], number: int, writes: int) -> tuple[int, str]:
    """Run the command, send it a signal after so many writes, and SIGTERM again while it cleans up.

    Returns its exit status and what it said."""
    with subprocess.Popen([sys.executable, "-c", SLOW, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, preexec_fn=hear_interrupts) as process:
        for _ in range(writes):
            process.stdout.readline()
        process.send_signal(number)
        if number == signal.SIGTERM and any("removing" in line for line in process.stdout):
            process.send_signal(number)
        _, err = process.communicate()
    return process.returncode, err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("writes", [1, 9])
def test_interrupted_and_terminated_commands_leave_nothing(sources, tmp_path, number, status, writes):
    code, err = signalled(command(sources, tmp_path / "new/out"), number, writes)
    assert (code, err.strip()) == (status, "stopped; nothing was left behind")
    assert nothing_is_left(tmp_path)


def test_a_terminated_command_that_may_be_resumed_keeps_what_is_finished(sources, tmp_path, capsys):
    big = ("--max-shard-gb", "0.001", "--dtype", "float32")
    code, err = signalled(command(sources, tmp_path / "out", "--resume", *big), signal.SIGTERM, 3)
    assert (code, err.strip()) == (143, "stopped; finished shards are kept for --resume")
    assert main(command(sources, tmp_path / "out", "--resume", *big)) == 0
    assert os.listdir(tmp_path) == ["out"] and "merged 12 tensors" in capsys.readouterr().out


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────

class Fails:
    """A system call that fails with `number` from call `after` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, after: int):
        self.real, self.number, self.left, self.calls = getattr(os, name), number, after, 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls > self.left:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **options)


@pytest.mark.parametrize("after", [0, 1, 5, 14])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync", "mkdir", "rename"])
def test_a_disk_that_fails_at_any_call_leaves_nothing(sources, tmp_path, monkeypatch, call, number, after):
    failing = Fails(monkeypatch, call, number, after)
    try:
        finish(run(sources, tmp_path / "new/out"))
    except (ResourceError, OutputError) as error:
        full = number in (errno.ENOSPC, errno.EDQUOT)
        assert isinstance(error, ResourceError) == full and ("the disk is full" in str(error)) == full
        monkeypatch.undo()
        assert nothing_is_left(tmp_path)
    else:
        assert failing.calls <= after or call == "fsync"  # the last flush is of a folder that has its name already


@pytest.fixture
def disk(tmp_path):
    """`disk("size=1m")` mounts a small disk of its own in memory; skipped where that is not allowed."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("this user may not mount a disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_too_small_is_refused_before_any_work(sources, disk):
    small = disk("size=100k")
    with pytest.raises(ResourceError, match="free"):
        finish(run(sources, small / "new/out"))
    assert nothing_is_left(small)


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_disk_that_others_fill_midway(sources, whole, disk, monkeypatch, steps, reserve):
    if not reserve:  # as on a file system that cannot reserve space
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    small = disk("size=400k")
    work = run(sources, small / "out")
    for _ in range(steps):
        next(work)
    with (small / "other").open("wb", buffering=0) as other, pytest.raises(OSError, match="No space"):
        while other.write(b"x" * 1000):
            pass
    with pytest.raises(ResourceError, match="the disk is full"):
        finish(work)
    assert os.listdir(small) == ["other"]
    (small / "other").unlink()
    finish(run(sources, small / "out"))
    assert snapshot(small / "out") == whole["matrix"]


def test_what_a_killed_merge_left_on_a_small_disk_does_not_stand_in_the_way_of_the_next(sources, whole, disk):
    small = disk("size=400k")
    killed(sources, small / "out", "matrix", 6)
    finish(run(sources, small / "out"))
    assert snapshot(small / "out") == whole["matrix"] and os.listdir(small) == ["out"]


def test_a_read_only_disk(sources, disk, capsys):
    frozen = disk("size=1m,ro")
    for out in (frozen / "out", frozen / "new/out"):
        assert main(command(sources, out)) == 2
        assert "cannot be written (Read-only file system)" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/out", "/proc/self/out", "/sys/out", "/dev/null/out"])
def test_places_where_nobody_can_write(sources, capsys, out):
    assert main(command(sources, Path(out))) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_without_permission(sources, tmp_path, capsys):
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert main(command(sources, tmp_path / "out")) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_files_that_may_not_grow_so_large(sources, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"File too large.*Make the shards smaller"):
            finish(run(sources, tmp_path / "new/out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert nothing_is_left(tmp_path)


def test_a_disk_that_is_full_keeps_what_is_finished_for_who_resumes(sources, whole, tmp_path, monkeypatch):
    real, tensors = os.pwrite, []

    def full(file: int, data: bytes, at: int) -> int:
        if len(data) == 16_384:
            tensors.append(at)
            if len(tensors) > 6:
                wait_for(tmp_path / "out", 1)
                time.sleep(0.1)  # until the writer knows what the disk knows
                raise OSError(errno.ENOSPC, "full")
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="what is finished is kept for --resume"):
        finish(run(sources, tmp_path / "out", resume=True))
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and records(tmp_path / "out")
    assert snapshot(finish(run(sources, tmp_path / "out", resume=True)).folder) == whole["matrix"]


# ── the sources ──────────────────────────────────────────────────────────────────────────────────────────────────────

def shrink(path: Path) -> None:
    os.truncate(path, 20_000)


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(range(64)))


def replace(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    change(path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize("what", [shrink, change, replace, os.unlink, lambda path: path.write_bytes(b"")],
                         ids=["shrinks", "changes", "is replaced", "goes away", "is emptied"])
@pytest.mark.parametrize("who", ["pivot", "b"])
@pytest.mark.parametrize("steps", [1, 5, 13])
def test_a_source_that_changes_midway(sources, tmp_path, what, who, steps):
    models = Path(shutil.copytree(sources, tmp_path / "models"))
    work = run(models, tmp_path / "new/out")
    for _ in range(steps):
        next(work)
    what(models / who / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors|" + who):
        finish(work)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("after", [0, 1, 20, 40])
def test_a_read_error_at_any_moment(sources, tmp_path, monkeypatch, granularity, after):
    work = run(sources, tmp_path / "new/out", granularity)
    next(work)
    readers = [Fails(monkeypatch, name, errno.EIO, after) for name in ("pread", "preadv")]
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error"):
        finish(work)
    assert any(reader.calls > after for reader in readers)
    assert nothing_is_left(tmp_path)


# ── two at once, and memory ──────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("steps", [1, 7])
def test_a_second_merge_to_one_folder_is_refused_at_once(sources, whole, tmp_path, capsys, steps):
    work = run(sources, tmp_path / "out")
    for _ in range(steps):
        next(work)
    for options in ((), ("--resume",)):
        assert main(command(sources, tmp_path / "out", *options)) == 2
        assert "another merge is writing there" in capsys.readouterr().err
    assert snapshot(finish(work).folder) == whole["matrix"] and os.listdir(tmp_path) == ["out"]
    assert main(command(sources, tmp_path / "out")) == 2 and "exists already" in capsys.readouterr().err


def together(count: int, work: Callable[[], object]) -> list[object]:
    """What `work` gave or raised in so many threads at once."""
    barrier, results = threading.Barrier(count), []

    def one() -> None:
        barrier.wait()
        try:
            results.append(work())
        except FusionError as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def test_of_many_merges_to_one_folder_one_arrives(sources, whole, tmp_path):
    for turn in range(3):
        out = tmp_path / str(turn) / "new/out"
        results = together(6, lambda out=out: finish(run(sources, out)))
        refused = [result for result in results if isinstance(result, FusionError)]
        assert len(refused) == 5, refused
        assert all("another merge" in str(error) or "exists already" in str(error) for error in refused)
        assert snapshot(out) == whole["matrix"] and os.listdir(out.parent) == ["out"]


def test_merges_into_one_new_parent_do_not_remove_it_for_each_other(sources, whole, tmp_path):
    stop = run(sources, tmp_path / "new/deep/stopped")
    next(stop)
    work = run(sources, tmp_path / "new/deep/out")
    next(work)
    stop.close()
    assert snapshot(finish(work).folder) == whole["matrix"]
    assert os.listdir(tmp_path / "new/deep") == ["out"]


def test_too_little_memory_is_predicted_and_refused(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["fusion.preflight"], "available_memory_bytes", lambda: 1_000_000)
    assert main(command(sources, tmp_path / "new/out")) == 2
    assert "of memory" in capsys.readouterr().err and nothing_is_left(tmp_path)


def test_memory_that_runs_out_midway(sources, tmp_path, monkeypatch, capsys):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(sys.modules["fusion.merge"], "sum_tensor", exhausted)
    assert main(command(sources, tmp_path / "new/out")) == 2
    assert "error: memory ran out" in capsys.readouterr().err and nothing_is_left(tmp_path)
