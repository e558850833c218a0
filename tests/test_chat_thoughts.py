"""Thoughts apart from answers: every way to mark them, cut ones, and what later questions tell the model of them."""

from __future__ import annotations

import pytest

from fusion.chat.thoughts import Part, opened, split, spoken, thought
from tests.scripted import TEMPLATE, ask, scripted

THOUGHT, ANSWER = "2 + 2 is 4, says 42.", "The answer is 4."
OPENS = TEMPLATE.replace("<|go|>", "<|go|><think>\n")
WANTS = ("{% for m in messages %}<|{{ m['role'] }}|>{% if m.reasoning_content %}<why>{{ m.reasoning_content }}</why>{% endif %}"
         "{{ m['content'] }}<|end|>{% endfor %}<|go|>")


@pytest.mark.parametrize("written", [
    "<think>{}</think>{}", "<think>\n{}\n</think>\n\n{}", "<thinking>{}</thinking>{}", "<Thought>{}</Thought>{}",
    "<reasoning>{}</reasoning>\n{}", "[THINK]{}[/THINK]{}", "<seed:think>{}</seed:think>{}", "◁think▷{}◁/think▷{}",
    "<|begin_of_thought|>{}<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>", "<unused94>thought\n{}<unused95>{}",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "<|channel|>analysis<|message|>{}<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
    "<|channel>thought\n{}<channel|>{}", "{}\n</think>\n\n{}", "{}[/THINK]{}"])
def test_thought_and_answer_are_told_apart(written):
    assert split(written.format(THOUGHT, ANSWER)) == (Part(THOUGHT, True), Part(ANSWER))


def test_a_thought_that_was_cut_has_no_answer():
    for begin in ("<think>", "\n<think>\n", "[THINK]", "<|channel|>analysis<|message|>", "<reasoning>"):
        assert split(begin + THOUGHT) == (Part(THOUGHT, True, closed=False),)
        assert spoken(begin + THOUGHT) == "" and thought(begin + THOUGHT) == THOUGHT
    assert split(f"<think>a</think>Now.<think>{THOUGHT}") == (Part("a", True), Part("Now."), Part(THOUGHT, True, closed=False))


def test_the_template_may_have_opened_it():
    prompt = "<|user|>Hi<|end|><|go|><think>\n"
    assert split(f"{THOUGHT}</think>{ANSWER}", prompt) == (Part(THOUGHT, True), Part(ANSWER))
    assert split(f"<think>{THOUGHT}</think>{ANSWER}", prompt) == (Part(THOUGHT, True), Part(ANSWER))
    assert split(THOUGHT, prompt) == (Part(THOUGHT, True, closed=False),)
    for closed in ("<|go|><think>\n\n</think>\n\n", "say <think> once<|end|><|go|>", ""):
        assert opened(closed) is None and split(THOUGHT, closed) == (Part(THOUGHT),)


def test_several_thoughts_keep_their_places():
    assert split("<think>a</think>One.\n<think>b</think> Two.") == (Part("a", True), Part("One."), Part("b", True), Part(" Two."))


@pytest.mark.parametrize("text", [
    "Write `<think>` before and `</think>` after.", "```xml\n<think>\nx\n</think>\n```\nThat is all.", "  indented\n\n", "",
    "a < b", "``<think> `x` ``", "<|im_end|> is a mark", "thinking> or [think"])
def test_what_is_no_thought_stays_as_it_was_written(text):
    assert split(text) == (Part(text),) and spoken(text) == text


def test_an_open_code_block_does_not_keep_a_thought_open():
    assert split(f"<think>```py\nx = 1</think>{ANSWER}") == (Part("```py\nx = 1", True), Part(ANSWER))


@pytest.mark.parametrize(("template", "chunks"), [
    (TEMPLATE, ["<think>", THOUGHT, "</think>", ANSWER]), (OPENS, [THOUGHT, "</think>", ANSWER]),
    (TEMPLATE, ["[THINK]", THOUGHT, "[/THINK]", ANSWER])])
def test_later_questions_do_not_tell_of_earlier_thoughts(template, chunks):
    model = scripted(chunks, template, after="Ċ" if template == OPENS else "<|go|>", special=chunks[:1] + chunks[-2:-1])
    first = ask(model, "2 + 2?")
    assert first.spoken == ANSWER and first.parts[0] == Part(THOUGHT, True)
    for told in (first.text, first.spoken):
        again = ask(model, "2 + 2?", told, "Sure?", max_new_tokens=1).prompt
        assert ANSWER in again and "42" not in again


def test_a_template_that_wants_thoughts_gets_them():
    prompt = ask(scripted(["x"], WANTS), "2 + 2?", f"<think>{THOUGHT}</think>{ANSWER}", "Sure?", max_new_tokens=1).prompt
    assert f"<|assistant|><why>{THOUGHT}</why>{ANSWER}<|end|>" in prompt


def test_a_base_model_is_not_told_of_thoughts_either():
    prompt = ask(scripted(["x"], None, after=":"), "2 + 2?", f"<think>{THOUGHT}</think>{ANSWER}", "Sure?", max_new_tokens=1).prompt
    assert prompt == f"User: 2 + 2?\nAssistant: {ANSWER}\nUser: Sure?\nAssistant:"


def test_marks_are_written_also_where_they_are_special_tokens():
    shown = ask(scripted(["<|im_start|>", "Hi", "<|tool|>"], special=["<|im_start|>", "<|tool|>"]), "?")
    assert shown.text == "<|im_start|>Hi<|tool|>"
