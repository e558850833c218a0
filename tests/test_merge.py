"""fusion.merge: a recipe becomes a folder; the numbers are checked against float64, the folder against transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.anatomy import GRANULARITIES
from fusion.checkpoint import Checkpoint
from fusion.errors import MismatchError, RecipeError
from fusion.merge import RECIPE_FILE, VARIATION_FILE, merge
from fusion.progress import finish
from fusion.recipe import Override, Recipe
from fusion.variation import BLOCK, MEASURES, measure
from tests.conftest import ARCHITECTURES, TEMPLATE, load_tensors, save_checkpoint, snapshot

UP, NORM, HEAD = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """All float tensors of a checkpoint in float64."""
    return {name: value.double().numpy() for name, value in load_tensors(folder).items() if value.is_floating_point()}


def unit(name: str, granularity: str) -> str:
    """The unit of a Llama, GPT-2, GPT-NeoX or Mixtral name, worked out anew."""
    found = re.match(r"(.*?\b(?:layers|h))\.(\d+)\.([^.]+)", name)
    if granularity == "model":
        return ""
    if granularity == "matrix" or not found:
        return name
    return found[0] if granularity == "module" else f"{found[1]}.{found[2]}"


def varm(pivot: dict, targets: list[dict], granularity: str, by: str) -> dict[str, np.ndarray]:
    """Equation 7 in float64, element by element, as slow as it is plain."""
    power = 2 if by == "square" else 1
    change = {name: np.stack([np.abs(target[name] - pivot[name]) ** power for target in targets]) for name in pivot}
    merged = {}
    for name in pivot:
        if granularity == "parameter":
            variation = change[name]
        else:
            inside = [other for other in pivot if unit(other, granularity) == unit(name, granularity)]
            sums = sum(change[other].reshape(len(targets), -1).sum(axis=1) for other in inside)
            variation = (sums / max(1, sum(pivot[other].size for other in inside))).reshape(-1, *[1] * pivot[name].ndim)
        total = variation.sum(axis=0)
        shares = np.divide(variation, total, out=np.full_like(variation, 1 / len(targets)), where=total > 0)
        merged[name] = sum(share * target[name] for share, target in zip(shares, targets, strict=True))
    return merged


def largest(targets: list[dict], name: str) -> torch.Tensor:
    return torch.as_tensor(np.max([np.abs(target[name]) for target in targets], axis=0))


def assert_rounded_once(stored: torch.Tensor, exact: np.ndarray, targets: list[dict], name: str) -> None:
    """Each stored number is the nearest of its dtype, up to the float32 arithmetic before the cast (2⁻²² of the largest
    target's number): that can only turn a number that lies on a tie to the other neighbour."""
    got, exact = stored.double(), torch.as_tensor(exact)
    up = torch.full_like(stored, float("inf"))
    gap = torch.maximum((torch.nextafter(stored, up) - stored).double(), (stored - torch.nextafter(stored, -up)).double())
    assert ((got - exact).abs() <= gap / 2 + largest(targets, name) * 2**-22).all()


def merged(folders: list[Path], out: Path, **options) -> Path:
    run = {name: options.pop(name) for name in ("max_shard_bytes", "variation") if name in options}
    return finish(merge(Recipe(folders[0], tuple(folders[1:]), **options), out, **run)).folder


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_varm_is_equation_7_at_every_granularity(family, tmp_path, granularity, by):
    folders = family("llama")
    targets = [numbers(target) for target in folders[1:]]
    exact = varm(numbers(folders[0]), targets, granularity, by)
    got = load_tensors(merged(folders, tmp_path / "out", granularity=granularity, measure=by))
    assert set(got) == set(exact)
    for name, value in got.items():
        assert value.dtype == torch.bfloat16
        assert_rounded_once(value, exact[name], targets, name)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("float16", torch.float16)])
def test_the_result_is_cast_once_to_the_dtype_asked_for(family, tmp_path, dtype, torch_dtype):
    folders = family("llama")
    targets = [numbers(target) for target in folders[1:]]
    exact = varm(numbers(folders[0]), targets, "matrix", "square")
    folder = merged(folders, tmp_path / "out", dtype=dtype)
    for name, value in load_tensors(folder).items():
        assert value.dtype == torch_dtype
        assert_rounded_once(value, exact[name], targets, name)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_linear_is_the_weighted_average(family, tmp_path):
    folders = family("llama")
    first, second = map(numbers, folders[1:])
    for name, value in load_tensors(merged(folders, tmp_path / "out", method="linear", weights=(1, 3))).items():
        assert_rounded_once(value, .25 * first[name] + .75 * second[name], [first, second], name)


