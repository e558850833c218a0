"""Between vocabularies of different kinds: what stands for a source's tokens, and whether a source is heard through them."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np
import pytest

from fusion.align import MAPPINGS
from fusion.distill.carrying import carry, link_labels
from fusion.distill.dialogues import Dialogue
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.spelling import Vocabulary, end_tokens, pair_counts, vocabulary_table
from fusion.distill.store import Rows
from fusion.distill.targets import Blend, fuse_dialogue
from tests.benchmarks.heard import BARS, TEXTS, Reader, measured
from tests.tokenizers_made import KINDS, made

PAIRS = list(permutations(KINDS, 2))


@cache
def reader(kind: str) -> Reader:
    encoder = Encoder(made(kind))
    return Reader(kind, encoder, Vocabulary(encoder))


def mapped(pivot: str, source: str, mapping: str = "spelling", ends: dict | None = None) -> np.ndarray:
    mine, theirs = reader(pivot), reader(source)
    asked = [Dialogue((("Tell me.", text),)) for text in TEXTS["English"][:2]]
    pairs = [tuple(its.encoder.encode(dialogue) for its in (mine, theirs)) for dialogue in asked]
    counts = pair_counts(pairs, (mine.words, theirs.words)) if mapping in ("statistics", "fusechat") else None
    seen = set(range(len(theirs.words.tokens)))
    return vocabulary_table(mine.words, theirs.words, Blend(mapping=mapping), seen, ends or {}, counts)


def said(encoded: Encoded, entries: dict[int, dict[int, float]], other: dict[int, float], nats: float = 0.1) -> Rows:
    """A source's words at its labels: `entries` by label, `other` at the rest; ids → chances."""
    rows = [entries.get(i, other) for i in range(len(encoded.labels))]
    k = max(map(len, rows))
    ids = np.array([[*row, *[-1] * (k - len(row))] for row in rows], np.int32)
    chances = np.array([[*row.values(), *[0.0] * (k - len(row))] for row in rows])
    with np.errstate(divide="ignore"):
        return Rows(ids, np.log(chances).astype(np.float32), np.full(len(rows), nats, np.float32))


def by_text(its, i: int, words: Vocabulary) -> dict[str, float]:
    pairs = zip(its.ids[i].tolist(), its.chances[i].tolist(), strict=True)
    return {words.tokens[token]: pytest.approx(chance, abs=1e-6) for token, chance in pairs if token >= 0}


# ── what stands for a token ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_vocabularies_map_to_themselves(kind, mapping):
    table = mapped(kind, kind, mapping)
    assert table.tolist() == list(range(len(table)))
    assert mapped(kind, kind, mapping, {1: 0})[1] == 0  # but end tokens may be told otherwise by the templates


@pytest.mark.parametrize("mapping", [mapping for mapping in MAPPINGS if mapping != "fusechat"])
def test_a_token_that_both_have_at_its_id_is_itself(mapping):
    """The source has one more token than the pivot, so the vocabularies are not equal; in "llama" every byte piece comes before
    the token with its text."""
    class Longer:
        def __init__(self, words: Vocabulary):
            self.tokens, self.surfaces, self.pieces = [*words.tokens, "▁zyzzyva"], [*words.surfaces, " zyzzyva"], words.pieces

    words = reader("llama").words
    counts = {(0, 1): 1} if mapping == "statistics" else None
    table = vocabulary_table(words, Longer(words), Blend(mapping=mapping), set(range(len(words.tokens) + 1)), {}, counts)
    assert table[:-1].tolist() == list(range(len(words.tokens)))


@pytest.mark.parametrize("mapping", ["exact", "spelling", "mined", "statistics"])
@pytest.mark.parametrize("pivot", ["llama", "gemma"])
def test_byte_pieces_stand_for_nothing_that_has_a_token(pivot, mapping):
    words, source = reader(pivot).words, reader("qwen").words
    table, whole = mapped(pivot, "qwen", mapping), {words.surfaces[i] for i in range(len(words.tokens)) if i not in words.pieces}
    assert {",", ".", "e", " "} <= whole
    for i, p in enumerate(table):
        text = source.surfaces[i]
        if p in words.pieces and text is not None and mapping != "statistics":  # counted pairs are what texts show
            assert text not in whole and (mapping != "spelling" or text[0] not in whole), text
    for text in (",", ".", "e", " "):
        assert words.tokens[table[source.by_surface[text]]].replace("▁", " ") == text


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_only_parts_of_characters_are_dropped(pivot, source):
    table, words = mapped(pivot, source), reader(source).words
    lost = [text for text, p in zip(words.surfaces, table, strict=True) if text and p < 0]
    marks = {"<unk>", "<s>", "</s>", "<pad>"}
    assert all(any("\udc80" <= sign <= "\udcff" for sign in text) for text in lost if text not in marks)


