"""A mergekit file as plain data in which every part knows its line: what reading makes and everything else works on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Note:
    """What one line does or why it is wrong: `level` info, warning or error; `line` from 1."""

    level: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Row:
    """One value of a setting: for tensors whose name contains `filter` (None = all); `values` has one number, or the points of
    a gradient."""

    line: int
    filter: str | None
    values: tuple[Scalar, ...]
    gradient: bool = False


@dataclass(frozen=True)
class Reference:
    """A model: `path[@revision][+lora[@revision]]`; `text` is how a recipe writes it."""

    line: int
    text: str
    architecture: str = ""

    @property
    def path(self) -> str:
        """The folder or repository alone."""
        return re.split("[@+]", self.text, maxsplit=1)[0]


Parameters = Mapping[str, tuple[Row, ...]]


@dataclass(frozen=True)
class Source:
    """A model in `models` (`layers` None) or in a slice."""

    line: int
    model: Reference
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """An output slice: its sources have equally many layers."""

    line: int
    sources: tuple[Source, ...]
    base: Reference | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenizer:
    """Where the tokenizer comes from: `source` is union, base or a model."""

    line: int
    source: str
    tokens: tuple[str, ...] = ()
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Document:
    """One merge; `lines` says where every key of the top level stands. Exactly one of `models` and `slices` is filled."""

    line: int
    name: str = ""
    method: str = ""
    base: Reference | None = None
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    module: str = ""
    module_parameters: Parameters = field(default_factory=dict)
    parameters: Parameters = field(default_factory=dict)
    dtype: str = ""
    out_dtype: str = ""
    tokenizer: Tokenizer | None = None
    chat_template: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[tuple[Source, ...], ...]:
        """The sources of every slice; one group for `models`."""
        return (self.models,) if self.models else tuple(part.sources for part in self.slices)

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every model once, the base first, then in the order of the file."""
        found = {} if self.base is None else {self.base.text: self.base}
        for source in (source for group in self.groups for source in group):
            found.setdefault(source.model.text, source.model)
        return tuple(found.values())
