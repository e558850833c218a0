"""fusion.compiled: machine code, numpy and a device give the same numbers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import compiled, dtypes
from fusion.compiled import twins
from fusion.errors import ResourceError
from fusion.merge import compute, merge
from fusion.methods.weighted import weighted
from fusion.progress import finish
from fusion.recipe import Recipe
from tests.conftest import load_tensors, save_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
RANDOM = np.random.default_rng(5)
SIZES = st.sampled_from([1, 2, 7, 127, 128, 129, 2047, 2048, 2049, 5000])
CODES = st.integers(0, 3)
HALF = dtypes.FLOATS.index("BF16")  # all in it go a way of their own
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-8, 65504, 65519.99, 65520, 6e-8, 2.9e-8, 1e-40, -1e-45, 3.3e38,
                    3.4028235e38], np.float32)


def codes_of(least: int, most: int):
    """The dtypes of that many models."""
    return st.one_of(st.lists(CODES, min_size=least, max_size=most), st.lists(st.just(HALF), min_size=least, max_size=most))


@pytest.fixture(scope="module")
def kernels(library):
    return library.kernels


def stored(values: np.ndarray, code: int) -> np.ndarray:
    """A row: float32 numbers as stored bytes, twice as much room as they need."""
    row = np.zeros(16 * len(values), np.uint8)
    twins.encode(values, code, row)
    return row


def numbers(n: int, seed: int, sick: bool = False) -> np.ndarray:
    """Normal numbers of many sizes, some equal, with the odd ones among them; `sick`: also NaN and Inf."""
    random = np.random.default_rng(seed)
    values = (random.normal(size=n) * 10.0 ** random.integers(-12, 6, n)).astype(np.float32)
    odd = np.concatenate([SPECIAL, [np.nan, np.inf, -np.inf]]).astype(np.float32) if sick else SPECIAL
    values[random.random(n) < .1] = random.choice(odd)
    return values


# ── the same bytes ───────────────────────────────────────────────────────────────────────────────────────────────────

@settings(max_examples=60)
@given(n=SIZES, code=CODES, seed=st.integers(0, 999), sick=st.booleans())
def test_reading_and_rounding_are_the_same(kernels, n, code, seed, sick):
    values = numbers(n, seed, sick)
    results = []
    for loops in (kernels, twins):
        row, read = np.full(8 * n + 8, 7, np.uint8), np.zeros(n, np.float32)
        with np.errstate(over="ignore"):
            finite = loops.encode(values, code, row)
            sound = loops.decode(row, code, n, read)
        results.append((finite, sound, row.tobytes(), read.tobytes(), loops.all_finite(row, code, n)))
    assert results[0] == results[1]
    assert results[0][0] == results[0][1] == results[0][4]


@settings(max_examples=60)
@given(n=SIZES, codes=codes_of(2, 5), seed=st.integers(0, 999), sick=st.booleans())
def test_sums_are_the_same_so_no_multiplication_is_fused_with_an_addition(kernels, n, codes, seed, sick):
    with np.errstate(over="ignore"):
        rows = np.stack([stored(numbers(n, seed + m, sick), code) for m, code in enumerate(codes)])
    sums = []
    for loops in (kernels, twins):
        its = np.full((len(codes), 3), 9.0)
        loops.sum_changes(rows, np.array(codes), n, its)
        sums.append(np.where(np.isnan(its), 0, its).tobytes() + np.isnan(its).tobytes())
    assert sums[0] == sums[1]


@settings(max_examples=60)
@given(n=SIZES, codes=codes_of(1, 4), code=st.one_of(CODES, st.just(HALF)), seed=st.integers(0, 999), sick=st.booleans())
def test_weighted_models_are_the_same_and_those_of_the_method(kernels, n, codes, code, seed, sick):
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.ones(len(codes))) * (random.random(len(codes)) < .8)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.stack([stored(numbers(n, seed + m, sick), its) for m, its in enumerate(codes)])
        results = []
        for loops in (kernels, twins):
            out = np.zeros(8 * n, np.uint8)
            results.append((loops.weigh(rows, np.array(codes), n, weights, code, out), out.tobytes()))
        models = np.empty((len(codes), n), np.float32)
        for row, its, model in zip(rows, codes, models, strict=True):
            twins.decode(row, its, n, model)
        expected = dtypes.encode(weighted(models, weights, np.empty(n, np.float32)), dtypes.FLOATS[code])
    assert results[0] == results[1]
    assert results[0][1].startswith(expected.tobytes())


@pytest.mark.parametrize("n", [64, 65])
def test_halfway_averages_are_rounded_to_even(kernels, n):
    step = 2 ** -7
    low, high = np.tile(np.array([1, 1 + step], np.float32), n)[:n], np.tile(np.array([1 + step, 1 + 2 * step], np.float32), n)[:n]
    rows = np.stack([stored(low, HALF), stored(high, HALF)])
    for loops in (kernels, twins):
        out, read = np.zeros(8 * n, np.uint8), np.empty(n, np.float32)
        assert loops.weigh(rows, np.array([HALF, HALF]), n, np.array([.5, .5]), HALF, out)
        twins.decode(out, HALF, n, read)
        assert (read[::2] == 1).all() and (read[1::2] == 1 + 2 * step).all()


@given(first=st.integers(0, 40), n=st.integers(1, 60))
def test_hashes_are_the_same(kernels, first, n):
    words, keys = RANDOM.integers(0, 2**64, n, np.uint64), RANDOM.integers(0, 2**32, (4, 16), np.uint64)
    sums = [np.ones(((first + n) // 16 + 1, 2), np.uint64) for _ in range(2)]
    for loops, its in zip((kernels, twins), sums, strict=True):
        loops.hash_words(words, first, keys, its)
    assert np.array_equal(*sums)
    assert any((sums[0] != 1).any(axis=1))


@settings(max_examples=60)
@given(n=st.sampled_from([0, 1, 127, 128, 129, 2500, 9000, 65536]), seed=st.integers(0, 999))
def test_lane_sums_are_the_same(kernels, n, seed):
    values = numbers(n, seed)
    wide = values.astype(np.float64) * np.pi
    calls = (("lane_sum", (values,)), ("lane_sum", (wide,)), ("lane_squares", (values,)), ("lane_product", (wide, wide)))
    for name, arguments in calls:
        assert getattr(kernels, name)(*arguments) == getattr(twins, name)(*arguments)
    assert twins.lane_squares(values) == pytest.approx((values.astype(float) ** 2).sum())


@given(n=st.sampled_from([0, 1, 2500, 70_000]), low=st.integers(0, 2**32 - 1), high=st.integers(0, 2**32 - 1))
def test_draws_are_the_same(kernels, n, low, high):
    drawn = np.zeros((2, n), np.uint32)
    kernels.draw(low, high, drawn[0])
    twins.draw(low, high, drawn[1])
    assert np.array_equal(*drawn)


@given(n=st.sampled_from([0, 1, 2500]), seed=st.integers(0, 99))
def test_counts_are_the_same_and_count_every_number_once(kernels, n, seed):
    bits = numbers(n, seed).view(np.uint32) & np.uint32(0x7FFFFFFF)
    upper, lower = np.zeros((2, 1 << 15), np.int64), np.zeros((2, 1 << 16), np.int64)
    often = int(bits[0] >> 16) if n else 3
    for m, loops in enumerate((kernels, twins)):
        loops.count_upper(bits, upper[m])
        loops.count_lower(bits, often, lower[m])
    assert np.array_equal(*upper) and np.array_equal(*lower)
    assert np.array_equal(upper[0], np.bincount(bits >> 16, minlength=1 << 15))
    assert lower[0].sum() == upper[0][often]


@settings(max_examples=60)
@given(n=st.sampled_from([1, 7, 2048, 5000]), count=st.integers(1, 8), seed=st.integers(0, 999), divided=st.booleans(),
       sick=st.booleans())
def test_elections_and_sums_of_those_that_agree_are_the_same(kernels, n, count, seed, divided, sick):
    random = np.random.default_rng(seed)
    deltas = np.stack([np.where(random.random(n) < .7, numbers(n, seed + j, sick), 0) for j in range(count)]).astype(np.float32)
    table = random.random(1 << count).astype(np.float32) + 1 if divided else np.empty(0, np.float32)
    signs, totals = np.zeros((2, n), np.uint32), np.zeros((2, n), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for m, loops in enumerate((kernels, twins)):
            loops.majority(deltas, signs[m])
            loops.add_agreeing(deltas.copy(), signs[m], table, totals[m])
    assert np.array_equal(*signs)
    assert dtypes.encode(totals[0], "F32").tobytes() == dtypes.encode(totals[1], "F32").tobytes()


DROPS = ((0, 0, 0, 0, 0), (1, 0x3A800000, 3, 0x3F800000, 1), (1, 0, 9999, 0x7FFFFFFF, 0), (1, 0x7FFFFFFF, 0, 0x7FFFFFFF, 0),
         (2, 4_294_960_000, 77, 1 << 31, 0))


@settings(max_examples=60)
@given(n=st.sampled_from([1, 127, 2048, 5000]), codes=codes_of(2, 5), seed=st.integers(0, 999),
       sick=st.booleans(), vote_first=st.booleans(), divided=st.booleans(), scale=st.sampled_from([1.0, .7]), dropped=st.booleans())
def test_what_is_taken_from_stored_numbers_is_the_same(kernels, n, codes, seed, sick, vote_first, divided, scale, dropped):
    random, count = np.random.default_rng(seed), len(codes) - 1
    drops = np.array(random.choice(DROPS, count), np.int64) * dropped
    factors, table = random.random(count).astype(np.float32), random.random(divided << count).astype(np.float32) + 1
    targets, uppers, codes = np.array([0, count - 1]), np.array([-1, 0x3F80]), np.array(codes)
    results = []
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.stack([stored(numbers(n, seed % 7 + m % 2, sick), code) for m, code in enumerate(codes)])
        for loops in (kernels, twins):
            its, sums, energy = [drops.copy(), drops.copy()], np.zeros((count, 2)), np.zeros(count)
            counts, merged = np.zeros((2, 1 << 16), np.int64), np.empty(n, np.float32)
            loops.elect(rows, codes, n, its[0], factors, vote_first, table if divided else table[:0], scale, merged)
            loops.sizes(rows, codes, n, its[1], sums)
            loops.squares(rows, codes, n, energy)
            loops.count_changes(rows, codes, n, targets, uppers, counts)
            numbers_made = [dtypes.encode(merged, "F32"), np.nan_to_num(sums), np.nan_to_num(energy)]
            results.append([part.tobytes() for part in (*its, *numbers_made, counts)])
    assert results[0] == results[1]


@settings(max_examples=60)
@given(n=st.sampled_from([1, 7, 2048, 5000]), count=st.integers(1, 5), seed=st.integers(0, 999))
def test_spreads_are_the_same(kernels, n, count, seed):
    deltas = np.stack([numbers(n, seed + j) for j in range(count)])
    deltas[:, ::3] = deltas[0, ::3]
    spreads = np.zeros((2, n), np.float32)
    for m, loops in enumerate((kernels, twins)):
        loops.spread(deltas, spreads[m])
    assert spreads[0].tobytes() == spreads[1].tobytes()
    assert spreads[0] == pytest.approx(deltas.astype(float).std(axis=0), rel=1e-6, abs=1e-30)


@given(rows=st.integers(1, 5), rank=st.integers(1, 9), columns=st.sampled_from([1, 7, 2048, 2500]), seed=st.integers(0, 99))
def test_thin_products_are_the_same(kernels, rows, rank, columns, seed):
    left, right = numbers(rows * rank, seed).reshape(rows, rank), numbers(rank * columns, seed + 1).reshape(rank, columns)
    products = np.ones((2, rows, columns), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for m, loops in enumerate((kernels, twins)):
            loops.multiply(left, right, products[m])
    assert dtypes.encode(products[0], "F32").tobytes() == dtypes.encode(products[1], "F32").tobytes()


def test_every_loop_has_its_twin(kernels):
    public = {name for name, value in vars(twins).items() if callable(value) and value.__module__ == twins.__name__
              and not name.startswith("_")}
    assert public >= {"decode", "encode", "all_finite", "sum_changes", "weigh", "hash_words"}
    assert all(hasattr(kernels, name) for name in public)


# ── on a device ──────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def device():
    """The loops that a GPU runs, on what torch has here."""
    import torch

    from fusion.compiled.device import DeviceLoops

    return DeviceLoops("cuda" if torch.cuda.is_available() else "cpu", lambda: twins)


@settings(max_examples=40)
@given(n=SIZES, codes=codes_of(2, 5), code=CODES, seed=st.integers(0, 999), sick=st.booleans())
def test_a_device_averages_and_measures_the_same(device, n, codes, code, seed, sick):
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.ones(len(codes))) * (random.random(len(codes)) < .8)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.stack([stored(numbers(n, seed + m, sick), its) for m, its in enumerate(codes)])
        found = []
        for loops in (device, twins):
            out, sums = np.zeros(8 * n, np.uint8), np.zeros((len(codes), 3))
            finite = loops.weigh(rows, np.array(codes), n, weights, code, out)
            loops.sum_changes(rows, np.array(codes), n, sums)
            values = np.empty(n, np.float32)
            twins.decode(out, code, n, values)
            found.append((finite, [loops.all_finite(row, its, n) for row, its in zip(rows, codes, strict=True)], values, sums))
    (finite, sound, values, sums), (other_finite, other_sound, other_values, other_sums) = found
    assert (finite, sound) == (other_finite, other_sound)
    np.testing.assert_array_equal(values, other_values)
    np.testing.assert_allclose(sums, other_sums, rtol=1e-13)


@settings(max_examples=40)
@given(n=SIZES, codes=codes_of(2, 5), seed=st.integers(0, 999), vote_first=st.booleans(),
       scale=st.sampled_from([1.0, 0.3]), kind=st.integers(0, 2), divided=st.booleans())
def test_a_device_elects_counts_and_drops_the_same(device, n, codes, seed, vote_first, scale, kind, divided):
    random, j = np.random.default_rng(seed), len(codes) - 1
    rows = np.stack([stored(numbers(n, seed + m), its) for m, its in enumerate(codes)])
    factors = random.normal(size=j).astype(np.float32)
    table = np.arange(1, 1 + 2 ** j, dtype=np.float32) if divided else np.empty(0, np.float32)
    drop = ((0, 0, 0, 0, 0), (1, 0x3F000000, 2, 0x41000000, 1), (2, 5, 6, 1 << 31, 0))[kind]
    found = []
    with np.errstate(over="ignore", invalid="ignore"):
        for loops in (device, twins):
            merged, sizes, squares = np.zeros(n, np.float32), np.zeros((j, 2)), np.zeros(j)
            drops = np.array([drop] * j, np.int64)
            loops.elect(rows, np.array(codes), n, drops, factors, vote_first, table, scale, merged)
            loops.sizes(rows, np.array(codes), n, np.array([drop] * j, np.int64), sizes)
            loops.squares(rows, np.array(codes), n, squares)
            counts = np.zeros((2, 1 << 16), np.int64)
            loops.count_changes(rows, np.array(codes), n, np.array([0, j - 1]), np.array([-1, 0x3F80]), counts)
            found.append((merged, drops, counts, sizes, squares))
    for mine, theirs in zip(*(its[:3] for its in found), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(*(its[3:] for its in found), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-13)


@pytest.mark.parametrize("method", ["varm", "linear", "ties", "dare_ties", "sce", "slerp", "breadcrumbs_ties"])
def test_a_merge_on_a_device_is_the_same_to_float32_rounding(device, method, tmp_path, monkeypatch):
    random = np.random.default_rng(3)
    pivot = random.normal(size=(700, 300)).astype(np.float32)
    count = 2 if method == "slerp" else 3
    models = [save_checkpoint(tmp_path / name, {UP: pivot + (j > 0) * random.normal(size=pivot.shape).astype(np.float32) / 10})
              for j, name in enumerate("pabc"[:count + 1])]
    here = finish(merge(Recipe(str(models[0]), tuple(map(str, models[1:])), method=method), tmp_path / "here"))
    monkeypatch.setattr(compiled, "_device", device)
    monkeypatch.setattr(compiled, "DEVICE_BLOCKS", 2)  # several blocks a tensor
    keep = partial(compute, device=None)
    there = finish(merge(Recipe(str(models[0]), tuple(map(str, models[1:])), method=method), tmp_path / "there", engine=keep))
    mine, theirs = (load_tensors(result.folder)[UP].numpy() for result in (here, there))
    np.testing.assert_allclose(mine, theirs, rtol=3e-7, atol=1e-9)
    assert not np.array_equal(mine, pivot)


@pytest.mark.parametrize("method", ["sce", "ties"])
def test_a_device_gets_more_numbers_at_once_than_the_other_loops(device, method, tmp_path, monkeypatch):
    random, size = np.random.default_rng(5), twins.STRETCH + 5
    models = [str(save_checkpoint(tmp_path / name, {UP: random.normal(size=size).astype(np.float32)})) for name in "pab"]
    here = finish(merge(Recipe(models[0], tuple(models[1:]), method=method), tmp_path / "here"))
    monkeypatch.setattr(compiled, "_device", device)
    there = finish(merge(Recipe(models[0], tuple(models[1:]), method=method), tmp_path / "there",
                         engine=partial(compute, device=None)))
    mine, theirs = (load_tensors(result.folder)[UP].numpy() for result in (here, there))
    np.testing.assert_allclose(mine, theirs, rtol=3e-7, atol=1e-6)


def test_a_device_that_is_not_there_is_refused_before_work():
    with pytest.raises(ResourceError, match="no device 'warp'"):
        compiled.prepare(0, "warp")
    compiled.prepare(0, "auto")
    compiled.prepare(0, "cpu")
    assert compiled.loops() in (twins, compiled._library and compiled._library.kernels) and compiled.block() == twins.BLOCK


# ── what the numbers are ─────────────────────────────────────────────────────────────────────────────────────────────

def test_numpy_adds_the_lanes_in_the_written_order():
    """If a numpy ever adds in another order, the two would differ by rounding: then this says why."""
    values = RANDOM.normal(size=(37, twins.LANES)) * 10.0 ** RANDOM.integers(-9, 9, (37, twins.LANES))
    lanes = [0.0] * twins.LANES
    for row in values.tolist():
        lanes = [lane + value for lane, value in zip(lanes, row, strict=True)]
    while len(lanes) > 1:
        lanes = [a + b for a, b in zip(lanes[:len(lanes) // 2], lanes[len(lanes) // 2:], strict=True)]
    assert twins._fold(values.reshape(-1)) == lanes[0]


def test_sums_are_those_of_the_definition():
    pivot, models = numbers(300, 1), np.stack([numbers(300, seed) for seed in (2, 3)])
    models[0, :50] = pivot[:50]
    sums = np.empty((3, 3))
    f32 = dtypes.FLOATS.index("F32")
    twins.sum_changes(np.stack([pivot, *models]).view(np.uint8), np.full(3, f32), 300, sums)
    delta = models.astype(np.float64) - pivot.astype(np.float64)
    assert sums[:2, 0] == pytest.approx((delta**2).sum(axis=1)) and sums[:2, 1] == pytest.approx(np.abs(delta).sum(axis=1))
    assert sums[:2, 2].tolist() == np.count_nonzero(delta, axis=1).tolist() and sums[0, 2] <= 250
    assert sums[2, 0] == pytest.approx((pivot.astype(np.float64)**2).sum())
