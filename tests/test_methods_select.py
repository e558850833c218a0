"""The parts that methods share: exact selection from a stream, random numbers by place, sums in a fixed order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.compiled import twins
from fusion.methods.draws import begin, draw, uniform
from fusion.methods.lanes import lane_product, lane_sum
from fusion.methods.select import Selection, Top, magnitude_bits

NUMBERS = arrays(np.float32, st.integers(1, 60), elements=st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 1e-45, 3e38])))


def largest(values: np.ndarray, ranks: list[int], block: int) -> list[np.ndarray]:
    """For each rank k whether each number is among the k largest magnitudes, by two passes in blocks."""
    blocks, chosen = [values[start:start + block] for start in range(0, values.size, block)], Selection()
    for its in blocks:
        chosen.count(magnitude_bits(its))
    chosen.aim(ranks)
    for its in blocks:
        chosen.refine(magnitude_bits(its))
    tops = [Top(cut) for cut in chosen.cuts()]
    return [np.concatenate([top.mask(magnitude_bits(its)) for its in blocks]) for top in tops]


@given(NUMBERS, st.lists(st.integers(0, 70), min_size=1, max_size=3), st.integers(1, 61))
def test_exactly_the_k_largest_are_found_equal_ones_in_order(values, ranks, block):
    order = np.argsort(-np.abs(values.astype(float)), kind="stable")
    for k, mask in zip(ranks, largest(values, ranks, block), strict=True):
        assert set(np.flatnonzero(mask)) == set(order[:k])


def test_many_equal_numbers_are_cut_in_the_middle_of_a_block():
    values = np.array([1, 2, 1, 1, 3, 1, 1], np.float32)
    assert largest(values, [4], 3)[0].tolist() == [True, True, True, False, True, False, False]


def test_a_large_stream_is_selected_as_sorting_would():
    values = np.random.default_rng(0).normal(size=200_003).astype(np.float32)
    for k, mask in zip((1, 99_999, 200_003), largest(values, [1, 99_999, 200_003], 65_536), strict=True):
        assert mask.sum() == k and np.abs(values[mask]).min() >= np.abs(values[~mask]).max(initial=0)


# ── random numbers ───────────────────────────────────────────────────────────────────────────────────────────────────

KEYS = (0, 1, 2, 1 << 32, 2 << 32, 0x9E3779B97F4A7C15, (1 << 64) - 1)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 40), st.integers(0, 200), st.integers(0, 200))
def test_a_draw_depends_on_its_place_alone(key, start, before, n):
    assert np.array_equal(draw(key, start, before + n)[before:], draw(key, start + before, n))


def test_draws_go_on_beyond_32_bits():
    across = draw(7, (1 << 32) - 5, 10)
    assert np.array_equal(across, np.concatenate([draw(7, (1 << 32) - 5, 5), draw(7, 1 << 32, 5)]))
    assert not np.array_equal(draw(7, 0, 1000), draw(7, 1 << 32, 1000))


@pytest.mark.parametrize("key", KEYS)
def test_draws_are_uniform(key):
    n = 1 << 18
    values = uniform(key, 12_345, n)
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    assert values.mean() == pytest.approx(.5, abs=4 * np.sqrt(1 / 12 / n)) and values.var() == pytest.approx(1 / 12, rel=.01)
    counts = np.bincount((values * 256).astype(int), minlength=256)
    assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 256 + 5 * np.sqrt(2 * 256)  # χ² with 255 degrees of freedom
    bits = np.unpackbits(draw(key, 0, n).view(np.uint8)).reshape(n, 32).mean(axis=0)
    assert np.abs(bits - .5).max() < 5 * .5 / np.sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
@pytest.mark.parametrize("key", KEYS)
def test_neighbours_are_independent(key, lag):
    values = uniform(key, 0, 1 << 18).astype(float)
    assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / 512


def test_keys_are_independent():
    table = np.array([uniform(key, 0, 1 << 16).astype(float) for key in KEYS])
    assert np.abs(np.corrcoef(table) - np.eye(len(KEYS))).max() < 5 / 256


@pytest.mark.parametrize("upper", [1, 2, 1 << 16, 0x12345678, 0x9E3779B9, 0xFFFFFFFF])
def test_keys_that_share_a_half_are_independent(upper):
    """With the lower half alone a key would only say where in one long sequence to start."""
    one, other = np.empty((2, 1 << 16), np.uint32)
    twins.draw(*begin(5, 0), one)
    twins.draw(*begin(5 + (upper << 32), 0), other)
    assert abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]) < 5 / 256
    assert abs(np.corrcoef((other - one).astype(float)[1:], (other - one).astype(float)[:-1])[0, 1]) < 5 / 256
    assert np.mean((one < 1 << 31) & (other < 1 << 31)) == pytest.approx(.25, abs=.01)


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@given(arrays(np.float32, st.integers(0, 700), elements=st.floats(-1e6, 1e6, width=32)))
def test_lanes_sum_every_number_once(values):
    assert lane_sum(values) == pytest.approx(values.astype(float).sum(), rel=1e-12, abs=1e-6)
    wide = values.astype(np.float64)
    assert lane_product(wide, wide) == pytest.approx((wide * wide).sum(), rel=1e-12, abs=1e-6)


def test_the_order_of_lanes_is_the_documented_one():
    values = np.random.default_rng(0).normal(size=300) * 10.0 ** np.arange(300) ** .5
    lanes = [sum(values[lane::128].tolist()) for lane in range(128)]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [one + other for one, other in zip(lanes[:half], lanes[half:], strict=True)]
    assert lane_sum(values) == lanes[0]
