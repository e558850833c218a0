"""What a record says: ShareGPT-style and OpenAI-style messages, brought into one form, or why they cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fusion.distill.records import MESSAGES

_ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
          "bot": "assistant", "chatbot": "assistant", "ai": "assistant", "model": "assistant", "bing": "assistant",
          "bard": "assistant", "system": "system", "developer": "system"}
_TOOLS = {"tool", "function", "ipython", "observation", "function_call", "tool_call", "tool_response", "tool_calls", "environment"}
_ROLE, _TEXT, _CALLS = ("from", "role"), ("value", "content"), ("tool_calls", "function_call")
_LEARNT = ("weight", "train", "training", "loss", "loss_mask")  # 0 or false: a message that is read, but not learnt
_NONE = "no messages: neither `conversations` (from, value) nor `messages` (role, content)"


class Message(NamedTuple):
    """One message: `role` "user", "assistant" or "system", its text, whether it is to be learnt."""

    role: str
    text: str
    learnt: bool = True


def said_in(record: object) -> list[Message] | str:
    """The messages of a record, or the reason why it has none that can be used."""
    entries = _entries(record)
    if entries is None:
        columns = f" (its columns: {', '.join(map(str, record))[:80]})" if isinstance(record, Mapping) and record else ""
        return f"{_NONE}{columns}"
    said = []
    for entry in entries:
        message = _message(entry)
        if isinstance(message, str):
            return message
        said.append(message)
    return said


def _entries(record: object) -> Sequence[Mapping] | None:
    """The list of messages in a record, which may be that list itself."""
    for found in [_rows(record.get(key)) for key in MESSAGES] if isinstance(record, Mapping) else [record]:
        if isinstance(found, Sequence) and not isinstance(found, (str, bytes)) and found and all(
                isinstance(entry, Mapping) for entry in found):
            keys = set().union(*found)
            if keys & set(_ROLE) and keys & {*_TEXT, *_CALLS}:
                return found
    return None


def _rows(found: object) -> object:
    """A table of columns of one length, as datasets store some lists of messages, as the list of its rows."""
    columns = list(found.values()) if isinstance(found, Mapping) else []
    if not columns or not all(isinstance(its, list) and len(its) == len(columns[0]) for its in columns):
        return found
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def _message(entry: Mapping) -> Message | str:
    """One message, or what is wrong with it."""
    name = next((entry[key] for key in _ROLE if entry.get(key) is not None), None)
    known = name.strip().lower() if isinstance(name, str) else ""
    if known in _TOOLS:
        return f"a turn of a tool (role {name.strip()!r})"
    if known not in _ROLES:
        return f"an unknown role {str(name)[:40]!r}"
    if any(entry.get(key) for key in _CALLS):
        return "a call of a tool"
    text, fault = text_of(next((entry[key] for key in _TEXT if entry.get(key) is not None), None))
    return fault or Message(_ROLES[known], text, not any(_zero(entry.get(key)) for key in _LEARNT))


def text_of(content: object) -> tuple[str, str]:
    """The text of a message, that of a list of parts too, and what is wrong with it, "" for nothing."""
    if isinstance(content, str):
        return content, ""
    if content is None:
        return "", "a message without text (null)"
    if not isinstance(content, Sequence):
        return "", f"a message whose text is no text, but {_kind(content)}"
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", "") if isinstance(part, Mapping) else _kind(part)
            return "", f"a message with a part that is no text ({str(kind)[:40]!r})"
        texts.append(text)
    return "".join(texts), ""


def _zero(value: object) -> bool:
    return str(value).strip().lower() in ("0", "0.0", "false")


def _kind(value: object) -> str:
    return {bool: "true or false", int: "a number", float: "a number"}.get(type(value), "a table")
