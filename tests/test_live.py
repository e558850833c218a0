"""fusion.live: the numbers of a saved merge without a folder, and only what changed is computed again."""

from __future__ import annotations

import threading
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import transformers

from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, MismatchError, RecipeError
from fusion.live import LiveMerge, LiveResult, chat_model, state_dict
from fusion.loading import LOADING
from fusion.merge import merge
from fusion.plan import MergePlan
from fusion.progress import finish
from fusion.recipe import Override, Recipe, Table
from fusion.variation import measure
from tests.conftest import ARCHITECTURES, load_tensors, save_checkpoint, save_family, snapshot

Q0 = "model.layers.0.self_attn.q_proj.weight"
ONE = Override(Q0, {"target-a": .9})
CASES = [{"granularity": unit, "measure": by} for unit in ("matrix", "layer", "parameter") for by in ("square", "absolute")]
CASES += [{"granularity": "module"}, {"granularity": "model"}, {"method": "linear"}, {"method": "linear", "weights": (1, 3)},
          {"overrides": (ONE,)}, {"granularity": "parameter", "overrides": (ONE,)}, {"exclude": ("*.layers.1.*",)},
          {"dtype": "float32"}, {"dtype": "float16", "donor": "target-b"}]


def recipe_of(folders, **options) -> Recipe:
    return Recipe(folders[0], tuple(folders[1:]), **options)


@pytest.fixture
def live(family):
    """A merge in memory that was run once at granularity matrix, its recipe and its variation."""
    folders = family("llama")
    merging, recipe = LiveMerge(), recipe_of(folders)
    variation = finish(measure(Checkpoint(folders[0]), [Checkpoint(target) for target in folders[1:]], elements=True))
    finish(merging.update(recipe, variation))
    return merging, recipe, variation


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_numbers_are_the_bytes_of_the_saved_folder(family, tmp_path, options):
    recipe = recipe_of(family("llama"), **options)
    result = finish(LiveMerge().update(recipe))
    saved = finish(merge(recipe, tmp_path / "out"))
    stored = load_tensors(saved.folder)
    ours = state_dict(result)
    assert set(ours) == set(stored)
    assert all(ours[name].dtype == value.dtype and torch.equal(ours[name], value) for name, value in stored.items())
    assert np.array_equal(result.weights, saved.weights) and result.computed == len(stored)
    assert result.nbytes == sum(value.nbytes for value in stored.values())


def test_empty_scalar_and_counting_tensors_are_kept(tmp_path):
    def tensors(value: float) -> dict:
        return {Q0: np.full((2, 2), value, np.float32), "scale": np.float32(value), "none": np.empty((0, 3), np.float32),
                "count": np.arange(4), "mask": np.array([True, False])}
    folders = [save_checkpoint(tmp_path / name, tensors(i)) for i, name in enumerate(("pivot", "a"))]
    got = state_dict(finish(LiveMerge().update(recipe_of(folders, dtype="bfloat16"))))
    assert (got["scale"].shape, got["scale"].item(), got["none"].shape) == ((), 1, (0, 3))
    assert got["count"].tolist() == [0, 1, 2, 3] and got["mask"].tolist() == [True, False]


def test_nothing_is_computed_twice(live):
    merging, recipe, variation = live
    assert finish(merging.update(recipe, variation)).computed == 0
    assert finish(merging.update(recipe.with_(donor="target-a"), variation)).computed == 0


def test_one_override_computes_one_matrix(live):
    merging, recipe, variation = live
    changed = finish(merging.update(recipe.with_(overrides=(ONE,)), variation))
    assert changed.computed == 1
    assert finish(merging.update(recipe, variation)).computed == 1


@pytest.mark.parametrize("change", [{"exclude": (Q0,)}, {"overrides": (Override(Q0, {"target-a": 0}),)}])
def test_what_was_reused_is_what_would_have_been_computed(live, change):
    merging, recipe, variation = live
    partly = finish(merging.update(recipe.with_(**change), variation))
    anew = finish(LiveMerge().update(recipe.with_(**change), variation))
    assert partly.computed == 1 and anew.computed == len(anew.tensors)
    assert all(np.array_equal(partly.tensors[name], value) for name, value in anew.tensors.items())


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"granularity": "parameter"}, {"allow_nonfinite": True}])
def test_another_dtype_or_way_of_weighing_computes_all(live, change):
    merging, recipe, variation = live
    result = finish(merging.update(recipe.with_(**change), variation))
    assert result.computed == len(result.tensors)


