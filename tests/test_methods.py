"""The table of merge methods, and what must hold for every method on any numbers."""

from __future__ import annotations

import json
from typing import Annotated

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusion.__main__ import main
from fusion.methods import BLOCK, METHODS, Arrays, apply
from fusion.methods.method import About, read_options
from fusion.methods.stack import row_length, steady

NAMES = ["varm", "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties",
         "della_linear", "della", "breadcrumbs", "breadcrumbs_ties", "sce", "model_stock", "nearswap", "arcee_fusion",
         "passthrough"]
VALUES = st.floats(-1e3, 1e3, width=32)
SHAPES = [(), (0,), (1,), (7,), (5, 1), (1, 5), (4, 6), (0, 3), (2, 3, 4)]
VARIANTS = [(name, {}) for name in NAMES] + [
    *((name, {"density": 0.5}) for name in NAMES if METHODS[name].option("density")),
    ("ties", {"density": 0.3, "rescale": True, "normalize": False, "lambda_": 0.5}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.2}),
    ("nuslerp", {"flatten": False}), ("nuslerp", {"flatten": False, "row_wise": True}), ("nuslerp", {"space": "deltas"}),
    ("nuslerp", {"flatten": False, "space": "deltas"}), ("multislerp", {"space": "deltas"}), ("sce", {"select_topk": 0.4}),
    ("sce", {"select_topk": 0.4, "compat": "mergekit"}), ("sce", {"select_topk": 0.4, "compat": "authors"}),
    ("model_stock", {"filter_wise": True}), ("della", {"density": 0.9, "epsilon": 0.5})]
each_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda its: str(its))


def counted(name: str, most: int = 3) -> int:
    """A number of targets that the method takes."""
    return min(METHODS[name].max_targets or most, most)


