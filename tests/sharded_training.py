"""Trains with torch's FSDP on processors, as a program of its own that is started twice: python -m tests.sharded_training FOLDER.

accelerate uses FSDP only on GPUs, so this wraps and gathers as it would (FULL_SHARD, one unit a decoder layer, use_orig_params).
All else is the product's own training and saving. Beside each result lie the parameters that FSDP shows of the trained model.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fusion.distill import heads
from fusion.pairwise import FuseRecipe
from fusion.pairwise.stages import _teacher
from fusion.progress import finish
from fusion.sources import open_checkpoint
from fusion.train.crew import PATIENCE, Crew
from fusion.train.settings import Training
from fusion.train.trainer import train
from tests.test_train import FAST, examples

CASES = {"whole": {}, "packed": {"pack": True, "max_tokens": 40}, "adapter": {"lora_rank": 2}}
DTYPES = ("bfloat16", "float32")


def sharded(accelerator, model, **_):
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, sharding_strategy=ShardingStrategy.FULL_SHARD,
                                    use_orig_params=True, device_id=torch.device("cpu"))


def gathered(accelerator, model):
    """As accelerate does: every process takes part, the first gets it all. Offloading crashes where it all lies on a CPU."""
    everything = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, everything):
        return model.state_dict()


def run(folder: Path, name: str, dtype: str) -> None:
    kept = []

    def noted(accelerator, model):
        with FullyShardedDataParallel.summon_full_params(model):
            kept.append({name.replace("_fsdp_wrapped_module.", ""): its.detach().clone() for name, its in model.named_parameters()})
        return gathered(accelerator, model)

    settings = Training(**{**vars(FAST), "clip": 1e9, "extra": {"save_strategy": "no"}, **CASES[name]})
    with mock.patch.object(Accelerator, "prepare_model", sharded), mock.patch.object(Accelerator, "get_state_dict", noted):
        finish(train(folder / dtype / "pivot", examples(8), folder / f"{name}-{dtype}", settings))
    if torch.distributed.get_rank() == 0:
        torch.save(kept[0], folder / f"{name}-{dtype}.pt")


def read(folder: Path) -> None:
    """Every process reads with whole teachers, though FSDP's launch gives weights to the first alone, and waits long enough."""
    Crew()
    world = torch.distributed.distributed_c10d._get_default_group()
    assert world._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    pivot = str(folder / "float32" / "pivot")
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}):
        teacher = _teacher("pivot", pivot, FuseRecipe(pivot, (pivot,), "none"), None)
        assert is_fsdp_enabled()
    with closing(open_checkpoint(pivot)) as checkpoint:
        stored = {name: torch.from_numpy(checkpoint[name]) for name in checkpoint}
    assert all(torch.equal(its, stored[name]) for name, its in teacher.model.named_parameters())


if __name__ == "__main__":
    torch.set_num_threads(1)
    heads.SLICE_LOGITS = 320 * 5  # several slices a batch
    read(Path(sys.argv[1]))
    for dtype in DTYPES:
        for name in CASES:
            run(Path(sys.argv[1]), name, dtype)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
