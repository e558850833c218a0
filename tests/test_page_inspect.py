"""What the page says beyond the ratio: five more quantities, estimates with error bars, what a merge did, what differs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from components import inspecting, variation
from components.closer import closer_look, red_flags
from components.heatmap import payload
from components.inspecting import Looks
from components.state import Selection, Settings
from components.studio import Studio
from fusion import finish
from fusion.inspection import Inspection
from tests.conftest import save_family

TITLES = ("Maths", "Code")


def inspection(gram, *, moved=10, conflict=0, lost=(0.0, 0.0), mean_lost=0.0, pivot_square=100.0, sigma=None,
               names=("model.embed_tokens.weight",), dtype="bfloat16"):
    """An inspection of equal tensors of two targets, from sums written down by hand."""
    count = len(names)

    def all_of(value):
        return np.array([value] * count, float)

    return Inspection(tuple(names), ((5, 2),) * count, TITLES, dtype, all_of(gram), all_of(pivot_square), all_of((10, 10)),
                      all_of(moved), all_of(conflict), all_of(lost), all_of((0, 0)), all_of(mean_lost), all_of(0), all_of(10),
                      None if sigma is None else all_of(sigma))


# ------------------------------------------------------------------------------------------------ numbers

def test_cards_stand_for_targets_pairs_or_all():
    look = closer_look(inspection([[4, 2], [2, 16]], conflict=3, sigma=(1.0, 4.0)), TITLES, "matrix")
    assert {name: [card.letters for card in cards] for name, cards in look.cards.items()} == {
        "relative": ["A", "B"], "stable_rank": ["A", "B"], "lost": ["A", "B", "AB"], "cosine": ["AB"], "conflict": ["AB"]}
    assert [look.column("relative", j)[0] for j in (0, 1)] == pytest.approx([0.2, 0.4])  # √(4 ÷ 100), √(16 ÷ 100)
    assert [look.column("stable_rank", j)[0] for j in (0, 1)] == pytest.approx([4, 1])  # 4 ÷ 1², 16 ÷ 4²
    assert look.column("cosine")[0] == pytest.approx(2 / (2 * 4)) and look.column("conflict")[0] == pytest.approx(0.3)


def test_one_target_has_no_pairs_and_no_ranks_unless_measured():
    whole = inspection([[4, 2], [2, 16]])
    one = replace(whole, targets=("Maths",), gram=whole.gram[:, :1, :1], changed=whole.changed[:, :1], lost=whole.lost[:, :1],
                  back=whole.back[:, :1])
    assert set(closer_look(one, TITLES[:1], "layer").cards) == {"relative", "lost"}
    assert red_flags(one, TITLES[:1]) == []


def test_payload_of_a_closer_look_is_plain_json():
    from tests.test_heatmap import grid

    tensors = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    look = closer_look(inspection([[4, 0], [0, 0]], names=tensors, sigma=(1.0, 0.0)), TITLES, "matrix")
    value = payload(replace(grid(tensors), closer=look))
    assert json.loads(json.dumps(value, allow_nan=False))["blocks"][1]["closer"]["cosine"] == [[None]]  # B did not move
    first = {"name": "Maths", "letters": "A", "colors": ["#4477AA"], "target": 0, "mean": 0.2}
    assert value["closer"]["cards"]["relative"][0] == first


# ------------------------------------------------------------------------------------------------ red flags

@pytest.mark.parametrize(("sums", "said"), [
    ({"gram": [[4, 2], [2, 4]], "conflict": 4}, "disagree in sign on 40% of the embedding"),
    ({"gram": [[4, 2], [2, 4]], "lost": (0.0, 0.0625)}, "Rounding to bfloat16 loses 12% of B's change"),  # √(0.0625 ÷ 4)
    ({"gram": [[4, 2], [2, 4]], "mean_lost": 0.75}, "loses 50% of the change of their plain average"),  # Δ̄² = 12 ÷ 4
    ({"gram": [[4, -2], [-2, 4]]}, "A and B pull against each other: the cosine of their changes is -0.50"),
    ({"gram": [[4, 2], [2, 64]]}, "B (Code) lies 80% of the pivot's norm away"),
])
def test_a_flag_says_the_number(sums, said):
    flags = red_flags(inspection(**sums), TITLES)
    assert len(flags) == 1 and said in flags[0]


def test_at_most_three_flags_and_none_for_a_calm_family():
    assert red_flags(inspection([[4, 2], [2, 4]], conflict=2), TITLES) == []
    loud = inspection([[81, -40], [-40, 81]], conflict=9, lost=(10.0, 20.0))
    assert len(red_flags(loud, TITLES)) == 3


def test_a_target_that_is_the_pivot_is_named():
    still = inspection([[4, 0], [0, 0]])
    still.changed[:, 1] = 0
    assert red_flags(still, TITLES)[0] == "B (Code) is the pivot: no number of it differs."


# ------------------------------------------------------------------------------------------------ looks

@pytest.fixture
def picked(tmp_path):
    names = [folder.name for folder in save_family(tmp_path / "models")]
    studio = Studio(tmp_path / "models", tmp_path / "outputs", family=tmp_path / "none")
    return studio, Selection(f"models/{names[0]}", tuple(f"models/{name}" for name in names[1:]))


def test_a_look_is_taken_once_and_again_when_a_file_changed(picked):
    studio, now = picked
    looks = Looks(studio)
    assert looks.inspected(now, Settings()) is None
    first = finish(looks.inspect(now, Settings()))
    assert finish(looks.inspect(now, Settings())) is first is looks.inspected(now, Settings())
    assert looks.inspected(now, Settings(dtype="float16")) is None  # rounding is judged for another dtype
    weights = next(studio.entry(now.targets[0]).folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert looks.inspected(now, Settings()) is None


def test_a_small_family_is_shown_exactly_with_its_closer_look(picked):
    studio, now = picked
    *_, last = variation._look(studio, Looks(studio), now, Settings())
    assert last[3]["preview"] is None and set(last[3]["closer"]["cards"]) >= {"relative", "cosine", "conflict"}
    assert "fs-flags" in last[2].value


def test_a_large_family_is_estimated_first_and_not_edited(picked, monkeypatch):
    studio, now = picked
    monkeypatch.setattr(studio, "measures_at_once", lambda selection: False)
    monkeypatch.setattr(inspecting, "AT_ONCE_BYTES", 0)
    looks = Looks(studio)
    *_, last = variation._look(studio, looks, now, Settings())
    assert last[3]["preview"]["sampled"] <= 1 and last[3]["blocks"][0]["values"][0]["error"] is not None
    assert studio.measured(now) is None and last[4].visible
    finish(looks.measure(now))
    *_, last = variation._look(studio, looks, now, Settings())
    assert last[3]["preview"] is None and last[3]["closer"] is None and last[5].visible  # Look closer is offered


def test_a_method_without_weights_says_so(picked):
    studio, now = picked
    finish(studio.measure(now))
    grid = variation.grid_of(studio, now, Settings(method="model_stock"))
    assert "has no weights" in payload(grid)["weightless"]
    assert payload(variation.grid_of(studio, now, Settings()))["weightless"] == ""


def test_exports_hold_what_a_closer_look_found_and_nothing_that_is_not_json(picked, tmp_path):
    studio, now = picked
    finish(studio.measure(now))
    looks = Looks(studio)
    finish(looks.inspect(now, Settings()))
    grid = variation.grid_of(studio, now, Settings(method="model_stock"), looks)
    table, data, page = (Path(path).read_text(encoding="utf-8") for path in variation._files(grid, "", str(tmp_path)))
    rows = json.loads(data, parse_constant=lambda word: pytest.fail(word))["tensors"]
    assert rows[0]["weight"] is None and 0 <= rows[0]["sign conflict"] <= 1 and rows[0]["relative change"] > 0
    assert next(csv.reader(io.StringIO(table)))[-1] == "cosine A·B" and '"relative"' in page
