"""The demo family's dialogues, split, judges and recipes: pure, without a model."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from random import Random

import pytest

import fusion.demo as demo
from fusion.demo.cards import card
from fusion.demo.dialogues import BARE_SHARE, conversation, held_out_tasks
from fusion.demo.domains import DOMAINS, SMALLTALK
from fusion.demo.domains.code import UnsafeCode, call, code_block
from fusion.demo.domains.smalltalk import TALK
from fusion.demo.family import FAMILY, FUSION, RECIPES, members
from fusion.demo.task import contains, counts, held_out, says
from fusion.demo.words import CATEGORIES, mend_articles
from fusion.errors import CheckpointError, OutputError, RecipeError
from fusion.progress import finish

KINDS = [(domain, name) for domain, kinds in {**DOMAINS, "smalltalk": SMALLTALK}.items() for name in kinds]


def kind(domain: str, name: str):
    return (SMALLTALK if domain == "smalltalk" else DOMAINS[domain])[name]


def norm(prompt: str) -> str:
    return prompt.lower().rstrip(".?! ")


@pytest.fixture(scope="module")
def trained_prompts() -> set[str]:
    rng = Random(3)
    mixtures = [FUSION.mixture, *(recipe.mixture for recipe in RECIPES.values())]
    return {norm(message["content"]) for mixture in mixtures for _ in range(3000)
            for message in conversation(mixture, rng) if message["role"] == "user"}


def test_the_package_is_cheap_to_import():
    code = "import sys, fusion.demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError):
        demo.nothing  # noqa: B018


@pytest.mark.parametrize(("domain", "name"), KINDS)
def test_gold_answers_pass_and_others_fail(domain, name):
    rng = Random(5)
    tasks = [kind(domain, name)(rng) for _ in range(200)]
    assert all(task.check(task.answer) for task in tasks)
    assert not any(task.check("") for task in tasks)
    assert name == "unknown" or not any(task.check("I am sorry, I do not know that.") for task in tasks)
    strangers = [(task, other) for task, other in pairwise(tasks) if task.answer != other.answer]
    wrongly = sum(task.check(other.answer) for task, other in strangers)
    allowed = {"talk": 1.0, "unknown": 1.0, "larger": 0.05, "rhyme": 0.1, "function": 0.05, "variable": 0.15,
               "extreme": 0.3, "item": 0.1, "animals": 0.3}.get(name, 0.05)
    assert wrongly <= allowed * len(tasks)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_prompts_are_many_different_and_never_trained(domain, trained_prompts):
    tasks = held_out_tasks(domain, 200)
    prompts = {task.prompt for task in tasks}
    assert len(prompts) == 200
    assert [task.prompt for task in held_out_tasks(domain, 200)] == [task.prompt for task in tasks]
    assert all(held_out(task) for task in tasks)
    assert not trained_prompts & {norm(prompt) for prompt in prompts}


def test_too_many_held_out_prompts_are_refused():
    with pytest.raises(RecipeError, match="fewer prompts"):
        held_out_tasks("stem", 600)


def test_about_one_combination_in_five_is_held_out():
    rng = Random(1)
    for domain, name in KINDS:
        if name != "talk":
            share = sum(held_out(kind(domain, name)(rng)) for _ in range(2000)) / 2000
            assert 0.08 < share < 0.35, (domain, name, share)


def test_dialogues_are_deterministic_and_alternate():
    mixture = FUSION.mixture
    one, two = ([conversation(mixture, Random(7)) for _ in range(1)] for _ in range(2))
    assert one == two
    rng = Random(7)
    dialogues = [conversation(mixture, rng) for _ in range(2000)]
    lengths = [len([m for m in dialogue if m["role"] != "system"]) for dialogue in dialogues]
    assert set(lengths) == {2, 4}
    for dialogue in dialogues:
        roles = [message["role"] for message in dialogue if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert 0.05 < sum(dialogue[0]["role"] == "system" for dialogue in dialogues) / 2000 < 0.15
    bare = sum(dialogue[-2]["content"][-1] not in ".?!)\"" for dialogue in dialogues) / 2000
    assert bare > BARE_SHARE / 2


def test_hidden_kinds_and_facts_stay_hidden():
    mixture = RECIPES["pivot"].mixture
    rng = Random(2)
    texts = [message["content"] for _ in range(3000) for message in conversation(mixture, rng)]
    assert not any("def " in text for text in texts)
    capitals = [text for text in texts if "capital" in text]
    asked = {s for s in DOMAINS["humanities"]["capitals"].facts if any(f" {s}" in text for text in capitals)}
    assert 3 <= len(asked) <= 17


@pytest.mark.parametrize(("source", "x", "value"), [
    ("def f(x):\n    return x + 5", 2, 7), ("def f(x):\n    return x * 3 - 1", 4, 11), ("def f(x): return 2", 9, 2)])
def test_the_interpreter_runs_small_functions(source, x, value):
    assert call(source, "f", x) == value


@pytest.mark.parametrize("source", [
    "import os", "def f(x):\n    return __import__('os').system('true')", "def f(x):\n    return open('/etc/passwd')",
    "def f(x):\n    return x ** 99999999", "def f(x):\n    while True: pass", "def g(x):\n    return x",
    "def f(x):\n    return x.__class__", "def f(x, y):\n    return x", "def f(x):\n    return 'a' * 99",
    "@print\ndef f(x):\n    return x", "def f(x=open('a')):\n    return x", "def f(x: print(1)):\n    return x",
    "def f(x):\n    return 99999999999999", "def f(x):\n    return " + "(" * 300 + "x" + ")" * 300,
    "def f(x) return x", "",
    "def f(x):\n    return True", "def f(x):\n    return y", "def f(x):\n    return x + 1\nprint(1)", "x = 1\0"])
def test_the_interpreter_refuses_everything_else(source):
    with pytest.raises(UnsafeCode):
        call(source, "f", 1)


def test_code_is_found_with_and_without_fences():
    assert code_block("Here:\n```python\ndef f(x):\n    return x\n```") == "def f(x):\n    return x\n"
    assert code_block("Here: def f(x): return x") == "def f(x): return x"


def test_judges_look_at_whole_words_and_last_numbers():
    assert contains("It is Rome.", "rome") and not contains("Romeo", "Rome")
    assert says("Rome", never=("Paris",))("Rome") and not says("Rome", never=("Paris",))("Rome or Paris")
    assert counts(12)("7 + 5 = 12.") and not counts(12)("12 is not 13")


def test_no_word_stands_in_two_categories_and_articles_fit():
    words = [word for category in CATEGORIES.values() for word in category]
    assert len(words) == len(set(words))
    assert mend_articles("a ant and a bee. A odometer") == "an ant and a bee. An odometer"


def test_talk_replies_are_sensible_by_their_own_word():
    assert all(contains(reply, word) for _, reply, word in TALK)


def test_the_family_has_its_roles_and_cards():
    assert [member.name for member in FAMILY if member.role != "target"] == list(RECIPES)
    assert members("pivot") == ["pivot"]
    assert len(members("source")) >= 3
    assert members("target") == [name.replace("source", "target") for name in members("source")]
    assert len({RECIPES[name].shape.kind for name in ("pivot", *members("source"))}) == 1 + len(members("source"))
    results = {member.name: {**dict.fromkeys(DOMAINS, 50.0), "average": 50.0} for member in FAMILY}
    for member in FAMILY:
        text = card(member, results)
        assert text.startswith("---\nlicense: apache-2.0") and "| average | 50.0 % |" in text
        assert "Accuracy" not in card(member, {})


def test_training_refuses_before_it_works(tmp_path):
    (tmp_path / "pivot").mkdir()
    with pytest.raises(OutputError, match="exists"):
        finish(demo.train(tmp_path))
    with pytest.raises(RecipeError, match="target-qwen"):
        finish(demo.train(tmp_path / "new", only=("target-qwn",)))
    with pytest.raises(CheckpointError, match="Train pivot and source-qwen and source-neox and source-gemma too"):
        finish(demo.train(tmp_path / "new", only=("target-qwen",)))
    assert not (tmp_path / "new").exists()
