"""Models that are saved under other names, seen with the pivot's: what belongs together is merged, whatever it is called.

    target = alike(pivot, target)          # the target itself where nothing is called otherwise
    target.lent                            # what it has not and does not need: the pivot's stands there and takes no part

Everything that looks at several models goes through here: preflight, measuring, merging, comparing. Price: none; names are
mapped, no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np

from fusion.anatomy import place
from fusion.checkpoint import Checkpoint
from fusion.dtypes import FLOATS, ITEM_BYTES
from fusion.files import Span
from fusion.header import TensorInfo
from fusion.naming import Part, atoms, other_sense, table, unread_names
from fusion.view import View

_BARE = re.compile(r"(?<!LMHead)Model$")  # a class of transformers without a head


class Alike(View):
    """A model whose tensors have another's names and, where experts lie in one tensor or in many, its shapes.

    `places` name → the parts of its own tensors that it consists of, in order; `lent` name → the model whose tensor stands
    there; `left` its own tensors that nothing reads or the other has no use for.
    """

    def __init__(self, model: Checkpoint, places: Mapping[str, tuple[Part, ...]], shapes: Mapping[str, tuple[int, ...]],
                 lent: Mapping[str, Checkpoint], left: frozenset[str]):
        super().__init__(model)
        self.places, self.lent, self.left = places, lent, left
        self.info = {**{name: self._entry(name, parts, shapes[name]) for name, parts in places.items()},
                     **{name: owner.info[name] for name, owner in lent.items()}}

    def _entry(self, name: str, parts: tuple[Part, ...], shape: tuple[int, ...]) -> TensorInfo:
        owners = [self.model.info[part.own] for part in parts]
        dtype = owners[0].dtype if len({owner.dtype for owner in owners}) == 1 else "F32"
        numel = sum(part.numel for part in parts)
        return replace(owners[0], name=name, dtype=dtype, shape=shape, nbytes=numel * ITEM_BYTES[dtype])

    @property
    def renamed(self) -> tuple[str, str] | None:
        """The first tensor that has another name: its own and the one it is seen with."""
        return next(((parts[0].own, name) for name, parts in self.places.items() if parts[0].own != name), None)

    def source(self, name: str) -> tuple[Checkpoint, str] | None:
        """The checkpoint whose whole tensor this is and what it is called there; None where it is put together."""
        if name in self.lent:
            return self.lent[name], name
        first, *rest = self.places[name]
        return (self.model, first.own) if not rest and first.numel == self.model.info[first.own].numel else None

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        if name in self.lent:
            return self.lent[name].read(name, start, stop, out)
        for part, begin, end, at in self._pieces(name, start, stop):
            self.model.read(part.own, begin, end, out[at:at + end - begin])
        return out[:stop - start]

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Checkpoint."""
        if name in self.lent:
            return self.lent[name].raw(name, start, stop)
        stop = self.info[name].numel if stop is None else stop
        return b"".join(self.model.raw(part.own, begin, end) for part, begin, end, _ in self._pieces(name, start, stop))

    def raw_into(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        if name in self.lent:
            return self.lent[name].raw_into(name, start, stop, out)
        item = ITEM_BYTES[self.info[name].dtype]
        for part, begin, end, at in self._pieces(name, start, stop):
            self.model.raw_into(part.own, begin, end, out[at * item:(at + end - begin) * item])
        return out[:(stop - start) * item]

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[Part, int, int, int]]:
        """The flat elements start … stop: part, its tensor's elements from … to, and where they stand behind `start`."""
        at = 0
        for part in self.places[name]:
            low, high = max(start, at), min(stop, at + part.numel)
            if low < high:
                yield part, part.start + low - at, part.start + high - at, low - start
            at += part.numel

    def plain(self, name: str) -> bool:
        """See Checkpoint."""
        if name in self.lent:
            return self.lent[name].plain(name)
        return all(self.model.plain(part.own) and self.model.info[part.own].dtype == self.info[name].dtype
                   for part in self.places[name])

    def span(self, name: str) -> Span | None:
        """See Checkpoint."""
        if name in self.lent:
            return self.lent[name].span(name)
        first, *rest = self.places[name]
        whole = None if rest or not self.plain(name) else self.model.span(first.own)
        if whole is None:
            return None
        item = ITEM_BYTES[self.info[name].dtype]
        return whole._replace(start=whole.start + first.start * item, nbytes=first.numel * item)

    @cached_property
    def tied_copies(self) -> frozenset[str]:
        """See Checkpoint."""
        theirs = self.model.tied_copies
        return frozenset(name for name, parts in self.places.items() if parts[0].own in theirs)


