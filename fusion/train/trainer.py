"""The loop of fusion training: one loss on top of `transformers.Trainer`, run in a thread so that it can be watched and stopped.

`transformers.Trainer` runs the loop, so `accelerate launch`, FSDP, DeepSpeed, bfloat16, gradient checkpointing and resuming
work as people know them. The loss is reckoned inside the model's forward pass, from logits at the labels only.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from fusion.distill.fused import Example
from fusion.distill.heads import Head
from fusion.distill.losses import fusion_loss
from fusion.errors import FusionError, OutputError, RecipeError, Stopped
from fusion.loading import load_model
from fusion.progress import Progress, Work
from fusion.sources import open_checkpoint
from fusion.train.crew import PATIENCE, Crew
from fusion.train.history import append, earlier, unfinished_work
from fusion.train.packing import refuse_leaks
from fusion.train.rows import ByLength, Collator, Rows
from fusion.train.saving import last_checkpoint, mark_whole, save
from fusion.train.settings import Training

# transformers gave the switch a new name in the course of version 5
_CHECKPOINTING = next(item.name for item in fields(TrainingArguments)
                      if item.name in ("activation_checkpointing", "gradient_checkpointing"))


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its folder and the loss curve, one dict (step, loss, clm, fusion, learning_rate) per logged step."""

    folder: Path
    history: tuple[dict, ...]


def train(pivot: str | os.PathLike, examples: Sequence[Example], out: str | os.PathLike, training: Training,
          *, resume: bool = False) -> Work[TrainResult]:
    """Fine-tune a copy of the pivot on the examples into the new folder `out`; yields Progress with the loss.

    `pivot` is whatever `open_checkpoint` opens: a folder, a model of the Hub, either with an adapter in it.
    The folder appears whole or not at all. Unfinished work lies in a hidden sibling; `resume` continues from its last saved
    step, otherwise it is begun anew. Closing the generator stops after the running step and keeps what `resume` needs.
    Raises FusionError when the loss becomes NaN or infinite, OutputError when the folder exists.
    """
    training.check()
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise OutputError("exists already; nothing is ever overwritten", where=str(out), todo="Choose another folder.")
    if not examples:
        raise RecipeError("there is no dialogue to learn from", where="training")
    work, crew = unfinished_work(out), Crew()
    if crew.first:
        _begin(work, training, len(examples), resume)
    crew.wait()
    trainer, watch = _trainer(pivot, examples, work, training)
    last = last_checkpoint(work)
    watch.begin(int(last.name.rpartition("-")[2]) if last else 0)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except BaseException as error:  # handed to the thread that waits
            failure.append(error)
        finally:
            watch.reports.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (progress := watch.reports.get()) is not None:
            yield progress
    finally:
        watch.stop.set()
        thread.join()
    if failure:
        raise failure[0]
    if watch.failed:
        raise FusionError(watch.failed, where=str(out.name), todo="Lower the learning rate, or train with lm_weight 1 first.")
    if watch.stopped:
        raise Stopped("stopped", where=out.name)
    save(trainer, os.fspath(pivot), work, out, watch.history)
    return TrainResult(out, tuple(watch.history))


def _begin(work: Path, training: Training, count: int, resume: bool) -> None:
    """Make the folder of unfinished work; such work of other settings must not be continued."""
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    file, mine = work / "settings.json", json.dumps({**asdict(training), "examples": count}, sort_keys=True, default=str)
    if file.exists() and file.read_text(encoding="utf-8") != mine:
        raise RecipeError("the unfinished training was begun with other settings or data", where=str(work),
                          todo="Give the same settings, or start without resume.")
    file.write_text(mine, encoding="utf-8")


def _trainer(pivot: str | os.PathLike, examples: Sequence[Example], work: Path,
             training: Training) -> tuple[FusionTrainer, _Watch]:
    set_seed(training.seed)
    with closing(open_checkpoint(pivot)) as checkpoint:
        model = load_model(checkpoint, training.dtype)
    model.config.use_cache = False
    _answer_at_labels(model)
    if training.lora_rank:
        model = _with_adapter(model, training)
    watch = _Watch(work)
    trainer = FusionTrainer(model=model, args=_arguments(work, training), train_dataset=Rows(examples, training),
                            data_collator=Collator(), callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.training, trainer.watch = training, watch
    return trainer, watch


def _arguments(work: Path, training: Training) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(**{
        "output_dir": str(work), "per_device_train_batch_size": training.rows_a_batch,
        "gradient_accumulation_steps": training.accumulate, "learning_rate": training.learning_rate,
        "num_train_epochs": training.epochs, "max_steps": training.max_steps, "warmup_steps": training.warmup,
        "lr_scheduler_type": training.schedule, "weight_decay": training.weight_decay, "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1], "max_grad_norm": training.clip, "bf16": training.bf16,
        _CHECKPOINTING: training.gradient_checkpointing, "seed": training.seed, "data_seed": training.seed,
        "save_strategy": "steps", "save_steps": training.save_steps, "save_total_limit": 2, "logging_steps": training.log_steps,
        "report_to": [], "disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": cuda, "use_cpu": not cuda,
        "logging_nan_inf_filter": False, "ddp_timeout": int(PATIENCE.total_seconds()), **training.extra})


def _answer_at_labels(model: PreTrainedModel) -> None:
    """Teach a model to give its loss at the labels, `wanted`, instead of logits of everything, whatever wraps it later."""
    head, forward = Head(model), model.forward

    def losses(*given, wanted: _Wanted | None = None, **inputs):
        return forward(*given, **inputs) if wanted is None else wanted.losses(head, inputs)

    model.forward = losses


def _with_adapter(model, training: Training):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("LoRA needs the package peft", where="lora_rank", todo="Run pip install peft.") from error
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=training.lora_rank, lora_alpha=training.lora_alpha, target_modules="all-linear",
                                            task_type="CAUSAL_LM"))


