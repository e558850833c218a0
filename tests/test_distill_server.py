"""A teacher behind a server: its rows are those of the model itself, and whatever a server does ends in words."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
import torch

from fusion import CheckpointError, FusionError, RecipeError, demo
from fusion.align import Alignment, remap
from fusion.demo.dialogues import conversation
from fusion.demo.family import RECIPES
from fusion.distill.dialogues import Report, checked
from fusion.distill.server import ServerTeacher
from fusion.distill.teacher import LocalTeacher, represent
from fusion.pairwise import FuseRecipe, Served, run
from fusion.progress import finish
from tests.test_evaluate_judge import serving

SOURCE = str(demo.FOLDER / "source-qwen")
PATIENCE = {"tries": 2, "backoff_s": 0.01, "timeout_s": 20}


@pytest.fixture(scope="module")
def dialogues():
    rng = Random(5)
    return [checked({"messages": conversation(RECIPES["pivot"].mixture, rng)}, f"made {i}", Report()) for i in range(5)]


@pytest.fixture(scope="module")
def local():
    return LocalTeacher(SOURCE, dtype="float32")


@pytest.fixture(scope="module")
def model(local):
    """`model(body)` → the prompt, and per position the log-probabilities and ids of all tokens, best first."""
    known: dict[tuple, tuple] = {}

    def read(body):
        prompt = tuple(body["prompt"])
        if prompt not in known:
            with torch.inference_mode():
                logits = local.model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            values, ids = logits.sort(descending=True, stable=True)
            known[prompt] = values.tolist(), ids.tolist()
        return prompt, *known[prompt]
    return read


def answer(choice: dict) -> tuple[int, dict, str]:
    return 200, {}, json.dumps({"choices": [{"index": 0, "text": "x", **choice}]})


@pytest.fixture(scope="module")
def vllm(model):
    """Answers as vLLM does: the k best and the token itself, by id, nothing at the first position."""
    def reply(body):
        prompt, values, ids = model(body)
        told = [None]
        for token, chances, order in zip(prompt[1:], values, ids, strict=True):
            ranks = [*range(body["prompt_logprobs"]), order.index(token)]
            told.append({str(order[r]): {"logprob": chances[r], "rank": r + 1, "decoded_token": "?"} for r in ranks[::-1]})
        return answer({"logprobs": None, "prompt_logprobs": told})
    return reply


@pytest.fixture(scope="module")
def legacy(model, local):
    """Answers with the prompt echoed, tokens by their text, and the generated token behind them; knows no other form."""
    tokenizer = local.encoder.tokenizer

    def reply(body):
        if "prompt_logprobs" in body:
            return 400, {}, "Unrecognized request argument supplied: prompt_logprobs"
        prompt, values, ids = model(body)
        best = [{tokenizer.decode([i]): v for v, i in zip(vs[:body["logprobs"]], order, strict=False)}
                for vs, order in zip(values, ids, strict=True)]
        gold = [vs[order.index(token)] for token, vs, order in zip(prompt[1:], values, ids, strict=True)]
        return answer({"logprobs": {"tokens": [*(tokenizer.decode([i]) for i in prompt), "x"],
                                    "token_logprobs": [None, *gold, -1.0], "top_logprobs": [None, *best, {"x": -1.0}]}})
    return reply


def served(server, **options) -> ServerTeacher:
    return ServerTeacher(SOURCE, server.url, "tiny", **{**PATIENCE, **options})


def rows_of(teacher, dialogues, top_k=10):
    return teacher.rows([teacher.encoder.encode(dialogue) for dialogue in dialogues], top_k)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_a_server_are_those_of_the_model(dialogues, local, vllm):
    with serving(vllm) as server:
        found = rows_of(served(server, max_tokens=local.encoder.max_tokens), dialogues)
        path, body = server.requests[0]
        assert path == "/v1/completions" and len(server.requests) == len(dialogues) and server.busiest > 1
        assert {name: body[name] for name in body if name != "prompt"} == {
            "model": "tiny", "max_tokens": 1, "temperature": 0, "prompt_logprobs": 10}
    for mine, wanted in zip(found, rows_of(local, dialogues), strict=True):
        assert (mine.ids == wanted.ids).mean() > 0.99 and mine.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert mine.nats == pytest.approx(wanted.nats, abs=1e-4)
        assert mine.ids.dtype == np.int32 and mine.logprobs.dtype == np.float32


def test_the_legacy_form_is_found_once_and_its_words_become_ids(dialogues, local, legacy):
    with serving(legacy) as server:
        found = rows_of(served(server), dialogues)
        assert len(server.requests) == len(dialogues) + 1
    known = 0.0
    for mine, wanted in zip(found, rows_of(local, dialogues), strict=True):
        assert mine.nats == pytest.approx(wanted.nats, abs=1e-4)
        for row in range(len(wanted.nats)):
            its = dict(zip(wanted.ids[row].tolist(), wanted.logprobs[row].tolist(), strict=True))
            told = {i: p for i, p in zip(mine.ids[row].tolist(), mine.logprobs[row].tolist(), strict=True) if i in its}
            assert told == pytest.approx({i: its[i] for i in told}, abs=1e-4)
            known += np.exp(list(told.values())).sum() / np.exp(list(its.values())).sum()
    assert known / sum(len(one.nats) for one in found) > 0.95


def test_token_numbers_may_be_written_as_text(dialogues, legacy):
    def numbered(body):
        status, headers, text = legacy(body)
        if status != 200:
            return status, headers, text
        told = json.loads(text)["choices"][0]["logprobs"]
        told["tokens"] = [f"token_id:{i}" for i in body["prompt"]]
        told["top_logprobs"] = [{"token_id:5": -20.0, "token_id:many": -20.0} for _ in body["prompt"]]
        return answer({"logprobs": told})
    with serving(numbered) as server:
        rows = rows_of(served(server), dialogues[:1])[0]
        assert (rows.ids == 5).any(axis=1).all() and set((rows.ids >= 0).sum(axis=1).tolist()) <= {1, 2}


def test_empty_places_and_tokens_beyond_the_table_are_left_out():
    links = Alignment(np.array([0, 1, 2]), np.array([0, 1]), np.array([0, 1], np.int32))
    ids, chances = remap(links, np.array([[0, -1], [7, 1]]), np.log([[0.5, 0.5], [0.3, 0.6]]), np.array([4, 3]))
    assert ids.tolist() == [[4, -1], [3, -1]] and np.exp(chances) == pytest.approx(np.array([[0.5, 0], [0.6, 0]]))


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_run_goes_on_where_the_server_died(dialogues, vllm, tmp_path):
    alive = [True]
    with serving(lambda body: vllm(body) if alive[0] else (503, {}, "")) as server:
        work = represent(served(server), dialogues, tmp_path / "store", shard_dialogues=2)
        while not (tmp_path / "store" / "rows-00000.safetensors").exists():
            next(work)
        alive[0] = False
        with pytest.raises(FusionError, match=r"no answer after 2 tries \(HTTP 503\)"):
            finish(work)
        alive[0], kept = True, (tmp_path / "store" / "rows-00000.safetensors").stat().st_mtime_ns
        store = finish(represent(served(server), dialogues, tmp_path / "store", shard_dialogues=2))
        assert not store.missing() and (tmp_path / "store" / "rows-00000.safetensors").stat().st_mtime_ns == kept
        assert finish(represent(served(server, tries=1), dialogues, tmp_path / "store", shard_dialogues=2)).sizes == (2, 2, 1)
        with pytest.raises(CheckpointError, match="another model"):
            finish(represent(ServerTeacher(SOURCE, server.url, "other"), dialogues, tmp_path / "store", shard_dialogues=2))


def test_marks_tell_server_model_and_tokenizer():
    made = [ServerTeacher(*arguments).mark for arguments in (
        (SOURCE, "http://a/v1", "m"), (SOURCE, "http://b/v1", "m"), (SOURCE, "http://a/v1", "n"),
        (demo.FOLDER / "pivot", "http://a/v1", "m"))]
    assert len(set(made)) == 4 and made[0] == ServerTeacher(SOURCE, "http://a/v1/", "m").mark


def test_a_pipeline_with_a_served_source_stores_what_the_model_says(dialogues, vllm, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"messages": dialogue.messages()}) for dialogue in dialogues))
    with serving(vllm) as server:
        recipe = FuseRecipe(str(demo.FOLDER / "pivot"), (SOURCE,), str(data), ("qwen",),
                            servers={"qwen": Served(server.url, "tiny")}, max_tokens=512)
        for name, its in (("served", recipe), ("local", recipe.with_(servers={}))):
            work = run(its, tmp_path / name)
            while next(work).stage != "Training target-qwen":
                pass
            work.close()
    fused = [json.loads((tmp_path / name / "work/fused/target-qwen/statistics.json").read_text()) for name in ("served", "local")]
    masses = [[its.pop(name)["qwen"] for name in ("read", "kept", "unwritten")] for its in fused]
    assert fused[0] == fused[1] and fused[0]["chosen"]["qwen"] > 0 and masses[0] == pytest.approx(masses[1], abs=1e-5)


# ── servers that fail ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("reply", "said"), [
    ((401, {}, "who are you"), "HTTP 401.*OPENAI_API_KEY"), ((404, {}, "no model tiny"), "no model tiny"),
    ((500, {}, ""), "no answer after 2 tries"), ((200, {}, "<html>"), "its answer is no JSON"),
    ((400, {}, "maximum context length is 8"), "HTTP 400 .maximum context length is 8"),
    ((200, {}, '{"choices": []}'), "has no choices"), ((200, {}, '{"choices": [1]}'), "has no choices"),
    ((200, {}, "[]"), "has no choices"), (answer({}), "no log-probabilities of prompt tokens.*not known.*echoes no"),
    (answer({"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": None}}), "no log-probabilities"),
    (answer({"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{}]}}), "has 1 entries for")])
def test_servers_that_cannot_teach_end_in_words(dialogues, reply, said):
    with serving(lambda body: reply) as server, pytest.raises(FusionError, match=said):
        rows_of(served(server), dialogues[:2])


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda told: told.pop(), "entries for"), (lambda told: told.append(None), "entries for"),
    (lambda told: told.__setitem__(-2, None), "lacks the log-probabilities"),
    (lambda told: told[-2].clear(), "leaves out token"),
    (lambda told: told[-2].update({"-4": {"logprob": -1.0}}), "'-4' where a token id"),
    (lambda told: told[-2].update({"word": {"logprob": -1.0}}), "'word' where a token id"),
    (lambda told: told[-2].update({"4": -1.0}), "'4' where a token id"),
    *((lambda told, wrong=wrong: told[-2].update({"4": {"logprob": wrong}}), "where a log-probability")
      for wrong in (float("nan"), float("-inf"), "-1", None, True, 0.5, 10 ** 400, [])),
    (lambda told: told[-2].update({str(i): {"logprob": -0.1} for i in range(4)}), "more than 1")])
def test_hostile_answers_end_in_words(dialogues, vllm, spoil, said):
    def reply(body):
        choice = json.loads(vllm(body)[2])["choices"][0]
        spoil(choice["prompt_logprobs"])
        return answer(choice)
    with serving(reply) as server, pytest.raises(FusionError, match=said):
        rows_of(served(server), dialogues[:1])


@pytest.mark.parametrize(("field", "value"), [
    ("tokens", 5), ("tokens", [None] * 999), ("token_logprobs", ["x"] * 999), ("top_logprobs", [7] * 999),
    ("top_logprobs", [{"a": "b", "e": "f"}] * 999)])
def test_hostile_echoes_end_in_words(dialogues, legacy, field, value):
    def reply(body):
        status, headers, text = legacy(body)
        if status != 200:
            return status, headers, text
        told = json.loads(text)["choices"][0]["logprobs"]
        return answer({"logprobs": {**told, field: value}})
    with serving(reply) as server, pytest.raises(FusionError, match=r"answer (has|lacks)"):
        rows_of(served(server), dialogues[:1])


def test_tokenizers_that_are_not_there_are_named(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match=str(folder)):
            ServerTeacher(folder, "http://a/v1", "m")
    with pytest.raises(RecipeError, match="no address"):
        ServerTeacher(SOURCE, "a/v1", "m")


# ── the recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_served_sources_round_trip():
    recipe = FuseRecipe.from_yaml("fusechat_fuse: 1\npivot: p\nsources:\n- a\n- {name: mixtral, path: org/tok@v1, "
                                  "server: 'http://h:8000/v1', model: mx}\n- {name: other, path: org/tok@v1, "
                                  "server: 'http://h:8000/v1', model: my}\ndata: d\n")
    assert recipe.servers == {"mixtral": Served("http://h:8000/v1", "mx"), "other": Served("http://h:8000/v1", "my")}
    assert recipe.names == ("a", "mixtral", "other") and FuseRecipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(("entry", "said"), [
    ("{path: a, server: 'http://h/v1'}", "line 4: .*both `server`"), ("{path: a, model: m}", "line 4: .*both `server`"),
    ("{path: a, server: 1, model: m}", "line 4: .*should be a path"),
    ("{path: a, sever: s, model: m}", "line 4: .*should be a path"),
    ("{path: a, server: h, model: m}", "no address of a server"), ("{path: a, server: 'http://h/v1', model: ''}", "has no name"),
    ("{name: pivot, path: a}", "a name of its own"),
    ("{path: a, server: 'http://user:secret@h/v1', model: m}", "with a password")])
def test_what_makes_no_sense_is_refused(entry, said):
    with pytest.raises(RecipeError, match=said):
        FuseRecipe.from_yaml(f"fusechat_fuse: 1\npivot: p\nsources:\n- {entry}\ndata: d\n")
    with pytest.raises(RecipeError, match="no x that a server"):
        FuseRecipe("p", ("a",), "d", servers={"x": Served("http://h/v1", "m")}).check()
