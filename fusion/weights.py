"""Merge weights are a policy, apart from the method: measured or given settings, then overrides, then exclusions.

Precedence, last wins: what the recipe's `weights` say of a tensor (a number, a curve, a table's row, or the measured ratio) →
overrides in their order → exclusions (kept from the pivot). A method's options are resolved per tensor in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.errors import RecipeError
from fusion.methods import METHODS
from fusion.recipe import Recipe
from fusion.recipe_rules import weight_kind
from fusion.settings import VARIATION, matching, resolve
from fusion.variation import Variation, normalise

__all__ = ["OptionPlan", "WeightPlan", "effective_weights", "give_weight", "matching", "measured_weights"]


@dataclass(frozen=True)
class WeightPlan:
    """What a recipe says of every tensor before anything is measured.

    `names` [T]; `kind` of the method's weights: "shares" sum to 1, "factors" are plain numbers, "" none; `numbers` [T, J] the
    recipe's own (NaN = measured; shares without a NaN sum to 1); `given` [T, J] fixed by overrides (NaN = free); `excluded`
    [T] tensors kept from the pivot.
    """

    names: tuple[str, ...]
    kind: str
    numbers: np.ndarray
    given: np.ndarray
    excluded: np.ndarray

    @classmethod
    def of(cls, recipe: Recipe, names: Sequence[str]) -> WeightPlan:
        """Resolve a recipe's weights for these tensors; RecipeError for a pattern that matches none, and for shares that
        make no sense in a tensor."""
        kind = weight_kind(recipe)
        index = {name: t for t, name in enumerate(names)}
        excluded = np.zeros(len(names), dtype=bool)
        for pattern in recipe.exclude:
            excluded[[index[name] for name in matching(pattern, index, "exclude")]] = True
        numbers = _numbers(recipe, names, kind)
        if kind == "shares":
            numbers = _shares(numbers, names)
        return cls(tuple(names), kind, numbers, _given(recipe, index, kind), excluded)

    @property
    def measured(self) -> bool:
        """Whether some weight is a measured ratio, so that variation must be known before the merge."""
        return bool((np.isnan(self.numbers) & np.isnan(self.given) & ~self.excluded[:, None]).any())

    def row(self, t: int, ratio: np.ndarray) -> np.ndarray:
        """Effective weights [J] of tensor `t` whose measured ratios are `ratio` [J]; [0] for a method without weights.

        Shares sum to 1: an override fixes its targets, and the others share the rest in proportion to what they would have.
        """
        numbers, given = self.numbers[t], self.given[t]
        if self.kind != "shares":
            return np.where(np.isnan(given), np.where(np.isnan(numbers), ratio[:len(numbers)], numbers), given)
        free = np.isnan(given)
        if not free.any():
            return given / given.sum()
        return _fill(given, _fill(numbers, ratio))

    def fixed(self, t: int, ratio: np.ndarray) -> np.ndarray:
        """The row of tensor `t` for granularity parameter: NaN where every element has a measured weight of its own."""
        return np.where(np.isnan(self.numbers[t]) & np.isnan(self.given[t]), np.nan, self.row(t, ratio))

    def table(self, ratios: np.ndarray) -> np.ndarray:
        """Effective weights [T, J] of all tensors from their measured ratios [T, J]; rows of excluded tensors are 0."""
        rows = np.array([self.row(t, ratios[t]) for t in range(len(self.names))]).reshape(self.numbers.shape)
        return np.where(self.excluded[:, None], 0.0, rows)


def _fill(fixed: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares [J]: `fixed` where it is a number; its NaN share what is left in proportion to `weights`."""
    free = np.isnan(fixed)
    if free.all():
        return weights
    if not free.any():
        return fixed
    shares = np.where(free, weights, 0.0)[None]
    shares = normalise(shares)[0] if shares.sum() > 0 else free / free.sum()
    return np.where(free, max(0.0, 1.0 - fixed[~free].sum()) * shares, fixed)


