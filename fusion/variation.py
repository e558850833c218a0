"""How far every matrix of every target has moved from the pivot, and the merge weights that follow from it: this is VARM.

    variation = finish(measure(pivot, targets))
    variation.ratios("matrix")                     # [tensors, targets], every row sums to 1

One streaming pass keeps sums and counts per tensor, so every coarser granularity is exact addition. Price: each byte of
every model is read once; memory is a few small blocks. Source: FuseChat, arXiv 2402.16107, eq. 7.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np

from fusion import compiled
from fusion.anatomy import GRANULARITIES, place
from fusion.blocks import Blocks, new_digests
from fusion.checkpoint import Checkpoint
from fusion.compiled.twins import BLOCK
from fusion.digest import TensorDigest
from fusion.dtypes import FLOATS
from fusion.errors import CheckpointError, RecipeError, Stopped, nearest
from fusion.preflight import mergeable_names, preflight
from fusion.progress import Meter, Work
from fusion.threads import THREADS
from fusion.untied import side_by_side

MEASURES = ("square", "absolute")


@dataclass(frozen=True)
class Variation:
    """Sums over every tensor of how far each target moved from the pivot.

    `names` [T] and `shapes` [T] of the tensors, `targets` [J] names; `square`, `absolute` [T, J] float64 sums of Δ² and |Δ|;
    `changed` [T, J] how many elements differ; `pivot_square` [T] sum of squares of the pivot; `element_square`,
    `element_absolute` [T, J] sums of the per-element ratios, for granularity parameter (None when they were not measured).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    targets: tuple[str, ...]
    square: np.ndarray
    absolute: np.ndarray
    changed: np.ndarray
    pivot_square: np.ndarray
    element_square: np.ndarray | None = None
    element_absolute: np.ndarray | None = None

    @property
    def numel(self) -> np.ndarray:
        """Elements of each tensor, [T]."""
        return np.array([int(np.prod(shape, dtype=np.int64)) for shape in self.shapes], dtype=np.int64)

    def units(self, granularity: str) -> list[str]:
        """Name the unit of every tensor at this granularity, [T]."""
        check_granularity(granularity)
        return [place(name).unit(granularity, name) for name in self.names]

    def means(self, granularity: str = "matrix", measure: str = "square") -> np.ndarray:
        """Variation of each tensor's unit, [T, J]: the pooled mean Σ over the unit ÷ its number of elements."""
        sums = self._sums(measure)
        index, count = self._grouped(granularity)
        pooled = np.zeros((count, len(self.targets)))
        np.add.at(pooled, index, sums)
        numel = np.bincount(index, weights=self.numel, minlength=count)
        return (pooled / np.maximum(numel, 1)[:, None])[index]

    def ratios(self, granularity: str = "matrix", measure: str = "square") -> np.ndarray:
        """Merge weights of each tensor, [T, J], rows sum to 1; a unit no target changed is uniform (eq. 7).

        At granularity parameter every element has weights of its own; here stands their mean over the changed elements.
        """
        check_granularity(granularity)
        if granularity == "parameter":
            self._sums(measure)
            sums = self.element_square if measure == "square" else self.element_absolute
            if sums is None:
                raise RecipeError("the variation of single parameters was not measured", todo="Measure with elements=True.")
            return normalise(sums)
        return normalise(self.means(granularity, measure))

    def totals(self, measure: str = "square") -> dict[str, dict[str, float]]:
        """Per target over the whole model: `mean` variation, `changed` share of elements, `relative` ‖Δ‖/‖pivot‖."""
        sums, numel = self._sums(measure), max(int(self.numel.sum()), 1)
        pivot = float(np.sqrt(self.pivot_square.sum())) or 1.0
        return {target: {"mean": float(sums[:, j].sum() / numel), "changed": float(self.changed[:, j].sum() / numel),
                         "relative": float(np.sqrt(self.square[:, j].sum())) / pivot}
                for j, target in enumerate(self.targets)}

    def rows(self, granularity: str = "matrix", measure: str = "square", weights: np.ndarray | None = None) -> list[dict]:
        """The report as one plain dict per tensor and target, with the effective `weights` [T, J] where they are known."""
        means, ratios, units = self.means(granularity, measure), self.ratios(granularity, measure), self.units(granularity)
        extra = (lambda t, j: {}) if weights is None else (lambda t, j: {"weight": float(weights[t, j])})
        changed = self.changed / np.maximum(self.numel, 1)[:, None]
        return [{"tensor": name, "unit": units[t], "layer": place(name).layer, "module": place(name).module,
                 "matrix": place(name).matrix, "shape": list(self.shapes[t]), "target": target,
                 "variation": float(means[t, j]), "ratio": float(ratios[t, j]),
                 "changed": float(changed[t, j]), **extra(t, j)}
                for t, name in enumerate(self.names) for j, target in enumerate(self.targets)]

    def to_dict(self, granularity: str = "matrix", measure: str = "square", weights: np.ndarray | None = None) -> dict:
        """The report as plain data: what `--json` prints and an output folder keeps."""
        return {"granularity": granularity, "measure": measure, "targets": list(self.targets),
                "totals": self.totals(measure), "tensors": self.rows(granularity, measure, weights)}

    def _sums(self, measure: str) -> np.ndarray:
        if measure not in MEASURES:
            raise RecipeError(f"unknown measure {measure!r}", where="measure", todo=nearest(str(measure), MEASURES))
        return self.square if measure == "square" else self.absolute

    def _grouped(self, granularity: str) -> tuple[np.ndarray, int]:
        number: dict[str, int] = {}
        index = np.array([number.setdefault(unit, len(number)) for unit in self.units(granularity)], dtype=np.int64)
        return index, len(number)


