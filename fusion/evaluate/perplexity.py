"""How surprised a model is by text: nats per token and per character, of the replies of dialogues or of plain text.

Tokens differ between models, characters do not: nats per character compare models with different tokenizers.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from fusion.chat import ChatModel
from fusion.distill.dialogues import Dialogue
from fusion.distill.dialogues import load as load_dialogues
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.teacher import LocalTeacher, batches, context_of
from fusion.errors import CheckpointError, MismatchError, RecipeError
from fusion.evaluate.models import Models, fingerprints, lend
from fusion.evaluate.scores import Scores
from fusion.progress import Meter, Work

PER_TOKEN, PER_CHARACTER = "nats per token", "nats per character"
BATCH_TOKENS = 4096
_DAMAGED = "its losses are not finite"


@dataclass(frozen=True)
class Data:
    """What is read: dialogues, or plain `texts` when there are no dialogues; `origins` says where each piece came from."""

    dialogues: tuple[Dialogue, ...] = ()
    texts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    report: str = ""

    def __len__(self) -> int:
        return len(self.dialogues) or len(self.texts)


@dataclass(frozen=True)
class _Surprise:
    """What one piece cost a model: nats over so many tokens and characters; `truncated` where its context ended before it."""

    nats: float
    tokens: int
    characters: int
    truncated: bool = False


class _Reader(LocalTeacher):
    """The same reading for a model that is already loaded."""

    def __init__(self, model: ChatModel, name: str):
        self.model, self.device, self.mark = model.model, model.model.device, name
        self.max_tokens = context_of(model.model.config)
        self.tokenizer = copy.deepcopy(model.tokenizer)  # a tokenizer refuses to serve two threads, and the model may be lent

    def nats(self, encoded: Sequence[Encoded]) -> Work[list[np.ndarray]]:
        """The loss at every label of every piece; yields Progress."""
        found: list[np.ndarray] = [np.empty(0)] * len(encoded)
        meter = Meter(f"Reading, {self.mark}", len(encoded), "pieces")
        for batch in batches([len(its.ids) for its in encoded], BATCH_TOKENS):
            for i, rows in zip(batch, self.rows([encoded[i] for i in batch], 1), strict=True):
                found[i] = rows.nats.astype(np.float64)
            yield meter.step(len(batch))
        if not all(np.isfinite(row).all() for row in found):
            raise CheckpointError(_DAMAGED, where=self.mark, todo="Its weights are damaged, or a merge went out of range.")
        return found


def read(source: str, limit: int | None = None) -> Data:
    """Read dialogues (see distill.dialogues), or plain text: a .txt file (pieces between empty lines) or .jsonl with `text`.

    Raises CheckpointError, RecipeError when there is nothing in it.
    """
    path = Path(source).expanduser()
    texts = _texts(path, limit)
    if texts is None:
        dialogues, report = load_dialogues(source, limit=limit)
        return Data(tuple(dialogues), (), tuple(its.origin for its in dialogues), str(report))
    if not texts:
        raise RecipeError("there is no text in it", where=source)
    return Data((), tuple(texts), tuple(f"{path.name} piece {n}" for n in range(1, len(texts) + 1)), f"{len(texts)} texts")


def from_text(text: str) -> Data:
    """Plain text as a .txt file holds it, pieces between empty lines; RecipeError when there is none."""
    pieces = _pieces(text)
    if not pieces:
        raise RecipeError("there is no text to read", todo="Paste some sentences, pieces apart by an empty line.")
    return Data((), tuple(pieces), tuple(f"piece {n}" for n in range(1, len(pieces) + 1)), f"{len(pieces)} texts, pasted")


def _pieces(text: str) -> list[str]:
    return [piece for piece in text.replace("\r\n", "\n").split("\n\n") if piece.strip()]


def _texts(path: Path, limit: int | None) -> list[str] | None:
    """The pieces of a plain-text file, None when it is not one: a .jsonl is, when its first record has a `text`."""
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8") as lines:
            if path.suffix == ".txt":
                return _pieces(lines.read())[:limit]
            records = (json.loads(line) for line in lines if line.strip())
            first = next(records, None)
            if not isinstance(first, dict) or not isinstance(first.get("text"), str):
                return None
            texts = (record["text"] for record in chain([first], records))
            return list(islice((text for text in texts if text.strip()), limit))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read ({str(error)[:200]})", where=str(path)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError("a record has no text, though the first one has", where=str(path)) from error


def measure(models: Models, data: Data) -> Work[tuple[Scores, list[dict]]]:
    """Read all pieces with every model; yields Progress; returns the scores and a record per model and piece.

    Of dialogues the replies and their end tokens are counted, each model reading its own chat template. Of plain text every
    token is counted: it begins after the tokenizer's start token, and what exceeds the context is read in windows that follow
    one another. A piece that some model cannot read counts for none.
    """
    fingerprints(models)
    surprises = []
    for name, ref in models.items():
        with lend(ref, name) as model:
            surprises.append((yield from (_dialogues if data.dialogues else _plain)(_Reader(model, name), data)))
    return _scores(tuple(models), data, surprises), _records(models, data, surprises)


def _dialogues(reader: _Reader, data: Data) -> Work[list[_Surprise | None]]:
    encoder = Encoder(reader.tokenizer, None, reader.max_tokens)
    encoded = [_attempt(encoder.encode, dialogue) for dialogue in data.dialogues]
    known = [i for i, its in enumerate(encoded) if its is not None and len(its.labels)]
    nats = yield from reader.nats([encoded[i] for i in known])
    found: list[_Surprise | None] = [None] * len(encoded)
    for i, row in zip(known, nats, strict=True):
        found[i] = _of_dialogue(data.dialogues[i], encoded[i], row, reader.max_tokens)
    return found


def _attempt(encode: Callable[[Dialogue], Encoded], dialogue: Dialogue) -> Encoded | None:
    try:
        return encode(dialogue)
    except MismatchError:  # the template changes this message: nobody is measured on it
        return None


def _of_dialogue(dialogue: Dialogue, encoded: Encoded, nats: np.ndarray, max_tokens: int | None) -> _Surprise | None:
    """What a dialogue cost. Where it was cut off, the last token is left out: only before it the characters are known."""
    replies = [len(answer.strip()) for _, answer in dialogue.turns]
    last = int(encoded.turn[-1])
    if max_tokens is None or len(encoded.ids) < max_tokens or (last == len(replies) - 1 and encoded.ends[-1]):
        return _Surprise(float(nats.sum()), len(nats), sum(replies))
    reached = replies[last] if encoded.ends[-1] else max(0, int(encoded.reached[-1]))
    whole = len(nats) if encoded.ends[-1] else len(nats) - 1
    characters = sum(replies[:last]) + reached
    return _Surprise(float(nats[:whole].sum()), whole, characters, True) if characters else None


def _plain(reader: _Reader, data: Data) -> Work[list[_Surprise | None]]:
    encoded, owners = [], []
    for owner, text in enumerate(data.texts):
        for window in _windows(reader, text):
            encoded.append(window)
            owners.append(owner)
    nats = yield from reader.nats(encoded)
    sums, tokens = np.zeros(len(data.texts)), np.zeros(len(data.texts), int)
    for owner, row in zip(owners, nats, strict=True):
        sums[owner] += row.sum()
        tokens[owner] += len(row)
    return [_Surprise(float(total), int(count), len(text)) if count else None
            for total, count, text in zip(sums, tokens, data.texts, strict=True)]


def _windows(reader: _Reader, text: str) -> list[Encoded]:
    tokenizer, start = reader.tokenizer, reader.tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise CheckpointError("its tokenizer has neither start nor end token", where=reader.mark)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = (reader.max_tokens or len(ids) + 1) - 1
    return [_window(text, [start, *ids[begin:begin + size]]) for begin in range(0, len(ids), size)]


def _window(text: str, ids: list[int]) -> Encoded:
    labels = np.arange(1, len(ids))
    none = np.zeros(len(labels), np.int64)
    return Encoded(text, np.array(ids, np.int64), labels, none.astype(np.int32), none, none.astype(bool))


def _scores(models: tuple[str, ...], data: Data, surprises: list[list[_Surprise | None]]) -> Scores:
    """Two columns over the same pieces: per token and per character."""
    kept = [i for i in range(len(data)) if all(row[i] is not None for row in surprises)]
    if not kept:
        raise RecipeError("no piece of the data can be read by all models", todo="Leave out a model, or choose other data.")
    nats, tokens, characters, cut = (np.array([[getattr(row[i], field) for i in kept] for row in surprises])
                                     for field in ("nats", "tokens", "characters", "truncated"))
    weights = np.concatenate([tokens, characters], axis=1).astype(np.float64)
    values = np.concatenate([nats, nats], axis=1) / weights
    title = f"Perplexity on {len(kept)} of {len(data)} {'dialogues' if data.dialogues else 'texts'}"
    return Scores(title, models, tuple(str(i) for i in kept) * 2, (PER_TOKEN,) * len(kept) + (PER_CHARACTER,) * len(kept), values,
                  np.concatenate([cut, cut], axis=1), weights, summary=PER_CHARACTER, unit="nats, lower is better", better="low")


def _records(models: Models, data: Data, surprises: list[list[_Surprise | None]]) -> list[dict]:
    return [{"model": name, "origin": data.origins[i], **(vars(its) if its else {"unread": True})}
            for name, row in zip(models, surprises, strict=True) for i, its in enumerate(row)]


def per_token(scores: Scores) -> dict[str, float]:
    """Model → perplexity: e to the nats per token."""
    return {name: math.exp(value) for name, value in zip(scores.models, scores.means()[PER_TOKEN][0], strict=True)}
