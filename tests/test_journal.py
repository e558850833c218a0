"""fusion.journal and resuming: what a killed writer left is cleaned up or continued to the same bytes, and nothing else is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, OutputError
from fusion.journal import Journal, reclaimable_bytes
from fusion.writer import CheckpointWriter
from tests.conftest import CONFIG, snapshot

LAYOUT = [("small", "F32", (2,)), ("large", "F32", (6,)), ("second", "F32", (8,)), ("third", "F32", (4, 2)), ("none", "F32", (0,))]
VALUES = {name: np.arange(np.prod(shape), dtype=np.float32) + i for i, (name, _, shape) in enumerate(LAYOUT)}
NOTES = {"weights": [0.1, 1 / 3, float("inf")], "text": "ü\n"}
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def new(folder: Path, resume: bool = False, plan: str = "plan", layout: list = LAYOUT) -> CheckpointWriter:
    return CheckpointWriter(folder / "out", layout, 32, resume=resume, plan_digest=plan)


def fill(writer: CheckpointWriter, *names: str) -> None:
    for name in names:
        writer.write(name, 0, VALUES[name])
        writer.done(name, {**NOTES, "name": name})


def killed(work: Callable[[], object]) -> None:
    """Do the work in another process and kill that with signal 9 at its end."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def killed_after(folder: Path, *names: str, **options) -> Path:
    """A writer that was killed after these tensors were done and on the disk; returns its hidden folder."""
    def work() -> None:
        writer = new(folder, **options).__enter__()
        fill(writer, *names)
        writer._flush.shutdown()
    killed(work)
    return next(folder.glob(".out.partial-*"))


def whole(folder: Path) -> dict[str, bytes]:
    """What an uninterrupted writer makes."""
    with new(folder) as writer:
        fill(writer, *VALUES)
        writer.write_file("note.txt", "x")
        return snapshot(writer.finish())


def test_a_killed_writer_leaves_nothing_that_a_reader_takes_for_a_result(tmp_path):
    partial = killed_after(tmp_path, "small", "large", "second")
    assert not (tmp_path / "out").exists() and {path.name for path in tmp_path.iterdir()} == {".out.journal", partial.name}
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        Checkpoint(partial)
    (partial / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(partial / "model-00003-of-00003.safetensors", partial / "model.safetensors")
    with pytest.raises(CheckpointError, match="never finished"):
        Checkpoint(partial)


def test_the_next_writer_cleans_up(tmp_path):
    partial = killed_after(tmp_path, "small", "large")
    with new(tmp_path) as writer:
        assert not partial.exists() and writer.finished == {} and writer.todo[0] == "large"
        fill(writer, *VALUES)
        writer.finish()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("names", [(), ("small",), ("small", "large"), ("second",), ("small", "large", "second", "third", "none")])
def test_resuming_continues_at_the_last_finished_shard_to_the_same_bytes(tmp_path, names):
    expected = whole(tmp_path / "whole")
    partial = killed_after(tmp_path, *names)
    finished = {name for file in ({"small", "large"}, {"second"}, {"third", "none"}) if file <= set(names) for name in file}
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in partial.iterdir()}
    with new(tmp_path, resume=True) as writer:
        assert writer.finished == {name: {**NOTES, "name": name} for name in finished}
        assert set(writer.todo) == set(VALUES) - finished
        assert writer.folder == partial
        fill(writer, *writer.todo)
        writer.write_file("note.txt", "x")
        writer.finish()
    assert snapshot(tmp_path / "out") == expected and sorted(os.listdir(tmp_path)) == ["out", "whole"]
    kept = {writer.slots[name].file for name in finished}
    assert all((stat := (tmp_path / "out" / file).stat()) and (stat.st_ino, stat.st_mtime_ns) == before[file] for file in kept)


def test_tensors_are_asked_for_shard_by_shard_the_largest_first(tmp_path):
    with new(tmp_path) as writer:
        assert writer.todo == ("large", "small", "second", "third", "none")


