"""One vocabulary for models that have several: rows of embedding and head are put where the result has their tokens.

    pivot, targets, files = unify(pivot, targets, "union")

Modes: "" refuses different vocabularies · "pivot": the pivot's tokens; where a target lacks one, the pivot's row stands, so
that nothing moves there · "common": as "pivot", but only rows of tokens that all models share are merged · "union": the
pivot's tokens keep their ids, tokens that only targets have come after them; a model that lacks one has the row of the only
model that has it, or the mean of the rows of all that do, as mergekit does: nothing moves there that no model was trained for.
Rows behind the last token (padding) stay the pivot's. A token that a tokenizer has beyond its model's last row counts as one
that the model lacks. Price: rows are read one by one where the order differs; nothing is copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from fusion.align.surface import byte_piece
from fusion.anatomy import place
from fusion.checkpoint import Checkpoint, resized
from fusion.dtypes import ITEM_BYTES
from fusion.errors import MismatchError, RecipeError, nearest
from fusion.files import Span
from fusion.tokens import Added, Tokens, check_round_trip, extended, files_of
from fusion.view import View

FUSE_FIRST = "It needs pairwise fusion first: that turns any chat model into a target of the pivot's shape."
REBUILD = ("Set vocabulary to pivot, common or union (--vocabulary): pivot keeps the pivot's tokens, union adds those that only "
           "this model has.")
MODES = ("", "pivot", "common", "union")
_POSITIONS = re.compile(r"wpe|position")
_PADDING = 128  # vocabularies are padded to multiples of at most this


@dataclass(frozen=True)
class Rows:
    """Where the rows of one model's tables come from: row i of the result is row `row[i]` of `models[owner[i]]`, or the mean
    of the rows `means[i]`, each an owner and its row. `models[0]` is the model itself."""

    models: tuple[Checkpoint, ...]
    owner: np.ndarray
    row: np.ndarray
    means: Mapping[int, tuple[tuple[int, int], ...]]


class Remapped(View):
    """A model whose embedding and head have the rows of another vocabulary, `tokens`."""

    def __init__(self, model: Checkpoint, rows: Rows, tokens: Mapping[str, int]):
        super().__init__(model)
        self.rows, self.tokens = rows, tokens
        self.tables = frozenset(tables(model))
        count = len(rows.row)
        self.info = {name: replace(tensor, shape=(count, *tensor.shape[1:]), nbytes=count * math.prod(tensor.shape[1:])
                                   * ITEM_BYTES[tensor.dtype]) if name in self.tables else tensor
                     for name, tensor in model.info.items()}
        self.config = resized(model.config, count)

    def plain(self, name: str) -> bool:
        """See Checkpoint."""
        return name not in self.tables and self.model.plain(name)

    def span(self, name: str) -> Span | None:
        """See Checkpoint."""
        return None if name in self.tables else self.model.span(name)

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See Checkpoint."""
        if name not in self.tables:
            return self.model.read(name, start, stop, out)
        width = math.prod(self.info[name].shape[1:])
        first, last = start // max(width, 1), -(-stop // max(width, 1))
        for begin, end in self._runs(first, last):
            low, high = max(start, begin * width), min(stop, end * width)
            part = out[low - start:high - start]
            if begin in self.rows.means:
                part[:] = self._mean(name, begin, width)[low - begin * width:high - begin * width]
            else:
                shift = (int(self.rows.row[begin]) - begin) * width
                self.rows.models[self.rows.owner[begin]].read(name, low + shift, high + shift, part)
        return out[:stop - start]

    def _runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """The rows first … last in runs that lie one after the other in one model."""
        owner, row = self.rows.owner[first:last], self.rows.row[first:last]
        breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(row) != 1) | (row[:-1] < 0)) + first + 1
        edges = [first, *breaks.tolist(), last]
        return [(begin, end) for begin, end in pairwise(edges) if begin < end]

    def _mean(self, name: str, row: int, width: int) -> np.ndarray:
        total = np.zeros(width)
        for owner, its in self.rows.means[row]:
            total += self.rows.models[owner].read(name, its * width, (its + 1) * width, np.empty(width, np.float32))
        return (total / len(self.rows.means[row])).astype(np.float32)

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """See Checkpoint."""
        return self.tokens

    @cached_property
    def tied_copies(self) -> frozenset[str]:
        """See Checkpoint."""
        return self.model.tied_copies


