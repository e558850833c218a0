"""What a source says at a label of the pivot, in the pivot's tokens: which of its positions is heard there, and as what.

A source is heard where it stands at the same point of the text, and (mapping "spelling") where the pivot is inside one of its
tokens: of what it expected there, that which goes on as the pivot has written since. Chances are out of 1 and what has no
counterpart is missing from them, so nothing is made surer than the source was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fusion.align import LEAST, Alignment, by_offsets, gathered, looked_up, tell, warp
from fusion.distill.encoding import Encoded
from fusion.distill.spelling import Vocabulary
from fusion.distill.store import Rows


@dataclass(frozen=True)
class Carried:
    """A source's words at the pivot's L labels: `at` [L] the source label that is heard, −1 for none; `ids` [L, k + 1] over
    pivot ids (−1 = empty) and their `chances`, out of 1; `read` [L] the mass of the source's entries there.

    `become` [L, k] the pivot id of each of the source's own entries, `chance` [L, k] what each of them has there, before any
    were joined; `pieces`: the labels that the source writes in several tokens, with the source's labels of these.
    """

    at: np.ndarray
    ids: np.ndarray
    chances: np.ndarray
    read: np.ndarray
    become: np.ndarray = field(repr=False)
    chance: np.ndarray = field(repr=False)
    pieces: dict[int, range] = field(repr=False)

    @property
    def kept(self) -> np.ndarray:
        """The mass that has a pivot token, [L]."""
        return self.chances.sum(axis=1)

    @property
    def emptied(self) -> np.ndarray:
        """Where the source is heard, but less than the share `LEAST` of its words has a pivot token: it counts as silent, [L]."""
        return (self.at >= 0) & (self.kept < LEAST * self.read)

    @property
    def present(self) -> np.ndarray:
        """Where the source has a say, [L]."""
        return (self.at >= 0) & (self.kept > 0) & ~self.emptied


def link_labels(pivot: Encoded, source: Encoded, words: tuple[Vocabulary, Vocabulary] | None = None,
                alignment: str = "offsets") -> Alignment:
    """Align the labels of one dialogue in two tokenisations: `usable[i]` is the source label predicted after the same text.

    "warp" needs the `words` of pivot and source. Replies are aligned one by one, so an error cannot run on. A first token that
    begins before its reply (with the space after the role) predicts the reply's beginning.
    """
    lists: list[list[int]] = []
    usable: list[int] = []
    for mine, theirs in replies(pivot, source):
        if not len(theirs):
            lists += [[] for _ in mine]
            usable += [-1] * len(mine)
            continue
        if alignment == "offsets":
            part = by_offsets(np.maximum(pivot.reached[mine], 0), np.maximum(source.reached[theirs], 0))
        else:
            part = _warped(pivot, source, mine, theirs, words)
        lists += [[int(theirs[j]) for j in its] for its in part.lists()]
        usable += [int(theirs[j]) if j >= 0 else -1 for j in part.usable]
    starts = np.concatenate(([0], np.cumsum([len(its) for its in lists]))).astype(np.int32)
    return Alignment(starts, np.array([j for its in lists for j in its], np.int32), np.array(usable, np.int32))


def replies(pivot: Encoded, source: Encoded) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The labels of every reply that the pivot learns, in the pivot and in the source."""
    for turn in np.unique(pivot.turn):
        yield np.flatnonzero(pivot.turn == turn), np.flatnonzero(source.turn == turn)


def _warped(pivot: Encoded, source: Encoded, mine: np.ndarray, theirs: np.ndarray,
            words: tuple[Vocabulary, Vocabulary]) -> Alignment:
    """Warp the tokens, then move on by one: what stands after token i predicts label i + 1."""
    ended = pivot.ends[mine[-1]] and source.ends[theirs[-1]]
    pairs = [(len(mine) - 1, len(theirs) - 1)] if ended else []
    links = warp(words[0].of(pivot.targets[mine]), words[1].of(source.targets[theirs]), pairs=pairs)
    usable = np.full(len(mine), -1, np.int32)
    usable[0] = 0
    after = links.usable[:-1]
    usable[1:] = np.where((after >= 0) & (after + 1 < len(theirs)), after + 1, -1)
    return Alignment(links.starts, links.sources, usable)