def test_a_model_that_changed_on_disk_is_read_again(tmp_path):
    values = np.ones(10_000, np.float32)
    folders = [save_checkpoint(tmp_path / name, {Q0: values * i}) for i, name in enumerate(("pivot", "a"))]
    merging, recipe = LiveMerge(), recipe_of(folders)
    finish(merging.update(recipe))
    before = Checkpoint(folders[1]).fingerprint
    values[0] = 7  # where the fingerprint does not look
    (folders[1] / "model.safetensors").unlink()
    save_checkpoint(tmp_path / "new", {Q0: values})
    (tmp_path / "new/model.safetensors").rename(folders[1] / "model.safetensors")
    assert Checkpoint(folders[1]).fingerprint == before
    assert finish(merging.update(recipe)).tensors[Q0][0] == 7


def test_numbers_that_were_allowed_once_are_refused_when_no_longer_allowed(tmp_path):
    folders = [save_checkpoint(tmp_path / name, {Q0: np.array([1, value], np.float32)})
               for name, value in (("pivot", 1), ("a", np.nan))]
    merging, recipe = LiveMerge(), recipe_of(folders, method="linear")
    finish(merging.update(recipe.with_(allow_nonfinite=True)))
    with pytest.raises(CheckpointError, match=f"a: {Q0} holds 1 values"):
        finish(merging.update(recipe))


def test_a_model_of_weight_nothing_must_be_sound_too(tmp_path):
    folders = [save_checkpoint(tmp_path / name, {Q0: np.array([1, value], np.float32)})
               for name, value in (("pivot", 1), ("a", 2), ("b", np.inf))]
    with pytest.raises(CheckpointError, match=f"b: {Q0} holds 1 values"):
        finish(LiveMerge().update(recipe_of(folders, method="linear", weights=(1, 0))))


def test_a_variation_of_other_models_is_refused(live):
    merging, recipe, variation = live
    with pytest.raises(MismatchError, match="measured on other models"):
        finish(merging.update(recipe, replace(variation, targets=("x", "y"))))
    with pytest.raises(RecipeError, match="elements=True"):
        finish(merging.update(recipe.with_(granularity="parameter"), replace(variation, element_square=None)))


def test_closing_it_midway_keeps_the_last_merge(live):
    merging, recipe, variation = live
    work = merging.update(recipe.with_(dtype="float32"), variation)
    next(work)
    work.close()
    assert finish(merging.update(recipe, variation)).computed == 0


def test_two_updates_at_once_each_get_their_own_merge(live):
    merging, recipe, variation = live
    recipes = [recipe.with_(overrides=(Override("*", {"target-a": share}),)) for share in (.25, .75)]
    wanted = [finish(LiveMerge().update(its, variation)).tensors for its in recipes]
    wrong = []

    def run(i: int) -> None:
        for _ in range(15):
            got = finish(merging.update(recipes[i], variation)).tensors
            wrong.extend(name for name, value in wanted[i].items() if not np.array_equal(got[name], value))

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


# ── ready to chat ────────────────────────────────────────────────────────────────────────────────────────────────────

def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_answers_with_the_logits_of_the_saved_folder(family, tmp_path, arch):
    recipe = recipe_of(family(arch), granularity="module")
    ready = chat_model(finish(LiveMerge().update(recipe)), "try")
    saved = finish(merge(recipe, tmp_path / "out")).folder
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert ready.name == "try" and ready.model.dtype == torch.float32
    assert torch.equal(answers(ready.model), answers(plain))
    assert ready.tokenizer.chat_template == transformers.AutoTokenizer.from_pretrained(saved).chat_template
    assert set(ready.stop_ids) >= {2}


def test_chatting_does_not_change_the_kept_numbers(live):
    merging, recipe, variation = live
    result = finish(merging.update(recipe, variation))
    before = {name: value.copy() for name, value in result.tensors.items()}
    with torch.no_grad():
        [parameter.zero_() for parameter in chat_model(result, "try").model.parameters()]
    assert all(np.array_equal(before[name], value) for name, value in result.tensors.items())