def test_it_can_be_killed_and_resumed_many_times(tmp_path):
    expected = whole(tmp_path / "whole")
    for name in ("large", "small", "second", "third"):
        killed_after(tmp_path, name, resume=True)
    with new(tmp_path, resume=True) as writer:
        assert set(writer.finished) == {"second"}  # large and small were never both done
        fill(writer, *writer.todo)
        writer.write_file("note.txt", "x")
        assert snapshot(writer.finish()) == expected


@pytest.mark.parametrize("change", [{"plan": "another"}, {"layout": [*LAYOUT, ("more", "F32", (1,))]}])
def test_another_plan_cannot_be_resumed_and_harms_nothing(tmp_path, change):
    killed_after(tmp_path, "small", "large")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"begun with another recipe.*Begin again without --resume"), \
            new(tmp_path, resume=True, **change):
        pass
    assert snapshot(tmp_path) == before
    with new(tmp_path, resume=True) as writer:
        assert set(writer.finished) == {"small", "large"}


def test_a_stop_keeps_finished_shards_only_for_who_asked_to_resume(tmp_path):
    with new(tmp_path / "plain") as writer:
        fill(writer, "small", "large", "second")
    assert os.listdir(tmp_path) == []
    with new(tmp_path, resume=True) as writer:
        fill(writer, "second")
        writer._seals[SECOND].result()
    with new(tmp_path, resume=True) as writer:
        assert set(writer.finished) == {"second"}
    with new(tmp_path):
        pass
    with new(tmp_path, resume=True) as writer:
        assert writer.finished == {}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "header", "gone", "folder gone"])
def test_a_finished_shard_that_is_no_longer_whole_is_written_again(tmp_path, damage):
    expected = whole(tmp_path / "whole")
    partial = killed_after(tmp_path, "small", "large", "second")
    if damage == "cut":
        os.truncate(partial / FIRST, 100)
    elif damage == "header":
        with open(partial / FIRST, "r+b") as file:
            file.write(bytes(8))
    elif damage == "gone":
        (partial / FIRST).unlink()
    else:
        shutil.rmtree(partial)
    with new(tmp_path, resume=True) as writer:
        assert set(writer.finished) == (set() if damage == "folder gone" else {"second"})
        fill(writer, *writer.todo)
        writer.write_file("note.txt", "x")
        assert snapshot(writer.finish()) == expected


# ── two at once ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("resume", [False, True])
def test_a_second_writer_to_one_folder_is_refused_at_once(tmp_path, resume):
    expected = whole(tmp_path / "whole")
    with new(tmp_path) as writer:
        fill(writer, "small", "large")
        for _ in range(2):
            with pytest.raises(OutputError, match="out: another merge is writing there"), new(tmp_path, resume=resume):
                pass
        fill(writer, "second", "third")
        writer.write_file("note.txt", "x")
        assert snapshot(writer.finish()) == expected
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_a_writer_in_another_process_is_seen_while_it_lives(tmp_path):
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        new(tmp_path).__enter__()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.read(ready[0], 1)
    with pytest.raises(OutputError, match="another merge is writing there"), new(tmp_path):
        pass
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    with new(tmp_path) as writer:
        assert writer.todo
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_its_owner_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    real, first, calls = fcntl.flock, Journal(tmp_path / "out"), []
    first.take()

    def late(*args):
        calls.append(args)
        if len(calls) == 1:
            first.release()  # between the other's open and its lock
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Journal(tmp_path / "out")
    second.take()
    assert len(calls) == 2 and second.path.exists()
    monkeypatch.undo()
    with pytest.raises(OutputError, match="another merge"):
        Journal(tmp_path / "out").take()
    second.release()
    assert os.listdir(tmp_path) == []


