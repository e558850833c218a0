"""The sums of one tensor from which every number of an Inspection follows: task vectors Δ_j = target_j − pivot, in float64."""

from __future__ import annotations

import numpy as np

from fusion import dtypes

_EXACT = {"BF16": {"BF16", "F32", "F64"}, "F16": {"F16", "F32", "F64"}, "F32": {"F32", "F64"}, "F64": {"F32", "F64"}}


class DeltaSums:
    """Sums over one tensor of J targets; every field is exact addition over the elements.

    `gram` [J, J] Σ Δ_i·Δ_j; `pivot_square` Σ pivot²; `changed` [J] elements with Δ_j ≠ 0; `moved` elements that at least two
    targets changed, `conflict` those of them that two targets changed in opposite directions. Rounding to the output dtype:
    `lost` [J] Σ (round(pivot + Δ_j) − (pivot + Δ_j))², `back` [J] changed elements that round to the pivot's value again;
    `mean_lost`, `mean_back`, `mean_changed` the same of the targets' plain average, which is what a merge has to store.
    """

    def __init__(self, stored: list[str], out: str):
        """`stored` [J] the dtype codes of the targets, `out` the code that the result is rounded to."""
        count = len(stored)
        self.out, self.exact = out, [out in _EXACT.get(code, ()) for code in stored]
        self.gram, self.changed = np.zeros((count, count)), np.zeros(count, np.int64)
        self.lost, self.back = np.zeros(count), np.zeros(count, np.int64)
        self.pivot_square = self.mean_lost = 0.0
        self.moved = self.conflict = self.mean_back = self.mean_changed = 0
        self._room: np.ndarray | None = None  # [2 + J, block] float64

    def add(self, blocks: np.ndarray, bad: np.ndarray) -> None:
        """Add one block: `blocks` [1 + J, n] float32, the pivot first; the first block is the longest."""
        pivot, targets = blocks[0], blocks[1:]
        if self._room is None:  # fresh memory for every block would cost more than the arithmetic
            self._room = np.empty((len(blocks) + 1, len(pivot)))
        room = self._room[:, :len(pivot)]
        np.copyto(room[0], pivot)
        deltas = np.subtract(targets, room[0], out=room[1:-1])
        self.pivot_square += squares(room[0])
        self.gram += gram(deltas)
        self._directions(pivot, targets)
        for j, exact in enumerate(self.exact):
            if not exact:
                lost, back, _ = self._rounding(pivot, deltas[j], targets[j], room[-1])
                self.lost[j] += lost
                self.back[j] += back
        mean = np.add.reduce(deltas, axis=0, out=room[0])
        mean /= len(deltas)
        lost, back, changed = self._rounding(pivot, mean, None, room[-1])
        self.mean_lost += lost
        self.mean_back += back
        self.mean_changed += changed

    def _directions(self, pivot: np.ndarray, targets: np.ndarray) -> None:
        up, down = targets > pivot, targets < pivot
        for j in range(len(targets)):
            self.changed[j] += np.count_nonzero(up[j]) + np.count_nonzero(down[j])
        if len(targets) > 1:
            self.conflict += int(np.count_nonzero(up.any(axis=0) & down.any(axis=0)))
            up |= down
            self.moved += int(np.count_nonzero(up.sum(axis=0, dtype=np.uint8) > 1))

    def _rounding(self, pivot: np.ndarray, delta: np.ndarray, merged: np.ndarray | None, room: np.ndarray
                  ) -> tuple[float, int, int]:
        """Squared rounding error of pivot + delta, how many of its changed elements fall back, how many changed."""
        moved = delta != 0
        if merged is None:
            merged = np.add(delta, pivot, out=room).astype(np.float32)
        rounded = dtypes.decode(dtypes.encode(merged, self.out), self.out, np.empty_like(merged))
        back = int(np.count_nonzero((rounded == pivot) & moved))
        with np.errstate(over="ignore", invalid="ignore"):
            error = np.subtract(rounded, pivot, out=room, dtype=np.float64)
            error -= delta
        return squares(error), back, int(np.count_nonzero(moved))


def squares(values: np.ndarray) -> float:
    """Sum of squares of [n] float64, in an order that depends on n alone."""
    return float(np.einsum("n,n->", values, values))


def gram(rows: np.ndarray) -> np.ndarray:
    """Products of all pairs of rows [J, n] float64 → [J, J], in an order that depends on n alone (a BLAS has its own)."""
    count = len(rows)
    result = np.empty((count, count))
    for i in range(count):
        for j in range(i + 1):
            result[i, j] = result[j, i] = np.einsum("n,n->", rows[i], rows[j])
    return result
