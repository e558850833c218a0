"""The same merge held in memory: try it at once, and after a change compute only the matrices that it touches.

The numbers are the bytes that `merge` would write, so a saved folder answers with the same logits. Price: one model in its
stored dtype stays in memory for the next change.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusion import compiled, dtypes
from fusion.loading import TORCH_NAMES
from fusion.plan import MergePlan
from fusion.progress import Meter, Work
from fusion.recipe import Recipe
from fusion.slices import origin_of
from fusion.variation import Variation, measure

if TYPE_CHECKING:
    from fusion.chat import ChatModel


@dataclass(frozen=True)
class LiveResult:
    """A merge in memory: `tensors` name → stored numbers, effective `weights` [T, J], how many tensors were `computed`."""

    plan: MergePlan
    tensors: Mapping[str, np.ndarray]
    weights: np.ndarray
    computed: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as stored."""
        return sum(stored.nbytes for stored in self.tensors.values())


class LiveMerge:
    """Remembers the last merge; `update` computes the tensors whose weights, options, models or dtype differ from it."""

    def __init__(self):
        self._last: dict[str, tuple[bytes, np.ndarray]] = {}  # name → what it was made of, stored numbers

    def update(self, recipe: Recipe, variation: Variation | None = None) -> Work[LiveResult]:
        """Merge a recipe in memory; yields Progress, returns the LiveResult.

        `variation` skips measuring when it is already known for these very checkpoints. Raises what `merge` raises.
        """
        plan = MergePlan.open(recipe)
        try:
            compiled.prepare(plan.report.bytes_read)
            if plan.measured and variation is None:
                variation = yield from measure(plan.pivot, plan.targets, elements=plan.per_element,
                                               allow_nonfinite=recipe.allow_nonfinite)
            ratios = plan.ratios(variation) if plan.measured else np.tile(plan.no_ratio(), (len(plan.number), 1))
            tensors, computed = yield from self._compute(plan, ratios)
            return LiveResult(plan, tensors, plan.table(ratios), computed)
        finally:
            plan.close()

    def _compute(self, plan: MergePlan, ratios: np.ndarray) -> Work[tuple[dict[str, np.ndarray], int]]:
        models = "|".join(model.stamp for model in plan.sources.values())
        made_of = {name: _signature(plan, name, ratios, models) for name, _, _ in plan.outputs()}
        last = self._last  # replaced as a whole, never changed: another thread may update meanwhile
        tensors = {name: last[name][1] for name, mark in made_of.items() if name in last and last[name][0] == mark}
        todo = [name for name in made_of if name not in tensors]
        meter = Meter("Merging in memory", len(todo), "tensors", sum(map(plan.read_bytes, todo)))
        for name in todo:
            tensors[name] = _tensor(plan, name, ratios)
            yield meter.step(1, plan.read_bytes(name), name)
        self._last = {name: (mark, tensors[name]) for name, mark in made_of.items()}
        return tensors, len(todo)


def _signature(plan: MergePlan, name: str, ratios: np.ndarray, models: str) -> bytes:
    """All that the numbers of a tensor depend on."""
    recipe, t = plan.recipe, plan.number.get(name)
    origin = [(owner.name, own) for owner, own in (origin_of(model, name) for model in plan.models)]
    said = [models, origin, recipe.vocabulary, plan.code(name), recipe.allow_nonfinite]
    if t is not None and not plan.kept(t):
        said += [recipe.method, plan.parts[t].tolist(), plan.weighing(t, ratios[t])]
        said += [value.tolist() if isinstance(value, np.ndarray) else value for _, value in sorted(plan.arguments(t).items())]
        said += [recipe.seed, recipe.names] if plan.method.random else []
    return repr(said).encode(errors="backslashreplace")


def _tensor(plan: MergePlan, name: str, ratios: np.ndarray) -> np.ndarray:
    if name not in plan.number:
        return np.frombuffer(plan.pivot.raw(name), np.uint8)
    t = plan.number[name]
    result = np.empty(plan.pivot.info[name].numel, dtypes.stored_type(plan.code(name)))
    for start, stored in plan.blocks(t, ratios[t], threading.Event()):
        result[start:start + len(stored)] = stored
    return result


def chat_model(result: LiveResult, name: str) -> ChatModel:
    """Make a merge in memory ready to chat with; see `chat.from_tensors` for dtypes and errors."""
    from fusion import chat

    with tempfile.TemporaryDirectory(prefix="fusechat-") as scratch:
        folder = Path(scratch)
        result.plan.write_small_files(folder)
        return chat.from_tensors(state_dict(result), result.plan.dtype, folder, name)


def state_dict(result: LiveResult) -> dict:
    """The merged tensors as torch tensors in their stored dtype and shape; a copy, since models own their weights."""
    import torch

    def tensor(name: str, code: str, shape: tuple[int, ...]):
        data, dtype = bytearray(result.tensors[name]), getattr(torch, TORCH_NAMES[code])
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    return {name: tensor(name, code, shape) for name, code, shape in result.plan.outputs()}
