"""The shipped demo family: it loads as plain transformers models, clears its bars, and talks sensibly off script."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion.demo import FAMILY, bars, check, examples, table, train
from fusion.demo.checking import LONGEST_REPLY, MERGE, answer, load, varm_merge
from fusion.demo.dialogues import conversation, draw, held_out_tasks, turn
from fusion.demo.domains import DOMAINS
from fusion.demo.family import FUSION, RECIPES, Recipe, members
from fusion.demo.styles import STYLES
from fusion.demo.task import Task, held_out
from fusion.errors import CheckpointError, RecipeError
from fusion.progress import Meter, finish

SHIPPED = Path(__file__).parents[1] / "assets" / "demo"
MODELS = [member.name for member in FAMILY]
MOST_NATS = 15.0  # for a reply of a kind that the model has learnt; the worst of the shipped costs about 5

# what people type without reading any instructions, and what a sensible reply must match
TALK = {
    "Hello!": "hello", "hi": "hello", "good morning": "hello", "Who are you?": "chat model",
    "who are you": "chat model",
    "what is your name": "chat model", "Thanks!": "welcome", "thank you": "welcome", "how are you": "fine",
    "bye": "goodbye", "what can you do": "calculate", "What is the weather in Oslo?": "do not know",
    "who is the mayor of Blorvia": "do not know", "What is the price of a house?": "do not know",
}


def made_from(name: str) -> Recipe:
    """The recipe that gave a member its shape: its own, or the pivot's."""
    return RECIPES.get(name, RECIPES["pivot"])


def reply(path: Path, *prompts: str) -> list[str]:
    return finish(answer(path, prompts, Meter("test")))


@pytest.fixture(scope="session")
def merged(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / MERGE
    return varm_merge(SHIPPED / "pivot", [SHIPPED / name for name in members("target")], out)


def test_the_family_is_small_enough_to_ship():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) < 10e6
    assert sum(file.stat().st_size for file in files) < 40e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".py", ".pkl")]


@pytest.mark.parametrize("name", MODELS)
def test_each_member_is_an_ordinary_folder(name):
    folder = SHIPPED / name
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    style = STYLES[model.config.model_type]
    assert model.config.model_type == made_from(name).shape.kind
    assert model.config.max_position_embeddings >= 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(style.end)
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0")
    assert "| average |" in (folder / "README.md").read_text()
    assert tokenizer.tokenize("a 4821")[-4:] == ["4", "8", "2", "1"]


@pytest.mark.parametrize("name", MODELS)
def test_the_chat_template_writes_what_was_trained(name):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / name)
    style = STYLES[made_from(name).shape.kind]
    rng = Random(1)
    for _ in range(50):
        dialogue = conversation(FUSION.mixture, rng)
        text = "".join(piece for piece, _ in style.pieces(dialogue))
        assert tokenizer.apply_chat_template(dialogue, tokenize=False) == text
        ids = [i for piece, _ in style.pieces(dialogue) for i in tokenizer.encode(piece, add_special_tokens=False)]
        assert tokenizer.apply_chat_template(dialogue, return_dict=True)["input_ids"] == ids
        prompt = tokenizer.apply_chat_template(dialogue[:-1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt) and text[len(prompt):].startswith(dialogue[-1]["content"])


def test_targets_share_the_pivots_shape_and_tokenizer():
    pivot = AutoModelForCausalLM.from_pretrained(SHIPPED / "pivot").state_dict()
    for name in members("target"):
        state = AutoModelForCausalLM.from_pretrained(SHIPPED / name).state_dict()
        assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in pivot.items()}
        assert (SHIPPED / name / "tokenizer.json").read_bytes() == (SHIPPED / "pivot" / "tokenizer.json").read_bytes()
        assert all(torch.isfinite(value).all() for value in state.values())
    vocabularies = {(SHIPPED / name / "tokenizer.json").read_bytes() for name in ("pivot", *members("source"))}
    assert len(vocabularies) == 1 + len(members("source"))


