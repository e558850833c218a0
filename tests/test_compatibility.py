"""fusion.compatibility and fusion.untied: what decides whether models can be merged, and the one way out of each difference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.compatibility import fits
from fusion.inspection import inspect, preview
from fusion.merge import merge
from fusion.plan import MergePlan
from fusion.preflight import preflight
from fusion.progress import finish
from fusion.recipe import Recipe, Slice
from fusion.untied import side_by_side
from fusion.variation import measure
from fusion.verify import verify
from tests.conftest import load_tensors, save_checkpoint, save_family
from tests.test_vocabulary import byte_level

EMBED, UP, HEAD = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
TIED = {"drop": (HEAD,), "tie_word_embeddings": True}


def model(folder: Path, words: tuple[str, ...] = ("ab",), marks: tuple[str, ...] = ("<end>",), number: float = 0, rows: int = 0,
          tokenizer: bool = True, width: int = 2, drop: tuple[str, ...] = (), **config) -> Path:
    """A model with known rows; `drop` leaves tensors out, None in `config` a setting."""
    made = byte_level(*words, marks=marks)
    size = rows or made.get_vocab_size()
    table = np.arange(size, dtype=np.float32)[:, None] + np.full((1, width), number, np.float32)
    tensors = {EMBED: table, UP: np.full((2, 2), number, np.float32), HEAD: -table}
    save_checkpoint(folder, {name: value for name, value in tensors.items() if name not in drop})
    file = folder / "config.json"
    whole = {**json.loads(file.read_text()), "vocab_size": size, **config}
    file.write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))
    if tokenizer:
        made.save(str(folder / "tokenizer.json"))
    return folder


def findings(*folders: Path) -> list:
    pivot, *targets = map(Checkpoint, folders)
    return list(preflight(pivot, targets).findings)


def bad(*folders: Path) -> str:
    return " ".join(one.text for one in findings(*folders) if one.level == "bad")


# ── classes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("pivot", "target", "told"), [
    ({}, {"architectures": None}, False), ({"architectures": None}, {}, False), ({}, {"architectures": []}, False),
    ({"architectures": None}, {"architectures": None}, False), ({}, {"architectures": "LlamaForCausalLM"}, False),
    ({}, {"architectures": ["MyLlamaForCausalLM"]}, True), ({"architectures": ["MyLlama"], "model_type": "my"}, {}, True),
    ({}, {"architectures": None, "model_type": "mistral"}, True), ({}, {"architectures": None, "model_type": None}, True)])
def test_names_and_shapes_decide_whatever_class_a_config_names(tmp_path, pivot, target, told):
    folders = model(tmp_path / "p", **pivot), model(tmp_path / "t", **target)
    found = [one for one in findings(*folders) if one.topic == "architecture"]
    assert not bad(*folders) and [one.level for one in found] == ["warning"] * told
    assert finish(merge(Recipe(str(folders[0]), (str(folders[1]),), method="linear"), tmp_path / "out")).finite


@pytest.mark.parametrize("config", [{"architectures": None}, {"architectures": ["GPT2LMHeadModel"]}])
@pytest.mark.parametrize("change", [{"drop": (UP,)}, {"width": 3}])
def test_a_class_does_not_help_where_names_or_shapes_differ(tmp_path, config, change):
    said = bad(model(tmp_path / "p"), model(tmp_path / "t", **change, **config))
    assert said.count("needs pairwise fusion first") == 1 and "vocabulary" not in said
    assert ("GPT2LMHeadModel" in said) == bool(config["architectures"])


def test_of_a_stranger_only_the_way_out_is_told(tmp_path):
    stranger = model(tmp_path / "t", ("cd",), drop=(UP, HEAD), tie_word_embeddings=True, architectures=["GPT2LMHeadModel"],
                     hidden_act="other", eos_token_id=7)
    (found,) = [one for one in findings(model(tmp_path / "p"), stranger) if one.model == "t"]
    assert found.level == "bad" and found.text.count("fusion") == 1


# ── one way out ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("pivot", "target", "words"), [
    ({}, {"marks": ("<end>", "<turn>")}, ("has 259 rows, in the pivot 258", "1 new ('<turn>')")),
    ({"marks": ("<end>", "<turn>")}, {}, ("has 258 rows, in the pivot 259", "1 missing ('<turn>')")),
    ({}, {"marks": ("<stop>",)}, ("1 missing ('<end>'), 1 new ('<stop>')",)),  # a token of another name
    ({}, {"words": ("ab",), "marks": ("<x>", "<end>"), "rows": 258}, ("1 new ('<x>')",)),
    ({}, {"rows": 320}, ("has 320 rows, in the pivot 258, for the same tokens",)),
    ({"rows": 384}, {"rows": 320}, ("for the same tokens",))])
def test_tables_that_differ_in_their_rows_lead_to_the_vocabulary(tmp_path, pivot, target, words):
    folders = model(tmp_path / "p", **pivot), model(tmp_path / "t", **target)
    said = bad(*folders)
    assert all(word in said for word in words) and "--vocabulary" in said and "fusion" not in said
    assert sum(one.level == "bad" for one in findings(*folders)) == 1
    for mode in ("pivot", "union"):  # and this way is open
        merged = finish(merge(Recipe(str(folders[0]), (str(folders[1]),), method="linear", vocabulary=mode), tmp_path / mode))
        assert finish(verify(merged.folder)).equal


def test_a_preflight_can_be_asked_with_the_vocabulary(tmp_path, capsys):
    folders = [str(model(tmp_path / "p", **TIED)), str(model(tmp_path / "t", marks=("<end>", "<turn>")))]
    assert main(["preflight", *folders]) == 2 and main(["preflight", *folders, "--vocabulary", "union"]) == 0
    assert main(["preflight", *folders, "--vocabulary", "unoin"]) == 2
    assert "Did you mean 'union'" in capsys.readouterr().err


def test_other_rows_without_a_tokenizer_say_what_is_missing_first(tmp_path):
    said = bad(model(tmp_path / "p"), model(tmp_path / "t", rows=320, tokenizer=False))
    assert "t has no tokenizer.json" in said and "save_pretrained" in said and "fusion" not in said


def test_another_vocabulary_altogether_needs_fusion(tmp_path):
    pivot, target = model(tmp_path / "p"), model(tmp_path / "t")
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"] |= {"vocab": {f"w{i}": i for i in range(257)}, "merges": []}
    file.write_text(json.dumps(tokenizer))
    said = bad(pivot, target)
    assert "needs pairwise fusion first" in said and "--vocabulary" not in said


@pytest.mark.parametrize(("pivot", "target", "words"), [
    ("a", None, "It has no chat template, the pivot has one"), (None, "a", "It has a chat template, the pivot has none"),
    ("a", "b", "Its chat template is not the pivot's"), ("a", "a", ""), (None, None, "")])
def test_templates_are_told_apart_from_none(tmp_path, pivot, target, words):
    folders = model(tmp_path / "p"), model(tmp_path / "t")
    for folder, template in zip(folders, (pivot, target), strict=True):
        if template:
            (folder / "chat_template.jinja").write_text(template)
    assert [one.text for one in findings(*folders) if one.topic == "chat template"] == ([f"{words}; the merge has the donor's."]
                                                                                       if words else [])


@pytest.mark.parametrize("side", [0, 1])
def test_tokens_beyond_the_last_row_are_told_and_stop_nothing(tmp_path, side):
    changed = [{}, {}]
    changed[side] = {"marks": ("<end>", "<pad>", "<image>"), "rows": 258}
    folders = [model(tmp_path / name, **its) for name, its in zip("pt", changed, strict=True)]
    found = [one for one in findings(*folders) if "beyond the last row" in one.text]
    assert [(one.level, one.model) for one in found] == [("warning", "pt"[side])] and not bad(*folders)
    assert "2 tokens" in found[0].text and "'<pad>', '<image>'" in found[0].text


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["linear", "varm", "ties"])
@pytest.mark.parametrize(("pivot", "target"), [({}, TIED), (TIED, {}), (TIED, TIED), ({}, {})])
def test_a_tied_head_is_its_embedding_beside_a_head_of_its_own(tmp_path, method, pivot, target):
    folders = model(tmp_path / "p", **pivot), model(tmp_path / "t", number=1, **target), model(tmp_path / "u", number=3, **target)
    merged = finish(merge(Recipe(str(folders[0]), tuple(map(str, folders[1:])), method=method), tmp_path / "out")).folder
    got, both_tied = load_tensors(merged), pivot == target == TIED
    assert set(got) == ({EMBED, UP} if both_tied else {EMBED, UP, HEAD})
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is both_tied
    if method == "linear" and not both_tied:
        heads = [load_tensors(folder).get(HEAD, load_tensors(folder)[EMBED]) for folder in folders[1:]]
        assert torch.equal(got[HEAD], (heads[0] + heads[1]) / 2)
    assert finish(verify(merged)).equal


def test_a_tied_head_goes_along_with_slices_and_vocabularies(tmp_path):
    pivot, target = model(tmp_path / "p", **TIED), model(tmp_path / "t", marks=("<end>", "<turn>"), number=1)
    recipe = Recipe(str(pivot), (str(target),), method="linear", vocabulary="union",
                    slices=(Slice({"t": (0, 1)}), Slice({"t": (0, 1)})))
    got = load_tensors(finish(merge(recipe, tmp_path / "out")).folder)
    assert got[HEAD].shape == (259, 2) and torch.equal(got[HEAD], -got[EMBED]) and "model.layers.1.mlp.up_proj.weight" in got


def test_measuring_and_inspecting_see_the_same_heads(tmp_path):
    pivot, target = Checkpoint(model(tmp_path / "p", **TIED)), Checkpoint(model(tmp_path / "t", number=1))
    found = finish(measure(pivot, [target]))
    assert set(found.names) == {EMBED, UP, HEAD}
    square = float(((target[HEAD].astype(np.float64) - pivot[EMBED]) ** 2).sum())
    assert found.square[found.names.index(HEAD), 0] == pytest.approx(square)
    assert HEAD in finish(inspect(pivot, [target])).names and HEAD in finish(preview(pivot, [target])).variation.names


def test_a_result_whose_tied_pivot_got_a_head_loads_whole_and_says_what_its_parents_say(tmp_path):
    tied, loose = save_family(tmp_path / "a", "llama-tied", 1)[0], save_family(tmp_path / "b", "llama", 1)[0]
    merged = finish(merge(Recipe(str(tied), (str(tied), str(loose)), ("one", "two"), method="linear", weights=(1.0, 0.0)),
                          tmp_path / "out")).folder
    result, parent = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (merged, tied))
    assert result.lm_head.weight.data_ptr() != result.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(result(torch.tensor([[5, 6]])).logits, parent(torch.tensor([[5, 6]])).logits)


def test_models_with_several_heads_or_embeddings_are_not_guessed_at(tmp_path):
    pivot, target = Checkpoint(model(tmp_path / "p")), Checkpoint(model(tmp_path / "t", **TIED))
    pivot.info = {**pivot.info, "output.weight": pivot.info[HEAD]}
    assert side_by_side(pivot, [target]) == (pivot, (target,))


def test_a_plan_without_such_models_holds_them_as_they_are(tmp_path):
    folders = model(tmp_path / "p"), model(tmp_path / "t", number=1)
    plan = MergePlan.open(Recipe(str(folders[0]), (str(folders[1]),), method="linear"))
    assert plan.models == tuple(plan.sources.values())


def test_a_matrix_that_the_config_promises_is_to_be_downloaded_again_not_fused(tmp_path):
    from safetensors.numpy import save_file

    weights = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((2, 2), np.float32) for i in range(2)}
    for name, kept in (("pivot", weights), ("target", dict(list(weights.items())[:1]))):
        (tmp_path / name).mkdir()
        save_file(kept, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    (found,) = [its for its in fits(Checkpoint(tmp_path / "pivot"), Checkpoint(tmp_path / "target")) if its.level == "bad"]
    assert "download or save it again" in found.text and "fusion" not in found.text
