"""What the sums of an inspection say: relative change, cosines, sign conflict, stable rank, rounding — at every granularity.

Sums of tensors add up to the sums of their layer, module or model exactly. Only the stable rank belongs to one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion.anatomy import GRANULARITIES, place
from fusion.errors import RecipeError, nearest
from fusion.variation import normalise


@dataclass(frozen=True)
class Quantity:
    """One number of an inspection: its title, formula, and whether there is one per target or one per tensor."""

    title: str
    formula: str
    per_target: bool = True


QUANTITIES = {
    "relative": Quantity("relative change", "‖Δ‖ ÷ ‖pivot‖"),
    "changed": Quantity("changed", "share of elements with Δ ≠ 0"),
    "mean_square": Quantity("variation", "Σ Δ² ÷ elements"),
    "ratio": Quantity("variation ratio", "a target's variation ÷ the sum over the targets"),
    "stable_rank": Quantity("stable rank", "‖Δ‖² ÷ σ₁(Δ)²"),
    "lost": Quantity("lost to rounding", "‖round(pivot + Δ) − (pivot + Δ)‖ ÷ ‖Δ‖"),
    "rounded_back": Quantity("rounded back", "share of changed elements with round(pivot + Δ) = pivot"),
    "cosine": Quantity("lowest cosine", "smallest Δᵢ·Δⱼ ÷ (‖Δᵢ‖ ‖Δⱼ‖) over the pairs of targets", per_target=False),
    "conflict": Quantity("sign conflict", "elements moved in opposite directions ÷ elements that two or more targets moved",
                         per_target=False),
    "mean_lost": Quantity("lost by the average", "‖round(pivot + Δ̄) − (pivot + Δ̄)‖ ÷ ‖Δ̄‖, Δ̄ the plain mean of the Δ",
                          per_target=False),
    "mean_rounded_back": Quantity("rounded back in the average", "share of elements with Δ̄ ≠ 0 and round(pivot + Δ̄) = pivot",
                                  per_target=False),
}


@dataclass(frozen=True)
class Inspection:
    """Sums over every tensor from which all QUANTITIES follow; T tensors, J targets, `dtype` what rounding is judged for.

    `gram` [T, J, J] Σ Δᵢ·Δⱼ in float64; `pivot_square` [T] Σ pivot²; `changed` [T, J], `moved`, `conflict` [T] counts of
    elements; `lost` [T, J], `mean_lost` [T] squared rounding errors; `back` [T, J], `mean_back`, `mean_changed` [T] counts;
    `sigma` [T, J] the largest singular value of Δ, or None when it was not measured.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    targets: tuple[str, ...]
    dtype: str
    gram: np.ndarray
    pivot_square: np.ndarray
    changed: np.ndarray
    moved: np.ndarray
    conflict: np.ndarray
    lost: np.ndarray
    back: np.ndarray
    mean_lost: np.ndarray
    mean_back: np.ndarray
    mean_changed: np.ndarray
    sigma: np.ndarray | None = None

    @property
    def numel(self) -> np.ndarray:
        """Elements of each tensor, [T]."""
        return np.array([math.prod(shape) for shape in self.shapes], dtype=np.int64)

    def units(self, granularity: str = "matrix") -> list[str]:
        """Name the unit of every tensor at this granularity, [T]."""
        check_granularity(granularity)
        return [place(name).unit(granularity, name) for name in self.names]

    def values(self, quantity: str, granularity: str = "matrix") -> np.ndarray:
        """One of QUANTITIES for each tensor's unit: [T, J] where there is one per target, else [T]; NaN where undefined.

        A share of nothing is 0; a cosine with a target that did not move, a relative change from a pivot of zeros and a stable
        rank above matrix level are undefined. RecipeError for unknown names, or when the stable rank was not measured.
        """
        if quantity not in QUANTITIES:
            raise RecipeError(f"unknown quantity {quantity!r}", where="quantity", todo=nearest(str(quantity), QUANTITIES))
        return getattr(self, f"_{quantity}")(Pool(self.units(granularity)))

    def cosines(self, granularity: str = "matrix") -> np.ndarray:
        """Cosines of the task vectors, [T, J, J]; NaN where one of the two did not move."""
        return self._cosines(Pool(self.units(granularity)))

    def rows(self, granularity: str = "matrix") -> list[dict]:
        """One plain dict per unit in the model's order; numbers that are undefined are None."""
        units, table = self.units(granularity), {name: self.values(name, granularity) for name in self.measured}
        cosines, pool = self.cosines(granularity), Pool(units)
        numel, tensors = pool.sum(self.numel), pool.sum(np.ones(len(units), np.int64))
        first = {unit: t for t, unit in reversed(list(enumerate(units)))}
        return [self._row(unit, t, granularity, table, cosines, int(numel[t]), int(tensors[t]))
                for unit, t in sorted(first.items(), key=lambda item: item[1])]

    def to_dict(self, granularity: str = "matrix") -> dict:
        """The report as plain data: what `--json` prints."""
        return {"granularity": granularity, "targets": list(self.targets), "dtype": self.dtype,
                "quantities": {name: QUANTITIES[name].formula for name in self.measured},
                "model": next(iter(self.rows("model")), {}), "units": self.rows(granularity)}

    @property
    def measured(self) -> list[str]:
        """The names of the QUANTITIES that this inspection has."""
        return [name for name in QUANTITIES if name != "stable_rank" or self.sigma is not None]

    def _row(self, unit: str, t: int, granularity: str, table: dict, cosines: np.ndarray, numel: int, tensors: int) -> dict:
        spot, whole = place(self.names[t]), granularity == "matrix"
        pairs = [(i, j) for i in range(len(self.targets)) for j in range(i + 1, len(self.targets))]
        return {"unit": unit, "layer": None if granularity == "model" else spot.layer,
                "module": spot.module if granularity in ("module", "matrix") else None,
                "matrix": spot.matrix if whole else None, "shape": list(self.shapes[t]) if whole else None,
                "tensors": tensors, "elements": numel,
                **{name: plain(values[t]) for name, values in table.items() if values.ndim == 1},
                "targets": {target: {name: plain(values[t, j]) for name, values in table.items() if values.ndim == 2}
                            for j, target in enumerate(self.targets)},
                "cosines": [{"targets": [self.targets[i], self.targets[j]], "cosine": plain(cosines[t, i, j])} for i, j in pairs]}

    @property
    def _square(self) -> np.ndarray:
        return np.einsum("tjj->tj", self.gram)

    def _relative(self, pool: Pool) -> np.ndarray:
        return np.sqrt(share(pool.sum(self._square), pool.sum(self.pivot_square)[:, None], np.nan))

    def _changed(self, pool: Pool) -> np.ndarray:
        return share(pool.sum(self.changed), pool.sum(self.numel)[:, None])

    def _mean_square(self, pool: Pool) -> np.ndarray:
        return share(pool.sum(self._square), pool.sum(self.numel)[:, None])

    def _ratio(self, pool: Pool) -> np.ndarray:
        return normalise(pool.sum(self._square))

    def _stable_rank(self, pool: Pool) -> np.ndarray:
        if self.sigma is None:
            raise RecipeError("the stable rank was not measured", todo="Inspect with spectral=True.")
        rank = share(self._square, np.square(self.sigma))
        return rank if pool.single else np.full_like(rank, np.nan)

    def _lost(self, pool: Pool) -> np.ndarray:
        return np.sqrt(share(pool.sum(self.lost), pool.sum(self._square)))

    def _rounded_back(self, pool: Pool) -> np.ndarray:
        return share(pool.sum(self.back), pool.sum(self.changed))

    def _cosines(self, pool: Pool) -> np.ndarray:
        products = pool.sum(self.gram)
        norm = np.sqrt(np.einsum("tjj->tj", products))
        return np.clip(share(products, norm[:, :, None] * norm[:, None, :], np.nan), -1, 1)

    def _cosine(self, pool: Pool) -> np.ndarray:
        pairs = self._cosines(pool)[:, ~np.eye(len(self.targets), dtype=bool)]
        known = np.where(np.isnan(pairs), np.inf, pairs).min(axis=1, initial=np.inf)
        return np.where(np.isinf(known), np.nan, known)

    def _conflict(self, pool: Pool) -> np.ndarray:
        return share(pool.sum(self.conflict), pool.sum(self.moved))

    def _mean_lost(self, pool: Pool) -> np.ndarray:
        mean = np.maximum(self.gram.sum(axis=(1, 2)), 0) / len(self.targets)**2
        return np.sqrt(share(pool.sum(self.mean_lost), pool.sum(mean)))

    def _mean_rounded_back(self, pool: Pool) -> np.ndarray:
        return share(pool.sum(self.mean_back), pool.sum(self.mean_changed))