def unify(pivot: Checkpoint, targets: Sequence[Checkpoint],
          mode: str) -> tuple[Checkpoint, tuple[Checkpoint, ...], dict[str, bytes]]:
    """The models with the output vocabulary that `mode` asks for, and the tokenizer files of the result by name.

    Models that need no change are returned as they are, and without any change there are no files. RecipeError for an unknown
    mode; MismatchError when vocabularies differ and `mode` is "", or when the united tokenizer fails its self-test;
    CheckpointError when a tokenizer is missing or broken.
    """
    if mode not in MODES:
        raise RecipeError(f"unknown vocabulary {mode!r}", where="vocabulary", todo=nearest(str(mode), MODES[1:]))
    if mode == "":
        for target in targets:
            refuse_difference(pivot, target)
        return pivot, tuple(targets), {}
    counts = [row_count(model) for model in (pivot, *targets)]
    known = [Tokens(model, count) for model, count in zip((pivot, *targets), counts, strict=True)]
    same = [(tokens.ids, count) == (known[0].ids, counts[0]) for tokens, count in zip(known, counts, strict=True)]
    if all(same):
        return pivot, tuple(targets), {}
    counterparts = [_counterparts(known[0], tokens) for tokens in known]
    added = _additions(known, counterparts) if mode == "union" else []
    new = [token for token, _ in added if token.text not in pivot.vocabulary]
    files = extended(known[0], new) if new else files_of(pivot)
    total = _padded(counts[0], known[0].ids, max((token.number + 1 for token, _ in added), default=0))
    if added:
        check_round_trip(known[0], files["tokenizer.json"], [token for token, _ in added], total)
    if mode == "common":
        shared = set.intersection(*(set(its) for its in counterparts))
        counterparts = [{number: its[number] for number in shared} for its in counterparts]
    tokens = {**known[0].ids, **{token.text: token.number for token, _ in added}}
    rows = [_rows(known, j, counterparts[j], added, total) for j in range(len(known))]
    views = [entry.model if equal and mode != "common" and not added else Remapped(entry.model, its, tokens)
             for entry, its, equal in zip(known, rows, same, strict=True)]
    return views[0] if added else pivot, tuple(views[1:]), files


def refuse_difference(pivot: Checkpoint, target: Checkpoint) -> None:
    """MismatchError that says which tokens differ, unless the vocabularies agree or one of them is not known."""
    found = unlike(pivot, target)
    if found:
        raise MismatchError(f"its vocabulary differs from the pivot's: {found.text}", where=target.name, todo=f"{found.advice}")


@dataclass(frozen=True)
class Unlike:
    """How two vocabularies differ: in words, and what to do about it."""

    text: str
    advice: str


def unlike(pivot: Checkpoint, target: Checkpoint) -> Unlike | None:
    """How the tokens of a target differ from the pivot's, those left out that have no row; None where they agree or one of both
    vocabularies is not known."""
    mine, theirs = with_rows(pivot), with_rows(target)
    if mine is None or theirs is None or mine == theirs:
        return None
    lacking = [token for token in mine if token not in theirs]
    new = [token for token in theirs if token not in mine]
    moved = [token for token in theirs if token in mine and mine[token] != theirs[token]]
    said = [f"{len(tokens)} {what} ({', '.join(map(repr, tokens[:3]))}{' …' if len(tokens) > 3 else ''})"
            for tokens, what in ((lacking, "missing"), (new, "new"), (moved, "at other ids")) if tokens]
    if len(new) * 2 > len(theirs) and len(lacking) * 2 > len(mine):
        return Unlike(", ".join(said), FUSE_FIRST)
    return Unlike(", ".join(said), REBUILD)


def with_rows(model: Checkpoint) -> Mapping[str, int] | None:
    """The tokens of a model without those that were added beyond the last row of its embedding; None where they are not known."""
    beyond = set(without_rows(model)) & set(model.added_tokens)
    return {token: number for token, number in model.vocabulary.items() if token not in beyond} if beyond else model.vocabulary


def without_rows(model: Checkpoint) -> list[str]:
    """The tokens of a tokenizer beyond the last row of the model's embedding."""
    rows = max((model.info[name].shape[0] for name in tables(model)), default=None)
    return [] if rows is None else [token for token, number in (model.vocabulary or {}).items()
                                    if type(number) is int and number >= rows]


