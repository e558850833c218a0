"""What makes a recipe valid, told from the recipe alone: no checkpoint is opened. Every rule yields (path of the entry, text).

`recipe` is always a `recipe.Recipe`, which stands above this module because it checks itself by these rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fusion import dtypes
from fusion.anatomy import GRANULARITIES
from fusion.errors import nearest
from fusion.methods import METHODS
from fusion.recipe_yaml import Fault
from fusion.settings import VARIATION, Curve, Override, Slice, Table, is_number
from fusion.variation import MEASURES

if TYPE_CHECKING:
    from fusion.documents import Path
    from fusion.methods import Option

MAX_TARGETS = 16
MAX_LAYERS = 100_000
VOCABULARIES = ("", "pivot", "common", "union")
RULES = ("ratio", "softmax")
# methods that use the pivot only as a point to start from, so it may be one of the models too
PIVOT_AMONG_TARGETS = ("linear", "slerp", "nuslerp", "multislerp", "karcher", "passthrough")
DIVIDE_BY_SUM = ("normalize", "normalize_weights")  # options of methods whose weights are shares


def weight_kind(recipe) -> str:
    """What the weights of a recipe are: "shares" that sum to 1, "factors", or "" for none; see `methods.Method.weights`.

    Shares that must not be divided by their sum are factors.
    """
    kind = METHODS[recipe.method].weights
    return "factors" if kind == "shares" and False in map(recipe.options.get, DIVIDE_BY_SUM) else kind


def faults(recipe) -> Iterator[Fault]:
    """Everything that is wrong with a recipe."""
    yield from _models(recipe)
    yield from _words(recipe)
    if recipe.method in METHODS:
        yield from _count(recipe)
        yield from _weights(recipe)
        yield from _options(recipe)
    yield from _slices(recipe)


def _models(recipe) -> Iterator[Fault]:
    if not recipe.pivot:
        yield ("pivot",), "pivot: there is none. Give the checkpoint that variation is measured from."
    if not recipe.targets:
        yield ("targets",), "targets: there is none. Give at least one."
    if len(recipe.targets) > MAX_TARGETS:
        yield ("targets",), f"targets: {len(recipe.targets)} are too many. Give at most {MAX_TARGETS}."
    given = recipe.targets if recipe.method in PIVOT_AMONG_TARGETS else (recipe.pivot, *recipe.targets)
    twice = next((path for path, count in Counter(given).items() if count > 1), None)
    if twice:
        yield ("targets",), f"targets: {twice} is given twice. Leave one out."
    elif len(set(recipe.names)) != len(recipe.names) or len(recipe.names) != len(recipe.targets) or "pivot" in recipe.names:
        names = ", ".join(recipe.names)
        yield ("targets",), f"targets: every target needs a name of its own, and none may be `pivot`: {names}."


def _words(recipe) -> Iterator[Fault]:
    for key, value, known in (
            ("method", recipe.method, METHODS), ("granularity", recipe.granularity, GRANULARITIES),
            ("measure", recipe.measure, MEASURES), ("rule", recipe.rule, RULES), ("donor", recipe.donor, ("pivot", *recipe.names)),
            ("dtype", recipe.dtype or "float32", dtypes.NAMES), ("vocabulary", recipe.vocabulary, VOCABULARIES)):
        if value not in known:
            yield (key,), f"{key}: unknown {value!r}. {nearest(str(value), filter(None, known))}"
    if not isinstance(recipe.seed, int) or isinstance(recipe.seed, bool) or not 0 <= recipe.seed < 2**63:
        yield ("seed",), f"seed: {recipe.seed!r} should be a whole number from 0 to {2**63 - 1}."
    if not is_number(recipe.temperature) or recipe.temperature <= 0:
        yield ("temperature",), f"temperature: {recipe.temperature!r} should be a number above 0."
    if recipe.rule == "softmax" and recipe.granularity == "parameter" and recipe.measured:
        yield ("rule",), "rule: softmax weighs units, not single parameters. Choose another granularity, or rule ratio."


def _count(recipe) -> Iterator[Fault]:
    method, given = METHODS[recipe.method], len(recipe.targets)
    low, high = method.min_targets, method.max_targets
    if given and not recipe.slices and (given < low or (high is not None and given > high)):
        wanted = f"at least {low}" if high is None else str(low) if low == high else f"{low} to {high}"
        todo = " Give one, or say with `slices` which layers each gives." if recipe.method == "passthrough" else ""
        yield ("targets",), f"targets: {recipe.method} takes {wanted}, not {given}.{todo}"


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def _weights(recipe) -> Iterator[Fault]:
    kind = weight_kind(recipe)
    if not kind:
        for key in ("weights", "overrides"):
            if getattr(recipe, key):
                having = ", ".join(name for name, method in METHODS.items() if method.weights)
                yield (key,), f"{key}: {recipe.method} has no weights. These methods do: {having}."
        return
    wrong = list(_given_weights(recipe))
    yield from wrong
    if kind == "shares" and recipe.weights and not wrong:
        yield from _shares(recipe.weights)
    for i, override in enumerate(recipe.overrides):
        yield from (((("overrides", i), text)) for text in _override(override, recipe.names, kind))


def _given_weights(recipe) -> Iterator[Fault]:
    given = len(recipe.weights)
    if given and given != len(recipe.targets):
        yield ("weights",), f"weights: {given} numbers for {len(recipe.targets)} targets. Give one for each."
        return

    def wrong(value: object) -> str:
        return "" if is_number(value) or value == VARIATION else f"{value!r} should be a finite number or `variation`"

    for j, weight in enumerate(recipe.weights):
        yield from _setting(weight, ("weights", j), f"weights: {_called(recipe, j)}", wrong)


def _called(recipe, j: int) -> str:
    return recipe.names[j] if j < len(recipe.names) else str(j + 1)


def _shares(weights: tuple) -> Iterator[Fault]:
    numbers = [weight for weight in weights if is_number(weight)]
    if len(numbers) == len(weights) and sum(numbers) <= 1e-9:
        yield ("weights",), "weights: these must be finite numbers with a sum above 0."
    elif VARIATION in weights and (sum(numbers) > 1 + 1e-6 or any(not 0 <= number <= 1 for number in numbers)):
        yield ("weights",), "weights: beside `variation`, numbers must be from 0 to 1 and sum to at most 1."


def _override(override: Override, names: tuple[str, ...], kind: str) -> Iterator[str]:
    values, label = override.weights.values(), f"overrides: {override.tensors}"
    strange = [name for name in override.weights if name not in names]
    for name in strange:
        yield f"{label}: unknown target {name!r}. {nearest(name, names)}"
    if kind == "factors":
        if not values or not all(map(is_number, values)):
            yield f"{label}: every weight must be a finite number."
    elif not values or not all(is_number(value) and 0 <= value <= 1 for value in values):
        yield f"{label}: every weight must be a number from 0 to 1."
    elif not strange and (sum(values) > 1 + 1e-6 or (len(values) == len(names) and sum(values) < 1 - 1e-6)):
        yield f"{label}: the weights sum to {sum(values):.6g}, not to 1."


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def _options(recipe) -> Iterator[Fault]:
    known = {option.name: option for option in METHODS[recipe.method].options}
    for name, value in recipe.options.items():
        path, label = ("options", name), f"options: {name}"
        option = known.get(name)
        if option is None:
            yield path, f"{label}: {recipe.method} has no such option. {_who(name, known)}"
            continue
        if name in DIVIDE_BY_SUM and METHODS[recipe.method].weights == "shares" and isinstance(value, Table):
            yield path, f"{label}: it is the same for all tensors. Give true or false."
        elif not isinstance(value, tuple):
            yield from _setting(value, path, label, lambda leaf, option=option: _leaf(leaf, option), option.kind == "number")
        elif not option.per_target:
            yield path, f"{label}: it is the same for all targets. Give one value, not a list."
        elif len(value) != len(recipe.targets):
            yield path, f"{label}: {len(value)} values for {len(recipe.targets)} targets. Give one for each, or one for all."
        else:
            for j, item in enumerate(value):
                yield from _setting(item, (*path, j), f"{label}: {_called(recipe, j)}",
                                    lambda leaf, option=option: _leaf(leaf, option), option.kind == "number")
    for name, option in known.items():
        if option.default is None and name not in recipe.options:
            yield ("options",), f"options: {name}: {recipe.method} needs it. {option.text}"


def _who(name: str, known: dict) -> str:
    having = [other for other, method in METHODS.items() if any(option.name == name for option in method.options)]
    if having:
        return f"These methods do: {', '.join(having)}."
    return nearest(name, known) if known else "It has none."


def _leaf(value: object, option: Option) -> str:
    """What is wrong with one plain value of an option; "" when nothing is."""
    huge = option.kind in ("number", "integer") and not is_number(value)
    return f"{value!r} should be {option.range}" if huge else option.problem(value)


def _setting(setting: object, path: Path, label: str, wrong: Callable[[object], str], curves: bool = True) -> Iterator[Fault]:
    """The faults of a setting of which every plain value must pass `wrong`."""
    if isinstance(setting, Table):
        if not setting.rows:
            yield path, f"{label}: the table has no row."
        for i, (pattern, value) in enumerate(setting.rows):
            yield from _setting(value, (*path, "table", i, "value"), f"{label}: {pattern}", wrong, curves)
    elif not isinstance(setting, Curve):
        text = wrong(setting)
        if text:
            yield path, f"{label}: {text.rstrip('.')}."
    elif not curves:
        yield path, f"{label}: only numbers can follow a curve."
    elif len(setting.points) < 2:
        yield path, f"{label}: a curve needs at least two points."
    else:
        places = [(("curve", i), "curve", point) for i, point in enumerate(setting.points)]
        for place, word, point in places + ([] if setting.outside is None else [(("outside",), "outside", setting.outside)]):
            text = wrong(point) if is_number(point) else f"{point!r} should be a finite number"
            if text:
                yield (*path, *place), f"{label}: {word}: {text.rstrip('.')}."


# ── slices ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def _slices(recipe) -> Iterator[Fault]:
    for i, one in enumerate(recipe.slices):
        for text in _slice(one, recipe):
            yield ("slices", i), f"slices: slice {i + 1}: {text}"
    used = {name for one in recipe.slices for name in one.ranges}
    for name in recipe.names if recipe.slices else ():
        if name not in used:
            yield ("slices",), f"slices: no slice has layers of {name}. Leave it out of the targets, or give it a slice."


def _slice(one: Slice, recipe) -> Iterator[str]:
    known = ("pivot", *recipe.names)
    strange = [name for name in one.ranges if name not in known]
    for name in strange:
        yield f"unknown model {name!r}. {nearest(name, known)}"
    wrong = [name for name, layers in one.ranges.items() if not _layers(layers)]
    for name in wrong:
        yield f"{name}: {list(one.ranges[name])} should be two whole numbers, the first layer and the one after the last."
    if not wrong and len({end - start for start, end in one.ranges.values()}) > 1:
        yield "all models must give equally many layers."
    if not one.ranges:
        yield "it names no model."
    most = METHODS[recipe.method].max_targets if recipe.method in METHODS else None
    given = len(one.ranges) if recipe.method == "passthrough" else len(one.ranges.keys() - {"pivot"})
    if most is not None and given > most:
        yield f"{recipe.method} takes the layers of at most {most} model{'s'[:most - 1]} at a time, not of {given}."


def _layers(layers: tuple) -> bool:
    return len(layers) == 2 and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers) \
        and 0 <= layers[0] < layers[1] <= MAX_LAYERS