def alike(pivot: Checkpoint, target: Checkpoint) -> Checkpoint:
    """The target with the pivot's names: itself where it has them all and no others."""
    if isinstance(target, Alike) or pivot.info.keys() == target.info.keys():
        return target
    mine = {name: tensor.shape for name, tensor in pivot.info.items()}
    theirs = {name: tensor.shape for name, tensor in target.info.items()}
    own = table(theirs)
    places = {name: parts for name in mine if (parts := _parts(name, mine[name], theirs, own))}
    used = {part.own for parts in places.values() for part in parts}
    lent = {name: pivot for name in _optional(pivot, target) if name not in places and name not in pivot.tied_copies}
    left = frozenset(name for name in _optional(target, pivot) if name not in used)
    rest = {name: (Part(name, 0, shape),) for name, shape in theirs.items() if name not in used | left and name not in places}
    if not lent and not left and all(name == parts[0].own for name, parts in places.items()):
        return target
    places = {**places, **rest}
    shapes = {name: parts[0].shape if len(parts) == 1 else mine[name] for name, parts in places.items()}
    return Alike(target, places, shapes, lent, left)


def names_view(model: Checkpoint) -> Alike | None:
    """The view of a model by which it has another's names, beneath what else changes it; None where there is none."""
    while isinstance(model, View) and not isinstance(model, Alike):
        model = model.model
    return model if isinstance(model, Alike) else None


def one_family(pivot: Checkpoint, target: Checkpoint) -> bool:
    """Whether two models of different classes have the same part that reads and writes text, as their configs say."""
    return _text_type(pivot) == _text_type(target) != ""


def _text_type(model: Checkpoint) -> str:
    inner = model.config.get("text_config")
    said = inner.get("model_type") if isinstance(inner, dict) else None
    said = said or model.config.get("model_type")
    return re.sub(r"(_5)?(_vl)?(_moe)?(_text)?$", "", said) if isinstance(said, str) else ""


def _parts(name: str, shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]],
           own: Mapping[str, Part]) -> tuple[Part, ...]:
    """Where the tensor that the pivot calls `name` lies in the target; () where it does not."""
    if name in theirs:
        return (Part(name, 0, theirs[name]),)
    wanted = atoms(name, shape)
    if not all(plain in own for plain, _ in wanted):
        return ()
    found = tuple(own[plain] for plain, _ in wanted)
    if len(found) > 1 and any(part.shape != one.shape for part, (_, one) in zip(found, wanted, strict=True)):
        return ()
    return found


def _optional(model: Checkpoint, other: Checkpoint) -> list[str]:
    """The tensors of `model` that `other` may lack: what nothing reads, what only one of them sees or hears with, and a head
    where the other is saved without one."""
    unread = unread_names({name: tensor.shape for name, tensor in model.info.items()}, model.config)
    family = model.architecture != other.architecture and one_family(model, other)
    blind = family and not any(map(other_sense, other.info))
    headless = family and bool(_BARE.search(other.architecture))
    return [name for name, tensor in model.info.items() if name in unread or (blind and other_sense(name))
            or (headless and place(name).kind == "head" and tensor.dtype in FLOATS)]
