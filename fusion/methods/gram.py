"""Inner products of the models in one float64 pass, and the linear combinations that are worked out from them.

`of` names the vectors: "targets" [J], "all" (the pivot, then the targets) [1+J], "deltas" (targets − pivot) [J].
No BLAS: its results depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from fusion.methods.lanes import lane_product
from fusion.methods.stack import BLOCK, Block, Stack, steady
from fusion.methods.weighted import combine


def gram(tensor: Stack, of: str) -> np.ndarray:
    """Inner products of the flattened vectors, [J, J] float64."""
    count = tensor.count + (of == "all")
    total = np.zeros((count, count))
    for block in steady(tensor):
        total += products(widen(block, of), lane_product)
    return total


def column_grams(tensor: Stack, of: str, columns: int) -> np.ndarray:
    """Inner products of the vectors along the first axis, [columns, J, J] float64."""
    count = tensor.count + (of == "all")
    total = np.zeros((columns, count, count))
    for block in steady(tensor, columns):
        vectors = widen(block, of)
        total += products(vectors.reshape(len(vectors), -1, columns), partial(np.einsum, "rc,rc->c"))
    return total


def row_grams(block: Block, of: str, length: int) -> np.ndarray:
    """Inner products of each row of a block of whole rows, [rows, J, J] float64."""
    vectors = widen(block, of)
    return products(vectors.reshape(len(vectors), -1, length), partial(np.einsum, "rc,rc->r"))


def widen(block: Block, of: str) -> np.ndarray:
    """The vectors of a block as float64, [J, n]."""
    if of == "deltas":
        return np.subtract(block.models, block.pivot, dtype=np.float64)
    if of == "all":
        return np.concatenate([block.pivot[None], block.models]).astype(np.float64)
    return block.models.astype(np.float64)


def products(vectors: np.ndarray, product: Callable[[np.ndarray, np.ndarray], np.ndarray | float]) -> np.ndarray:
    """The `product` of every pair of `vectors` [J, ...], [..., J, J]."""
    count = len(vectors)
    pairs = {(j, k): product(vectors[j], vectors[k]) for j in range(count) for k in range(j, count)}
    return np.stack([np.stack([pairs[min(j, k), max(j, k)] for k in range(count)], axis=-1) for j in range(count)], axis=-2)


def around_pivot(coefficients: np.ndarray) -> np.ndarray:
    """Turn coefficients of deltas [..., J] into those of the pivot and the targets [..., 1+J]: θ₀ + Σⱼ cⱼ·(θⱼ − θ₀)."""
    return np.concatenate([1 - coefficients.sum(axis=-1, keepdims=True), coefficients], axis=-1)


def add_up(tensor: Stack, coefficients: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the blocks of Σⱼ cⱼ·θⱼ; `coefficients` [J], or [1+J] with the pivot's first."""
    scratch = np.empty((3, min(math.prod(tensor.shape), BLOCK)), np.float32)
    for block in steady(tensor):
        out, *work = scratch[:, :block.models.shape[1]]
        yield combine(_models(block, coefficients), coefficients, out, work)


def add_up_columns(tensor: Stack, coefficients: np.ndarray) -> Iterator[np.ndarray]:
    """The same with coefficients of their own for each column, [columns, J or 1+J]."""
    columns = len(coefficients)
    for block in steady(tensor, columns):
        yield _mix([model.reshape(-1, columns) for model in _models(block, coefficients)], coefficients)


def add_up_rows(tensor: Stack, of: str, length: int, solve: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """The same with coefficients of their own for each row: what `solve` makes of the rows' Gram matrices [rows, J, J]."""
    for block in steady(tensor, length):
        coefficients = solve(row_grams(block, of, length))
        yield _mix([model.reshape(-1, length) for model in _models(block, coefficients)], coefficients[:, None])


def _models(block: Block, coefficients: np.ndarray) -> list[np.ndarray]:
    with_pivot = coefficients.shape[-1] > len(block.models)
    return [block.pivot, *block.models] if with_pivot else list(block.models)


def _mix(models: list[np.ndarray], coefficients: np.ndarray) -> np.ndarray:
    """Σⱼ cⱼ·modelⱼ of models [rows, columns], as (Σⱼ cⱼ)·model₀ + Σⱼ cⱼ·(modelⱼ − model₀), flat.

    So models that are equal stay as they are where the coefficients sum to 1.
    """
    narrow = coefficients.astype(np.float32)
    out = models[0] * coefficients.sum(axis=-1).astype(np.float32)
    for j, model in enumerate(models[1:], start=1):
        out += (model - models[0]) * narrow[..., j]
    return out.reshape(-1)
