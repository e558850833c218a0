"""The whole pipeline on the demo models: every stage, nothing twice, one source more, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from fusion import Checkpoint, CheckpointError, MismatchError, OutputError, Recipe, RecipeError, demo
from fusion.__main__ import main
from fusion.demo.dialogues import conversation
from fusion.demo.family import RECIPES
from fusion.distill.fused import FusedData
from fusion.distill.targets import Blend
from fusion.merge import RECIPE_FILE as MERGE_RECIPE
from fusion.pairwise import FuseRecipe, Stage, cost, plan, run
from fusion.pairwise.cards import mass_note, mass_table
from fusion.pairwise.cost import forecast
from fusion.progress import finish
from fusion.train import Training
from tests.conftest import load_tensors, snapshot

TRAINING = Training(learning_rate=1e-3, batch=4, accumulate=1, max_steps=3, schedule="constant", warmup=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = Random(3)
    file = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
    records = [{"messages": conversation(RECIPES["pivot"].mixture, rng)} for _ in range(20)]
    file.write_text("\n".join(map(json.dumps, [*records, {"nothing": 1}])))
    return file


@pytest.fixture(scope="module")
def recipe(data):
    return FuseRecipe(str(demo.FOLDER / "pivot"), tuple(str(demo.FOLDER / name) for name in ("source-qwen", "source-neox")),
                      str(data), training=TRAINING)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("fused") / "run"
    notes = []
    return out, finish(run(recipe, out), lambda progress: notes.append(progress.stage)), notes


def test_every_stage_leaves_its_result(done, recipe):
    out, result, notes = done
    assert list(result.targets) == ["target-qwen", "target-neox"] and result.report["used"] == 20
    assert all(stage.done for stage in plan(recipe, out))
    pivot = Checkpoint(recipe.pivot)
    for folder in (*result.targets.values(), result.merged):
        made = Checkpoint(folder)
        assert {name: tensor.shape for name, tensor in made.info.items()} == {n: t.shape for n, t in pivot.info.items()}
        assert any((made[name] != pivot[name]).any() for name in pivot)
    assert "Distributions of source-qwen" in notes and "Training target-neox" in notes and "Merging the targets" in notes
    assert [reason["count"] for reason in result.report["reasons"]] == [1]


def test_cards_tell_what_was_made_from_what(done, recipe):
    out, result, _ = done
    card = (out / "README.md").read_text()
    assert "| used | 20 |" in card and "`merged/` is their merge" in card and str(out.parent) not in card
    for target, source in (("target-qwen", "source-qwen"), ("target-neox", "source-neox")):
        statistics, own = result.statistics[target], (result.targets[target] / "README.md").read_text()
        row = f"| {target} | {source} | {statistics['labels']:,} | {statistics['aligned'][source]:.1%} |"
        assert row in card and row in own and f"{statistics['chosen'][source]:.1%} |" in own
        mass = " | ".join(f"{statistics[name][source]:.1%}" for name in ("heard", "read", "kept", "unwritten", "emptied"))
        assert all(f"| {target} | {source} | {mass} |" in its and "that the pivot never writes here" in its for its in (card, own))
        history = json.loads((result.targets[target] / "training_history.json").read_text())
        assert f"| {target} | {history[-1]['step']} | {history[0]['loss']:.3f} → {history[-1]['loss']:.3f} |" in card
        assert own.startswith("---\nlibrary_name: transformers") and f"fusion with {source} on" in own
    mine = result.targets["target-qwen"] / "README.md"
    mine.write_text("my own words")
    finish(run(recipe, out))
    assert mine.read_text() == "my own words"


def test_alignment_statistics_add_up(done):
    for statistics in done[1].statistics.values():
        assert sum(statistics["chosen"].values()) == pytest.approx(1)
        for name, share in statistics["aligned"].items():
            assert 0.4 < share <= 1 and sum(statistics["kinds"][name].values()) == pytest.approx(1)


def test_nothing_is_done_twice(done, recipe):
    out, _, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = finish(run(recipe, out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert again.report == done[1].report


def test_fused_examples_are_read_piece_by_piece(done):
    fused = FusedData(done[0] / "work" / "fused" / "target-qwen")
    assert len(fused) == 20 and len(fused[-1].ids) == len(fused[19].ids)
    for example in fused:
        total = example.chances.astype(np.float64).sum(axis=1)
        assert ((total > 0.2) & (total < 1.001)).all() and len(example.labels) == len(total) == len(example.choice)
    statistics = done[1].statistics["target-qwen"]
    read, kept, odd, heard = (statistics[name]["source-qwen"] for name in ("read", "kept", "unwritten", "heard"))
    assert 0.5 < kept <= read < 1 and 0 <= odd < 0.2 and statistics["aligned"]["source-qwen"] <= heard <= 1
    assert 0 <= statistics["emptied"]["source-qwen"] < 0.1


def test_mass_is_told_by_the_plan_where_it_was_counted(done, recipe):
    statistics = done[1].statistics["target-qwen"]
    told = {stage.subject: stage.note for stage in plan(recipe, done[0]) if stage.name == "fused targets"}
    assert told["target-qwen"] == mass_note(statistics)
    assert f"{statistics['kept']['source-qwen']:.0%} of its mass kept" in mass_note(statistics)
    earlier = {name: its for name, its in statistics.items() if name not in ("read", "kept", "unwritten", "emptied", "heard")}
    assert list(mass_table({"target-qwen": earlier})) == [] and mass_note(earlier) == ""


def test_fused_targets_of_an_earlier_version_are_refused_in_words(done, recipe, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    file = tmp_path / "run/work/fused/target-qwen/plan.json"
    plan_before = json.loads(file.read_text())
    file.write_text(json.dumps({name: its for name, its in plan_before.items() if name != "form"}))
    with pytest.raises(CheckpointError, match=r"another version.*Remove this folder"):
        finish(run(recipe, tmp_path / "run"))
    shutil.rmtree(file.parent)
    finish(run(recipe, tmp_path / "run"))
    assert json.loads(file.read_text()) == plan_before


def test_one_more_source_costs_one_more_target_and_a_new_merge(recipe, tmp_path):
    one, out = recipe.with_(sources=recipe.sources[:1], names=recipe.names[:1], merge={"method": "linear"}), tmp_path / "run"
    first = finish(run(one, out))
    before = {path: path.read_bytes() for path in (*first.merged.rglob("*"), *first.targets["target-qwen"].rglob("*"))}
    assert first.merged == out / "merged" and plan(one, out)[-1].done and not plan(one, out)[-1].note
    stages = plan(recipe, out)
    assert [stage.done for stage in stages] == [True, True, True, False, True, False, True, False, False]
    assert stages[-1].note == "merged: of other targets or settings; the new one will be merged-2"
    second = finish(run(recipe, out))
    assert {path: path.read_bytes() for path in before} == before
    assert second.merged == out / "merged-2" and Recipe.load(second.merged / MERGE_RECIPE).names == ("target-qwen", "target-neox")
    assert plan(recipe, out)[-1] == Stage("merge", "varm", True, "in merged-2") and finish(run(recipe, out)).merged == second.merged
    card = (out / "README.md").read_text()
    assert "`merged-2/` is their merge" in card and "from before: `merged/`" in card


@pytest.mark.parametrize("change", [{"method": "linear"}, {"granularity": "layer"}, {"method": "slerp", "options": {"t": 0.25}}])
def test_a_merge_by_other_settings_is_no_longer_the_runs(done, recipe, tmp_path, change):
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    other = recipe.with_(merge=change)
    assert plan(recipe, out)[-1].done and not plan(other, out)[-1].done
    if change != {"granularity": "layer"}:
        return
    made = finish(run(other, out)).merged
    assert made == out / "merged-2" and Recipe.load(made / MERGE_RECIPE).granularity == "layer"
    assert finish(run(recipe, out)).merged == out / "merged" and not (out / "merged-3").exists()
    assert "`merged/` is their merge" in (out / "README.md").read_text()


def test_what_stands_in_the_way_of_a_merge_is_left_alone(done, recipe, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    shutil.rmtree(out / "merged")
    (out / "merged").mkdir()
    (out / "merged" / "mine.txt").write_text("keep")
    assert finish(run(recipe, out)).merged == out / "merged-2"
    assert snapshot(out / "merged") == {"mine.txt": b"keep"}


def test_another_recipe_is_not_mixed_in(done, recipe, tmp_path):
    with pytest.raises(MismatchError, match="top_k differ"):
        finish(run(recipe.with_(top_k=4), done[0]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not made by this program"):
        finish(run(recipe, tmp_path / "full"))
    assert snapshot(tmp_path / "full") == {"mine.txt": b"keep"}


def test_all_sources_at_once(recipe, tmp_path):
    result = finish(run(recipe.with_(mode="multi", blend=Blend(rule="avgce", level="turn", tail="renormalise")), tmp_path / "run"))
    for example in FusedData(tmp_path / "run/work/fused/target-multi"):  # as the loss sees them: no tail out of rounding to 16 bits
        assert example.chances.sum(axis=1) == pytest.approx(np.ones(len(example.labels)), abs=1e-6)
    assert list(result.targets) == ["target-multi"] and result.merged is None
    assert set(result.statistics["target-multi"]["chosen"]) == {"pivot", "source-qwen", "source-neox"}


def test_the_command(done, recipe, tmp_path, capsys):
    file = tmp_path / "fuse.yaml"
    file.write_text(recipe.to_yaml())
    assert main(["fuse", str(file), "--out", str(done[0]), "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.count("done") == 9 and "peak memory" in said and "estimated" not in said
    assert main(["fuse", str(file), "--out", str(done[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["used"] == 20


def test_a_plan_has_its_price_before_anything_is_done(recipe, tmp_path, capsys):
    file = tmp_path / "fuse.yaml"
    file.write_text(recipe.to_yaml())
    assert main(["fuse", str(file), "--out", str(tmp_path / "none"), "--plan", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dialogues"] == 20 and said["training"]["steps"] == 3 and "before they are split" in said["guessed"]
    assert all(stage["seconds"] > 0 and stage["memory_bytes"] > 0 and not stage["done"] for stage in said["stages"])
    file.write_text(recipe.with_(data="somebody/elsewhere", limit=300).to_yaml())
    assert main(["fuse", str(file), "--out", str(tmp_path / "none"), "--plan"]) == 0
    assert "as if there were 300 dialogues" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_all_models_without_a_template_are_named_with_the_word_to_write(recipe, tmp_path):
    bare = []
    for path in recipe.sources:
        bare.append(shutil.copytree(path, tmp_path / Path(path).name))
        (bare[-1] / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((bare[-1] / "tokenizer_config.json").read_text())
        (bare[-1] / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    without = recipe.with_(sources=tuple(map(str, bare)))
    for work in (lambda: forecast(without, tmp_path / "run"), lambda: finish(run(without, tmp_path / "run"))):
        with pytest.raises(CheckpointError, match=r"source-qwen.*source-neox.*`template: plain`"):
            work()
    assert not (tmp_path / "run" / "work" / "dialogues.jsonl").exists()
    assert forecast(without.with_(template="plain"), tmp_path / "other").dialogues == 20


def test_what_is_better_known_before_stands_in_the_plan(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "slowness_of_bfloat16", lambda: 4.2)
    asked = recipe.with_(training=Training(**{**vars(TRAINING), "bf16": True}), max_tokens=100_000)
    warnings = forecast(asked, tmp_path / "run").warnings
    assert any("4 times as slow" in said and "`bf16`" in said for said in warnings)
    assert any(said.startswith("pivot reads 1,024 tokens") for said in warnings), warnings
    assert not forecast(recipe.with_(max_tokens=512), tmp_path / "run").warnings
    monkeypatch.undo()
    assert cost.slowness_of_bfloat16() > 0


@pytest.mark.parametrize(("wish", "visible"), [("true", ""), ("", "0")])
def test_who_asks_for_the_processor_gets_it_beside_a_gpu(done, recipe, tmp_path, monkeypatch, wish, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", wish)
    file = tmp_path / "fuse.yaml"
    file.write_text(recipe.to_yaml())
    assert main(["fuse", str(file), "--out", str(done[0]), "--plan"]) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_two_processes_give_the_same_targets(recipe, tmp_path):
    small = recipe.with_(sources=recipe.sources[:1], names=recipe.names[:1], training=Training(**{
        **vars(TRAINING), "batch": 2, "max_steps": 2}))
    file = tmp_path / "fuse.yaml"
    file.write_text(small.to_yaml())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "assets/accelerate/cpu-two-processes.yaml",
               "-m", "fusion", "fuse", str(file), "--out", str(tmp_path / "two")]
    ran = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=200,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    assert ran.returncode == 0, ran.stderr[-2000:]
    alone = small.with_(training=Training(**{**vars(small.training), "batch": 4}))
    finish(run(alone, tmp_path / "one"))
    both = [load_tensors(tmp_path / name / "targets" / "target-qwen") for name in ("one", "two")]
    pivot = load_tensors(Path(recipe.pivot))
    moved = sum(float((both[0][name].float() - pivot[name].float()).norm()) for name in pivot)
    apart = sum(float((both[0][name].float() - both[1][name].float()).norm()) for name in pivot)
    assert moved > 0 and apart < 0.01 * moved
    history = [json.loads((tmp_path / name / "targets/target-qwen/training_history.json").read_text()) for name in ("one", "two")]
    assert [list(step.values()) for step in history[0]] == [pytest.approx(list(step.values()), rel=1e-3) for step in history[1]]


# ── the recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_recipes_round_trip(recipe):
    assert FuseRecipe.from_yaml(recipe.to_yaml()) == recipe
    rich = recipe.with_(blend=Blend(rule="avgce"), mode="multi", merge={"method": "ties"}, limit=5, template="plain")
    assert FuseRecipe.from_yaml(rich.to_yaml()) == rich


def test_every_problem_is_reported_with_its_line():
    text = ("fusechat_fuse: 1\npivot: p\nsources: [a, {paht: b}]\ndata: d\nmodee: multi\nblend:\n  rul: mince\n"
            "training:\n  batch: much\nmax_tokens: no\n")
    with pytest.raises(RecipeError) as error:
        FuseRecipe.from_yaml(text)
    said = str(error.value)
    assert all(word in said for word in ("line 3: sources", "line 5: modee", "'mode'", "line 7: blend: rul", "'rule'",
                                         "line 9: training: batch", "line 10: max_tokens"))


@pytest.mark.parametrize(("change", "word"), [
    ("mode: all", "pairwise"), ("top_k: 0", "not above 0"), ("blend: {rule: max}", "avgce"),
    ("training: {lm_weight: 2}", "lm_weight"),
    ("merge: {method: ties, options: {densty: 1}}", "density"), ("sources: [x/a, y/a, x/a]", "name of its own")])
def test_what_makes_no_sense_is_refused(change, word):
    text = "fusechat_fuse: 1\npivot: p\ndata: d\n" + ("sources: [a]\n" if "sources" not in change else "") + change + "\n"
    with pytest.raises(RecipeError, match=word):
        FuseRecipe.from_yaml(text)


def test_the_baseline_learns_the_labels_alone_and_asks_no_source(recipe, tmp_path):
    result = finish(run(recipe.with_(mode="sft"), tmp_path / "sft"))
    assert list(result.targets) == ["target-sft"] and result.merged is None
    assert [path.name for path in (tmp_path / "sft" / "work" / "distributions").iterdir()] == ["pivot"]
    history = json.loads((result.targets["target-sft"] / "training_history.json").read_text())
    assert all(row["loss"] == pytest.approx(row["clm"], rel=1e-4) and row["fusion"] == 0 for row in history)
