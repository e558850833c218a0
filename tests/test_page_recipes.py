"""Recipes on the page: what is loaded is what stands there, whatever stood there before; each control sets its own field."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import gradio as gr
import pytest
from gradio.blocks import Block

from components.merging import setting
from components.merging.setting import read
from components.page import build
from components.state import Settings
from components.studio import Studio
from fusion import METHODS, Recipe, RecipeError
from fusion.recipe import stages_from_yaml
from fusion.weights import matching

RECIPES = {path.stem: path.read_text() for path in sorted((Path(__file__).parents[1] / "assets" / "recipes").glob("*.yaml"))
           if len(stages_from_yaml(path.read_text())) == 1}
SHOWN = ("family", "method", "formula", "form", "granularity", "measure", "rule", "temperature", "glance", "exclude", "slices",
         "stacked", "seed", "vocabulary", "dtype", "donor")
CONTROLS = ("method", "granularity", "measure", "rule", "temperature", "exclude", "slices", "seed", "vocabulary", "dtype", "donor")


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio(outputs=tmp_path_factory.mktemp("recipes") / "outputs")


@pytest.fixture(scope="module")
def page(studio):
    return build(studio)


@pytest.fixture(scope="module")
def load(page):
    return next(event.fn for event in page.fns.values() if event.api_name == "load_recipe")


def controls(studio, now, wish) -> dict[str, object]:
    """What the plain controls show of settings."""
    values = [value.constructor_args.get("value") if isinstance(value, Block) else value
              for value in setting._shown(studio, now, wish)]
    return {name: value for name, value in zip(SHOWN, values, strict=False) if name in CONTROLS}


def meaning(recipe: Recipe, names: list[str]) -> tuple:
    """A recipe with its patterns written out, as plain data."""
    edits = {name: dict(its.weights) for its in recipe.overrides for name in matching(its.tensors, names, "overrides")}
    return recipe.with_(overrides=()).explicit().to_dict(), edits


def test_a_recipe_is_loaded_as_it_is_from_whatever_stood_there(studio, load):
    """Every shipped recipe after every method, more than twenty in a row; leaving a field that shows it changes nothing."""
    loads = 0
    for method in METHODS:
        for name, text in RECIPES.items():
            before = Settings(seed=3, exclude=("*norm*",)).with_method(method)
            old = controls(studio, studio.first_selection(), before)
            now, wish, said = load(text, studio.first_selection())
            tensors = list(studio.checkpoint(now.pivot))
            assert "is loaded" in said
            assert meaning(studio.recipe(now, wish), tensors) == meaning(Recipe.from_yaml(text), tensors), name
            for control, value in controls(studio, now, wish).items():
                assert read(control, value, now, wish) == wish, (name, control)
            for control, value in old.items():  # a field that still shows what was before can spoil itself alone
                if control not in ("method", "slices"):
                    spoilt = read(control, value, now, wish)
                    assert replace(spoilt, **{control: getattr(wish, control)}) == wish, (name, control)
            loads += 1
    assert loads >= 20


def test_no_control_acts_on_what_a_recipe_writes_into_it(page):
    """`change` also comes when a recipe sets a control: none of those that make settings listens to it."""
    (settings,) = {block for block in page.blocks.values() if isinstance(block, gr.State) and isinstance(block.value, Settings)}
    writers = [event for event in page.fns.values() if settings in event.outputs]
    assert len(writers) >= len(CONTROLS)
    heard = {(page.blocks[its].elem_id, kind) for event in writers for its, kind in event.targets if its in page.blocks}
    assert ("seed", "blur") in heard and not {name for name, kind in heard if kind == "change"}


@pytest.mark.parametrize(("name", "value", "kept"), [
    ("seed", 7, 7), ("seed", -1, 0), ("seed", True, 0), ("seed", "9", 0), ("temperature", 0.5, 0.5), ("temperature", 0, 1.0),
    ("exclude", " a \n\n a\nb", ("a", "b")), ("exclude", None, ()), ("dtype", "float16", "float16"), ("donor", "x", "x"),
    ("granularity", "layer", "layer"), ("vocabulary", None, "")])
def test_a_control_sets_its_own_field(studio, name, value, kept):
    wish = Settings("linear", weights=(0.25, 0.75), seed=5, exclude=("*norm*",), dtype="float32")
    now = read(name, value, studio.first_selection(), wish)
    assert [its.name for its in fields(wish) if getattr(now, its.name) != getattr(wish, its.name)] in ([name], [])
    assert getattr(now, name) == kept


@pytest.mark.parametrize(("name", "value"), [("method", "vram"), ("method", None), ("granularity", "atom"), ("dtype", "int9"),
                                             ("slices", "A 9-"), ("rule", "")])
def test_a_value_that_no_control_has_is_refused(studio, name, value):
    with pytest.raises(RecipeError):
        read(name, value, studio.first_selection(), Settings())
