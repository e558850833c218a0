"""The loop of fusion training: one loss on top of `transformers.Trainer`, run in a thread so that it can be watched and stopped.

`transformers.Trainer` runs the loop, so `accelerate launch`, FSDP, DeepSpeed, bfloat16, gradient checkpointing and resuming
work as people know them. Price: full-vocabulary logits of one batch, which `settings.estimate` counts before anything starts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from fusion.checkpoint import Checkpoint
from fusion.distill.fused import Example
from fusion.distill.losses import fusion_loss
from fusion.errors import FusionError, OutputError, RecipeError, Stopped
from fusion.loading import load_model
from fusion.progress import Progress, Work
from fusion.train.history import HISTORY_FILE, append, earlier, unfinished_work
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
    work = unfinished_work(out)
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    _same_settings(work, training, len(examples))
    trainer, watch = _trainer(pivot, examples, work, training)
    last = _last_checkpoint(work)
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
    if trainer.is_world_process_zero():
        _save(trainer, Path(pivot), work, out)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(out, tuple(watch.history))


def _same_settings(work: Path, training: Training, count: int) -> None:
    """Unfinished work of other settings must not be continued."""
    file, mine = work / "settings.json", json.dumps({**asdict(training), "examples": count}, sort_keys=True, default=str)
    if file.exists() and file.read_text(encoding="utf-8") != mine:
        raise RecipeError("the unfinished training was begun with other settings or data", where=str(work),
                          todo="Give the same settings, or start without resume.")
    file.write_text(mine, encoding="utf-8")


def _last_checkpoint(work: Path) -> Path | None:
    done = [path for path in work.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(done, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _trainer(pivot: str | os.PathLike, examples: Sequence[Example], work: Path,
             training: Training) -> tuple[FusionTrainer, _Watch]:
    set_seed(training.seed)
    with contextlib.closing(Checkpoint(pivot)) as checkpoint:
        model = load_model(checkpoint, training.dtype)
    model.config.use_cache = False
    if training.lora_rank:
        model = _with_adapter(model, training)
    arguments = TrainingArguments(
        output_dir=str(work), per_device_train_batch_size=1 if training.pack else training.batch,
        gradient_accumulation_steps=training.accumulate, learning_rate=training.learning_rate,
        num_train_epochs=training.epochs, max_steps=training.max_steps, warmup_steps=training.warmup,
        lr_scheduler_type=training.schedule, weight_decay=training.weight_decay, adam_beta1=training.betas[0],
        adam_beta2=training.betas[1], max_grad_norm=training.clip, bf16=training.bf16,
        **{_CHECKPOINTING: training.gradient_checkpointing}, seed=training.seed, data_seed=training.seed,
        save_strategy="steps", save_steps=training.save_steps, save_total_limit=2, logging_steps=training.log_steps,
        report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(), logging_nan_inf_filter=False, **dict(training.extra))
    data = Rows(examples, training)
    watch = _Watch(work)
    trainer = FusionTrainer(model=model, args=arguments, train_dataset=data, data_collator=Collator(), callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.training, trainer.watch = training, watch
    return trainer, watch


def _with_adapter(model, training: Training):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("LoRA needs the package peft", where="lora_rank", todo="Run pip install peft.") from error
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=training.lora_rank, lora_alpha=training.lora_alpha, target_modules="all-linear",
                                            task_type="CAUSAL_LM"))


class Rows(torch.utils.data.Dataset):
    """The rows of a training: one dialogue each, or packed; dialogues are fetched when a row is asked for."""

    def __init__(self, examples: Sequence[Example], training: Training):
        self.examples = examples
        self.rows = pack([len(example.ids) for example in examples], training.max_tokens) if training.pack \
            else [[i] for i in range(len(examples))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> list[Example]:
        return [self.examples[i] for i in self.rows[number]]


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Join dialogues into rows of at most `max_tokens`: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((row for row, left in enumerate(room) if left >= lengths[i]), None)
        if at is None:
            rows.append([])
            room.append(max(max_tokens, lengths[i]))
            at = len(rows) - 1
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


class ByLength(torch.utils.data.Sampler):
    """Row numbers in an order that puts similar lengths side by side: drawn anew every epoch, the same for the same seed.

    Stretches of 50 batches are sorted by length each, and their batches shuffled.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = np.asarray(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What the Trainer calls before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order, stretch = rng.permutation(len(self.lengths)), 50 * self.batch
        for start in range(0, len(order), stretch):
            rows = order[start:start + stretch]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            groups = [rows[at:at + self.batch] for at in range(0, len(rows), self.batch)]
            last = groups.pop() if len(groups[-1]) < self.batch else []  # a short batch in the middle would shift all others
            for group in (*(groups[i] for i in rng.permutation(len(groups))), last):
                yield from map(int, group)


class Collator:
    """Rows of examples to one batch: padded on the right; packed rows carry positions that begin anew with every dialogue."""

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
        longest = max(sum(len(example.ids) for example in row) for row in rows)
        k = max(example.target_ids.shape[1] for row in rows for example in row)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), -100)
        positions = torch.arange(longest).repeat(len(rows), 1)
        targets, chances, places = [], [], []
        for i, row in enumerate(rows):
            at = 0
            for example in row:
                count = len(example.ids)
                ids[i, at:at + count] = torch.from_numpy(np.asarray(example.ids, np.int64))
                spots = torch.from_numpy(np.asarray(example.labels, np.int64))
                labels[i, spots + at] = ids[i, spots + at]
                positions[i, at:] = torch.arange(longest - at)
                places.append(i * longest + at + spots - 1)
                width = (0, k - example.target_ids.shape[1])
                targets.append(torch.nn.functional.pad(torch.from_numpy(example.target_ids.astype(np.int64)), width, value=-1))
                chances.append(torch.nn.functional.pad(torch.from_numpy(example.chances.astype(np.float32)), width))
                at += count
        batch = {"input_ids": ids, "labels": labels, "places": torch.cat(places), "target_ids": torch.cat(targets),
                 "chances": torch.cat(chances)}
        return {**batch, "position_ids": positions} if any(len(row) > 1 for row in rows) else batch


