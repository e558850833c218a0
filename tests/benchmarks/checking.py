"""Samples of a merged checkpoint against float64 arithmetic on whole tensors, as plainly as the formulas are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusion.checkpoint import Checkpoint
from tests.benchmarks.measuring import Failed


def check(folders: Sequence[Path], method: str, out: Path, samples: int = 3) -> str:
    """Compare some tensors of the merge of `folders` (pivot first) in `out`; says how many numbers were compared, or Failed.

    A stored bfloat16 may be half a step from the exact number, and farther in one of 100,000: where a threshold or a sign
    falls between two roundings.
    """
    if method == "dare_ties":
        return "random; tests compare it"
    pivot, *targets = map(Checkpoint, folders)
    merged, compared = Checkpoint(out), 0
    names = sorted(pivot.info, key=lambda name: (pivot.info[name].numel, name))
    for name in {names[0], *(names[len(names) * n // samples] for n in range(1, samples))}:
        models = np.stack([target[name] for target in targets]).astype(np.float64)
        exact, got = exactly(method, pivot[name].astype(np.float64), models), merged[name]
        step = np.spacing(np.maximum(np.abs(exact), np.abs(got)).astype(np.float32)) * 2.0 ** 16
        off = np.abs(got - exact) > step / 2 + np.abs(models).max(axis=0) * 2.0 ** -20
        if off.mean() > 1e-5:
            raise Failed(f"{method}: {off.sum()} of {off.size} numbers of {name} differ from float64")
        compared += off.size
    return f"{compared:,} numbers as in float64"


def exactly(method: str, pivot: np.ndarray, models: np.ndarray) -> np.ndarray:
    """The merge of a tensor in float64; `models` [J, ...]."""
    deltas = models - pivot
    energy = np.square(deltas).reshape(len(models), -1).sum(axis=1)
    shares = energy / energy.sum() if energy.sum() else np.full(len(models), 1 / len(models))
    if method == "linear":
        return models.mean(axis=0)
    if method == "varm":
        return np.tensordot(shares, models, 1)
    if method == "ties":  # density 0.5, weights 1
        for its in deltas.reshape(len(deltas), -1):
            its[np.argsort(-np.abs(its), kind="stable")[max(1, its.size // 2):]] = 0
        shares = np.ones(len(models))
    agree = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
    merged = (shares.reshape(-1, *[1] * pivot.ndim) * deltas * agree).sum(axis=0)
    return pivot + (merged / np.maximum(agree.sum(axis=0), 1) if method == "ties" else merged)
