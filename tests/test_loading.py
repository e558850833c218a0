"""fusion.loading: one door by which weights come into memory, and the same decision which files are the model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion import chat
from fusion.checkpoint import Checkpoint
from fusion.distill.teacher import LocalTeacher
from fusion.errors import CheckpointError
from fusion.evaluate.models import load
from fusion.loading import load_model, stored_as_read
from fusion.sources import open_checkpoint
from fusion.train import Training
from fusion.train.trainer import _trainer
from tests.conftest import load_tensors
from tests.test_adapters import pair, save_adapter

UP = "model.layers.1.mlp.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
SPOILT = {
    "missing": (lambda tensors: tensors.pop(UP), rf"1 matrices are missing, first {UP}"),
    "misshapen": (lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}), rf"{UP}: \[47, 32\] instead of \[48, 32\]"),
    "left over": (lambda tensors: tensors.update({UP.replace("up_proj", "side_proj"): tensors[UP].clone()}),
                  r"1 tensors belong to no matrix of a LlamaForCausalLM, first model.layers.1.mlp.side_proj.weight"),
}
DOORS = {"chat": chat.load, "evaluation": lambda folder: load(str(folder), "its"),
         "teacher": lambda folder: LocalTeacher(str(folder)),
         "training": lambda folder: _trainer(folder, [], folder / "work", Training())}


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("door", DOORS)
def test_what_transformers_would_invent_or_drop_is_refused_everywhere(family, tmp_path, spoil, door):
    folder, (change, words) = tmp_path / "its", SPOILT[spoil]
    shutil.copytree(family()[0], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        DOORS[door](folder)


def test_an_adapter_on_a_base_without_a_matrix_is_refused_too(family, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(family()[0], base)
    tensors = load_file(base / "model.safetensors")
    del tensors[UP]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    lora = save_adapter(tmp_path / "lora", pair(Q, np.ones((1, 32), np.float32), np.ones((32, 1), np.float32)))
    with pytest.raises(CheckpointError, match=f"first {UP}"):
        load_model(open_checkpoint(f"{base}+{lora}"), "float32")


def sharded(folder, tensors):
    """The tensors in two shards with an index."""
    names = sorted(tensors)
    where = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("index", ["whole", "names a missing shard", "broken"])
def test_beside_a_whole_file_no_index_counts_and_all_read_the_same(family, tmp_path, index):
    pivot, target, _ = family()
    folder = tmp_path / "both"
    shutil.copytree(pivot, folder)
    sharded(folder, load_tensors(target))
    if index == "names a missing shard":
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif index == "broken":
        (folder / "model.safetensors.index.json").write_text("{")
    wanted = load_tensors(pivot)[Q].float()
    assert torch.equal(torch.from_numpy(Checkpoint(folder)[Q]), wanted)
    for model in (chat.load(folder).model, LocalTeacher(str(folder)).model, load(str(folder), "its").model):
        assert torch.equal(model.state_dict()[Q].float().cpu(), wanted)
    assert chat.expected_bytes(folder) == sum(4 * value.numel() for value in load_tensors(pivot).values())


def test_a_whole_file_of_another_name_is_loaded_as_merges_read_it(family, tmp_path):
    folder = tmp_path / "its"
    shutil.copytree(family()[0], folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert not stored_as_read(Checkpoint(folder))
    assert torch.equal(chat.load(folder).model.state_dict()[Q].cpu(), torch.from_numpy(Checkpoint(folder)[Q]))
