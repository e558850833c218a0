"""Model stock: how far to go from the pivot to the average of the targets, from the angle between their changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np

from fusion.methods.gram import add_up, add_up_rows, around_pivot, gram
from fusion.methods.method import About
from fusion.methods.stack import Stack, row_length


def model_stock(tensor: Stack, weights: np.ndarray, *,
                filter_wise: Annotated[bool, About("An angle for each row, not for the whole tensor.")] = False,
                ) -> Iterator[np.ndarray]:
    """Interpolate between pivot and average: θ = t·mean(θⱼ) + (1−t)·θ₀, t = N·cos/(1 + (N−1)·cos), N targets.

    cos = mean cosine between the changes of two targets. t is kept within 0 … 1: changes that oppose each other (cos < 0)
    have no common direction, so the pivot stays. mergekit extrapolates away from the average there, without limit near
    cos = −1/(N−1), and takes the cosine of small changes for smaller than it is (lengths whose product is below 1e-6).
    Source: Model Stock, arXiv 2403.19522, eq. 7.
    """
    if filter_wise:
        yield from add_up_rows(tensor, "deltas", row_length(tensor), stock)
    else:
        yield from add_up(tensor, stock(gram(tensor, "deltas")))


def stock(grams: np.ndarray) -> np.ndarray:
    """Coefficients [..., 1+J] of pivot and targets from the Gram matrices of the changes [..., J, J]."""
    count = grams.shape[-1]
    lengths = np.sqrt(np.einsum("...jj->...j", grams))
    norms = lengths[..., :, None] * lengths[..., None, :]
    cosines = np.clip(np.divide(grams, norms, out=np.zeros_like(grams), where=norms > 0), -1, 1)
    one, other = np.triu_indices(count, 1)
    mean = np.maximum(cosines[..., one, other].mean(axis=-1), 0)
    t = count * mean / (1 + (count - 1) * mean)
    return around_pivot(np.repeat(t[..., None] / count, count, axis=-1))