def test_without_locks_a_journal_says_that_somebody_may_be_writing(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    words = r"or was killed\. If none is running, remove .*\.out\.journal"
    with new(tmp_path), pytest.raises(OutputError, match=words), new(tmp_path):
        pass
    with new(tmp_path) as writer:
        fill(writer, *VALUES)
        writer.finish()
    assert os.listdir(tmp_path) == ["out"]


def test_a_parent_that_another_writer_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    real, calls = Journal.take, []

    def take(self):
        calls.append(self)
        if len(calls) == 1:
            (tmp_path / "new").rmdir()
        return real(self)

    monkeypatch.setattr(Journal, "take", take)
    with new(tmp_path / "new") as writer:
        fill(writer, *VALUES)
        writer.finish()
    assert os.listdir(tmp_path / "new") == ["out"]


def test_parents_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputError, match="cannot be written"), new(tmp_path / "dangling"):
        pass
    assert os.listdir(tmp_path) == ["dangling"]


# ── only what is its own ─────────────────────────────────────────────────────────────────────────────────────────────

def test_folders_that_no_journal_names_are_never_touched(tmp_path):
    for name in (".out.partial-00000000", ".out.partial-mine", ".other.partial-00000000", "out.partial-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    before = snapshot(tmp_path)
    killed_after(tmp_path, "small")
    with new(tmp_path):
        pass
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", [
    "my diary\n", "{}\n", "[]\n", '{"format": "fusechat partial 1"}\n', '{"format": "fusechat partial 1", "token": "../../../x"}\n',
    '{"format": "fusechat partial 2", "token": "00000000"}\n', "\0\n", "[" * 10**5 + "\n"], ids=lambda text: text[:40])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / ".out.journal").write_text(content)
    (tmp_path / ".out.partial-00000000").mkdir()
    before = snapshot(tmp_path)
    for resume in (False, True):
        with pytest.raises(OutputError, match="it is no journal of a merge"), new(tmp_path, resume):
            pass
    assert snapshot(tmp_path) == before


@pytest.mark.timeout(10)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("precious")], ids=["pipe", "folder", "link"])
def test_what_is_no_file_is_refused_and_left_alone(tmp_path, make):
    (tmp_path / "precious").write_text("")
    make(tmp_path / ".out.journal")
    with pytest.raises(OutputError), new(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [".out.journal", "precious"] and (tmp_path / "precious").read_text() == ""
    assert reclaimable_bytes(tmp_path / "out") == 0


@pytest.mark.parametrize("tail", [
    b'{"shard": "model-0', b"\xff\xfe\n", b'{"shard": 5}\n{"shard": ["a"], "tensors": 5}\n', b"\0" * 50])
def test_a_journal_that_was_cut_counts_as_far_as_it_goes(tmp_path, tail):
    killed_after(tmp_path, "small", "large", "second")
    with open(tmp_path / ".out.journal", "ab") as file:
        file.write(tail)
    killed_after(tmp_path, "none", "third", resume=True)
    with new(tmp_path, resume=True) as writer:
        assert set(writer.finished) == set(VALUES)


def test_a_killed_merge_that_had_only_begun_leaves_an_empty_journal(tmp_path):
    killed(lambda: Journal(tmp_path / "out").take())
    assert snapshot(tmp_path) == {".out.journal": b""}
    with new(tmp_path, resume=True) as writer:
        fill(writer, *VALUES)
        writer.finish()
    assert os.listdir(tmp_path) == ["out"]


def test_a_hidden_folder_that_is_a_link_is_not_followed(tmp_path):
    partial = killed_after(tmp_path, "small", "large")
    shutil.rmtree(partial)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/x").write_text("x")
    partial.symlink_to("precious")
    for resume in (False, True):
        with new(tmp_path, resume):
            pass
    assert (tmp_path / "precious/x").read_text() == "x"


def test_what_can_be_reclaimed_is_counted(tmp_path):
    assert reclaimable_bytes(tmp_path / "out") == 0
    layout = [("a", "F32", (10**5,))]
    killed(lambda: new(tmp_path, layout=layout).__enter__())
    assert 4 * 10**5 <= reclaimable_bytes(str(tmp_path / "out")) < 5 * 10**5
    with new(tmp_path):
        pass
    assert reclaimable_bytes(tmp_path / "out") == 0
