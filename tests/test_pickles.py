"""fusion.pickles: weights out of `.bin` files, and nothing else out of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion import pickles
from fusion.errors import CheckpointError, FusionError, OutputError, ResourceError
from fusion.sources import open_checkpoint
from tests.conftest import CONFIG, save_checkpoint, snapshot

UP, EMBED, HEAD = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
TENSORS = {EMBED: torch.arange(6.0).reshape(3, 2).to(torch.bfloat16), UP: torch.ones(2, 2), "steps": torch.tensor(7)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def save(folder: Path, content: object, file: str = "pytorch_model.bin", **options) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        torch.save(content, folder / file, **options)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_is_read_like_any_checkpoint(tmp_path, cache, zipped):
    model = open_checkpoint(save(tmp_path / "m", TENSORS, _use_new_zipfile_serialization=zipped))
    assert (model.name, set(model), model.info[EMBED].dtype, model.info["steps"].dtype) == ("m", set(TENSORS), "BF16", "I64")
    assert model[EMBED].tolist() == [[0, 1], [2, 3], [4, 5]] and model[UP].tolist() == [[1, 1], [1, 1]]
    assert np.frombuffer(model.raw("steps"), np.int64) == [7] and model.plain(EMBED)
    assert model.folder == tmp_path / "m"  # config and tokenizer stay where they are


def test_shards_are_found_by_their_index(tmp_path):
    folder = save(tmp_path / "m", {EMBED: TENSORS[EMBED]}, "pytorch_model-00001-of-00002.bin")
    save(folder, {UP: TENSORS[UP]}, "pytorch_model-00002-of-00002.bin")
    assert "2 pickles without pytorch_model.bin.index.json" in refused(folder)
    index = {EMBED: "pytorch_model-00001-of-00002.bin", UP: "pytorch_model-00002-of-00002.bin"}
    (folder / pickles.PICKLE_INDEX).write_text(json.dumps({"weight_map": index}))
    assert set(open_checkpoint(folder)) == {EMBED, UP}
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "names pytorch_model-00002-of-00002.bin, which is missing" in refused(folder)


def test_a_name_in_two_files_is_refused(tmp_path, cache):
    folder = save(tmp_path / "m", TENSORS, "a.bin")
    save(folder, TENSORS, "b.bin")
    (folder / pickles.PICKLE_INDEX).write_text(json.dumps({"weight_map": {EMBED: "a.bin", UP: "b.bin"}}))
    assert "is stored in two files" in refused(folder)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_tensors_that_share_bytes_are_whole_tensors_each(tmp_path):
    table = torch.arange(6.0).reshape(3, 2)
    model = open_checkpoint(save(tmp_path / "m", {EMBED: table, HEAD: table, UP: table.T, "part": table[1]}))
    assert model[HEAD].tolist() == model[EMBED].tolist() and model[UP].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert model["part"].tolist() == [2, 3]


def test_a_pickle_is_converted_once_and_again_when_it_changed(tmp_path, monkeypatch, cache):
    folder = save(tmp_path / "m", TENSORS)
    open_checkpoint(folder)
    first = snapshot(cache)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded twice"))
        open_checkpoint(folder)
    save(folder, {**TENSORS, UP: torch.full((2, 2), 5.0)})
    assert open_checkpoint(folder)[UP].tolist() == [[5, 5], [5, 5]]
    assert first.items() <= snapshot(cache).items()


def test_safetensors_win_over_pickles(tmp_path):
    folder = save_checkpoint(tmp_path / "m", {UP: np.zeros((2, 2), np.float32)})
    save(folder, TENSORS)
    assert open_checkpoint(folder)[UP].tolist() == [[0, 0], [0, 0]]


class Hostile:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {UP: evil}, lambda evil: {**TENSORS, "x": [evil]}], ids="abc")
@pytest.mark.parametrize("save_as", ["torch", "old torch", "pickle"])
def test_a_hostile_pickle_runs_nothing(tmp_path, cache, wrap, save_as):
    content = wrap(Hostile(tmp_path / "trace"))
    if save_as == "pickle":
        folder = save(tmp_path / "m", pickle.dumps(content))
    else:
        folder = save(tmp_path / "m", content, _use_new_zipfile_serialization=save_as == "torch")
    assert "more than plain weights" in refused(folder)
    assert not (tmp_path / "trace").exists() and not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(("content", "words"), [
    ({"state_dict": {UP: torch.ones(2)}}, "'state_dict' is no tensor but dict"),
    ({1: torch.ones(2)}, "1 is no tensor"),
    ([torch.ones(2)], "no table of tensors"),
    ({}, "no table of tensors"),
    (torch.ones(2), "no table of tensors"),
    ({UP: torch.ones(1).expand(2**40)}, "no plain tensor"),
    ({UP: torch.ones(2, 2).to_sparse()}, "no plain tensor"),
    ({UP: torch.ones(2, dtype=torch.complex64)}, "no plain tensor"),
    ({f"{i}": table for table in [torch.zeros(100_000)] for i in range(100)}, "its tensors claim 40000000 bytes, the file has"),
    (b"", "broken"), (b"PK\x03\x04" + bytes(50), "broken"), (b"\x80\x02." * 9, "broken"), (os.urandom(100), "broken"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_pickle_of_anything_else_is_refused(tmp_path, cache, content, words):
    assert words in refused(save(tmp_path / "m", content))
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("file", ["model.pt", "step.ckpt", "model.pth", "training_args.bin"])
def test_what_a_trainer_leaves_is_no_model(tmp_path, file):
    assert f"only a training state ({file})" in refused(save(tmp_path / "m", TENSORS, file))


def test_a_compressed_zip_is_refused(tmp_path):
    folder = save(tmp_path / "m", TENSORS)
    with zipfile.ZipFile(folder / "pytorch_model.bin") as old, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
        [new.writestr(entry.filename, old.read(entry)) for entry in old.infolist()]
    (folder / "new").replace(folder / "pytorch_model.bin")
    assert "it is compressed" in refused(folder)


def test_a_cut_zip_is_refused(tmp_path):
    folder = save(tmp_path / "m", TENSORS)
    data = (folder / "pytorch_model.bin").read_bytes()
    for size in range(0, len(data), 97):
        (folder / "pytorch_model.bin").write_bytes(data[:size])
        with pytest.raises(FusionError):
            open_checkpoint(folder)


def test_a_full_or_forbidden_disk_is_said(tmp_path, monkeypatch, cache):
    folder = save(tmp_path / "m", TENSORS)
    with monkeypatch.context() as patch:
        patch.setattr(pickles.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(ResourceError, match="which the disk has not free"):
            open_checkpoint(folder)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.setenv("FUSECHAT_CACHE", str(folder / "config.json"))
    with pytest.raises(OutputError, match="FUSECHAT_CACHE"):
        open_checkpoint(folder)


def _open(folder: Path, results) -> None:
    results.put(open_checkpoint(folder)[UP].tolist())


def test_two_processes_convert_one_pickle_once(tmp_path, cache):
    folder = save(tmp_path / "m", TENSORS)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(folder, results)) for _ in range(2)]
    [process.start() for process in processes]
    assert [results.get(timeout=60) for _ in processes] == [[[1, 1], [1, 1]]] * 2
    [process.join() for process in processes]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_what_a_killed_conversion_left_is_replaced(tmp_path, cache):
    folder = save(tmp_path / "m", TENSORS)
    partial = cache / f".{pickles._stamp([folder / 'pytorch_model.bin'])}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    assert set(open_checkpoint(folder)) == set(TENSORS) and not partial.exists()
