"""Alignment: the published test vectors, a plain dynamic programme as oracle, and what may be carried over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.align import Alignment, by_offsets, count_pairs, gathered, map_vocabulary, remap, surface, tell, tokenizer_kind, warp

WORDS = st.lists(st.sampled_from(["a", "b", " a", "ab", " ab", "abc", "ba", " c", "cab", ""]), min_size=1, max_size=9)


def spelt(text: str) -> list[str]:
    """"<s> _I _am" as surfaces: "_" begins a word."""
    return [token.replace("_", " ") for token in text.split(" ")]


def plain(token: str) -> str:
    return token[1:] if token[:1] == " " and len(token) > 1 else token


def edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def cost(source: str, pivot: str, discount: bool) -> int:
    a, b = plain(source), plain(pivot)
    inside = discount and a and b and (a in b or b in a)
    return edits(a, b) * (1 if inside else 10)


def by_hand(pivot: list[str], source: list[str], discount: bool, ties: str) -> list[list[int]]:
    """The papers' recurrence, cell by cell."""
    n, m = len(source), len(pivot)
    table = [[0 if not i and not j else 10 ** 9 for j in range(m + 1)] for i in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            above = min(table[i - 1][j], table[i][j - 1], table[i - 1][j - 1])
            table[i][j] = cost(source[i - 1], pivot[j - 1], discount) + above
    lists: list[list[int]] = [[] for _ in pivot]
    i, j = n, m
    while i and j:
        lists[j - 1].insert(0, i - 1)
        steps = [(i - 1, j - 1), *([(i - 1, j), (i, j - 1)] if ties == "source" else [(i, j - 1), (i - 1, j)])]
        i, j = min(steps, key=lambda cell: table[cell[0]][cell[1]])
    return lists


@pytest.mark.parametrize(("pivot", "source", "first", "second"), [
    ("<s> _I _am _going _home", "<s> _I _am _go ing _home", [[0], [1], [2], [3, 4], [5]], [[0], [1], [2, 3], [4], [5]]),
    ("<s> _I _am _go ing _home", "<s> _I _am _going _home", [[0], [1], [2], [3], [3], [4]], [[0], [1], [2], [2], [3], [4]]),
    ("<s> _I _go _now", "<s> _I _go _now", [[0], [1], [2], [3]], [[0], [1], [2], [3]]),
    ("a b", "ab", [[0], [0]], [[0], [0]]),
    ("ab", "a b", [[0, 1]], [[0, 1]]),
])
def test_published_vectors(pivot, source, first, second):
    assert warp(spelt(pivot), spelt(source)).lists() == first
    assert warp(spelt(pivot), spelt(source), discount=False, ties="pivot").lists() == second


def test_a_distribution_stands_only_where_both_texts_have_arrived():
    longer = warp(spelt("<s> _I _am _going _home"), spelt("<s> _I _am _go ing _home"))
    assert longer.usable.tolist() == [0, 1, 2, 4, 5]  # after "going", not after "go"
    assert longer.kinds() == ["1-1", "1-1", "1-1", "1-n", "1-1"]
    shorter = warp(spelt("<s> _I _am _go ing _home"), spelt("<s> _I _am _going _home"))
    assert shorter.usable.tolist() == [0, 1, 2, -1, 3, 4]  # "go" must not get what belongs after "going"
    assert shorter.kinds()[3:5] == ["n-1", "n-1"]


def test_tokens_that_only_stand_opposite_each_other_carry_nothing():
    assert warp([" red", " cat"], [" blue", " cat"]).usable.tolist() == [-1, 1]


def test_forced_pairs_join_marks_that_are_spelt_differently():
    pivot, source = ["<|im_end|>", " hi", "<|im_end|>"], ["</s>", " hi", "</s>"]
    assert warp(pivot, source).usable.tolist() == [-1, 1, -1]
    forced = warp(pivot, source, pairs=[(0, 0), (2, 2)])
    assert forced.usable.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="rise"):
        warp(pivot, source, pairs=[(2, 2), (0, 0)])


