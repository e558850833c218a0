"""Averages and copies: `linear`, `varm` (linear with measured weights) and `passthrough`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np

from fusion.methods.gram import add_up
from fusion.methods.method import About, per_target
from fusion.methods.stack import Stack, steady


def linear(tensor: Stack, weights: np.ndarray, *,
           normalize: Annotated[bool, About("Divide the weights by their sum.")] = True) -> Iterator[np.ndarray]:
    """The weighted average of the targets, Σⱼ wⱼ·θⱼ / Σⱼ wⱼ; without `normalize` the plain sum Σⱼ wⱼ·θⱼ.

    Weights whose sum is 0 have no average: then the targets count the same. Source: Model soups, arXiv 2203.05482.
    """
    yield from add_up(tensor, shares(weights) if normalize else weights)


def varm(tensor: Stack, weights: np.ndarray) -> Iterator[np.ndarray]:
    """The average of the targets with the shares of variation as weights: FuseChat, arXiv 2402.16107, eq. 7."""
    yield from add_up(tensor, shares(weights))


def passthrough(tensor: Stack, weights: np.ndarray, *,
                scale: Annotated[float, About("Multiply every number by this.", per_target=True)] = 1.0,
                ) -> Iterator[np.ndarray]:
    """A copy of the one target, times `scale`: what layer stacking is made of."""
    factor = np.float32(per_target(scale, tensor.count)[0])
    for block in steady(tensor):
        yield np.multiply(block.models[0], factor, out=block.models[0])


def shares(weights: np.ndarray) -> np.ndarray:
    """Divide weights [J] by their sum; equal shares where the sum is 0 but for rounding."""
    weights = np.asarray(weights, np.float64)
    total = weights.sum()
    if abs(total) <= 1e-12 * np.abs(weights).sum():
        return np.full(len(weights), 1 / len(weights))
    return weights / total
