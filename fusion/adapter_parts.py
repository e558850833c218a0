"""Which tensor of the base every tensor of an adapter belongs to, and what it does there.

    parts = sort_parts(base, folder, settings, tensors)
    parts.thin["model.layers.0.self_attn.q_proj.weight"].scale

peft names modules as they are called in memory, bases as they were saved: names are compared by what they mean (`naming`).
Price: headers only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusion import dtypes
from fusion.adapter_settings import MERGE_IT, SAVE_AGAIN, scale_of, trains_whole, wants_text
from fusion.anatomy import place
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, MismatchError, nearest
from fusion.header import TensorInfo
from fusion.naming import Part, atoms, plain_name, table, unread

_PART = re.compile(r"^(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.\w+)?(\.weight)?$")
_WHOLE = re.compile(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)")


@dataclass(frozen=True)
class Thin:
    """What an adapter does to one matrix: `down` [r, in], `up` [out, r], DoRA's `magnitude` [out] or None, `scale`;
    `across` says that the base stores the matrix as [in, out]."""

    down: TensorInfo
    up: TensorInfo
    magnitude: TensorInfo | None
    scale: float
    across: bool


@dataclass
class Parts:
    """An adapter's tensors by the base's tensor names: `thin` pairs and `whole` ones; `alias` name of a head that a tied base
    has only as its embedding → that embedding."""

    thin: dict[str, Thin] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)


def sort_parts(base: Checkpoint, folder: Path, settings: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> Parts:
    """Sort an adapter's tensors; CheckpointError for what is not known here, MismatchError for what is not the base's."""
    return _Sorter(base, folder, settings).sort(tensors)


def embedding_of(base: Checkpoint) -> str | None:
    """The table of a model that turns tokens into vectors: of several embeddings the one with a row for every token."""
    found = [name for name in base.info if place(name).kind == "embedding" and place(name).layer is None
             and len(base.info[name].shape) == 2]
    return min(found, key=lambda name: (base.info[name].shape[0] != base.vocab_size, "position" in name), default=None)


class _Sorter:
    def __init__(self, base: Checkpoint, folder: Path, settings: Mapping[str, object]):
        self.base, self.folder, self.settings, self.where = base, folder, settings, str(folder)
        self.names = table({name: tensor.shape for name, tensor in base.info.items()})
        self.parts = Parts()

    def sort(self, tensors: Mapping[str, TensorInfo]) -> Parts:
        pairs: dict[str, dict[str, TensorInfo]] = {}
        modules: dict[str, str] = {}
        rank: dict[str, int] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in dtypes.FLOATS:
                raise CheckpointError(f"{name} is {tensor.dtype}, which is not a weight dtype", where=self.where, todo=MERGE_IT)
            found = _PART.fullmatch(name)
            if found:
                module = _inner(found[1])
                target = self._target(f"{module}.weight", name)
                its = pairs.setdefault(target, {})
                if found[2] in its:
                    raise CheckpointError(f"{found[2]} of {module} is stored twice", where=self.where, todo=SAVE_AGAIN)
                its[found[2]], modules[target] = tensor, module
            elif not unread(_inner(name), tensor.shape, None, ""):
                self._take_whole(name, tensor, rank)
        self._part_head_and_embedding(tensors, pairs)
        self._refuse_half_resized()
        for name, tensor in self.parts.whole.items():
            self._check_whole(name, tensor)
        self.parts.thin = {target: self._understand(target, modules[target], its) for target, its in pairs.items()}
        return self.parts

    def _take_whole(self, name: str, tensor: TensorInfo, rank: dict[str, int]) -> None:
        """A tensor that the adapter brings whole: of several copies, the trained one. Experts in one tensor are parted."""
        kind = 0 if ".original_module." in name else 2 if ".modules_to_save." in name else 1
        wanted = _WHOLE.sub("", _inner(name))
        pieces = [(self.names[plain].own, part) for plain, part in atoms(wanted, tensor.shape)
                  if wanted not in self.base.info and self._alone(self.names.get(plain))]
        if len(pieces) < 2:
            pieces = [(self._target(wanted, name), Part(name, 0, tensor.shape))]
        for target, part in pieces:
            if kind and kind >= rank.get(target, 0):
                item = dtypes.ITEM_BYTES[tensor.dtype]
                rank[target] = kind
                self.parts.whole[target] = replace(tensor, shape=part.shape, start=tensor.start + part.start * item,
                                                   nbytes=part.numel * item)

    def _alone(self, part: Part | None) -> bool:
        """Whether a part of the base is a whole tensor of it."""
        return part is not None and part.numel == self.base.info[part.own].numel

    def _part_head_and_embedding(self, tensors: Mapping[str, TensorInfo], adapted: Mapping[str, object]) -> None:
        """A tied embedding that was trained leaves the head as it was: peft parts the two, unless it was told to keep them one."""
        table, heads = embedding_of(self.base), [name for name in self.base.info if place(name).kind == "head"]
        if table not in {*self.parts.whole, *adapted} or not self.base.tied or self._kept_one(table):
            return
        head = next(iter([*heads, *self.parts.alias]), "lm_head.weight")
        if head in self.parts.whole:
            return
        if table in adapted:
            self.parts.alias[head] = table
            if table in self.parts.whole:
                self.parts.whole[head] = self.parts.whole[table]
        elif trains_whole(self.settings, table.removesuffix(".weight")):
            self._keep_head(tensors, table, head)

    def _kept_one(self, table: str) -> bool:
        """Whether peft trained head and embedding as one; it does so only where they have the names that it knows."""
        return bool(self.settings.get("ensure_weight_tying")) and table.split(".")[-2:] == ["embed_tokens", "weight"]

    def _keep_head(self, tensors: Mapping[str, TensorInfo], table: str, head: str) -> None:
        """The head of a tied model whose embedding was trained as a module of its own is what the embedding was before."""
        self.parts.alias[head] = table
        before = next((tensor for name, tensor in tensors.items() if ".original_module." in name
                       and self._target(_WHOLE.sub("", _inner(name)), name) == table), None)
        if before is not None:
            self.parts.whole[head] = before
        elif self.parts.whole[table].shape != self.base.info[table].shape:
            self._refuse_headless("trains the embedding (modules_to_save)")

    def _refuse_half_resized(self) -> None:
        """Refuse an adapter that brings an embedding with other rows than the base's and leaves the base's own head as it is."""
        table, info = embedding_of(self.base), self.base.info
        if self.base.tied or table not in self.parts.whole or self.parts.whole[table].shape == info[table].shape:
            return
        if any(place(name).kind == "head" and tensor.shape[:1] == info[table].shape[:1] and name not in self.parts.whole
               for name, tensor in info.items()):
            self._refuse_headless("brings the embedding")

    def _refuse_headless(self, what: str) -> None:
        raise CheckpointError(f"it {what} with other tokens than the base, without the head that belongs to them",
                              where=self.where, todo=MERGE_IT)

    def _target(self, wanted: str, tensor: str) -> str:
        """The base's tensor that an adapter's tensor belongs to; bases may be saved with other outer names."""
        if wanted in self.base.info:
            return wanted
        part = self.names.get(plain_name(wanted))
        if part is not None and not self._alone(part):
            raise CheckpointError(f"{tensor} belongs to one expert of {part.own}, where {self.base.name} keeps several",
                                  where=self.where, todo=MERGE_IT)
        close = [part.own] if part else [name for name in self.base.info
                                         if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")]
        if len(close) == 1:
            return close[0]
        embedding = embedding_of(self.base)
        if place(wanted).kind == "head" and self.base.tied and embedding:
            self.parts.alias[wanted] = embedding
            return wanted
        word = "modules_to_save: " if trains_whole(self.settings, wanted.rpartition(".")[0]) else ""
        raise MismatchError(f"{word}{tensor} belongs to no tensor of {self.base.name}", where=self.where,
                            todo=f"{nearest(wanted, self.base.info)} {wants_text(self.folder)} Or: {MERGE_IT}")

    def _shape(self, target: str) -> tuple[int, ...]:
        return (self.parts.whole.get(target) or self.base.info[self.parts.alias.get(target, target)]).shape

    def _understand(self, target: str, module: str, its: Mapping[str, TensorInfo]) -> Thin:
        inside = "lora_embedding_A" in its or "lora_embedding_B" in its
        down, up = its.get("lora_embedding_A" if inside else "lora_A"), its.get("lora_embedding_B" if inside else "lora_B")
        shape = self._shape(target)
        if down is None or up is None:
            raise CheckpointError(f"one of the two matrices for {target} is missing", where=self.where, todo=SAVE_AGAIN)
        if len(shape) != 2 or len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            raise CheckpointError(f"the adapter of {target} has shapes {list(down.shape)} and {list(up.shape)} for a weight of "
                                  f"shape {list(shape)}; only matrices are known here", where=self.where, todo=MERGE_IT)
        full = (up.shape[0], down.shape[1])
        turned = full == shape[::-1]
        across = inside or (turned and (full != shape or bool(self.settings.get("fan_in_fan_out"))))
        if shape != (full[::-1] if across else full):
            raise MismatchError(f"{target} has shape {list(shape)} in {self.base.name}, the adapter is for {list(full)}",
                                where=self.where, todo=wants_text(self.folder))
        magnitude = self._magnitude(target, its.get("lora_magnitude_vector"), across, shape[0])
        return Thin(down, up, magnitude, scale_of(self.settings, module, down.shape[0], self.where), across)

    def _magnitude(self, target: str, tensor: TensorInfo | None, across: bool, rows: int) -> TensorInfo | None:
        if tensor is not None and (across or tensor.numel != rows):
            raise CheckpointError(f"DoRA on {target} is not known here", where=self.where, todo=MERGE_IT)
        if bool(self.settings.get("use_dora")) != (tensor is not None):
            raise CheckpointError(f"use_dora does not agree with the tensors of {target}", where=self.where, todo=SAVE_AGAIN)
        return tensor

    def _check_whole(self, name: str, tensor: TensorInfo) -> None:
        base = self.base.info[self.parts.alias.get(name, name)]
        if tensor.shape != base.shape and (place(name).kind not in ("embedding", "head") or tensor.shape[1:] != base.shape[1:]):
            raise MismatchError(f"{name} has shape {list(base.shape)} in {self.base.name}, {list(tensor.shape)} in the adapter",
                                where=self.where, todo=wants_text(self.folder))


def _inner(name: str) -> str:
    """The name of a module or tensor without what peft wraps around the model."""
    return name.removeprefix("base_model.model.")
