"""What a merge method is for recipe, command line and page: its words, and its options as its own signature states them.

    def ties(tensor, weights, *, density: Annotated[float, About("…", low=0, high=1, per_target=True)] = 1.0): …

An option is written down once, in the signature of the function that uses it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

KINDS = {bool: "flag", int: "integer", float: "number"}


@dataclass(frozen=True)
class About:
    """What a signature says of an option beside its type and default: a line of text, limits, one value per target or not."""

    text: str
    low: float | None = None
    high: float | None = None
    per_target: bool = False


@dataclass(frozen=True)
class Option:
    """An option of a method: `kind` "number", "integer", "flag" or "choice"; `low` and `high` inclusive, None = no limit.

    `default` None = required. `per_target`: a list may give one value per target; the method gets them as float64 [J].
    """

    name: str
    kind: str
    default: float | int | bool | str | None
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    per_target: bool
    text: str

    @property
    def argument(self) -> str:
        """The name in Python, where `lambda` is `lambda_`."""
        return "lambda_" if self.name == "lambda" else self.name

    @property
    def range(self) -> str:
        """The values it takes, in words."""
        if self.kind == "choice":
            return ", ".join(self.choices)
        if self.kind == "flag":
            return "true or false"
        kind = "a whole number" if self.kind == "integer" else "a number"
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low:g} to {self.high:g}"
        return kind if self.low is None else f"{kind}, at least {self.low:g}"

    def problem(self, value: object) -> str:
        """Why it cannot take this value, in words; empty when it can."""
        return "" if self._takes(value) else f"must be {'one of ' if self.kind == 'choice' else ''}{self.range}, not {value!r}"

    def _takes(self, value: object) -> bool:
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices
        if self.kind == "flag":
            return isinstance(value, bool)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        whole = self.kind == "number" or value == int(value)
        return whole and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Method:
    """A merge method: `run(tensor, weights, **options)` yields the float32 blocks of one merged tensor in order.

    `weights`: "shares" (sum to 1), "factors" (plain numbers, 1 each unless given) or "" (it takes none; `run` ignores them).
    `measured`: variation gives the weights unless they are given. `max_targets` None = any number. `stages`: the steps of a
    task-vector method, in order. `from_pivot`: whether the result depends on the pivot's numbers; see `reads_pivot`.
    """

    name: str
    title: str
    formula: str
    summary: str
    source: str
    run: Callable[..., Iterator[np.ndarray]]
    weights: str = ""
    measured: bool = False
    min_targets: int = 1
    max_targets: int | None = None
    random: bool = False
    from_pivot: bool = True
    stages: tuple[str, ...] = ()
    options: tuple[Option, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "options", tuple(read_options(self.run)))

    def option(self, name: str) -> Option | None:
        """The option of this name, None when there is none."""
        return next((option for option in self.options if option.name == name), None)

    def reads_pivot(self, options: Mapping[str, object] | None = None, targets: int = 1) -> bool:
        """Whether `run` looks at the pivot, with these options (by recipe name) and so many targets."""
        between_targets = self.name == "slerp" and targets == 2
        return self.from_pivot and not between_targets and (options or {}).get("space", self._space) != "weights"

    @property
    def _space(self) -> object:
        option = self.option("space")
        return option.default if option else None

    def to_dict(self) -> dict:
        """All that is said of the method, as plain data."""
        plain = {its.name: getattr(self, its.name) for its in fields(self) if its.name not in ("run", "options")}
        return {**plain, "options": [vars(option) for option in self.options]}


def read_options(run: Callable[..., Iterator[np.ndarray]]) -> Iterator[Option]:
    """The options that a method's signature states: its keyword-only arguments."""
    hints = get_type_hints(run, include_extras=True)
    for argument in inspect.signature(run).parameters.values():
        if argument.kind is argument.KEYWORD_ONLY:
            type_, about = get_args(hints[argument.name])
            choices = get_args(type_) if get_origin(type_) is Literal else ()
            default = None if argument.default is argument.empty else argument.default
            yield Option(argument.name.rstrip("_"), "choice" if choices else KINDS[type_], default, about.low, about.high,
                         choices, about.per_target, about.text)


def per_target(value: float | np.ndarray, count: int) -> np.ndarray:
    """An option's value for each of `count` targets, [J] float64, whether one or all were given."""
    return np.broadcast_to(np.asarray(value, np.float64), count)
