"""What one visitor picked: small frozen values in gr.State.

A model is named on the page by its key, never by a path: a key of the catalogue ("demo/pivot") or the key of a merge this
visitor made. Every handler is a public endpoint, so every key that comes in is looked up (`Studio`) before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Settings:
    """How one visitor wants the picked models merged; `edits` are the weights given by hand, see `given`."""

    method: str = "varm"
    granularity: str = "matrix"
    measure: str = "square"
    weights: tuple[float, ...] = ()
    edits: Edits = ()
    exclude: tuple[str, ...] = ()
    dtype: str = ""
    donor: str = "pivot"

    def given(self) -> dict[str, dict[str, float]]:
        """The weights given by hand: tensor → target key → weight."""
        return {tensor: dict(weights) for tensor, weights in self.edits}

    def with_given(self, given: Mapping[str, Mapping[str, float]]) -> Settings:
        """These settings with other weights given by hand."""
        return replace(self, edits=tuple((tensor, tuple(weights.items())) for tensor, weights in given.items()))
