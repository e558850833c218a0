"""What was measured, prompt by prompt: the plain data that tables, intervals and tests are made from.

A Scores value holds one number per model and item. An item is one judged answer; items of the same prompt (its turns) are
resampled together, and prompts only within their domain, so that every resample has the same domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusion.evaluate.statistics import DRAWS, Interval, mcnemar, percentiles, permutation_test, resamples, wilson

AVERAGE = "average"


@dataclass(frozen=True, eq=False)
class Scores:
    """Numbers of several models on the same items.

    `values` [models, items] float64, NaN where there is none; `truncated` [models, items]: the answer was cut off by its
    length; `prompts`, `domains` [items]; `weights` [models, items] for means over tokens or characters, None: equal weights.
    `right_or_wrong` says that values are 0 and 1. `summary` is "average" (the mean of the domains' means) or the domain that
    sums the others up. `turns` [items] makes a column for each turn. `even` is the value that means "no difference", for
    comparisons; None for plain scores. `unit` is shown; values are shown times `scale`. `better` says which values are good,
    "high" or "low".
    """

    title: str
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    domains: tuple[str, ...]
    values: np.ndarray
    truncated: np.ndarray
    weights: np.ndarray | None = None
    right_or_wrong: bool = False
    summary: str = AVERAGE
    turns: tuple[int, ...] = ()
    even: float | None = None
    unit: str = ""
    scale: float = 1.0
    better: str = "high"

    def answers(self) -> np.ndarray:
        """One item [answers] for every answer: what is measured on the same answer in two ways counts once."""
        turns = self.turns or (1,) * len(self.prompts)
        first: dict[tuple[str, int], int] = {}
        for item, answer in enumerate(zip(self.prompts, turns, strict=True)):
            first.setdefault(answer, item)
        return np.array(list(first.values()))

    def columns(self) -> dict[str, np.ndarray]:
        """Column → its items [items] bool: the domains in order of appearance, then the turns when there are several."""
        domains = np.array(self.domains)
        found = {domain: domains == domain for domain in dict.fromkeys(self.domains)}
        turns = np.array(self.turns)
        if len(set(self.turns)) > 1:
            found |= {f"turn {turn}": turns == turn for turn in sorted(set(self.turns))}
        return found

    def means(self, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Column → mean [draws, models]; `counts` [draws, items] says how often each item counts (default: once)."""
        known = ~np.isnan(self.values)
        weights = np.where(known, 1.0 if self.weights is None else self.weights, 0.0)
        totals = weights * np.where(known, self.values, 0.0)
        counts = np.ones((1, len(self.prompts))) if counts is None else counts
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {name: (counts[:, items] @ totals[:, items].T) / (counts[:, items] @ weights[:, items].T)
                     for name, items in self.columns().items()}
        if self.summary == AVERAGE:
            domains = dict.fromkeys(self.domains)
            found[AVERAGE] = np.mean([found[domain] for domain in domains], axis=0)
        return found

    def resampled(self, draws: int = DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
        """Column → bootstrap means [draws, models]; all models are resampled alike, so that differences are paired."""
        _, first, prompt_of = np.unique(np.array(self.prompts), return_index=True, return_inverse=True)
        strata = np.array(self.domains)[first]
        blocks = [self.means(counts[:, prompt_of]) for counts in resamples(strata, draws, seed)]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def interval(self, column: str, model: int, samples: dict[str, np.ndarray]) -> Interval:
        """95 % interval of one cell: Wilson's for a share of right answers, else the bootstrap's."""
        items = self.columns().get(column)
        if self.right_or_wrong and items is not None:
            values = self.values[model, items]
            values = values[~np.isnan(values)]
            return wilson(int(values.sum()), len(values))
        return percentiles(samples[column][:, model])

    def p_value(self, model: int, baseline: int | None, seed: int = 0) -> float:
        """Two-sided p of no difference from the baseline, or from `even` when there is none.

        McNemar's exact test for right and wrong; else signs of whole prompts are flipped.
        """
        items = np.ones(len(self.prompts), bool) if self.summary == AVERAGE else self.columns()[self.summary]
        mine = self.values[model, items]
        theirs = np.full_like(mine, self.even) if baseline is None else self.values[baseline, items]
        both = ~np.isnan(mine) & ~np.isnan(theirs)
        if self.right_or_wrong and baseline is not None:
            return mcnemar(mine[both] == 1, theirs[both] == 1)
        share = _share(np.array(self.domains)[items][both]) if self.summary == AVERAGE else 1.0
        weights = 1.0 if self.weights is None else self.weights[model, items][both]
        prompt_of = np.unique(np.array(self.prompts)[items][both], return_inverse=True)[1]
        return permutation_test(np.bincount(prompt_of, (mine - theirs)[both] * share * weights), seed=seed)

    def to_dict(self) -> dict:
        """Plain data, one record per item."""
        return {"title": self.title, "unit": self.unit, "models": list(self.models), "items": [
            {"prompt": prompt, "domain": domain, **({"turn": self.turns[i]} if self.turns else {}),
             "values": [None if np.isnan(value) else float(value) for value in self.values[:, i]],
             "truncated": self.truncated[:, i].tolist()}
            for i, (prompt, domain) in enumerate(zip(self.prompts, self.domains, strict=True))]}


def _share(domains: np.ndarray) -> np.ndarray:
    """What one item counts for in the mean of the domains' means."""
    _, member, sizes = np.unique(domains, return_inverse=True, return_counts=True)
    return 1.0 / sizes[member]
