"""The Fuse tab as a person uses it: plan, look at an alignment, run to new models, stop and go on."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from fusion import Checkpoint
from tests.browser import open_tab, write
from tests.test_page import choose, studio, url, visit  # noqa: F401

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
PATIENCE_MS = 120_000


@pytest.fixture
def fuse_tab(visit):  # noqa: F811
    page = visit()
    open_tab(page, "Fuse")
    expect(page.locator("#fuse-stages")).to_contain_text("Time left", timeout=PATIENCE_MS)
    return page


def fill(page, box: str, value) -> None:
    page.locator(f"#{box} input").fill(str(value))
    page.keyboard.press("Tab")


def small(page, name: str, steps: int) -> None:
    fill(page, "fuse-count", 8)
    page.locator("#fuse-more").get_by_text("Loss, level, batch").click()
    write(page.locator("#fuse-steps input"), str(steps))
    fill(page, "fuse-batch", 2)
    page.locator("#fuse-name").get_by_role("textbox").fill(name)
    page.keyboard.press("Tab")
    expect(page.locator("#fuse-stages")).to_contain_text(re.compile(rf"Steps a target\s*{steps:,}"), timeout=PATIENCE_MS)


def test_from_the_plan_to_targets_in_models(fuse_tab, studio):  # noqa: F811
    page = fuse_tab
    expect(page.locator("#fuse-stages tbody tr")).to_have_count(12)
    small(page, "fused-here", 40)  # long enough for the page to be loaded anew meanwhile
    page.locator("#fuse-recipe-box").get_by_text("Recipe and command line").click()
    expect(page.locator("#fuse-recipe")).to_contain_text("max_steps: 40")
    expect(page.locator("#fuse-command")).to_contain_text("python -m fusion fuse")
    page.locator("#fuse-run").click()
    expect(page.locator("#fuse-stop")).to_be_visible(timeout=PATIENCE_MS)
    page.reload()
    open_tab(page, "Fuse")
    expect(page.locator("#fuse-status")).to_contain_text("in the menus of Models", timeout=8 * PATIENCE_MS)
    expect(page.locator("#fuse-curves svg polyline")).to_have_count(9)
    expect(page.locator("#fuse-stages")).to_contain_text("Everything is done")
    merged, pivot = Checkpoint(studio.outputs / "fused-here" / "merged"), Checkpoint(studio.entry("demo/pivot").folder)
    assert merged.parameters == pivot.parameters
    open_tab(page, "Models")
    choose(page, "targets", "fused-here/target-neox")
    expect(page.locator("#preflight")).to_contain_text("fused-here/target-neox")
    expect(page.locator("#preflight")).to_contain_text("These models can be merged")


def test_a_stopped_run_goes_on(fuse_tab, studio):  # noqa: F811
    page = fuse_tab
    small(page, "stopped", 4000)
    page.locator("#fuse-run").click()
    expect(page.locator("#fuse-curves svg").first).to_be_visible(timeout=8 * PATIENCE_MS)
    page.locator("#fuse-stop").click()
    expect(page.locator("#fuse-status")).to_contain_text("was stopped; press Fuse to go on", timeout=PATIENCE_MS)
    assert not (studio.outputs / "stopped" / "targets" / "target-qwen").exists()
    page.locator("#fuse-run").click()
    expect(page.locator("#fuse-status")).to_contain_text("Training target-qwen", timeout=PATIENCE_MS)
    page.locator("#fuse-stop").click()
    expect(page.locator("#fuse-status")).to_contain_text("was stopped", timeout=PATIENCE_MS)


def test_the_alignment_is_seen_and_read_by_pointer_and_keyboard(fuse_tab):
    page = fuse_tab
    chips, card = page.locator("#alignment .al-chip"), page.locator("#alignment .al-card")
    expect(chips.first).to_be_visible(timeout=PATIENCE_MS)
    assert page.locator("#alignment path").first.get_attribute("d").startswith("M")
    page.locator("#align-user textarea").fill("Hi <img src=x onerror=alert(1)>")
    page.locator("#align-reply textarea").fill("The farmer walks over <b>the</b> old bridge.")
    page.locator("#align-show").click()
    token = page.locator("#alignment .al-chip", has_text="mer").first
    expect(token).to_be_visible(timeout=PATIENCE_MS)
    token.hover()
    expect(card.locator(".al-said b")).to_have_text("mer")
    expect(card).to_contain_text(re.compile("taught by (Pivot|Source Qwen)"))
    expect(card.locator(".al-gold code").first).to_have_text("mer")
    token.focus()
    page.keyboard.press("ArrowLeft")
    expect(card.locator(".al-said b")).to_have_text("␣far")
    assert page.locator("#alignment b b, #alignment img").count() == 0
    page.locator("#align-reply textarea").fill("")
    page.locator("#align-show").click()
    expect(page.locator("#alignment .al-notice")).to_contain_text("there is no text")


def test_narrow_pages_show_everything_without_scrolling_sideways(visit):  # noqa: F811
    page = visit(width=400)
    open_tab(page, "Fuse")
    expect(page.locator("#alignment .al-chip").first).to_be_visible(timeout=PATIENCE_MS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_tab_is_accessible_light_and_dark(fuse_tab):
    from axe_playwright_python.sync_playwright import Axe

    page = fuse_tab
    expect(page.locator("#alignment .al-chip").first).to_be_visible(timeout=PATIENCE_MS)
    for dark in (False, True):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        for part in ("#alignment", "#fuse-stages"):
            found = Axe().run(page, context=part).response["violations"]
            assert not [its["id"] for its in found if its["impact"] in ("serious", "critical")], found
