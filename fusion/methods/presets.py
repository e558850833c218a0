"""The task-vector methods: one pipeline of stages, with presets that the papers gave a name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np

from fusion.methods.method import About
from fusion.methods.pipeline import DropAtRandom, DropByRank, KeepAll, KeepLargest, merge_deltas
from fusion.methods.stack import Stack

Density = Annotated[float, About("Share of a target's changes that is kept.", low=0, high=1, per_target=True)]
Gamma = Annotated[float, About("Share of the largest changes that is dropped first.", low=0, high=1, per_target=True)]
Epsilon = Annotated[float, About("How far the chance to be kept goes from density down and up with the size of a change.",
                                 low=0, high=1, per_target=True)]
Normalize = Annotated[bool, About("Divide by the sum of the weights that count.")]
Rescale = Annotated[bool, About("Give what is kept the total size that all changes had.")]
Lambda = Annotated[float, About("Factor of the merged change.")]


def task_arithmetic(tensor: Stack, weights: np.ndarray, *, normalize: Normalize = False, lambda_: Lambda = 1.0,
                    ) -> Iterator[np.ndarray]:
    """Add the weighted changes: θ₀ + λ·Σⱼ wⱼ·Δⱼ. Source: arXiv 2212.04089."""
    yield from merge_deltas(tensor, weights, KeepAll(), normalize=normalize, factor=lambda_)


def ties(tensor: Stack, weights: np.ndarray, *, density: Density = 1.0, normalize: Normalize = True, rescale: Rescale = False,
         lambda_: Lambda = 1.0) -> Iterator[np.ndarray]:
    """Keep each target's largest changes, elect a sign for every number, average the changes that agree with it.

    At least one change is kept where density is above 0. Source: TIES-Merging, arXiv 2306.01708.
    """
    yield from merge_deltas(tensor, weights, KeepLargest(density), elect=True, normalize=normalize, rescale=rescale,
                            factor=lambda_)


def dare_linear(tensor: Stack, weights: np.ndarray, *, density: Density = 1.0, normalize: Normalize = False,
                rescale: Rescale = True, lambda_: Lambda = 1.0) -> Iterator[np.ndarray]:
    """Drop changes at random, make up for them by rescaling, add. Source: DARE, arXiv 2311.03099.

    Rescaling gives the kept changes the L1 norm of all, which for large tensors is the paper's 1/density.
    """
    yield from merge_deltas(tensor, weights, DropAtRandom(density), normalize=normalize, rescale=rescale, factor=lambda_)


def dare_ties(tensor: Stack, weights: np.ndarray, *, density: Density = 1.0, normalize: Normalize = False,
              rescale: Rescale = True, lambda_: Lambda = 1.0) -> Iterator[np.ndarray]:
    """DARE's random drops, then the signs of TIES. Source: arXiv 2311.03099 and 2306.01708."""
    yield from merge_deltas(tensor, weights, DropAtRandom(density), elect=True, normalize=normalize, rescale=rescale,
                            factor=lambda_)


def della_linear(tensor: Stack, weights: np.ndarray, *, density: Density = 1.0, epsilon: Epsilon = 0.15,
                 normalize: Normalize = False, rescale: Rescale = True, lambda_: Lambda = 1.0) -> Iterator[np.ndarray]:
    """Drop at random, small changes of a row more often than large ones, then add. Source: DELLA, arXiv 2406.11617.

    The chance to be kept runs from density − ε for the smallest change of a row to density + ε for the largest; ε is taken
    smaller where that would leave 0 … 1. A row of one number has the chance `density`; mergekit divides 0 by 0 there.
    """
    yield from merge_deltas(tensor, weights, DropByRank(density, epsilon), normalize=normalize, rescale=rescale, factor=lambda_)


def della(tensor: Stack, weights: np.ndarray, *, density: Density = 1.0, epsilon: Epsilon = 0.15,
          normalize: Normalize = True, rescale: Rescale = True, lambda_: Lambda = 1.0) -> Iterator[np.ndarray]:
    """DELLA's drops (see `della_linear`), then the signs of TIES. Source: DELLA-Merging, arXiv 2406.11617."""
    yield from merge_deltas(tensor, weights, DropByRank(density, epsilon), elect=True, normalize=normalize, rescale=rescale,
                            factor=lambda_)


def breadcrumbs(tensor: Stack, weights: np.ndarray, *, density: Density = 1.0, gamma: Gamma = 0.01,
                normalize: Normalize = False, rescale: Rescale = False, lambda_: Lambda = 1.0) -> Iterator[np.ndarray]:
    """Drop each target's very largest and its small changes, add the rest. Source: Model Breadcrumbs, arXiv 2312.06795.

    Of n changes the int(γ·n) largest are dropped, fewer where density leaves no room, and of the others the int(density·n)
    largest are kept, at least one. γ·n below 1 drops none: older mergekit kept nothing at all there.
    """
    yield from merge_deltas(tensor, weights, KeepLargest(density, gamma), normalize=normalize, rescale=rescale, factor=lambda_)


def breadcrumbs_ties(tensor: Stack, weights: np.ndarray, *, density: Density = 1.0, gamma: Gamma = 0.01,
                     normalize: Normalize = False, rescale: Rescale = False, lambda_: Lambda = 1.0) -> Iterator[np.ndarray]:
    """Breadcrumbs' choice of changes, then the signs of TIES. Source: arXiv 2312.06795 and 2306.01708."""
    yield from merge_deltas(tensor, weights, KeepLargest(density, gamma), elect=True, normalize=normalize, rescale=rescale,
                            factor=lambda_)
