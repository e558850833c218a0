"""Where a tensor sits in a model, read off its name alone: no table of architectures to extend.

A decoder's names share one grammar, `stack.N.module.matrix.weight`, whatever its author calls the parts. The first whole
number in the dotted path is the layer; what stands before it is the stack; the component after it is the module; the rest
is the matrix. Price: a model whose names carry no numbers has no layers here, only modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

GRANULARITIES = ("model", "layer", "module", "matrix", "parameter")

# Words by which authors name the parts, tried in this order against one dotted component at a time.
_KINDS = (
    ("norm", re.compile(r"norm|^ln($|_|\d)|(^|_)ln($|_)")),
    ("attention", re.compile(r"attn|attention|^(mixer|mamba|ssm|linear_attn|temporal_block|conv)$")),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|densereludense|moe|expert|^fc\d?$|^(w1|w2|w3)$")),
    ("embedding", re.compile(r"embed_?(tokens|positions|in$)|embeddings?$|^(wte|wpe|embd|shared)$|(tok|word)_embeddings")),
    ("head", re.compile(r"^(lm_head|embed_out|output|score|classifier)$")),
)
TOWER = r"vis(ion|ual)|audio|image|video|speech"  # by which authors name what sees or hears
_TOWER = re.compile(TOWER)
_PARAMETER = re.compile(r"\.(weight|bias)$")
_WHOLE = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Place:
    """The anatomy of one tensor name.

    `stack` is the path before the layer number ("model.layers"; "" outside the layers), `layer` the number or None,
    `module` the component that owns the matrix ("self_attn"), `matrix` the rest ("q_proj", "q_proj.bias"), `kind` one of
    attention, mlp, norm, embedding, head, other.
    """

    stack: str
    layer: int | None
    module: str
    matrix: str
    kind: str

    def unit(self, granularity: str, name: str) -> str:
        """Name the unit that the tensor called `name` belongs to at this granularity; tensors outside the layers are
        units of their own, except at granularity model."""
        if granularity == "model":
            return "model"
        if self.layer is None or granularity in ("matrix", "parameter"):
            return name
        layer = f"{self.stack}.{self.layer}"
        return layer if granularity == "layer" else f"{layer}.{self.module}"


@lru_cache(maxsize=65536)
def place(name: str) -> Place:
    """Return the Place of a tensor name, for any architecture."""
    parts = _PARAMETER.sub(lambda m: ".bias" if m[1] == "bias" else "", name).split(".")
    number = next((i for i, part in enumerate(parts) if i > 0 and _WHOLE.fullmatch(part)), None)
    if number is None or number == len(parts) - 1:
        return _outside(parts)
    inside = parts[number + 1:]
    module = inside[0]
    matrix = ".".join(inside[1:]) if len(inside) > 1 and inside[1:] != ["bias"] else ".".join(inside)
    kind = _kind(inside)
    return Place(".".join(parts[:number]), int(parts[number]), module, matrix, "other" if kind == "head" else kind)


def main_stack(names: Iterable[str]) -> tuple[str, int]:
    """The stack with the most layers among these tensor names and how many it has, ("", 0) without layers; what sees or hears
    counts only where nothing else has layers."""
    depth: dict[str, int] = {}
    for name in names:
        spot = place(name)
        if spot.layer is not None:
            depth[spot.stack] = max(depth.get(spot.stack, 0), spot.layer + 1)
    return max(depth.items(), key=lambda item: (not _TOWER.search(item[0]), item[1]), default=("", 0))


def _outside(parts: list[str]) -> Place:
    owner = parts[:-1] if parts[-1] == "bias" and len(parts) > 1 else parts
    matrix = ".".join([owner[-1], *parts[len(owner):]])
    return Place("", None, owner[-1], matrix, _kind(owner[::-1]))


def _kind(parts: list[str]) -> str:
    parts = [part.lower() for part in parts]
    inner = next((part for part in reversed(parts) if part != "bias"), parts[0])
    if _KINDS[0][1].search(inner):  # a norm inside attention (q_norm) is a norm
        return "norm"
    return next((kind for part in parts for kind, pattern in _KINDS if pattern.search(part)), "other")
