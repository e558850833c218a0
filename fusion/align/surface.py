"""The surface of a token: the text it stands for, so that "Ġgo" of one tokenizer and "▁go" of another are the same " go".

Vocabularies with byte fallback have a byte piece `<0xNN>` for every byte, which they write only where no other token will do.
Bytes that are not yet a whole character are kept as lone surrogates (`surrogateescape`), so nothing is lost or confused.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
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


def byte_piece(token: str) -> int | None:
    """The byte that a token `<0xNN>` stands for, None for every other token."""
    found = _BYTE.fullmatch(token)
    return int(found[1], 16) if found else None


def surfaces(vocabulary: Iterable[str], added: Container[str] = ()) -> dict[str, str]:
    """The surface of every token of a vocabulary; `added` tokens are written as they are."""
    tokens = list(vocabulary)
    kind = tokenizer_kind(tokens)
    return {token: token if token in added else surface(token, kind) for token in tokens}


def surface(token: str, kind: str) -> str:
    """The text that a vocabulary entry stands for, its leading space included."""
    if kind == "bytes":
        table = _byte_characters()
        if all(character in table for character in token):
            return bytes(table[character] for character in token).decode("utf-8", "surrogateescape")
        return token  # an added token is written as it is
    if kind == "metaspace":
        byte = byte_piece(token)
        return token.replace("▁", " ") if byte is None else bytes([byte]).decode("utf-8", "surrogateescape")
    return token
