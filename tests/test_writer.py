"""fusion.writer: a folder appears whole, with safetensors that safetensors itself reads, or not at all."""

from __future__ import annotations

import errno
import json
import os
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fusion import writer as module
from fusion.errors import OutputError, ResourceError
from fusion.shards import Shard, plan_shards
from fusion.writer import CheckpointWriter
from tests.conftest import load_tensors, snapshot

VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.array(5, np.float32),
          "none": np.empty((0, 4), np.float32), "count": np.arange(3), "odd: \"ü\\\n": np.ones(7, np.float32)}
CODES = {"float32": "F32", "int64": "I64"}
LAYOUT = [(name, CODES[str(value.dtype)], value.shape) for name, value in VALUES.items()]


def fill(writer: CheckpointWriter) -> None:
    for name, value in VALUES.items():
        if value.size:
            writer.write(name, 0, np.ravel(value))


@pytest.mark.parametrize("limit", [10**9, 30, 1])
def test_safetensors_reads_what_was_written(tmp_path, limit):
    with CheckpointWriter(tmp_path / "out", LAYOUT, limit) as writer:
        fill(writer)
        writer.write_file("note.txt", "ü")
        assert writer.finish() == tmp_path / "out"
    got = load_tensors(tmp_path / "out")
    assert set(got) == set(VALUES)
    assert all(torch.equal(got[name], torch.from_numpy(value)) for name, value in VALUES.items())
    assert (tmp_path / "out/note.txt").read_bytes() == "ü".encode()
    assert os.listdir(tmp_path) == ["out"]


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path):
    tensors = [(f"t{i}", "F32", (10,)) for i in range(7)] + [("large", "F32", (100,))]
    with CheckpointWriter(tmp_path / "out", tensors, 100) as writer:
        for name, _, (n,) in tensors:
            writer.write(name, 0, np.zeros(n, np.float32))
        writer.finish()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * shape[0] for _, _, shape in tensors)
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors" and len(files) == 5
    for file in files:
        with safe_open(tmp_path / "out" / file, "np") as shard:
            inside = list(shard.keys())
            assert shard.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == file for name in inside)
            assert inside == ["large"] or sum(40 for _ in inside) <= 100


def test_a_single_shard_needs_no_index(tmp_path):
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        fill(writer)
        writer.finish()
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors"]


def test_positions_beyond_two_billion_elements_are_whole_numbers():
    slots = plan_shards([("a", "F32", (2**20, 2**12)), ("b", "BF16", (2,))], 10**15)[1]
    assert (slots["a"].nbytes, slots["b"].start - slots["a"].start) == (2**34, 2**34)


def test_blocks_of_many_threads_land_in_their_places(tmp_path):
    tensors = [(f"t{i}", "F32", (1000,)) for i in range(8)]

    def write(i: int) -> None:
        for start in range(900, -1, -100):
            writer.write(f"t{i}", start, np.arange(start, start + 100, dtype=np.float32) + i)

    with CheckpointWriter(tmp_path / "out", tensors, 9000) as writer:
        threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        writer.finish()
    got = load_tensors(tmp_path / "out")
    assert all(torch.equal(got[f"t{i}"], torch.arange(1000.) + i) for i in range(8))


# ── not at all ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_leaving_without_finish_leaves_nothing_not_even_new_parents(tmp_path):
    (tmp_path / "kept").mkdir()
    with CheckpointWriter(tmp_path / "kept/new/deep/out", LAYOUT) as writer:
        beside = [path.name[:13] for path in (tmp_path / "kept/new/deep").iterdir()]
        assert sorted(beside) == [".out.journal", ".out.partial-"]
        fill(writer)
    assert set(snapshot(tmp_path)) == {"kept"}