def test_a_tensor_the_architecture_lacks_is_no_random_number(live):
    merging, recipe, variation = live
    result = finish(merging.update(recipe, variation))
    outputs = [entry for entry in result.plan.outputs() if entry[0] != Q0]

    class Lacking(MergePlan):
        def outputs(self):
            return outputs

    lacking = LiveResult(Lacking(**{its.name: getattr(result.plan, its.name) for its in fields(MergePlan)}), result.tensors,
                         result.weights, 0)
    with pytest.raises(CheckpointError, match=f"1 matrices are missing, first {Q0}"):
        chat_model(lacking, "try")


def test_models_are_loaded_one_after_another(live):
    merging, recipe, variation = live
    result, done = finish(merging.update(recipe, variation)), []
    thread = threading.Thread(target=lambda: done.append(chat_model(result, "try")))
    with LOADING:  # as while chat.load works: it switches torch's default dtype for the whole process
        thread.start()
        time.sleep(0.5)
        assert not done
    thread.join()
    assert done


def test_a_model_transformers_does_not_know_is_an_error_for_people(tmp_path):
    folders = [save_checkpoint(tmp_path / name, {Q0: np.ones(4, np.float32) * i}, config={"model_type": "made-up"})
               for i, name in enumerate(("pivot", "a"))]
    with pytest.raises(CheckpointError, match=r"try: .*cannot be loaded") as caught:
        chat_model(finish(LiveMerge().update(recipe_of(folders))), "try")
    assert str(tmp_path) not in str(caught.value)


def test_memory_and_disk_agree_after_a_recipe_was_saved_and_read(tmp_path):
    folders = save_family(tmp_path / "models", "llama-tied", targets=3)
    recipe = recipe_of(folders, granularity="layer", overrides=(Override("*.mlp.*", {"target-c": .5}),))
    saved = finish(merge(recipe, tmp_path / "out")).folder
    again = finish(LiveMerge().update(Recipe.load(saved / "fusechat_recipe.yaml")))
    assert all(torch.equal(value, state_dict(again)[name]) for name, value in load_tensors(saved).items())
    assert "lm_head.weight" not in again.tensors and not [name for name in snapshot(tmp_path) if ".partial-" in name]


# ── every method ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_only_what_an_option_touches_is_computed_again(family):
    folders = family("llama")
    recipe = recipe_of(folders, method="ties", options={"density": .5})
    merging, count = LiveMerge(), len(load_tensors(folders[0]))

    def computed(**changes) -> int:
        changed = recipe.with_(**changes)
        result, anew = finish(merging.update(changed)), finish(LiveMerge().update(changed))
        assert all(np.array_equal(result.tensors[name], value) for name, value in anew.tensors.items())
        return result.computed

    assert computed() == count and computed() == 0
    assert computed(seed=5) == 0  # nothing in it is random
    assert computed(options={"density": Table((("*", .5), (Q0, .25)))}) == 1
    assert computed(options={"density": (.5, .25)}) == count
    assert computed(weights=(1, Table((("*", 1), (Q0, 2))))) == count
    assert computed(weights=(1, Table((("*", 1), (Q0, 3))))) == 1
    assert computed(exclude=(Q0,)) == 1 and computed(exclude=(Q0,), options={"density": .25}) == count - 1


def test_a_seed_counts_only_where_chance_plays(family):
    recipe = recipe_of(family("llama"), method="dare_linear", options={"density": .5})
    merging = LiveMerge()
    first = finish(merging.update(recipe))
    other = finish(merging.update(recipe.with_(seed=1)))
    assert other.computed == len(other.tensors) and not np.array_equal(first.tensors[Q0], other.tensors[Q0])
    assert finish(merging.update(recipe.with_(seed=1))).computed == 0


def test_another_method_computes_all_anew_though_its_settings_read_alike(family):
    recipe = recipe_of(family("llama"), method="dare_linear", options={"density": .5})
    merging = LiveMerge()
    finish(merging.update(recipe))
    result = finish(merging.update(recipe.with_(method="dare_ties")))
    assert result.computed == len(result.tensors)
