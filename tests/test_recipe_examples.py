"""The example recipes are run as they are shipped, and do what their comments say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from fusion.__main__ import main
from fusion.merge import RECIPE_FILE
from fusion.pairwise import FuseRecipe, run
from fusion.progress import finish
from fusion.recipe import Recipe, load_stages
from fusion.stages import merge_stages
from fusion.verify import verify
from tests.conftest import load_tensors

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "assets" / "recipes").glob("*.yaml"))
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """`merged(name)`: the folder of an example, merged once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            stages = load_stages(ROOT / "assets" / "recipes" / f"{name}.yaml")
            made[name] = finish(merge_stages(stages, tmp_path_factory.mktemp("examples") / name)).folder
        return made[name]
    return run


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def demo(name: str) -> dict[str, torch.Tensor]:
    return load_tensors(ROOT / "assets" / "demo" / name)


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_every_example_merges_into_a_model_that_runs_and_can_be_verified(merged, name):
    folder = merged(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    assert finish(verify(folder)).findings == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_says_what_it_does_and_how_to_run_it(path):
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith("# ") and first.endswith(".")
    assert second == f"#   python -m fusion merge assets/recipes/{path.name} --out outputs/{path.stem}"


def test_no_two_examples_make_the_same_model(merged):
    digests = {load_stages(merged(path.stem) / RECIPE_FILE)[-1].result["digest"] for path in EXAMPLES}
    assert len(digests) == len(EXAMPLES)


def test_the_slerp_example_goes_from_one_target_to_the_other_with_depth(merged):
    got, first, second = load_tensors(merged("demo-slerp")), demo("target-qwen"), demo("target-neox")
    shares = []
    for layer in range(4):
        name = UP.format(layer)
        far, way = (second[name] - first[name]).double(), (got[name] - first[name]).double()
        shares.append(float((way * far).sum() / (far * far).sum()))
    assert shares == pytest.approx(np.interp([0, 1 / 3, 2 / 3, 1], [0, .5, 1], [.1, .3, .9]), abs=.01)


def test_the_stacked_example_has_six_layers_copied_from_two_targets(merged):
    got, first, second = load_tensors(merged("demo-stacked")), demo("target-qwen"), demo("target-neox")
    for layer, (source, its) in enumerate([(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)]):
        assert torch.equal(got[UP.format(layer)], source[UP.format(its)])
    assert UP.format(6) not in got


def test_the_edited_example_keeps_norms_and_gives_the_first_attention_by_hand(merged):
    got, pivot, first, second = load_tensors(merged("demo-edited")), demo("pivot"), demo("target-qwen"), demo("target-neox")
    norm, query = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(got[norm], pivot[norm].float())
    assert torch.allclose(got[query], .7 * first[query].float() + .3 * second[query].float(), atol=1e-6)


def test_the_dare_example_depends_on_its_seed(merged, tmp_path):
    recipe = Recipe.load(merged("demo-dare-ties") / RECIPE_FILE)
    assert recipe.seed == 7
    other = finish(merge_stages((recipe.with_(seed=8),), tmp_path / "other")).folder
    assert not torch.equal(load_tensors(other)[UP.format(1)], load_tensors(merged("demo-dare-ties"))[UP.format(1)])


# ── fusion ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_demo_can_be_fused_as_its_recipe_says(tmp_path, capsys):
    text = (ROOT / "assets" / "recipes" / "fuse" / "demo.yaml").read_text()
    commands = [line.removeprefix("#   python -m fusion ").split() for line in text.splitlines() if "python -m fusion" in line]
    assert [command[0] for command in commands] == ["demo", "fuse"]
    data, out = tmp_path / "dialogues.jsonl", tmp_path / "out"
    commands[0][commands[0].index("--out") + 1], commands[0][-1] = str(data), "4"
    assert main(commands[0]) == 0 and len(data.read_text().splitlines()) == 4
    assert main(commands[0]) == 2 and "exists" in capsys.readouterr().err
    small = FuseRecipe.from_yaml(text).with_(data=str(data))
    small = small.with_(training=replace(small.training, max_steps=1, batch=2))
    done = finish(run(small, out))
    assert list(done.targets) == ["target-qwen", "target-neox", "target-gemma"] and (done.merged / "model.safetensors").is_file()


def test_the_setting_of_7b_is_the_papers():
    recipe = FuseRecipe.load(ROOT / "assets" / "recipes" / "fuse" / "7b.yaml")
    training = recipe.training
    assert (recipe.max_tokens, recipe.top_k, recipe.blend.rule, training.lm_weight, training.epochs) == (2048, 10, "mince", 0.9, 3)
    for path in (ROOT / "assets" / "accelerate").glob("*.yaml"):
        text = path.read_text()
        config = yaml.safe_load(text)
        assert f"--config_file assets/accelerate/{path.name}" in text
        assert (ROOT / re.search(r"-m fusion fuse (\S+)", text)[1]).is_file()
        if config["num_processes"] == 8:
            assert 8 * training.batch * training.accumulate == 128 and config["mixed_precision"] == "bf16" and training.bf16
