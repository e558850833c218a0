"""The largest singular value σ₁ of a task vector, by Lanczos steps on ΔᵀΔ: the power iteration that remembers its path.

Plain power iteration needs hundreds of steps where the largest values lie close together, as they do in noise; Lanczos takes
the best value in the space of all its iterates (Golub & Van Loan, Matrix Computations, ch. 10). A value found is never above
σ₁ (rounding aside), so the stable rank is never below the true one. Price: Δ of one tensor and target in float32 in memory,
and one pass over it a step. The start is fixed and the sums have a fixed order: the same matrix gives the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fusion.checkpoint import Checkpoint
from fusion.inspection.deltas import squares
from fusion.progress import Meter, Work
from fusion.threads import THREADS

MAX_STEPS = 48
TOLERANCE = 1e-4  # of σ₁², from one step to the next, twice running
_PIECE = 65_536  # elements that are multiplied while they lie in the cache
_TASK = 32  # pieces that one thread takes at a time


def largest_singular_values(pivot: Checkpoint, targets: Sequence[Checkpoint], names: Sequence[str],
                            moved: np.ndarray) -> Work[np.ndarray]:
    """σ₁ of every Δ, [T, J] float64; yields Progress a step. `moved` [T, J] ‖Δ‖² says which Δ need no work.

    A tensor of more than two dimensions counts as the matrix of its last dimension's rows; of a vector σ₁ is the norm.
    """
    sigma = np.sqrt(moved)
    todo = [(t, j) for t, name in enumerate(names) for j in range(len(targets))
            if moved[t, j] > 0 and min(matrix_shape(pivot.info[name].shape)) > 1]
    meter = Meter("Measuring stable ranks", len(todo), "matrices", sum(4 * pivot.info[names[t]].numel for t, _ in todo))
    yield meter.step()
    with ThreadPoolExecutor(THREADS) as pool:
        for t, j in todo:
            name, scale = names[t], math.sqrt(moved[t, j] / pivot.info[names[t]].numel)
            delta = yield from _delta(pool, meter, pivot, targets[j], name, scale)
            sigma[t, j] = scale * (yield from _largest(pool, meter, delta))
            yield meter.step(1, delta.nbytes, name)
    return sigma


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that a tensor of this shape counts as."""
    columns = shape[-1] if shape else 1
    return math.prod(shape) // max(columns, 1), columns


def estimates(multiply: Callable[[np.ndarray], np.ndarray], size: int) -> Iterator[float]:
    """Ever better lower bounds of the largest eigenvalue of a symmetric matrix without negative ones.

    `multiply` maps a vector [size] float64 to the matrix times it. Ends when the iterates span all that can be reached.
    """
    start = np.random.Generator(np.random.Philox(size)).standard_normal(size)
    basis, across, beside = [start / math.sqrt(squares(start))], [], []
    while len(basis) <= size:
        image = multiply(basis[-1])
        across.append(float(np.einsum("n,n->", image, basis[-1])))
        for vector in (*basis, *basis):  # twice: once leaves rounding errors that grow
            image = image - np.einsum("n,n->", image, vector) * vector
        largest = float(np.linalg.eigvalsh(np.diag(across) + np.diag(beside, 1) + np.diag(beside, -1))[-1])
        yield largest
        rest = math.sqrt(squares(image))
        if rest <= 1e-6 * largest:
            return
        beside.append(rest)
        basis.append(image / rest)


def _largest(pool: ThreadPoolExecutor, meter: Meter, delta: np.ndarray) -> Work[float]:
    """σ₁ of `delta` [rows, columns] float32."""
    rows = max(1, _PIECE // delta.shape[1])
    tasks = [delta[start:start + _TASK * rows] for start in range(0, len(delta), _TASK * rows)]

    def part(task: np.ndarray, vector: np.ndarray) -> np.ndarray:
        total = np.zeros(task.shape[1])
        for start in range(0, len(task), rows):
            piece = task[start:start + rows]
            total += np.einsum("mn,m->n", piece, np.einsum("mn,n->m", piece, vector))
        return total

    def multiply(vector: np.ndarray) -> np.ndarray:
        return sum(pool.map(part, tasks, [vector.astype(np.float32)] * len(tasks)), np.zeros(len(vector)))

    last, calm = 0.0, 0
    for step, value in enumerate(estimates(multiply, delta.shape[1]), 1):
        calm = calm + 1 if value - last <= TOLERANCE * value else 0
        last = max(value, last)
        if calm == 2 or step == MAX_STEPS:
            break
        yield meter.step()
    return math.sqrt(last)


def _delta(pool: ThreadPoolExecutor, meter: Meter, pivot: Checkpoint, target: Checkpoint, name: str, scale: float
           ) -> Work[np.ndarray]:
    """Δ ÷ `scale` of one tensor as a matrix in float32; elements that are not finite are 0."""
    numel = pivot.info[name].numel
    delta = np.empty(numel, np.float32)

    def load(start: int) -> None:
        end = min(start + _PIECE, numel)
        base, moved = np.empty(end - start, np.float32), np.empty(end - start, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            part = np.subtract(target.read(name, start, end, moved), pivot.read(name, start, end, base), dtype=np.float64)
            part /= scale
        np.copyto(part, 0, where=~np.isfinite(part))
        delta[start:end] = part

    starts = range(0, numel, _PIECE)
    for first in range(0, len(starts), 256):
        list(pool.map(load, starts[first:first + 256]))
        yield meter.step()
    return delta.reshape(matrix_shape(pivot.info[name].shape))
