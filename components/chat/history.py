"""The conversation as the page keeps it: frozen turns, one question each, with the replies of all models by their key.

Columns are views of it. Every turn has the same place in every column, also where a model was not asked, so an index
into one column's messages means the same turn in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusion.chat import Exchange, Reply, Sampling, Transcript

NOT_ASKED = "*Not asked yet. **Retry** asks this model too.*"
NO_WORDS = "*The model ended its answer without a word.*"


@dataclass(frozen=True)
class Turn:
    """One question, how it was sampled, and (key, reply) of every model that was asked."""

    prompt: str
    sampling: Sampling
    replies: tuple[tuple[str, Reply], ...] = ()

    def reply(self, key: str | None) -> Reply | None:
        """What this model replied, or None when it was not asked."""
        return dict(self.replies).get(key or "")

    def with_replies(self, replies: dict[str, Reply]) -> Turn:
        """This turn with newer replies; models that are not named keep theirs."""
        return Turn(self.prompt, self.sampling, tuple((dict(self.replies) | replies).items()))


Conversation = tuple[Turn, ...]


def messages_for(conversation: Conversation, key: str, prompt: str) -> list[dict[str, str]]:
    """What this model is told: the turns that it has answered, and the new prompt."""
    answered = [(turn.prompt, reply.text) for turn in conversation if (reply := turn.reply(key)) and _usable(reply)]
    said = [{"role": role, "content": text} for pair in answered for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*said, {"role": "user", "content": prompt}]


def view(conversation: Conversation, key: str | None) -> list[dict[str, str]]:
    """One column: two messages per turn, the question and what this model replied."""
    return [message for turn in conversation
            for message in ({"role": "user", "content": turn.prompt},
                            {"role": "assistant", "content": _shown(turn.reply(key))})]


def turn_at(conversation: Conversation, message_index: object) -> int:
    """The turn that a message of any column belongs to; the index comes from the client, so -1 for nonsense."""
    whole = isinstance(message_index, int) and not isinstance(message_index, bool)
    return message_index // 2 if whole and 0 <= message_index // 2 < len(conversation) else -1


def transcripts(conversation: Conversation, titles: Sequence[tuple[str, str]]) -> list[Transcript]:
    """One transcript per (key, title) that was asked anything."""
    sides = ((key, title, tuple(Exchange(turn.prompt, turn.sampling, reply) for turn in conversation
                                if (reply := turn.reply(key)))) for key, title in titles)
    return [Transcript(title, key, exchanges) for key, title, exchanges in sides if exchanges]


def _usable(reply: Reply) -> bool:
    """An answer that failed or is empty would only confuse the model that reads it again."""
    return reply.finish != "error" and bool(reply.text)


def _shown(reply: Reply | None) -> str:
    if reply is None:
        return NOT_ASKED
    if reply.finish == "error":
        return f"{reply.text}\n\n⚠️ {reply.error}".strip()
    if reply.finish and not reply.text:
        return NO_WORDS if reply.finish == "stop" else "…"
    return reply.text or "…"
