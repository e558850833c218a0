"""fusion.dtypes: stored bytes to float32 and back, compared with torch bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion import dtypes
from fusion.errors import RecipeError

FLOATS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50)
TIES = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, 0.0, -0.0, 65504, 65519, 65520, 6e-8]


def torch_bits(values: np.ndarray, dtype: torch.dtype, bits: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(bits).numpy()


@given(FLOATS)
def test_bfloat16_is_rounded_to_nearest_even(values):
    values = np.array(values, np.float32)
    assert np.array_equal(dtypes.encode(values, "BF16").view(np.int16), torch_bits(values, torch.bfloat16, torch.int16))


@pytest.mark.parametrize(("code", "dtype", "bits"), [("BF16", torch.bfloat16, torch.int16), ("F16", torch.float16, torch.int16),
                                                     ("F32", torch.float32, torch.int32), ("F64", torch.float64, torch.int64)])
def test_ties_and_limits_are_cast_as_torch_casts_them(code, dtype, bits):
    values = np.array(TIES, np.float32)
    assert dtypes.encode(values, code).tobytes() == torch_bits(values, dtype, bits).tobytes()


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_every_stored_number_survives_reading_and_writing(code):
    stored = np.arange(65536, dtype=np.uint16)
    values = dtypes.decode(stored.tobytes(), code, np.empty(65536, np.float32))
    finite = ~np.isnan(values)
    assert np.array_equal(dtypes.encode(values, code).view(np.uint16)[finite], stored[finite])
    assert np.isnan(dtypes.decode(dtypes.encode(values, code).tobytes(), code, np.empty(65536, np.float32))[~finite]).all()


def test_reading_agrees_with_torch():
    stored = np.arange(65536, dtype=np.uint16)
    values = dtypes.decode(stored.tobytes(), "BF16", np.empty(65536, np.float32))
    expected = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("code", "value"), [("BF16", 3.4e38), ("F16", 65520.0), ("F32", np.inf), ("BF16", np.nan)])
def test_what_the_dtype_cannot_hold_is_noticed(code, value):
    assert dtypes.overflowed(dtypes.encode(np.array([1, value], np.float32), code), code)
    assert not dtypes.overflowed(dtypes.encode(np.array([1, 65504], np.float32), code), code)


def test_a_float64_beyond_float32_reads_as_infinite_without_a_warning(recwarn):
    assert np.isinf(dtypes.decode(np.array([1e300]).tobytes(), "F64", np.empty(1, np.float32)))
    assert not recwarn


def test_names_and_codes_are_each_others_inverse():
    assert all(dtypes.name(dtypes.code(name)) == name for name in dtypes.NAMES)
    assert dtypes.name("I64") == "I64"


def test_an_unknown_dtype_names_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown dtype 'bfloat'.*Did you mean 'bfloat16'"):
        dtypes.code("bfloat")