@pytest.mark.parametrize(("kind", "text", "first"), [
    ("llama", "ization", "i"), ("llama", " ization", "▁i"), ("llama", "\n\n", "<0x0A>"), ("llama", ");\n", ")"),
    ("llama", "\n", "<0x0A>"), ("llama", "是", "是"), ("llama", " 👍", "▁"), ("llama", "👍🏽", "<0xF0>"), ("llama", "है", "<0xE0>"),
    ("llama", "▁", "▁"), ("gemma", "ization", "i"), ("gemma", "\n", "\n"), ("gemma", " 是", "▁"), ("gemma", "है", "<0xE0>"),
    ("qwen", "है", "à"), ("qwen", " 👍", "Ġ"), ("qwen", "ization", "i"), ("qwen", " 宫", "Ġ")])
def test_texts_begin_as_they_are_written_inside_texts(kind, text, first):
    """By hand: what "<anchor>" + text is cut into behind the anchor. No white space, byte or sign is lost."""
    words = reader(kind).words
    found = words.begin(text)
    if text == "▁":  # the sign itself is no space: this tokenizer cannot write it
        assert found == -1
        return
    assert words.tokens[found].startswith(first) and text.encode().startswith(words.bytes([found])[0])


def test_texts_that_a_tokenizer_cannot_write_begin_with_nothing():
    words = reader("llama").words
    assert words.begins(["", "\udcc3", "a\udcc3", "<s>", "a"]) == [-1, -1, -1, -1, words.by_surface["a"]]
    tokenizer = made("llama")
    tokenizer.backend_tokenizer.enable_truncation(1)  # as some files have it
    try:
        assert Vocabulary(reader("llama").encoder).begin("ization the") == words.begin("ization the") >= 0
    finally:
        tokenizer.backend_tokenizer.no_truncation()


# ── whether a source is heard ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_a_source_that_is_sure_of_the_truth_is_heard(pivot, source):
    """It gives 0.9 to its true next token; a label is heard if its fused target gives the true token half. At the labels where
    both stand, and at those inside its tokens."""
    for kind, texts in TEXTS.items():
        row = measured(reader(pivot), reader(source), texts, Blend())
        assert row.heard >= BARS[kind] and row.everywhere >= BARS[kind] and row.kept > 0.95, kind
        exact = measured(reader(pivot), reader(source), texts, Blend(mapping="exact"))
        assert exact.everywhere < row.everywhere and exact.kept < row.kept, kind


@pytest.mark.parametrize(("pivot", "source", "first"), [
    ("llama", "qwen", "▁The"), ("qwen", "llama", "The"), ("gemma", "llama", "The"), ("llama", "gemma", "▁The")])
@pytest.mark.parametrize("mapping", ["spelling", "exact", "mined"])
def test_the_first_token_of_a_reply_is_heard_with_or_without_its_space(pivot, source, first, mapping):
    """ "Assistant: The" is "▁The" to the one, "assistant\\nThe" is "The" to the other; " ." cannot begin a reply."""
    mine, theirs = reader(pivot), reader(source)
    both = [its.encoder.encode(Dialogue((("Tell me.", "The answer is 42."),))) for its in (mine, theirs)]
    assert sorted([int(its.reached[0]) for its in both]) == ([-1, 0])
    lead = " " if source == "llama" else ""
    entries = {theirs.words.by_surface[lead + "The"]: 0.7, theirs.words.by_surface[lead + "I"]: 0.2}
    rows = said(both[1], {0: entries}, {int(both[1].targets[1]): 1.0})
    table = vocabulary_table(mine.words, theirs.words, Blend(mapping=mapping), set(rows.ids.ravel().tolist()), end_tokens(*both))
    link = link_labels(*both)
    assert link.usable[0] == 0
    its = carry(link, *both, rows, table, (mine.words, theirs.words), mapping=mapping)
    assert by_text(its, 0, mine.words) == {first: 0.7, first.replace("The", "I"): 0.2}
    assert int(both[0].targets[0]) == mine.words.tokens.index(first)


