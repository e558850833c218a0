"""How a model is shown a conversation: a chat template, filled the way it asks for.

Templates differ in more than words: some want a message as a list of parts instead of text, some refuse a system prompt or
leave it out without a word. Both are found out once, by rendering a conversation of stand-ins; nothing is guessed from the
template's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from fusion.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]


class Habits(NamedTuple):
    """How a template wants to be filled: the roles whose text it reads as a list of `parts`, whether it has a place for a
    `system` prompt; `works`: it shows a conversation."""

    parts: frozenset[str]
    system: bool
    works: bool


class ChatTemplate:
    """A Jinja chat template of a tokenizer: its own, or `text` instead; `where` is what people call its model.

    CheckpointError when there is none, or several without a default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None, where: str = ""):
        self.tokenizer, self.where = tokenizer, where or str(tokenizer.name_or_path)
        try:
            self.text: str = text or tokenizer.get_chat_template()
        except ValueError as error:
            several = "several chat templates and no default" if tokenizer.chat_template else "no chat template"
            raise CheckpointError(f"its tokenizer has {several}", where=self.where,
                                  todo="Give a shared template for all models, such as `template: plain`.") from error

    @cached_property
    def habits(self) -> Habits:
        """What this template wants, found out with a conversation of stand-ins."""
        asked, answer, system = stand_ins(3)
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        ways = [frozenset(roles) for roles in ((), ("user",), ("assistant",), ("user", "assistant"))]
        parts = next((parts for parts in ways if self._shows(talk, parts)), None)
        first = {"role": "system", "content": system}
        for more in (frozenset(), frozenset(("system",))):
            if parts is not None and self._shows([first, *talk], parts | more):
                return Habits(parts | more, True, True)
        return Habits(parts or frozenset(), False, parts is not None)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, up to the beginning of a reply if asked; CheckpointError when the template refuses.

        Without a place for a system prompt it stands at the beginning of the first user message.
        """
        messages = list(messages)
        if messages and messages[0]["role"] == "system" and not self.habits.system:
            messages = merged(messages)
        try:
            return self._fill(messages, self.habits.parts, add_generation_prompt)
        except Exception as error:  # a template is a foreign program (in a sandbox): anything may be raised
            raise CheckpointError(f"the chat template cannot be rendered ({str(error)[:200]})", where=self.where,
                                  todo="Repair chat_template in the tokenizer's files, or use a shared template.") from error

    def _shows(self, messages: Messages, parts: frozenset[str]) -> bool:
        """Whether every message stands in the rendered text."""
        try:
            text = self._fill(messages, parts, False)
        except Exception:  # see `render`
            return False
        return all(message["content"] in text for message in messages)

    def _fill(self, messages: Messages, parts: frozenset[str], add_generation_prompt: bool) -> str:
        filled = [{**its, "content": [{"type": "text", "text": its["content"]}]} if its["role"] in parts else its
                  for its in messages]
        given = {"chat_template": self.text, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(filled, **given)
        except Exception:  # some count their tools without asking whether there are any
            return self.tokenizer.apply_chat_template(filled, tools=[], **given)


def merged(messages: Messages) -> list[Mapping[str, str]]:
    """The same conversation with the system prompt at the beginning of the user's first message."""
    system, *others = messages
    if not others:
        return [{"role": "user", "content": system["content"]}]
    return [{**others[0], "content": f"{system['content']}\n\n{others[0]['content']}"}, *others[1:]]


def stand_ins(count: int, text: str = "") -> list[str]:
    """So many short texts that do not occur in `text`: digits, which no filter of a template changes."""
    number = 7193046528
    while str(number) in text:
        number += 1
    return [f"{number}{i:05}" for i in range(count)]
