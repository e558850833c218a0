"""Vocabulary mapping: which pivot token stands for each source token.

Four mappings: "exact" (the same surface), "spelling" (else the token with which the pivot begins to write the same text),
"mined" (else the pivot token with the smallest edit distance) and "statistics" (the pivot token it was aligned with most often
in a corpus). Under all of them a token that both have at the same id is itself. What has no counterpart is −1: its probability
is dropped, never sent to an unknown token. "fusechat" is the published rule as it was published, for comparison: there even a
token that both have may become another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from fusion.align.sequence import Alignment

MAPPINGS = ("spelling", "exact", "mined", "statistics", "fusechat")
Counts = Mapping[tuple[int, int], int]  # (pivot id, source id) → how often they were aligned


def count_pairs(alignments: Iterable[tuple[Alignment, Sequence[int], Sequence[int]]]) -> Counter:
    """Count (pivot id, source id) over (alignment, pivot ids, source ids); a source id counts once per pivot position."""
    counts: Counter = Counter()
    for links, pivot_ids, source_ids in alignments:
        for i, its in enumerate(links.lists()):
            counts.update((int(pivot_ids[i]), source) for source in {int(source_ids[j]) for j in its})
    return counts


def map_vocabulary(source: Sequence[str | None], pivot: Sequence[str | None], mapping: str = "exact", *,
                   counts: Counts | None = None, only: Iterable[int] | None = None, forced: Mapping[int, int] | None = None,
                   begin: Callable[[Sequence[str]], Sequence[int]] | None = None, same: Collection[int] | None = None,
                   last: Collection[int] = ()) -> np.ndarray:
    """The pivot id for every source id, −1 for none: [V_source] int32.

    `source`, `pivot`: surfaces by id (None = an id that stands for no text). `counts` of aligned pairs for "statistics"
    (highest count, then smallest edit distance, then lowest id) and "fusechat" (the published rule: smallest edit distance ×
    sigmoid of the count, which makes frequent pairs slightly *worse*; here for comparison). `begin` for "spelling": the pivot
    ids that texts begin with, −1 for none; several source tokens then have one pivot token, and `remap` must sum them. `only`:
    map these source ids and leave the rest −1 (a nearest search over a whole vocabulary is the costly part). `forced`: marks
    such as end-of-text. `same`: ids that are the same token in both (default: with one surface). `last`: pivot ids that stand
    for a surface only if no other does, its byte pieces. Source: FuseLLM, arXiv 2401.10491; FuseChat 2.0, arXiv 2408.07990.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"unknown mapping {mapping!r}; known: {', '.join(MAPPINGS)}")
    if mapping in ("statistics", "fusechat") and counts is None:
        raise ValueError(f"mapping {mapping!r} needs the counts of aligned pairs")
    if mapping == "spelling" and begin is None:
        raise ValueError("mapping 'spelling' needs to know how the pivot begins a text")
    wanted = list(range(len(source)) if only is None else sorted(set(only)))
    table = np.full(len(source), -1, np.int32)
    whole = by_surface(pivot, last)
    if same is None:
        same = {i for i, (one, other) in enumerate(zip(source, pivot, strict=False)) if one is not None and one == other}
    for s in wanted:
        table[s] = s if s in same else whole.get(source[s], -1)
    missing = [s for s in wanted if table[s] < 0 and source[s]]
    if mapping in ("statistics", "fusechat"):
        _by_counts(table, source, pivot, counts, set(wanted), published=mapping == "fusechat")
    elif mapping == "spelling":
        table[missing] = begin([source[s] for s in missing])
    elif mapping == "mined":
        _nearest(table, source, pivot, missing, last)
    for s, p in (forced or {}).items():
        table[s] = p
    return table


def by_surface(surfaces: Sequence[str | None], last: Collection[int] = ()) -> dict[str, int]:
    """The id of every surface: the lowest, and one of `last` only where there is no other."""
    found: dict[str, int] = {}
    for i, text in enumerate(surfaces):
        if text is not None and i not in last:
            found.setdefault(text, i)
    for i in sorted(last):
        if surfaces[i] is not None:
            found.setdefault(surfaces[i], i)
    return found


def _by_counts(table: np.ndarray, source: Sequence, pivot: Sequence, counts: Counts, wanted: set[int], published: bool) -> None:
    from rapidfuzz.distance import Levenshtein

    candidates: dict[int, list[int]] = {}
    for p, s in counts:
        candidates.setdefault(s, []).append(p)

    def rank(p: int, s: int) -> tuple:
        a, b = source[s] or "", pivot[p] or ""
        distance = Levenshtein.distance(a.strip(), b.strip())
        if not published:
            return (-counts[p, s], distance, p)
        near = distance * (0.1 if a.strip() in b.strip() or b.strip() in a.strip() else 1.0)
        return (near / (1 + float(np.exp(-min(counts[p, s], 50)))), p)

    for s, found in candidates.items():
        if s in wanted and (published or table[s] < 0):
            table[s] = min(found, key=lambda p: rank(p, s))


def _nearest(table: np.ndarray, source: Sequence, pivot: Sequence, missing: Sequence[int], last: Collection[int]) -> None:
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    ids = [i for i, text in enumerate(pivot) if text is not None and i not in last]
    texts = [pivot[i] for i in ids]
    for start in range(0, len(missing), 256):
        part = missing[start:start + 256]
        distance = cdist([source[s] for s in part], texts, scorer=Levenshtein.distance, dtype=np.uint16)
        table[part] = [ids[i] for i in distance.argmin(axis=1)]  # the first of equals, as published
