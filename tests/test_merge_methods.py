"""Every method through the engine: the numbers of the pure function, the same bytes whatever the way, memory that is bounded."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fusion.checkpoint import Checkpoint
from fusion.digest import digest_checkpoint
from fusion.live import LiveMerge, chat_model, state_dict
from fusion.merge import merge
from fusion.methods import BLOCK, METHODS, apply
from fusion.plan import MergePlan, key
from fusion.preflight import RUNTIME_BYTES, preflight
from fusion.progress import finish
from fusion.recipe import Curve, Override, Recipe
from tests.conftest import load_tensors, save_checkpoint, save_family

UP, Q0, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
STRICT = {"density": .4, "gamma": .1, "epsilon": .2, "select_topk": .5, "t": .3, "scale": 2.0}  # away from the defaults
UNMEASURED = [name for name, method in METHODS.items() if not method.measured]


def options_of(name: str) -> dict:
    return {option.name: STRICT[option.name] for option in METHODS[name].options if option.name in STRICT}


def count_of(name: str) -> int:
    return min(3, METHODS[name].max_targets or 3)


def weights_of(name: str) -> tuple:
    return (.5, .3, .2)[:count_of(name)] if METHODS[name].weights and not METHODS[name].measured else ()


def recipe_of(folders: list[Path], name: str, **changes) -> Recipe:
    settings = {"weights": weights_of(name), "options": options_of(name), **changes}
    return Recipe(folders[0], tuple(folders[1:1 + count_of(name)]), method=name, **settings)


def digest_of(recipe: Recipe, out: Path, **how) -> str:
    return finish(merge(recipe, out, **how)).recipe.result["digest"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pivot and three targets with a matrix of several blocks, one of a single column, and a vector."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("wide")
    shapes = {UP: (301, BLOCK // 128 + 3), Q0: (70, 1), NORM: (33,)}
    pivot = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    same = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}  # what all have learnt
    moved = [{name: value + (same[name] + random.normal(size=value.shape).astype(np.float32)) * np.float32(j / 10)
              for name, value in pivot.items()} for j in (1, 2, 3)]
    return [save_checkpoint(root / label, tensors) for label, tensors in zip(("pivot", *"abc"), (pivot, *moved), strict=True)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama", targets=3)


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", UNMEASURED)
def test_the_engine_gives_the_numbers_of_the_pure_function(folders, tmp_path, name):
    got = load_tensors(finish(merge(recipe_of(folders, name), tmp_path / "out")).folder)
    pivot, *targets = map(Checkpoint, folders[:1 + count_of(name)])
    for tensor in pivot:
        keys = [key(0, tensor, target.name) for target in targets]
        options = {METHODS[name].option(label).argument: value for label, value in options_of(name).items()}
        exact = apply(name, pivot[tensor], [target[tensor] for target in targets], weights_of(name) or None, keys, **options)
        assert np.array_equal(got[tensor].numpy(), exact), tensor


def test_an_option_may_differ_from_tensor_to_tensor_and_from_target_to_target(folders, tmp_path):
    per_layer = recipe_of(folders, "ties", options={"density": (Curve((1, 0)), .5, 1), "lambda": Curve((1, 3))})
    got = load_tensors(finish(merge(per_layer, tmp_path / "out")).folder)
    pivot, *targets = map(Checkpoint, folders)
    for tensor, density, factor in ((UP, 1, 1), (Q0, 0, 3)):
        exact = apply("ties", pivot[tensor], [target[tensor] for target in targets], (.5, .3, .2),
                      density=np.array([density, .5, 1.]), lambda_=factor)
        assert np.array_equal(got[tensor].numpy(), exact)


def test_measured_variation_can_weigh_any_method(folders, tmp_path):
    result = finish(merge(recipe_of(folders, "task_arithmetic", weights="variation"), tmp_path / "out"))
    assert result.variation is not None and (tmp_path / "out/fusechat_variation.json").is_file()
    ratios = result.variation.ratios("matrix")
    assert np.array_equal(result.weights, ratios) and ratios.sum(axis=1) == pytest.approx(1)
    pivot, *targets = map(Checkpoint, folders)
    t = result.variation.names.index(UP)
    exact = apply("task_arithmetic", pivot[UP], [target[UP] for target in targets], ratios[t])
    assert np.array_equal(load_tensors(result.folder)[UP].numpy(), exact)


# ── the same bytes whatever the way ──────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", METHODS)
def test_memory_threads_order_and_shards_do_not_change_a_byte(folders, tmp_path, monkeypatch, name):
    recipe = recipe_of(folders, name)
    wanted = digest_of(recipe, tmp_path / "two")
    assert digest_of(recipe, tmp_path / "shards", max_shard_bytes=2000) == wanted
    monkeypatch.setattr(sys.modules["fusion.merge"], "THREADS", 1)
    assert digest_of(recipe, tmp_path / "one") == wanted
    stored, live = load_tensors(tmp_path / "one"), state_dict(finish(LiveMerge().update(recipe)))
    assert all(torch.equal(live[tensor], value) for tensor, value in stored.items()) and live.keys() == stored.keys()
    assert finish(digest_checkpoint(Checkpoint(tmp_path / "shards"))) == wanted


@pytest.mark.parametrize("name", METHODS)
def test_the_saved_model_loads_and_answers_like_the_one_in_memory(llama, tmp_path, name):
    recipe = recipe_of(llama, name, options={key: value for key, value in options_of(name).items() if key != "scale"})
    saved = finish(merge(recipe, tmp_path / "out"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(saved.folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits, live = model(ids).logits, chat_model(finish(LiveMerge().update(recipe)), "live").model(ids).logits
    assert logits.isfinite().all() and torch.equal(logits, live)
    assert saved.parameters == (saved.parameters[0],) * 2 and saved.finite and saved.tensors == len(load_tensors(saved.folder))


RANDOM = [name for name, method in METHODS.items() if method.random]


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_reproduces_and_another_one_does_not(folders, tmp_path, name):
    first = digest_of(recipe_of(folders, name, seed=7), tmp_path / "a")
    assert digest_of(recipe_of(folders, name, seed=7), tmp_path / "b") == first
    assert digest_of(recipe_of(folders, name, seed=8), tmp_path / "c") != first


@pytest.mark.parametrize("name", RANDOM)
def test_chance_in_one_tensor_does_not_depend_on_what_else_is_merged(folders, tmp_path, name):
    whole = load_tensors(finish(merge(recipe_of(folders, name), tmp_path / "a")).folder)
    partly = load_tensors(finish(merge(recipe_of(folders, name, exclude=(Q0,)), tmp_path / "b")).folder)
    assert torch.equal(whole[UP], partly[UP]) and torch.equal(whole[NORM], partly[NORM])
    assert not torch.equal(whole[Q0], partly[Q0])


def test_keys_differ_by_seed_tensor_and_target():
    keys = {key(seed, tensor, target) for seed in (0, 1) for tensor in ("a", "b") for target in ("x", "y")}
    assert len(keys) == 8 and all(0 <= number < 2 ** 64 for number in keys)
    assert key(0, UP, "a") == 6001242053974181398  # of sha256(b"0\0model.layers.0.mlp.up_proj.weight\0a")


# ── exclusions and overrides, for every kind of weights ──────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", METHODS)
def test_an_excluded_tensor_is_the_pivots(folders, tmp_path, name):
    result = finish(merge(recipe_of(folders, name, exclude=(UP,)), tmp_path / "out"))
    got, pivot = load_tensors(result.folder), load_tensors(folders[0])
    assert torch.equal(got[UP], pivot[UP]) and not torch.equal(got[NORM], pivot[NORM])
    assert not result.weights[list(Checkpoint(folders[0])).index(UP)].any()


@pytest.mark.parametrize("name", [name for name in UNMEASURED if METHODS[name].weights])
def test_an_override_changes_the_tensors_it_names(folders, tmp_path, name):
    changed = recipe_of(folders, name, overrides=(Override(UP, {"a": .9}),))
    got = load_tensors(finish(merge(changed, tmp_path / "out")).folder)
    pivot, *targets = map(Checkpoint, folders[:1 + count_of(name)])
    rest = [weight / sum(weights_of(name)[1:]) * .1 for weight in weights_of(name)[1:]]
    weights = [.9, *(rest if METHODS[name].weights == "shares" else weights_of(name)[1:])]
    for tensor, its in ((UP, weights), (NORM, weights_of(name))):
        keys = [key(0, tensor, target.name) for target in targets]
        exact = apply(name, pivot[tensor], [target[tensor] for target in targets], its, keys, **options_of(name))
        assert np.allclose(got[tensor].numpy(), exact, rtol=1e-5, atol=1e-6)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Models of one matrix of 2 million numbers: 8 MB each in float32, more than the blocks of one thread."""
    random, root = np.random.default_rng(1), tmp_path_factory.mktemp("large")
    pivot = random.normal(size=(2000, 1000)).astype(np.float32)
    return [save_checkpoint(root / label, {UP: pivot + random.normal(size=pivot.shape).astype(np.float32) * j / 10})
            for j, label in enumerate(("pivot", *"abc"))]


@pytest.mark.parametrize("name", METHODS)
def test_no_method_takes_more_memory_than_the_preflight_says(large, name):
    recipe = recipe_of(large, name)
    pivot, *targets = map(Checkpoint, (recipe.pivot, *recipe.targets))
    share = (preflight(pivot, targets, method=name).peak_memory_bytes - RUNTIME_BYTES) / 2  # of one of two threads
    plan = MergePlan.open(recipe)
    tracemalloc.start()
    try:
        for _ in plan.blocks(0, np.full(len(targets), 1 / len(targets)), threading.Event()):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        plan.close()
    assert peak < share < sum(target.nbytes for target in targets), f"{peak / 1e6:.1f} of {share / 1e6:.1f} MB"
