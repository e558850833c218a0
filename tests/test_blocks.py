"""fusion.blocks: stored bytes in, stored bytes out, and the digests of what was read; as slow arithmetic would have it."""

from __future__ import annotations

import numpy as np
import pytest

from fusion import compiled, dtypes, maps
from fusion.blocks import Blocks, Stored, expect, new_digests
from fusion.checkpoint import Checkpoint
from fusion.compiled.twins import BLOCK, STRETCH
from fusion.digest import digest_checkpoint, digest_tensor
from fusion.errors import CheckpointError
from fusion.merge import merge
from fusion.methods.weighted import weighted
from fusion.progress import finish
from fusion.recipe import Recipe
from tests.conftest import load_tensors, save_checkpoint

NAME, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
WIDE = BLOCK // 4 + 3  # columns of five rows: more than a block, and no multiple of one
DTYPES = ("bfloat16", "float16", "float32", "float64")


@pytest.fixture(params=["twins", "kernels"])
def loops(request, monkeypatch):
    """Both kinds of loops, one after the other."""
    monkeypatch.setattr(compiled, "_library", request.getfixturevalue("library") if request.param == "kernels" else None)
    monkeypatch.setattr(compiled, "_refused", False)
    return compiled.loops()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Four models, each stored in another dtype."""
    random, folder = np.random.default_rng(2), tmp_path_factory.mktemp("blocks")
    return [Checkpoint(save_checkpoint(folder / dtype, {NAME: random.normal(size=(5, WIDE)).astype(np.float32),
                                                        NORM: random.normal(size=7).astype(np.float32)}, dtype))
            for dtype in DTYPES]


def test_blocks_hold_every_number_of_every_model_once(loops, models, monkeypatch):
    monkeypatch.setattr(models[1], "plain", lambda name: False)
    blocks, got = Blocks(NAME, models), [[] for _ in models]
    assert [dtypes.FLOATS[code] for code in blocks.codes] == ["BF16", "F32", "F32", "F64"]
    for start, n in blocks:
        assert start == sum(map(len, got[0]))
        for numbers, its in zip(blocks.numbers(n), got, strict=True):
            its.append(numbers)
        assert all(blocks.all_finite(m, n) for m in range(4))
    for model, its in zip(models, got, strict=True):
        assert np.array_equal(np.concatenate(its), model[NAME].reshape(-1))


@pytest.mark.parametrize("name", [NAME, NORM])
def test_digests_see_what_is_read(loops, models, monkeypatch, name):
    monkeypatch.setattr(models[1], "plain", lambda name: False)
    digests = new_digests(name, models)
    for _ in Blocks(name, models, [digests[0], None, *digests[2:]]):
        pass
    for m in (0, 2, 3):
        assert digests[m].value() == digest_tensor(models[m], name)
    with pytest.raises(RuntimeError):
        digests[1].value()


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("weights", [(.25, .25, .5, 0), (0, 0, 0, 1), (.4, .3, .2, .1)])
def test_weighing_stored_numbers_is_the_methods_arithmetic(loops, models, code, weights):
    blocks, out, weights = Blocks(NAME, models), Stored(code, 8), np.array(weights, float)
    expected = weighted([model[NAME].reshape(-1) for model in models], weights, np.empty(5 * WIDE, np.float32))
    stored = np.concatenate([out.weigh(blocks, n, weights).copy() for _, n in blocks])
    assert out.finite and stored.tobytes() == dtypes.encode(expected, code).tobytes()
    assert out.encode(expected).tobytes() == stored.tobytes() and out.finite


def test_what_is_not_finite_is_seen_even_in_a_model_without_weight(loops, tmp_path):
    sick = np.ones(5, np.float32)
    sick[3] = np.nan
    models = [Checkpoint(save_checkpoint(tmp_path / name, {NORM: values})) for name, values in (("a", np.ones(5)), ("b", sick))]
    blocks, out = Blocks(NORM, models), Stored("F32", 5)
    for _, n in blocks:
        for weights in ((1.0, 0.0), (.5, .5), (0.0, 1.0)):
            out.weigh(blocks, n, np.array(weights))
            assert not out.finite
    out.encode(np.array([1, 3.4e38], np.float32))
    assert out.finite
    small = Stored("F16", 2)
    small.encode(np.array([1, 1e6], np.float32))
    assert not small.finite
    recipe = Recipe(str(models[0].folder), (str(models[0].folder), str(models[1].folder)), weights=(1, 0), method="linear")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        finish(merge(recipe, tmp_path / "out"))


@pytest.mark.parametrize(("method", "options"), [("varm", {}), ("linear", {}), ("sce", {}), ("sce", {"compat": "authors"}),
                                                 ("ties", {"density": .4}), ("dare_ties", {"density": .4})])
def test_long_tensors_with_odd_numbers_are_the_same_by_both_loops(library, tmp_path, monkeypatch, method, options):
    """More than one stretch and no whole block at the end, and a block in the middle that only the slow way can do."""
    random, folders = np.random.default_rng(4), []
    for name in "abc":
        values = random.normal(size=STRETCH + BLOCK + 3).astype(np.float32)
        values[2 * BLOCK + 5] = np.inf if name == "b" else 1
        folders.append(str(save_checkpoint(tmp_path / name, {NAME: values, NORM: values[:7]}, "bfloat16")))
    recipe, results = Recipe(folders[0], tuple(folders[1:]), method=method, options=options, allow_nonfinite=True), []
    filled, fill = [], Blocks.fill
    monkeypatch.setattr(Blocks, "fill", lambda blocks, start: filled.append(start) or fill(blocks, start))
    for used in (None, library):
        filled.clear()
        monkeypatch.setattr(compiled, "_library", used)
        results.append(finish(merge(recipe, tmp_path / str(used is None))).recipe)
    assert set(filled) <= {2 * BLOCK}  # all others were handled many at once
    assert results[0].result == results[1].result and results[0].revisions == results[1].revisions
    with pytest.raises(CheckpointError, match="holds 1 values"):
        finish(merge(recipe.with_(allow_nonfinite=False), tmp_path / "out"))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("loop", [0, 1])
def test_a_file_that_becomes_shorter_is_an_error(loops, tmp_path, monkeypatch, loop, mapped):
    monkeypatch.setattr(maps, "GUARDED", maps.GUARDED and mapped)
    folder = save_checkpoint(tmp_path / "model", {NAME: np.ones(STRETCH, np.float32)})
    model = Checkpoint(folder)
    blocks = Blocks(NAME, [model, model])
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(BLOCK * 6)
    table = np.zeros((2, 2, 3))
    with pytest.raises(CheckpointError, match="became shorter"):
        done = blocks.stretch("sum_changes", 0, *table) if loop else 0
        assert done == (BLOCK if done else 0)
        blocks.fill(done or BLOCK)


@pytest.mark.parametrize("method", ["varm", "linear", "ties", "slerp"])
@pytest.mark.parametrize("dtype", ["", "float32"])
def test_a_merge_is_the_same_by_both_loops_and_records_digests_of_its_inputs(library, tmp_path, models, monkeypatch, method, dtype):
    targets = [str(model.folder) for model in models[1:3 if method == "slerp" else 4]]
    recipe, results = Recipe(str(models[0].folder), tuple(targets), method=method, dtype=dtype), []
    for used in (None, library):
        monkeypatch.setattr(compiled, "_library", used)
        results.append(finish(merge(recipe, tmp_path / str(used is None))))
    one, other = ({name: value.view(-1).numpy().tobytes() if value.dtype.itemsize != 2 else value.float().numpy().tobytes()
                   for name, value in load_tensors(result.folder).items()} for result in results)
    assert one == other
    assert results[0].recipe.result == results[1].recipe.result
    assert results[1].recipe.result["digest"] == finish(digest_checkpoint(Checkpoint(results[1].folder)))
    for label, folder in zip(results[1].recipe.revisions, (str(models[0].folder), *targets), strict=True):
        assert results[1].recipe.revisions[label] == finish(digest_checkpoint(Checkpoint(folder)))


def test_a_tensor_that_is_expected_is_in_memory_soon_and_a_computed_one_is_no_error(models, monkeypatch):
    asked = []
    monkeypatch.setattr("os.posix_fadvise", lambda *span: asked.append(span[1:3]), raising=False)
    monkeypatch.setattr(models[1], "plain", lambda name: False)
    expect(NAME, models)
    assert asked == [(models[m].span(NAME)[1], models[m].info[NAME].nbytes) for m in (0, 2, 3)]
