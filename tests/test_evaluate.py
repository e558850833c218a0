"""Models are measured: right answers, perplexity, public benchmarks; and the command that does it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fusion import demo
from fusion.__main__ import main
from fusion.demo.questions import questions
from fusion.errors import CheckpointError, RecipeError
from fusion.evaluate import Question, chosen, measure, named
from fusion.evaluate.models import load
from fusion.progress import finish
from fusion.sources import open_checkpoint
from tests.test_adapters import pair, save_adapter

PIVOT, QWEN = str(demo.FOLDER / "pivot"), str(demo.FOLDER / "source-qwen")


@pytest.fixture(scope="module")
def measured():
    return finish(measure(named([PIVOT, QWEN]), questions(2)))


def test_right_answers_are_those_that_the_demo_counts(measured):
    scores, _ = measured
    counted = finish(demo.check(demo.FOLDER, 2, ["pivot", "source-qwen"]))
    means = scores.means()
    for row, name in enumerate(scores.models):
        assert {domain: 100 * means[domain][0, row] for domain in counted[name]} == counted[name]


def test_every_answer_is_kept(measured):
    scores, records = measured
    assert len(records) == 2 * 16 and {record["model"] for record in records} == {"pivot", "source-qwen"}
    assert [record["right"] for record in records] == (scores.values.ravel() == 1).tolist()
    assert [record["finish"] != "stop" for record in records] == scores.truncated.ravel().tolist()


def test_an_answer_cut_off_is_flagged():
    asked = [Question("any", "Write a sentence with the words bridge and farmer.", bool),
             Question("any", "What is the capital of Norway? " * 100, bool)]
    scores, records = finish(measure({"pivot": PIVOT}, asked, max_new_tokens=3))
    assert scores.truncated.tolist() == [[True, True]] and records[0]["finish"] == "length" and records[0]["tokens"] == 3


def test_batches_answer_as_single_prompts_do(measured):
    _, records = measured
    some = records[:3]
    asked = [Question("any", record["prompt"], bool) for record in some]
    alone = [finish(measure({"pivot": PIVOT}, [question]))[1][0]["reply"] for question in asked]
    assert alone == [record["reply"] for record in some]


def test_names_are_short_and_different():
    assert named(["runs/1/last", "runs/2/last"]) == {"1/last": "runs/1/last", "2/last": "runs/2/last"}
    with pytest.raises(RecipeError, match="given twice"):
        named(["a", "a"])
    assert chosen("runs/a", {"a": "runs/a"}) == "a"
    with pytest.raises(RecipeError, match="Did you mean 'pivot'"):
        chosen("pivto", {"pivot": PIVOT})


def test_a_missing_model_fails_before_another_is_loaded(monkeypatch):
    monkeypatch.setattr("fusion.evaluate.tasks.load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(CheckpointError):
        finish(measure({"pivot": PIVOT, "nothing": "/nowhere"}, questions(1)))


def test_an_adapter_is_measured_with_its_base(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = open_checkpoint(PIVOT).info[name].shape
    down, up = np.full((1, shape[1]), 0.1, np.float32), np.ones((shape[0], 1), np.float32)
    adapter = save_adapter(tmp_path / "lora", pair(name, down, up))
    plain, changed = load(PIVOT, "pivot"), load(f"{PIVOT}+{adapter}", "changed")
    before, after = (model.model.state_dict()[name].numpy() for model in (plain, changed))
    assert np.allclose(after - before, 0.2, atol=1e-5)  # scale 2 · 0.1 · 1


def test_the_command_writes_tables_answers_and_json(tmp_path, capsys):
    out = tmp_path / "result"
    assert main(["evaluate", PIVOT, QWEN, "--prompts", "1", "--baseline", "pivot", "--out", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in data["table"]["rows"]] == ["pivot", "source-qwen"] and len(data["radar"]["axes"]) == 8
    assert json.loads((out / "results.json").read_text()) == data
    assert len((out / "answers.jsonl").read_text().splitlines()) == 16
    assert main(["evaluate", PIVOT, "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["evaluate", PIVOT, "--prompts", "0"]) == 2
