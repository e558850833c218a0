"""How sure a number is: intervals from resampled prompts, exact and paired tests. Pure numpy, seeded, the same numbers every time.

Prompts are what is drawn at random in an evaluation, so prompts are what is resampled: everything measured on one prompt (both
turns, all models) stays together. Price: `DRAWS` weighted sums over the items, a few milliseconds per thousand prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

DRAWS = 2000
EXACT_UP_TO = 12  # differing prompts: 4,096 sign patterns are counted, more are drawn
_BLOCK = 1 << 21  # counts held at once

Interval = tuple[float, float]


def wilson(right: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval for a share of `right` among `total`; (0, 1) when nothing was counted.

    Source: E. B. Wilson, Probable inference, JASA 22 (1927).
    """
    if total == 0:
        return 0.0, 1.0
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - spread) / scale if right else 0.0, (centre + spread) / scale if right < total else 1.0


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of so many wins and losses if both were equally likely; ties are left out. 1 when there are none."""
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** total)


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """Exact p that two models are right equally often, from the prompts where only one of them is; [prompts] bool each."""
    one, other = np.asarray(one, bool), np.asarray(other, bool)
    return sign_test(int((one & ~other).sum()), int((other & ~one).sum()))


def permutation_test(differences: np.ndarray, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p that paired differences [prompts] are as often positive as negative, by flipping their signs.

    Exact up to 12 differences that are not zero, else from `draws` seeded patterns (never below 1 / (draws + 1)).
    """
    found = np.asarray(differences, np.float64)
    found = found[found != 0]
    if not len(found):
        return 1.0
    seen = abs(found.sum()) - 1e-12 * np.abs(found).sum()
    if len(found) <= EXACT_UP_TO:
        patterns = (np.arange(2 ** len(found))[:, None] >> np.arange(len(found)) & 1) * 2.0 - 1
        return float((np.abs(patterns @ found) >= seen).mean())
    rng, extreme, left = np.random.default_rng(seed), 0, draws
    while left:
        size = min(left, max(1, _BLOCK // len(found)))
        signs = rng.integers(0, 2, (size, len(found))) * 2.0 - 1
        extreme += int((np.abs(signs @ found) >= seen).sum())
        left -= size
    return (extreme + 1) / (draws + 1)


def resamples(strata: Sequence[object], draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """Blocks [some draws, prompts] of how often each prompt is drawn; every stratum (domain) keeps its number of prompts."""
    _, member = np.unique(np.asarray(strata), return_inverse=True)
    groups = [np.flatnonzero(member == stratum) for stratum in range(member.max(initial=-1) + 1)]
    rng, left = np.random.default_rng(seed), draws
    while left:
        size = min(left, max(1, _BLOCK // max(1, len(member))))
        counts = np.zeros((size, len(member)))
        for group in groups:
            picked = rng.integers(0, len(group), (size, len(group))) + len(group) * np.arange(size)[:, None]
            counts[:, group] = np.bincount(picked.ravel(), minlength=size * len(group)).reshape(size, len(group))
        yield counts
        left -= size


def percentiles(samples: np.ndarray, confidence: float = 0.95) -> Interval:
    """The percentile interval of bootstrap samples [draws]; NaN draws (nothing of a kind was drawn) are left out."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap(values: np.ndarray, prompts: Sequence[object] | None = None, *, draws: int = DRAWS, seed: int = 0,
              confidence: float = 0.95) -> Interval:
    """Percentile interval of the mean of `values` [items] over prompts drawn with replacement.

    `prompts` [items] says which prompt an item belongs to (default: each to its own); the items of one stay together.
    """
    values = np.asarray(values, np.float64)
    labels = np.arange(len(values)) if prompts is None else np.unique(np.asarray(prompts), return_inverse=True)[1]
    sums, sizes = np.bincount(labels, values), np.bincount(labels)
    means = [(counts @ sums) / (counts @ sizes) for counts in resamples(np.zeros(len(sums)), draws, seed)]
    return percentiles(np.concatenate(means), confidence)
