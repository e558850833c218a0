"""From a trained model, on one device or in pieces on many, to a checkpoint like the pivot's: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from fusion.errors import OutputError
from fusion.loading import checkpoint_dtype, load_model, tokenizer_of
from fusion.sources import open_checkpoint
from fusion.train.crew import as_one
from fusion.train.history import HISTORY_FILE

_DONE = "whole"  # a file in a checkpoint that every process has finished


def save(trainer: Trainer, pivot: str, work: Path, out: Path, curve: list[dict]) -> None:
    """Write what `trainer` has learnt into the new folder `out`; to be called by every process.

    Under FSDP and ZeRO-3 every process holds a piece, so all of them gather; the first writes, in the pivot's stored dtype. A
    LoRA adapter is added to the stored base in float32 and rounded once. `work` holds the unfinished folder, and is removed.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        _let_go(trainer)
        with as_one():
            _write(_taken_in(pivot, state, getattr(model, "peft_config", {})), pivot, work / "result", curve)
        if os.path.lexists(out):
            raise OutputError("appeared while training ran", where=str(out), todo=f"The result lies in {work / 'result'}.")
        os.rename(work / "result", out)
        with contextlib.suppress(OSError):
            shutil.rmtree(work)
    trainer.accelerator.wait_for_everyone()


def _let_go(trainer: Trainer) -> None:
    """Free the optimiser's moments: they are not needed any more, the room is."""
    for holder in (trainer, trainer.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    trainer.accelerator.free_memory()


def _taken_in(pivot: str, state: Mapping[str, torch.Tensor], adapters: Mapping) -> PreTrainedModel:
    """The stored pivot with the trained numbers in it, rounded once to its dtype; `state` has the adapter's alone or all."""
    with contextlib.closing(open_checkpoint(pivot)) as checkpoint:
        model = load_model(checkpoint, checkpoint_dtype(checkpoint))
    if not adapters:
        model.load_state_dict(state)
        return model
    from peft import get_peft_model

    model = get_peft_model(model, adapters["default"])
    mine = {name for name in model.state_dict() if "lora_" in name}
    model.load_state_dict({name: state[name] for name in mine}, strict=False)
    return model.merge_and_unload()


def _write(model: PreTrainedModel, pivot: str, folder: Path, curve: list[dict]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    with contextlib.closing(open_checkpoint(pivot)) as checkpoint:
        tokenizer_of(checkpoint).save_pretrained(folder)
    (folder / HISTORY_FILE).write_text(json.dumps(curve, indent=1), encoding="utf-8")


def mark_whole(work: Path, step: int) -> None:
    """Note that every process has written its part of the checkpoint of this step."""
    (work / f"checkpoint-{step}" / _DONE).touch()


def last_checkpoint(work: Path) -> Path | None:
    """The latest checkpoint that is whole."""
    done = [path for path in work.glob("checkpoint-*") if (path / _DONE).is_file()]
    return max(done, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
