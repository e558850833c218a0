"""A model whose head is its embedding, seen with a head of its own: so it merges with models that have one.

    pivot, targets = side_by_side(pivot, targets)  # with the pivot's names; the same heads where all are tied, or none is

Everything that looks at several models goes through here: preflight, measuring, inspecting, merging. What a tied model computes
does not change. Price: none here; a result whose pivot was tied stores one matrix more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fusion.alike import alike
from fusion.anatomy import place
from fusion.checkpoint import Checkpoint
from fusion.dtypes import FLOATS
from fusion.files import Span
from fusion.view import View
from fusion.vocabulary import tables


class Untied(View):
    """A tied model with `head`, which is its `embedding` unless it stores the copy."""

    def __init__(self, model: Checkpoint, head: str, embedding: str):
        super().__init__(model)
        self.head, self.embedding = head, embedding
        self.info = {**model.info, head: replace(model.info[self.own(head)], name=head)}
        inner = model.config.get("text_config")
        self.config = {**model.config, **({"text_config": {**inner, "tie_word_embeddings": False}} if isinstance(inner, dict)
                                          else {}), "tie_word_embeddings": False}

    def own(self, name: str) -> str:
        """What a tensor is called in the model itself."""
        return self.embedding if name == self.head and name not in self.model.info else name

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        return self.model.read(self.own(name), start, stop, out)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Checkpoint."""
        return self.model.raw(self.own(name), start, stop)

    def raw_into(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        return self.model.raw_into(self.own(name), start, stop, out)

    def plain(self, name: str) -> bool:
        """See Checkpoint."""
        return self.model.plain(self.own(name))

    def span(self, name: str) -> Span | None:
        """See Checkpoint."""
        return self.model.span(self.own(name))

    @property
    def tied_copies(self) -> frozenset[str]:
        """None: the head counts as the model's own."""
        return frozenset()


def side_by_side(pivot: Checkpoint, targets: Sequence[Checkpoint]) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """The models with the pivot's names for their tensors (see `alike`), each with a head of its own if one of them has one."""
    return with_heads(pivot, [alike(pivot, target) for target in targets])


def with_heads(pivot: Checkpoint, targets: Sequence[Checkpoint]) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """The models, each with a head of its own if one of them has one; names are the pivot's already (see `alike`)."""
    models = (pivot, *targets)
    head = next((name for model in models if not model.tied for name in _heads(model)), None)
    if head is None:
        return pivot, tuple(targets)
    first, *rest = (_untied(model, head) if model.tied else model for model in models)
    return first, tuple(rest)


def _heads(model: Checkpoint) -> list[str]:
    """The matrices that give every token its logit; none of a model with several kinds of output."""
    found = [name for name, tensor in model.info.items() if place(name).kind == "head" and tensor.dtype in FLOATS
             and len(tensor.shape) == 2 and place(name).layer is None]
    return found if len(found) == 1 else []


def _untied(model: Checkpoint, head: str) -> Checkpoint:
    embeddings = [name for name in tables(model) if place(name).kind == "embedding" and len(model.info[name].shape) == 2]
    return Untied(model, head, embeddings[0]) if len(embeddings) == 1 else model
