"""fusion.sources: what a person writes to name a model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from fusion.errors import CheckpointError
from fusion.merge import merge
from fusion.progress import finish
from fusion.recipe import Recipe
from fusion.sources import open_checkpoint, peek, written
from tests.conftest import save_checkpoint, save_family

TENSORS = {"model.embed_tokens.weight": np.arange(6, dtype=np.float32).reshape(3, 2)}


def test_a_folder_is_opened_under_the_name_given(tmp_path):
    folder = save_checkpoint(tmp_path / "m", TENSORS)
    assert (open_checkpoint(folder).name, open_checkpoint(str(folder), "mine").name) == ("m", "mine")


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_checkpoint(tmp_path / "gone")


def test_a_folder_with_a_plus_in_its_name_wins(tmp_path):
    folder = save_checkpoint(tmp_path / "a+b", TENSORS)
    assert open_checkpoint(folder).name == "a+b"
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_checkpoint(f"{tmp_path / 'gone'}+{folder}")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with outputs/mine in it."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "outputs" / "mine", TENSORS)
    return tmp_path


@pytest.mark.parametrize("ref", ["outputs/gone", "./outputs/gone", "./gone", "../outputs/gone", "./elsewhere/gone", "outputs/gone/",
                                 "outputs/mine+outputs/gone", "outputs/gone+outputs/mine", "./outputs/mine+./elsewhere/gone"])
@pytest.mark.parametrize("door", [open_checkpoint, peek])
def test_what_looks_like_a_folder_is_never_looked_up_on_the_hub(here, hub_log, ref, door):
    with pytest.raises(CheckpointError, match="no such folder"):
        door(ref)
    assert hub_log == []


def test_a_name_like_a_folders_can_still_mean_the_hub(here, hub_log):
    with pytest.raises(CheckpointError, match="outputs is a folder here; for a model on the Hub write outputs/gone@main"):
        open_checkpoint("outputs/gone")
    for ref in ("outputs/gone@main", "org/gone", "outputs/mine+org/gone"):
        with pytest.raises(CheckpointError, match="the Hub did not give it"):
            open_checkpoint(ref)
    assert {path.split("/revision")[0] for path in hub_log} == {"/api/models/outputs/gone", "/api/models/org/gone"}


@pytest.mark.parametrize(("ref", "kept"), [
    ("outputs/mine", "./outputs/mine"), ("outputs/mine+outputs/mine", "./outputs/mine+./outputs/mine"),
    ("outputs/mine+org/lora", "./outputs/mine+org/lora"), ("org/name@v1", "org/name@v1"), ("./outputs/mine", "./outputs/mine"),
    ("outputs", "outputs"), ("/outputs/mine", "/outputs/mine"), ("a/b/c", "a/b/c")])
def test_a_recipe_keeps_a_folder_as_a_folder(here, ref, kept):
    assert written(ref) == kept and written(kept) == kept


def test_a_recipe_of_another_machine_asks_the_hub_for_none_of_its_folders(tmp_path, monkeypatch, hub_log):
    names = [f"outputs/{folder.name}" for folder in save_family(tmp_path / "outputs", "llama")]
    monkeypatch.chdir(tmp_path)
    recipe = finish(merge(Recipe(names[0], tuple(names[1:]), method="linear"), tmp_path / "out")).recipe
    assert Recipe.load(tmp_path / "out" / "fusechat_recipe.yaml") == recipe
    shutil.rmtree(tmp_path / "outputs")
    with pytest.raises(CheckpointError, match="no such folder"):
        finish(merge(recipe, tmp_path / "again"))
    assert hub_log == []
