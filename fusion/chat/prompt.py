"""From a conversation to what one model reads: its own chat template, and no more than its context holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion.chat.ending import TextEnd
from fusion.chat.model import ChatModel
from fusion.chat.thoughts import spoken, thought
from fusion.errors import RecipeError

Messages = Sequence[Mapping[str, str]]  # {"role": "user" | "assistant", "content": text}, oldest first

NO_TEMPLATE = "This model brings no chat template; it reads plain lines “User: … Assistant: …”."
NO_SYSTEM = "This model's template has no place for a system prompt: it stands in the first message."


@dataclass(frozen=True)
class Prompt:
    """What a model reads: the rendered text, its token ids, the room for an answer in tokens, remarks for people.

    `end` finds the next speaker's label in an answer, where no token ends one.
    """

    text: str
    ids: tuple[int, ...]
    room: int
    notes: tuple[str, ...] = ()
    end: TextEnd | None = None


def render(chat_model: ChatModel, messages: Messages, system: str = "") -> str:
    """The conversation in the model's own chat template, up to where its answer begins; raises CheckpointError."""
    return _render(chat_model, messages, system)[0]


def fit(chat_model: ChatModel, messages: Messages, system: str, max_new_tokens: int) -> Prompt:
    """Render what fits into the model's context: the oldest turns are dropped first, and `notes` says so.

    Raises RecipeError when the last message alone is too long, CheckpointError when the template fails.
    """
    dropped, messages = 0, list(messages)
    while True:
        text, note = _render(chat_model, messages, system)
        # A template writes its own BOS; only the plain fallback leaves that to the tokenizer.
        ids = chat_model.encode(text, special=note == NO_TEMPLATE)
        context = chat_model.context or len(ids) + max_new_tokens
        room = min(max_new_tokens, context - len(ids))
        if room >= min(max_new_tokens, context // 4):
            break
        shorter = _without_oldest_turn(messages)
        if not shorter:
            break
        dropped, messages = dropped + 1, shorter
    if room < 1:
        raise RecipeError(f"The message is {len(ids):,} tokens long, and this model reads {context:,} in all",
                          where=chat_model.name, todo="Shorten the message or the system prompt.")
    turns = "The oldest turn was" if dropped == 1 else f"The oldest {dropped} turns were"
    said = f"{turns} left out to fit into {context:,} tokens." if dropped else ""
    return Prompt(text, tuple(ids), room, tuple(n for n in (note, said) if n), chat_model.end)


def _without_oldest_turn(messages: Messages) -> list[Mapping[str, str]]:
    """The messages from the second user turn on; empty when there is only one turn."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return list(messages[users[1]:]) if len(users) > 1 else []


def _render(chat_model: ChatModel, messages: Messages, system: str) -> tuple[str, str]:
    """The rendered text and a remark about it, or an empty remark."""
    system, told = system.strip(), [_told(message) for message in messages]
    template = chat_model.template
    if template is None:
        lines = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in told]
        return "\n".join([*([f"{system}\n"] if system else []), *lines, "Assistant:"]), NO_TEMPLATE
    first = [{"role": "system", "content": system}] if system else []
    text = template.render([*first, *told], add_generation_prompt=True)
    return text, NO_SYSTEM if system and not template.habits.system else ""


def _told(message: Mapping[str, str]) -> Mapping[str, str]:
    """The message without thoughts, which stand beside it for the few templates that want them."""
    if message["role"] != "assistant":
        return message
    thoughts = thought(message["content"])
    beside = {"reasoning_content": thoughts, "thinking": thoughts} if thoughts else {}
    return {**beside, **message, "content": spoken(message["content"])}
