"""fusion.header: a safetensors header is believed only as far as the file bears it out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.errors import CheckpointError, FusionError
from fusion.header import read_header
from tests.conftest import save_raw

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}}


def header_of(folder: Path):
    return read_header(folder / "model.safetensors")


def changed(name: str = "a", **entry) -> dict:
    return {**GOOD, name: {**GOOD[name], **entry}}


def test_tensors_come_in_file_order_with_their_bytes(tmp_path):
    first, second = header_of(save_raw(tmp_path, {"__metadata__": {"format": "pt"}, **dict(reversed(GOOD.items()))}, bytes(10)))
    assert (first.name, first.shape, first.nbytes, first.numel) == ("a", (2,), 8, 2)
    assert (second.name, second.shape, second.nbytes, second.numel) == ("b", (), 2, 1)
    assert second.start == first.start + 8 == (tmp_path / "model.safetensors").stat().st_size - 2


def test_empty_tensors_take_no_bytes(tmp_path):
    empty = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}
    assert [tensor.numel for tensor in header_of(save_raw(tmp_path, {"z": empty, **GOOD}, bytes(10)))] == [0, 2, 1]


@pytest.mark.parametrize(("header", "data", "words"), [
    (changed(data_offsets=[0, 4]), 10, r"shape \[2\] of F32 needs 8 bytes, the offsets give \[0, 4\]"),
    (changed(data_offsets=[8, 0]), 10, "needs 8 bytes"),
    (changed(data_offsets=[0, 8, 8]), 10, "needs 8 bytes"),
    (changed(data_offsets=[2, 10]), 10, "overlap or leave a gap"),
    (changed("b", data_offsets=[12, 14]), 14, "overlap or leave a gap"),
    (changed(data_offsets=[-8, 0]), 10, "does not say shape and offsets"),
    (changed(data_offsets=None), 10, "does not say shape and offsets"),
    (changed(shape=[True]), 10, "does not say shape and offsets"),
    (changed(shape=[2.0]), 10, "does not say shape and offsets"),
    (changed(shape=[2**63]), 10, "does not say shape and offsets"),
    (changed(shape=[2**62] * 1000), 10, "does not say shape and offsets"),
    (changed(shape=[2**62] * 4), 10, "needs"),
    (changed(dtype="F4"), 10, "unknown dtype 'F4'"),
    (changed(dtype=["F32"]), 10, "unknown dtype"),
    (changed(dtype=None), 10, "unknown dtype"),
    ({"a": 5}, 0, "does not say shape and offsets"),
    (GOOD, 9, r"cut short \(\d+ bytes, \d+ expected\)"),
    (GOOD, 11, "longer than its header says"),
    (b'{"a": 1, "a": 2}', 0, "a name occurs twice"),
    (b'{"\\ud800": {}}', 0, "not valid"),
    (b"[]", 0, "not a table of tensors"),
    (b"{", 0, "not valid"),
    (b"\xff\xfe", 0, "not valid"),
    (b"[" * 100_000, 0, "not valid"),
    (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', 8, "not"),
], ids=str)
def test_a_lying_header_is_refused(tmp_path, header, data, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        header_of(save_raw(tmp_path, header, bytes(data)))
    assert caught.value.where.startswith("model.safetensors") and caught.value.todo


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 1000])
def test_a_header_longer_than_the_file_is_not_read(tmp_path, length):
    with pytest.raises(CheckpointError, match="cut short or is no safetensors file"):
        header_of(save_raw(tmp_path, GOOD, bytes(10), length=length))


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x00" * 7, b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")


KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"])
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
ENTRIES = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3"]) | JSONS,
                                 "shape": st.lists(st.integers(-1, 3), max_size=3) | JSONS,
                                 "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSONS})


@settings(max_examples=200)
@given(header=JSONS | st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), data=st.binary(max_size=40))
def test_any_json_ends_in_tensors_or_in_an_error_for_people(tmp_path_factory, header, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    try:
        tensors = header_of(save_raw(folder, json.dumps(header).encode(), data))
    except FusionError:
        return
    assert sum(tensor.nbytes for tensor in tensors) == len(data)


@settings(max_examples=200)
@given(content=st.binary(max_size=80), claim=st.none() | st.integers(0, 90))
def test_any_bytes_end_in_tensors_or_in_an_error_for_people(tmp_path_factory, content, claim):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content if claim is None else claim.to_bytes(8, "little") + content)
    with contextlib.suppress(FusionError):
        assert all(tensor.start + tensor.nbytes <= len(path.read_bytes()) for tensor in read_header(path))