def test_an_unfinished_tensor_is_never_given_a_name(tmp_path):
    with pytest.raises(RuntimeError, match="a is incomplete"), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        writer.finish()
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(("name", "limit"), [("ENOSPC", 0), ("EDQUOT", 0), ("ENOSPC", 1)])
def test_a_full_disk_is_found_before_any_work_and_leaves_nothing(tmp_path, monkeypatch, name, limit):
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) > limit:
            raise OSError(getattr(errno, name), "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="the disk is full"), CheckpointWriter(tmp_path / "new/out", LAYOUT, 30):
        pytest.fail("it began to work")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_an_error_of_the_disk_midway_leaves_nothing(tmp_path, monkeypatch, call):
    real = getattr(os, call)
    calls = []

    def fail(*args):
        calls.append(args)
        if call == "pwrite" and len(calls) == 1:
            return real(*args)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / "new/out", LAYOUT) as writer:
        fill(writer)
        writer.finish()
    monkeypatch.undo()
    assert snapshot(tmp_path) == {}


def test_the_disk_works_while_a_shard_is_still_written_and_its_errors_count(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_BYTES", 20)
    flushed, fdatasync = [], os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: flushed.append(file) or fdatasync(file))
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        fill(writer)
        writer.finish()
    assert len(flushed) == 3 and set(load_tensors(tmp_path / "out")) == set(VALUES)  # a, then scalar and count, then odd

    def broken(file):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / "other", LAYOUT) as writer:
        fill(writer)
        writer.finish()
    assert not (tmp_path / "other").exists()


def test_without_flush_nothing_waits_for_the_disk_and_the_journal_promises_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_BYTES", 1)
    with CheckpointWriter(tmp_path / "out", LAYOUT, flush=False) as writer:
        for call in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, call, lambda file: pytest.fail("it waited"))
        fill(writer)
        assert not writer._journal.records
        writer.finish()
    monkeypatch.undo()
    assert set(load_tensors(tmp_path / "out")) == set(VALUES) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = snapshot(tmp_path)
    for out in ("out", "file", "dangling"):
        with pytest.raises(OutputError, match="exists already"), CheckpointWriter(tmp_path / out, LAYOUT):
            pass
    assert snapshot(tmp_path) == before


def test_a_folder_that_appeared_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(OutputError, match="appeared while"), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        fill(writer)
        (tmp_path / "out").mkdir()
        writer.finish()
    assert snapshot(tmp_path) == {"out": b""}


@pytest.mark.parametrize("out", ["file/out", "a" * 300, "b\0c"])
def test_a_path_that_cannot_be_is_refused(tmp_path, out):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / out, LAYOUT):
        pass
    assert set(snapshot(tmp_path)) == {"file"}


def test_two_writers_may_make_the_same_parent(tmp_path, monkeypatch):
    real = module.Path.mkdir

    def slow(path, *args, **options):
        if path.name == "new" and not path.exists():
            real(path)  # the other writer was faster
        return real(path, *args, **options)

    monkeypatch.setattr(module.Path, "mkdir", slow)
    with CheckpointWriter(tmp_path / "new/a", LAYOUT) as writer:
        fill(writer)
        writer.finish()
    assert set(snapshot(tmp_path)) == {"new", "new/a", "new/a/model.safetensors"}


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for finish in (True, False):
        with CheckpointWriter(tmp_path / str(finish), LAYOUT, 1) as writer:
            fill(writer)
            if finish:
                writer.finish()
    assert len(os.listdir("/proc/self/fd")) == before


# ── shards that another process writes ───────────────────────────────────────────────────────────────────────────────

def test_a_shard_written_elsewhere_is_taken_in_only_when_it_is_finished(tmp_path):
    tensors = [("a", "F32", (8,)), ("b", "F32", (8,))]
    with CheckpointWriter(tmp_path / "out", tensors, 40) as writer:
        file = writer.slots["a"].file
        shard = writer.shard(file)
        shard.open()
        shard.write(writer.slots["a"], 0, np.arange(8, dtype=np.float32))
        with pytest.raises(RuntimeError, match="is not the shard that was planned"):
            writer.adopt(file, {"a": {}})
        shard.seal()
        for notes in ({}, {"b": {}}, {"a": {}, "b": {}}):
            with pytest.raises(RuntimeError, match="is not the shard that was planned"):
                writer.adopt(file, notes)
        writer.adopt(file, {"a": {"note": 1}})
        writer.write("b", 0, np.ones(8, np.float32))
        writer.finish()
    assert torch.equal(load_tensors(tmp_path / "out")["a"], torch.arange(8.))
    assert os.listdir(tmp_path) == ["out"]


