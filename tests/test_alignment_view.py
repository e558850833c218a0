"""The alignment view's numbers: links and pieces worked out by hand, and scripted models whose words can be followed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from fusion import MismatchError, RecipeError, demo
from fusion.distill.dialogues import Dialogue
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.spelling import Vocabulary
from fusion.distill.store import Rows
from fusion.distill.targets import Blend
from fusion.distill.view import Group, grouped, token_links, view

TALK = Dialogue((("Tell me something.", "The farmer cross over the old bridge."),))


def encoded(reached: list[int], ends: list[bool], turn: list[int] | None = None) -> Encoded:
    count = len(reached)
    return Encoded("", np.arange(count + 1), np.arange(1, count + 1), np.array(turn or [0] * count, np.int32), np.array(reached),
                   np.array(ends))


class Scripted:
    """A teacher that always says the same: `nats` for every true token, and at every label these (token id, chance)."""

    def __init__(self, name: str, nats: float, says):
        self.encoder, self.mark = Encoder(AutoTokenizer.from_pretrained(demo.FOLDER / name)), name
        self._nats, self._says = nats, says

    def rows(self, batch, top_k):
        return [self._row(its) for its in batch]

    def _row(self, its: Encoded) -> Rows:
        said = [self._says(int(token)) for token in its.targets]
        count = len(said)
        return Rows(np.array([[i for i, _ in one] for one in said], np.int32),
                    np.log(np.array([[p for _, p in one] for one in said])).astype(np.float32),
                    np.full(count, self._nats, np.float32))


@pytest.fixture(scope="module")
def scripted():
    """The pivot is sure of the true token; the source gives it 0.54 and 0.36 to a token that the pivot does not have."""
    pivot = Scripted("pivot", 0.5, lambda token: [(token, 1.0)])
    source = Scripted("source-neox", 0.25, lambda token: [(token, 0.54), (foreign, 0.36)])
    foreign = Vocabulary(source.encoder).surfaces.index("Wh")
    assert "Wh" not in Vocabulary(pivot.encoder).surfaces
    return pivot, source


def texts(seen, group: Group) -> tuple[str, str]:
    return "|".join(seen.positions[i].token.text for i in group.pivot), "|".join(seen.tokens[j].text for j in group.source)


def test_pieces_are_the_smallest_that_no_link_crosses():
    assert grouped(3, 4, [(0, 0), (1, 1), (1, 2), (2, 3)]) == [
        Group((0,), (0,), ((0, 0),)), Group((1,), (1, 2), ((1, 1), (1, 2))), Group((2,), (3,), ((2, 3),))]
    assert grouped(2, 2, [(0, 0), (0, 1), (1, 1)]) == [Group((0, 1), (0, 1), ((0, 0), (0, 1), (1, 1)))]
    assert grouped(2, 3, [(0, 0), (1, 2)]) == [Group((0,), (0,), ((0, 0),)), Group((), (1,), ()), Group((1,), (2,), ((1, 2),))]
    assert grouped(1, 0, []) == [Group((0,), (), ())] and grouped(0, 1, []) == [Group((), (0,), ())] and grouped(0, 0, []) == []


def test_tokens_are_linked_by_the_letters_they_share():
    # "farmer" as far|mer and f|arm|er, then both end
    links = token_links(encoded([0, 3, 6], [False, False, True]), encoded([0, 1, 4, 6], [False, False, False, True]))
    assert links == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3)]


def test_the_bytes_of_one_letter_and_two_replies_stay_together():
    # "ü" as two bytes here (the second has no width) and as one token there; then a second reply
    pivot = encoded([0, 1, 1, 0], [False, False, True, False], [0, 0, 0, 1])
    source = encoded([0, 1, 0], [False, True, False], [0, 0, 1])
    assert token_links(pivot, source) == [(0, 0), (1, 0), (2, 1), (3, 2)]


def test_a_scripted_dialogue_is_followed_through(scripted):
    seen = view(*scripted, TALK, Blend(mapping="exact"), names=("Pivot", "NeoX"))
    assert [texts(seen, group) for group in seen.groups][:3] == [(" The", "The"), (" far|mer", " f|arm|er"), (" c", " c")]
    assert texts(seen, seen.groups[-1]) == ("<|end|>", "</s>") and seen.positions[-1].token.mark
    far, mer = seen.positions[1], seen.positions[2]
    assert (far.source, mer.source) == (1, -1)
    # of 0.54 and 0.36 the second has no pivot token: 0.4 of the source's words are lost, the rest keeps its mass
    word = far.heard[0]
    assert (word.text, round(word.chance, 4), word.becomes, word.kept) == (" f", 0.6, " f", True)
    assert far.heard[1].becomes is None and far.lost == pytest.approx(0.4)
    assert [(entry.text, round(entry.chance, 6), entry.gold) for entry in far.mapped] == [(" f", 0.54, False)]
    assert (far.read, far.kept) == pytest.approx((0.9, 0.54), abs=1e-6)
    assert [(entry.text, entry.gold) for entry in far.pivot] == [(" far", True)]
    # 16 labels at half a nat against 17 at a quarter, for the same text, which has 16 tokens of the pivot
    assert far.deciding == pytest.approx((0.5, 17 * 0.25 / 16), rel=1e-5)
    assert far.chosen == 1 and [(entry.text, round(entry.chance, 6)) for entry in far.fused] == [(" f", 0.54)]
    # " far|mer" and " f|arm|er" end together: three source tokens paid for two of the pivot's, but not for "mer" alone
    assert mer.chosen == 0 and mer.mapped == () and mer.fused == mer.pivot and mer.nats[1] is None and mer.lost == 0
    # "s|s" against "ss", which the pivot does not have: all is lost there, so its own word stays
    s = seen.positions[5]
    assert (s.token.text, seen.tokens[s.source].text, s.mapped, s.chosen) == ("s", "ss", (), 0) and s.lost == pytest.approx(1)
    # 14 of 16 places are reached by both at once (not "mer" and the second "s"), one of them in vain
    # where the reply begins nothing is lost: the pivot has both words there, with the space before every text
    assert seen.taken == seen.carried == 13 / 16 and seen.lost == pytest.approx((12 * 0.4 + 1) / 14)
    assert (seen.read, seen.kept, seen.emptied, seen.unwritten) == pytest.approx((0.9, (0.9 + 12 * 0.54) / 14, 1 / 14, 0), abs=1e-6)


def test_what_the_pivot_writes_otherwise_is_followed_through(scripted):
    seen = view(*scripted, TALK, names=("Pivot", "NeoX"))
    far, mer = seen.positions[1], seen.positions[2]
    # " f" (0.6) stays " f", "Wh" (0.4) counts for "W", with which the pivot writes it: nothing is lost
    heard = [(word.text, word.becomes, word.kept, word.respelt) for word in far.heard]
    assert heard == [(" f", " f", True, False), ("Wh", "W", True, True)]
    assert (far.lost, seen.lost) == (0, 0) and far.respelt == pytest.approx(0.4)
    # " far" is " f|arm" to NeoX: of " f" (0.54) it goes on with "arm" at a quarter nat
    given = 0.54 * np.exp(-0.25)
    assert far.pieces == (" f", "arm")
    assert [(entry.text, entry.gold) for entry in far.mapped] == [(" far", True), ("W", False), (" f", False)]
    assert [entry.chance for entry in far.mapped] == pytest.approx([given, 0.36, 0.54 - given], abs=1e-6)
    # "mer" begins inside "arm", where " far" is written: "Wh" cannot be, so "arm" has all 0.9; its "m" goes on with "er"
    assert (mer.source, mer.inside, mer.pieces) == (2, True, ("arm", "er")) and (far.inside, far.source) == (False, 1)
    assert [(word.text, word.chance, word.becomes) for word in mer.heard] == [("arm", 1.0, "m")]
    assert [(entry.text, entry.gold) for entry in mer.mapped] == [("mer", True), ("m", False)]
    assert [entry.chance for entry in mer.mapped] == pytest.approx([0.9 * np.exp(-0.25), 0.9 * (1 - np.exp(-0.25))], abs=1e-6)
    # "s|s" against "ss": the true token counts for "s", and for the second "s" once the first is written
    first, second = seen.positions[5], seen.positions[6]
    assert [(entry.text, round(entry.chance, 6), entry.gold) for entry in first.mapped] == [("s", 0.54, True), ("W", 0.36, False)]
    assert [(entry.text, round(entry.chance, 6)) for entry in second.mapped] == [("s", 0.9)] and second.inside
    # "The" and "Wh" are both written otherwise where the reply begins, at 12 places "Wh" alone
    assert seen.taken == seen.carried == 1 and seen.respelt == pytest.approx((1 + 12 * 0.4 + 1 + 2) / 16)
    assert (seen.read, seen.kept, seen.emptied, seen.unwritten) == pytest.approx((0.9, 0.9, 0, 0), abs=1e-6)


def test_kept_entries_may_be_made_to_sum_to_one(scripted):
    for mapping, entries in (("exact", {" f": 1}), ("spelling", {" far": 0.6 * np.exp(-0.25), "W": 0.4,
                                                                 " f": 0.6 * (1 - np.exp(-0.25))})):
        far = view(*scripted, TALK, Blend(mapping=mapping, tail="renormalise")).positions[1]
        assert {entry.text: entry.chance for entry in far.mapped} == pytest.approx(entries, abs=1e-6)


def test_the_pivot_stays_where_it_knows_better(scripted):
    pivot, source = scripted
    sure = Scripted("pivot", 0.01, pivot._says)
    seen = view(sure, source, TALK)
    assert seen.taken == 0 and all(its.fused == its.pivot for its in seen.positions) and seen.carried > 0.5


def test_a_mixture_and_a_warp_can_be_looked_at(scripted):
    seen = view(*scripted, TALK, Blend(rule="avgce", alignment="warp", mapping="statistics", level="token"))
    mine, theirs = (np.exp(np.exp(-nats)) for nats in (0.5, 0.25))  # of the pivot 1, of the source 0.54 is kept
    expected = (mine + theirs * 0.54) / (mine + theirs)
    assert sum(entry.chance for entry in seen.positions[0].fused) == pytest.approx(expected, abs=1e-4)
    assert json.loads(json.dumps(seen.to_dict(), allow_nan=False))["names"] == ["pivot", "source"]


def test_what_cannot_be_looked_at_says_why(scripted):
    with pytest.raises(RecipeError, match="unknown rule"):
        view(*scripted, TALK, Blend(rule="best"))
    short = Encoder(scripted[1].encoder.tokenizer, max_tokens=3)
    cut = Scripted("source-neox", 0.25, scripted[1]._says)
    cut.encoder = short
    with pytest.raises(MismatchError, match="shorter dialogue"):
        view(scripted[0], cut, TALK)