def test_inside_a_token_of_the_source_what_goes_on_as_the_pivot_wrote():
    """Hand-worked: the source expects "abcd" 0.4, "abxy" 0.2, "ab" 0.1, "zzz" 0.2 and other tokens 0.1 where the pivot writes
    "ab", "c", "d"."""
    class Words:
        def __init__(self, *texts: str):
            self.surfaces, self.tokens = list(texts), list(texts)

        bytes, of, go_on, _inside = Vocabulary.bytes, Vocabulary.of, Vocabulary.go_on, Vocabulary._inside
        by_surface, _spelt = Vocabulary.by_surface, Vocabulary._spelt
        pieces = frozenset()

        def begins(self, texts):
            return [next((i for i, its in enumerate(self.surfaces) if text.startswith(its)), -1) for text in texts]

    pivot_words, source_words = Words("ab", "c", "d", "x", "z"), Words("abcd", "abxy", "ab", "zzz", "!")
    pivot = Encoded("", np.array([4, 0, 1, 2]), np.array([1, 2, 3]), np.zeros(3, np.int32), np.array([0, 2, 3]), np.zeros(3, bool))
    source = Encoded("", np.array([4, 0]), np.array([1]), np.zeros(1, np.int32), np.array([0]), np.zeros(1, bool))
    rows = said(source, {}, {0: 0.4, 1: 0.2, 2: 0.1, 3: 0.2})
    its = carry(link_labels(pivot, source), pivot, source, rows, np.array([0, 0, 0, 4, -1]), (pivot_words, source_words))
    assert its.at.tolist() == [0, 0, 0] and link_labels(pivot, source).usable.tolist() == [0, -1, -1]
    assert by_text(its, 0, pivot_words) == {"ab": 0.7, "z": 0.2}
    # after "ab", "zzz" is no longer possible: 0.7 of what was said becomes 0.9, of which "ab" has nothing left to say
    assert by_text(its, 1, pivot_words) == {"c": 0.9 * 4 / 7, "x": 0.9 * 2 / 7} and its.kept[1] == pytest.approx(0.9 * 6 / 7)
    assert by_text(its, 2, pivot_words) == {"d": 0.9}
    assert not its.emptied.any() and its.read.tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_of_the_same_vocabulary_says_the_same_inside_characters_too(kind):
    its = reader(kind)
    encoded = its.encoder.encode(Dialogue((("Smile.", "🙂 日本"), ("And?", "क्षि\t☃"))))
    draw, size = np.random.default_rng(0), len(its.words.tokens)
    for _ in range(20):  # each time other tokens of all kinds: byte pieces of plain letters, of which there is a token too
        rows = said(encoded, {i: dict(zip(draw.permutation(size)[:6].tolist(), (0.3, 0.25, 0.15, 0.1, 0.08, 0.06), strict=True))
                              for i in range(len(encoded.labels))}, {})
        table = vocabulary_table(its.words, its.words, Blend(), set(rows.ids.flat), {})
        heard = fuse_dialogue((encoded, rows), [(encoded, rows, table)], Blend(), [(its.words, its.words)]).models[1]
        assert heard.ids[:, :6].tolist() == rows.ids.tolist() and np.allclose(heard.logprobs[:, :6], rows.logprobs, atol=1e-5)


def test_losses_are_nats_of_equal_text_per_token_of_the_pivot():
    dialogue = Dialogue((("Hi.", TEXTS["Chinese"][0]), ("And?", TEXTS["German"][1])))
    for pivot, source in (("llama", "qwen"), ("qwen", "llama")):
        mine, theirs = reader(pivot), reader(source)
        both = [its.encoder.encode(dialogue) for its in (mine, theirs)]
        own, rows = (said(its, {}, {5: 1.0}, nats) for its, nats in zip(both, (0.5, 0.25), strict=True))
        table = np.full(len(theirs.words.tokens), -1, np.int32)
        for level, unit in (("dialogue", np.zeros(len(both[0].labels), int)), ("turn", both[0].turn)):
            fused = fuse_dialogue((both[0], own), [(both[1], rows, table)], Blend(level=level), [(mine.words, theirs.words)])
            for i in range(len(unit)):
                labels = (unit == unit[i]).sum()
                theirs_there = len(both[1].labels) if level == "dialogue" else (both[1].turn == both[0].turn[i]).sum()
                assert fused.deciding[:, i] == pytest.approx([0.5, theirs_there * 0.25 / labels])


def test_a_reply_without_a_learnt_end_is_measured_by_all_its_characters():
    """Equal nats for equal text are equal losses, though one model's last token is long and the other's short."""
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    both = [Encoder(made(kind), template).encode(Dialogue((("What?", "Das ist Photosynthese"),))) for kind in ("llama", "qwen")]
    assert not any(its.ends.any() for its in both) and [its.letters.sum() for its in both] == [21, 21]
    own, rows = (said(its, {}, {5: 1.0}, 3.0 / len(its.labels)) for its in both)
    fused = fuse_dialogue((both[0], own), [(both[1], rows, np.full(9, -1))], Blend())
    assert fused.losses[:, 0] == pytest.approx([3 / len(both[0].labels)] * 2)


