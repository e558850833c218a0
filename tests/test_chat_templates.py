"""Templates as models bring them: content in parts, tools, dates, several in one file; found out by trying, never by name."""

from __future__ import annotations

import pytest

from fusion.chat import fit
from tests.scripted import TEMPLATE, ask, scripted

PARTS = ("{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
         "{% endif %}{% endfor %}<|end|>{% endfor %}<|go|>")
FIRST = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'][0]['text'] }}<|end|>{% endfor %}<|go|>"
RAISES = "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('a list') }}{% endif %}{% endfor %}" + FIRST
EITHER = ("{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
          "{{ m['content'][0]['text'] }}{% endif %}<|end|>{% endfor %}<|go|>")
USERS = ("{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% else %}"
         "{{ m['content'] }}{% endif %}<|end|>{% endfor %}<|go|>")
READ = "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Yes.<|end|><|user|>Well?<|end|><|go|>"
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Well?"}]


@pytest.mark.parametrize(("template", "parts"), [
    (PARTS, {"user", "assistant", "system"}), (FIRST, {"user", "assistant", "system"}), (RAISES, {"user", "assistant", "system"}),
    (EITHER, set()), (TEMPLATE, set()), (USERS, {"user"})])
def test_content_is_given_as_the_template_wants_it(template, parts):
    model = scripted(["One."], template)
    assert model.template.habits.parts == parts
    prompt = fit(model, TALK, "Be brief.", 8)
    assert (prompt.text, prompt.notes) == (READ, ())
    reply = ask(model, "Hi")
    assert (reply.text, reply.finish) == ("One.", "stop"), "the mark after an answer in parts is an end"


@pytest.mark.parametrize("template", [
    "{% if tools is not none %}TOOLS{% endif %}" + TEMPLATE, "{% if tools %}TOOLS{% endif %}" + TEMPLATE,
    "{% if tools | length > 0 %}TOOLS{% endif %}" + TEMPLATE, "{% for tool in tools %}TOOL{% endfor %}" + TEMPLATE,
    "{% if builtin_tools is defined %}TOOLS{% endif %}{% if documents %}DOCS{% endif %}" + TEMPLATE])
def test_templates_that_know_tools_render_without_any(template):
    assert ask(scripted(["One."], template), "Hi").prompt == "<|user|>Hi<|end|><|go|>"


def test_a_template_that_writes_the_date():
    reply = ask(scripted(["One."], "{{ strftime_now('%Y') }}{% if not date_string is defined %} {% endif %}" + TEMPLATE), "Hi")
    assert reply.prompt[:2] == "20" and reply.text == "One."


@pytest.mark.parametrize("names", [("tool_use", "default"), ("default", "rag"), ("chat",)])
def test_of_several_templates_the_default_is_used(names):
    model = scripted(["One."], {name: TEMPLATE if name in ("default", "chat") else "WRONG" for name in names})
    assert ask(model, "Hi").prompt == "<|user|>Hi<|end|><|go|>"
    assert ask(model, "Hi").text == "One."
