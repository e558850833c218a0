"""fusion.review: distances and hulls worked out by hand, rounding, tokenizer, answers — and merges that went wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, RecipeError
from fusion.merge import merge
from fusion.progress import finish
from fusion.recipe import Recipe, Slice
from fusion.review import PROMPTS, Review, review
from fusion.review.hull import nearest_mix
from fusion.stages import merge_stages
from tests.conftest import save_checkpoint, snapshot

Q0, UP0, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


def reviewed(folder: Path, result: dict, *parents: dict, **options) -> Review:
    """Review arrays: the result beside parents called pivot, a, b."""
    names = [str(save_checkpoint(folder / name, {key: np.array(value, np.float32) for key, value in tensors.items()}))
             for name, tensors in zip(("merged", "pivot", "a", "b"), (result, *parents), strict=False)]
    return finish(review(names[0], names[1:], smoke=False, **options))


def words(report: Review, topic: str) -> tuple[str, str]:
    """Level and text of the finding about a topic."""
    return next((one.level, one.text) for one in report.findings if one.topic == topic)


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_distances_hull_and_range_are_as_worked_out_by_hand(tmp_path):
    zero, a, b = [[3, 4], [0, 0]], [[3, 4], [2, 0]], [[3, 4], [0, 2]]
    report = reviewed(tmp_path, {Q0: [[3, 4], [1, .5]], UP0: [[3, 4], [2, 2]], HEAD: [[3, 4], [-1, 0]]},
                      *(dict.fromkeys((Q0, UP0, HEAD), its) for its in (zero, a, b)))
    at = {name: t for t, name in enumerate(report.names)}
    assert report.parents == ("pivot", "a", "b")
    assert report.distance[at[UP0]] == pytest.approx([np.sqrt(8) / 5, 2 / np.sqrt(29), 2 / np.sqrt(29)])
    assert report.mix[at[Q0]] == pytest.approx([.25, .5, .25], abs=1e-6) and report.hull[at[Q0]] == pytest.approx(0, abs=1e-6)
    assert report.mix[at[UP0]] == pytest.approx([0, .5, .5], abs=1e-6)  # (2, 2) → (1, 1): √2 beyond, ÷ ‖Δ‖ = 2
    assert report.hull[at[UP0]] == pytest.approx(np.sqrt(2) / 2)
    assert report.mix[at[HEAD]] == pytest.approx([1, 0, 0], abs=1e-6) and report.hull[at[HEAD]] == pytest.approx(.5)
    assert report.beyond[[at[Q0], at[UP0], at[HEAD]]].tolist() == [0, 0, .25]
    level, text = words(report, "hull")
    assert level == "warning" and text.startswith("2 of 3 matrices lie outside") and "70.7%" in text and UP0 in text


def test_with_one_target_the_hull_is_the_segment(tmp_path):
    report = reviewed(tmp_path, {Q0: [[1, 1], [0, 0]]}, {Q0: np.zeros((2, 2))}, {Q0: [[2, 0], [0, 0]]})
    assert report.mix[0] == pytest.approx([.5, .5], abs=1e-6) and report.hull[0] == pytest.approx(.5)


def test_elements_above_and_below_all_parents_are_beyond_them(tmp_path):
    report = reviewed(tmp_path, {Q0: [[2, -1, .5, 1]]}, {Q0: [[0, 0, 0, 0]]}, {Q0: [[1, 1, 1, 1]]})
    assert report.beyond.tolist() == [.5]


def test_the_nearest_mix_beats_every_other_one():
    random = np.random.default_rng(0)
    for count in (1, 2, 3, 6):
        points = random.normal(size=(20, count + 1, 5)) * random.choice([1e-4, 1, 1e3], (20, 1, 1))
        points[:, :-1] += points[:, :1] * random.choice([0, 3])  # also nearly the same direction
        weights, distance = nearest_mix(points @ points.transpose(0, 2, 1))
        assert (weights >= 0).all() and (weights.sum(axis=1) <= 1 + 1e-9).all()
        assert distance == pytest.approx(np.linalg.norm(points[:, -1] - np.einsum("tj,tjn->tn", weights, points[:, :-1]), axis=1),
                                         rel=1e-4, abs=1e-6)
        for other in random.dirichlet(np.full(count + 1, .3), 300)[:, 1:]:
            reached = np.linalg.norm(points[:, -1] - np.einsum("j,tjn->tn", other, points[:, :-1]), axis=1)
            assert (distance <= reached * (1 + 1e-6)).all()


def test_a_result_that_is_one_of_its_parents_is_said_to_be_so(tmp_path):
    ones = {Q0: np.ones((2, 2))}
    report = reviewed(tmp_path, ones, {Q0: np.zeros((2, 2))}, ones)
    assert words(report, "distance") == ("warning", "The result is a: no matrix differs.")


def test_numbers_that_are_not_finite_are_counted(tmp_path):
    zero, sick = np.zeros((2, 2)), [[np.nan, 1], [np.inf, 1]]
    report = reviewed(tmp_path, {Q0: sick, UP0: zero}, {Q0: zero, UP0: zero}, {Q0: zero + 1, UP0: zero + 1})
    assert report.nonfinite == {Q0: 2} and report.level == "bad"
    assert words(report, "finite")[1].startswith(f"2 numbers are NaN or Inf, 2 of them in {Q0}")
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_parameters_tied_heads_and_what_was_not_compared_are_said(tmp_path):
    two = {"model.embed_tokens.weight": np.ones((2, 2)), Q0: np.ones((2, 2))}
    report = reviewed(tmp_path, {**two, HEAD: np.ones((2, 2))}, two)
    assert report.parameters == (8, 12) and words(report, "parameters")[0] == "warning"
    assert report.left_out == (HEAD,) and HEAD in words(report, "compared")[1]
    tied = save_checkpoint(tmp_path / "tied", two, config={"tie_word_embeddings": True})
    report = finish(review(tmp_path / "merged", [str(tied)], smoke=False))
    assert words(report, "tied") == ("warning", "The head is a matrix of its own; in the pivot it is tied to the embedding.")


# ── real merges ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def merged(family, tmp_path_factory):
    """A VARM merge of a real family: pivot, targets, result."""
    pivot, *targets = family("llama")
    out = tmp_path_factory.mktemp("merged") / "out"
    return finish(merge(Recipe(str(pivot), tuple(map(str, targets))), out))


def test_a_varm_merge_is_a_mix_of_its_parents_with_the_weights_it_was_given(merged):
    before = snapshot(merged.folder)
    report = finish(review(merged, smoke=False))
    assert report.parents == ("pivot", "target-a", "target-b") and not report.left_out
    assert report.mix[:, 1:] == pytest.approx(merged.weights, abs=.15)  # vectors of 32 numbers are rounded coarsely
    big = report.numel > 1000
    assert report.mix[big][:, 1:] == pytest.approx(merged.weights[big], abs=.01)
    assert (report.hull < .01).all() and (report.beyond == 0).all()
    assert [one.level for one in report.findings] == ["good"] * len(report.findings)
    assert {one.topic for one in report.findings} == {"finite", "parameters", "tied", "distance", "hull", "rounding", "tokenizer"}
    assert report.answers is None and snapshot(merged.folder) == before


def test_the_rounding_is_that_of_the_same_merge_in_float32(merged, tmp_path):
    exact = finish(merge(merged.recipe.with_(dtype="float32", revisions={}, result={}), tmp_path / "exact"))
    stored, fine, pivot = (Checkpoint(folder) for folder in (merged.folder, exact.folder, merged.recipe.pivot))
    report = finish(review(merged.folder, smoke=False))
    for t, name in enumerate(report.names):
        error = stored[name].astype(np.float64) - fine[name]
        assert report.lost[t] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(fine[name].astype(np.float64) - pivot[name]))
    assert .001 < report.lost_total < .2
    assert finish(review(exact.folder, smoke=False)).lost_total == 0
    assert finish(review(merged.folder, smoke=False, rounding=False)).lost is None


def test_a_merge_beyond_its_parents_is_found(merged, tmp_path):
    recipe = merged.recipe.with_(method="task_arithmetic", weights=(), options={"lambda": 3.0}, revisions={}, result={})
    report = finish(review(finish(merge(recipe, tmp_path / "far")), smoke=False))
    assert (report.hull > .5).all() and (report.beyond > .3).all()
    level, text = words(report, "hull")
    assert level == "good" and "its method does not average" in text


def test_stacked_layers_are_compared_with_the_layers_they_came_from(family, tmp_path):
    pivot, a, _ = map(str, family("llama"))
    recipe = Recipe(pivot, (a,), method="passthrough", slices=(Slice({"target-a": (0, 2)}), Slice({"target-a": (0, 1)})))
    report = finish(review(finish(merge(recipe, tmp_path / "tall")), smoke=False))
    assert not report.left_out and report.distance[:, 1].max() == 0 and report.parameters[1] > report.parameters[0]
    assert words(report, "parameters")[0] == "good"


def test_of_several_stages_the_models_that_are_no_stages_are_the_parents(family, tmp_path):
    pivot, a, b = map(str, family("llama"))
    stages = (Recipe(pivot, (a,), method="linear", weights=(1.0,), name="first"), Recipe(pivot, ("first", b), names=("first", "b")))
    report = finish(review(finish(merge_stages(stages, tmp_path / "out")), smoke=False))
    assert report.parents == ("pivot", "target-a", "target-b") and report.lost is None and report.hull.max() < .05


# ── tokenizer and answers ────────────────────────────────────────────────────────────────────────────────────────────

def test_a_tokenizer_that_does_not_fit_is_found(merged, tmp_path):
    out = shutil.copytree(merged.folder, tmp_path / "out")
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    swapped = vocabulary | {"h": vocabulary["o"], "o": vocabulary["h"]}
    for broken, level, part in [(vocabulary | {"h": 900}, "bad", "Token 900"), (swapped, "good", "as they were"),
                                (None, "bad", "cannot be read")]:
        model = {**tokenizer["model"], "vocab": broken, "merges": []}
        (out / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": model}))
        said = words(finish(review(out, smoke=False, rounding=False)), "tokenizer")
        assert said[0] == level and part in said[1]
    stripped = {**tokenizer, "normalizer": {"type": "Lowercase"}}
    (out / "tokenizer.json").write_text(json.dumps(stripped))
    assert words(finish(review(out, smoke=False, rounding=False)), "tokenizer")[0] == "warning"  # the donor keeps capitals
    (out / "tokenizer.json").unlink()
    assert words(finish(review(out, smoke=False, rounding=False)), "tokenizer")[0] == "warning"


def test_the_model_is_asked_five_prompts(merged):
    report = finish(review(merged, rounding=False))
    assert [one.prompt for one in report.answers] == list(PROMPTS) and len(PROMPTS) == 5
    assert all(one.finish in ("stop", "length") and 1 < one.perplexity < 1e6 for one in report.answers)
    assert words(report, "answers")[0] == "warning"  # random weights do not end their answers in good time
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_that_cannot_be_loaded_or_computes_nan_is_bad(merged, tmp_path):
    from safetensors.torch import load_file, save_file

    out = shutil.copytree(merged.folder, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    report = finish(review(out, rounding=False))
    assert report.level == "bad" and {one.topic for one in report.findings if one.level == "bad"} == {"finite", "answers"}
    assert all(one.perplexity is None and not one.sound for one in report.answers)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps({**json.loads((out / "config.json").read_text()), "num_attention_heads": 5}))
    report = finish(review(out, rounding=False))
    assert all(one.finish == "error" and one.error for one in report.answers)


# ── what a person can get wrong, and the command ─────────────────────────────────────────────────────────────────────

def test_without_a_recipe_the_parents_must_be_named(tmp_path, family):
    lone = save_checkpoint(tmp_path / "lone", {Q0: np.ones((2, 2), np.float32)})
    with pytest.raises(RecipeError, match="--parents"):
        finish(review(lone, smoke=False))
    with pytest.raises(CheckpointError, match="gone"):
        finish(review(lone, ["gone"], smoke=False))
    with pytest.raises(RecipeError, match="no matrix of the result"):
        finish(review(lone, [str(save_checkpoint(tmp_path / "other", {UP0: np.ones((2, 2), np.float32)}))], smoke=False))


def test_closing_it_leaves_nothing_running(merged):
    import threading

    before = threading.active_count()
    work = review(merged, smoke=False)
    next(work)
    work.close()
    assert threading.active_count() == before


def test_the_command_prints_findings_and_distances_within_100_columns(merged, capsys):
    assert main(["review", str(merged.folder), "--no-smoke"]) == 0
    out, err = capsys.readouterr()
    assert "All numbers are finite" in out and "whole model" in out and err == "" and max(map(len, out.splitlines())) <= 100
    assert main(["review", str(merged.folder), "--no-smoke", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["level"] == "good" and len(report["tensors"]) == len(merged.weights)


def test_the_command_fails_for_a_bad_result_after_it_said_everything(tmp_path, capsys):
    for name, value in (("merged", np.nan), ("pivot", 1), ("a", 2)):
        save_checkpoint(tmp_path / name, {Q0: np.full((2, 2), value, np.float32)})
    argv = ["review", str(tmp_path / "merged"), "--no-smoke", "--parents", str(tmp_path / "pivot"), str(tmp_path / "a")]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "bad " in out and err.startswith("error: merged: 4 numbers are NaN or Inf")
