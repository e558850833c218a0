"""How surprised a model is by text: nats per token and per character, of the replies of dialogues or of plain text.

Tokens differ between models, characters do not: nats per character compare models with different tokenizers. A text begins as
the model's tokenizer begins it: after its start token, or, where it adds none, with the text's own first token, which is read
and not counted. No start token is put before a model that never saw one.
"""

from __future__ import annotations

import copy
import gzip
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from fusion.chat import ChatModel
from fusion.distill.dialogues import Dialogue
from fusion.distill.dialogues import load as load_dialogues
from fusion.distill.encoding import Encoded, Encoder, beyond
from fusion.distill.messages import said_in
from fusion.distill.records import read_records
from fusion.distill.teacher import LocalTeacher, batches, context_of, rows_of
from fusion.errors import CheckpointError, MismatchError, RecipeError
from fusion.evaluate.models import Models, fingerprints, lend
from fusion.evaluate.scores import Scores
from fusion.progress import Meter, Work

PER_TOKEN, PER_CHARACTER = "nats per token", "nats per character"
BEGINNING = ("A text begins as the model's tokenizer begins it; where that adds no start token, the first token of a text is read, "
             "but not counted.")
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


def read(source: str, limit: int | None = None, *, split: str = "train", subset: str = "") -> Data:
    """Read dialogues (see distill.dialogues), or plain text: a .txt file (pieces between empty lines), or records with `text`.

    Raises CheckpointError, RecipeError when there is nothing in it.
    """
    path = Path(source).expanduser()
    texts = _texts(path, limit) if path.name.endswith((".txt", ".txt.gz")) else _recorded(source, limit, split, subset)
    if texts is None:
        dialogues, report = load_dialogues(source, split=split, subset=subset, limit=limit)
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


