"""What a recipe can say where a value belongs: a plain value, a curve over the depth, or a table of patterns.

    resolve(Curve((0, 1)), names)                                          # 0 at the embedding … 1 at the head
    resolve(Table((("*", 0.5), ("*.mlp.*", Curve((0, 1))))), names)        # the last row that matches a tensor wins
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.anatomy import main_stack, place
from fusion.errors import RecipeError, nearest

VARIATION = "variation"  # where a weight stands: the measured ratio
MAX_NUMBER = 1e30  # of a weight; their sum stays finite


@dataclass(frozen=True)
class Curve:
    """Numbers at equal distances from the first layer (depth 0) to the last (depth 1), straight lines between them.

    `outside`: the value of tensors outside the layers (None: embeddings have the first point, final norm and head the last).
    """

    points: tuple[float, ...]
    outside: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "points", tuple(self.points))

    def at(self, name: str, layers: int) -> float:
        """The value for a tensor of a model of so many layers."""
        if self.outside is not None and place(name).layer is None:
            return self.outside
        return float(np.interp(depth(name, layers), np.linspace(0, 1, len(self.points)), self.points))


@dataclass(frozen=True)
class Table:
    """Rows of (pattern, value): the last row whose pattern matches a tensor's name gives its value, which may be a curve."""

    rows: tuple[tuple[str, Value], ...]

    def __post_init__(self):
        object.__setattr__(self, "rows", tuple((pattern, value) for pattern, value in self.rows))


Value = float | int | bool | str | Curve
Setting = Value | Table


@dataclass(frozen=True)
class Override:
    """Weights given by hand: for the tensors that match `tensors` (a name or a pattern with `*`), target name → weight."""

    tensors: str
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Slice:
    """Layers of the result in a row: model name (or "pivot") → the layers (start, end) it gives, end not included."""

    ranges: Mapping[str, tuple[int, int]]

    def __post_init__(self):
        object.__setattr__(self, "ranges", {name: tuple(layers) for name, layers in self.ranges.items()})


def depth(name: str, layers: int) -> float:
    """How deep a tensor stands, from 0 to 1: layer i of n at i/(n−1), embeddings 0, final norm and head 1.

    `layers`: of the largest stack, see `count_layers`. A shorter stack beside it (a vision tower) goes as far as its
    own numbers do; a single layer stands in the middle.
    """
    its = place(name)
    if its.layer is not None:
        return min(1.0, its.layer / (layers - 1)) if layers > 1 else 0.5
    return 0.0 if its.kind == "embedding" or (its.kind != "head" and "emb" in name) else 1.0


def count_layers(names: Iterable[str]) -> int:
    """Layers of the largest stack among these tensor names; 0 when none has a number."""
    return main_stack(names)[1]


def resolve(setting: Setting, names: Sequence[str], where: str = "") -> list:
    """The value of a setting for every tensor name, in their order.

    RecipeError when a table's pattern matches no tensor, or when no row matches a tensor; `where` names the setting.
    """
    if isinstance(setting, Curve):
        layers = count_layers(names)
        return [setting.at(name, layers) for name in names]
    if not isinstance(setting, Table):
        return [setting] * len(names)
    values: dict[str, Value] = {}
    layers, known = count_layers(names), dict.fromkeys(names)
    for pattern, value in setting.rows:
        for name in matching(pattern, known, where or "table"):
            values[name] = value.at(name, layers) if isinstance(value, Curve) else value
    lost = next((name for name in names if name not in values), None)
    if lost is not None:
        raise RecipeError(f"no row of the table matches {lost}", where=where or "table",
                          todo="Give a first row for all the others: {tensors: '*', value: …}.")
    return [values[name] for name in names]


def matching(pattern: str, names: Iterable[str], setting: str) -> list[str]:
    """The names that a pattern (`*` any text, `?` one character, else literal) matches whole; RecipeError when none does."""
    names = names if isinstance(names, Mapping) else dict.fromkeys(names)
    if not set(pattern) & set("*?"):
        found = [pattern] if pattern in names else []
    else:
        shell = pattern.replace("[", "[[]")
        found = [name for name in names if fnmatch.fnmatchcase(name, shell)]
    if not found:
        raise RecipeError(f"no tensor matches {pattern!r}", where=setting, todo=nearest(pattern, names))
    return found


def is_number(value: object) -> bool:
    """Whether this is a finite number of sensible size; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def plain(setting: object) -> object:
    """A setting as YAML has it: `{curve: […]}`, `{table: [{tensors:, value:}, …]}`, a tuple as a list, else itself."""
    if isinstance(setting, Curve):
        outside = {} if setting.outside is None else {"outside": plain(setting.outside)}
        return {"curve": [plain(point) for point in setting.points], **outside}
    if isinstance(setting, Table):
        return {"table": [{"tensors": pattern, "value": plain(value)} for pattern, value in setting.rows]}
    if isinstance(setting, tuple):
        return [plain(value) for value in setting]
    return float(setting) if isinstance(setting, float) else setting  # numpy's own kind of float is no YAML
