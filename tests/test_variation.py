"""fusion.variation: the golden vectors of the paper's formula, its invariants, and what stops a measurement."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion import variation as module
from fusion.anatomy import GRANULARITIES
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, MismatchError, RecipeError
from fusion.progress import finish
from fusion.variation import MEASURES, Variation, measure, normalise, sum_tensor
from tests.conftest import save_checkpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q0, UP0, NORM0 = (f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"))
Q1 = "model.layers.1.self_attn.q_proj.weight"
ONES = np.ones((2, 2))
GOLDEN = {  # name → deltas of both targets from a pivot of zeros, worked out by hand
    EMBED: (np.array([[.1, 0], [0, 0]]), np.array([[0, 0], [0, .2]])),
    Q0: (.1 * ONES, .3 * ONES), UP0: (np.full((2, 4), .2), np.full((2, 4), .1)), NORM0: (np.zeros(2), np.zeros(2)),
    Q1: (np.array([[.1, -.1], [.1, -.1]]), .1 * ONES), HEAD: (0 * ONES, .4 * ONES)}
SQUARE = {EMBED: (.0025, .01, .2), Q0: (.01, .09, .1), UP0: (.04, .01, .8),  # name → both means, the first target's weight
          NORM0: (0, 0, .5), Q1: (.01, .01, .5), HEAD: (0, .16, 0)}
ABSOLUTE = {EMBED: (.025, .05, 1 / 3), Q0: (.1, .3, .25), UP0: (.2, .1, 2 / 3),
            NORM0: (0, 0, .5), Q1: (.1, .1, .5), HEAD: (0, .4, 0)}
LAYER0 = (Q0, UP0, NORM0)


def measured(pivot: dict, *targets: dict, elements: bool = True, **options) -> Variation:
    """Save arrays as checkpoints and measure them."""
    with tempfile.TemporaryDirectory() as folder:
        models = [Checkpoint(save_checkpoint(Path(folder) / name, tensors, **options))
                  for name, tensors in zip(("pivot", "a", "b", "c", "d"), (pivot, *targets), strict=False)]
        return finish(measure(models[0], models[1:], elements=elements))


@pytest.fixture(scope="module")
def golden() -> Variation:
    return measured({name: 0 * pair[0] for name, pair in GOLDEN.items()},
                    *({name: pair[j] for name, pair in GOLDEN.items()} for j in (0, 1)))


def weights(variation: Variation, name: str, granularity: str, by: str = "square") -> list[float]:
    return variation.ratios(granularity, by)[variation.names.index(name)].tolist()


# ── golden vectors ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("by", "table"), [("square", SQUARE), ("absolute", ABSOLUTE)])
@pytest.mark.parametrize("name", GOLDEN)
def test_matrix_means_and_weights_are_the_golden_ones(golden, by, table, name):
    first, second, weight = table[name]
    assert golden.means("matrix", by)[golden.names.index(name)] == pytest.approx([first, second], abs=2e-8)  # float32 of .1
    assert weights(golden, name, "matrix", by) == pytest.approx([weight, 1 - weight], abs=1e-6)


@pytest.mark.parametrize(("by", "means", "ratio"), [("square", (.01576923, .04461538), (.261146, .738854)),
                                                    ("absolute", None, (.373134, .626866))])
def test_the_model_level_is_the_pooled_mean_over_all_elements(golden, by, means, ratio):
    for name in GOLDEN:
        assert weights(golden, name, "model", by) == pytest.approx(ratio, abs=1e-6)
    if means:
        assert golden.means("model", by)[0] == pytest.approx(means, abs=1e-8)
        assert [total["mean"] for total in golden.totals(by).values()] == pytest.approx(means, abs=1e-8)


@pytest.mark.parametrize(("by", "means", "ratio"), [("square", (.025714, .031429), (.45, .55)), ("absolute", None, (.5, .5))])
def test_a_layer_pools_its_matrices_by_size_instead_of_adding_their_means(golden, by, means, ratio):
    for name in LAYER0:
        assert weights(golden, name, "layer", by) == pytest.approx(ratio, abs=1e-6)
    if means:
        assert golden.means("layer", by)[golden.names.index(Q0)] == pytest.approx(means, abs=1e-6)
    assert weights(golden, Q1, "layer", by) == pytest.approx([.5, .5], abs=1e-6)


@pytest.mark.parametrize("granularity", ["layer", "module", "matrix"])
def test_tensors_outside_the_layers_are_units_of_their_own(golden, granularity):
    assert weights(golden, HEAD, granularity) == pytest.approx([0, 1], abs=1e-9)
    assert weights(golden, EMBED, granularity) == pytest.approx([.2, .8], abs=1e-6)


def test_a_module_pools_only_its_own_matrices(golden):
    assert weights(golden, Q0, "module") == pytest.approx([.1, .9], abs=1e-6)
    assert weights(golden, NORM0, "module") == [.5, .5]


def test_the_parameter_level_reports_the_mean_over_changed_elements(golden):
    assert weights(golden, EMBED, "parameter") == pytest.approx([.5, .5])  # each target moved one element alone
    assert weights(golden, Q0, "parameter") == pytest.approx([.1, .9], abs=1e-6)
    assert weights(golden, Q0, "parameter", "absolute") == pytest.approx([.25, .75], abs=1e-6)
    assert weights(golden, NORM0, "parameter") == [.5, .5]


def test_changed_counts_the_elements_that_differ(golden):
    assert golden.changed[golden.names.index(EMBED)].tolist() == [1, 1]
    assert golden.totals()["a"]["changed"] == pytest.approx(17 / 26)


def test_opposite_changes_do_not_cancel(golden):
    assert weights(golden, Q1, "matrix") == pytest.approx([.5, .5], abs=1e-6)


# ── invariants ───────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = (EMBED, Q0, UP0, Q1)
VALUES = st.floats(-100, 100, width=16)
MODEL = st.fixed_dictionaries({name: arrays(np.float32, (2, 3), elements=VALUES) for name in NAMES})
FEW = settings(max_examples=12)


@FEW
@given(pivot=MODEL, targets=st.lists(MODEL, min_size=1, max_size=3))
def test_weights_are_a_share_everywhere(pivot, targets):
    variation = measured(pivot, *targets)
    for granularity in GRANULARITIES:
        for by in MEASURES:
            ratios = variation.ratios(granularity, by)
            assert (ratios >= 0).all() and np.allclose(ratios.sum(axis=1), 1, atol=1e-12)


@FEW
@given(pivot=MODEL, targets=st.tuples(MODEL, MODEL, MODEL), order=st.permutations(range(3)))
def test_permuting_targets_permutes_weights(pivot, targets, order):
    straight, turned = measured(pivot, *targets), measured(pivot, *(targets[j] for j in order))
    for granularity in GRANULARITIES:
        assert np.allclose(straight.ratios(granularity)[:, order], turned.ratios(granularity), atol=1e-12)


@FEW
@given(deltas=st.tuples(MODEL, MODEL), scale=st.sampled_from([2**-40, 0.25, 8.0, 2.0**40]))
def test_scaling_all_changes_leaves_the_weights(deltas, scale):
    zero = {name: np.zeros((2, 3), np.float32) for name in NAMES}
    plain = measured(zero, *deltas)
    scaled = measured(zero, *({name: delta * np.float32(scale) for name, delta in its.items()} for its in deltas))
    for granularity in GRANULARITIES:
        for by in MEASURES:
            assert np.allclose(plain.ratios(granularity, by), scaled.ratios(granularity, by), atol=1e-9)


@FEW
@given(pivot=MODEL, moved=MODEL)
def test_a_target_equal_to_the_pivot_weighs_nothing_where_another_moved(pivot, moved):
    variation = measured(pivot, pivot, moved)
    changed = np.array([bool((pivot[name] != moved[name]).any()) for name in variation.names])
    assert (variation.ratios("matrix")[changed] == [0, 1]).all()
    assert (variation.ratios("matrix")[~changed] == .5).all()


@FEW
@given(pivot=arrays(np.float32, (2, 3), elements=VALUES), targets=st.tuples(*[arrays(np.float32, (2, 3), elements=VALUES)] * 2))
def test_with_one_tensor_all_units_are_the_same(pivot, targets):
    variation = measured({Q0: pivot}, *({Q0: target} for target in targets))
    assert all(np.array_equal(variation.ratios(unit), variation.ratios("matrix")) for unit in ("model", "layer", "module"))


def test_normalise_survives_the_smallest_and_the_largest_numbers():
    rows = normalise(np.array([[5e-324, 0], [1e308, 1e308], [0, 0], [1e-300, 3e-300]]))
    assert rows == pytest.approx(np.array([[1, 0], [.5, .5], [.5, .5], [.25, .75]]))


# ── precision, blocks, odd tensors ───────────────────────────────────────────────────────────────────────────────────

def test_sums_are_exact_to_float64_over_many_blocks():
    random = np.random.default_rng(0)
    pivot, target = (random.normal(size=3 * module.BLOCK + 7).astype(np.float32) for _ in range(2))
    variation = measured({Q0: pivot}, {Q0: target})
    delta = target.astype(np.longdouble) - pivot.astype(np.longdouble)
    assert variation.square[0, 0] == pytest.approx(float((delta**2).sum()), rel=1e-13)
    assert variation.absolute[0, 0] == pytest.approx(float(np.abs(delta).sum()), rel=1e-13)
    assert variation.changed[0, 0] == np.count_nonzero(delta)


def test_small_changes_of_large_numbers_are_not_lost():
    variation = measured({Q0: np.full(4, 1000, np.float32)}, {Q0: np.nextafter(np.full(4, 1000, np.float32), np.float32(2000))})
    assert variation.means()[0, 0] == pytest.approx((2.0**-14) ** 2, rel=1e-12)


def test_empty_and_scalar_tensors_have_weights_too():
    tensors = {Q0: np.ones((0, 3), np.float32), NORM0: np.float32(1), HEAD: np.ones(2, np.float32)}
    variation = measured(tensors, {**tensors, NORM0: np.float32(3)}, tensors)
    assert variation.ratios()[[variation.names.index(name) for name in (Q0, NORM0)]].tolist() == [[.5, .5], [1, 0]]
    assert variation.means()[variation.names.index(NORM0)].tolist() == [4, 0]


def test_every_byte_is_read_once(tmp_path, monkeypatch):
    models = [Checkpoint(save_checkpoint(tmp_path / name, {Q0: np.full((300, 300), value, np.float32), HEAD: 2 * ONES}))
              for value, name in enumerate("abc")]
    seen, read = [], os.preadv
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("read by another way"))
    monkeypatch.setattr(os, "preadv", lambda file, to, at: seen.append((file, at, len(to[0]))) or read(file, to, at))
    finish(measure(models[0], models[1:]))
    assert sum(size for _, _, size in seen) == sum(model.nbytes for model in models)
    assert len(set(seen)) == len(seen)


def test_the_result_does_not_depend_on_which_thread_was_faster(golden):
    again = measured({name: 0 * pair[0] for name, pair in GOLDEN.items()},
                     *({name: pair[j] for name, pair in GOLDEN.items()} for j in (0, 1)))
    assert again.names == golden.names and all(np.array_equal(again.ratios(g), golden.ratios(g)) for g in GRANULARITIES)


# ── what stops it ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("broken", ["pivot", "a", "b"])
def test_a_number_that_is_not_finite_names_model_and_tensor(tmp_path, recwarn, value, broken):
    sick = np.ones(module.BLOCK + 5, np.float32)
    sick[-1] = value
    models = [Checkpoint(save_checkpoint(tmp_path / name, {Q0: sick if name == broken else np.ones_like(sick), HEAD: ONES}))
              for name in ("pivot", "a", "b")]
    with pytest.raises(CheckpointError, match=rf"^{broken}: {Q0} holds 1 values that are NaN or Inf"):
        finish(measure(models[0], models[1:]))
    allowed = finish(measure(models[0], models[1:], allow_nonfinite=True))
    assert np.isfinite(allowed.ratios()).all() and json.dumps(allowed.to_dict(), allow_nan=False)
    assert not recwarn


def test_other_shapes_stop_it_before_a_weight_is_read(tmp_path, monkeypatch):
    pivot, target = (Checkpoint(save_checkpoint(tmp_path / str(n), {Q0: np.ones((2, n))})) for n in (2, 3))
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(MismatchError, match=Q0):
        next(measure(pivot, [target]))


def test_closing_it_ends_its_threads(tmp_path, monkeypatch):
    many = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((100, 100), np.float32) for i in range(200)}
    pivot, target = (Checkpoint(save_checkpoint(tmp_path / name, many)) for name in "ab")
    before, read = threading.active_count(), []
    monkeypatch.setattr(module, "sum_tensor", lambda name, *rest: read.append(name) or time.sleep(.01) or sum_tensor(name, *rest))
    work = measure(pivot, [target])
    assert [next(work).done for _ in range(3)] == [0, 1, 2]
    work.close()
    assert threading.active_count() == before and len(read) < 20


@pytest.mark.parametrize(("call", "words"), [
    (lambda v: v.ratios("matrx"), "unknown granularity 'matrx'. Did you mean 'matrix'"),
    (lambda v: v.means("tensor"), "unknown granularity 'tensor'"),
    (lambda v: v.ratios("matrix", "squre"), "unknown measure 'squre'. Did you mean 'square'")])
def test_unknown_names_are_refused_with_the_nearest(golden, call, words):
    with pytest.raises(RecipeError, match=words):
        call(golden)


def test_parameter_ratios_need_to_be_measured():
    with pytest.raises(RecipeError, match="elements=True"):
        measured({Q0: ONES}, {Q0: 2 * ONES}, elements=False).ratios("parameter")


def test_the_report_of_many_thousand_tensors_takes_no_square_time():
    names = tuple(f"model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj.weight" for i in range(4000))
    ones, started = np.ones((len(names), 2)), time.perf_counter()
    rows = Variation(names, ((2, 3),) * len(names), ("a", "b"), ones, ones, ones, ones[:, 0]).rows()
    assert len(rows) == 8000 and rows[0]["changed"] == pytest.approx(1 / 6)
    assert time.perf_counter() - started < 5
