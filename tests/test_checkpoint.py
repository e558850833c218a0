"""fusion.checkpoint: a folder as a lazy mapping, and every folder that cannot be one."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError
from tests.conftest import save_checkpoint, save_raw, tiny_tokenizer

INDEX = "model.safetensors.index.json"
TENSORS = {"model.embed_tokens.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
           "model.layers.0.mlp.up_proj.weight": np.ones((2, 2), np.float32),
           "model.layers.1.mlp.up_proj.weight": np.full((2, 2), 0.5, np.float32)}


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    return str(caught.value)


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("shards", [1, 2])
def test_names_shapes_and_facts_come_without_reading_a_weight(tmp_path, monkeypatch, shards):
    folder = save_checkpoint(tmp_path / "m", TENSORS, "bfloat16", shards=shards)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    model = Checkpoint(folder)
    assert set(model) == set(TENSORS) and len(model) == 3
    assert {name: model.info[name].shape for name in model} == {name: value.shape for name, value in TENSORS.items()}
    assert (model.name, model.parameters, model.nbytes, model.dtype, model.layers) == ("m", 14, 28, "BF16", 2)
    assert model.vocabulary is None and model.chat_template is None


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_tensor_reads_as_float32_whole_or_in_part(tmp_path, dtype):
    model = Checkpoint(save_checkpoint(tmp_path / "m", TENSORS, dtype, shards=2))
    for name, value in TENSORS.items():
        assert model[name].dtype == np.float32 and np.array_equal(model[name], value)
    part = model.read("model.embed_tokens.weight", 2, 5, np.empty(9, np.float32))
    assert part.tolist() == [2, 3, 4]
    assert all(model.plain(name) for name in model)


def test_scalar_and_empty_tensors_keep_their_shape(tmp_path):
    model = Checkpoint(save_checkpoint(tmp_path / "m", {**TENSORS, "scale": np.float32(3), "none": np.zeros((0, 4), np.float32)}))
    assert model["scale"].shape == () and model["scale"] == 3 and model["none"].shape == (0, 4)


def test_elements_beyond_two_billion_are_found(tmp_path):
    count = 2**31 + 8
    folder = save_raw(tmp_path / "m", {"a": {"dtype": "BF16", "shape": [8, count // 8], "data_offsets": [0, 2 * count]}})
    with open(folder / "model.safetensors", "r+b") as file:  # a sparse file: only its last bytes take room
        end = file.seek(0, os.SEEK_END) + 2 * count
        file.truncate(end)
        file.seek(end - 4)
        file.write(b"\x80\x3f\x00\x40")
    model = Checkpoint(folder)
    assert (model.parameters, model.nbytes) == (count, 2 * count)
    assert model.read("a", count - 3, count, np.empty(3, np.float32)).tolist() == [0, 1, 2]


def test_two_threads_read_the_same_file_at_once(tmp_path):
    value = np.arange(200_000, dtype=np.float32)
    model = Checkpoint(save_checkpoint(tmp_path / "m", {"a": value, "b": -value}))
    wrong = []

    def read(name: str, sign: int) -> None:
        for start in range(0, 200_000, 1000):
            got = model.read(name, start, start + 1000, np.empty(1000, np.float32))
            if not np.array_equal(got, sign * value[start:start + 1000]):
                wrong.append((name, start))

    threads = [threading.Thread(target=read, args=pair) for pair in (("a", 1), ("b", -1)) * 2]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_reading_opens_a_file_once_and_close_closes_it(tmp_path):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    model = Checkpoint(save_checkpoint(tmp_path / "m", TENSORS, shards=2))
    before = open_files()
    for _ in range(3):
        [model[name] for name in model]
    assert open_files() == before + 2
    model.close()
    assert open_files() == before


@pytest.mark.parametrize("piece", [3, 10**9])
def test_bytes_can_be_read_into_memory_that_is_there_already(tmp_path, monkeypatch, piece):
    """However few bytes one call of the system gives."""
    model, name = Checkpoint(save_checkpoint(tmp_path / "m", TENSORS, shards=2)), "model.embed_tokens.weight"
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: preadv(file, [parts[0][:piece]], at))
    buffer = np.full(40, 255, np.uint8)
    part = model.raw_into(name, 2, 5, buffer)
    assert part.tobytes() == model.raw(name, 2, 5) and np.shares_memory(part, buffer)
    assert (buffer[12:] == 255).all()
    os.truncate(model.info[name].file, model.info[name].start + 19)
    with pytest.raises(CheckpointError, match="became shorter"):
        model.raw_into(name, 2, 5, buffer)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    model = Checkpoint(save_checkpoint(tmp_path / "m", TENSORS))
    file = model.folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="became shorter"):
        [model[name] for name in model]


def test_the_fingerprint_tells_models_apart_and_the_stamp_tells_files_apart(tmp_path):
    first = save_checkpoint(tmp_path / "a", TENSORS)
    same = save_checkpoint(tmp_path / "b", TENSORS)
    other = save_checkpoint(tmp_path / "c", {name: value + 1 for name, value in TENSORS.items()})
    marks = [Checkpoint(folder).fingerprint for folder in (first, same, other)]
    assert marks[0] == marks[1] != marks[2]
    assert Checkpoint(first).stamp == Checkpoint(first).stamp != Checkpoint(same).stamp


# ── tokenizer, template, tied head ───────────────────────────────────────────────────────────────────────────────────

def test_vocabulary_and_template_are_the_tokenizers(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS)
    tiny_tokenizer().save_pretrained(folder)
    model = Checkpoint(folder)
    assert model.vocabulary == tiny_tokenizer().get_vocab()
    assert model.chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize(("tokenizer", "vocabulary"), [
    ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 7, "content": "<s>"}]}, {"a": 0, "b": 1, "<s>": 7}),
    ({"model": {"vocab": {"a": 0}}, "added_tokens": None}, {"a": 0}),
    ({"model": {"vocab": {"a": 0}}, "added_tokens": [5, {"content": ["x"], "id": 1}]}, {"a": 0, "['x']": 1}),
    ({"model": {"vocab": 5}}, None), ({"model": None}, None), ({}, None),
])
def test_any_tokenizer_file_gives_a_vocabulary_or_none(tmp_path, tokenizer, vocabulary):
    folder = save_checkpoint(tmp_path / "m", TENSORS)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Checkpoint(folder).vocabulary == vocabulary


TABLE = TENSORS["model.embed_tokens.weight"]
COPY, OWN = {"lm_head.weight": TABLE}, {"lm_head.weight": TABLE + np.eye(3, 2, -2, dtype=np.float32)}


@pytest.mark.parametrize(("config", "head", "tied"), [
    ({"tie_word_embeddings": True}, {}, True),
    ({"tie_word_embeddings": True}, COPY, True),
    ({"tie_word_embeddings": True}, OWN, False),  # the config errs: the stored head is another matrix
    ({"tie_word_embeddings": True}, {"lm_head.weight": TABLE[:2]}, False),
    ({"tie_word_embeddings": False}, COPY, False),
    ({"tie_word_embeddings": None}, {}, True),
    ({"tie_word_embeddings": None}, COPY, True),
    ({"tie_word_embeddings": None}, OWN, False),
    ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, COPY, True),
    ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": False}}, COPY, False),
])
def test_a_tied_head_is_a_copy_of_the_embedding(tmp_path, config, head, tied):
    model = Checkpoint(save_checkpoint(tmp_path / "m", {**TENSORS, **head}, config=config))
    assert (model.tied, set(model.tied_copies)) == (tied, set(head) if tied else set())


def test_comparing_a_large_head_with_the_embedding_reads_a_sample(tmp_path, monkeypatch):
    table = np.random.default_rng(0).standard_normal((4000, 128), np.float32)
    model = Checkpoint(save_checkpoint(tmp_path / "m", {"embed_tokens.weight": table, "lm_head.weight": table},
                                       config={"tie_word_embeddings": True}))
    seen, read = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: seen.append(size) or read(file, size, at))
    assert model.tied and sum(seen) <= 65 * 2 * 4096


# ── folders that cannot be a checkpoint ──────────────────────────────────────────────────────────────────────────────

def test_a_folder_that_is_not_there_or_no_model_is_refused(tmp_path):
    assert "there is no such folder" in refused(tmp_path / "gone")
    assert "there is no such folder" in refused(Path("a" * 5000))
    assert "there is no such folder" in refused(Path("a\0b"))
    assert "there is no config.json" in refused(tmp_path)
    save_raw(tmp_path, {})
    assert "there is no tensor in it" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "there are no safetensors weights" in refused(tmp_path)


@pytest.mark.parametrize(("text", "words"), [
    ("{", "not valid JSON"), ("[]", "not a JSON object"), ("[" * 100_000, "not valid JSON"), ("\udcff", "not valid JSON")])
def test_a_broken_config_is_refused(tmp_path, text, words):
    folder = save_checkpoint(tmp_path / "m", TENSORS)
    (folder / "config.json").write_text(text, errors="surrogateescape")
    assert words in refused(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "the index names model-00002-of-00002.safetensors, which is missing" in refused(folder)


def test_a_truncated_shard_is_named(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert refused(folder).startswith("model-00002-of-00002.safetensors: the file is cut short")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".hidden", "x.safetensors/"])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, file):
    folder = save_checkpoint(tmp_path / "m", TENSORS, shards=2)
    rewrite(folder / INDEX, weight_map={"a": file})
    assert "not a plain file name" in refused(folder)


@pytest.mark.parametrize(("weight_map", "words"), [
    ({"a": "model-00001-of-00002.safetensors"}, "the index places a in model-00001-of-00002.safetensors, but it is not there"),
    ({"a": "b" * 5000}, "which is missing"), ({"a": "b\0"}, "which is missing"), ({"a": ""}, "which is missing"),
    ({"a": 5}, "no valid weight_map"), ([], "no valid weight_map"), (None, "no valid weight_map")], ids=str)
def test_an_index_of_other_shards_is_refused(tmp_path, weight_map, words):
    folder = save_checkpoint(tmp_path / "m", TENSORS, shards=2)
    rewrite(folder / INDEX, weight_map=weight_map)
    assert words in refused(folder)


def test_shards_without_index_are_not_guessed_together(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS, shards=2)
    (folder / INDEX).unlink()
    assert "2 safetensors files without" in refused(folder)


def test_a_name_in_two_shards_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS, shards=2)
    twin = (folder / "model-00001-of-00002.safetensors").read_bytes()
    (folder / "model-00002-of-00002.safetensors").write_bytes(twin)
    assert "is stored in two shards" in refused(folder)


def test_pickles_are_never_loaded(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pickle weights (pytorch_model.bin)" in refused(folder) and "open_checkpoint" in refused(folder)


@pytest.mark.parametrize(("config", "name", "dtype", "words"), [
    ({"quantization_config": {"quant_method": "gptq"}}, "a", "float32", "quantised (gptq)"),
    ({"quantization_config": "awq"}, "a", "float32", "quantised (awq)"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "a", "float32", "quantised (fp8)"),
    ({"quantization_config": {"bits": 4}}, "a", "float32", "quantised (its config says so)"),
    ({}, "model.layers.0.mlp.up_proj.qweight", "int32", "quantised (model.layers.0.mlp.up_proj.qweight is I32)"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "model.layers.0.mlp.up_proj.weight", "int8",
     "quantised (bitsandbytes, model.layers.0.mlp.up_proj.weight is I8)"),
    ({}, "model.layers.0.mlp.experts.gate_up_proj_blocks", "uint8", "gate_up_proj_blocks is U8"),  # MXFP4
    ({}, "a", "int64", "most weights are stored as I64"),
])
def test_quantised_and_whole_number_weights_are_refused(tmp_path, config, name, dtype, words):
    save_checkpoint(tmp_path / "m", {name: np.ones(20, np.float32 if "float" in dtype else dtype)},
                    dtype if "float" in dtype else "float32", config)
    assert words in refused(tmp_path / "m")
