"""A conversation as JSON lines: one line per model, with everything needed to ask the same again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from fusion.chat.sampling import Sampling
from fusion.chat.streaming import Reply

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Exchange:
    """One question, how it was sampled, and one model's reply to it."""

    prompt: str
    sampling: Sampling
    reply: Reply


@dataclass(frozen=True)
class Transcript:
    """One model's side of a conversation: its title, its key, and the fingerprint of its recipe if that is known."""

    model: str
    key: str
    exchanges: tuple[Exchange, ...]
    recipe: str = ""


def conversation_jsonl(transcripts: Iterable[Transcript], created: datetime | None = None) -> str:
    """JSON lines, one per transcript: schema_version, created (ISO 8601, UTC), model, key, recipe, messages, turns.

    `turns` has one entry per assistant message: sampling, rendered_prompt, finish_reason, tokens, seconds, notes,
    error.
    """
    moment = (created or datetime.now(timezone.utc)).astimezone(timezone.utc).isoformat(timespec="seconds")
    return "".join(json.dumps(_line(transcript, moment), ensure_ascii=False) + "\n" for transcript in transcripts)


def _line(transcript: Transcript, created: str) -> dict[str, object]:
    messages = [{"role": role, "content": content} for exchange in transcript.exchanges
                for role, content in (("user", exchange.prompt), ("assistant", exchange.reply.text))]
    return {"schema_version": SCHEMA_VERSION, "created": created, "model": transcript.model, "key": transcript.key,
            "recipe": transcript.recipe or None, "messages": messages,
            "turns": [_turn(exchange) for exchange in transcript.exchanges]}


def _turn(exchange: Exchange) -> dict[str, object]:
    reply = exchange.reply
    return {"sampling": asdict(exchange.sampling), "rendered_prompt": reply.prompt, "finish_reason": reply.finish,
            "tokens": reply.tokens, "seconds": round(reply.seconds, 3), "notes": list(reply.notes),
            "error": reply.error or None}