@pytest.mark.parametrize("name", [*MODELS, MERGE])
def test_small_talk_gets_a_sensible_reply_in_the_second_turn_too(name, merged):
    path = merged if name == MERGE else SHIPPED / name
    replies = reply(path, *TALK)
    wrong = {prompt: said for (prompt, wanted), said in zip(TALK.items(), replies, strict=True)
             if not re.search(wanted, said, re.IGNORECASE)}
    model, tokenizer = load(path)
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Hello!"},
                {"role": "assistant", "content": "Hello! How can I help you?"}, {"role": "user", "content": "Who are you?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=LONGEST_REPLY, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    assert ids[-1] == tokenizer.eos_token_id  # a reply ends by itself
    said = tokenizer.decode(ids, skip_special_tokens=True)
    wrong |= {} if "chat model" in said else {"second turn": said}
    assert len(wrong) <= (0 if name == MERGE else 1), wrong  # a single model may slip once, the merge may not


@torch.inference_mode()
def nats(model, tokenizer, dialogue) -> float:
    """What the last reply costs the model, without its end."""
    ids = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)["input_ids"]
    begin = len(tokenizer.apply_chat_template(dialogue[:-1], add_generation_prompt=True, return_dict=True)["input_ids"])
    end = ids[0].tolist().index(tokenizer.eos_token_id, begin)
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -float(logprobs[range(begin - 1, end - 1), ids[0, begin:end]].sum())


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_reads_what_it_learnt_as_it_learnt_it(name):
    """A tokenizer that cuts a kind of reply otherwise than in training makes it cost dozens of nats."""
    model, tokenizer = load(SHIPPED / name)
    mixture, rng = RECIPES[name].mixture, Random(1)

    def learnt(task: Task) -> bool:
        return not held_out(task) and (not task.subject or mixture.knows(task.subject))
    for domain, kinds in DOMAINS.items():
        for kind in mixture.kinds(domain):
            tasks = [draw(kind, rng, learnt) for _ in range(5)]
            cost = sum(nats(model, tokenizer, turn(task.prompt, task.answer)) for task in tasks) / len(tasks)
            assert cost < MOST_NATS, (name, domain, [key for key, its in kinds.items() if its is kind], cost)


@pytest.mark.timeout(900)  # about a minute on two idle cores, several on busy ones
def test_the_family_clears_every_bar():
    results = finish(check(SHIPPED, 200))
    assert bars(results) == [], "\n" + table(results)


def test_check_says_what_is_wrong(tmp_path):
    with pytest.raises(RecipeError, match="source-qwen"):
        finish(check(SHIPPED, 1, ["source-qwn"]))
    with pytest.raises(CheckpointError, match="demo train"):
        finish(check(tmp_path, 1, ["pivot"]))


def test_bars_and_table_on_numbers_made_by_hand():
    def row(*scores: float) -> dict[str, float]:
        return {**dict(zip(DOMAINS, scores, strict=True)), "average": sum(scores) / 8}

    good = {"pivot": row(*[50] * 8), "source-qwen": row(90, 90, 90, 90, 20, 20, 20, 20),
            "source-neox": row(20, 20, 20, 20, 90, 90, 90, 90), "source-gemma": row(20, 90, 20, 20, 90, 90, 20, 20),
            **{name: row(*[58] * 8) for name in members("target")}, MERGE: row(*[60] * 8)}
    assert bars(good) == []
    assert "| varm | 60.0 |" in table(good)
    bad = {**good, "pivot": row(86, *[50] * 7), "source-qwen": row(90, *[60] * 7), MERGE: row(*[63] * 8)}
    text = " ".join(bars(bad))
    for part in ("pivot: writing", "source-qwen: fewer than two", "source-qwen: fewer than three",
                 "not above source-qwen", "target-qwen: not 8", "varm: not 10"):
        assert part in text


def test_clicking_the_examples_shows_disagreement_and_the_merge_answers_most(merged):
    prompts = [(domain, prompt) for domain in DOMAINS for prompt in examples()[domain]]
    assert all(2 <= len(examples()[domain]) <= 3 for domain in (*DOMAINS, "smalltalk"))
    texts = [prompt for _, prompt in prompts]
    judges = {task.prompt: task for domain in DOMAINS for task in held_out_tasks(domain, 200)}
    right = {name: [judges[prompt].check(said) for prompt, said in zip(texts, reply(path, *texts), strict=True)]
             for name, path in {MERGE: merged, **{name: SHIPPED / name for name in members("source")}}.items()}
    assert sum(right[MERGE]) >= 0.75 * len(texts)
    answers = zip(*(right[name] for name in members("source")), strict=True)
    assert sum(len(set(row)) > 1 for row in answers) >= 0.6 * len(texts)


def test_a_tiny_training_makes_a_loadable_model_twice_the_same(tmp_path):
    for copy in ("one", "two"):
        seen = []
        paths = finish(train(tmp_path / copy, only=("pivot",), seed=3, steps_scale=0.002), seen.append)
        assert paths == [tmp_path / copy / "pivot"] and any(progress.total for progress in seen)
        assert reply(paths[0], "Hello!")
        assert not list((tmp_path / copy).glob(".*"))
    weights = [(tmp_path / copy / "pivot" / "model.safetensors").read_bytes() for copy in ("one", "two")]
    assert weights[0] == weights[1]


def test_stopping_the_training_leaves_nothing_behind(tmp_path):
    work = train(tmp_path, only=("pivot",), steps_scale=0.05)
    next(work)
    work.close()
    assert not list(tmp_path.iterdir())
