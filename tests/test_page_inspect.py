"""What the page says beyond the ratio: five more quantities, estimates with error bars, what a merge did, what differs."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

from components import comparing, inspecting, reports, variation
from components import studio as studio_module
from components.closer import closer_look, red_flags
from components.downloads import as_files
from components.heatmap import payload
from components.inspecting import Looks
from components.page import build
from components.state import Selection, Settings
from components.studio import Studio
from components.theme import HEAD, css, theme
from fusion import FusionError, RecipeError, finish, merge
from fusion.compare import compare
from fusion.inspection import Inspection
from fusion.review import Answer, answered
from tests.browser import open_tab, two_targets
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
    table, data, page = (Path(path).read_text(encoding="utf-8") for path in as_files(grid, "", str(tmp_path)))
    rows = json.loads(data, parse_constant=lambda word: pytest.fail(word))["tensors"]
    assert rows[0]["weight"] is None and 0 <= rows[0]["sign conflict"] <= 1 and rows[0]["relative change"] > 0
    assert next(csv.reader(io.StringIO(table)))[-1] == "cosine A·B" and '"relative"' in page


# ------------------------------------------------------------------------------------------------ merges

def test_a_merge_in_memory_is_reviewed_like_the_saved_one(picked):
    studio, now = picked
    made = finish(studio.try_merge(now, Settings()))
    mine = now.with_merge(made)
    live, title = finish(reports.reviewed(studio, made.key, mine))
    folder = studio.output_folder("kept")
    finish(merge(studio.recipe(now, Settings()), folder))
    saved, _ = finish(reports.reviewed(studio, studio.offer_output(folder).key, mine))
    assert np.array_equal(live.distance, saved.distance) and live.lost_total == saved.lost_total and title == made.title
    assert [one.text for one in live.answers] == [one.text for one in saved.answers] and len(live.answers) == 5


def test_only_ones_own_merges_and_saved_ones_are_reviewed(picked):
    studio, now = picked
    made = finish(studio.try_merge(now, Settings()))
    for key in (made.key, now.pivot, "outputs/none", "../x", None, ["outputs/none"]):
        with pytest.raises(FusionError):
            finish(reports.reviewed(studio, key, now))


def test_a_report_shows_answers_as_text_and_says_what_is_wrong_with_them(picked):
    studio, now = picked
    made = finish(studio.try_merge(now, Settings()))
    report, _ = finish(reports.reviewed(studio, made.key, now.with_merge(made)))
    odd = (Answer("<b>?</b>", "<img src=x onerror=alert(1)>", 64, "length", 9.0), Answer("p", "", 1, "stop", 9.0),
           Answer("q", "", 0, "error", None, "it broke"))
    page = reports.report_html(answered(report, odd), "<i>title</i>")
    assert "<img" not in page and "<b>?" not in page and "<i>title" not in page
    assert "64 tokens · cut off" in page and "1 tokens · ended by itself · empty" in page and "it broke" in page
    assert page.count("class='fs-warning'><span class='fs-light'></span><b>") == 2 and "fs-verdict fs-bad" in page


def test_recipes_in_memory_are_compared_by_their_settings(picked):
    studio, now = picked
    first = finish(studio.try_merge(now, Settings()))
    second = finish(studio.try_merge(now.with_merge(first), Settings(granularity="layer")))
    mine = now.with_merge(first).with_merge(second)
    page = finish(comparing.compared(studio, first.key, second.key, mine))
    assert "granularity</th><td>matrix</td><td>layer</td>" in page and str(studio.entry(now.pivot).folder) not in page
    for one, other in ((first.key, first.key), (first.key, "demo/none"), (None, first.key), (first.key, now.pivot)):
        with pytest.raises(RecipeError):
            finish(comparing.compared(studio, one, other, mine))
    with pytest.raises(RecipeError):
        finish(comparing.compared(studio, first.key, second.key, now))  # another visitor's merges


def test_two_folders_are_compared_matrix_by_matrix(picked):
    studio, now = picked
    page = finish(comparing.compared(studio, *now.targets, now))
    report = finish(compare(*(studio.entry(key).folder for key in now.targets)))
    assert f"lies {report.totals['distance']:.2%} of the norm" in page
    assert f"<td>{report.distance.max():.2%}</td>" in page
    copy = studio.entry(now.pivot).folder.parent / "copy"
    shutil.copytree(studio.entry(now.pivot).folder, copy)
    assert "hold the same numbers" in finish(comparing.compared(studio, now.pivot, studio.add_folder(str(copy)).key, now))


# ------------------------------------------------------------------------------------------------ the page

PATIENCE_MS = 120_000


@contextmanager
def served(studio):
    page = build(studio)
    page.queue(max_size=64, default_concurrency_limit=8)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=theme(), css=css(), head=HEAD, footer_links=["api"],
                                run_history=False, enable_monitoring=False, max_file_size="1mb", ssr_mode=False)
    try:
        yield address
    finally:
        page.close()


@contextmanager
def visiting(browser, url, width=1440, look="light"):
    context, wrong = browser.new_context(viewport={"width": width, "height": 900}), []
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{url}?__theme={look}")
    expect(page.get_by_role("tab").first).to_be_visible(timeout=PATIENCE_MS)
    try:
        yield page
    finally:
        context.close()
    assert wrong == []


def serious(page):
    from axe_playwright_python.sync_playwright import Axe

    found = [f"{one['id']} {[node['target'] for node in one['nodes']][:3]}" for one in Axe().run(page).response["violations"]
             if one["impact"] in ("serious", "critical")]
    own = (".cm-", "ͼ", "selected", "data-tab-id")  # Gradio's: colours of code tokens and of the chosen tab
    return [text for text in found if not ("color-contrast" in text and any(part in text for part in own))]


def choose(page, menu, option):
    page.locator(f"#{menu} input").click()
    page.locator(f"#{menu}").get_by_role("option", name=option, exact=True).click()


@pytest.mark.browser
@pytest.mark.parametrize(("look", "width"), [("light", 1440), ("dark", 400)])
def test_a_person_looks_closer_saves_reads_the_report_and_compares(browser, tmp_path, look, width):
    with served(Studio(outputs=tmp_path / "outputs")) as url, visiting(browser, url, width, look) as page:
        open_tab(page, "Variation")
        page.get_by_text("Sign conflict", exact=True).click(timeout=PATIENCE_MS)
        expect(page.locator(".hm-card")).to_have_count(1)
        page.get_by_role("gridcell", name="layer 1, up_proj: sign conflict").click()
        assert not page.get_by_role("dialog").is_visible()  # it belongs to all targets: nothing to edit
        expect(page.get_by_role("tooltip")).to_contain_text("stable rank")
        page.get_by_text("Relative change", exact=True).click()
        expect(page.locator(".hm-card")).to_have_count(3)
        page.get_by_role("gridcell", name="layer 1, up_proj: relative change").first.click()
        page.get_by_role("dialog").wait_for()
        page.keyboard.press("Escape")
        expect(page.locator("#variation-flags")).to_contain_text("disagree in sign")
        expect(page.locator(".js-plotly-plot")).to_have_count(2, timeout=PATIENCE_MS)
        assert serious(page) == []
        open_tab(page, "Merge")
        page.locator("#save-name").get_by_role("textbox").fill("first")
        page.locator("#save").click()
        expect(page.locator("#report")).to_contain_text("Five prompts", timeout=PATIENCE_MS)  # by itself: it is small
        expect(page.locator("#report-which input")).to_have_value("first")
        page.locator("#compare-box").get_by_text("Compare two merges or models").click()
        choose(page, "compare-first", "first")
        choose(page, "compare-second", "Pivot")
        page.locator("#compare-run").click()
        expect(page.locator("#comparison")).to_contain_text("of the norm from", timeout=PATIENCE_MS)
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


@pytest.mark.browser
def test_a_large_family_shows_an_estimate_which_is_refined_stopped_and_asked_for(browser, tmp_path, monkeypatch):
    studio, real = two_targets(Studio(outputs=tmp_path / "outputs")), studio_module.measure
    monkeypatch.setattr(studio, "measures_at_once", lambda selection: False)
    monkeypatch.setattr(inspecting, "AT_ONCE_BYTES", 0)

    def slow(*args, **options):
        work = real(*args, **options)
        try:
            while True:
                yield next(work)
                time.sleep(0.2)
        except StopIteration as end:
            return end.value
        finally:
            work.close()

    monkeypatch.setattr(studio_module, "measure", slow)
    with served(studio) as url, visiting(browser, url) as page:
        open_tab(page, "Variation")
        expect(page.locator(".hm-hint")).to_contain_text("A preview: estimated from", timeout=PATIENCE_MS)
        page.get_by_role("gridcell", name="layer 1, up_proj:").first.hover()
        expect(page.get_by_role("tooltip")).to_contain_text("±")
        page.locator("#variation-stop").click()
        expect(page.locator("#variation-status")).to_contain_text("Stopped")
        page.locator("#measure-now").click()
        expect(page.locator(".hm-hint")).to_contain_text("Click or Enter changes", timeout=PATIENCE_MS)
        expect(page.get_by_text("Sign conflict", exact=True)).to_be_hidden()
        page.locator("#look-closer").click()
        expect(page.get_by_text("Sign conflict", exact=True)).to_be_visible(timeout=PATIENCE_MS)
        expect(page.locator("#look-closer")).to_be_hidden()
