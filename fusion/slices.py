"""Layer stacking: a checkpoint seen with the layers of the result, so that everything after it works on names alone.

A recipe's slices say which layers of which models stand where in the result. `restack` gives every model a view that has
the result's tensor names; a model that a slice does not name shows the pivot's tensor there and takes no part in it.
Price: none; names are mapped, no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusion.alike import Alike
from fusion.anatomy import main_stack, place
from fusion.checkpoint import Checkpoint
from fusion.errors import RecipeError
from fusion.files import Span
from fusion.settings import Slice, depth
from fusion.untied import Untied
from fusion.view import View
from fusion.vocabulary import Remapped

PIVOT = "pivot"
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_INDEXED = ("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")  # lists of layer numbers
_PERIODIC = ("first_k_dense_replace", "max_window_layers", "sliding_window_pattern", "attn_layer_period", "attn_layer_offset",
             "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "attention_types", "hybrid_override_pattern")


class Restacked(View):
    """A view of `model` whose tensor `name` is the tensor `owned[name][1]` of the checkpoint `owned[name][0]`."""

    def __init__(self, model: Checkpoint, owned: Mapping[str, tuple[Checkpoint, str]], config: dict):
        super().__init__(model)
        self.owned, self.config = owned, config
        self.info = {name: replace(owner.info[own], name=name) for name, (owner, own) in owned.items()}

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        owner, own = self.owned[name]
        return owner.read(own, start, stop, out)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Checkpoint."""
        owner, own = self.owned[name]
        return owner.raw(own, start, stop)

    def raw_into(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        owner, own = self.owned[name]
        return owner.raw_into(own, start, stop, out)

    def plain(self, name: str) -> bool:
        """See Checkpoint."""
        owner, own = self.owned[name]
        return owner.plain(own)

    def span(self, name: str) -> Span | None:
        """See Checkpoint."""
        owner, own = self.owned[name]
        return owner.span(own)


def origin_of(model: Checkpoint, name: str) -> tuple[Checkpoint, str]:
    """The checkpoint whose tensor `model` shows under this name, unchanged, and what it is called there."""
    if isinstance(model, Restacked):
        return origin_of(*model.owned[name])
    if isinstance(model, Remapped) and name not in model.tables:
        return origin_of(model.model, name)
    if isinstance(model, Untied):
        return origin_of(model.model, model.own(name))
    return (model.source(name) if isinstance(model, Alike) else None) or (model, name)


def is_lent(model: Checkpoint, name: str) -> bool:
    """Whether a model has no such tensor and the pivot's stands in its place."""
    if isinstance(model, Restacked):
        return is_lent(*model.owned[name])
    if isinstance(model, Remapped):
        return is_lent(model.model, name)
    if isinstance(model, Untied):
        return is_lent(model.model, model.own(name))
    return isinstance(model, Alike) and name in model.lent


@dataclass(frozen=True)
class Restack:
    """Models with the layers of the result: `models` by name ("pivot" and the targets), `parts` output tensor → names of the
    targets that take part in it, `warnings` in words."""

    models: dict[str, Checkpoint]
    parts: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """One layer of the result, or what stands before or after all layers.

    `named`: the models that the slice names; `base`: the one that all others show; `own`: model → output name → its own name.
    """

    named: tuple[str, ...]
    base: str
    own: Mapping[str, Mapping[str, str]]


def restack(models: Mapping[str, Checkpoint], slices: Sequence[Slice], from_pivot: bool) -> Restack:
    """See every model ("pivot" first, then the targets) with the result's layers.

    `from_pivot` says that the method measures from the pivot, so that every slice must say which of its layers it means.
    RecipeError for layers that a model has not, or for a pivot layer that is not given.
    """
    origin: dict[str, dict[str, tuple[Checkpoint, str]]] = {label: {} for label in models}
    parts: dict[str, tuple[str, ...]] = {}
    for piece in _pieces({label: _Layers(label, model) for label, model in models.items()}, slices, from_pivot):
        for label in models:
            its = label if label in piece.named else piece.base
            origin[label] |= {out: (models[its], own) for out, own in piece.own[its].items()}
        parts |= dict.fromkeys(piece.own[piece.base], tuple(label for label in piece.named if label != PIVOT))
    config, warnings = _stacked_config(models, slices)
    return Restack({label: Restacked(model, origin[label], config) for label, model in models.items()}, parts, warnings)


class _Layers:
    """One model's tensor names: `inside[layer][rest of the name]` in its largest stack, `before` and `after` it."""

    def __init__(self, label: str, model: Checkpoint):
        self.label = label
        self.stack, self.depth = main_stack(model.info)
        self.inside: list[dict[str, str]] = [{} for _ in range(self.depth)]
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}
        for name in model.info:
            spot = place(name)
            if spot.layer is not None and spot.stack == self.stack:
                self.inside[spot.layer][name[len(self.stack) + 1:].partition(".")[2]] = name
            else:
                (self.after if spot.layer is None and depth(name, self.depth) == 1 else self.before)[name] = name