class Pool:
    """Adds up the values of tensors that belong to one unit; `units` [T] names them."""

    def __init__(self, units: Sequence[str]):
        number: dict[str, int] = {}
        self.index = np.array([number.setdefault(unit, len(number)) for unit in units], dtype=np.int64)
        self.count = len(number)

    @property
    def single(self) -> bool:
        """Whether every tensor is a unit of its own."""
        return self.count == len(self.index)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """For each tensor the sum over its unit; `values` [T, …]."""
        total = np.zeros((self.count, *values.shape[1:]))
        np.add.at(total, self.index, values)
        return total[self.index]


def check_granularity(granularity: str) -> None:
    """RecipeError with the nearest right name unless an inspection has this granularity."""
    if granularity not in GRANULARITIES[:-1]:
        raise RecipeError(f"unknown granularity {granularity!r}", where="granularity",
                          todo=nearest(str(granularity), GRANULARITIES[:-1]))


def share(part: np.ndarray, whole: np.ndarray, nothing: float = 0.0) -> np.ndarray:
    """part ÷ whole; 0 ÷ 0 is `nothing`, anything else ÷ 0 is NaN."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    empty = np.where(part == 0, nothing, np.nan)
    return np.divide(part, whole, out=empty, where=whole > 0)


def plain(value: float) -> float | None:
    """A number for JSON; None for NaN and Inf."""
    return float(value) if math.isfinite(value) else None
