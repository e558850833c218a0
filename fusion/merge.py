"""The one streaming loop: a recipe in, a checkpoint folder out.

    result = finish(merge(Recipe("pivot", ("target-a", "target-b")), "merged"))

Tensors stream from shards through float32 arithmetic in small blocks to shards; two threads, no whole model in memory.
Price: weights pooled over several tensors (layer, module, model) need every byte measured before the first is merged.
"""

from __future__ import annotations

import ast
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fusion import compiled, dtypes
from fusion.blocks import expect
from fusion.card import model_card
from fusion.checkpoint_stack import InputDigests
from fusion.digest import TensorDigest, checkpoint_digest, digest_checkpoint
from fusion.errors import CheckpointError, RecipeError
from fusion.plan import MergePlan
from fusion.progress import Meter, Work
from fusion.recipe import Recipe
from fusion.sources import written
from fusion.threads import THREADS
from fusion.variation import TensorSums, Variation, gather, measure, sum_tensor
from fusion.version import VERSION
from fusion.weights import measured_weights
from fusion.writer import MAX_SHARD_BYTES, CheckpointWriter

RECIPE_FILE, VARIATION_FILE = "fusechat_recipe.yaml", "fusechat_variation.json"
_LEAVE = "Do not change a checkpoint while it is merged."


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its folder, the recipe with content digests, and facts that came for free.

    `variation` is None where nothing was measured; `weights` [T, J] as used, [T, 0] for a method without weights; `parameters`
    of the pivot and of the result; `finite` whether all numbers of the result are; `warnings` of the preflight, in words.
    """

    folder: Path
    recipe: Recipe
    variation: Variation | None
    weights: np.ndarray
    tensors: int
    parameters: tuple[int, int]
    finite: bool
    warnings: tuple[str, ...] = ()


class Sink(Protocol):
    """Where merged tensors go: `write` gets the stored numbers of a tensor's flat elements from `start` on, `done` what is
    known of it after its last block. `todo` are the names to merge, in this order; `finished` the notes of all others."""

    todo: Sequence[str]
    finished: Mapping[str, Mapping]

    def write(self, name: str, start: int, stored: np.ndarray | bytes) -> None: ...

    def done(self, name: str, notes: Mapping) -> None: ...


@dataclass
class Computed:
    """What computing all tensors gave: digests of the result and, as far as they were read, of the inputs by model and tensor."""

    variation: Variation | None
    weights: np.ndarray
    outputs: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    finite: bool = True

    @property
    def digest(self) -> str:
        """The content digest of the result."""
        return checkpoint_digest(self.outputs)


Engine = Callable[[MergePlan, CheckpointWriter, "Variation | None"], Work[Computed]]


def merge(recipe: Recipe, out: str | os.PathLike, *, variation: Variation | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
          resume: bool = False, flush: bool = True, places: Mapping[str, Path] | None = None, stages: Sequence[Recipe] = (),
          engine: Engine | None = None) -> Work[MergeResult]:
    """Run a recipe into the new folder `out`; yields Progress, returns the MergeResult.

    `variation` skips measuring when it is already known for these very checkpoints. `resume` goes on after the last finished
    shard of a merge that was killed, and measures anew. `flush`: see CheckpointWriter. `places` and `stages` are for
    `stages.merge_stages`: where earlier results lie, and their recipes. `engine` computes the tensors (default: `compute`, in
    this process). Every FusionError leaves no folder behind, and so does closing the generator.
    """
    plan = MergePlan.open(recipe, out, places)
    try:
        marks = {label: model.stamp for label, model in plan.sources.items()}
        with CheckpointWriter(out, plan.outputs(), max_shard_bytes, resume=resume, plan_digest=plan.digest,
                              flush=flush) as writer:
            computed = yield from (engine or compute)(plan, writer, None if resume else variation)
            recipe = yield from resolved(plan, computed)
            check_unchanged(plan, marks)
            for name, content in side_files(plan, recipe, computed, stages):
                writer.write_file(name, content)
            folder = writer.finish()
        shapes = (int(np.prod(shape, dtype=np.int64)) for name, _, shape in plan.outputs() if name in plan.number)
        return MergeResult(folder, recipe, computed.variation, computed.weights, len(plan.number),
                           (plan.sources["pivot"].parameters, sum(shapes)), computed.finite, plan.report.warnings)
    finally:
        plan.close()


def compute(plan: MergePlan, sink: Sink, variation: Variation | None = None, device: str = "cpu") -> Work[Computed]:
    """Merge every tensor of a plan into `sink`; yields Progress, returns what is known then. Any sink gets the same bytes.

    `device`: see `compiled.prepare`; on a GPU the result is the same to float32 rounding.
    """
    compiled.prepare(plan.report.bytes_read, device)
    if plan.pools_tensors and variation is None:
        variation = yield from measure(plan.pivot, plan.targets, allow_nonfinite=plan.recipe.allow_nonfinite)
    ratios = plan.ratios(variation) if plan.measured and variation is not None else None
    notes = dict(sink.finished)
    sizes = {name: plan.read_bytes(name) + plan.output_bytes(name) for name, _, _ in plan.outputs()}
    meter, stop = Meter("Merging", len(sizes), "tensors", sum(sizes.values())), threading.Event()
    yield meter.step(len(notes), sum(sizes[name] for name in notes))
    todo = tuple(sink.todo)
    with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as ahead:

        def one(k: int) -> dict:
            if k + THREADS < len(todo):
                ahead.submit(expect, todo[k + THREADS], plan.read_models(todo[k + THREADS]))
            return merge_tensor(plan, todo[k], sink, stop, ratios)

        try:
            jobs = {pool.submit(one, k): name for k, name in enumerate(todo)}
            for job in as_completed(jobs):
                name = jobs[job]
                notes[name] = job.result()
                yield meter.step(1, sizes[name], name)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            ahead.shutdown(cancel_futures=True)
    return collect(plan, notes, variation)


def merge_tensor(plan: MergePlan, name: str, sink: Sink, stop: threading.Event, ratios: np.ndarray | None) -> dict:
    """Merge one tensor into `sink` and return its notes, plain data for `collect`.

    `ratios` [T, J] are the measured ratios; None means that each tensor is measured by itself, as far as it must be.
    """
    code, shape = plan.code(name), plan.pivot.info[name].shape
    digests, output = InputDigests(plan.sources), TensorDigest(code, shape)
    notes: dict = {}
    if name in plan.number:
        t = plan.number[name]
        ratio = plan.no_ratio() if ratios is None else ratios[t]
        if plan.measured and ratios is None:
            with digests.tapping(plan.models, name) as taps:
                sums = sum_tensor(name, plan.pivot, plan.targets, stop, plan.per_element, plan.recipe.allow_nonfinite, taps)
            notes["sums"], ratio = _plain(sums), _ratio(plan, t, sums)
        finite = True
        for start, stored in plan.blocks(t, ratio, stop, None if "sums" in notes else digests):
            finite = finite and not (plan.recipe.allow_nonfinite and dtypes.overflowed(stored, code))
            output.update(start * dtypes.ITEM_BYTES[code], stored)
            sink.write(name, start, stored)
        notes |= {"weights": plan.row(t, ratio).tolist(), "finite": finite}
    else:  # counters and masks, not weights
        stored = plan.pivot.raw(name)
        output.update(0, stored)
        sink.write(name, 0, stored)
    notes |= {"output": output.value(), "inputs": digests.values}
    sink.done(name, notes)
    return notes


def collect(plan: MergePlan, notes: Mapping[str, Mapping], variation: Variation | None = None) -> Computed:
    """Put the notes of all tensors together, wherever each of them was merged."""
    names = plan.weights.names
    if plan.measured and variation is None:
        sums = {name: TensorSums(**{part: np.array(value) for part, value in notes[name]["sums"].items()}) for name in names}
        variation = gather(plan.pivot, plan.targets, names, sums, plan.per_element)
    weights = np.array([notes[name]["weights"] for name in names], np.float64).reshape(len(names), -1)
    made = Computed(variation if plan.measured else None, weights, finite=all(notes[name]["finite"] for name in names))
    for name, its in notes.items():
        made.outputs[name] = its["output"]
        for label, known in its["inputs"].items():
            made.inputs.setdefault(label, {}).update(known)
    return made


def resolved(plan: MergePlan, computed: Computed) -> Work[Recipe]:
    """The recipe with every default written out, and the content digests of its checkpoints and of the result; yields Progress.

    Reads what the merge did not. RecipeError when the recipe names other digests: it was made for other weights.
    """
    revisions = {}
    for label, model in plan.sources.items():
        revisions[label] = yield from digest_checkpoint(model, computed.inputs.get(label, {}))
        if plan.recipe.revisions.get(label, revisions[label]) != revisions[label]:
            raise RecipeError("this is not the checkpoint the recipe was run on", where=label,
                              todo="Give the same checkpoint, or remove `revisions` from the recipe.")
    return plan.recipe.explicit().with_(pivot=written(plan.recipe.pivot), targets=tuple(map(written, plan.recipe.targets)),
                                        revisions=revisions, result={"engine": VERSION, "digest": computed.digest})


def check_unchanged(plan: MergePlan, stamps: Mapping[str, str]) -> None:
    """CheckpointError when a file of a source is no longer the one that was opened; `stamps` by the source's name."""
    for label, model in plan.sources.items():
        try:
            now = model.stamp
        except OSError as error:
            raise CheckpointError(f"{error.filename} went away while it was merged", where=model.name, todo=_LEAVE) from error
        if now != stamps[label]:
            file = next(iter(set(ast.literal_eval(now)) ^ set(ast.literal_eval(stamps[label]))))[0]
            raise CheckpointError(f"{file} was changed while it was merged", where=model.name, todo=_LEAVE)


