"""fusion.preflight: whether models can be merged, in words, from headers and configs alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import namedtuple

import numpy as np
import pytest

from fusion.checkpoint import Checkpoint
from fusion.errors import MismatchError, OutputError, RecipeError, ResourceError
from fusion.preflight import available_memory_bytes, mergeable_names, peak_memory_bytes, preflight
from tests.conftest import save_checkpoint, save_family, save_raw, tiny_tokenizer

EMBED, UP, NORM, HEAD = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
TENSORS = {EMBED: np.ones((3, 2), np.float32), UP: np.ones((4, 2), np.float32), NORM: np.ones(2, np.float32),
           HEAD: np.ones((3, 2), np.float32)}


@pytest.fixture
def pair(tmp_path):
    """`pair(tensors, dtype, config)`: the pivot and a target that differs from it as said, opened."""
    def make(tensors=TENSORS, dtype="float32", config=None, pivot=TENSORS, pivot_config=None):
        return (Checkpoint(save_checkpoint(tmp_path / "pivot", pivot, config=pivot_config)),
                Checkpoint(save_checkpoint(tmp_path / "target", tensors, dtype, config)))
    return make


def bad(pivot: Checkpoint, target: Checkpoint):
    report = preflight(pivot, [target])
    assert report.level == "bad"
    return next(finding for finding in report.findings if finding.level == "bad")


def without(name: str) -> dict:
    return {key: value for key, value in TENSORS.items() if key != name}


def test_it_reads_no_weight(tmp_path, monkeypatch):
    folders = save_family(tmp_path, "llama")
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    pivot, *targets = map(Checkpoint, folders)
    report = preflight(pivot, targets, out=tmp_path / "out", dtype="float32").raise_if_bad()
    assert report.level == "good" and [facts.role for facts in report.models] == ["pivot", "target", "target"]


def test_the_cost_counts_what_is_read_and_written(pair):
    pivot, target = pair()
    numel = sum(value.size for value in TENSORS.values())
    assert (preflight(pivot, [target]).bytes_read, preflight(pivot, [target]).bytes_written) == (2 * 4 * numel, 4 * numel)
    assert preflight(pivot, [target], dtype="bfloat16").bytes_written == 2 * numel


def test_equal_shapes_are_good(pair):
    report = preflight(*[part if i == 0 else [part] for i, part in enumerate(pair())])
    assert [finding.topic for finding in report.findings if finding.level == "bad"] == []
    assert report.to_dict()["mergeable"] is True


def test_another_shape_names_the_first_tensor_and_asks_for_fusion(pair):
    found = bad(*pair({**TENSORS, UP: np.ones((4, 3), np.float32), NORM: np.ones(3, np.float32)}))
    assert found.tensor == UP and "needs pairwise fusion first" in found.text
    assert "[4, 3]" in found.text and "[4, 2]" in found.text


def test_another_architecture_names_the_first_tensor_and_asks_for_fusion(pair):
    found = bad(*pair({"transformer.wte.weight": np.ones((3, 2), np.float32)}, config={"architectures": ["GPT2LMHeadModel"]}))
    assert found.tensor == HEAD and HEAD in found.text and "needs pairwise fusion first" in found.text
    assert "GPT2LMHeadModel" in found.text and "LlamaForCausalLM" in found.text


def test_another_vocabulary_names_the_tokens_and_the_setting(pair):
    pivot, target = pair()
    for model in (pivot, target):
        tiny_tokenizer().save_pretrained(model.folder)
    file = target.folder / "tokenizer.json"
    other = json.loads(file.read_text())
    other["model"]["vocab"]["zebra"] = other["model"]["vocab"].pop("!")
    file.write_text(json.dumps(other))
    found = bad(Checkpoint(pivot.folder), Checkpoint(target.folder))
    assert "1 new ('zebra')" in found.text and "--vocabulary" in found.text and "fusion" not in found.text


def test_the_error_says_which_model_which_tensor_and_what_to_do(pair):
    pivot, target = pair({**TENSORS, UP: np.ones((4, 3), np.float32)})
    with pytest.raises(MismatchError, match=rf"^target: {UP} has shape .* needs pairwise fusion first"):
        preflight(pivot, [target]).raise_if_bad()


@pytest.mark.parametrize(("tensors", "tensor", "words"), [
    (without(NORM), NORM, f"It lacks {NORM}. It needs pairwise fusion"),
    ({**TENSORS, "z.bias": np.ones(4, np.float32)}, "z.bias", "It has z.bias, which the pivot has not"),
    ({**TENSORS, NORM: np.ones(2, np.int64)}, NORM, f"{NORM} is stored as I64, in the pivot as float32"),
])
def test_names_and_kinds_of_numbers_must_agree(pair, tensors, tensor, words):
    found = bad(*pair(tensors))
    assert found.tensor == tensor and words in found.text


@pytest.mark.parametrize(("pivot", "pivot_tied", "target", "target_tied", "said"), [
    (without(HEAD), True, without(HEAD), True, ""),
    (without(HEAD), True, TENSORS, True, ""),
    (TENSORS, True, without(HEAD), True, ""),
    (TENSORS, False, TENSORS, False, ""),
    (without(HEAD), True, TENSORS, False, "It has a head of its own, the pivot ties its head to the embedding"),
    (TENSORS, True, TENSORS, False, "the result gets a head of its own (6 numbers more)"),
    (TENSORS, False, without(HEAD), True, "It ties its head to the embedding; the embedding is taken as its head"),
    (TENSORS, False, TENSORS, True, "It ties its head to the embedding"),
])
def test_heads_that_are_tied_in_one_of_both_are_told(pair, pivot, pivot_tied, target, target_tied, said):
    pivot, target = pair(target, config={"tie_word_embeddings": target_tied}, pivot=pivot,
                         pivot_config={"tie_word_embeddings": pivot_tied})
    assert (HEAD in mergeable_names(pivot)) == (not pivot_tied)
    report = preflight(pivot, [target])
    assert report.level != "bad" and report.tensors == 3 + (not pivot_tied or bool(said))
    assert [found.text for found in report.findings if found.topic == "head"] == ([] if not said else [
        next(found.text for found in report.findings if said in found.text)])


def test_equal_shapes_of_other_meaning_are_refused(pair):
    found = bad(*pair(config={"num_attention_heads": 8}, pivot_config={"num_attention_heads": 4}))
    assert "num_attention_heads is 8 here and 4 in the pivot" in found.text.lower()


def test_what_only_deserves_a_warning_is_still_mergeable(pair):
    report = preflight(*[part if i == 0 else [part] for i, part in enumerate(
        pair(dtype="bfloat16", config={"rope_theta": 2}, pivot_config={"rope_theta": 1}))])
    assert report.level == "warning"
    assert {finding.topic for finding in report.findings} == {"vocabulary", "config", "dtype"}


def test_no_target_and_a_target_given_twice_are_refused(pair, tmp_path):
    pivot, target = pair()
    (tmp_path / "link").symlink_to(target.folder)
    with pytest.raises(RecipeError, match="no target"):
        preflight(pivot, []).raise_if_bad()
    for again in (pivot.folder, target.folder, tmp_path / "link", target.folder / ".." / "target"):
        with pytest.raises(RecipeError, match="same folder is given twice"):
            preflight(pivot, [target, Checkpoint(again, "again")]).raise_if_bad()
    other = Checkpoint(save_checkpoint(tmp_path / "else" / "target", TENSORS))
    with pytest.raises(RecipeError, match="Two models are called target"):
        preflight(pivot, [target, other]).raise_if_bad()


def test_an_output_that_exists_is_refused(pair, tmp_path):
    pivot, target = pair()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path, pivot.folder / "config.json", tmp_path / "dangling"):
        with pytest.raises(OutputError, match="exists already"):
            preflight(pivot, [target], out=out).raise_if_bad()


def test_too_small_a_disk_is_refused_with_both_sizes(pair, tmp_path, monkeypatch):
    pivot, target = pair()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(100, 90, 10))
    with pytest.raises(ResourceError, match=r"needs 88 bytes, the disk of .* has 10 bytes free"):
        preflight(pivot, [target], out=tmp_path / "new" / "out").raise_if_bad()


@pytest.mark.parametrize("out", ["a" * 5000, "a\0b", "new/deep/out"])
def test_an_odd_output_path_does_not_break_it(pair, out):
    pivot, target = pair()
    assert preflight(pivot, [target], out=out).free_disk_bytes > 0


def test_the_report_is_plain_json(pair):
    pivot, target = pair()
    assert json.loads(json.dumps(preflight(pivot, [target]).to_dict(), allow_nan=False))["models"][0]["name"] == "pivot"


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_too_little_memory_is_refused_with_both_sizes(pair, monkeypatch):
    pivot, target = pair()
    monkeypatch.setattr(sys.modules["fusion.preflight"], "available_memory_bytes", lambda: 50_000_000)
    with pytest.raises(ResourceError, match=r"needs \d+ MB of memory, 50 MB are free"):
        preflight(pivot, [target]).raise_if_bad()


def test_a_result_that_is_kept_in_memory_counts(pair, monkeypatch):
    pivot, target = pair()
    merging = preflight(pivot, [target]).peak_memory_bytes
    assert preflight(pivot, [target], in_memory=True).peak_memory_bytes == merging + 88
    assert preflight(pivot, [target], in_memory=True, dtype="bfloat16").peak_memory_bytes == merging + 44
    monkeypatch.setattr(sys.modules["fusion.preflight"], "available_memory_bytes", lambda: merging + 87)
    assert preflight(pivot, [target]).level != "bad" and preflight(pivot, [target], in_memory=True).level == "bad"


def test_memory_grows_with_blocks_and_targets_not_with_the_model(tmp_path):
    def needed(rows: int, columns: int, targets: int) -> int:
        header = {"w": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}}
        folder = save_raw(tmp_path / f"{rows}-{columns}", header, bytes(2 * rows * columns))
        return peak_memory_bytes(Checkpoint(folder), targets)
    assert needed(8192, 64, 2) - needed(4096, 64, 2) < 100_000 and needed(8192, 64, 2) < needed(8192, 64, 3)
    assert needed(2, 200_000, 2) > needed(8192, 64, 2)


def test_the_machine_says_how_much_memory_is_free():
    assert 1e8 < available_memory_bytes() < 1e15


# ── the pivot among the targets ──────────────────────────────────────────────────────────────────────────────────────

def test_the_pivot_may_be_a_target_of_methods_that_do_not_measure(pair):
    pivot, target = pair()
    again = Checkpoint(pivot.folder, "again")
    report = preflight(pivot, [target, again], method="linear")
    assert report.level == "warning" and "counts as one of the models" in report.of("again")[0].text
    assert preflight(pivot, [target, again], method="varm").level == "bad"