def check_granularity(granularity: str) -> None:
    """RecipeError with the nearest right name unless `granularity` is one."""
    if granularity not in GRANULARITIES:
        raise RecipeError(f"unknown granularity {granularity!r}", where="granularity",
                          todo=nearest(str(granularity), GRANULARITIES))


def normalise(values: np.ndarray) -> np.ndarray:
    """Divide each row of [T, J] by its sum; a row of zeros becomes uniform."""
    largest = values.max(axis=1, keepdims=True)
    scaled = np.divide(values, largest, out=np.zeros_like(values, dtype=np.float64), where=largest > 0)
    total = scaled.sum(axis=1, keepdims=True)
    uniform = np.full_like(scaled, 1 / max(values.shape[1], 1))
    return np.divide(scaled, total, out=uniform, where=total > 0)


def measure(pivot: Checkpoint, targets: Sequence[Checkpoint], *, elements: bool = False, allow_nonfinite: bool = False,
            digests: Sequence[MutableMapping[str, str]] = ()) -> Work[Variation]:
    """Read pivot and targets once and return their Variation; yields Progress per tensor.

    `elements` also sums the per-element ratios that granularity parameter reports (about twice the arithmetic). `digests`,
    one mapping per model, the pivot's first, gets the digest of every tensor that is read.

    Raises MismatchError when a target has not the pivot's shape, CheckpointError (naming tensor and model) for NaN or Inf
    unless `allow_nonfinite`, in which case elements that are not finite count as unchanged.
    """
    pivot, targets = side_by_side(pivot, targets)
    models = (pivot, *targets)
    preflight(pivot, targets).raise_if_bad()
    names = mergeable_names(pivot)
    meter = Meter("Measuring variation", len(names), "tensors", sum(model.info[name].nbytes for model in models for name in names))
    compiled.prepare(meter.bytes_total)
    stop = threading.Event()
    sums: dict[str, TensorSums] = {}

    def one(name: str) -> TensorSums:
        its = new_digests(name, models) if digests else ()
        result = sum_tensor(name, pivot, targets, stop, elements, allow_nonfinite, its)
        for known, digest in zip(digests, its, strict=True):
            known[name] = digest.value()
        return result

    yield meter.step()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            jobs = {pool.submit(one, name): name for name in sorted(names, key=lambda name: -pivot.info[name].numel)}
            for job in as_completed(jobs):
                name = jobs[job]
                sums[name] = job.result()
                yield meter.step(1, sum(model.info[name].nbytes for model in models), name)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return gather(pivot, targets, names, sums, elements)