def carry(link: Alignment, pivot: Encoded, source: Encoded, rows: Rows, table: np.ndarray,
          words: tuple[Vocabulary, Vocabulary] | None, *, mapping: str = "spelling", alignment: str = "offsets",
          duplicates: str = "sum") -> Carried:
    """A source's distributions at the pivot's labels. `table` [V_source] has the pivot id of every source id, −1 for none.

    `mapping` and `duplicates`: see `align.map_vocabulary` and `align.remap`. With "spelling", a label also gets the chance that
    the source gives to its whole text (see `align.tell`). Without `words`, texts of tokens are not known: the source is then
    heard at equal points alone, and a reply's first token as it is.
    """
    spell = mapping == "spelling"
    at, places = link.usable.astype(np.int64), {}
    points = _characters(pivot), _characters(source)
    if words and alignment == "offsets" and mapping != "fusechat":
        points, places = _read_closely(at, points, pivot, source, words, spell)
    heard = (at >= 0)[:, None]
    ids = np.where(heard, rows.ids[np.maximum(at, 0)], -1)
    chance = np.where(ids >= 0, np.exp(rows.logprobs[np.maximum(at, 0)].astype(np.float64)), 0.0)
    become, read = looked_up(table, ids), chance.sum(axis=1)
    if places:
        _read_on(places, ids, become, chance, words, spell)
    mapped, chances, pieces = become, chance, {}
    if spell:
        first, rest, pieces = _begun(at, ids, points, pivot, source, rows)
        mapped, chances = tell(become, chance, pivot.targets, first, rest)
    joined, chances = gathered(mapped, chances, duplicates)
    return Carried(at, joined, chances, read, become, chance, pieces)


@dataclass(frozen=True)
class _Place:
    """Where a source's tokens cannot be taken as they are: the bytes that the pivot has written `since` the source stood there,
    and what the first token of a reply begins with, in the pivot (`lead`) and in the source (`their_lead`)."""

    since: bytes = b""
    lead: bytes = b""
    their_lead: bytes = b""


