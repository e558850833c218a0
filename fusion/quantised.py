"""Weights stored in fewer bits: FP8 with its scales is read as the numbers it stands for, anything else is refused in words.

An FP8 checkpoint keeps next to `x.weight` a scale `x.weight_scale_inv` (DeepSeek: one number per block of 128 × 128) or
`x.weight_scale` (one per tensor, row or block); a weight is its FP8 number times its scale. The scales vanish from the
mapping, and the weights appear as bfloat16. Price: a table look-up and one multiplication per number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fusion import dtypes
from fusion.errors import CheckpointError
from fusion.header import TensorInfo

FP8 = ("F8_E4M3", "F8_E5M2")
_LOGICAL = "BF16"
_PACKED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_format", "_packed", "_blocks", "_zero_point")
_ACTIVATIONS = re.compile(r"(^|[._])(input_scale|input_scale_ub|output_scale|activation_scale|[qkv]_scale|prob_scale)$")
_BLOCK = 128
_AGAIN = "Download the checkpoint again."
_TODO = "Merge the full-precision checkpoint it was made from."


def _e4m3(byte: int) -> float:
    """1 sign, 4 exponent (bias 7), 3 fraction bits; no infinity (Micikevicius et al., arXiv 2209.05433, table 1)."""
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if (exponent, fraction) == (15, 7):
        return float("nan")
    return sign * (fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0**(exponent - 10))


TABLES = {  # the number that each of the 256 bytes stands for
    "F8_E4M3": np.array([_e4m3(byte) for byte in range(256)], np.float32),
    "F8_E5M2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),  # the upper half of a float16
    "F8_E8M0": np.array([*(2.0**(byte - 127) for byte in range(255)), float("nan")], np.float32),  # a scale: only an exponent
}


@dataclass(frozen=True)
class Scaled:
    """An FP8 tensor as stored, its scale (None: plain FP8 numbers), and the elements along each axis that share a scale."""

    weight: TensorInfo
    scale: TensorInfo | None
    block: tuple[int, ...]


def dequantised(stored: Mapping[str, TensorInfo], config: dict, where: str) -> tuple[dict[str, TensorInfo], dict[str, Scaled]]:
    """Split the stored tensors into those a merge sees (name → info, FP8 as bfloat16) and the FP8 ones by name.

    CheckpointError for every other quantisation: GPTQ, AWQ, bitsandbytes, MXFP4, NVFP4, 8-bit integers …
    """
    method = _settings(config)
    low = [name for name, tensor in stored.items() if tensor.dtype in FP8]
    _refuse_others(stored, low, method, where)
    scaled = {name: _scaled(stored[name], stored, method, where) for name in low if not _is_scale(name, stored)}
    lost = next((name for name, entry in scaled.items() if entry.scale is None), None)
    if lost is not None and any(entry.scale is not None for entry in scaled.values()):
        raise CheckpointError(f"{lost} is {stored[lost].dtype} but has no scale", where=where, todo=_AGAIN)
    gone = {entry.scale.name for entry in scaled.values() if entry.scale is not None}
    if scaled:
        gone |= {name for name in stored if _ACTIVATIONS.search(name)}
    info = {name: replace(tensor, dtype=_LOGICAL) if name in scaled else tensor
            for name, tensor in stored.items() if name not in gone}
    return info, scaled


def plain_config(config: dict) -> dict:
    """The config of the dequantised weights: without `quantization_config`."""
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    inner = config.get("text_config")
    return {**config, "text_config": plain_config(inner)} if isinstance(inner, dict) else config


def decode(entry: Scaled, raw: bytes, start: int, scale: np.ndarray | None, out: np.ndarray) -> np.ndarray:
    """Write the numbers of the flat elements from `start` on into `out` (float32, [n]) and return it.

    `raw` [n] bytes; `scale` as `read_scale` gives it. float32: FP8 number × scale, rounded once.
    """
    np.take(TABLES[entry.weight.dtype], np.frombuffer(raw, np.uint8), out=out)
    if scale is None or not len(out):
        return out
    if scale.size == 1:
        return np.multiply(out, scale.reshape(()), out=out)
    shape = entry.weight.shape
    columns, stop = shape[-1], start + len(out)
    rows = np.unravel_index(np.arange(start // columns, -(-stop // columns)), shape[:-1] or (1,))
    if len(shape) > 1:
        scale = scale[tuple(axis // block for axis, block in zip(rows, entry.block, strict=False))]  # [rows, scales of a row]
    factors = np.repeat(scale.reshape(len(rows[0]), -1), entry.block[-1], axis=1)[:, :columns].reshape(-1)
    return np.multiply(out, factors[start % columns:][:len(out)], out=out)


def read_scale(entry: Scaled, raw: Callable[[TensorInfo], bytes]) -> np.ndarray | None:
    """The scale as float32 with one axis per axis of the weight; `raw` reads the bytes of a tensor."""
    info = entry.scale
    if info is None:
        return None
    data = raw(info)
    if info.dtype in TABLES:
        values = TABLES[info.dtype][np.frombuffer(data, np.uint8)]
    else:
        values = dtypes.decode(data, info.dtype, np.empty(info.numel, np.float32))
    return values.reshape(_aligned(info.shape, len(entry.block)))


def _settings(config: dict) -> object:
    inner = config.get("text_config")
    found = config.get("quantization_config") or config.get("compression_config")
    return found or (_settings(inner) if isinstance(inner, dict) else None)


def _refuse_others(stored: Mapping[str, TensorInfo], low: list[str], method: object, where: str) -> None:
    said = method.get("quant_method") if isinstance(method, dict) else method
    whole = [name for name, tensor in stored.items() if tensor.dtype not in (*dtypes.FLOATS, *FP8)]
    packed = next((name for name in stored if name.endswith(_PACKED)), None) or next(
        (name for name in whole if _scale_of(name, stored) or (method and name.endswith(".weight"))), None)
    if packed or (method and not low):
        what = ", ".join(str(part) for part in (said, packed and f"{packed} is {stored[packed].dtype}") if part)
        raise CheckpointError(f"the weights are quantised ({what or 'its config says so'})", where=where, todo=_TODO)


def _scale_of(name: str, stored: Mapping[str, TensorInfo]) -> str | None:
    return next((scale for scale in (f"{name}_scale_inv", f"{name}_scale") if scale in stored), None)


def _is_scale(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    return any(name.endswith(tail) and name.removesuffix(tail) in stored for tail in ("_scale_inv", "_scale"))


def _scaled(weight: TensorInfo, stored: Mapping[str, TensorInfo], method: object, where: str) -> Scaled:
    name = _scale_of(weight.name, stored)
    if name is None:
        return Scaled(weight, None, (1,) * len(weight.shape))
    scale = stored[name]
    if scale.dtype not in (*dtypes.FLOATS, "F8_E8M0"):
        raise CheckpointError(f"the scale {name} is {scale.dtype}, which is not known here", where=where, todo=_TODO)
    if scale.numel == 1:
        return Scaled(weight, scale, weight.shape or (1,))
    aligned = _aligned(scale.shape, len(weight.shape))
    wanted = _block_shape(method)
    wanted = (1,) * (len(weight.shape) - len(wanted)) + wanted if wanted else ()
    block = tuple(_along(size, parts, wanted[axis] if wanted else None)
                  for axis, (size, parts) in enumerate(zip(weight.shape, aligned, strict=True))) if aligned else (0,)
    if 0 in block:
        raise CheckpointError(f"the scale {name} of shape {list(scale.shape)} does not fit a weight of shape "
                              f"{list(weight.shape)}", where=where, todo=_AGAIN)
    return Scaled(weight, scale, block)


def _aligned(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A scale's shape with one number per axis of a weight of this rank: [out] is one per row; () when it cannot be."""
    if len(shape) == rank:
        return shape
    return (*shape, *(1,) * (rank - len(shape))) if len(shape) < rank else ()


def _along(size: int, parts: int, wanted: int | None) -> int:
    """Elements along one axis that share a scale; 0 when so many scales cannot cover it."""
    if parts == 1:
        return max(size, 1)
    if parts == size:
        return 1
    block = wanted or _BLOCK
    return block if -(-size // block) == parts else 0


def _block_shape(method: object) -> tuple[int, ...]:
    """The block of a scale as the config gives it: `weight_block_size`, or a compressed-tensors `block_structure`."""
    if not isinstance(method, dict):
        return ()
    found = method.get("weight_block_size")
    groups = method.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found = found or (weights.get("block_structure") if isinstance(weights, dict) else None)
    valid = isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found)
    return tuple(found) if valid else ()