def _texts(path: Path, limit: int | None) -> list[str]:
    """The pieces of a plain-text file."""
    try:
        content = path.read_bytes()
        return _pieces((gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig"))[:limit]
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({str(error)[:200]})", where=str(path)) from error


def _recorded(source: str, limit: int | None, split: str, subset: str) -> list[str] | None:
    """The texts of records, None when the first record is none with a `text` (but perhaps a dialogue)."""
    records = read_records(source, split, subset)
    first = next(records, ("", None))
    if not isinstance(first[1], Mapping) or not isinstance(first[1].get("text"), str) or not isinstance(said_in(first[1]), str):
        return None
    texts = (_text_of(record, origin) for origin, record in chain([first], records))
    return list(islice((text for text in texts if text.strip()), limit))


def _text_of(record: object, origin: str) -> str:
    text = record.get("text") if isinstance(record, Mapping) else None
    if not isinstance(text, str):
        raise RecipeError("a record has no text, though the first one has", where=origin)
    return text


def measure(models: Models, data: Data) -> Work[tuple[Scores, list[dict]]]:
    """Read all pieces with every model; yields Progress; returns the scores and a record per model and piece.

    Of dialogues the replies and their end tokens are counted, each model reading its own chat template. Of plain text every
    token is counted that something stands before, and what exceeds the context is read in windows that follow one another. A piece
    that some model cannot read counts for none; its record says why.
    """
    fingerprints(models)
    surprises = []
    for name, ref in models.items():
        with lend(ref, name) as model:
            surprises.append((yield from (_dialogues if data.dialogues else _plain)(_Reader(model, name), data)))
    return _scores(models, data, surprises), _records(models, data, surprises)


def _dialogues(reader: _Reader, data: Data) -> Work[list[_Surprise | str]]:
    encoder = Encoder(reader.tokenizer, None, reader.max_tokens, rows_of(reader.model))
    encoded = [_attempt(encoder, dialogue) for dialogue in data.dialogues]
    known = [i for i, its in enumerate(encoded) if isinstance(its, Encoded)]
    nats = yield from reader.nats([encoded[i] for i in known])
    found = list(encoded)
    for i, row in zip(known, nats, strict=True):
        found[i] = _of_dialogue(data.dialogues[i], encoded[i], row, encoder.cuts(encoded[i]))
    return found


def _attempt(encoder: Encoder, dialogue: Dialogue) -> Encoded | str:
    """The dialogue as a model reads it, or why nobody is measured on it."""
    try:
        encoded = encoder.encode(dialogue)
        encoder.check(dialogue, encoded)
    except MismatchError as error:
        return error.found
    return encoded if len(encoded.labels) else "nothing of a reply fits into its context"


def _of_dialogue(dialogue: Dialogue, encoded: Encoded, nats: np.ndarray, cut: bool) -> _Surprise | str:
    """What a dialogue cost. Where it was cut off, the last token is left out: it may end within a character."""
    whole = len(nats) - bool(cut and not encoded.ends[-1])
    characters = int(encoded.letters[:whole].sum())
    truncated = characters < sum(len(dialogue.turns[turn][1].strip()) for turn in dialogue.learnt)
    return _Surprise(float(nats[:whole].sum()), whole, characters, truncated) if characters else "its context ends in a reply"


def _plain(reader: _Reader, data: Data) -> Work[list[_Surprise | str]]:
    encoded, owners, skipped, rows, unreadable = [], [], [], rows_of(reader.model), set()
    for owner, text in enumerate(data.texts):
        start, ids, unread = _begun(reader.tokenizer, text)
        skipped.append(unread)
        if rows is not None and max((*start, *ids), default=0) >= rows:
            unreadable.add(owner)
            continue
        for window in _windows(text, start, ids, reader.max_tokens):
            encoded.append(window)
            owners.append(owner)
    nats = yield from reader.nats(encoded)
    sums, tokens = np.zeros(len(data.texts)), np.zeros(len(data.texts), int)
    for owner, row in zip(owners, nats, strict=True):
        sums[owner] += row.sum()
        tokens[owner] += len(row)
    characters = [len(text) - unread for text, unread in zip(data.texts, skipped, strict=True)]
    return [beyond(rows) if owner in unreadable else _Surprise(float(total), int(count), signs) if count and signs > 0
            else "a single token with nothing before it"
            for owner, (total, count, signs) in enumerate(zip(sums, tokens, characters, strict=True))]


def _begun(tokenizer, text: str) -> tuple[list[int], list[int], int]:
    """What a tokenizer puts before a text, the text's own ids, and how many of its characters nothing stands before."""
    try:
        ids, whole = (list(tokenizer(text, add_special_tokens=more)["input_ids"]) for more in (False, True))
    except (TypeError, UnicodeError) as error:  # half of a surrogate pair
        raise RecipeError("a text holds a sign that no tokenizer can read", where=ascii(text[:60])) from error
    at = next((at for at in range(len(whole) - len(ids) + 1) if whole[at:at + len(ids)] == ids), 0)
    if at or not ids:
        return whole[:at], ids, 0
    first = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][0][1] if tokenizer.is_fast \
        else len(tokenizer.decode(ids[:1]))
    return [], ids, int(first)


def _windows(text: str, start: list[int], ids: list[int], max_tokens: int | None) -> Iterator[Encoded]:
    """The text in pieces of at most `max_tokens`, each after the start tokens, or else after the last token before it."""
    context = len(start) or 1
    size = max((max_tokens or len(start) + len(ids)) - context, 1)
    for begin in range(0 if start else 1, len(ids), size):
        before = start or ids[begin - 1:begin]
        yield _window(text, [*before, *ids[begin:begin + size]], context)


def _window(text: str, ids: list[int], context: int) -> Encoded:
    labels = np.arange(context, len(ids))
    none = np.zeros(len(labels), np.int64)
    return Encoded(text, np.array(ids, np.int64), labels, none.astype(np.int32), none, none.astype(bool))


def _scores(models: Models, data: Data, surprises: list[list[_Surprise | str]]) -> Scores:
    """Two columns over the same pieces: per token and per character."""
    kept = [i for i in range(len(data)) if all(isinstance(row[i], _Surprise) for row in surprises)]
    if not kept:
        why = "; ".join(unread_notes(_records(models, data, surprises)))
        raise RecipeError(f"no piece of the data can be read by all models: {why}", todo="Leave out a model, or choose other data.")
    nats, tokens, characters, cut = (np.array([[getattr(row[i], field) for i in kept] for row in surprises])
                                     for field in ("nats", "tokens", "characters", "truncated"))
    weights = np.concatenate([tokens, characters], axis=1).astype(np.float64)
    values = np.concatenate([nats, nats], axis=1) / weights
    title = f"Loss on {len(kept)} of {len(data)} {'dialogues' if data.dialogues else 'texts'}"
    columns = (PER_TOKEN,) * len(kept) + (PER_CHARACTER,) * len(kept)
    truncated = np.concatenate([cut, cut], axis=1)
    return Scores(title, tuple(models), tuple(str(i) for i in kept) * 2, columns, values, truncated, weights,
                  summary=PER_CHARACTER, unit="nats, lower is better", better="low")


def _records(models: Models, data: Data, surprises: list[list[_Surprise | str]]) -> list[dict]:
    return [{"model": name, "origin": data.origins[i], **({"unread": its} if isinstance(its, str) else vars(its))}
            for name, row in zip(models, surprises, strict=True) for i, its in enumerate(row)]


def unread_notes(records: Sequence[Mapping]) -> list[str]:
    """Why pieces were left out for all models, how often, and for whose sake."""
    found = Counter((record["model"], record["unread"]) for record in records if "unread" in record)
    return [f"{model} cannot read {count} of the pieces: {reason}" for (model, reason), count in found.items()]


def per_token(scores: Scores) -> dict[str, float]:
    """Model → perplexity: e to the nats per token."""
    return {name: math.exp(value) for name, value in zip(scores.models, scores.means()[PER_TOKEN][0], strict=True)}
