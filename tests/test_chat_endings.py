"""Where an answer ends: base models at the next speaker's line, templates at their marks, all that configs name."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from fusion.chat import fit, from_parts
from fusion.chat.ending import TextEnd, text_end
from fusion.evaluate.answering import answer
from fusion.progress import Meter, finish
from fusion.template import ChatTemplate
from tests.scripted import TURNS, ask, pictures, scripted, scripted_tokenizer, scripted_weights

LINES = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}### assistant:\n"


@pytest.mark.parametrize(("chunks", "text"), [
    ([" Paris.", "\nUser: And of Spain?", "\nAssistant: Madrid."], " Paris."),
    ([" Paris.", "\nAssistant: Madrid."], " Paris."),
    ([" Paris.", "\n", "\n ", "Us", "er", ": And"], " Paris."),
    ([" Paris.\n", "  **User:** And"], " Paris."),
    ([" Paris.", "\n\nSystem: Be brief."], " Paris."),
    ([" Paris.", "\nUSER : And"], " Paris."),
    (["User: And of Spain?"], ""),
    ([" Paris.", "\nUser"], " Paris.\nUser"),  # the end token says that this was all
    ([" The line", "\nUsers: 4", "\nThe User: me"], " The line\nUsers: 4\nThe User: me"),
    ([" user:", "\nuser: root"], " user:\nuser: root"),  # as configuration files have it
    (["Assistant: Paris."], "Assistant: Paris."),
])
def test_a_base_model_ends_where_the_next_speakers_line_begins(chunks, text, monkeypatch):
    monkeypatch.setattr("fusion.chat.streaming.FLUSH_S", 0.0)
    model = scripted(chunks, template=None, after=":")
    shown = pictures(model, "Capital of France?", max_new_tokens=20)
    assert (shown[-1].text, shown[-1].finish) == (text, "stop")
    assert all(text.startswith(reply.text) for reply in shown), [reply.text for reply in shown]


def test_a_label_that_the_limit_cuts_is_not_shown():
    model = scripted([" Paris.", "\n", "User", ": And"], template=None, after=":")
    assert {ask(model, "Capital?", max_new_tokens=limit).text.rstrip() for limit in (1, 2, 3, 4)} == {" Paris."}


def test_what_was_invented_does_not_go_into_the_history():
    model = scripted([" Paris.", "\nUser: And of Spain?"], template=None, after=":")
    said = ask(model, "Capital of France?", max_new_tokens=20).spoken
    assert ask(model, "Capital of France?", said, "Thanks", max_new_tokens=1).prompt == (
        "User: Capital of France?\nAssistant: Paris.\nUser: Thanks\nAssistant:")


def test_many_answers_at_once_end_there_too():
    model = scripted([" Paris.", "\nUser: And", " of Spain?"], template=None, after=":", last=None)
    asked = [[{"role": "user", "content": question}] for question in ("France?", "The capital of France?")]
    given = finish(answer(model, asked, 30, Meter("", 2, "")))
    assert [(its.text, its.finish) for its in given] == [(" Paris.", "stop")] * 2
    assert all(its.tokens < 6 for its in given), "it went on writing"


def test_a_template_of_plain_words_ends_at_its_own_labels():
    tokenizer = scripted_tokenizer(["x"], LINES)
    assert text_end(ChatTemplate(tokenizer)) == TextEnd(("### user:", "### assistant:"))
    model = scripted([" Paris.", "\n\n###", " user:", " And of Spain?"], template=LINES, after=":")
    assert ask(model, "Capital?", max_new_tokens=20).text == " Paris."


def test_a_template_with_a_token_has_no_labels():
    assert text_end(ChatTemplate(scripted_tokenizer(["x"], TURNS))) is None
    assert fit(scripted(["x"]), [{"role": "user", "content": "Hi"}], "", 4).end is None
    written = ask(scripted(["One", "\nUser: two"]), "Hi").text
    assert written == "One\nUser: two"


@pytest.mark.parametrize("place", ["config", "generation", "template"])
def test_every_end_that_is_named_ends(place):
    """The model writes A, then B for ever; B is an end by one of three sources, the tokenizer names another."""
    template = TURNS.replace("<|end|>", "B") if place == "template" else None if place == "config" else TURNS
    tokenizer = scripted_tokenizer(["A", "B"], template, special=["B"])
    a, b, go = (tokenizer.convert_tokens_to_ids(token) for token in ("A", "B", ":"))
    after = go if template is None else tokenizer.convert_tokens_to_ids("<|end|>" if place == "generation" else "B")
    weights = scripted_weights(tokenizer, [after, a, b] if after != b else [b, a, b])
    if place == "config":
        weights.config.eos_token_id = [tokenizer.eos_token_id, b]
    if place == "generation":
        weights.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, b], bos_token_id=None)
    model = from_parts(weights, tokenizer, place)
    assert {b, tokenizer.eos_token_id} <= model.stop_ids
    reply = ask(model, "Hi", max_new_tokens=8)
    assert (reply.text, reply.finish) == ("A", "stop")


def test_no_end_no_padding_and_no_beginning():
    model = scripted(["One", " two"], last=None, eos_token=None)
    assert not model.tokenizer.pad_token and not model.tokenizer.bos_token
    reply = ask(model, "Hi", max_new_tokens=5)
    assert (reply.text, reply.finish, reply.tokens) == ("One twoOne twoOne", "length", 5)
