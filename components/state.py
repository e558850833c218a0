"""What the page knows: one visitor's selection (small, frozen, in gr.State) and what the whole process shares (Studio).

A model is named on the page by its key, never by a path: a key of the catalogue ("demo/pivot") or the key of a merge this
visitor made. Every handler is a public endpoint, so every key that comes in is looked up here before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MAX_TARGETS = 4
LETTERS = "ABCDEFGH"
COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44")  # Tol's bright scheme: told apart by colour-blind people too


@dataclass(frozen=True)
class MergeRef:
    """A merge held in memory: its key in the pool of models and the title people see."""

    key: str
    title: str


@dataclass(frozen=True)
class Selection:
    """What one visitor picked; lives in `gr.State` and is replaced, never changed."""

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