@dataclass
class TensorSums:
    """The sums of one tensor: [J] float64 each, and the pivot's own."""

    square: np.ndarray
    absolute: np.ndarray
    changed: np.ndarray
    element_square: np.ndarray
    element_absolute: np.ndarray
    pivot_square: float = 0.0

    @classmethod
    def zero(cls, targets: int) -> TensorSums:
        return cls(*(np.zeros(targets) for _ in range(5)))

    def take(self, table: np.ndarray) -> None:
        """Take the sums of all blocks, each as `twins.sum_changes` gives them: [J + 1, 3]."""
        self.square, self.absolute, self.changed = table[:-1].T.copy()
        self.pivot_square = float(table[-1, 0])

    def add_elements(self, numbers: np.ndarray) -> None:
        """Add the shares of every element of one block, `numbers` [1 + J, n] float32, the pivot first."""
        size = np.abs(np.subtract(numbers[1:], numbers[0], dtype=np.float64))
        self.element_absolute += _shares(size).sum(axis=1)
        self.element_square += _shares(np.square(size, out=size)).sum(axis=1)  # of shares: squares cannot underflow


def _shares(size: np.ndarray) -> np.ndarray:
    """Divide every column of [J, n] by its sum in place, columns of zeros stay zero."""
    total = size.sum(axis=0)
    return np.divide(size, total, out=size, where=total > 0)


def sum_tensor(name: str, pivot: Checkpoint, targets: Sequence[Checkpoint], stop: threading.Event, elements: bool = False,
               allow_nonfinite: bool = False, digests: Sequence[TensorDigest | None] = ()) -> TensorSums:
    """Sum the variation of one tensor in blocks; Stopped when `stop` is set, CheckpointError for NaN or Inf.

    `digests`, one or None for each model, the pivot's first, see what is read.
    """
    blocks = Blocks(name, (pivot, *targets), digests)
    sums, start = TensorSums.zero(len(targets)), 0
    part, table = np.zeros((2, len(targets) + 1, 3))
    while start < blocks.numel:
        if stop.is_set():
            raise Stopped("stopped")
        done = 0 if elements else blocks.stretch("sum_changes", start, part, table)
        if done:
            start += done
            continue
        n = blocks.fill(start)
        rows, codes = blocks.rows, blocks.codes
        compiled.loops().sum_changes(rows, codes, n, part)
        if not np.isfinite(part[:, 0].sum()):
            if not allow_nonfinite:
                raise nonfinite(name, blocks.models)
            rows, codes = _mended(blocks.numbers(n))
            compiled.loops().sum_changes(rows, codes, n, part)
        table += part
        start += n
        if elements:
            sums.add_elements(blocks.numbers(n) if rows is blocks.rows else rows.view(np.float32))
    sums.take(table)
    return sums


def _mended(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and codes of [1 + J, n] float32 where every number that is not finite counts as unchanged."""
    pivot, models = numbers[0], numbers[1:]
    sound = np.isfinite(pivot)
    pivot[~sound] = 0
    np.copyto(models, pivot, where=~(np.isfinite(models) & sound))
    return numbers.view(np.uint8), np.full(len(numbers), FLOATS.index("F32"), np.int64)


def nonfinite(name: str, models: Sequence[Checkpoint]) -> CheckpointError:
    """The error that says which model's tensor holds NaN or Inf, and how many."""
    for model in models:
        numel, values = model.info[name].numel, np.empty(BLOCK, np.float32)
        bad = sum(int(np.count_nonzero(~np.isfinite(model.read(name, start, min(start + BLOCK, numel), values))))
                  for start in range(0, numel, BLOCK))
        if bad:
            return CheckpointError(f"{name} holds {bad} values that are NaN or Inf", where=model.name,
                                   todo="Use a sound checkpoint, or allow them with --allow-nonfinite.")
    return CheckpointError(f"{name} becomes NaN or Inf when merged", todo="Store the result as float32 or bfloat16.")


def gather(pivot: Checkpoint, targets: Sequence[Checkpoint], names: Sequence[str], sums: Mapping[str, TensorSums],
           elements: bool = False) -> Variation:
    """Put the sums of these tensors into one Variation, in the order of `names`."""
    def table(field: str) -> np.ndarray:
        return np.array([getattr(sums[name], field) for name in names]).reshape(len(names), len(targets))

    return Variation(tuple(names), tuple(pivot.info[name].shape for name in names), tuple(target.name for target in targets),
                     table("square"), table("absolute"), table("changed"),
                     np.array([sums[name].pivot_square for name in names]),
                     table("element_square") if elements else None, table("element_absolute") if elements else None)