def test_a_shard_that_nobody_made_is_not_made_by_opening_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        Shard(tmp_path / "model.safetensors", b"", ()).open()
    assert snapshot(tmp_path) == {}


LOSSES = {"removed": os.remove, "cut": lambda path: os.truncate(path, os.path.getsize(path) - 1),
          "cut to its header": lambda path: os.truncate(path, 100), "emptied": lambda path: os.truncate(path, 0),
          "made longer": lambda path: os.truncate(path, 9999)}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("when", ["at the start", "half-way", "at the end"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("file", "limit"), [("model.safetensors", 10**9), (ONE, 60), (TWO, 60)])
def test_a_shard_that_is_lost_while_others_are_written_is_noticed(tmp_path, file, limit, loss, when):
    """Also one that is cut in the middle: what is written behind gives it its size again, with a hole."""
    with pytest.raises(OutputError, match=r"model.* was removed or changed while it was written"), \
            CheckpointWriter(tmp_path / "out", LAYOUT, limit) as writer:
        for moment, name in zip(("at the start", "half-way", "", ""), ("a", "scalar", "count", LAYOUT[-1][0]), strict=True):
            if moment == when:
                LOSSES[loss](writer.folder / file)
            writer.write(name, 0, np.ravel(VALUES[name]))
            writer.done(name)
        writer.done("none")
        for sealed in writer._seals.values():
            sealed.result()
        if when == "at the end":
            LOSSES[loss](writer.folder / file)
        writer.finish()
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("loss", ["removed", "cut", "emptied", "made longer"])
@pytest.mark.parametrize("file", ["note.txt", "templates/note.txt"])
def test_a_small_file_that_is_lost_is_noticed(tmp_path, file, loss):
    with pytest.raises(OutputError, match=r"note\.txt was removed or changed"), \
            CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        fill(writer)
        writer.write_file(file, "words")
        writer._small[file].result()
        LOSSES[loss](writer.folder / file)
        writer.finish()
    assert snapshot(tmp_path) == {}


def by_link(hidden, other):
    hidden.rename(hidden.with_name("moved"))
    hidden.symlink_to(other, target_is_directory=True)


def by_folder(hidden, other):
    hidden.rename(hidden.with_name("moved"))
    other.rename(hidden)


def emptied_by_nobody(hidden, other):
    hidden.rename(hidden.with_name("moved"))


@pytest.mark.parametrize("replace", [by_link, by_folder, emptied_by_nobody])
@pytest.mark.parametrize("when", ["at the start", "before the small files", "at the end"])
@pytest.mark.parametrize("ends", ["finish", "abort"])
def test_another_folder_that_takes_the_hidden_ones_place_is_not_touched(tmp_path, replace, when, ends):
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    for name in ("precious.txt", "deep/precious.txt", "model.safetensors", "note.txt"):
        (other / name).write_text("precious")
    before = snapshot(other)
    with pytest.raises(OutputError, match="another folder took its place"), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        hidden = writer.folder

        def step(moment: str) -> None:
            if moment == when:
                replace(hidden, other)

        step("at the start")
        fill(writer)
        step("before the small files")
        writer.write_file("note.txt", "words")
        writer.write_file("deep/note.txt", "words")
        for written in writer._small.values():
            written.result()
        step("at the end")
        if ends == "abort":
            raise OutputError("another folder took its place, and the merge was stopped")
        writer.finish()
    kept = hidden if replace is by_folder else other
    assert snapshot(kept) == before and not (tmp_path / "out").exists()


def test_a_link_inside_the_hidden_folder_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "precious.txt").write_text("precious")
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        fill(writer)
        (writer.folder / "note.txt").symlink_to(tmp_path / "precious.txt")
        writer.write_file("note.txt", "words")
    with pytest.raises(OutputError, match="cannot be written"), CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        (writer.folder / "deep").symlink_to(tmp_path / "other", target_is_directory=True)
        writer.write_file("deep/note.txt", "words")
    assert snapshot(tmp_path) == {"other": b"", "precious.txt": b"precious"}