def tables(model: Checkpoint) -> list[str]:
    """The tensors with one row per token: embeddings, heads and their biases, as many rows as the vocabulary has."""
    found = [name for name, tensor in model.info.items() if place(name).layer is None and tensor.shape
             and place(name).kind in ("embedding", "head") and not _POSITIONS.search(name)]
    size = model.vocab_size
    if size is None or not any(model.info[name].shape[0] == size for name in found):
        size = max((model.info[name].shape[0] for name in found), default=0)
    return [name for name in found if model.info[name].shape[0] == size]


def row_count(model: Checkpoint) -> int:
    """Rows of a model's tables; MismatchError when it has none, or no row for a token that was not added later."""
    names, tokens = tables(model), Tokens(model)
    count = model.info[names[0]].shape[0] if names else 0
    needed = max((number for token, number in tokens.ids.items() if token not in model.added_tokens), default=-1) + 1
    if count < needed:
        raise MismatchError(f"its embedding has {count} rows for {needed} tokens", where=model.name,
                            todo="Give the tokenizer that belongs to these weights.")
    return count


def _counterparts(pivot: Tokens, tokens: Tokens) -> dict[int, int]:
    """Pivot id → the id of the same token in another vocabulary: the same string, else (where two tokenizers write spaces
    differently) the same text."""
    found = {number: tokens.ids[token] for token, number in pivot.ids.items() if token in tokens.ids}
    taken = set(found.values())
    rest = sorted((token for token in tokens.ids if tokens.ids[token] not in taken),
                  key=lambda token: (byte_piece(token) is None, -tokens.ids[token]))  # a byte's name gives way, then the higher id
    free = {tokens.text(token): tokens.ids[token] for token in rest}
    for token, number in pivot.ids.items():
        other = free.get(pivot.text(token)) if free and number not in found else None
        if other is not None and other not in taken:
            found[number] = other
            taken.add(other)
    return found


def _additions(known: Sequence[Tokens], counterparts: Sequence[Mapping[int, int]]) -> list[tuple[Added, dict[int, int]]]:
    """The tokens that only targets have, in the order of targets and ids, each with its id in every target that has it (by
    the target's number). Pieces of characters are left out: no text contains them."""
    texts = {known[0].text(token) for token in known[0].ids}
    owners: dict[str, dict[int, int]] = {}
    special: dict[str, bool] = {}
    for j, tokens in enumerate(known[1:], 1):
        taken = set(counterparts[j].values())
        for token, number in sorted(tokens.ids.items(), key=lambda item: item[1]):
            text = tokens.text(token) if number not in taken else ""
            if text.strip() and text not in texts and _whole(text):
                owners.setdefault(text, {}).setdefault(j, number)
                special[text] = special.get(text, False) or tokens.added.get(token, False)
    full = known[0].model.vocabulary or {}
    first, new = max(full.values()) + 1, [text for text in owners if text not in full]  # others had an id, but no row
    numbers = {**full, **{text: first + i for i, text in enumerate(new)}}
    return [(Added(text, numbers[text], special[text]), its) for text, its in owners.items()]


def _whole(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _padded(rows: int, ids: Mapping[str, int], needed: int) -> int:
    """Rows of the result: added tokens use the padding first; a padded table stays padded to the same multiple."""
    if needed <= rows:
        return rows
    multiple = math.gcd(rows, _PADDING) if max(ids.values()) + 1 < rows else 1
    return -(-needed // multiple) * multiple


def _rows(known: Sequence[Tokens], j: int, counterpart: Mapping[int, int], added: Sequence[tuple[Added, dict[int, int]]],
          total: int) -> Rows:
    """The rows of model `j` (0: the pivot) for every row of the result."""
    have = row_count(known[0].model)
    models = (known[j].model, known[0].model, *(tokens.model for tokens in known))
    owner, row, means = np.ones(total, np.int64), np.minimum(np.arange(total), have - 1), {}
    for number, own in counterpart.items():
        owner[number], row[number] = 0, own
    for token, owners in added:
        holders = tuple((2 + other, its) for other, its in owners.items())
        if j in owners:
            owner[token.number], row[token.number] = 0, owners[j]
        elif len(holders) == 1:
            owner[token.number], row[token.number] = holders[0]
        else:
            owner[token.number], row[token.number], means[token.number] = 0, -1, holders
    return Rows(models, owner, row, means)