@given(WORDS, WORDS, st.booleans(), st.sampled_from(["source", "pivot"]))
def test_the_same_path_as_the_plain_programme(pivot, source, discount, ties):
    assert warp(pivot, source, discount=discount, ties=ties).lists() == by_hand(pivot, source, discount, ties)


@given(st.lists(st.sampled_from([" a", "bc", " de", "fgh", " i"]), min_size=60, max_size=90), st.integers(0, 10 ** 6))
def test_a_narrow_band_finds_the_same_path(words, seed):
    chance = np.random.default_rng(seed)
    other = [part for word in words for part in ([word] if chance.random() < 0.6 or len(word) < 3 else [word[:2], word[2:]])]
    assert warp(words, other, band=4).lists() == warp(words, other, band=1000).lists()


def test_empty_sequences():
    assert warp([], ["a"]).lists() == []
    assert warp(["a"], []).lists() == [[]]
    assert warp(["a"], []).usable.tolist() == [-1]


# ── exact alignment by offsets ───────────────────────────────────────────────────────────────────────────────────────────


def test_offsets_by_hand():
    links = by_offsets([1, 4, 10, 15], [1, 4, 6, 10, 15])  # "I", " am", " going"; the source splits "go|ing"
    assert links.lists() == [[0], [1], [2, 3], [4]]
    assert links.usable.tolist() == [0, 1, 3, 4]
    links = by_offsets([1, 4, 6, 10], [1, 4, 10])
    assert links.lists() == [[0], [1], [2], [2]]
    assert links.usable.tolist() == [0, 1, -1, 2]


def test_of_the_bytes_of_one_character_only_the_last_has_arrived():
    assert by_offsets([1, 2, 2, 2, 3], [1, 2, 3]).usable.tolist() == [0, -1, -1, 1, 2]
    assert by_offsets([1, 2, 3], [1, 2, 2, 3]).usable.tolist() == [0, 2, 3]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_offsets_invariants(mine, theirs):
    pivot, source = np.cumsum(mine), np.cumsum(theirs)
    links = by_offsets(pivot, source)
    for i, j in enumerate(links.usable):
        assert (j >= 0) == (pivot[i] in source)
        assert j < 0 or source[j] == pivot[i]
        assert j < 0 or links.of(i)[-1] == j
    flat = links.sources.tolist()
    assert flat == sorted(flat) and all(0 <= j < len(source) for j in flat)
    same = by_offsets(pivot, pivot)
    assert same.lists() == [[i] for i in range(len(pivot))]


def test_offsets_must_not_fall():
    with pytest.raises(ValueError, match="fall"):
        by_offsets([2, 1], [1, 2])


# ── surfaces and vocabularies ────────────────────────────────────────────────────────────────────────────────────────────


def test_surfaces_of_three_kinds_of_tokenizers():
    assert tokenizer_kind(["Ġgo", "ing", "Ċ"]) == "bytes" and tokenizer_kind(["▁go", "ing"]) == "metaspace"
    assert tokenizer_kind(["go", "##ing"]) == "plain"
    assert surface("Ġgo", "bytes") == surface("▁go", "metaspace") == " go"
    assert surface("Ċ", "bytes") == surface("<0x0A>", "metaspace") == "\n"
    assert surface("Ã©", "bytes") == "é"
    assert surface("Ã", "bytes").encode("utf-8", "surrogateescape") == b"\xc3"  # half a character is kept
    assert surface("<|end of text|>", "bytes") == "<|end of text|>"


def test_mappings_by_hand():
    source, pivot = [" go", " going", "x", None, " goin"], [" go", " goes", " going", "y"]
    assert map_vocabulary(source, pivot).tolist() == [0, 2, -1, -1, -1]
    assert map_vocabulary(source, pivot, "mined").tolist() == [0, 2, 3, -1, 2]
    counts = {(3, 2): 1, (1, 2): 4, (1, 4): 2, (2, 4): 2}
    assert map_vocabulary(source, pivot, "statistics", counts=counts).tolist() == [0, 2, 1, -1, 2]  # a tie: the nearer one
    assert map_vocabulary(source, pivot, "fusechat", counts=counts)[2] == 3  # the published rule prefers the rare near one
    assert map_vocabulary(source, pivot, only=[0]).tolist() == [0, -1, -1, -1, -1]
    assert map_vocabulary(source, pivot, forced={3: 1}).tolist() == [0, 2, -1, 1, -1]
    with pytest.raises(ValueError, match="counts"):
        map_vocabulary(source, pivot, "statistics")


