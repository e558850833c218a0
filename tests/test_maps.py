"""fusion.maps: files seen as memory, and what happens when a page of one cannot be had."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusion import compiled, maps
from fusion.blocks import Blocks
from fusion.checkpoint import Checkpoint
from fusion.compiled.twins import BLOCK, STRETCH
from fusion.digest import digest_tensor
from fusion.errors import CheckpointError
from fusion.merge import merge
from fusion.progress import finish
from fusion.recipe import Recipe
from tests.conftest import save_checkpoint

ROOT = Path(__file__).parent.parent
NAME = "model.layers.0.mlp.up_proj.weight"
RANDOM = np.random.default_rng(3)
pytestmark = pytest.mark.skipif(not maps.GUARDED, reason="files are read on this system")


@pytest.fixture(autouse=True)
def ready(library, monkeypatch):
    """Compiled loops, as in a large merge."""
    monkeypatch.setattr(compiled, "_library", library)
    monkeypatch.setattr(compiled, "_refused", False)


@pytest.fixture
def model(tmp_path):
    return Checkpoint(save_checkpoint(tmp_path / "model", {NAME: RANDOM.normal(size=STRETCH + 5).astype(np.float32)}))


def opened(path: Path) -> maps.Map:
    file = os.open(path, os.O_RDONLY)
    try:
        return maps.mapped(file)
    finally:
        os.close(file)  # the map stays


def test_a_map_shows_the_file_and_gives_its_place_back(tmp_path):
    (path := tmp_path / "file").write_bytes(bytes(range(256)) * 40)
    here, other = opened(path), opened(path)
    assert here.view(0, here.size).tobytes() == path.read_bytes() and here.view(255, 2).tolist() == [255, 0]
    assert not here.broken and here.lost != other.lost
    place = here.lost
    del here
    gc.collect()
    again = opened(path)
    assert again.lost == place and not again.broken


@pytest.mark.parametrize("what", ["empty", "folder", "loops", "system", "full"])
def test_what_cannot_be_mapped_is_read(tmp_path, monkeypatch, what):
    (path := tmp_path / "file").write_bytes(b"" if what == "empty" else b"1234")
    monkeypatch.setattr(maps, "GUARDED", what != "system")
    if what == "loops":
        monkeypatch.setattr(compiled, "_refused", True)
    if what == "full":
        monkeypatch.setattr(maps, "_table", np.ones_like(maps._table))
    assert opened(tmp_path if what == "folder" else path) is None


def test_sums_and_digests_are_the_same_mapped_and_read(model, monkeypatch):
    found = []
    for guarded in (True, False):
        monkeypatch.setattr(maps, "GUARDED", guarded)
        fresh = Checkpoint(model.folder)
        table = np.zeros((2, 2, 3))
        blocks = Blocks(NAME, [fresh, fresh])
        assert (fresh.span(NAME).map is not None) == guarded and bool(blocks._files[0, 3]) == guarded
        assert blocks.stretch("sum_changes", 0, *table) == STRETCH
        assert blocks.stretch("sum_changes", STRETCH, *table) == 5
        found.append((table.tobytes(), digest_tensor(fresh, NAME)))
    assert found[0] == found[1]


def test_a_tensor_that_lies_askew_is_read(tmp_path):
    folder = save_checkpoint(tmp_path / "model", {"a.weight": np.ones(3, np.float32), NAME: np.ones(8, np.float32)})
    file = folder / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes((length + 2).to_bytes(8, "little") + file.read_bytes()[8:8 + length] + b"  " + file.read_bytes()[8 + length:])
    blocks = Blocks(NAME, [Checkpoint(folder)] * 2)
    assert blocks._spans[0].map is not None and not blocks._files[0, 3]
    assert blocks.stretch("sum_changes", 0, *np.zeros((2, 2, 3))) == 8


def test_a_file_that_became_shorter_is_an_error_of_every_reader_until_it_is_opened_anew(model):
    file = model.folder / "model.safetensors"
    whole, blocks, before = file.read_bytes(), Blocks(NAME, [model, model]), digest_tensor(model, NAME)
    os.truncate(file, BLOCK)
    with pytest.raises(CheckpointError, match="became shorter"):
        blocks.stretch("sum_changes", 0, *np.zeros((2, 2, 3)))
    assert model.span(NAME).map.broken
    with pytest.raises(CheckpointError, match="became shorter"):
        digest_tensor(model, NAME)
    with file.open("r+b") as there:
        there.write(whole)
    with pytest.raises(CheckpointError, match="for a moment"):  # the page of zeros is still there
        Blocks(NAME, [model, model]).stretch("sum_changes", 0, *np.zeros((2, 2, 3)))
    assert digest_tensor(model, NAME) == before  # which reads instead
    fresh = Checkpoint(model.folder)
    assert Blocks(NAME, [fresh, fresh]).stretch("sum_changes", 0, *np.zeros((2, 2, 3))) == STRETCH
    model.close()
    assert Blocks(NAME, [model, model]).stretch("sum_changes", 0, *np.zeros((2, 2, 3))) == STRETCH


@pytest.mark.parametrize("method", ["varm", "linear", "sce"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_merge_whose_source_becomes_shorter_leaves_nothing(tmp_path, method, steps):
    random, folders = np.random.default_rng(1), []
    for name in "pab":
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": random.normal(size=(600, 512)).astype(np.float32) for i in range(6)}
        folders.append(save_checkpoint(tmp_path / name, tensors))
    work = merge(Recipe(str(folders[0]), tuple(map(str, folders[1:])), method=method), tmp_path / "new/out")
    for _ in range(steps):
        next(work)
    os.truncate(folders[2] / "model.safetensors", 30_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        finish(work)
    assert not (tmp_path / "new").exists()


IN_A_PROCESS = """
import faulthandler, mmap, os, sys
{before}
from fusion import compiled, maps
compiled.prepare(1)
path = sys.argv[1]
with open(path, "wb") as file:
    file.write(bytes(3 * mmap.PAGESIZE))
file = os.open(path, os.O_RDONLY)
here, mine = maps.mapped(file), mmap.mmap(file, 0, mmap.MAP_SHARED, mmap.PROT_READ)
{after}
other = maps.mapped(file)
os.truncate(path, mmap.PAGESIZE)
assert here.view(0, 9).tobytes() == bytes(9) and not here.broken
assert here.view(2 * mmap.PAGESIZE, 9).tobytes() == bytes(9) and here.broken
print("alive", flush=True)
mine[2 * mmap.PAGESIZE]
print("not here")
"""


ANOTHER = "faulthandler.enable()"


@pytest.mark.parametrize(("before", "after"), [("", ""), (ANOTHER, ""), ("", ANOTHER)],
                         ids=["no other handler", "one before", "one after"])
def test_a_lost_page_of_ours_is_noted_and_any_other_ends_the_process_as_ever(tmp_path, before, after):
    code = IN_A_PROCESS.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], cwd=ROOT, timeout=120,
                          env={**os.environ, "FUSECHAT_COMPILED": "1"}, capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n" and done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == bool(before or after)
