"""The chat template of a tokenizer: how it wants to be called, and how it marks the end of an answer.

A template is a foreign program, which transformers runs in a sandbox; what it wants is found out by trying, never by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from fusion.chat.thoughts import spoken, thought

Message = Mapping[str, Any]

_MARK = "mark-{}-stands-here"
_known: WeakKeyDictionary[Any, Template] = WeakKeyDictionary()


def template_of(tokenizer: Any) -> Template | None:
    """The template of a tokenizer; of several named ones "default", else the first; None when it has none."""
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        source = source.get("default") or next(iter(source.values()), None)
    if not source:
        return None
    known = _known.get(tokenizer)
    if known is None or known.source != source:
        known = _known[tokenizer] = Template(tokenizer, source)
    return known


class Template:
    """One chat template; `parts` are the roles whose content it reads as a list of parts, [{"type": "text", "text": …}]."""

    def __init__(self, tokenizer: Any, source: str):
        self._tokenizer, self.source, self.parts = ref(tokenizer), source, frozenset()
        for role in ("user", "assistant", "system"):
            if self._wants_parts(role):
                self.parts |= {role}

    def render(self, messages: Sequence[Message], answering: bool = True) -> str:
        """The messages as text, up to where an answer begins if one is wanted; raises whatever the template raises.

        Earlier thoughts are given beside what was said, as `reasoning_content` and `thinking`: a template that wants them
        writes them, most do not.
        """
        return self._run([self._content(_without_thoughts(message)) for message in messages], answering)

    def after_answer(self) -> str:
        """What stands between an answer and the next question; "" when that cannot be rendered."""
        return self._between("assistant", "user")

    def after_question(self) -> str:
        """What stands between a question and its answer."""
        return self._between("user", "assistant")

    def _between(self, first: str, then: str) -> str:
        roles = ("user", "assistant", "user") if first == "assistant" else (first, then)
        said = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        try:
            text = self.render(said, answering=False)
        except Exception:  # `render` says so when it is used
            return ""
        _, found, rest = text.rpartition(said[-2]["content"])
        return rest.partition(said[-1]["content"])[0] if found else ""

    def _wants_parts(self, role: str) -> bool:
        before = {"assistant": [{"role": "user", "content": "?"}]}.get(role, [])
        after = [{"role": "user", "content": "?"}] if role == "system" else []
        mark = _MARK.format(role)
        plain = self._tried([*before, {"role": role, "content": mark}, *after])
        in_parts = self._tried([*before, {"role": role, "content": _parts(mark)}, *after])
        return mark not in plain and mark in in_parts and "'type'" not in in_parts

    def _tried(self, messages: Sequence[Message]) -> str:
        try:
            return self._run([self._content(message) for message in messages], False)
        except Exception:
            return ""

    def _run(self, messages: Sequence[Message], answering: bool) -> str:
        write = self._tokenizer().apply_chat_template
        given = {"chat_template": self.source, "tokenize": False, "add_generation_prompt": answering}
        try:
            return write(list(messages), **given)
        except Exception:  # some count their tools without asking whether there are any
            return write(list(messages), tools=[], **given)

    def _content(self, message: Message) -> Message:
        content = message["content"]
        return {**message, "content": _parts(content)} if message["role"] in self.parts and isinstance(content, str) else message


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _without_thoughts(message: Message) -> Message:
    content = message["content"]
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    thoughts = {name: thought(content) for name in ("reasoning_content", "thinking")} if thought(content) else {}
    return {**thoughts, **message, "content": spoken(content)}