def test_a_longer_token_counts_for_the_one_with_which_the_pivot_begins():
    source, pivot = [" man", " m", " mango", "x", None, "an"], [" m", "an", " ", "go"]
    begin = {" man": 0, " mango": 0, "x": -1}

    def begins(texts):
        return [begin[text] for text in texts]

    assert map_vocabulary(source, pivot, "spelling", begin=begins).tolist() == [0, 0, 0, -1, -1, 1]
    assert map_vocabulary(source, pivot, "spelling", begin=begins, only=[2]).tolist() == [-1, -1, 0, -1, -1, -1]
    with pytest.raises(ValueError, match="begins"):
        map_vocabulary(source, pivot, "spelling")


@pytest.mark.parametrize("mapping", ["exact", "spelling", "mined", "statistics"])
def test_a_byte_piece_stands_for_a_text_only_if_nothing_else_does(mapping):
    """The pivot has <0x2C> before the comma that it writes, and a newline only as a byte."""
    pivot = [",", "\n", "A", "A", ",", "b"]  # <0x2C>, <0x0A>, <0x41>, then tokens
    given = {"counts": {}, "begin": lambda texts: [-1] * len(texts), "last": {0, 1, 2}}
    assert map_vocabulary([",", "\n", "A"][::-1], pivot, mapping, **given, same=()).tolist() == [3, 1, 4]
    # both have the byte pieces at the same ids: they are themselves, and so is every other token that both have there
    assert map_vocabulary([*pivot, "é"], pivot, mapping, **given)[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert map_vocabulary(["c"], pivot, "mined", last={0, 1, 2}).tolist() == [3]  # no byte piece is near anything


def test_counting_aligned_pairs():
    links = warp(["ab", "c"], ["a", "b", "c"])
    assert count_pairs([(links, [7, 8], [1, 2, 3]), (links, [7, 8], [1, 1, 3])]) == {(7, 1): 2, (7, 2): 1, (8, 3): 2}


# ── distributions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def straight(count: int) -> Alignment:
    return by_offsets(range(1, count + 1), range(1, count + 1))


def test_what_is_kept_keeps_its_mass():
    ids, logprobs = np.array([[0, 1, 2]]), np.log(np.array([[0.5, 0.3, 0.1]]))
    found, chances = remap(straight(1), ids, logprobs, np.array([4, -1, 9]))
    assert found.tolist() == [[4, 9, -1]] and np.exp(chances) == pytest.approx(np.array([[0.5, 0.1, 0]]))


@pytest.mark.parametrize(("chances", "empty"), [([0.95, 0.05], True), ([0.5, 0.5], False), ([0.51, 0.49], True),
                                                ([0.1, 0.2], False), ([0.2, 0.1], True)])
def test_a_position_with_less_than_half_of_its_words_is_empty(chances, empty):
    """The first of two entries has no counterpart. Half is half of what was read, however much the tail holds."""
    found, kept = remap(straight(1), np.array([[0, 1]]), np.log(np.array([chances])), np.array([-1, 7]))
    assert found.tolist() == ([[-1, -1]] if empty else [[7, -1]])
    assert np.exp(kept[0, 0]) == pytest.approx(0 if empty else chances[1])


def test_duplicates_keep_the_first_or_their_sum():
    ids, logprobs = np.array([[0, 1, 2]]), np.log(np.array([[0.5, 0.3, 0.2]]))
    table = np.array([4, 9, 9])
    found, chances = remap(straight(1), ids, logprobs, table)
    assert found.tolist() == [[4, 9, -1]] and np.exp(chances[0]) == pytest.approx([0.5, 0.3, 0])
    found, chances = remap(straight(1), ids, logprobs, table, duplicates="sum")
    assert found.tolist() == [[4, 9, -1]] and np.exp(chances[0]) == pytest.approx([0.5, 0.5, 0])
    found, chances = remap(straight(1), ids, logprobs, np.array([9, 4, 4]), duplicates="sum")
    assert found[0, :2].tolist() == [9, 4]  # 0.5 and 0.3 + 0.2: a tie keeps the order


def told(mapped, chances, gold, first, rest):
    given = [np.array([its]) for its in (mapped, chances, gold, first, rest)]
    ids, chances = gathered(*tell(*given), "sum")
    return {int(token): float(chance) for token, chance in zip(ids[0], chances[0], strict=True) if token >= 0}


def test_a_label_gets_the_chance_of_all_tokens_that_the_source_writes_it_in():
    # " Lisbon" (7) is " Lis" (4) and "bon" to the source, of which it is sure; 0.5 has no counterpart, 0.1 is another's (2)
    assert told([-1, 4, 2], [0.5, 0.4, 0.1], 7, 1, 0.0) == pytest.approx({7: 0.4, 2: 0.1})
    # " man" (7): " m" (4) at 0.7, then "an" at 6/7; the label was there (at 0.3); the first piece has no token; nothing to do
    assert told([4, 9], [0.7, 0.3], 7, 0, np.log(7 / 6)) == pytest.approx({7: 0.6, 9: 0.3, 4: 0.1})
    assert told([4, 7], [0.7, 0.3], 7, 0, np.log(7 / 6)) == pytest.approx({7: 0.9, 4: 0.1})
    assert told([-1, 9], [0.7, 0.3], 7, 0, np.log(7 / 6)) == pytest.approx({7: 0.6, 9: 0.3})
    assert told([4, 9], [0.7, 0.3], 7, -1, 0.0) == told([4, 9], [0.7, 0.3], 7, 0, np.nan) == pytest.approx({4: 0.7, 9: 0.3})
    # no more than the first piece had, and of several entries with one pivot token only the true one gives
    assert told([4, 9], [0.7, 0.3], 7, 0, -1e-4) == pytest.approx({7: 0.7, 9: 0.3})
    assert told([4, 4], [0.6, 0.4], 7, 0, np.log(2)) == pytest.approx({4: 0.7, 7: 0.3})


def test_positions_without_a_counterpart_are_empty():
    links = by_offsets([2, 4], [1, 3, 4])
    found, chances = remap(links, np.array([[0], [1], [2]]), np.zeros((3, 1)), np.array([5, 6, 7]))
    assert found.tolist() == [[-1], [7]] and np.isneginf(chances[0, 0]) and chances[1, 0] == 0
    found, _ = remap(links, np.array([[0], [1], [2]]), np.zeros((3, 1)), np.array([-1, -1, -1]))
    assert found.tolist() == [[-1], [-1]]


@given(st.integers(0, 2 ** 32 - 1), st.sampled_from(["first", "sum"]))
def test_no_distribution_sums_to_more_than_it_kept(seed, duplicates):
    chance = np.random.default_rng(seed)
    logprobs = np.sort(np.log(chance.dirichlet(np.ones(6), size=5)), axis=1)[:, ::-1]
    ids = np.array([chance.permutation(12)[:6] for _ in range(5)])
    table = chance.integers(-1, 7, size=12)
    found, chances = remap(straight(5), ids, logprobs, table, duplicates=duplicates)
    mass = np.where(table[ids] >= 0, np.exp(logprobs), 0).sum(axis=1)
    for its, values, whole in zip(found, np.exp(chances), mass, strict=True):
        kept = its[its >= 0]
        assert len(set(kept.tolist())) == len(kept) and (values[its < 0] == 0).all()
        assert not len(kept) or (0.5 <= values.sum() <= whole + 1e-6 if duplicates == "first" else
                                 values.sum() == pytest.approx(whole if whole >= 0.5 else 0, abs=1e-6))
        assert (np.diff(values) <= 1e-7).all()
