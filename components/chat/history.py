"""The conversation as the page keeps it: frozen turns, one question each, with the replies of all models by their key.

Columns are views of it: every turn stands in every column, also where a model was not asked. A turn has as many messages in
a column as its model's thoughts make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.chat.markdown import as_written
from fusion.chat import Exchange, Part, Reply, Sampling, Transcript

NOT_ASKED = "*Not asked yet. **Retry** asks this model too.*"
CUT_THOUGHT = "*The limit came before an answer.*"
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
    """What this model is told: the turns that it has answered, without its thoughts, and the new prompt."""
    answered = [(turn.prompt, reply.spoken) for turn in conversation if (reply := turn.reply(key)) and _usable(reply)]
    said = [{"role": role, "content": text} for pair in answered for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*said, {"role": "user", "content": prompt}]


def view(conversation: Conversation, key: str | None) -> list[dict]:
    """One column: for every turn the question, then what this model thought and replied, in Markdown that shows all of it."""
    return [message for turn in conversation for message in _turn(turn, key)]


def turn_at(conversation: Conversation, message_index: object, key: str | None = None) -> int:
    """The turn that a message of this model's column belongs to; the index comes from the client, so -1 for nonsense."""
    if not isinstance(message_index, int) or isinstance(message_index, bool) or message_index < 0:
        return -1
    for at, turn in enumerate(conversation):
        message_index -= len(_turn(turn, key))
        if message_index < 0:
            return at
    return -1


def transcripts(conversation: Conversation, titles: Sequence[tuple[str, str]]) -> list[Transcript]:
    """One transcript per (key, title) that was asked anything."""
    sides = ((key, title, tuple(Exchange(turn.prompt, turn.sampling, reply) for turn in conversation
                                if (reply := turn.reply(key)))) for key, title in titles)
    return [Transcript(title, key, exchanges) for key, title, exchanges in sides if exchanges]


def _usable(reply: Reply) -> bool:
    """An answer that failed or is empty would only confuse the model that reads it again."""
    return reply.finish != "error" and bool(reply.spoken.strip())


def _turn(turn: Turn, key: str | None) -> list[dict]:
    return [_message("user", as_written(turn.prompt)), *_shown(turn.reply(key))]


def _shown(reply: Reply | None) -> list[dict]:
    """The messages of one reply: thoughts folded, the answer, and a remark where there is none."""
    if reply is None:
        return [_message("assistant", NOT_ASKED)]
    shown = [_thought(part, bool(reply.finish)) if part.thought else _message("assistant", as_written(part.text))
             for part in reply.parts if part.text.strip()]
    if reply.finish == "error":
        return [*shown, _message("assistant", as_written(f"⚠️ {reply.error}"))]
    if not reply.finish:
        return shown or [_message("assistant", "…")]
    remark = {"stop": NO_WORDS, "length": CUT_THOUGHT if shown else NO_WORDS}.get(reply.finish, "…")
    return shown if reply.spoken.strip() else [*shown, _message("assistant", remark)]


def _thought(part: Part, ended: bool) -> dict:
    status = "done" if part.closed or ended else "pending"  # a pending one is unfolded and turns
    return {**_message("assistant", as_written(part.text)), "metadata": {"title": "Reasoning", "status": status}}


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}  # plain strings lose their indentation on the way
