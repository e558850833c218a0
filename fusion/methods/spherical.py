"""Interpolation on the sphere: `slerp`, `nuslerp`, `multislerp`, `karcher`.

Each result is Σⱼ cⱼ·vectorⱼ, and its coefficients depend on nothing but the lengths of the vectors and the angles between
them. So one pass in float64 gives their Gram matrix, the coefficients are worked out from it, and one pass adds up.
Vectors that lie opposite each other have no single shortest way between them: there the straight line is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np

from fusion.methods.average import shares
from fusion.methods.gram import add_up, add_up_columns, add_up_rows, around_pivot, column_grams, gram
from fusion.methods.method import About
from fusion.methods.stack import Stack, row_length

STRAIGHT = 0.9995  # |cosine| from which slerp takes the straight line
ONE_LINE = 1 - 2.0 ** -25  # from here on float32 rounds a cosine to 1
NOTHING = 1e-30  # a vector this short against the longest is 0: its coefficient would not fit into float32
NOWHERE = 1e-6  # a mean of unit vectors shorter than this has no direction

Space = Annotated[Literal["weights", "deltas"], About("Interpolate the weights themselves, or their changes from the pivot.")]


def slerp(tensor: Stack, weights: np.ndarray, *,
          t: Annotated[float, About("How far from the first model to the second.", low=0, high=1)] = 0.5,
          ) -> Iterator[np.ndarray]:
    """Go from the pivot to the target (or from the first target to the second) along the arc between them.

    θ = sin((1−t)Ω)/sin Ω·a + sin(tΩ)/sin Ω·b with Ω the angle between the flattened tensors; the straight line where
    |cos Ω| > 0.9995. Source: Shoemake 1985, Animating rotation with quaternion curves; mergekit `slerp`.
    """
    cosines = cosine(gram(tensor, "targets" if tensor.count == 2 else "all"))
    yield from add_up(tensor, arc(cosines, t, STRAIGHT))


def nuslerp(tensor: Stack, weights: np.ndarray, *,
            flatten: Annotated[bool, About("One arc for the whole tensor, not one for each of its vectors.")] = True,
            row_wise: Annotated[bool, About("Without flatten: the vectors run along the first axis, not the last.")] = False,
            space: Space = "weights") -> Iterator[np.ndarray]:
    """Slerp between two targets at t = w₂/(w₁ + w₂), 0.5 where the weights sum to 0; each vector by itself without `flatten`.

    The straight line where float32 cannot tell the two from one line, and where cos Ω < −0.9995: mergekit follows the arc
    there too, and vectors of different lengths then grow without limit. Source: mergekit `nuslerp`.
    """
    total = float(np.sum(weights))
    t = 0.5 if abs(total) < 1e-6 else float(weights[1]) / total
    of = "deltas" if space == "deltas" else "targets"

    def solve(grams: np.ndarray) -> np.ndarray:
        pair = arc(cosine(grams), t, ONE_LINE)
        return around_pivot(pair) if of == "deltas" else pair

    if flatten:
        yield from add_up(tensor, solve(gram(tensor, of)))
    elif row_wise:
        columns = max(math.prod(tensor.shape[1:]), 1)
        yield from add_up_columns(tensor, solve(column_grams(tensor, of, columns)))
    else:
        yield from add_up_rows(tensor, of, row_length(tensor), solve)


def multislerp(tensor: Stack, weights: np.ndarray, *,
               normalize_weights: Annotated[bool, About("Divide the weights by their sum.")] = True,
               space: Space = "weights") -> Iterator[np.ndarray]:
    """The weighted mean direction of any number of targets at their weighted mean length: Σⱼ wⱼ‖vⱼ‖ · m/‖m‖, m = Σⱼ wⱼ·vⱼ/‖vⱼ‖.

    Interpolating in the tangent space at m itself adds nothing: the tangents sum to 0. Where m has no direction (targets
    opposite each other) the plain weighted average; mergekit refuses three or more such targets. Source: C. Goddard 2025,
    goddard.blog/posts/multislerp-wow-what-a-cool-idea.
    """
    scaled = shares(weights) if normalize_weights else np.asarray(weights, np.float64)
    of = "deltas" if space == "deltas" else "targets"
    coefficients = mean_direction(gram(tensor, of), scaled)
    yield from add_up(tensor, around_pivot(coefficients) if of == "deltas" else coefficients)


def karcher(tensor: Stack, weights: np.ndarray, *,
            max_iter: Annotated[int, About("Steps at most.", low=1, high=1000)] = 10,
            tol: Annotated[float, About("Stop when a step turns the mean by less, in radians.", low=0, high=1)] = 1e-5,
            ) -> Iterator[np.ndarray]:
    """The Riemannian mean of the targets' directions at their mean length: the point with the least Σⱼ wⱼ·angleⱼ².

    A target opposite the mean pulls nowhere and is left out of a step; targets whose mean has no direction give the plain
    average. mergekit takes a direction from rounding noise there. Source: mergekit `karcher`, arXiv 2603.04972.
    """
    yield from add_up(tensor, frechet(gram(tensor, "targets"), shares(weights), int(max_iter), tol))


def cosine(grams: np.ndarray) -> np.ndarray:
    """Cosine of the angle between the first two vectors of Gram matrices [..., J, J]; 0 when one of them is 0."""
    lengths = np.sqrt(grams[..., 0, 0]) * np.sqrt(grams[..., 1, 1])
    return np.clip(np.divide(grams[..., 0, 1], lengths, out=np.zeros_like(lengths), where=lengths > 0), -1, 1)


def arc(cosines: np.ndarray, t: float, line: float) -> np.ndarray:
    """Coefficients [..., 2] of a point on the arc; of the straight line where the cosine is > `line` or < −0.9995."""
    straight = (cosines > line) | (cosines < -STRAIGHT)
    angle = np.arccos(np.where(straight, 0, cosines))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    second = np.where(straight, t, np.sin(t * angle) / np.sin(angle))
    return np.stack([first, second], axis=-1)


def mean_direction(grams: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients [J] of the weighted mean direction at the weighted mean length; `weights` themselves if it has none."""
    lengths, units = unit_gram(grams)
    norm = math.sqrt(max(weights @ units @ weights, 0.0))
    if norm <= NOWHERE * np.abs(weights).sum():
        return weights
    return _over(weights, lengths) * (weights @ lengths) / norm


