"""tests/benchmarks: the merge benchmark runs, on a size that says nothing about speed, and notices wrong results."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest

from fusion.checkpoint import Checkpoint
from fusion.merge import merge
from fusion.progress import finish
from fusion.recipe import Recipe
from tests.benchmarks import merge as benchmark
from tests.benchmarks.checking import check, exactly
from tests.benchmarks.checkpoints import SIZES, make_set
from tests.benchmarks.measuring import Failed, drop_cache, run


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("bench")
    make_set(work, "tiny")
    return work


def test_the_benchmark_runs_and_prints_its_tables(work, capsys):
    benchmark.main(["--work", str(work), "--size", "tiny", "--runs", "1", "--methods", "varm,ties", "--cold"])
    said = capsys.readouterr().out
    for words in ("| varm | 1 |", "numbers as in float64 |", "| floor: read", "the merge part of varm against the floor | ≤ 2 ×",
                  "the variation report against the merge | ≥ 1.5 ×",
                  "| `preflight` imports no torch, transformers, numba | none | none | yes |",
                  "cold merging --no-flush against reading in order", "| varm --no-flush | 1 |"):
        assert words in said
    assert {path.name for path in (work / "tiny").iterdir()} == {"pivot", "target-a", "target-b", "target-c"}


def test_a_wrong_result_is_noticed(work):
    folders = [work / "tiny" / name for name in ("pivot", "target-a", "target-b")]
    out = finish(merge(Recipe(str(folders[0]), tuple(map(str, folders[1:])), method="linear"), work / "linear")).folder
    assert check(folders, "linear", out).endswith("numbers as in float64")
    for other in ("varm", "sce", "ties"):
        with pytest.raises(Failed, match="differ from float64"):
            check(folders, other, out)
    shutil.rmtree(out)


def test_the_formulas_are_those_of_the_methods():
    pivot, models = np.array([0.0, 1, 0, 0]), np.array([[3.0, 1, 0, -1], [1, 1, 0, 4]])
    assert exactly("linear", pivot, models).tolist() == [2, 1, 0, 1.5]
    assert exactly("varm", pivot, models) == pytest.approx([(30 + 17) / 27, 1, 0, (-10 + 68) / 27])
    assert exactly("sce", pivot, models) == pytest.approx([(30 + 17) / 27, 1, 0, 68 / 27])
    assert exactly("ties", pivot, models).tolist() == [2, 1, 0, 4]


@pytest.mark.parametrize(("size", "numbers"), [("100m", 97e6), ("1.1b", 1.1e9), ("7b", 6.74e9)])
def test_the_shapes_have_the_sizes_that_their_names_say(size, numbers):
    assert sum(int(np.prod(shape)) for _, shape in SIZES[size].tensors()) == pytest.approx(numbers, rel=0.02)


def test_targets_differ_from_the_pivot_and_from_each_other(work):
    models = [Checkpoint(folder)["model.norm.weight"] for folder in make_set(work, "tiny")]
    assert len({model.tobytes() for model in models}) == 4


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(Failed, match="nobody"):
        run(["python", "-c", "raise SystemExit('nobody')"])


def test_memory_of_a_command_is_seen(work):

    used = run([sys.executable, "-c", "x = bytearray(300_000_000)\nimport time; time.sleep(.3)"])
    assert 300e6 < used.anonymous < 340e6 and used.seconds > 0.3
    assert 0 <= drop_cache([work / "tiny" / "pivot"]) <= 1
