"""The one streaming loop: a recipe in, a checkpoint folder out.

    result = finish(merge(Recipe("pivot", ("target-a", "target-b")), "merged"))

Tensors stream from shards through float32 arithmetic in small blocks to shards; two threads, no whole model in memory.
Price: weights pooled over several tensors (layer, module, model) need every byte measured before the first is merged.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.card import model_card
from fusion.checkpoint import Checkpoint
from fusion.plan import MergePlan
from fusion.progress import Meter, Progress, Work
from fusion.recipe import Recipe
from fusion.variation import THREADS, TensorSums, Variation, gather, measure, sum_tensor
from fusion.writer import MAX_SHARD_BYTES, CheckpointWriter

RECIPE_FILE, VARIATION_FILE = "fusechat_recipe.yaml", "fusechat_variation.json"
_DONOR_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
                "generation_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its folder, the recipe with resolved revisions, the variation and the weights [T, J] it used."""

    folder: Path
    recipe: Recipe
    variation: Variation
    weights: np.ndarray


def merge(recipe: Recipe, out: str | os.PathLike, *, variation: Variation | None = None,
          max_shard_bytes: int = MAX_SHARD_BYTES) -> Work[MergeResult]:
    """Run a recipe into the new folder `out`; yields Progress, returns the MergeResult.

    `variation` skips measuring when it is already known for these very checkpoints. Every FusionError leaves no folder
    behind, and so does closing the generator.
    """
    plan = MergePlan.open(recipe, out)
    try:
        if plan.pools_tensors and variation is None:
            variation = yield from measure(plan.pivot, plan.targets, allow_nonfinite=recipe.allow_nonfinite)
        with CheckpointWriter(out, plan.outputs(), max_shard_bytes) as writer:
            variation, weights = yield from _stream(plan, writer, variation)
            recipe = resolved(plan)
            for name, content in side_files(plan, recipe, variation, weights):
                writer.write_file(name, content)
            return MergeResult(writer.finish(), recipe, variation, weights)
    finally:
        for model in plan.models:
            model.close()


def resolved(plan: MergePlan) -> Recipe:
    """The recipe with the fingerprint of every checkpoint it was run on."""
    return plan.recipe.with_(revisions={name: model.fingerprint for name, model in plan.labelled.items()})


def side_files(plan: MergePlan, recipe: Recipe, variation: Variation, weights: np.ndarray) -> Iterator[tuple[str, bytes | str]]:
    """Everything beside the weights: config, the donor's files, recipe, variation report and model card."""
    config = {key: value for key, value in plan.pivot.config.items() if key not in ("torch_dtype", "_name_or_path")}
    yield "config.json", json.dumps({**config, "dtype": plan.dtype}, indent=2) + "\n"
    for name in _donor_files(plan.donor):
        yield name, (plan.donor.folder / name).read_bytes()
    report = variation.to_dict(recipe.granularity, recipe.measure, weights)
    yield VARIATION_FILE, json.dumps(report, indent=1) + "\n"
    yield RECIPE_FILE, recipe.to_yaml()
    yield "README.md", model_card(plan, recipe, variation, weights)


def _donor_files(donor: Checkpoint) -> list[str]:
    return [name for name in _DONOR_FILES if (donor.folder / name).is_file()]


def _stream(plan: MergePlan, writer: CheckpointWriter, variation: Variation | None) -> Iterator[Progress]:
    """Merge and write every tensor; returns the variation and the effective weights [T, J]."""
    names = plan.weights.names
    ratios = plan.ratios(variation) if variation is not None else None
    meter = Meter("Merging", len(names), "tensors", plan.report.bytes_read + plan.report.bytes_written)
    stop, sums, weights = threading.Event(), {}, np.zeros((len(names), len(plan.targets)))
    yield meter.step()

    def one(t: int) -> None:
        measured = None if ratios is not None else _measured(plan, t, stop)
        ratio = ratios[t] if measured is None else _ratio(plan, t, measured)
        for start, stored in plan.blocks(t, ratio, stop):
            writer.write(names[t], start, stored)
        weights[t] = 0 if plan.weights.excluded[t] else plan.weights.row(t, ratio)
        if measured is not None:
            sums[names[t]] = measured

    for name in plan.pivot.info.keys() - set(names) - plan.pivot.tied_copies:  # counters and masks, not weights
        writer.write(name, 0, plan.pivot.raw(name))
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            jobs = {pool.submit(one, t): t for t in range(len(names))}
            for job in as_completed(jobs):
                job.result()
                name = names[jobs[job]]
                yield meter.step(1, plan.read_bytes(name) + writer.slots[name].nbytes, name)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    if variation is None:
        variation = gather(plan.pivot, plan.targets, names, sums, plan.per_element)
    return variation, weights


def _measured(plan: MergePlan, t: int, stop: threading.Event) -> TensorSums:
    return sum_tensor(plan.weights.names[t], plan.pivot, plan.targets, stop, plan.per_element, plan.recipe.allow_nonfinite)


def _ratio(plan: MergePlan, t: int, sums: TensorSums) -> np.ndarray:
    """Ratios [J] of one tensor that is a unit of its own."""
    name = plan.weights.names[t]
    alone = gather(plan.pivot, plan.targets, (name,), {name: sums}, plan.per_element)
    granularity = "parameter" if plan.per_element else "matrix"
    return alone.ratios(granularity, plan.recipe.measure)[0]