def side_files(plan: MergePlan, recipe: Recipe, computed: Computed,
               stages: Sequence[Recipe] = ()) -> Iterator[tuple[str, bytes | str]]:
    """Everything beside the weights: config, the donor's files, recipe with its earlier stages, report and model card."""
    yield from plan.small_files()
    if computed.variation is not None:
        yield VARIATION_FILE, _report_text(computed.variation.to_dict(recipe.granularity, recipe.measure, computed.weights))
    yield RECIPE_FILE, "---\n".join(stage.to_yaml() for stage in (*stages, recipe))
    yield "README.md", model_card(plan, recipe, computed.variation, computed.weights, stages)


def _report_text(report: dict) -> str:
    """The report as JSON, a line for each row: Python indents ten times as slowly as it writes lines."""
    rows = ",\n".join(map(json.dumps, report["tensors"]))
    return json.dumps({**report, "tensors": []})[:-2] + f"\n{rows}\n]}}\n"


def _plain(sums: TensorSums) -> dict:
    return {part: np.asarray(value).tolist() for part, value in vars(sums).items()}


def _ratio(plan: MergePlan, t: int, sums: TensorSums) -> np.ndarray:
    """Ratios [J] of one tensor that is a unit of its own."""
    name = plan.weights.names[t]
    alone = gather(plan.pivot, plan.targets, (name,), {name: sums}, plan.per_element)
    return measured_weights(plan.recipe, alone)[0]
