"""The surface of a token: the text it stands for, so that "Ġgo" of one tokenizer and "▁go" of another are the same " go".

Bytes that are not yet a whole character are kept as lone surrogates (`surrogateescape`), so nothing is lost or confused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_characters() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte: printable ones as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


def tokenizer_kind(vocabulary: Iterable[str]) -> str:
    """How a vocabulary writes spaces: "bytes" (Ġ, byte-level BPE), "metaspace" (▁, SentencePiece) or "plain"."""
    marks = {"Ġ": 0, "▁": 0}
    for token in vocabulary:
        if token[:1] in marks:
            marks[token[0]] += 1
    if not any(marks.values()):
        return "plain"
    return "bytes" if marks["Ġ"] >= marks["▁"] else "metaspace"


def surface(token: str, kind: str) -> str:
    """The text that a vocabulary entry stands for, its leading space included."""
    if kind == "bytes":
        table = _byte_characters()
        if all(character in table for character in token):
            return bytes(table[character] for character in token).decode("utf-8", "surrogateescape")
        return token  # an added token is written as it is
    if kind == "metaspace":
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape") if byte else token.replace("▁", " ")
    return token
