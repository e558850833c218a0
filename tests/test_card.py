"""fusion.card: what a model card says of a merge to people and to the Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from fusion.merge import merge
from fusion.pairwise.cards import target_card
from fusion.pairwise.recipe import FuseRecipe
from fusion.progress import finish
from fusion.recipe import Recipe
from fusion.sources import hub_ids
from fusion.stages import merge_stages
from tests.conftest import save_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"


def metadata(card: str) -> dict:
    """The front matter of a card, as the Hub reads it."""
    return yaml.safe_load(card.split("---")[1])


def model(folder: Path, number: float) -> str:
    return str(save_checkpoint(folder, {UP: np.full(2, number, np.float32)}))


def card_of(pivot: str, *targets: str, out: Path) -> dict:
    folder = finish(merge(Recipe(pivot, targets, method="linear"), out)).folder
    return metadata((folder / "README.md").read_text(encoding="utf-8"))


def test_only_models_of_the_hub_are_named_as_base(tmp_path):
    pivot = model(tmp_path / "hub/models--org--the.base/snapshots/0123abc", 0)
    local, odd = model(tmp_path / "my-model", 1), model(tmp_path / "org" / "ganz 🙂", 2)
    assert card_of(pivot, local, odd, out=tmp_path / "one") == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": ["org/the.base"],
        "base_model_relation": "merge", "tags": ["merge", "fusechat"]}
    without = card_of(local, odd, out=tmp_path / "two")
    assert without == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["merge", "fusechat"]}


def test_a_folder_that_looks_like_a_name_of_the_hub_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("org/pivot", "org/a")):
        model(Path(name), i)
    assert "base_model" not in card_of("org/pivot", "org/a", out=tmp_path / "out")


def test_the_models_of_all_stages_are_named_and_no_stage(tmp_path):
    pivot, a, b = (model(tmp_path / f"models--org--{name}/snapshots/1", i) for i, name in enumerate("pab"))
    stages = (Recipe(pivot, (a,), names=("a",), method="linear", name="not/amodel"),
              Recipe(pivot, ("not/amodel", b), names=("first", "b"), method="linear"))
    folder = finish(merge_stages(stages, tmp_path / "out")).folder
    assert metadata((folder / "README.md").read_text())["base_model"] == ["org/p", "org/b", "org/a"]


@pytest.mark.parametrize(("ref", "ids"), [
    ("org/name", ("org/name",)), ("org/name@v2", ("org/name",)), ("org/base+other/lora@1", ("org/base", "other/lora")),
    ("/models/x", ()), ("../x", ()), ("name", ())])
def test_ids_are_read_off_what_a_person_wrote(ref, ids):
    assert hub_ids(ref) == ids


@pytest.mark.parametrize(("pivot", "named"), [("org/base@main", ["org/base"]), ("assets/demo/pivot", None)])
def test_a_fused_targets_card_names_its_pivot_only_where_the_hub_has_it(pivot, named):
    recipe = FuseRecipe(pivot=pivot, sources=("org/one",), data="org/data")
    statistics = {"aligned": {}, "kinds": {}, "chosen": {}, "labels": 1}
    found = metadata(target_card(recipe, "target", ["one"], statistics, []))
    assert found.get("base_model") == named and found.get("base_model_relation") == (named and "finetune")
    assert found["tags"] == ["fusechat", "distillation"]
