"""What one visitor picked: small frozen values in gr.State.

A model is named on the page by its key, never by a path: a key of the catalogue ("demo/pivot") or the key of a merge this
visitor made. Every handler is a public endpoint, so every key that comes in is looked up (`Studio`) before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fusion.methods import METHODS, Option
from fusion.settings import VARIATION, Table

MAX_TARGETS = 4
LETTERS = "ABCDEFGH"
COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44")  # Tol's bright scheme: told apart by colour-blind people too
INKS = ("#fff", "#000", "#fff", "#000")  # what is readable on them


@dataclass(frozen=True)
class MergeRef:
    """A merge held in memory: its key in the pool of models and the title people see."""

    key: str
    title: str


@dataclass(frozen=True)
class Selection:
    """The models one visitor picked; lives in `gr.State` and is replaced, never changed."""

    pivot: str = ""
    targets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    merges: tuple[MergeRef, ...] = ()

    def chat_keys(self) -> tuple[str, ...]:
        """The keys that can be chatted with, newest merge first."""
        keys = (*(m.key for m in reversed(self.merges)), *self.sources, self.pivot, *self.targets)
        return tuple(dict.fromkeys(key for key in keys if key))

    def with_merge(self, merge: MergeRef) -> Selection:
        """This selection with one more merge."""
        return replace(self, merges=(*self.merges, merge))


Edits = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]  # a mapping as a value: Gradio hashes states to see changes
Stack = tuple[tuple[tuple[str, int, int], ...], ...]  # slices: for each the (target key or "pivot", first layer, end)


@dataclass(frozen=True)
class Settings:
    """How one visitor wants the picked models merged; the fields are a recipe's, models are named by their keys.

    `weights`: one setting per target (a number, "variation", a Curve or Table; empty = what the method does by itself);
    `options`: (name, setting or one per target); `edits`: the weights given by hand, see `given`; `slices`: see Stack.
    """

    method: str = "varm"
    granularity: str = "matrix"
    measure: str = "square"
    weights: tuple = ()
    options: tuple[tuple[str, object], ...] = ()
    edits: Edits = ()
    exclude: tuple[str, ...] = ()
    slices: Stack = ()
    seed: int = 0
    vocabulary: str = ""
    dtype: str = ""
    donor: str = "pivot"
    rule: str = "ratio"
    temperature: float = 1.0
    allow_nonfinite: bool = False

    @property
    def measured(self) -> bool:
        """Whether variation gives some of the weights."""
        return METHODS[self.method].measured if not self.weights else any(
            weight == VARIATION or (isinstance(weight, Table) and VARIATION in (value for _, value in weight.rows))
            for weight in self.weights)

    def with_method(self, method: str) -> Settings:
        """These settings for another method: what the two have in common stays, the rest is the method's own default."""
        if method == self.method:
            return self
        before, now = METHODS[self.method], METHODS[method]
        kept = dict(self.options)
        options = {option.name: kept.get(option.name, starting_value(option)) for option in now.options
                   if option.name in kept or option.default is None}
        options = {name: value for name, value in options.items() if before.option(name) == now.option(name)
                   or now.option(name).default is None}
        same = now.weights and (before.weights, before.measured) == (now.weights, now.measured)
        return replace(self, method=method, options=tuple(options.items()), weights=self.weights if same else (),
                       edits=self.edits if now.weights == before.weights else ())

    def given(self) -> dict[str, dict[str, float]]:
        """The weights given by hand: tensor → target key → weight."""
        return {tensor: dict(weights) for tensor, weights in self.edits}

    def with_given(self, given: Mapping[str, Mapping[str, float]]) -> Settings:
        """These settings with other weights given by hand."""
        return replace(self, edits=tuple((tensor, tuple(weights.items())) for tensor, weights in given.items()))


def starting_value(option: Option) -> float | int | bool | str:
    """Where an option begins on the page: its default, and for one that must be given the middle of its range."""
    if option.default is not None:
        return option.default
    return (option.low + option.high) / 2 if option.low is not None and option.high is not None else 0.001