class _Wanted:
    """What a batch is to learn: labels at `places` of the flattened batch, as means over `count`.

    No tensor and no table, so that what wraps a model hands it on as it is (FSDP would round the chances to bfloat16).
    """

    def __init__(self, inputs: dict[str, torch.Tensor], count: int | torch.Tensor | None, training: Training):
        self.places, self._ids, self._chances = inputs["places"], inputs["target_ids"], inputs["chances"]
        self._gold = inputs["labels"].flatten()[self.places + 1]
        self._count, self._training = count if count is not None else len(self._gold), training

    def losses(self, head: Head, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss and its two parts, of which only the first has gradients."""
        loss, clm, fused = map(sum, zip(*head(self.places, self._score, **inputs), strict=True))
        return loss, clm.detach(), fused.detach()

    def _score(self, logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return fusion_loss(logits, self._gold[part], self._ids[part], self._chances[part], self._training.lm_weight,
                           self._training.kind, self._count)


class FusionTrainer(Trainer):
    """A Trainer whose loss is λ · language-model loss + (1 − λ) · fusion loss over the labels."""

    training: Training
    watch: _Watch
    _apart = False  # whether packed dialogues are known to be kept apart

    def _get_train_sampler(self, train_dataset=None):
        """See Trainer; the order by length that `Training.by_length` asks for."""
        if not self.training.by_length:
            return super()._get_train_sampler(train_dataset)
        data, examples = self.train_dataset, self.train_dataset.examples
        lengths = [sum(len(examples[i].ids) for i in row) for row in data.rows]
        return ByLength(lengths, self.args.per_device_train_batch_size * self.args.world_size, self.training.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See Trainer; `num_items_in_batch` is the number of labels of the whole update, over all devices."""
        extra = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
        if self.training.pack and not self._apart:  # on every process at once, whatever its own batch holds
            refuse_leaks(model, self.accelerator.unwrap_model(model), self.training.exact)
            self._apart = True
        wanted = _Wanted(inputs, num_items_in_batch, self.training)
        loss, clm, fused = model(input_ids=inputs["input_ids"], use_cache=False, wanted=wanted, **extra)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        self.watch.add(clm, fused)
        return (loss, {"loss": loss}) if return_outputs else loss


class _Watch(TrainerCallback):
    """Reports every step, stops on request, and ends a training whose loss is no longer a number."""

    def __init__(self, work: Path):
        self.reports: queue.Queue[Progress | None] = queue.Queue()
        self.stop, self.stopped, self.failed = threading.Event(), False, ""
        self.history: list[dict] = []
        self._work, self._parts, self._first_step, self._started = work, [0.0, 0.0], 0, time.perf_counter()

    def begin(self, step: int) -> None:
        """Count from a step that was reached before."""
        self._first_step, self.history, self._started = step, earlier(self._work, step), time.perf_counter()

    def add(self, clm: torch.Tensor, fused: torch.Tensor) -> None:
        self._parts[0] += float(clm)
        self._parts[1] += float(fused)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        total, self._parts = torch.tensor(self._parts, device=args.device), [0.0, 0.0]
        if args.world_size > 1:  # every process saw its own labels
            torch.distributed.all_reduce(total)
        parts = (total / max(args.logging_steps, 1)).tolist()
        self.history.append({"step": state.global_step, "loss": logs["loss"], "clm": parts[0], "fusion": parts[1],
                             "learning_rate": logs.get("learning_rate", 0.0)})
        if state.is_world_process_zero:
            append(self._work, self.history[-1])
        odd = next((name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))), None)
        if odd:
            self.failed = f"the {odd} is {logs[odd]} at step {state.global_step}"
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        note = f"loss {self.history[-1]['loss']:.4f}" if self.history else ""
        done = max(state.global_step - self._first_step, 1)
        seconds = (time.perf_counter() - self._started) * state.global_step / done  # as if all steps had been done now
        self.reports.put(Progress("Training", state.global_step, state.max_steps, "steps", seconds=seconds, note=note))
        if self._asked(args):
            self.stopped = control.should_training_stop = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_whole(self._work, state.global_step)

    def _asked(self, args) -> bool:
        """Whether to stop, which all processes do after the same step when one of them is asked to."""
        if args.world_size == 1:
            return self.stop.is_set()
        asked = torch.tensor(float(self.stop.is_set()), device=args.device)
        torch.distributed.all_reduce(asked)
        return bool(asked)