def test_the_golden_merged_values(tmp_path):
    q0, embed = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
    deltas = {q0: (np.full((2, 2), .1), np.full((2, 2), .3)), UP: (np.full((2, 4), .2), np.full((2, 4), .1)),
              embed: (np.array([[.1, 0], [0, 0]]), np.array([[0, 0], [0, .2]])), NORM: (np.zeros(2), np.zeros(2))}
    folders = [save_checkpoint(tmp_path / "pivot", {name: 0 * pair[0] for name, pair in deltas.items()})]
    folders += [save_checkpoint(tmp_path / "ab"[j], {name: pair[j] for name, pair in deltas.items()}) for j in (0, 1)]
    got = numbers(merged(folders, tmp_path / "out"))
    assert got[q0] == pytest.approx(np.full((2, 2), .28), abs=1e-7)
    assert got[UP] == pytest.approx(np.full((2, 4), .18), abs=1e-7)
    assert got[embed] == pytest.approx(np.array([[.02, 0], [0, .16]]), abs=1e-7)
    assert got[NORM].tolist() == [0, 0]


def test_overrides_and_exclusions_reach_the_numbers(family, tmp_path):
    folders = family("llama")
    pivot, first, second = (load_tensors(folder) for folder in folders)
    got = load_tensors(merged(folders, tmp_path / "out", exclude=("model.embed_tokens.*",), overrides=(
        Override("*.layers.0.*", {"target-a": 1}), Override("*.layers.1.*", {"target-b": 1}))))
    for name, value in got.items():
        if "embed_tokens" in name or ".layers." in name:
            kept = pivot if "embed_tokens" in name else first if ".layers.0." in name else second
            assert torch.equal(value, kept[name])
        else:
            assert not torch.equal(value, pivot[name])


TENSOR = arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32))


@settings(max_examples=10)
@given(pivot=TENSOR, target=TENSOR, count=st.integers(1, 3), options=st.sampled_from(
    [{"granularity": granularity} for granularity in GRANULARITIES] + [{"method": "linear"}]))
def test_one_target_and_equal_targets_come_out_unchanged(pivot, target, count, options):
    with tempfile.TemporaryDirectory() as folder:
        folders = [save_checkpoint(Path(folder) / "pivot", {UP: pivot})]
        folders += [save_checkpoint(Path(folder) / f"t{j}", {UP: target}) for j in range(count)]
        assert np.array_equal(load_tensors(merged(folders, Path(folder) / "out", **options))[UP].numpy(), target)


