"""Sequence alignment: two tokenisations of one dialogue, side by side.

`by_offsets` is exact when both models read the same text: two positions correspond when their tokens end at the same
character, because then both predict the continuation of the same prefix. `warp` is the papers' dynamic programme for texts
that differ. Costs are whole numbers (ten times the edit distance), so ties are true ties and are broken the same way always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TIES = ("source", "pivot")
_FAR = np.int32(1 << 29)
_UNIT, _CONTAINED = 10, 1  # cost of one edit; of one edit when one token contains the other


@dataclass(frozen=True)
class Alignment:
    """For every pivot position the source positions that correspond to it, in order.

    `starts` [M + 1] and `sources` [·] int32: the sources of pivot position i are sources[starts[i]:starts[i + 1]].
    `usable` [M] int32: the source position whose next-token distribution may stand at pivot position i, −1 for none. It is
    set only where both texts have just reached the same point (the last pivot token of an n–1 group, the last source token
    of a 1–n group).
    """

    starts: np.ndarray
    sources: np.ndarray
    usable: np.ndarray

    def __len__(self) -> int:
        return len(self.usable)

    def of(self, i: int) -> list[int]:
        """The source positions of pivot position i."""
        return self.sources[self.starts[i]:self.starts[i + 1]].tolist()

    def lists(self) -> list[list[int]]:
        """The source positions of every pivot position."""
        return [self.of(i) for i in range(len(self))]

    def kinds(self) -> list[str]:
        """"1-1", "1-n" (one pivot token, several source tokens), "n-1", or "-" (nothing corresponds) for every pivot position."""
        shared = np.bincount(self.sources, minlength=1) if len(self.sources) else np.zeros(1, int)
        found = []
        for its in self.lists():
            found.append("-" if not its else "1-n" if len(its) > 1 else "n-1" if shared[its[0]] > 1 else "1-1")
        return found


def by_offsets(pivot_ends: Sequence[int], source_ends: Sequence[int]) -> Alignment:
    """Align two tokenisations of the same text by the characters at which their tokens end.

    `pivot_ends` [M], `source_ends` [N]: end offsets in the shared text, never falling. Of several tokens with one end (the
    bytes of a character, marks of no width) only the last has reached it. Source tokens belong to the first pivot token that
    ends where they end or later, which gives 1–n; pivot tokens inside one longer source token are its n–1 group.
    """
    pivot, source = np.asarray(pivot_ends, np.int64), np.asarray(source_ends, np.int64)
    if (np.diff(pivot) < 0).any() or (np.diff(source) < 0).any():
        raise ValueError("end offsets must not fall")
    usable = np.full(len(pivot), -1, np.int32)
    if not len(pivot) or not len(source):
        return Alignment(np.zeros(len(pivot) + 1, np.int32), np.zeros(0, np.int32), usable)
    last = np.append(np.diff(pivot) > 0, True)
    at = np.searchsorted(source, pivot, side="right") - 1  # the last source token that has ended by here
    equal = (at >= 0) & (source[np.maximum(at, 0)] == pivot)
    usable[last & equal] = at[last & equal]
    first = np.searchsorted(source, np.append(np.int64(-1), pivot[:-1]), side="right")
    first = np.where(np.append(-1, pivot[:-1]) == pivot, np.maximum(at, 0), first)
    stop = np.maximum(np.where(equal, at + 1, np.minimum(at + 2, len(source))), first)
    stop = np.where(first < len(source), np.maximum(stop, np.minimum(first + 1, len(source))), first)
    counts = stop - first
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    sources = np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)]) if counts.sum() else np.zeros(0)
    return Alignment(starts, sources.astype(np.int32), usable)


def warp(pivot: Sequence[str], source: Sequence[str], *, pairs: Sequence[tuple[int, int]] = (), discount: bool = True,
         ties: str = "source", band: int | None = None) -> Alignment:
    """Align two token sequences by dynamic time warping with edit-distance cost.

    `pivot` [M], `source` [N]: surfaces, compared without their leading space. `pairs` (pivot, source), rising in both: forced,
    for marks such as the ends of turns that are spelt differently. `discount`: an edit counts a tenth when one token contains
    the other (FuseChat 1; without it, FuseChat 2). `ties`: after the diagonal, step back in the "source" first (FuseChat 1,
    FuseLLM) or in the "pivot" (FuseChat 2). `band`: only cells this near the diagonal are tried, and twice as many
    while the path touches the edge. A path that touches none may still miss a cheaper one further out where the band is a few
    cells wide; None chooses it wide enough for any two tokenisations of a text, a number ≥ both lengths is the whole table and
    always the cheapest path. Source: FuseLLM, arXiv 2401.10491, section 3.3; FuseChat, arXiv 2402.16107.
    """
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, not {ties!r}")
    cells: list[tuple[int, int]] = []
    done_pivot = done_source = 0
    for i, j in [*pairs, (len(pivot), len(source))]:
        if not (done_pivot <= i <= len(pivot) and done_source <= j <= len(source)):
            raise ValueError("forced pairs must rise in both sequences and lie inside them")
        part = _path(pivot[done_pivot:i], source[done_source:j], discount, ties, band)
        cells += [(a + done_pivot, b + done_source) for a, b in part]
        if i < len(pivot) and j < len(source):
            cells.append((i, j))
        done_pivot, done_source = i + 1, j + 1
    return _gathered(cells, pivot, source, set(pairs))


def _gathered(cells: list[tuple[int, int]], pivot: Sequence[str], source: Sequence[str], forced: set) -> Alignment:
    lists: list[list[int]] = [[] for _ in pivot]
    for i, j in cells:
        lists[i].append(j)
    usable = np.full(len(pivot), -1, np.int32)
    group: list[tuple[int, int]] = []
    for cell in [*cells, (-1, -1)]:
        if group and cell[0] != group[-1][0] and cell[1] != group[-1][1]:
            (i0, j0), (i1, j1) = group[0], group[-1]
            mine, theirs = "".join(pivot[i0:i1 + 1]).strip(), "".join(source[j0:j1 + 1]).strip()
            if group[0] in forced or (mine and theirs and (mine.endswith(theirs) or theirs.endswith(mine))) or mine == theirs:
                usable[i1] = j1
            group = []
        group.append(cell)
    starts = np.concatenate(([0], np.cumsum([len(its) for its in lists]))).astype(np.int32)
    return Alignment(starts, np.array([j for its in lists for j in its], np.int32), usable)


def _path(pivot: Sequence[str], source: Sequence[str], discount: bool, ties: str, band: int | None) -> list[tuple[int, int]]:
    """The cells (pivot, source) of the cheapest path from corner to corner."""
    if not pivot or not source:
        return []
    cost = _costs(source, pivot, discount)
    width = band if band is not None else 48 + abs(len(pivot) - len(source)) // 4
    while True:
        table, edges = _table(*cost, width)
        cells, touched = _trace(table, edges, ties)
        if not touched:
            return [(j, i) for i, j in cells]
        width *= 2


def _costs(source: Sequence[str], pivot: Sequence[str], discount: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs int32 of aligning every different source token with every different pivot token; the row [N] of each source
    position and the column [M] of each pivot position."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    rows, row = _unique(source)
    columns, column = _unique(pivot)
    distance = cdist(rows, columns, scorer=Levenshtein.distance, dtype=np.uint16)
    cost = distance.astype(np.int32)
    cost *= _UNIT
    if discount:
        lengths = [np.array([len(text) for text in texts], np.int32) for texts in (rows, columns)]
        maybe = (distance > 0) & (distance == np.abs(np.subtract.outer(*lengths)))
        maybe[lengths[0] == 0] = False
        maybe[:, lengths[1] == 0] = False
        at = np.flatnonzero(maybe)  # only these can contain one another
        pairs = zip(*(part.tolist() for part in np.divmod(at, len(columns))), strict=True)
        within = at[[rows[i] in columns[j] or columns[j] in rows[i] for i, j in pairs]] if len(at) else at
        cost.flat[within] = distance.flat[within].astype(np.int32) * _CONTAINED
    return cost, row, column


def _unique(tokens: Sequence[str]) -> tuple[list[str], np.ndarray]:
    number: dict[str, int] = {}
    index = [number.setdefault(_plain(token), len(number)) for token in tokens]
    return list(number), np.array(index)


def _plain(token: str) -> str:
    return token[1:] if token[:1] == " " and len(token) > 1 else token


def _table(cost: np.ndarray, row: np.ndarray, column: np.ndarray, width: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Cheapest cost [N + 1, M + 1] of reaching every cell in the band, and the band's first and last column of every row.

    Row by row: D(j) = c(j) + min(x(j), D(j − 1)) with x the better of the two cells above, solved for a whole row at once by
    a running sum and a running minimum. Whole numbers, so this is exact. The sums of all rows are made before the loop.
    """
    n, m = len(row), len(column)
    middle = np.arange(n) * (m - 1) // max(n - 1, 1)
    slope = -(-m // n)
    first, last = np.maximum(middle - width - slope, 0), np.minimum(middle + width + slope, m - 1)
    columns = column[np.minimum(first[:, None] + np.arange((last - first).max() + 1), m - 1)]
    total = np.zeros((n, columns.shape[1] + 1), np.int32)
    np.cumsum(cost[row[:, None], columns], axis=1, out=total[:, 1:])
    table = np.full((n + 1, m + 1), _FAR, np.int32)
    table[0, 0] = 0
    spans = zip(first.tolist(), (last + 1).tolist(), strict=True)
    for (a, b), above, here, sums in zip(spans, table[:-1], table[1:], total, strict=True):
        found = here[a + 1:b + 1]
        np.minimum(above[a:b], above[a + 1:b + 1], out=found)
        found -= sums[:b - a]
        np.minimum.accumulate(found, out=found)
        found += sums[1:b - a + 1]
    return np.minimum(table, _FAR, out=table), (first, last)


def _trace(table: np.ndarray, edges: tuple[np.ndarray, np.ndarray], ties: str) -> tuple[list[tuple[int, int]], bool]:
    """Walk back from the last corner; also says whether the path touched an inner edge of the band."""
    i, j = table.shape[0] - 1, table.shape[1] - 1
    columns, first, last = j - 1, edges[0].tolist(), edges[1].tolist()
    cells, touched, source_first = [], False, ties == "source"
    while i and j:
        cells.append((i - 1, j - 1))
        touched |= (j - 1 == first[i - 1] > 0) or (j - 1 == last[i - 1] < columns)
        diagonal, up, left = table.item(i - 1, j - 1), table.item(i - 1, j), table.item(i, j - 1)
        if diagonal <= up and diagonal <= left:
            i, j = i - 1, j - 1
        elif up < left or (up == left and source_first):
            i -= 1
        else:
            j -= 1
    return cells[::-1], touched