def _numbers(recipe: Recipe, names: Sequence[str], kind: str) -> np.ndarray:
    if not kind:
        return np.zeros((len(names), 0))
    default = VARIATION if METHODS[recipe.method].measured else 1.0
    columns = [resolve(weight, names, f"weights: {target}")
               for target, weight in zip(recipe.names, recipe.weights or (default,) * len(recipe.names), strict=True)]
    return np.array([[np.nan if value == VARIATION else value for value in column] for column in columns], np.float64).T


def _shares(numbers: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Divide the rows [T, J] that are all numbers by their sum; RecipeError for a row that cannot be shares."""
    free = np.isnan(numbers)
    mixed, total = free.any(axis=1), np.nansum(numbers, axis=1)
    inside = np.where(free, 0.0, numbers)
    wrong = np.where(mixed, (total > 1 + 1e-6) | ((inside < 0) | (inside > 1)).any(axis=1), total <= 1e-9)
    if wrong.any():
        t = int(np.argmax(wrong))
        said = ", ".join("variation" if np.isnan(number) else f"{number:g}" for number in numbers[t])
        rule = "beside variation, numbers must be from 0 to 1 and sum to at most 1" if mixed[t] else "their sum must be above 0"
        raise RecipeError(f"the weights of {names[t]} are {said}; {rule}", where="weights")
    return np.where(mixed[:, None], numbers, numbers / np.where(mixed, 1.0, total)[:, None])


def _given(recipe: Recipe, index: Mapping[str, int], kind: str) -> np.ndarray:
    """Weights [T, J] that overrides fix. A share's override says all of its tensors, so a later one replaces an earlier one;
    a factor's says only what it names."""
    given = np.full((len(index), len(recipe.names) if kind else 0), np.nan)
    for override in recipe.overrides if kind else ():
        row = np.array([override.weights.get(target, np.nan) for target in recipe.names])
        for name in matching(override.tensors, index, "overrides"):
            keep = kind == "factors"
            given[index[name]] = np.where(np.isnan(row), given[index[name]], row) if keep else row
    return given


@dataclass(frozen=True)
class OptionPlan:
    """A method's options for every tensor: `values` has one list [T] per argument, of plain values or of float64 [J]."""

    values: Mapping[str, list]

    @classmethod
    def of(cls, recipe: Recipe, names: Sequence[str]) -> OptionPlan:
        """Resolve a recipe's options, or their defaults, for these tensors; RecipeError for a pattern that matches none."""
        values = {}
        for option in METHODS[recipe.method].options:
            setting, label = recipe.options.get(option.name, option.default), f"options: {option.name}"
            if not option.per_target:
                values[option.argument] = resolve(setting, names, label)
                continue
            each = setting if isinstance(setting, tuple) else (setting,) * len(recipe.names)
            columns = [resolve(one, names, label) for one in each]
            values[option.argument] = list(np.array(columns, np.float64).T.reshape(len(names), len(each)))
        return cls(values)

    def row(self, t: int) -> dict[str, object]:
        """The arguments of the method for tensor `t`; options per target are float64 [J]."""
        return {name: values[t] for name, values in self.values.items()}


def effective_weights(recipe: Recipe, variation: Variation) -> tuple[WeightPlan, np.ndarray]:
    """The plan and the weights [T, J] that this recipe will merge with, shown before merging."""
    plan = WeightPlan.of(recipe, variation.names)
    return plan, plan.table(measured_weights(recipe, variation))


def measured_weights(recipe: Recipe, variation: Variation) -> np.ndarray:
    """The weights [T, J] that variation gives at the recipe's granularity, by its measure and its rule; rows sum to 1.

    Rule "softmax": softmax over the targets of v / (temperature·max v), which does not depend on the scale of v as the
    softmax of v itself does; a unit that no target changed is uniform.
    """
    if recipe.rule == "ratio":
        return variation.ratios(recipe.granularity, recipe.measure)
    means = variation.means(recipe.granularity, recipe.measure)
    largest = means.max(axis=1, keepdims=True, initial=0)
    relative = np.divide(means, largest, out=np.ones_like(means), where=largest > 0)  # at most 1: nothing overflows below
    return normalise(np.exp((relative - 1) / recipe.temperature))


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
