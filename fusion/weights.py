"""Merge weights are a policy, apart from the method: measured or given numbers, then overrides, then exclusions.

Precedence, last wins: measured ratio (or the recipe's numbers) → overrides in their order → exclusions (kept from the pivot).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.errors import RecipeError, nearest
from fusion.methods import METHODS
from fusion.recipe import Recipe
from fusion.variation import Variation, normalise


@dataclass(frozen=True)
class WeightPlan:
    """What a recipe says of every tensor before anything is measured.

    `names` [T]; `given` [T, J] weights fixed by overrides (NaN = free); `excluded` [T] tensors kept from the pivot;
    `numbers` [J] the recipe's own weights, None when they are measured.
    """

    names: tuple[str, ...]
    given: np.ndarray
    excluded: np.ndarray
    numbers: np.ndarray | None

    @classmethod
    def of(cls, recipe: Recipe, names: Sequence[str]) -> WeightPlan:
        """Apply a recipe's overrides and exclusions to these tensors; RecipeError for a pattern that matches none."""
        index = {name: t for t, name in enumerate(names)}
        given = np.full((len(names), len(recipe.names)), np.nan)
        for override in recipe.overrides:
            for name in matching(override.tensors, index, "overrides"):
                given[index[name]] = [override.weights.get(target, np.nan) for target in recipe.names]
        excluded = np.zeros(len(names), dtype=bool)
        for pattern in recipe.exclude:
            excluded[[index[name] for name in matching(pattern, index, "exclude")]] = True
        numbers = None
        if not METHODS[recipe.method].measured:
            numbers = np.asarray(recipe.weights or (1.0,) * len(recipe.names), dtype=np.float64)
            numbers = numbers / numbers.sum()
        return cls(tuple(names), given, excluded, numbers)

    def row(self, t: int, ratio: np.ndarray) -> np.ndarray:
        """Effective weights [J] of tensor `t` whose measured ratios are `ratio` [J]; they sum to 1."""
        weights = self.numbers if self.numbers is not None else ratio
        given = self.given[t]
        free = np.isnan(given)
        if free.all():
            return weights
        if not free.any():
            return given / given.sum()
        shares = np.where(free, weights, 0.0)[None]
        shares = normalise(shares)[0] if shares.sum() > 0 else free / free.sum()
        return np.where(free, max(0.0, 1.0 - given[~free].sum()) * shares, given)

    def table(self, ratios: np.ndarray) -> np.ndarray:
        """Effective weights [T, J] of all tensors from their measured ratios [T, J]; rows of excluded tensors are 0."""
        rows = np.array([self.row(t, ratios[t]) for t in range(len(self.names))]).reshape(ratios.shape)
        return np.where(self.excluded[:, None], 0.0, rows)


def effective_weights(recipe: Recipe, variation: Variation) -> tuple[WeightPlan, np.ndarray]:
    """The plan and the weights [T, J] that this recipe will merge with, shown before merging."""
    plan = WeightPlan.of(recipe, variation.names)
    return plan, plan.table(variation.ratios(recipe.granularity, recipe.measure))


def give_weight(given: Mapping[str, float], target: str, weight: float, targets: Sequence[str]) -> dict[str, float]:
    """The weights given by hand for one tensor after one more is given: the newest stands, earlier ones make room for it.

    `given` maps targets to weights, `targets` names all of them. RecipeError when there is only one target.
    """
    if len(targets) < 2:
        raise RecipeError("there is only one target, so its weight is 1 everywhere", todo="Pick a second target.")
    others = {name: value for name, value in given.items() if name != target and name in targets}
    total, room = sum(others.values()), 1.0 - weight
    nobody_free = len(others) == len(targets) - 1
    if total > room or nobody_free:
        others = {name: value * room / total for name, value in others.items()} if total > 0 else {}
    return {**others, target: weight}


def matching(pattern: str, names: Iterable[str], setting: str) -> list[str]:
    """The names that a pattern (`*` any text, `?` one character, else literal) matches whole; RecipeError when none does."""
    names = list(names)
    shell = pattern.replace("[", "[[]")
    found = [name for name in names if fnmatch.fnmatchcase(name, shell)]
    if not found:
        raise RecipeError(f"no tensor matches {pattern!r}", where=setting, todo=nearest(pattern, names))
    return found
