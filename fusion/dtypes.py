"""Stored bytes to float32 numbers and back: the only place that knows how a dtype is laid out.

bfloat16 has no numpy type, so it travels as uint16: reading is a shift, writing rounds to nearest even.
"""

from __future__ import annotations

import numpy as np

from fusion.errors import RecipeError, nearest

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_STORED = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def code(name: str) -> str:
    """The safetensors code of a dtype name ("bfloat16" → "BF16"); RecipeError for an unknown one."""
    if name not in NAMES:
        raise RecipeError(f"unknown dtype {name!r}", where="dtype", todo=nearest(str(name), NAMES))
    return NAMES[name]


def name(code: str) -> str:
    """The dtype name of a safetensors code ("BF16" → "bfloat16"); the code itself where there is no such name."""
    return next((known for known, its in NAMES.items() if its == code), code)


def stored_type(code: str) -> np.dtype:
    """The numpy type whose bytes a file holds for a float dtype; bfloat16 as uint16."""
    return _STORED[code]


def decode(raw: memoryview | bytes, code: str, out: np.ndarray) -> np.ndarray:
    """Write stored numbers into `out` (float32, [n]) and return it; F64 is rounded to float32."""
    stored = np.frombuffer(raw, dtype=_STORED[code])
    if code == "BF16":
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is found as not finite
            np.copyto(out, stored, casting="same_kind")
    return out


def encode(values: np.ndarray, code: str) -> np.ndarray:
    """Round float32 numbers once to the stored dtype; returns an array whose bytes are what a file holds.

    Every NaN becomes the same one: which of its bits survive arithmetic depends on the processor.
    """
    if code != "BF16":
        with np.errstate(over="ignore"):  # an overflow to inf is found by the caller, who can name the tensor
            stored = values.astype(_STORED[code])
        odd = np.isnan(stored)
        if odd.any():
            stored[odd] = np.nan
        return stored
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # wraps only for a NaN, which is replaced
    rounded >>= 16
    stored = rounded.astype("<u2")
    odd = np.isnan(values)
    if odd.any():
        stored[odd] = 0x7FC0
    return stored


def overflowed(stored: np.ndarray, code: str) -> bool:
    """Whether numbers that `encode` made are not all finite."""
    if code == "BF16":
        return bool(((stored & 0x7F80) == 0x7F80).any())
    return not bool(np.isfinite(stored).all())
