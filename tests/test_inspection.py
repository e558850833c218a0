"""fusion.inspection: sums worked out by hand, singular values against numpy's, samples against the whole, and what stops it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, MismatchError, RecipeError
from fusion.inspection import QUANTITIES, Inspection, inspect, preview, refine, sampling, spectrum, streaming
from fusion.progress import finish
from fusion.variation import measure
from tests.conftest import save_checkpoint

Q0, UP0, NORM0 = (f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"))
Q1, HEAD = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
PIVOT = {Q0: np.array([[1, 2], [2, 4]]), UP0: np.zeros((2, 2)), NORM0: np.array([3, 4]), Q1: np.eye(2)}
DELTAS = [{Q0: [[3, 0], [0, 4]], UP0: [[1, -1], [1, 0]], NORM0: [3, 4], Q1: [[0, 0], [0, 0]]},
          {Q0: [[0, 5], [0, 0]], UP0: [[1, 1], [-2, 3]], NORM0: [-3, 0], Q1: [[1, 1], [1, 1]]}]


def models(folder: Path, pivot: dict, *targets: dict, **options) -> list[Checkpoint]:
    """Save arrays as checkpoints called pivot, a, b …"""
    return [Checkpoint(save_checkpoint(folder / name, {key: np.asarray(value, np.float64).astype(np.float32)
                                                       for key, value in tensors.items()}, **options))
            for name, tensors in zip(("pivot", "a", "b", "c", "d"), (pivot, *targets), strict=False)]


def inspected(folder: Path, pivot: dict, *targets: dict, dtype: str | None = None, **options) -> Inspection:
    opened = models(folder, pivot, *targets, **options)
    return finish(inspect(opened[0], opened[1:], dtype=dtype))


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Inspection:
    moved = [{name: PIVOT[name] + np.array(delta) for name, delta in its.items()} for its in DELTAS]
    return inspected(tmp_path_factory.mktemp("golden"), PIVOT, *moved)


def at(report: Inspection, quantity: str, name: str, granularity: str = "matrix"):
    return report.values(quantity, granularity)[report.names.index(name)].tolist()


# ── worked out by hand ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("quantity", "name", "expected"), [
    ("relative", Q0, [1, 1]),  # ‖pivot‖ = ‖Δ‖ = 5
    ("relative", NORM0, [1, .6]),
    ("relative", UP0, [np.nan, np.nan]),  # from a pivot of zeros
    ("changed", Q0, [.5, .25]), ("changed", UP0, [.75, 1]), ("changed", Q1, [0, 1]),
    ("mean_square", Q0, [6.25, 6.25]), ("mean_square", UP0, [.75, 15 / 4]),
    ("ratio", UP0, [3 / 18, 15 / 18]), ("ratio", Q1, [0, 1]),
    ("stable_rank", Q0, [25 / 16, 1]),  # diag(3, 4): 25 ÷ 4²
    ("stable_rank", NORM0, [1, 1]),  # a vector has rank 1
    ("stable_rank", Q1, [0, 1]),  # nothing moved · all ones: rank 1
    ("cosine", Q0, 0), ("cosine", NORM0, -.6), ("cosine", UP0, -2 / np.sqrt(45)), ("cosine", Q1, np.nan),
    ("conflict", Q0, 0), ("conflict", UP0, 2 / 3), ("conflict", NORM0, 1), ("conflict", Q1, 0),
    ("lost", Q0, [0, 0]), ("rounded_back", Q0, [0, 0]), ("mean_lost", Q0, 0), ("mean_rounded_back", Q0, 0)])
def test_every_quantity_is_as_worked_out_by_hand(golden, quantity, name, expected):
    assert at(golden, quantity, name) == pytest.approx(expected, rel=1e-6, abs=1e-7, nan_ok=True)


def test_layers_and_model_are_exact_sums(golden):
    assert at(golden, "relative", Q0, "layer") == pytest.approx([np.sqrt((25 + 3 + 25) / 50), np.sqrt((25 + 15 + 9) / 50)])
    assert at(golden, "conflict", NORM0, "layer") == pytest.approx(3 / 4)  # 0 of 0, 2 of 3, 1 of 1
    assert at(golden, "cosine", UP0, "layer") == pytest.approx((0 - 2 - 9) / np.sqrt(53 * 49))
    assert at(golden, "changed", Q1, "model") == pytest.approx([7 / 14, 10 / 14])
    assert np.isnan(at(golden, "stable_rank", Q0, "layer")).all()
    assert golden.values("relative", "module").tolist()[0] == golden.values("relative")[0].tolist()


def test_with_three_targets_a_conflict_needs_only_two_of_them(tmp_path):
    zero = {Q0: np.zeros((1, 4))}
    report = inspected(tmp_path, zero, {Q0: [[1, 1, 0, 1]]}, {Q0: [[1, 0, 0, -1]]}, {Q0: [[0, -1, 5, 1]]})
    assert at(report, "conflict", Q0) == pytest.approx(2 / 3)  # moved by two or more: the 1st, 2nd and 4th element
    assert at(report, "cosine", Q0) == pytest.approx(-1 / np.sqrt(54))
    assert report.cosines()[0] == pytest.approx(np.array([[1, 0, 0], [0, 1, -1 / np.sqrt(54)], [0, -1 / np.sqrt(54), 1]]))


def test_rounding_to_bfloat16_by_hand(tmp_path):
    pivot, target = {Q0: [[1, 1], [256, 2]]}, {Q0: [[1 + 2**-9, 1 + 2**-7], [257, 2]]}  # one step of bfloat16 at 1: 2⁻⁷
    report = inspected(tmp_path, pivot, target, dtype="bfloat16")
    lost, moved = (2**-9)**2 + 1, (2**-9)**2 + (2**-7)**2 + 1  # 257 lies between 256 and 258; ties go to even
    assert at(report, "lost", Q0) == pytest.approx([np.sqrt(lost / moved)])
    assert at(report, "rounded_back", Q0) == pytest.approx([2 / 3])
    assert at(report, "mean_lost", Q0) == at(report, "lost", Q0)[0]
    assert at(report, "mean_rounded_back", Q0) == pytest.approx(2 / 3)


def test_targets_in_the_output_dtype_lose_nothing_but_their_average_does(tmp_path):
    one, step = np.ones((2, 2)), 2**-7
    report = inspected(tmp_path, {Q0: one}, {Q0: one + step}, {Q0: one}, dtype=None)
    assert report.dtype == "float32" and at(report, "mean_lost", Q0) == 0
    report = inspected(tmp_path / "bf16", {Q0: one}, {Q0: one + step}, {Q0: one}, {Q0: one}, dtype="bfloat16")
    assert at(report, "lost", Q0) == [0, 0, 0]
    assert at(report, "mean_lost", Q0) == pytest.approx(1) and at(report, "mean_rounded_back", Q0) == 1  # 1 + step ÷ 3 → 1
    stored = models(tmp_path / "stored", {Q0: one}, {Q0: one + step}, {Q0: one}, dtype="bfloat16")
    report = finish(inspect(stored[0], stored[1:]))
    assert report.dtype == "bfloat16" and at(report, "mean_rounded_back", Q0) == 1  # half a step: to even, which is 1


def test_numbers_beyond_the_output_dtype_are_no_number_in_the_report(tmp_path, recwarn):
    report = inspected(tmp_path, {Q0: [[1, 1]]}, {Q0: [[1e6, 1]]}, dtype="float16")
    assert report.rows()[0]["targets"]["a"]["lost"] is None
    assert json.dumps(report.to_dict(), allow_nan=False) and not recwarn


def test_rows_say_where_and_what_in_plain_data(golden):
    rows = {row["unit"]: row for row in golden.rows()}
    assert rows[UP0] | {"targets": {}} == {
        "unit": UP0, "layer": 0, "module": "mlp", "matrix": "up_proj", "shape": [2, 2], "tensors": 1, "elements": 4,
        "cosine": pytest.approx(-2 / np.sqrt(45)), "conflict": pytest.approx(2 / 3), "mean_lost": 0, "mean_rounded_back": 0,
        "cosines": [{"targets": ["a", "b"], "cosine": pytest.approx(-2 / np.sqrt(45))}], "targets": {}}
    assert set(rows[UP0]["targets"]["b"]) == {name for name, quantity in QUANTITIES.items() if quantity.per_target}
    assert rows[UP0]["targets"]["b"]["relative"] is None
    layers = golden.rows("layer")
    assert [(row["unit"], row["tensors"], row["elements"], row["matrix"]) for row in layers] == [
        ("model.layers.0", 3, 10, None), ("model.layers.1", 1, 4, None)]
    assert json.dumps(golden.to_dict("module"), allow_nan=False)


# ── against numpy, and whatever the blocks ───────────────────────────────────────────────────────────────────────────

def test_random_tensors_of_many_blocks_agree_with_numpy(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 37)
    random = np.random.default_rng(0)
    pivot = random.normal(size=(40, 30)).astype(np.float32)
    targets = [(pivot + random.normal(size=pivot.shape) * size * (random.random(pivot.shape) < .7)).astype(np.float32)
               for size in (.1, .01, .3)]
    report = inspected(tmp_path, {Q0: pivot}, *({Q0: target} for target in targets), dtype="float16")
    deltas = np.array([target.astype(np.float64) - pivot for target in targets]).reshape(3, -1)
    assert report.gram[0] == pytest.approx(deltas @ deltas.T, rel=1e-12)
    assert report.cosines()[0] == pytest.approx(np.corrcoef(deltas), abs=.02)
    signs = np.sign(deltas)
    moved, conflict = (signs != 0).sum(0) > 1, (signs.max(0) > 0) & (signs.min(0) < 0)
    assert at(report, "conflict", Q0) == pytest.approx(conflict.sum() / moved.sum())
    sigma = [np.linalg.svd(delta.reshape(40, 30), compute_uv=False)[0] for delta in deltas]
    assert report.sigma[0] == pytest.approx(sigma, rel=2e-3)
    rounded = np.array([target.astype(np.float16).astype(np.float64) - target for target in targets]).reshape(3, -1)
    assert at(report, "lost", Q0) == pytest.approx(np.linalg.norm(rounded, axis=1) / np.linalg.norm(deltas, axis=1))
    mean = pivot + deltas.mean(0).reshape(pivot.shape)
    error = torch.from_numpy(mean.astype(np.float32)).to(torch.float16).double().numpy() - mean
    assert at(report, "mean_lost", Q0) == pytest.approx(np.linalg.norm(error) / np.linalg.norm(deltas.mean(0)), rel=1e-6)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (64, 64), (1, 50), (50, 1), (7, 3, 5), (2, 2)])
@pytest.mark.parametrize("kind", ["noise", "rank one", "two equal", "tiny", "across"])
def test_the_largest_singular_value_is_that_of_a_full_decomposition(tmp_path, monkeypatch, shape, kind):
    monkeypatch.setattr(spectrum, "_PIECE", 64)
    random = np.random.default_rng(1)
    rows, columns = spectrum.matrix_shape(shape)
    delta = random.normal(size=(rows, columns))
    if kind == "rank one":
        delta = np.outer(delta[:, 0], delta[0])
    elif kind == "two equal":
        delta[:] = 0
        np.fill_diagonal(delta, 3)
    elif kind == "across":  # what moved most has nothing in common with a vector of ones
        delta = 1 + 3 * np.outer(*(np.resize([1, -1], size) * (np.arange(size) < size // 2 * 2) for size in delta.shape))
    elif kind == "tiny":
        delta *= 1e-30
    opened = models(tmp_path, {Q0: np.zeros(shape)}, {Q0: delta.reshape(shape)})
    report = finish(inspect(opened[0], opened[1:]))
    values = np.linalg.svd(opened[1][Q0].astype(np.float64).reshape(rows, columns), compute_uv=False)
    assert report.sigma[0, 0] == pytest.approx(values[0], rel=3e-3) and report.sigma[0, 0] <= values[0] * (1 + 1e-6)
    assert at(report, "stable_rank", Q0)[0] == pytest.approx((values**2).sum() / values[0]**2, rel=6e-3)


def test_the_same_models_give_the_same_bytes(tmp_path):
    random = np.random.default_rng(2)
    tensors = [{name: random.normal(size=(200, 170)) for name in (Q0, UP0, Q1)} for _ in range(3)]
    first, again = (inspected(tmp_path / str(i), *tensors, dtype="bfloat16") for i in range(2))
    assert all(np.array_equal(getattr(first, field), getattr(again, field))
               for field in ("gram", "sigma", "lost", "mean_lost", "pivot_square"))


def test_it_agrees_with_the_variation(family):
    pivot, *targets = map(Checkpoint, family())
    report, known = finish(inspect(pivot, targets)), finish(measure(pivot, targets))
    assert report.names == known.names
    for granularity in ("matrix", "module", "layer", "model"):
        assert report.values("ratio", granularity) == pytest.approx(known.ratios(granularity), rel=1e-9)
        assert report.values("mean_square", granularity) == pytest.approx(known.means(granularity), rel=1e-9)
    assert (report.changed == known.changed).all()
    assert report.values("relative", "model")[0] == pytest.approx([total["relative"] for total in known.totals().values()])


# ── what stops it ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("work", [inspect, preview, lambda *args, **options: refine_alone(*args, **options)])
def test_a_number_that_is_not_finite_names_model_and_tensor_or_counts_as_unchanged(tmp_path, work):
    sick = np.array([[2, np.nan], [np.inf, 3]])
    opened = models(tmp_path, {Q0: np.ones((2, 2)), UP0: sick}, {Q0: sick, UP0: np.ones((2, 2))})
    with pytest.raises(CheckpointError, match="holds 2 values that are NaN or Inf"):
        finish(work(opened[0], opened[1:]))
    report = finish(work(opened[0], opened[1:], allow_nonfinite=True))
    known = report if isinstance(report, Inspection) else report.variation
    assert known.changed[list(known.names).index(Q0)].tolist() == [2] and known.changed.sum() == 4
    assert np.isfinite(known.pivot_square).all() and json.dumps(report.to_dict(), allow_nan=False)


def refine_alone(*args, **options):
    """`refine` as a Work: without its estimates."""
    work = refine(*args, **options)
    try:
        while True:
            yield next(work)[0]
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize("work", [inspect, preview, refine])
def test_models_that_cannot_be_compared_are_refused_before_a_weight_is_read(tmp_path, monkeypatch, work):
    pivot, other = models(tmp_path, {Q0: np.ones((2, 2))}, {Q0: np.ones((2, 3))})
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(MismatchError, match=Q0):
        next(work(pivot, [other]))


def test_an_unknown_dtype_quantity_or_granularity_is_refused_with_the_nearest(golden, tmp_path):
    pivot, target = models(tmp_path, {Q0: np.ones((2, 2))}, {Q0: np.zeros((2, 2))})
    with pytest.raises(RecipeError, match="Did you mean 'bfloat16'"):
        next(inspect(pivot, [target], dtype="bfloat"))
    with pytest.raises(RecipeError, match="Did you mean 'conflict'"):
        golden.values("conflicts")
    with pytest.raises(RecipeError, match="Did you mean 'layer'"):
        golden.values("conflict", "layers")
    with pytest.raises(RecipeError, match="spectral=True"):
        finish(inspect(pivot, [target], spectral=False)).values("stable_rank")


@pytest.mark.parametrize("work", [inspect, preview, refine])
def test_closing_it_within_a_tensor_ends_its_threads_at_the_next_block(tmp_path, monkeypatch, work):
    monkeypatch.setattr(streaming, "WAKE_S", .02)
    pivot, target = models(tmp_path, {Q0: np.ones((2000, 3000))}, {Q0: np.zeros((2000, 3000))})
    before, read, real = threading.active_count(), [], Checkpoint.read
    waiting = threading.Event()
    monkeypatch.setattr(Checkpoint, "read", lambda self, *args: read.append(waiting.wait(.01)) or real(self, *args))
    running = work(pivot, [target])
    next(running)
    next(running)  # no tensor is done yet: it only says so
    running.close()
    assert threading.active_count() == before and len(read) < 300


# ── the sample ───────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = [f"model.layers.{layer}.{part}.weight" for layer in range(40) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> list[Checkpoint]:
    """A pivot and two targets whose changes differ from row to row; 80 tensors of 64 blocks each, and a small one."""
    random = np.random.default_rng(3)
    folder, shape = tmp_path_factory.mktemp("uneven"), (256, 512)

    def moved(size: float) -> dict:
        rows = {name: size * random.lognormal(0, .3, (shape[0], 1)) * random.normal(size=shape) for name in NAMES}
        return {**rows, HEAD: random.normal(size=(3, 3))}

    return models(folder, {name: np.zeros((3, 3) if name == HEAD else shape) for name in (*NAMES, HEAD)}, moved(1), moved(.7))


@pytest.mark.parametrize("by", ["square", "absolute"])
def test_about_95_percent_of_the_exact_ratios_lie_within_two_standard_errors(uneven, by):
    exact = finish(measure(uneven[0], uneven[1:]))
    hits = {"matrix": [], "layer": [], "model": []}
    for seed in range(5):
        sample = finish(preview(uneven[0], uneven[1:], blocks=2600, seed=seed))
        assert not sample.exact and sample.blocks < 2700
        for granularity, found in hits.items():
            error = sample.error(granularity, by)
            off = np.abs(sample.ratios(granularity, by) - exact.ratios(granularity, by))
            known = error == 0  # only the head was read whole
            assert (off[known] == 0).all() and (granularity == "model" or known.any(axis=1).tolist() == [
                name == HEAD for name in sample.variation.names])
            found.append(off[~known] <= 2 * error[~known])
    assert .91 < np.concatenate(hits["matrix"]).mean() < .98
    assert .90 < np.concatenate(hits["layer"]).mean() < .99
    assert np.mean([found.all() for found in hits["model"]]) >= .6


def test_error_bars_are_of_the_right_size_and_shrink_with_the_sample(uneven):
    exact = finish(measure(uneven[0], uneven[1:]))
    few, many = (finish(preview(uneven[0], uneven[1:], blocks=blocks)) for blocks in (2600, 4400))
    inner = [t for t, name in enumerate(few.variation.names) if name != HEAD]
    off = few.ratios()[inner, 0] - exact.ratios()[inner, 0]
    assert few.error()[inner, 0].mean() == pytest.approx(off.std(), rel=.3)
    assert many.error()[inner].mean() < .6 * few.error()[inner].mean()
    means = (few.variation.means() - exact.means())[inner] / few.means_error()[inner]
    assert .7 < means.std() < 1.4


def test_a_sample_of_everything_is_exact(uneven):
    exact, sample = finish(measure(uneven[0], uneven[1:])), finish(preview(uneven[0], uneven[1:], blocks=10**9))
    assert sample.exact and (sample.error() == 0).all() and (sample.sampled == 1).all()
    for granularity in ("matrix", "layer", "model"):
        for by in ("square", "absolute"):
            assert sample.ratios(granularity, by) == pytest.approx(exact.ratios(granularity, by), rel=1e-12)
            assert sample.variation.means(granularity, by) == pytest.approx(exact.means(granularity, by), rel=1e-12)
    assert (sample.variation.changed == exact.changed).all()


def test_the_same_seed_and_number_of_blocks_give_the_same_numbers_and_another_seed_others(uneven):
    first, again, other = (finish(preview(uneven[0], uneven[1:], blocks=2600, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.ratios(), again.ratios()) and np.array_equal(first.error(), again.error())
    assert not np.array_equal(first.ratios(), other.ratios())


def test_where_a_sample_saw_no_change_it_claims_no_certainty(tmp_path):
    still = {Q0: np.zeros((1024, 1024)), HEAD: np.zeros((2, 2))}
    lone = {**still, Q0: np.eye(1024)[::-1] * 0}
    lone[Q0][3, 5] = 1
    opened = models(tmp_path, still, lone, still)
    sample = finish(preview(opened[0], opened[1:], blocks=16, seed=1))
    assert sample.error()[sample.variation.names.index(Q0)].tolist() == [.5, .5]
    assert sample.error()[sample.variation.names.index(HEAD)].tolist() == [0, 0]


def test_refining_begins_with_a_sample_and_ends_exact(uneven, monkeypatch):
    monkeypatch.setattr(sampling, "FIRST_BLOCKS", 150)
    monkeypatch.setattr(sampling, "_FEWEST", 2)
    best, work = [], refine(uneven[0], uneven[1:], seconds=60)
    try:
        while True:
            estimate = next(work)[1]
            if estimate is not None and (not best or estimate is not best[-1]):
                best.append(estimate)
    except StopIteration as end:
        last = end.value
    assert [estimate.blocks for estimate in best] == sorted({estimate.blocks for estimate in best}) and len(best) > 1
    assert last.exact and (last.error() == 0).all()
    assert np.array_equal(last.ratios(), finish(measure(uneven[0], uneven[1:])).ratios())


def test_a_preview_is_plain_data_with_its_errors(uneven):
    report = finish(preview(uneven[0], uneven[1:], blocks=2600)).to_dict("layer")
    assert json.dumps(report, allow_nan=False) and report["exact"] is False
    row = next(row for row in report["tensors"] if row["tensor"] != HEAD)
    assert 0 < row["error"] < .1 and 0 < row["sampled"] < 1 and 0 < row["ratio"] < 1
    with pytest.raises(RecipeError, match="Did you mean 'layer'"):
        finish(preview(uneven[0], uneven[1:], blocks=2600)).error("layers")