class FusionTrainer(Trainer):
    """A Trainer whose loss is λ · language-model loss + (1 − λ) · fusion loss over the labels."""

    training: Training
    watch: _Watch

    def _get_train_sampler(self, train_dataset=None):
        """See Trainer; the order by length that `Training.by_length` asks for."""
        if not self.training.by_length:
            return super()._get_train_sampler(train_dataset)
        data, examples = self.train_dataset, self.train_dataset.examples
        lengths = [sum(len(examples[i].ids) for i in row) for row in data.rows]
        return ByLength(lengths, self.args.per_device_train_batch_size * self.args.world_size, self.training.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See Trainer; `num_items_in_batch` is the number of labels of the whole update, over all devices."""
        labels, places = inputs["labels"], inputs["places"]
        extra = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
        outputs = model(input_ids=inputs["input_ids"], use_cache=False, **extra)
        logits = outputs.logits.flatten(0, 1)[places]
        gold = labels.flatten()[places + 1]
        count = num_items_in_batch if num_items_in_batch is not None else len(gold)
        loss, clm, fused = fusion_loss(logits, gold, inputs["target_ids"], inputs["chances"], self.training.lm_weight,
                                       self.training.kind, count)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        self.watch.add(clm.detach(), fused.detach())
        return (loss, outputs) if return_outputs else loss


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
        if self.stop.is_set():
            self.stopped = control.should_training_stop = control.should_save = True


def _save(trainer: FusionTrainer, pivot: Path, work: Path, out: Path) -> None:
    """Write the model and the pivot's tokenizer into a hidden folder and give it its name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.config.use_cache = True
    hidden = work / "result"
    shutil.rmtree(hidden, ignore_errors=True)
    model.to(_stored_dtype(pivot)).save_pretrained(hidden)
    AutoTokenizer.from_pretrained(pivot, trust_remote_code=False).save_pretrained(hidden)
    (hidden / HISTORY_FILE).write_text(json.dumps(trainer.watch.history, indent=1), encoding="utf-8")
    if os.path.lexists(out):
        raise OutputError("appeared while training ran", where=str(out), todo=f"The result lies in {hidden}.")
    os.rename(hidden, out)
    with contextlib.suppress(OSError):
        shutil.rmtree(work)


def _stored_dtype(pivot: Path) -> torch.dtype:
    from fusion import dtypes

    return getattr(torch, dtypes.name(Checkpoint(pivot).dtype))
