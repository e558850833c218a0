"""Training whose parameters are spread over processes: FSDP on two of them, without a GPU; also whole teachers in each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion import Checkpoint
from fusion.train import history
from tests.conftest import load_tensors, save_family
from tests.sharded_training import CASES, DTYPES

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for dtype in DTYPES:
        save_family(folder / dtype, targets=0, dtype=dtype)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    crew = [subprocess.Popen([sys.executable, "-m", "tests.sharded_training", str(folder)], cwd=Path(__file__).parent.parent,
                             stderr=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=500)[1] for process in crew]
    finally:
        for process in crew:
            process.kill()
    assert [process.returncode for process in crew] == [0, 0], "\n".join(text[-3000:] for text in said)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_target_is_gathered_from_all_processes_and_rounded_once(made, name, dtype):
    pivot, found = load_tensors(made / dtype / "pivot"), load_tensors(made / f"{name}-{dtype}")
    kept = torch.load(made / f"{name}-{dtype}.pt", weights_only=True)
    assert {key: (its.shape, its.dtype) for key, its in found.items()} == {k: (its.shape, its.dtype) for k, its in pivot.items()}
    assert any(not torch.equal(found[key], pivot[key]) for key in pivot)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected(kept, key, pivot[key]).to(tensor.dtype)), key
    made_config = Checkpoint(made / f"{name}-{dtype}").config
    assert made_config.get("dtype", made_config.get("torch_dtype")) == dtype
    curve = history(made / f"{name}-{dtype}")
    assert [entry["step"] for entry in curve] == [1, 2, 3] and curve[0]["loss"] > 0


def expected(kept: dict[str, torch.Tensor], key: str, stored: torch.Tensor) -> torch.Tensor:
    """What was trained: the numbers themselves, or the stored base and 16 / 2 of the product of the adapter's two halves."""
    if key in kept:
        return kept[key]
    name = f"base_model.model.{key.removesuffix('.weight')}"
    halves = [kept.get(f"{name}.lora_{half}.default.weight") for half in "BA"]
    return stored.float() + 8.0 * (halves[0] @ halves[1]) if halves[0] is not None else stored


def test_two_processes_learn_what_one_does(made, tmp_path):
    from fusion.progress import finish
    from fusion.train.settings import Training
    from fusion.train.trainer import train
    from tests.test_train import FAST, examples

    alone = finish(train(made / "float32" / "pivot", examples(8), tmp_path / "one", Training(
        **{**vars(FAST), "clip": 1e9, "batch": 4})))
    both = [step["loss"] for step in history(made / "whole-float32")]
    assert both == pytest.approx([step["loss"] for step in alone.history], rel=1e-4)
    pivot = load_tensors(made / "float32" / "pivot")
    one, two = load_tensors(alone.folder), load_tensors(made / "whole-float32")
    moved = sum(float((one[name] - pivot[name]).norm()) for name in one)
    assert sum(float((one[name] - two[name]).norm()) for name in one) < 0.01 * moved
