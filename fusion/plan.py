"""Plan purely, then touch the disk: what a recipe means for every tensor, and the arithmetic of one tensor in blocks.

`merge` writes these blocks to a folder, `live` keeps them in memory, others only digest them; all get the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fusion import dtypes, side_files
from fusion.blocks import Blocks, Stored
from fusion.checkpoint import Checkpoint
from fusion.checkpoint_stack import CheckpointStack, InputDigests
from fusion.compiled.twins import BLOCK
from fusion.errors import MismatchError, RecipeError, Stopped
from fusion.methods import METHODS, Method, elementwise
from fusion.methods.average import shares as normalised
from fusion.preflight import Finding, Preflight, mergeable_names, preflight
from fusion.recipe import Recipe
from fusion.slices import PIVOT, is_lent, restack
from fusion.sources import open_checkpoint
from fusion.untied import side_by_side
from fusion.variation import Variation, nonfinite
from fusion.version import VERSION
from fusion.vocabulary import unify
from fusion.weights import OptionPlan, WeightPlan, measured_weights


@dataclass(frozen=True)
class MergePlan:
    """A checked recipe with its checkpoints open; nothing was read but headers.

    `sources` are the checkpoints as they are ("pivot" and the targets' names), `pivot` and `targets` the same with the tensor
    names, layers and vocabulary of the result. `parts` [T, J] says which targets take part in a tensor; `files` are the
    tokenizer of the result when it is no model's own; `refs` is what the models were opened by, the pivot first.
    """

    recipe: Recipe
    sources: Mapping[str, Checkpoint]
    pivot: Checkpoint
    targets: tuple[Checkpoint, ...]
    weights: WeightPlan
    options: OptionPlan
    parts: np.ndarray
    report: Preflight
    files: Mapping[str, bytes] = field(default_factory=dict)
    refs: tuple[str, ...] = ()

    @classmethod
    def open(cls, recipe: Recipe, out: str | os.PathLike | None = None, places: Mapping[str, Path] | None = None, *,
             in_memory: bool = True) -> MergePlan:
        """Open the checkpoints of a recipe and run the preflight; FusionError for the first thing in the way.

        `out` None means that the result stays in memory, or is not kept at all if not `in_memory`. `places` says where models
        lie that the recipe calls by a name: the results of earlier stages.
        """
        recipe.check()
        method = METHODS[recipe.method]
        refs = [(places or {}).get(ref, ref) for ref in (recipe.pivot, *recipe.targets)]
        opened = [open_checkpoint(ref, name) for ref, name in zip(refs, (recipe.pivot_name, *recipe.names), strict=True)]
        sources = dict(zip((PIVOT, *recipe.names), opened, strict=True))
        pivot, targets = side_by_side(opened[0], opened[1:])
        files: Mapping[str, bytes] = {}
        if recipe.vocabulary:
            pivot, targets, files = unify(pivot, targets, recipe.vocabulary)
        named, findings = None, ()
        if recipe.slices:
            stacked = restack(dict(zip(sources, (pivot, *targets), strict=True)), recipe.slices,
                              recipe.measured or method.reads_pivot(recipe.options, len(targets)))
            pivot, *targets = stacked.models.values()
            named, findings = stacked.parts, tuple(Finding("warning", "", "config", text) for text in stacked.warnings)
        report = preflight(pivot, targets, out=out, dtype=recipe.dtype or None, method=recipe.method,
                           in_memory=in_memory and out is None, donor=sources[recipe.donor])
        report = replace(report, findings=report.findings + findings).raise_if_bad()
        names = mergeable_names(pivot)
        parts = np.ones((len(names), len(targets)), bool)
        if named is not None:
            parts[:] = [[target in named[name] for target in recipe.names] for name in names]
            _check_parts(parts, names, method)
        own = np.array([[not is_lent(target, name) for target in targets] for name in names], bool).reshape(parts.shape)
        parts &= own
        parts[(parts.sum(axis=1) < method.min_targets) & ~own.all(axis=1)] = False  # too few have it: the pivot's stays
        return cls(recipe, sources, pivot, tuple(targets), WeightPlan.of(recipe, names), OptionPlan.of(recipe, names), parts,
                   report, files, tuple(map(str, refs)))

    def close(self) -> None:
        """Close the files of all checkpoints."""
        for model in self.sources.values():
            model.close()

    @property
    def method(self) -> Method:
        """The merge method."""
        return METHODS[self.recipe.method]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """Pivot first, then the targets."""
        return (self.pivot, *self.targets)

    @property
    def donor(self) -> Checkpoint:
        """The checkpoint that gives tokenizer, chat template and generation config."""
        return self.sources[self.recipe.donor]

    @property
    def measured(self) -> bool:
        """Whether some weight is a measured ratio."""
        return self.recipe.measured

    @property
    def pools_tensors(self) -> bool:
        """Whether a tensor's weights depend on other tensors, so that all must be measured before the first is merged."""
        return self.measured and self.recipe.granularity in ("layer", "module", "model")

    @property
    def per_element(self) -> bool:
        """Whether elements are measured one by one."""
        return self.measured and self.recipe.granularity == "parameter"

    @cached_property
    def number(self) -> dict[str, int]:
        """Name → number of the tensors that are merged; others are copied from the pivot."""
        return {name: t for t, name in enumerate(self.weights.names)}

    @cached_property
    def digest(self) -> str:
        """A mark of what is merged how, from engine, recipe and the files' stamps: the same plan gives the same bytes."""
        said = {**self.recipe.to_dict(), "revisions": {}, "result": {}}
        marks = [VERSION, json.dumps(said, sort_keys=True), *(model.stamp for model in self.sources.values())]
        return hashlib.sha256("\0".join(marks).encode(errors="backslashreplace")).hexdigest()

    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype code and shape of every tensor of the result, in the pivot's order."""
        return [(name, self.code(name), tensor.shape) for name, tensor in self.pivot.info.items()
                if name not in self.pivot.tied_copies]

    @property
    def dtype(self) -> str:
        """Name of the dtype that most of the result is stored with."""
        return self.recipe.dtype or dtypes.name(self.pivot.dtype)

    @cached_property
    def config(self) -> dict:
        """The result's config.json."""
        config = {key: value for key, value in self.pivot.config.items() if key not in ("torch_dtype", "_name_or_path")}
        if not self.pivot.tied:  # a config may say tied beside a head that is stored and differs
            config = _untied(config)
            if isinstance(config.get("text_config"), dict):
                config["text_config"] = _untied(config["text_config"])
        return {**config, "dtype": self.dtype}

    def small_files(self) -> Iterator[tuple[str, bytes]]:
        """The files that make a model of the weights: config, tokenizer, chat template, generation config."""
        yield "config.json", json.dumps(self.config, indent=2).encode() + b"\n"
        yield from self.files.items()
        ours = {name: file for name, file in side_files.copied(self.donor).items()
                if not (self.files and side_files.is_tokenizer_file(name))}  # a donor's tokens are not those of the result
        yield from ((name, file.read_bytes()) for name, file in ours.items())
        template = self.donor.chat_template
        if self.files and self.recipe.donor != PIVOT and template is not None and "chat_template.jinja" not in ours:
            yield "chat_template.jinja", template.encode()  # else it would stay behind with the donor's tokens

    def write_small_files(self, folder: Path) -> None:
        """Lay the small files into a folder."""
        for name, content in self.small_files():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def code(self, name: str) -> str:
        """The dtype code that a tensor is stored with."""
        return dtypes.code(self.recipe.dtype) if self.recipe.dtype and name in self.number else self.pivot.info[name].dtype

    def kept(self, t: int) -> bool:
        """Whether tensor `t` is the pivot's own: excluded, or without a target that takes part in it."""
        return bool(self.weights.excluded[t]) or not self.parts[t].any()

    def readers(self, t: int) -> list[int]:
        """Which models (0 = pivot, 1 … J the targets) merging tensor `t` reads."""
        if self.kept(t):
            return [0]
        part = [int(j) + 1 for j in np.flatnonzero(self.parts[t])]
        return [0, *part] if self._reads_pivot(t) else part

    def read_models(self, name: str) -> list[Checkpoint]:
        """The models that merging this tensor reads, the pivot first where it is measured or read."""
        readers = self.readers(self.number[name]) if name in self.number else [0]
        measured = self.measured and not self.pools_tensors and name in self.number
        return list(self.models) if measured else [self.models[i] for i in readers]

    def read_bytes(self, name: str) -> int:
        """Bytes that merging this tensor reads at least once, all models together."""
        models = self.readers(self.number[name]) if name in self.number else [0]
        return sum(self.models[i].info[name].nbytes for i in models)

    def output_bytes(self, name: str) -> int:
        """Bytes of this tensor in the result."""
        return self.pivot.info[name].numel * dtypes.ITEM_BYTES[self.code(name)]

    def ratios(self, variation: Variation) -> np.ndarray:
        """What variation gives as weights [T, J], at the recipe's granularity."""
        if (variation.names, variation.targets) != (self.weights.names, self.recipe.names):
            raise MismatchError("the variation was measured on other models", todo="Measure these models again.")
        return measured_weights(self.recipe, variation)

    def no_ratio(self) -> np.ndarray:
        """What stands for the ratio [J] of a tensor where nothing is measured."""
        return np.zeros(len(self.targets))

    def row(self, t: int, ratio: np.ndarray) -> np.ndarray:
        """Effective weights [J] of tensor `t`, or [0] of a method without weights; 0 where a target takes no part."""
        row = self.weights.row(t, ratio)
        if self.kept(t):
            return np.zeros_like(row)
        if not row.size or self.parts[t].all():
            return row
        row = np.where(self.parts[t], row, 0.0)
        if self.weights.kind != "shares":
            return row
        return row / row.sum() if row.sum() > 0 else self.parts[t] / self.parts[t].sum()

    def table(self, ratios: np.ndarray) -> np.ndarray:
        """Effective weights [T, J] of all tensors from their measured ratios [T, J]."""
        rows = [self.row(t, ratios[t]) for t in range(len(self.number))]
        return np.array(rows, np.float64).reshape(self.weights.numbers.shape)

    def weighing(self, t: int, ratio: np.ndarray) -> list[float] | tuple:
        """What tensor `t` is weighed by, as plain data: two equal answers weigh it alike."""
        if not self._weighs_elements(t):
            return self.row(t, ratio).tolist()
        return "element", self.recipe.measure, self.weights.fixed(t, ratio).tolist()

    def arguments(self, t: int) -> dict[str, object]:
        """The method's options for tensor `t`, by the names of its arguments; [targets that take part] where one for each."""
        return {name: value[self.parts[t]] if isinstance(value, np.ndarray) else value
                for name, value in self.options.row(t).items()}

    def blocks(self, t: int, ratio: np.ndarray, stop: threading.Event,
               digests: InputDigests | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Merge tensor number `t` whose measured ratios are `ratio` [J]; yields (first element, stored numbers).

        float32 arithmetic, one cast; the numbers are overwritten by the next block. `digests` takes in what is read.
        CheckpointError when a number read or made is NaN or Inf and that is not allowed.
        """
        name = self.weights.names[t]
        numel, at = self.pivot.info[name].numel, 0
        out = Stored(self.code(name), min(BLOCK, numel))
        shares = self._shares(t, ratio)
        merged = (self._encoded(out, self._merged(t, ratio, self._stack(t, stop, digests))) if shares is None
                  else self._averaged(out, t, shares, digests))
        for stored in merged:
            if stop.is_set():
                raise Stopped("stopped")
            if not self.recipe.allow_nonfinite and not out.finite:
                raise nonfinite(name, [self.models[i] for i in self.readers(t)])
            yield at, stored
            at += len(stored)
        if at != numel:
            raise RuntimeError(f"{self.recipe.method} gave {at} of {numel} numbers of {name}")

    def _encoded(self, out: Stored, merged: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        while True:
            with np.errstate(over="ignore", invalid="ignore"):  # the stack and `out` find what is not finite
                block = next(merged, None)
                if block is None:
                    return
                stored = out.encode(block)
            yield stored

    def _averaged(self, out: Stored, t: int, shares: np.ndarray, digests: InputDigests | None) -> Iterator[np.ndarray]:
        """The same as the method's own blocks, from stored bytes to stored bytes at once; `shares` [targets that take part]."""
        name, models = self.weights.names[t], [self.models[i] for i in self.readers(t)]
        if self.measured and digests is None:  # all was read and looked at when it was measured
            models = [model for model, share in zip(models, shares, strict=True) if share]
            shares = shares[shares != 0]
        with digests.tapping(models, name) if digests else nullcontext(()) as taps:
            blocks = Blocks(name, models, taps)
            start = 0
            while start < blocks.numel:
                stored = out.weigh_stretch(blocks, start, shares)
                if not len(stored):
                    stored = out.weigh(blocks, blocks.fill(start), shares)
                start += len(stored)
                yield stored

    def _shares(self, t: int, ratio: np.ndarray) -> np.ndarray | None:
        """The weights of the targets that take part where the tensor is their plain average, else None."""
        if self.kept(t) or self._weighs_elements(t) or self.recipe.method not in ("varm", "linear"):
            return None
        if not self.arguments(t).get("normalize", True):
            return None
        return normalised(self.row(t, ratio)[self.parts[t]])

    def _merged(self, t: int, ratio: np.ndarray, stack: CheckpointStack) -> Iterator[np.ndarray]:
        """The float32 blocks of tensor `t`, in order."""
        if self.kept(t):
            return (block.pivot for block in stack.blocks())
        if self._weighs_elements(t):
            fixed, power = self.weights.fixed(t, ratio)[self.parts[t]], 2 if self.recipe.measure == "square" else 1
            return (elementwise(block.pivot, block.models, fixed, np.empty_like(block.pivot), power=power)
                    for block in stack.blocks())
        row = self.row(t, ratio)
        weights = row[self.parts[t]] if row.size else np.ones(stack.count)
        return self.method.run(stack, weights, **self.arguments(t))

    def _weighs_elements(self, t: int) -> bool:
        """Whether every element of tensor `t` has weights of its own: VARM at granularity parameter."""
        return self.per_element and self.recipe.method == "varm" \
            and bool(np.isnan(self.weights.fixed(t, self.no_ratio())[self.parts[t]]).any())

    def _reads_pivot(self, t: int) -> bool:
        options = {name.rstrip("_"): value for name, value in self.options.row(t).items()}
        return self._weighs_elements(t) or self.method.reads_pivot(options, int(self.parts[t].sum()))

    def _stack(self, t: int, stop: threading.Event, digests: InputDigests | None) -> CheckpointStack:
        name, readers = self.weights.names[t], self.readers(t)
        keys = tuple(key(self.recipe.seed, name, self.recipe.names[i - 1]) for i in readers if i)
        return CheckpointStack(name, self.pivot, readers[0] == 0, [self.models[i] for i in readers if i], keys, stop, digests,
                               self.recipe.allow_nonfinite)


def key(seed: int, tensor: str, target: str) -> int:
    """The 64-bit number that seeds what is random in one tensor of one target: the first 8 bytes of a SHA-256."""
    text = f"{seed}\0{tensor}\0{target}".encode(errors="backslashreplace")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _untied(config: dict) -> dict:
    return {**config, "tie_word_embeddings": False} if config.get("tie_word_embeddings") else {**config}


def _check_parts(parts: np.ndarray, names: list[str], method: Method) -> None:
    few = next((t for t, count in enumerate(parts.sum(axis=1)) if 0 < count < method.min_targets), None)
    if few is not None:
        raise RecipeError(f"{names[few]} has {parts[few].sum()} target, {method.name} merges at least {method.min_targets}",
                          where="slices", todo="Name more targets in this slice.")
