"""fusion.digest: what it must notice, what it must not depend on, and one value worked out step by step."""

from __future__ import annotations

import hashlib
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.checkpoint import Checkpoint
from fusion.digest import CHUNK_BYTES, KEYS, TensorDigest, checkpoint_digest, digest_checkpoint, digest_tensor
from fusion.progress import finish
from tests.conftest import save_checkpoint

RANDOM = np.random.default_rng(3)
DATA = RANDOM.bytes(3 * CHUNK_BYTES + 1000)


def digest_of(data: bytes, cuts: list[int] = (), dtype: str = "U8", shuffle: int | None = None) -> str:
    """The digest of these bytes given in pieces."""
    digest = TensorDigest(dtype, (len(data),))
    edges = [0, *sorted(cuts), len(data)]
    pieces = list(itertools.pairwise(edges))
    if shuffle is not None:
        random.Random(shuffle).shuffle(pieces)
    for start, stop in pieces:
        digest.update(start, data[start:stop])
    return digest.value()


def test_the_value_is_the_one_the_definition_gives():
    data = RANDOM.bytes(CHUNK_BYTES + 7)
    words = np.frombuffer(data + b"\0" * (2 * CHUNK_BYTES - len(data)), "<u4").reshape(2, -1).astype(object)
    keys = np.frombuffer(hashlib.shake_256(b"fusechat content digest 1").digest(2 * CHUNK_BYTES), "<u4").astype(object) | 1
    sums = b"".join(int((words[chunk] * keys.reshape(2, -1)[s]).sum() % 2**64).to_bytes(8, "little")
                    for chunk in (0, 1) for s in (0, 1))
    expected = hashlib.sha256(f"U8|({len(data)},)|".encode() + sums).hexdigest()
    assert digest_of(data) == expected


def test_the_keys_never_change():
    """Digests that people recorded must stay comparable."""
    assert hashlib.sha256(KEYS.astype("<u8").tobytes()).hexdigest()[:16] == "300bc20403d57ba7"
    assert digest_of(b"abcdefgh")[:16] == "bb30ace3eb3901e0"


@given(cuts=st.lists(st.integers(0, len(DATA)), max_size=12), shuffle=st.integers(0, 99))
def test_pieces_and_their_order_do_not_matter(cuts, shuffle):
    assert digest_of(DATA, cuts, shuffle=shuffle) == digest_of(DATA)


@given(place=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
def test_one_bit_is_noticed(place, bit):
    changed = bytearray(DATA)
    changed[place] ^= 1 << bit
    assert digest_of(bytes(changed)) != digest_of(DATA)


@pytest.mark.parametrize("unit", [1, 2, 4, 8, CHUNK_BYTES])
def test_exchanged_parts_are_noticed(unit):
    changed = DATA[unit:2 * unit] + DATA[:unit] + DATA[2 * unit:]
    assert changed != DATA
    assert digest_of(changed) != digest_of(DATA)


def test_dtype_and_shape_and_zeros_count():
    values = {TensorDigest("BF16", shape).value() for shape in ((0,), (0, 1), (1, 0))}
    for dtype, shape in (("BF16", (4,)), ("F16", (4,)), ("BF16", (2, 2)), ("BF16", (1, 4)), ("BF16", (5,))):
        digest = TensorDigest(dtype, shape)
        digest.update(0, bytes(digest.nbytes))
        values.add(digest.value())
    assert len(values) == 8


def test_a_digest_that_did_not_see_every_byte_has_no_value():
    digest = TensorDigest("U8", (10,))
    digest.update(0, b"abc")
    with pytest.raises(RuntimeError, match="3 of 10"):
        digest.value()


def test_arrays_of_any_alignment_can_be_given():
    data = np.frombuffer(DATA, np.uint8)
    moved = np.empty(len(data) + 3, np.uint8)[3:]
    moved[:] = data
    digest = TensorDigest("U8", (len(data),))
    digest.update(0, moved[:101])
    digest.update(101, memoryview(moved[101:]))
    assert digest.value() == digest_of(DATA)


def test_names_count_and_their_order_does_not():
    assert checkpoint_digest({"a": "1", "b": "2"}) == checkpoint_digest({"b": "2", "a": "1"})
    assert checkpoint_digest({"a": "1", "b": "2"}) != checkpoint_digest({"a": "2", "b": "1"})
    assert checkpoint_digest({"a": "1"}) == "fc1:" + hashlib.sha256(json.dumps([["a", "1"]]).encode()).hexdigest()


def test_shards_do_not_matter_and_one_number_does(tmp_path):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": RANDOM.normal(size=(17, 9)).astype(np.float32) for i in range(5)}
    tensors["position_ids"] = np.arange(4)
    one = save_checkpoint(tmp_path / "one", tensors, dtype="bfloat16")
    three = save_checkpoint(tmp_path / "three", tensors, dtype="bfloat16", shards=3)
    tensors["model.layers.3.mlp.up_proj.weight"][3, 3] += 1
    other = save_checkpoint(tmp_path / "other", tensors, dtype="bfloat16")
    values = [finish(digest_checkpoint(Checkpoint(folder))) for folder in (one, three, other)]
    assert values[0] == values[1] != values[2]


def test_known_tensors_are_not_read_again(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path / "one", {"a.weight": np.ones((3, 3)), "b.weight": np.ones(3)})
    checkpoint = Checkpoint(folder)
    whole = finish(digest_checkpoint(checkpoint))
    known = {"a.weight": digest_tensor(checkpoint, "a.weight"), "gone": "0"}
    read, raw = [], Checkpoint.raw_into
    monkeypatch.setattr(Checkpoint, "raw_into", lambda self, name, *where: read.append(name) or raw(self, name, *where))
    assert finish(digest_checkpoint(checkpoint, known)) == whole
    assert set(read) == {"b.weight"}


def test_numbers_that_are_computed_on_reading_count_as_float32(tmp_path, monkeypatch):
    values = RANDOM.normal(size=(5, 4)).astype(np.float16)
    stored = Checkpoint(save_checkpoint(tmp_path / "stored", {"a.weight": values.astype(np.float32)}))
    computed = Checkpoint(save_checkpoint(tmp_path / "computed", {"a.weight": values}, dtype="float16"))
    assert digest_tensor(stored, "a.weight") != digest_tensor(computed, "a.weight")
    monkeypatch.setattr(computed, "plain", lambda name: False)
    assert digest_tensor(stored, "a.weight") == digest_tensor(computed, "a.weight")
