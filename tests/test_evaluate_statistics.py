"""Intervals and tests against numbers worked out by hand, and tables made of them."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import OutputError
from fusion.evaluate import Evaluation, Scores, figure, from_scores, radar, write
from fusion.evaluate.statistics import bootstrap, mcnemar, permutation_test, resamples, sign_test, wilson
from tests.conftest import snapshot


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # (0.8 + 0.19207 ∓ 0.3136) / 1.38415
    assert wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)  # 3.84146 / 13.84146
    assert wilson(10, 10) == pytest.approx((0.7224672, 1), abs=1e-6)
    assert wilson(0, 0) == (0, 1)


@given(st.integers(1, 200), st.data())
def test_wilson_holds_the_share_and_mirrors(total, data):
    right = data.draw(st.integers(0, total))
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high <= 1
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low))


def test_sign_test_by_hand():
    assert sign_test(8, 2) == sign_test(2, 8) == 2 * (1 + 10 + 45) / 1024
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(0, 0) == sign_test(3, 3) == 1


def test_mcnemar_looks_only_where_one_is_right():
    one = np.array([1] * 9 + [0] + [1] * 50 + [0] * 40, bool)
    other = np.array([0] * 9 + [1] + [1] * 50 + [0] * 40, bool)
    assert mcnemar(one, other) == mcnemar(other, one) == 2 * (1 + 10) / 1024


def test_permutation_by_hand():
    assert permutation_test([1, 2, 3]) == 2 / 8  # only +++ and −−− reach 6
    assert permutation_test([1, 2, -3, 0, 0]) == 1
    assert permutation_test([0.1, 0.2, 0.3, -0.1]) == 6 / 16  # |sum| ≥ 0.5: 7, 5, 5 tenths, both signs
    assert permutation_test([]) == 1


def test_permutation_by_draws_agrees_with_the_sign_test():
    differences = np.array([1.0] * 12 + [-1.0] * 3)  # |sum| ≥ 9 is at most 3 of one sign: the sign test
    assert permutation_test(differences) == pytest.approx(sign_test(12, 3), abs=0.01)
    assert permutation_test(differences, seed=1) == permutation_test(differences, seed=1)
    assert permutation_test(np.ones(60)) == 1 / 10_001


def test_bootstrap_by_hand():
    assert bootstrap([3.0] * 5) == (3, 3)
    assert bootstrap([0.0, 1.0]) == (0, 1)  # means 0, ½, 1 with chances ¼, ½, ¼
    values = np.random.default_rng(0).normal(5, 1, 400)
    low, high = bootstrap(values)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)


def test_bootstrap_keeps_the_items_of_a_prompt_together():
    values = np.random.default_rng(1).normal(0, 1, 100)
    once = bootstrap(values)
    twice = bootstrap(np.repeat(values, 4), np.repeat(np.arange(100), 4))
    assert twice == pytest.approx(once)  # four copies of an answer say no more than one
    apart = bootstrap(np.repeat(values, 4))
    assert (apart[1] - apart[0]) == pytest.approx((once[1] - once[0]) / 2, rel=0.15)


def test_resamples_keep_every_domain():
    counts = np.concatenate(list(resamples(["a", "b", "a", "a", "b"], 50)))
    assert counts.shape == (50, 5) and (counts[:, [0, 2, 3]].sum(1) == 3).all() and (counts[:, [1, 4]].sum(1) == 2).all()
    assert len(np.unique(counts, axis=0)) > 10


# ── scores and tables ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def right():
    """Two models, a domain of four prompts and one of two."""
    values = np.array([[1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1]], float)
    cut = np.zeros((2, 6), bool)
    cut[1, 3] = True
    return Scores("Right", ("a", "b"), tuple("123456"), ("math",) * 4 + ("stem",) * 2, values, cut, right_or_wrong=True, unit="%",
                  scale=100)


def test_a_table_by_hand(right):
    table = from_scores(right, "b")
    a, b = table.rows
    assert table.columns == ("math", "stem", "average")
    assert [cell.value for cell in a.cells] == [75, 50, 62.5] and [cell.value for cell in b.cells] == [25, 50, 37.5]
    assert (a.cells[0].low, a.cells[0].high) == pytest.approx([100 * x for x in wilson(3, 4)])
    assert a.cells[2].low <= 62.5 <= a.cells[2].high
    assert a.versus.value == pytest.approx(100 * (62.5 / 37.5 - 1)) and a.p == 0.5 and b.versus is b.p is None
    assert (a.truncated, b.truncated, b.answers) == (0, 1, 6)


def test_the_best_are_those_that_look_best(right):
    table = from_scores(right, "b")
    assert (table.best("math"), table.best("stem"), table.best("average")) == ({"a"}, set(), {"a"})
    assert replace(table, better="low").best("math") == {"b"} and replace(table, better="").best("math") == set()


def test_the_terminal_shows_the_interval_of_the_summary(right):
    table = from_scores(right, "b")
    line = table.text().splitlines()[4]
    assert line.startswith("a") and line.count("[") == 2 and "62.5 [" in line and "75.0 [" not in line
    assert table.markdown().count("[") == 2 * 3 + 1
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert [(row["column"], row["p"]) for row in lines if row["p"]] == [("average", "0.5"), ("vs b %", "0.5")]


def test_cut_off_answers_are_flagged_in_every_form(right):
    table = from_scores(right)
    assert "1/6 ⚠" in table.markdown() and "1/6 ⚠" in table.text() and "1 of 12 answers were cut off" in table.markdown()
    assert table.to_dict()["rows"][1]["truncated"] == 1
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert [line["truncated"] for line in lines if line["model"] == "b"] == ["1"] * 3


def test_paired_resampling_makes_equal_models_equal(right):
    same = Scores(**{**vars(right), "values": right.values[[0, 0]]})
    versus = from_scores(same, "b").rows[0].versus
    assert (versus.value, versus.low, versus.high) == (0, 0, 0)


def test_turns_and_missing_values():
    values = np.array([[8.0, 4.0, 6.0, np.nan]])
    scores = Scores("Judge", ("a",), ("1", "1", "2", "2"), ("math", "math", "stem", "stem"), values, np.zeros((1, 4), bool),
                    turns=(1, 2, 1, 2))
    (row,) = from_scores(scores).rows
    cells = dict(zip(from_scores(scores).columns, (cell.value for cell in row.cells), strict=True))
    assert cells == {"math": 6, "stem": 6, "turn 1": 7, "turn 2": 4, "average": 6} and row.missing == 1
    assert "missing" in from_scores(scores).markdown()
    assert scores.to_dict()["items"][3] == {"prompt": "2", "domain": "stem", "turn": 2, "values": [None], "truncated": [False]}


def test_weighted_means_and_their_test():
    values, weights = np.array([[1.0, 2.0], [2.0, 2.0]]), np.array([[3.0, 1.0], [3.0, 1.0]])
    scores = Scores("Perplexity", ("a", "b"), ("1", "2"), ("nats",) * 2, values, np.zeros((2, 2), bool), weights, summary="nats")
    table = from_scores(scores, "b")
    assert table.rows[0].cells[0].value == (3 + 2) / 4 and table.rows[0].p == 1  # one differing prompt says nothing


def test_a_table_survives_bars_formulas_and_line_ends(right):
    odd = Scores(**{**vars(right), "models": ("=a|b\n", "c")})
    table = from_scores(odd)
    assert "=a\\|b " in table.markdown()
    assert next(csv.DictReader(io.StringIO(table.csv())))["model"].startswith("'=a")


def test_radar_data_and_drawing(right):
    assert radar(from_scores(right))["axes"] == []  # two domains make no radar
    wide = Scores(**{**vars(right), "domains": ("math", "math", "stem", "stem", "code", "code")})
    data = radar(from_scores(wide))
    assert data["axes"] == ["math", "stem", "code"] and data["range"] == [0, 100]
    assert data["series"][0]["values"] == [100, 50, 50] and data["series"][0]["model"] == "a"
    drawn = figure(data)
    assert list(drawn.data[0].r) == [100, 50, 50, 100] and drawn.data[1].name == "b"
    assert drawn.layout.polar.radialaxis.ticksuffix == "%"
    graded = radar(from_scores(Scores(**{**vars(wide), "unit": "1 to 10", "scale": 1.0})))
    assert graded["range"] == [0, 10] and figure(graded).layout.polar.radialaxis.ticksuffix == ""


def test_written_whole_and_never_over_something(right, tmp_path):
    evaluation = Evaluation("domains", {"seed": 0}, from_scores(right, "a"), right, ({"model": "a", "reply": "x"},))
    out = write(evaluation, tmp_path / "deep" / "result")
    assert {path.name for path in out.iterdir()} == {"results.json", "table.md", "table.csv", "scores.json", "answers.jsonl"}
    data = json.loads((out / "results.json").read_text())
    assert data["table"]["rows"][0]["cells"]["average"]["value"] == 62.5 and data["table"]["baseline"] == "a"
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        write(evaluation, out)
    broken = Evaluation("domains", {"seed": math.nan}, evaluation.table)
    with pytest.raises(ValueError):
        write(broken, tmp_path / "other")
    assert snapshot(tmp_path) == before