def frechet(grams: np.ndarray, weights: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """Coefficients [J] of the Karcher mean at the weighted mean length; the iteration runs in coefficients of unit vectors."""
    lengths, units = unit_gram(grams)
    alive = np.where(lengths > 0, weights, 0)
    norm = math.sqrt(max(alive @ units @ alive, 0.0))
    if norm <= NOWHERE * np.abs(alive).sum():
        return weights
    alive, mean = alive / alive.sum(), alive / norm
    for _ in range(max_iter):
        dots = np.clip(units @ mean, -1, 1)
        angles = np.arccos(dots)
        sines = np.sin(angles)
        pulls = alive * angles / np.where(sines < NOWHERE, 1, sines)
        tangent = pulls - (pulls @ dots) * mean
        turn = math.sqrt(max(tangent @ units @ tangent, 0.0))
        if turn < tol:
            break
        mean = math.cos(turn) * mean + math.sin(turn) / turn * tangent
        mean /= math.sqrt(mean @ units @ mean)
    return _over(mean, lengths) * (weights @ lengths)


def unit_gram(grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [J] of the vectors, and the Gram matrix [J, J] of the unit vectors; 0 for vectors of length 0."""
    lengths = np.sqrt(np.diag(grams))
    lengths[lengths <= NOTHING * lengths.max(initial=0)] = 0
    inverse = _over(np.ones_like(lengths), lengths)
    units = grams * inverse * inverse[:, None]
    np.fill_diagonal(units, lengths > 0)
    return lengths, units


def _over(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.divide(values, lengths, out=np.zeros_like(lengths), where=lengths > 0)
