"""What the page may do: keys are looked up, strangers stay out of the disk, edits and recipes mean the same everywhere."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from components.comparing import compared
from components.heatmap import WAITING, Edit
from components.models import verdict
from components.page import build
from components.reports import reviewed
from components.state import MergeRef, Selection, Settings
from components.studio import Studio
from components.variation import _recipe_text, edited, grid_of
from fusion import FusionError, OutputError, Recipe, RecipeError, ResourceError, demo, finish, live
from tests.browser import two_targets
from tests.conftest import save_family, snapshot


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return two_targets(Studio(outputs=tmp_path_factory.mktemp("studio") / "outputs"))


@pytest.fixture(scope="module")
def picked(studio):
    return studio.first_selection()


def test_the_demo_family_is_picked_first(studio, picked):
    assert picked.pivot == "demo/pivot"
    assert len(picked.targets) >= 2 and len(picked.sources) >= 2
    assert studio.preflight(picked).level == "good"
    assert set(studio.examples) >= {"math", "writing"}


def test_the_page_says_that_it_measures_before_it_has(studio):
    parts = build(studio).get_config_file()["components"]
    assert [part["props"]["value"] for part in parts if part["props"].get("elem_id") == "heatmap"] == [WAITING]


@pytest.mark.parametrize("key", ["", "../pivot", "demo/../demo/pivot", "/etc", "demo/pivot\0", None, 3, ["demo/pivot"]])
def test_only_keys_of_the_catalogue_open_a_model(studio, key):
    with pytest.raises(RecipeError):
        studio.checkpoint(key)
    with pytest.raises(FusionError), studio.chat_model(key, Selection()):
        pass


def test_a_merge_is_private_to_the_visitor_who_made_it(studio, picked):
    made = finish(studio.try_merge(picked, Settings()))
    mine = picked.with_merge(made)
    with studio.chat_model(made.key, mine) as model:
        assert model.name == made.title
    with pytest.raises(RecipeError), studio.chat_model(made.key, picked):
        pass
    assert studio.role(made.key, mine) == "merge"


def test_a_forged_merge_reference_opens_nothing(studio, picked):
    forged = picked.with_merge(MergeRef("merge/0", "VARM #1"))
    with pytest.raises(RecipeError), studio.chat_model("merge/0", forged):
        pass


def test_a_merge_that_left_memory_is_made_again(studio, picked):
    import torch

    made = finish(studio.try_merge(picked, Settings(granularity="layer")))
    mine, ids = picked.with_merge(made), torch.arange(3, 30)[None]
    with studio.chat_model(made.key, mine) as model, torch.no_grad():
        before = model.model(ids).logits
    studio.pool.drop(made.key)
    with studio.chat_model(made.key, mine) as model, torch.no_grad():
        assert torch.equal(model.model(ids).logits, before)


def test_a_merge_larger_than_the_memory_set_aside_is_refused(picked, tmp_path):
    small = Studio(outputs=tmp_path / "outputs", budget_bytes=1_000_000)
    with pytest.raises(ResourceError, match="set aside"):
        finish(small.try_merge(picked, Settings()))


def test_strangers_can_neither_open_folders_nor_save(tmp_path):
    public = Studio(outputs=tmp_path / "outputs", public=True)
    with pytest.raises(RecipeError, match="public"):
        public.add_folder(str(demo.FOLDER / "pivot"))
    with pytest.raises(RecipeError, match="public"):
        public.output_folder("mine")
    with pytest.raises(RecipeError, match="does not offer"):
        public.adopt(Recipe(str(demo.FOLDER / "pivot"), (str(tmp_path),)))
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a b", "ä", "x" * 65, None])
def test_an_output_is_a_plain_name(studio, name):
    with pytest.raises(RecipeError, match="folder name"):
        studio.output_folder(name)


def test_an_output_never_replaces_a_folder(tmp_path):
    studio = Studio(outputs=tmp_path / "outputs")
    (tmp_path / "outputs" / "there").mkdir(parents=True)
    with pytest.raises(OutputError, match="exists"):
        studio.output_folder("there")
    assert studio.output_folder("new") == tmp_path / "outputs" / "new"


def test_folders_of_the_launch_option_and_earlier_outputs_are_offered(tmp_path):
    made = save_family(tmp_path / "models", "llama")
    studio = Studio(tmp_path / "models", tmp_path / "models")
    keys = {entry.key for entry in studio.entries()}
    assert {f"models/{made[0].name}", f"outputs/{made[0].name}"} <= keys
    titles = [entry.title for entry in studio.entries()]
    assert len(set(titles)) == len(titles)


def test_a_model_whose_folder_was_removed_is_looked_up_nowhere(tmp_path, monkeypatch, hub_log):
    monkeypatch.chdir(tmp_path)
    pivot, *targets = (f"outputs/{folder.name}" for folder in save_family(tmp_path / "outputs", "llama"))
    studio, now = Studio(outputs=Path("outputs")), Selection(pivot, tuple(targets), tuple(targets))
    recipe = studio.recipe(now, Settings(method="linear"))
    assert recipe.pivot == f"./{pivot}" and studio.adopt(recipe)[0].targets == now.targets
    shutil.rmtree(tmp_path / targets[0])
    for work in (lambda: finish(studio.try_merge(now, Settings(method="linear"))), lambda: finish(studio.measure(now)),
                 lambda: studio.recipe(now, Settings()), lambda: finish(compared(studio, pivot, targets[0], now)),
                 lambda: finish(reviewed(studio, targets[0], now)), lambda: studio.chat_model(targets[0], now).__enter__(),
                 lambda: studio.folder_name(targets[0]), lambda: studio.preflight(now),
                 lambda: finish(live.LiveMerge().update(recipe))):
        with pytest.raises(FusionError, match=r"its folder was removed|there is no such folder"):
            work()
    assert "its folder was removed" in verdict(studio, now) and hub_log == []


def test_settings_become_the_recipe_they_say(studio, picked):
    wish = Settings(method="linear", weights=(1.0, 3.0), exclude=("*norm*",), dtype="float32", donor=picked.targets[1])
    recipe = studio.recipe(picked, wish)
    assert recipe.weights == (1.0, 3.0) and recipe.exclude == ("*norm*",) and recipe.dtype == "float32"
    assert recipe.donor == recipe.names[1]
    assert studio.recipe(picked, wish.with_method("varm")).weights == ()


def test_a_recipe_taken_in_comes_out_the_same(studio, picked):
    name = "model.layers.0.self_attn.q_proj.weight"
    wish = Settings(granularity="module", exclude=("*norm*",), donor=picked.targets[0])
    wish = wish.with_given({name: {picked.targets[0]: 0.25}})
    recipe = studio.recipe(picked, wish)
    now, again = studio.adopt(Recipe.from_yaml(recipe.to_yaml()))
    assert (now.pivot, now.targets) == (picked.pivot, picked.targets)
    assert studio.recipe(now, again) == recipe


def test_edits_follow_the_target_not_its_place(studio, picked):
    finish(studio.measure(picked))
    grid, name = grid_of(studio, picked, Settings()), "model.layers.0.self_attn.q_proj.weight"
    wish = edited(Settings(), Edit(1, (name,), "set", 0.8), grid, picked.targets)
    turned = replace(picked, targets=picked.targets[::-1])
    finish(studio.measure(turned))
    row = grid_of(studio, turned, wish).weight[grid.tensors.index(name)]
    assert row[0] == pytest.approx(0.8) and row.sum() == pytest.approx(1)


def test_set_lock_and_reset(studio, picked):
    finish(studio.measure(picked))
    grid, name = grid_of(studio, picked, Settings()), "model.layers.0.mlp.up_proj.weight"
    t = grid.tensors.index(name)
    locked = edited(Settings(), Edit(0, (name,), "lock", None), grid, picked.targets)
    assert locked.given()[name][picked.targets[0]] == pytest.approx(grid.weight[t, 0])
    at_layer = grid_of(studio, picked, replace(locked, granularity="model"))
    assert at_layer.weight[t, 0] == pytest.approx(grid.weight[t, 0]) and at_layer.fixed[t, 0]
    reset = edited(locked, Edit(0, (name,), "reset", None), grid, picked.targets)
    assert reset.given() == {}
    first = edited(Settings(), Edit(0, (name,), "set", 0.3), grid, picked.targets)
    both = edited(first, Edit(1, (name,), "set", 0.9), grid, picked.targets)
    assert both.given()[name] == {picked.targets[0]: pytest.approx(0.1), picked.targets[1]: 0.9}


def test_states_can_be_hashed_so_that_changes_are_seen():
    one = Settings().with_given({"a": {"b": 0.5}})
    assert hash(one) != hash(Settings()) and one == Settings().with_given({"a": {"b": 0.5}})


def test_the_error_of_a_broken_folder_does_not_show_its_path(tmp_path):
    broken = tmp_path / "models" / "secret-place" / "broken"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")
    studio = Studio(tmp_path / "models", tmp_path / "none", public=True)
    key = next(entry.key for entry in studio.entries() if "broken" in entry.key)
    with pytest.raises(FusionError) as caught:
        studio.checkpoint(key)
    assert str(tmp_path) not in str(caught.value)


def test_the_variation_report_stands_while_the_recipe_lacks_something(tmp_path):
    studio = Studio(outputs=tmp_path / "outputs")
    now = studio.first_selection()
    assert _recipe_text(studio, now, Settings()).startswith("fusechat:")
    assert _recipe_text(studio, now, Settings().with_method("passthrough")).startswith("# recipe: targets: passthrough takes 1")