def _characters(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Where in its reply each label begins and ends, in characters, [L] each; −1 for an end that is not known."""
    begins, ends = np.maximum(encoded.reached, 0), np.full(len(encoded.labels), -1, np.int64)
    follows = np.flatnonzero(encoded.turn[1:] == encoded.turn[:-1])
    ends[follows] = begins[follows + 1]
    return begins, ends


def _read_closely(at: np.ndarray, points: tuple, pivot: Encoded, source: Encoded, words: tuple[Vocabulary, Vocabulary],
                  inside: bool) -> tuple[tuple, dict[int, _Place]]:
    """Where labels begin and end in bytes, in replies of which both read the same bytes; places that need more than the table.

    With `inside`, labels within a source token get its position in `at`.
    """
    points = tuple((begins.copy(), ends.copy()) for begins, ends in points)
    places: dict[int, _Place] = {}
    for mine, theirs in replies(pivot, source):
        if not len(theirs):
            continue
        (lead, written), (their_lead, read) = (_bytes(*its) for its in ((pivot, mine, words[0]), (source, theirs, words[1])))
        if at[mine[0]] == theirs[0] and lead != their_lead:
            places[int(mine[0])] = _Place(b"", lead, their_lead)
        text, other = b"".join(written), b"".join(read)
        if text[:len(other)] != other[:len(text)]:  # one of them changes what it reads: signs, capitals
            continue
        for (begins, ends), labels, pieces in zip(points, (mine, theirs), (written, read), strict=True):
            ends[labels] = np.cumsum([len(piece) for piece in pieces])
            begins[labels] = ends[labels] - [len(piece) for piece in pieces]
        if not inside:
            continue
        begins, ends = (their[theirs] for their in points[1])
        for i in mine[(at[mine] < 0) & ~pivot.ends[mine]].tolist():
            here = int(points[0][0][i])
            j = int(np.searchsorted(begins, here, side="right")) - 1
            if ends[j] > here:
                at[i] = theirs[j]
                places[i] = _Place(text[begins[j]:here], lead if i == mine[0] else b"", their_lead if j == 0 else b"")
    return points, places


def _bytes(encoded: Encoded, labels: np.ndarray, words: Vocabulary) -> tuple[bytes, list[bytes]]:
    """What the first token of a reply begins with before the reply (white space), and the bytes of every label after that.

    A reply begins with no white space, so all of it is before: in the text, or set there by the tokenizer and without offsets.
    """
    pieces = words.bytes(encoded.targets[labels])
    first = words.of(encoded.targets[labels[:1]])[0] if encoded.reached[labels[0]] <= 0 else ""
    lead = first[:len(first) - len(first.lstrip())].encode("utf-8", "surrogateescape")
    return lead, [pieces[0][len(lead):], *pieces[1:]]


def _read_on(places: dict[int, _Place], ids: np.ndarray, become: np.ndarray, chance: np.ndarray,
             words: tuple[Vocabulary, Vocabulary], spell: bool) -> None:
    """Put into `become` and `chance` what the source's entries `ids` [L, k] are at such places: those that do not begin with
    what the pivot has written since are impossible, the others share their mass; the tail keeps its share."""
    rests: dict[tuple[int, int], bytes] = {}
    for i, place in places.items():
        impossible = np.zeros(ids.shape[1], bool)
        for column, text in enumerate(words[1].bytes(ids[i])):
            if not text:  # a mark, or no entry
                impossible[column] = bool(place.since)
                continue
            if become[i, column] >= 0 and not place.since and place.lead == place.their_lead:
                continue  # all of the token is meant: the table knows it
            text = text.removeprefix(place.their_lead)
            rest, become[i, column] = text[len(place.since):], -1
            impossible[column] = not text.startswith(place.since)
            if rest and not impossible[column]:
                rests[i, column] = place.lead + rest
        read, left = chance[i].sum(), chance[i, ~impossible].sum()
        become[i, impossible] = -1
        chance[i] = np.where(impossible, 0, chance[i] * (read / left if left > 0 else 0))
    for at, token in zip(rests, words[0].go_on(list(rests.values()), spell), strict=True):
        become[at] = token


def _begun(at: np.ndarray, ids: np.ndarray, points: tuple, pivot: Encoded, source: Encoded,
           rows: Rows) -> tuple[np.ndarray, np.ndarray, dict[int, range]]:
    """Of every label: the source's entry that begins it, [L], −1 for none; −log p of the tokens after that up to the label's
    end, [L]: of that text, or at least of one that begins so; the source's labels where they are several."""
    running = np.concatenate(([0.0], np.cumsum(rows.nats, dtype=np.float64)))
    rest, pieces = np.full(len(at), np.nan), {}
    ending = {int(turn): i + 1 for i, turn in enumerate(source.turn)}  # one past the last label of every reply
    (_, ends), (begins, _) = points
    for i in np.flatnonzero((at >= 0) & ~pivot.ends & (ends >= 0)):
        j = int(at[i])
        stop = j + 1 + int(np.searchsorted(begins[j + 1:ending[int(source.turn[j])]], ends[i]))
        rest[i] = running[stop] - running[j + 1]
        if stop - j > 1:
            pieces[int(i)] = range(j, stop)
    true = ids == source.targets[np.maximum(at, 0)][:, None] if len(source.targets) else np.zeros(ids.shape, bool)
    return np.where(true.any(axis=1), true.argmax(axis=1), -1), rest, pieces