def sample(shape, count: int, spread: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A pivot of this shape and `count` targets around it."""
    random = np.random.default_rng(seed)
    pivot = random.normal(size=shape).astype(np.float32)
    return pivot, (pivot + random.normal(size=(count, *shape)) * spread).astype(np.float32)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_table_describes_every_method():
    assert list(METHODS) == NAMES
    for name, method in METHODS.items():
        assert name == method.name and method.title and method.formula and method.summary and method.source
        assert method.run.__doc__ and method.weights in ("shares", "factors", "") and method.min_targets >= 1
    assert [name for name, method in METHODS.items() if method.measured] == ["varm"]
    assert {name for name, method in METHODS.items() if method.random} == {"dare_linear", "dare_ties", "della_linear", "della"}
    assert json.loads(json.dumps({name: method.to_dict() for name, method in METHODS.items()}))["ties"]["options"][0] == {
        "name": "density", "kind": "number", "default": 1.0, "low": 0, "high": 1, "choices": [], "per_target": True,
        "text": "Share of a target's changes that is kept."}


def test_task_vector_methods_name_their_stages_in_order():
    assert METHODS["ties"].stages == ("keep the largest", "rescale", "weigh", "elect sign", "normalise", "scale by λ")
    assert all(bool(method.stages) == (name == "sce" or "lambda" in [its.name for its in method.options])
               for name, method in METHODS.items())


def test_every_option_takes_its_default_and_refuses_what_is_out_of_range():
    for method in METHODS.values():
        for option in method.options:
            assert option.text.endswith(".") and not option.problem(option.default)
            for bad in (option.low is not None and option.low - 1, option.high is not None and option.high + 1):
                assert bad is False or f"must be {option.range}, not {bad!r}" == option.problem(bad)
    assert METHODS["sce"].option("compat").problem("papr") == "must be one of paper, mergekit, authors, not 'papr'"
    density, normalize = METHODS["ties"].option("density"), METHODS["ties"].option("normalize")
    assert all(density.problem(bad) for bad in (True, "0.5", float("nan"), None, [0.5])) and normalize.problem(1)
    assert METHODS["karcher"].option("max_iter").problem(2.5) and not METHODS["karcher"].option("max_iter").problem(2.0)
    assert METHODS["ties"].option("lambda").argument == "lambda_" and METHODS["ties"].option("nope") is None


def test_options_are_read_from_the_signature():
    def run(tensor, weights, *, lambda_: Annotated[int, About("How many.", low=1)], plain: Annotated[bool, About("If.")] = True):
        """A method."""
    first, second = read_options(run)
    assert (first.name, first.kind, first.default, first.low) == ("lambda", "integer", None, 1)
    assert first.range == "a whole number, at least 1"
    assert (second.name, second.kind, second.default, second.range) == ("plain", "flag", True, "true or false")


@each_variant
def test_a_method_says_whether_it_reads_the_pivot(name, options):
    pivot, models = sample((4, 6), counted(name))
    moved = pivot + np.random.default_rng(1).normal(size=pivot.shape)
    differs = not np.array_equal(apply(name, pivot, models, **options), apply(name, moved, models, **options))
    assert METHODS[name].reads_pivot(options, len(models)) == differs


def test_slerp_reads_the_pivot_only_when_it_starts_there():
    assert METHODS["slerp"].reads_pivot({}, 1) and not METHODS["slerp"].reads_pivot({}, 2)


def test_an_unknown_method_or_option_is_refused():
    with pytest.raises(KeyError):
        apply("tise", np.zeros(1), [[1]])
    with pytest.raises(TypeError, match="denity"):
        apply("ties", np.zeros(1), [[1]], denity=0.5)


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("block", [1, 5, 1000, BLOCK + 3, 1 << 20])
@pytest.mark.parametrize("columns", [1, 7, 48_000, 70_000])
def test_a_steady_pass_is_cut_at_the_same_places_whatever_the_stack_does(block, columns):
    rows = 140_000 // columns + 1 if block > 5 else 3
    flat = np.arange(rows * columns, dtype=np.float32)
    tensor = Arrays(flat.reshape(rows, columns), np.stack([flat, -flat]).reshape(2, rows, columns), block=block)
    size, end = max(columns, BLOCK // columns * columns), 0
    for its in steady(tensor, columns):
        n = min(size, flat.size - end)
        assert its.start == end and its.models.shape == (2, n) and its.pivot.shape == (n,)
        assert np.array_equal(its.pivot, flat[end:end + n]) and np.array_equal(its.models[1], -its.pivot)
        its.pivot[:] = its.models[:] = np.nan  # whoever asked for the block may overwrite it
        end += n
    assert end == flat.size


def test_a_row_is_the_last_axis_or_the_whole():
    assert [row_length(Arrays(np.zeros(shape), np.zeros((1, *shape)))) for shape in SHAPES] == [1, 1, 1, 7, 1, 5, 6, 3, 4]


@each_variant
def test_the_size_of_the_blocks_changes_no_byte(name, options):
    pivot, models = sample((37, 53), counted(name))
    weights = np.full(len(models), 1 / len(models))
    results = {b"".join(its.tobytes() for its in METHODS[name].run(Arrays(pivot, models, block=block), weights, **options))
               for block in (1, 53, 100, BLOCK)}
    assert len(results) == 1


@pytest.mark.parametrize("name", ["ties", "dare_ties", "sce", "karcher", "linear"])
def test_a_tensor_of_several_blocks_is_merged_as_its_parts_agree(name):
    pivot, models = sample((3, 50_000), 2)
    options = {"density": 0.5} if METHODS[name].option("density") else {"select_topk": 0.5} if name == "sce" else {}
    results = {b"".join(its.tobytes() for its in METHODS[name].run(Arrays(pivot, models, block=block), np.ones(2) / 2, **options))
               for block in (10_007, BLOCK, 1 << 18)}
    assert len(results) == 1


# ── contracts ────────────────────────────────────────────────────────────────────────────────────────────────────────

@each_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_gives_finite_float32_of_that_shape(name, options, shape):
    pivot, models = sample(shape, counted(name))
    before = pivot.copy(), models.copy()
    merged = apply(name, pivot, models, **options)
    assert merged.shape == shape and merged.dtype == np.float32 and np.isfinite(merged).all()
    assert np.array_equal(pivot, before[0]) and np.array_equal(models, before[1])


@st.composite
def cases(draw):
    name, options = draw(st.sampled_from(VARIANTS))
    shape = draw(st.sampled_from(SHAPES))
    return name, options, draw(arrays(np.float32, shape, elements=VALUES)), \
        draw(arrays(np.float32, (counted(name), *shape), elements=VALUES))


@given(cases())
def test_finite_numbers_give_finite_results(case):
    name, options, pivot, models = case
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(apply(name, pivot, models, **options)).all()


@each_variant
def test_targets_equal_to_the_pivot_give_the_pivot(name, options):
    pivot, _ = sample((4, 6), 1)
    merged = apply(name, pivot, np.repeat(pivot[None], counted(name), axis=0), **options)
    assert np.array_equal(merged, pivot) or name in ("slerp", "nuslerp", "multislerp", "karcher")
    assert merged == pytest.approx(pivot, rel=1e-6)


RANDOM_OR_PARTIAL = {"nearswap", "arcee_fusion", "slerp", "model_stock"}  # these do not go all the way to the target


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM_OR_PARTIAL])
def test_equal_targets_give_that_target(name):
    pivot, models = sample((4, 6), 1)
    count = counted(name)
    weights = np.full(count, 1 / count)
    merged = apply(name, pivot, np.repeat(models, count, axis=0), weights)
    assert merged == pytest.approx(models[0], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM_OR_PARTIAL and METHODS[name].min_targets == 1])
def test_one_target_gives_that_target(name):
    pivot, models = sample((4, 6), 1)
    exact = name in ("varm", "linear", "passthrough", "multislerp", "karcher")
    merged = apply(name, pivot, models)
    assert np.array_equal(merged, models[0]) if exact else merged == pytest.approx(models[0], rel=1e-6, abs=1e-6)


@each_variant
def test_the_order_of_the_targets_does_not_matter(name, options):
    count = counted(name)
    pivot, models = sample((6, 8), count, spread=1)
    weights, order = np.arange(1, count + 1) / 10, np.roll(np.arange(count), 1)
    keys = tuple(range(11, 11 + count))
    one = apply(name, pivot, models, weights, keys, **options)
    other = apply(name, pivot, models[order], weights[order], [keys[j] for j in order], **options)
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


@each_variant
def test_the_same_call_gives_the_same_bytes(name, options):
    pivot, models = sample((6, 8), counted(name))
    assert apply(name, pivot, models, **options).tobytes() == apply(name, pivot, models, **options).tobytes()


@each_variant
def test_scaling_all_models_scales_the_result(name, options):
    pivot, models = sample((6, 8), counted(name))
    if name == "nearswap":
        options = {"t": 0.05}
    if name == "arcee_fusion" or options.get("compat") == "mergekit":
        return  # a softmax and a threshold of 1e-6 see the size of numbers
    scaled = apply(name, pivot * 2, models * 2, **({"t": 0.1} if name == "nearswap" else options))
    assert scaled == pytest.approx(apply(name, pivot, models, **options) * 2, rel=1e-6)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_command_prints_every_method_with_steps_options_ranges_and_defaults(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for method in METHODS.values():
        assert f"{method.name}: {method.title}, " in text and method.formula in text and method.source in text
    assert "ties: TIES, 1 or more targets" in text and "slerp: SLERP, 1 or 2 targets" in text
    assert "  steps: keep the largest → rescale → weigh → elect sign → normalise → scale by λ\n" in text
    assert ("  density = 1.0: Share of a target's changes that is kept. (a number from 0 to 1, one for all or one per target)\n"
            in text)
    assert "  weights: measured by variation, unless given\n" in text and "  normalize = true: " in text


def test_the_command_gives_the_same_as_data(capsys):
    assert main(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps({name: its.to_dict() for name, its in METHODS.items()}))
