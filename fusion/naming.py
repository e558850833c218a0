"""One name for a tensor whatever it was saved as, and which tensors no model reads.

    plain_name("language_model.model.layers.0.mlp.up_proj.weight")     # "layers.0.mlp.up_proj.weight"
    plain_name("model.language_model.layers.0.mlp.up_proj.weight")     # the same
    atoms("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 16))      # 16 matrices: gate and up of every expert

Models have other names in memory than on the Hub, and a class that only reads, or only writes text, has other outer names than
the whole. transformers renames them while it loads (its `conversion_mapping`); here are the few rules behind its tables, since
importing those takes torch. Experts that stand in one tensor lie one after the other in it, so no number moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from fusion.anatomy import TOWER, main_stack, place

_OUTER = {"model", "language_model", "transformer", "text_model", "base_model", "pretrained_model", "gpt_neox", "backbone",
          "thinker", "module", "_orig_mod"}  # what wraps the part that reads and writes text
_RENAMED = tuple((re.compile(pattern), new) for pattern, new in (
    (r"^embed_out\.", "lm_head."),
    (r"^(\w*tower)\.(vision_model|audio_model|text_model)\.", r"\1."),
    (r"\.block_sparse_moe\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".mlp.experts.down_proj"),
    (r"\.router\.layer\.weight$", ".router.weight"),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.mlp\.router\.", ".mlp.gate."),
    (r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
))
_BUFFER = re.compile(r"(^|\.)(inv_freq|(cos|sin)_cached|masked_bias|position_ids)$|rotary_emb\.|(^|\.)rope\.freqs$")
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")  # a triangle of ones, where it has four axes
_UNREAD = re.compile(r"(^|\.)(mtp\w*|nextn\w*|v_head|value_head)\.")
_OTHER_SENSES = re.compile(r"multi_?modal|modality|connector|projector|image_newline|mm_|embed_(vision|audio)|" + TOWER)
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Part:
    """Where a matrix lies: the flat elements from `start` on of the tensor that is stored as `own`; its own `shape`."""

    own: str
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@lru_cache(maxsize=65536)
def plain_name(name: str) -> str:
    """The name of a tensor without what wraps the model, experts called gate, up and down."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _OUTER:
        parts = parts[1:]
    name = ".".join(parts)
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    return name


def atoms(name: str, shape: tuple[int, ...]) -> list[tuple[str, Part]]:
    """The matrices that a stored tensor consists of, by their plain names, in the order of its numbers."""
    plain = plain_name(name)
    front, _, last = plain.rpartition(".")
    if len(shape) != 3 or not front.endswith("experts") or last not in ("gate_up_proj", "up_proj", "down_proj"):
        return [(plain, Part(name, 0, shape))]
    names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    if shape[1] % len(names):
        return [(plain, Part(name, 0, shape))]
    one = (shape[1] // len(names), shape[2])
    return [(f"{front}.{expert}.{matrix}.weight", Part(name, (expert * len(names) + i) * math.prod(one), one))
            for expert in range(shape[0]) for i, matrix in enumerate(names)]


def table(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """Plain name → where it lies, of all tensors of a model; a plain name that two tensors share means neither."""
    found: dict[str, Part] = {}
    twice = set()
    for name, shape in shapes.items():
        for plain, part in atoms(name, shape):
            if plain in found:
                twice.add(plain)
            found[plain] = part
    return {plain: part for plain, part in found.items() if plain not in twice}


def is_buffer(name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether a tensor is a table that models compute by themselves (rotary frequencies, masks, positions), not a weight;
    `shape` None: not known."""
    return bool(_BUFFER.search(name)) or ((shape is None or len(shape) == 4) and bool(_MASK.search(name)))


def unread(name: str, shape: tuple[int, ...] | None, depth: int | None, stack: str) -> bool:
    """Whether models leave a tensor alone when they load: buffers, layers for predicting several tokens, heads of trainers.

    `depth` is what the config says of the number of layers (None: nothing), `stack` the path of the layers.
    """
    spot = place(name)
    return (is_buffer(name, shape) or bool(_UNREAD.search(name))
            or (depth is not None and spot.layer is not None and spot.stack == stack and spot.layer >= depth))


def other_sense(name: str) -> bool:
    """Whether a tensor belongs to what sees or hears, not to what reads and writes text."""
    return bool(_OTHER_SENSES.search(re.split(r"\.\d+\.", name)[0]))


def stated_depth(config: Mapping[str, object]) -> int | None:
    """The number of layers that a config names, the largest of several; None when it names none."""
    inner = config.get("text_config")
    both = (config, inner) if isinstance(inner, dict) else (config,)
    counts = [one[key] for one in both for key in _COUNTS if isinstance(one.get(key), int)]
    return max(counts, default=None)


def unread_names(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> frozenset[str]:
    """The tensors of a model that nothing reads."""
    depth, stack = stated_depth(config), main_stack(shapes)[0]
    return frozenset(name for name, shape in shapes.items() if unread(name, shape, depth, stack))
