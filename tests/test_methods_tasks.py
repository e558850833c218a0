"""The task-vector pipeline: worked numbers for every stage, exact counts, random drops by expectation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.methods import BLOCK, Arrays, apply
from fusion.methods.pipeline import DropByRank, divisor, drop, ranks, sum_agreeing
from fusion.methods.stack import steady

ZERO = np.zeros(4, np.float32)
ONE, TWO = [4, -3, 2, 1], [1, 2, -3, .5]
N = 40_000


# ── weigh, elect, normalise, λ ───────────────────────────────────────────────────────────────────────────────────────

def test_task_arithmetic_by_hand():
    assert apply("task_arithmetic", np.full(4, 10), np.array([ONE, TWO]) + 10.0, [1, 2]).tolist() == [16, 11, 6, 12]
    assert apply("task_arithmetic", ZERO, [ONE, TWO], [1, 3], normalize=True).tolist() == [1.75, .75, -1.75, .625]
    assert apply("task_arithmetic", ZERO, [ONE, TWO], lambda_=.5).tolist() == [2.5, -.5, -.5, .75]


def test_ties_by_hand():
    """Half of four changes each: 4 and −3 of the first, 2 and −3 of the second; −3 + 2 < 0 elects minus."""
    assert apply("ties", ZERO, [ONE, TWO], density=.5).tolist() == [4, -3, -3, 0]
    assert apply("ties", ZERO, [ONE, TWO], density=.5, normalize=False, lambda_=2.0).tolist() == [8, -6, -6, 0]


def test_ties_averages_by_the_weights_that_agree():
    models = [[1, 1], [2, -9], [4, 1]]
    assert apply("ties", np.zeros(2), models, [1, 1, 2]) == pytest.approx([11 / 4, -9])
    assert apply("ties", np.zeros(2), models, [1, .1, 2]) == pytest.approx([9.2 / 3.1, 1])  # signs are elected by weighted changes


def test_a_sum_of_0_elects_plus_and_changes_of_0_do_not_count():
    assert apply("ties", np.zeros(3), [[1, 0, -1], [-1, 3, -3]]).tolist() == [1, 3, -2]


def test_a_negative_weight_turns_the_change_round():
    assert apply("ties", np.zeros(1), [[1], [3]], [1, -1]).tolist() == [3]  # 1 − 3 < 0: −3 ÷ −1
    assert apply("dare_ties", np.zeros(1), [[1], [3]], [1, -1]).tolist() == [-3]


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
def test_weights_that_sum_to_0_but_for_rounding_divide_nothing(method):
    merged = apply(method, np.zeros(1), [[1], [2], [4]], [.3, -.1, -.2], normalize=True)
    assert merged == pytest.approx([.3 - .2 - .8], rel=1e-6)


def test_agreeing_weights_that_cancel_divide_nothing():
    assert apply("ties", np.zeros(1), [[1], [-2], [-4]], [.3, -.1, -.2]) == pytest.approx([.3 + .2 + .8], rel=1e-6)


def test_small_weights_are_normalised_as_large_ones_are():
    for size in (1e-12, 1.0):
        merged = apply("task_arithmetic", ZERO, [ONE, TWO], [size, 3 * size], normalize=True)
        assert merged == pytest.approx([1.75, .75, -1.75, .625])


@pytest.mark.parametrize("count", [1, 3, 8, 9, 12])
def test_the_sum_of_agreeing_weights_is_the_same_by_table_and_one_by_one(count):
    random = np.random.default_rng(count)
    deltas, weights = random.normal(size=(count, 500)).astype(np.float32), random.random(count)
    sign = (random.integers(0, 2, 500) << 31).astype(np.uint32)
    turned = np.where(sign, -deltas, deltas)
    above = np.where(turned > 0, turned, 0).sum(axis=0) / np.maximum(((turned > 0) * weights[:, None]).sum(axis=0), 1e-30)
    got = sum_agreeing(deltas, sign, weights, lambda sums: divisor(sums, weights))
    assert got == pytest.approx(np.where(sign, -above, above), rel=1e-5) and got.dtype == np.float32


# ── keep the largest ─────────────────────────────────────────────────────────────────────────────────────────────────

@given(arrays(np.float32, 37, elements=st.sampled_from([0.5, -0.5, 1, -1, 2, 3, -4])), st.floats(0.01, 0.99))
def test_exactly_density_times_n_changes_stay_the_largest(delta, density):
    merged = apply("ties", np.zeros(37), [delta], density=density)
    kept = max(1, int(density * 37))
    order = np.argsort(-np.abs(delta), kind="stable")[:kept]
    assert set(np.flatnonzero(merged)) == set(order) and np.array_equal(merged[order], delta[order])


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_at_least_one_change_stays_and_none_at_density_0(method):
    assert apply(method, ZERO, [ONE], density=.1).tolist() == [4, 0, 0, 0]
    assert apply(method, ZERO, [ONE], density=0.0).tolist() == [0, 0, 0, 0]
    assert apply(method, np.zeros(()), [3.0], density=.5).tolist() == 3


def test_each_target_may_have_a_density_of_its_own():
    assert apply("ties", ZERO, [ONE, TWO], density=np.array([.25, 1])).tolist() == [2.5, 2, -3, .5]


def test_breadcrumbs_drop_the_very_largest_first():
    delta = np.arange(1, 11)
    assert np.flatnonzero(apply("breadcrumbs", np.zeros(10), [delta], density=.5, gamma=.2)).tolist() == [3, 4, 5, 6, 7]
    assert np.flatnonzero(apply("breadcrumbs", np.zeros(10), [delta], density=.9, gamma=.4)).tolist() == list(range(9))


@pytest.mark.parametrize(("size", "gamma"), [(64, .01), (64, 0.0), (1000, 0.0)])
def test_breadcrumbs_keep_what_they_should_where_gamma_drops_nothing(size, gamma):
    """Older mergekit took the empty slice [… : −0] and wiped the tensor."""
    delta = np.random.default_rng(0).normal(size=size)
    merged = apply("breadcrumbs", np.zeros(size), [delta], density=.5, gamma=gamma)
    assert np.count_nonzero(merged) == size // 2 and set(np.flatnonzero(merged)) == set(np.argsort(-np.abs(delta))[:size // 2])


def test_rescaling_gives_the_kept_changes_the_size_of_all():
    assert apply("ties", ZERO, [ONE], density=.5, rescale=True) == pytest.approx([4 * 10 / 7, -3 * 10 / 7, 0, 0])


@pytest.mark.parametrize("size", [1e-12, 1.0])
def test_small_changes_are_rescaled_as_large_ones_are(size):
    """mergekit leaves changes alone whose absolute values sum to less than 1e-7."""
    merged = apply("ties", ZERO, [np.array(ONE) * size], density=.5, rescale=True)
    assert merged == pytest.approx(np.array([40 / 7, -30 / 7, 0, 0]) * size, rel=1e-6, abs=0)


# ── drop at random ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
@pytest.mark.parametrize("density", [.1, .5, .8])
def test_the_share_that_stays_is_the_density(method, density):
    delta = np.abs(np.random.default_rng(1).normal(size=(200, 200))) + .1
    merged = apply(method, np.zeros((200, 200)), [delta], density=density, rescale=False, normalize=False)
    kept = merged != 0
    assert kept.mean() == pytest.approx(density, abs=5 * np.sqrt(density * (1 - density) / N))
    assert merged[kept] == pytest.approx(delta[kept], rel=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_the_expected_merge_is_the_whole_change(method):
    random = np.random.default_rng(2)
    delta, total = random.normal(size=(8, 32)), np.zeros((8, 32))
    for _ in range(400):
        total += apply(method, np.zeros((8, 32)), [delta], keys=[random.integers(1 << 63)], density=.6)
    if method == "dare_linear":
        assert total / 400 == pytest.approx(delta, abs=.35)
    assert np.abs(total / 400).sum() == pytest.approx(np.abs(delta).sum(), rel=.05)


def test_rescaled_drops_keep_the_size_of_the_change():
    delta = np.random.default_rng(3).normal(size=N)
    merged = apply("dare_linear", np.zeros(N), [delta], density=.3)
    assert np.abs(merged).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)
    kept = merged != 0
    assert merged[kept] / delta[kept] == pytest.approx(np.full(kept.sum(), 1 / .3), rel=.03)


def test_targets_drop_by_their_own_keys():
    ones, nought = np.ones((2, N)), np.zeros(N)
    def kept(keys):
        return [apply("dare_linear", nought, ones[j:j + 1], keys=[keys[j]], density=.5, rescale=False) > 0 for j in (0, 1)]
    one, other = kept([11, 12])
    assert np.mean(one & other) == pytest.approx(.25, abs=.02) and np.array_equal(one, kept([11, 13])[0])
    both = apply("dare_linear", nought, ones, keys=[11, 12], density=.5, rescale=False)
    assert np.array_equal(both, one.astype(int) + other)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_every_block_draws_anew(method):
    ones = np.tile(np.arange(1, 9), (BLOCK // 4, 1))
    kept = apply(method, np.zeros(ones.shape), [ones], density=.5, rescale=False).reshape(2, BLOCK) > 0
    assert np.mean(kept[0] & kept[1]) == pytest.approx(.25, abs=.03)


def test_della_drops_small_changes_more_often():
    rows = np.tile(np.arange(1, 101), (2000, 1)) * np.where(np.arange(100) % 2, 1, -1)
    merged = apply("della_linear", np.zeros(rows.shape), [rows], density=.5, epsilon=.3, rescale=False)
    chance = (merged != 0).mean(axis=0)
    assert chance == pytest.approx(.2 + np.arange(100) / 99 * .6, abs=.06) and chance.mean() == pytest.approx(.5, abs=.01)


@pytest.mark.parametrize("shape", [(N, 1), (N, 2)])
def test_della_of_narrow_rows(shape):
    """One column has one rank: its chance is the density, where mergekit divides 0 by 0."""
    rows = np.tile(np.arange(1, shape[1] + 1), (N, 1))
    kept = apply("della_linear", np.zeros(shape), [rows], density=.4, epsilon=.2, rescale=False)
    chance = (kept != 0).mean(axis=0)
    assert chance == pytest.approx([.4] if shape[1] == 1 else [.2, .6], abs=.02)


@pytest.mark.parametrize(("density", "epsilon", "low", "high"), [(.9, .15, .8, 1), (.1, .5, 0, .2), (.5, .5, 0, 1)])
def test_della_narrows_epsilon_to_what_is_a_chance(density, epsilon, low, high):
    """mergekit stops with an error unless density ± epsilon lies within 0 … 1."""
    rows = np.tile(np.arange(1, 12), (4000, 1))
    kept = apply("della_linear", np.zeros(rows.shape), [rows], density=density, epsilon=epsilon, rescale=False)
    chance = (kept != 0).mean(axis=0)
    assert chance[[0, -1]] == pytest.approx([low, high], abs=.04) and chance.mean() == pytest.approx(density, abs=.02)


def test_ranks_are_by_magnitude_equal_ones_in_order():
    rows = np.array([[3, -1, 2, 0], [1, 1, -1, 1]], np.float32)
    assert ranks(rows).tolist() == [[3, 1, 2, 0], [0, 1, 2, 3]]


def test_della_asked_twice_says_the_same():
    deltas = np.random.default_rng(4).normal(size=(2, 30, 11)).astype(np.float32)
    tensor, sparsify = Arrays(np.zeros((30, 11)), deltas, keys=(5, 6)), DropByRank(.5, .2)
    sparsify.learn(tensor)
    first = [drop(block, sparsify, tensor.keys).copy() for block in steady(tensor, 11)]
    for j, its in enumerate(deltas.reshape(2, -1)):
        sparsify.note(j, 0, sparsify.keep(j, 0, its, tensor.keys))
    assert np.array_equal(first, [drop(block, sparsify, tensor.keys) for block in steady(tensor, 11)]) and not sparsify.noted


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_where_all_is_dropped_the_pivot_stays(method):
    pivot = np.array([[1, 2]], np.float32)
    assert np.array_equal(apply(method, pivot, [pivot + 1], density=0.0), pivot)


@pytest.mark.parametrize(("method", "like"), [("dare_linear", "task_arithmetic"), ("della_linear", "task_arithmetic"),
                                              ("breadcrumbs", "task_arithmetic")])
def test_density_1_drops_nothing(method, like):
    assert np.array_equal(apply(method, ZERO, [ONE, TWO], density=1.0), apply(like, ZERO, [ONE, TWO]))