def _pieces(layers: Mapping[str, _Layers], slices: Sequence[Slice], from_pivot: bool) -> Iterator[_Piece]:
    first, last = tuple(slices[0].ranges), tuple(slices[-1].ranges)
    yield _Piece(first, PIVOT, {label: layers[label].before for label in {*first, PIVOT}})
    stack, out = layers[PIVOT].stack, 0
    for number, part in enumerate(slices, 1):
        base, starts = _starts(f"slices, number {number}", part.ranges, layers, from_pivot)
        start, stop = next(iter(part.ranges.values()))
        for offset in range(stop - start):
            own = {label: {f"{stack}.{out}.{rest}": name for rest, name in layers[label].inside[at + offset].items()}
                   for label, at in starts.items()}
            yield _Piece(tuple(part.ranges), base, own)
            out += 1
    yield _Piece(last, PIVOT, {label: layers[label].after for label in {*last, PIVOT}})


def _starts(where: str, ranges: Mapping[str, tuple[int, int]], layers: Mapping[str, _Layers],
            from_pivot: bool) -> tuple[str, dict[str, int]]:
    """Which model stands for those that the slice does not name, and the first layer of each that it does name."""
    for label, (start, stop) in ranges.items():
        if stop > layers[label].depth:
            raise RecipeError(f"{label} has {layers[label].depth} layers, {start} to {stop} were asked for", where=where,
                              todo="The end is not included: a model of 16 layers ends at 16.")
    starts = {label: start for label, (start, _) in ranges.items()}
    if PIVOT in ranges:
        return PIVOT, starts
    agreed = set(ranges.values())
    if len(agreed) == 1 and next(iter(agreed))[1] <= layers[PIVOT].depth:
        return PIVOT, {**starts, PIVOT: next(iter(agreed))[0]}
    if from_pivot:
        raise RecipeError("it is not clear which layers of the pivot these are measured from", where=where,
                          todo="Add a range for `pivot` to this slice.")
    return next(iter(ranges)), starts


def _stacked_config(models: Mapping[str, Checkpoint], slices: Sequence[Slice]) -> tuple[dict, tuple[str, ...]]:
    """The pivot's config for the result's layers, and what in it could not be adjusted, in words."""
    def text(config: dict) -> dict:
        inner = config.get("text_config")
        return inner if isinstance(inner, dict) else config

    origin = [(text(models[label].config), start + offset) for part in slices
              for label, (start, stop) in [next(iter(part.ranges.items()))] for offset in range(stop - start)]
    mine = text(models[PIVOT].config)
    changed = {key: len(origin) for key in _COUNTS if isinstance(mine.get(key), int)}
    for key, value in mine.items():
        if key in _INDEXED and isinstance(value, list):
            changed[key] = [out for out, (config, layer) in enumerate(origin) if layer in (config.get(key) or ())]
        elif isinstance(value, list) and ("layer" in key or "block" in key) \
                and all(isinstance(config.get(key), list) and len(config[key]) > layer for config, layer in origin) \
                and len(value) in [mine.get(count) for count in _COUNTS]:
            changed[key] = [config[key][layer] for config, layer in origin]
    warnings = tuple(f"The config's {key} ({mine[key]}) counts layers by their number, which the slices change. "
                     "Make sure that it still holds." for key in _PERIODIC if mine.get(key) is not None)
    config = models[PIVOT].config
    return ({**config, "text_config": {**mine, **changed}} if mine is not config else {**config, **changed}), warnings