def test_a_target_equal_to_the_pivot_leaves_the_other_target(family, tmp_path):
    pivot, target, _ = family("llama")
    shutil.copytree(pivot, tmp_path / "copy")
    folders = [pivot, tmp_path / "copy", target]
    got, wanted = load_tensors(merged(folders, tmp_path / "out")), load_tensors(target)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_tensors_of_many_blocks_of_no_element_and_of_one_are_merged(tmp_path):
    random = np.random.default_rng(0)
    def tensors() -> dict:
        return {UP: random.normal(size=(3, BLOCK // 2 + 11)).astype(np.float32), NORM: np.float32(random.normal()),
                "none": np.empty((0, 5), np.float32), "count": np.arange(3), "empty count": np.arange(0)}
    folders = [save_checkpoint(tmp_path / name, tensors()) for name in ("pivot", "a", "b")]
    targets = [numbers(folder) for folder in folders[1:]]
    exact = varm(numbers(folders[0]), targets, "matrix", "square")
    got = load_tensors(merged(folders, tmp_path / "out", max_shard_bytes=1000))
    for name, value in exact.items():
        assert got[name].shape == value.shape
        assert_rounded_once(got[name], value, targets, name)
    assert got["count"].tolist() == [0, 1, 2] and got["empty count"].shape == (0,)


def test_names_with_odd_characters_are_kept(tmp_path):
    names = ["layers.0.ü", "a\nb", 'quote"', "[0]", "*", "back\\slash", "__metadata__x"]
    folders = [save_checkpoint(tmp_path / folder, {name: np.full(2, value, np.float32) for name in names})
               for folder, value in (("pivot", 0), ("a", 1))]
    got = load_tensors(merged(folders, tmp_path / "out", exclude=("[0]",)))
    assert {name: value.tolist() for name, value in got.items()} == {name: [0, 0] if name == "[0]" else [1, 1] for name in names}


def test_merging_twice_gives_the_same_bytes(family, tmp_path):
    folders = family("llama")
    first, second = (snapshot(merged(folders, tmp_path / name, granularity="module", max_shard_bytes=20_000)) for name in "ab")
    assert first == second and len(first) > 5


def test_a_known_variation_saves_the_measuring_and_changes_no_byte(family, tmp_path, monkeypatch):
    folders = family("llama")
    known = finish(measure(Checkpoint(folders[0]), [Checkpoint(target) for target in folders[1:]]))
    plain = snapshot(merged(folders, tmp_path / "a", granularity="layer"))
    monkeypatch.setattr(sys.modules["fusion.merge"], "measure", lambda *_, **__: pytest.fail("measured again"))
    assert snapshot(merged(folders, tmp_path / "b", granularity="layer", variation=known)) == plain
    with pytest.raises(MismatchError, match="measured on other models"):
        merged([folders[0], folders[2], folders[1]], tmp_path / "c", variation=known)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_transformers_loads_every_architecture_whole(family, tmp_path, arch):
    folders = family(arch)
    folder = merged(folders, tmp_path / "out", granularity="layer", max_shard_bytes=30_000)
    assert (folder / "model.safetensors.index.json").is_file()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")) and model.dtype == torch.bfloat16
    targets = [numbers(target) for target in folders[1:]]
    exact = varm(numbers(folders[0]), targets, "layer", "square")
    for name, value in load_tensors(folder).items():
        assert_rounded_once(value, exact[name], targets, name)


def test_config_tokenizer_template_and_generation_config_come_along(family, tmp_path):
    folders = family("llama")
    folder = merged(folders, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(folders[0]).get_vocab()
    assert transformers.GenerationConfig.from_pretrained(folder).temperature == .7
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, folders[0]))
    assert {**theirs, "dtype": "bfloat16"} == ours


def test_the_donor_is_visible_and_gives_its_files(tmp_path):
    folders = [save_checkpoint(tmp_path / name, {UP: np.ones(2, np.float32) * i}) for i, name in enumerate(("pivot", "a", "b"))]
    for folder in folders:
        (folder / "chat_template.jinja").write_text(folder.name)
        (folder / "secret.txt").write_text("not a donor file")
    folder = merged(folders, tmp_path / "out", donor="b")
    assert (folder / "chat_template.jinja").read_text() == "b" and not (folder / "secret.txt").exists()
    assert "come from the donor: b." in (folder / "README.md").read_text()
    assert Recipe.load(folder / RECIPE_FILE).donor == "b"


def test_recipe_report_and_card_tell_what_was_done(family, tmp_path):
    folders = family("llama")
    folder = merged(folders, tmp_path / "out", overrides=(Override("lm_head.weight", {"target-a": .9}),), exclude=("model.norm.*",))
    recipe = Recipe.load(folder / RECIPE_FILE)
    assert set(recipe.revisions) == {"pivot", "target-a", "target-b"}
    assert set(recipe.result) == {"engine", "digest"}
    report = json.loads((folder / VARIATION_FILE).read_text())
    weights = {(row["tensor"], row["target"]): row["weight"] for row in report["tensors"]}
    assert weights[HEAD, "target-a"] == .9 and weights["model.norm.weight", "target-b"] == 0
    shares = {name: weights[name, "target-a"] + weights[name, "target-b"] for name, _ in weights if name != "model.norm.weight"}
    assert all(share == pytest.approx(1) for share in shares.values())
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and all(name in card for name in ("pivot", "target-a", "target-b", "2402.16107", RECIPE_FILE))
    again = finish(merge(recipe, tmp_path / "again")).folder
    assert snapshot(again) == snapshot(folder)


def test_a_folder_of_any_name_can_be_merged_and_is_only_text_in_the_card(tmp_path):
    odd = os.fsdecode(b"caf\xe9 [x](y)|\n# z")
    folders = [save_checkpoint(tmp_path / name, {UP: np.ones(2, np.float32) * i}) for i, name in enumerate(("pivot", odd))]
    folder = merged(folders, tmp_path / "out", donor=odd)
    card = (folder / "README.md").read_text()
    assert "\\[x\\]\\(y\\)\\| \\# z" in card and "[x](y)" not in card.split("---")[2] and "\n# z" not in card
    assert Recipe.load(folder / RECIPE_FILE).names == (odd,)


def test_a_recipe_of_other_weights_is_not_run(family, tmp_path):
    folders = family("llama")
    with pytest.raises(RecipeError, match="not the checkpoint the recipe was run on"):
        merged(folders, tmp_path / "out", revisions={"target-a": "0" * 64})


HEADLESS = {"model.embed_tokens.weight": np.ones((3, 2), np.float32), UP: np.ones((2, 2), np.float32)}


@pytest.mark.parametrize(("pivot_head", "target_head"), [(False, False), (False, True), (True, False), (True, True)])
def test_tied_weights_stay_tied_and_are_stored_once(tmp_path, pivot_head, target_head):
    def tied(name: str, head: bool, value: float) -> Path:
        tensors = {name: value * tensor for name, tensor in HEADLESS.items()}
        return save_checkpoint(tmp_path / name, {**tensors, **({HEAD: tensors["model.embed_tokens.weight"]} if head else {})},
                               config={"tie_word_embeddings": True})
    folder = merged([tied("pivot", pivot_head, 1), tied("a", target_head, 2)], tmp_path / "out")
    assert set(load_tensors(folder)) == set(HEADLESS) and json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_an_untied_head_has_weights_of_its_own(tmp_path):
    def untied(name: str, head: float) -> Path:
        return save_checkpoint(tmp_path / name, {**HEADLESS, HEAD: np.full((3, 2), head, np.float32)})
    got = load_tensors(merged([untied("pivot", 0), untied("a", 0), untied("b", 4)], tmp_path / "out"))
    assert got[HEAD].unique().tolist() == [4]
