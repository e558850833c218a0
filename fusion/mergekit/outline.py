"""Which tensors a mergekit merge gives, and for each where its parameters are looked up: slice, depth and source names.

mergekit's rules: depth t runs from 0 to 1 over the layers of a slice (a single layer has 1) and is 0 outside the layers;
tensors before the layers belong to the first slice, final norm and head to the last; a filter is compared with the name that
the tensor has in the model it comes from. Nothing is opened here: `Opener` says what a model's tensors are called, and where it
cannot, or there is none, Llama's names are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.anatomy import main_stack, place
from fusion.errors import CheckpointError, MismatchError
from fusion.mergekit.document import Document, Note, Reference, Source
from fusion.preflight import mergeable_names
from fusion.settings import count_layers, depth
from fusion.sources import open_checkpoint

Opener = Callable[[str], Sequence[str] | None]  # a model as a file names it → what its tensors are called, None: not here

STACK = "model.layers"
_INSIDE = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LAYERS = 32


@dataclass(frozen=True)
class Spot:
    """One tensor of the result: its `name`, the slice it belongs to, its depth `t` in it, its layer (None outside the layers),
    and for every source of the slice the `layer` that source gives."""

    name: str
    part: int
    t: float
    layer: int | None = None
    sources: tuple[int, ...] = ()

    def source_name(self, source: int | None, stack: str) -> str:
        """What the tensor is called in a source of its slice; None = in the result."""
        if self.layer is None or source is None:
            return self.name
        return f"{stack}.{self.sources[source]}.{self.name[len(stack) + len(str(self.layer)) + 2:]}"


@dataclass(frozen=True)
class Outline:
    """Every tensor of a merge; `known` says whether the names were read from a checkpoint rather than assumed."""

    spots: tuple[Spot, ...]
    stack: str
    known: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the result's tensors."""
        return tuple(spot.name for spot in self.spots)


def outline(document: Document, earlier: Mapping[str, Outline], opener: Opener | None) -> tuple[Outline, list[Note]]:
    """The tensors of a merge; `earlier` has those of the stages it may refer to. Notes say what had to be assumed."""
    first = document.base or document.groups[0][0].model
    names, notes = _names(first, document, earlier, opener)
    return spots(names, document, not notes), notes


def whole_model(names: Sequence[str]) -> Outline:
    """The tensors of a merge of whole models that are called so."""
    return spots(names, Document(0, models=(Source(0, Reference(0, "")),)), True)


def spots(names: Sequence[str], document: Document, known: bool) -> Outline:
    """The tensors of a merge of models whose tensors are called so."""
    stack = largest_stack(names)
    inside = [name for name in names if name.startswith(stack + ".") and place(name).layer is not None]
    others = set(names).difference(inside)
    outside = _outside([name for name in names if name in others], len(document.slices))
    return Outline((*outside, *_inside(document, inside, stack, count_layers(inside))), stack, known)


def covers_all(document: Document, found: Outline, opener: Opener | None) -> bool:
    """Whether the slices only say what `models:` would say: one slice with every layer of every model."""
    ends = {source.layers for part in document.slices for source in part.sources}
    if not found.known or len(document.slices) != 1 or ends != {(0, len({spot.layer for spot in found.spots} - {None}))}:
        return False
    return opener is None or all(_has_layers(reference.text, ends, opener) for reference in document.references)


def _has_layers(text: str, ends: set[tuple[int, int]], opener: Opener) -> bool:
    """Whether a model has as many layers as its slices take, as far as that can be known."""
    try:
        names = opener(text)
    except (CheckpointError, MismatchError):
        return False
    return names is None or (0, count_layers(names)) in ends


def _names(reference: Reference, document: Document, earlier: Mapping[str, Outline],
           opener: Opener | None) -> tuple[Sequence[str], list[Note]]:
    if reference.text in earlier:
        before = earlier[reference.text]
        return before.names, [] if before.known else [_assumed(reference, "was not opened")]
    why = "was not opened"
    if opener is not None:
        try:
            names, why = opener(reference.text), "is no folder here"
        except (CheckpointError, MismatchError) as error:
            names, why = None, f"cannot be opened ({error.found})"
        if names is not None:
            return names, []
    ends = [source.layers[1] for part in document.slices for source in part.sources if source.layers]
    inside = [f"{STACK}.{layer}.{its}.weight" for layer in range(max(ends, default=_LAYERS)) for its in _INSIDE]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"], [_assumed(reference, why)]


def _assumed(reference: Reference, why: str) -> Note:
    return Note("warning" if "cannot" in why else "info", reference.line,
                f"{reference.text} {why}, so its tensors are taken to be called as Llama's")


def tensor_names(text: str) -> tuple[str, ...] | None:
    """An Opener for whoever may open every model: what is merged of one whose folder is here, from its headers alone."""
    if not Path(Reference(0, text).path).is_dir():
        return None
    model = open_checkpoint(text)
    try:
        return tuple(mergeable_names(model))
    finally:
        model.close()


def largest_stack(names: Sequence[str]) -> str:
    """What stands before the layer number in the names of most layers: "model.layers"."""
    return main_stack(names)[0] or STACK


def _outside(names: Sequence[str], slices: int) -> Iterator[Spot]:
    for name in names:
        yield Spot(name, 0 if depth(name, 1) == 0 else max(0, slices - 1), 0.0)


def _inside(document: Document, names: Sequence[str], stack: str, layers: int) -> Iterator[Spot]:
    rest: dict[int, list[str]] = {}
    for name in names:
        layer = place(name).layer
        rest.setdefault(layer, []).append(name[len(stack) + len(str(layer)) + 2:])
    at = 0
    for number, group in enumerate(document.groups):
        starts = [source.layers[0] if source.layers else 0 for source in group]
        length = len(range(*group[0].layers)) if group[0].layers else layers
        for i in range(length):
            t = i / (length - 1) if length > 1 else 1.0
            for part in rest.get(starts[0] + i, rest.get(0, [])):
                yield Spot(f"{stack}.{at}.{part}", number, t, at, tuple(start + i for start in starts))
            at += 1
