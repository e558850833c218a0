"""Tokenizers as files: which text a token stands for, into which pieces a model cuts it, and a tokenizer with tokens added.

The `tokenizers` library is loaded when one is first needed. Price: a second or so for a vocabulary of 150 000 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from fusion.align.surface import surfaces
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, MismatchError
from fusion.files import read_json
from fusion.side_files import copied, is_tokenizer_file

SAMPLES = ("The quick brown fox jumps over 13 lazy dogs.", "Grüße aus Köln: ça va? Ñandú.", "Привет, как дела?", "你好，世界！",
           "こんにちは世界", "안녕하세요 세계", "مرحبا بالعالم", "नमस्ते दुनिया", "def f(x):\n    return x ** 2  # squared\n",
           "🙂 ✓ – “quoted”")


@dataclass(frozen=True)
class Added:
    """One token to add: the text it stands for, its id, and whether it is a mark such as end-of-turn."""

    text: str
    number: int
    special: bool


class Tokens:
    """The tokenizer of a checkpoint; `ids` has the tokens below `rows`. CheckpointError when it has none or a broken one."""

    def __init__(self, model: Checkpoint, rows: int | None = None):
        if not model.vocabulary:
            raise CheckpointError("there is no tokenizer.json, so its tokens are not known", where=model.name,
                                  todo="Save its tokenizer with AutoTokenizer.from_pretrained(…).save_pretrained(…).")
        bad = next((token for token, number in model.vocabulary.items() if type(number) is not int or number < 0), None)
        if bad is not None:
            raise CheckpointError(f"the id of token {bad!r} is {model.vocabulary[bad]!r}", where=model.name)
        self.model = model
        self.ids = {token: number for token, number in model.vocabulary.items() if rows is None or number < rows}

    @cached_property
    def file(self) -> dict:
        """The content of tokenizer.json."""
        return read_json(self.model.file("tokenizer.json"))

    @cached_property
    def added(self) -> Mapping[str, bool]:
        """Text of every added token → whether it is special."""
        listed = self.file.get("added_tokens")
        return {str(token["content"]): bool(token.get("special")) for token in (listed if isinstance(listed, list) else ())
                if isinstance(token, dict) and "content" in token}

    @cached_property
    def texts(self) -> Mapping[str, str]:
        """The text of every token; see `align.surface`."""
        return surfaces(self.ids, self.added)

    def text(self, token: str) -> str:
        """The text that a token stands for; bytes that are no whole character are lone surrogates."""
        return self.texts[token]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer itself (`tokenizers.Tokenizer`)."""
        return load(self.model.file("tokenizer.json").read_bytes(), self.model.name)

    def pieces(self, text: str) -> tuple[int, ...]:
        """The ids into which this tokenizer cuts a text, marks around it left out."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)


def load(content: bytes, where: str) -> Any:
    """A tokenizer from the bytes of tokenizer.json; CheckpointError when the library does not take them."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"tokenizer.json cannot be used ({error})", where=where, todo="Save the tokenizer again.") from error


def files_of(model: Checkpoint) -> dict[str, bytes]:
    """Every tokenizer file of a checkpoint, by name."""
    return {name: file.read_bytes() for name, file in copied(model).items() if is_tokenizer_file(name)}


def extended(pivot: Tokens, added: Sequence[Added]) -> dict[str, bytes]:
    """The pivot's tokenizer files with more tokens; every old token keeps its id."""
    entries = [{"id": token.number, "content": token.text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": token.special} for token in added]
    files = files_of(pivot.model)
    tokenizer = {**pivot.file, "added_tokens": [*(pivot.file.get("added_tokens") or ()), *entries]}
    files["tokenizer.json"] = _json(tokenizer)
    config = read_json(pivot.model.file("tokenizer_config.json"))
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        more = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in entries}
        files["tokenizer_config.json"] = _json({**config, "added_tokens_decoder": {**listed, **more}})
    if "added_tokens.json" in files:
        known = read_json(pivot.model.file("added_tokens.json"))
        files["added_tokens.json"] = _json({**known, **{token.text: token.number for token in added}})
    return files


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def check_round_trip(pivot: Tokens, content: bytes, added: Sequence[Added], rows: int) -> None:
    """MismatchError unless a new tokenizer.json keeps every old id, has each added token at its id below `rows`, and gives
    sample texts in ten scripts back as they were (or as the pivot's own tokenizer does)."""
    new = load(content, "the tokenizer of the result")
    moved = next((token for token, number in pivot.ids.items() if new.token_to_id(token) != number), None)
    if moved is not None:
        raise _broken(f"token {moved!r} would move from {pivot.ids[moved]} to {new.token_to_id(moved)}")
    for token in added:
        if new.token_to_id(token.text) != token.number or not token.number < rows:
            raise _broken(f"token {token.text!r} would not have the id {token.number} of {rows} rows")
        if new.decode([token.number], skip_special_tokens=False).strip() != token.text.strip():
            raise _broken(f"token {token.text!r} would not be written as it is")
    for text in (*SAMPLES, *(f"{one.text}{other.text}" for one, other in pairwise(added[:8]))):
        ids = new.encode(text, add_special_tokens=False).ids
        back = new.decode(ids, skip_special_tokens=False)
        if back != text and back != pivot.tokenizer.decode(pivot.pieces(text), skip_special_tokens=False):
            raise _broken(f"{text!r} would come back as {back!r}")
        if max(ids, default=0) >= rows:
            raise _broken(f"{text!r} would need token {max(ids)} of {rows} rows")


def _broken(found: str) -> MismatchError:
    return MismatchError(f"the united tokenizer would not work: {found}", todo="Choose the vocabulary `pivot` or `common`.")
