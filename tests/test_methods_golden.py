"""Parity with mergekit: tests/golden/mergekit.json holds inputs and what mergekit 0.1.5 makes of them (make_mergekit.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fusion.methods import METHODS, apply

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mergekit.json").read_text())
ROUNDING = 2e-6  # of the largest number: sums and angles in float32 against float64
RIGHT = {  # what mergekit gets wrong, and the right numbers worked out by hand; None: see the test of its own
    "sce of small changes": None,
    "sce of conflicting signs": None,
    "sce that selects less than one number": [0, 0.2 * 2 + 0.8 * 4, 0],  # one number differs, so it is selected
    "breadcrumbs that keep less than one number": [0, 0, 3],  # the largest stays
    "della of one column": None,
    "nuslerp of nearly opposite vectors": [-0.5, -1, -1.01],  # the straight line, not 400 times as far
    "karcher of opposite vectors": [-0.5, -1, -1],  # no mean direction: the plain average
    "multislerp of vectors that cancel": [0, 0],  # the same
    "model stock of opposed changes": [0, 0, 0, 0],  # nothing in common: the pivot
    "model stock of small changes": [2 * 0.8 / 1.8 * 1.5e-4] * 2 + [0, 0],  # cosine 0.8, t = 1.6/1.8
    "nearswap nearer than 1e-6": [5e-8, 1e-7],
    "linear of weights that sum to 0": [1, 3, 3],  # equal weights
    "task arithmetic of weights that sum to less than 1e-8": [1, 0.25 * 2 + 0.75 * 4, 3],
}


def ours(case: dict) -> np.ndarray:
    """What our method makes of a golden case, flat."""
    its = GOLDEN["inputs"][case["input"]]
    options = {METHODS[case["method"]].option(name).argument: np.array(value) if isinstance(value, list) else value
               for name, value in case["options"].items()}
    return apply(case["method"], np.array(its["pivot"]), np.array(its["models"][:case["count"]]), case["weights"],
                 **options).reshape(-1)


def label(case: dict) -> str:
    return " ".join([case["method"], case["input"], str(case["count"]), *(f"{k}={v}" for k, v in case["options"].items())])


@pytest.mark.parametrize("case", GOLDEN["parity"], ids=label)
def test_results_equal_mergekits_to_rounding(case):
    merged = np.array(case["merged"])
    room = ROUNDING * max(np.abs(merged).max(), np.abs(GOLDEN["inputs"][case["input"]]["models"]).max())
    assert np.abs(ours(case) - merged).max() <= room


def test_parity_covers_every_method_that_mergekit_has():
    assert GOLDEN["mergekit"] == "0.1.5"
    assert {case["method"] for case in GOLDEN["parity"]} == set(METHODS) - {"varm"}


@pytest.mark.parametrize("name", [name for name, right in RIGHT.items() if right is not None])
def test_where_mergekit_is_wrong_the_right_numbers_are_given(name):
    case = GOLDEN["wrong"][name]
    assert ours(case) == pytest.approx(RIGHT[name], rel=1e-6, abs=1e-12)
    assert "error" in case or case["merged"] == "not finite" or case["merged"] != pytest.approx(RIGHT[name], rel=1e-3, abs=1e-12)


def test_every_wrong_case_is_named():
    assert set(RIGHT) == set(GOLDEN["wrong"])


def changes(case: dict) -> tuple[np.ndarray, np.ndarray]:
    its = GOLDEN["inputs"][case["input"]]
    pivot, models = np.array(its["pivot"], np.float32), np.array(its["models"][:case["count"]], np.float32)
    return pivot.reshape(-1), (models - pivot).reshape(len(models), -1).astype(float)


@pytest.mark.parametrize("name", ["sce of small changes", "sce of conflicting signs"])
def test_sce_weighs_by_variation_however_small_the_changes_are(name):
    case = GOLDEN["wrong"][name]
    pivot, delta = changes(case)
    eta = np.square(delta).sum(axis=1) / np.square(delta).sum()
    agree = np.sign(delta) == np.where(delta.sum(axis=0) >= 0, 1, -1)
    right = pivot + (eta[:, None] * delta * agree).sum(axis=0)
    room = 1e-6 * np.abs(pivot).max()
    assert np.abs(ours(case) - right).max() <= room < np.abs(np.array(case["merged"]) - right).max()


def test_della_gives_one_column_the_chance_density():
    case = GOLDEN["wrong"]["della of one column"]
    assert "p_in" in case["error"]
    pivot, models = np.zeros((20_000, 1)), np.ones((1, 20_000, 1))
    kept = apply("della_linear", pivot, models, density=0.3, rescale=False).mean()
    assert kept == pytest.approx(0.3, abs=0.02)
