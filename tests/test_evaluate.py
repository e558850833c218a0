"""Models are measured: right answers, perplexity, public benchmarks; and the command that does it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from fusion import demo
from fusion.__main__ import main
from fusion.demo.questions import questions
from fusion.distill.dialogues import Dialogue
from fusion.errors import CheckpointError, FusionError, RecipeError
from fusion.evaluate import (
    Lent,
    Question,
    by_lm_eval,
    by_perplexity,
    by_questions,
    chosen,
    document,
    named,
    perplexity,
)
from fusion.evaluate.models import load
from fusion.evaluate.tasks import measure
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
    monkeypatch.setattr("fusion.evaluate.models.load", lambda *_: pytest.fail("a model was loaded"))
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


def test_only_some_domains_are_asked(capsys):
    assert main(["evaluate", PIVOT, "--prompts", "1", "--only", "math,stem", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["table"]["columns"] == ["math", "stem", "average"]
    assert main(["evaluate", PIVOT, "--only", "maths"]) == 2 and "Did you mean 'math'?" in capsys.readouterr().err
    assert main(["evaluate", PIVOT, "--only", "math", "--lm-eval", "arc"]) == 2 and "eight domains" in capsys.readouterr().err


def test_a_model_that_is_lent_is_asked_as_it_lies_in_memory():
    model, lent = load(PIVOT, "pivot"), []

    @contextlib.contextmanager
    def opened():
        lent.append("out")
        try:
            yield model
        finally:
            lent.append("back")

    its = Lent("in memory", opened, "any")
    asked, text = questions(1), perplexity.from_text("The capital of Norway is Oslo.\n\nI need a sentence.")
    done = finish(by_questions({"pivot": PIVOT, "lent": its}, asked, baseline="pivot"))
    assert lent == ["out", "back"] and (done.scores.values[0] == done.scores.values[1]).all()
    assert done.to_dict()["settings"]["models"] == {"pivot": PIVOT, "lent": "in memory"}
    work = by_questions({"lent": its}, asked)
    for _ in range(3):
        next(work)
    work.close()
    assert lent == ["out", "back"] * 2  # a stopped evaluation gives it back
    read = finish(by_perplexity({"pivot": PIVOT, "lent": its}, text))
    assert read.settings["data"] == "2 texts, pasted" and len(lent) == 6
    assert np.array_equal(read.scores.values[0], read.scores.values[1])
    json.loads(document(read))


def test_the_package_is_cheap_to_import():
    code = "import sys, fusion.evaluate; sys.exit(bool({'torch', 'transformers', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ── perplexity ───────────────────────────────────────────────────────────────────────────────────────────────────────

ASKED, SAID = "What is the capital of Norway?", "The capital of Norway is Oslo."


def by_hand(text_before: str, text: str, path: str = PIVOT) -> tuple[float, int]:
    """Nats and tokens of `text` after `text_before`, by transformers alone."""
    import torch

    model = load(path, "model")
    first, ids = model.encode(text_before), model.encode(text_before + text)
    assert ids[:len(first)] == first
    with torch.inference_mode():
        scores = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(scores[i - 1, ids[i]]) for i in range(len(first), len(ids))), len(ids) - len(first)


def test_perplexity_of_a_dialogue_by_hand(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [{"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]}, {"no": "dialogue"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    scores, records = finish(perplexity.measure({"pivot": PIVOT, "qwen": QWEN}, perplexity.read(str(file))))
    nats, tokens = by_hand(f"<|begin|><|user|>{ASKED}<|end|><|assistant|>", f"{SAID}<|end|>")
    assert records[0]["nats"] == pytest.approx(nats, rel=1e-4) and records[0]["tokens"] == tokens
    assert [record["characters"] for record in records] == [len(SAID)] * 2
    means = scores.means()
    assert means["nats per token"][0, 0] == pytest.approx(nats / tokens, rel=1e-4)
    assert means["nats per character"][0, 0] == pytest.approx(nats / len(SAID), rel=1e-4)
    assert perplexity.per_token(scores)["pivot"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def with_start(folder: Path) -> str:
    """A copy of the pivot whose tokenizer puts <|begin|> before every text."""
    shutil.copytree(PIVOT, folder)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_str(file.read_text())
    at = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=[
        ("<|begin|>", at), ("<|end|>", tokenizer.token_to_id("<|end|>"))])
    file.write_text(tokenizer.to_str())
    return str(folder)


@pytest.mark.parametrize("kind", ["dialogues", "texts"])
def test_a_model_without_rows_for_its_tokens_reads_none_of_them(tmp_path, monkeypatch, kind):
    file = tmp_path / "a.txt"
    file.write_text("Two words.")
    data = perplexity.read(str(file)) if kind == "texts" else perplexity.Data((Dialogue((("Hi", "Two words."),)),), (), ("a",))
    assert finish(perplexity.measure({"pivot": PIVOT}, data))[0].values.shape == (1, 2)
    monkeypatch.setattr("fusion.evaluate.perplexity.rows_of", lambda model: 5)
    with pytest.raises(RecipeError, match="beyond the 5 rows of its embedding"):
        finish(perplexity.measure({"pivot": PIVOT}, data))


def test_perplexity_of_plain_text_begins_as_the_tokenizer_does(tmp_path):
    """A start token only where the tokenizer puts one: elsewhere the first token is context."""
    file = tmp_path / "data.txt"
    file.write_bytes(b"\xef\xbb\xbf" + f"{SAID}\r\n\r\n\r\n\r\n{ASKED}".encode())
    data = perplexity.read(str(file))
    assert data.texts == (SAID, ASKED)
    _, (begun, _, bare, _) = finish(perplexity.measure({"begun": with_start(tmp_path / "model"), "qwen": QWEN}, data))
    assert (begun["nats"], begun["tokens"]) == pytest.approx(by_hand("<|begin|>", SAID), rel=1e-4)
    assert begun["characters"] == len(SAID) and not begun["truncated"]
    first = load(QWEN, "qwen").decode(load(QWEN, "qwen").encode(SAID)[:1])
    expected = by_hand(first, SAID[len(first):], QWEN)
    assert SAID.startswith(first) and (bare["nats"], bare["tokens"]) == pytest.approx(expected, rel=1e-4)
    assert bare["characters"] == len(SAID) - len(first)


def test_short_replies_are_measured_and_not_the_header(tmp_path):
    """The letters of the header are certain; those of a reply are not."""
    file = tmp_path / "data.jsonl"
    answers = ("a", "i", "A", "C", "1", "s")
    file.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": said}]})
                              for said in answers))
    _, records = finish(perplexity.measure({"pivot": PIVOT}, perplexity.read(str(file))))
    for answer, record in zip(answers, records, strict=True):
        expected = by_hand(f"<|begin|><|user|>{ASKED}<|end|><|assistant|>", f"{answer}<|end|>")
        assert (record["nats"], record["tokens"]) == pytest.approx(expected, rel=1e-4) and record["characters"] == 1


def test_what_a_model_cannot_be_shown_is_left_out_with_its_reason(tmp_path):
    folder, file = tmp_path / "shouting", tmp_path / "data.jsonl"
    shutil.copytree(PIVOT, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    loud = "{% for m in messages %}{{ m['content'] | replace('Oslo', 'OSLO') }}<|end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(loud)
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    file.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": said}]})
                              for said in (SAID, "It is cold.")))
    done = finish(by_perplexity({"pivot": PIVOT, "shouting": str(folder)}, str(file)))
    assert done.scores.title == "Loss on 1 of 2 dialogues" and "nats" in done.scores.unit
    (note,) = [note for note in done.table.notes if "cannot read" in note]
    assert note.startswith("shouting cannot read 1 of the pieces: the chat template does not show a reply as it is")
    assert next(record["unread"] for record in done.records if "unread" in record) in note
    assert f"pivot {perplexity.per_token(done.scores)['pivot']:,.4g}" in " ".join(done.table.notes)


def test_plain_text_may_come_as_records(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in (SAID, " ", ASKED, "more")))
    assert perplexity.read(str(file), 2).texts == (SAID, ASKED)
    for line, kind in (('{"no": 1}', RecipeError), ("[1]", RecipeError), ("{", CheckpointError)):
        file.write_text(json.dumps({"text": "x"}) + "\n" + line)
        with pytest.raises(kind):
            perplexity.read(str(file))


def test_long_texts_are_read_in_windows_and_long_dialogues_are_flagged(tmp_path, monkeypatch):
    plain, talk = tmp_path / "data.txt", tmp_path / "data.json"
    plain.write_text(SAID)
    talk.write_text(json.dumps([{"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]}]))
    whole = finish(perplexity.measure({"pivot": PIVOT}, perplexity.read(str(plain))))[1][0]
    monkeypatch.setattr("fusion.evaluate.perplexity.context_of", lambda config: 15)
    windows = finish(perplexity.measure({"pivot": PIVOT}, perplexity.read(str(plain))))[1][0]
    monkeypatch.setattr("fusion.evaluate.perplexity.context_of", lambda config: 5)
    smaller = finish(perplexity.measure({"pivot": PIVOT}, perplexity.read(str(plain))))[1][0]
    assert whole == windows and smaller["tokens"] == whole["tokens"] and smaller["nats"] != whole["nats"]
    length = len(load(PIVOT, "pivot").encode(f"<|begin|><|user|>{ASKED}<|end|><|assistant|>"))
    monkeypatch.setattr("fusion.evaluate.perplexity.context_of", lambda config: length + 3)
    scores, (record,) = finish(perplexity.measure({"pivot": PIVOT}, perplexity.read(str(talk))))
    ids = load(PIVOT, "pivot").encode(SAID)
    assert scores.truncated.all() and record["tokens"] == 2
    assert record["characters"] == len(load(PIVOT, "pivot").decode(ids[:2]))


def test_perplexity_is_a_command(tmp_path, capsys):
    file = tmp_path / "data.txt"
    file.write_text(f"{SAID}\n\n{ASKED}\n\nHello!")
    assert main(["evaluate", PIVOT, QWEN, "--perplexity", str(file), "--baseline", "pivot", "--prompts", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "perplexity" and data["table"]["columns"] == ["nats per token", "nats per character"]
    assert [row["answers"] for row in data["table"]["rows"]] == [2, 2] and data["table"]["rows"][1]["p"] is not None
    file.write_text("\n\n")
    assert main(["evaluate", PIVOT, "--perplexity", str(file)]) == 2 and "no text" in capsys.readouterr().err


# ── lm-eval ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_lm_eval_when_it_is_installed(monkeypatch, capsys):
    def evaluate(model, tasks, limit, log_samples):
        assert model.pretrained.config.model_type == "llama" and model.tokenizer and limit == 4
        results = {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25,
                           "acc_norm_stderr,none": "N/A"},
                   "gsm": {"exact_match,strict": 1.0, "exact_match_stderr,strict": 0.0}}
        return {"results": {name: results[name] for name in tasks}, "n-samples": {"arc": {"original": 9, "effective": 4}}}
    package = {"lm_eval": ModuleType("lm_eval"), "lm_eval.models": ModuleType("m"), "lm_eval.models.huggingface": ModuleType("h")}
    package["lm_eval"].simple_evaluate = evaluate
    package["lm_eval.models.huggingface"].HFLM = lambda **parts: SimpleNamespace(**parts)
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert main(["evaluate", PIVOT, "--lm-eval", "arc, gsm", "--prompts", "4", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert table["columns"] == ["arc acc", "arc acc_norm", "gsm exact_match (strict)"]
    (row,) = table["rows"]
    assert row["cells"]["arc acc"] == pytest.approx({"value": 0.5, "low": 0.304, "high": 0.696}, abs=1e-4)
    assert row["cells"]["arc acc_norm"] == {"value": 0.25, "low": None, "high": None}
    assert (row["answers"], row["truncated"]) == (4, None)
    assert main(["evaluate", PIVOT, "--lm-eval", "hellaswag", "--prompts", "4"]) == 2
    assert "lm-eval stops (KeyError" in capsys.readouterr().err


def test_lm_eval_when_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FusionError, match="pip install lm-eval"):
        finish(by_lm_eval({"pivot": PIVOT}, ["arc"]))
