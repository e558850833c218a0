"""Every method on the page: pick it, set it by number, by hand-drawn curve and by pattern, stack layers, read mergekit, merge."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from fusion import METHODS, Recipe, demo
from fusion.settings import Curve, Slice, Table
from tests.browser import open_tab, write
from tests.test_page import PATIENCE_MS, recipe_text, studio, url, visit  # noqa: F401

pytestmark = pytest.mark.browser


@pytest.fixture
def merge_tab(visit):  # noqa: F811
    page = visit()
    open_tab(page, "Merge")
    expect(page.locator("#recipe")).to_contain_text("method: varm", timeout=PATIENCE_MS)
    return page


def pick(page, family: str, method: str) -> None:
    page.locator("#family").get_by_label(family).click()
    page.locator("#method").get_by_label(method, exact=True).click()
    name = next(name for name, entry in METHODS.items() if entry.title == method)
    expect(page.locator("#recipe")).to_contain_text(f"method: {name}")


def recipe_when(page, text: str) -> Recipe:
    expect(page.locator("#recipe")).to_contain_text(text)
    return Recipe.from_yaml(recipe_text(page))


def test_a_task_vector_method_shows_its_stages_and_takes_numbers(merge_tab):
    page = merge_tab
    pick(page, "Task vectors", "TIES")
    stages = page.locator("#method-form .fm-strip li b")
    expect(stages).to_have_text(["keep the largest", "rescale", "weigh", "elect sign", "normalise", "scale by λ"])
    page.get_by_label("density", exact=True).fill("0.4")
    page.keyboard.press("Tab")
    assert recipe_when(page, "density: 0.4").options["density"] == 0.4
    page.get_by_label("density", exact=True).fill("7")
    page.keyboard.press("Tab")
    expect(page.get_by_text("from 0 to 1").last).to_be_visible()
    expect(page.get_by_label("density", exact=True)).to_have_value("0.4")
    page.get_by_role("button", name="Per target").first.click()
    page.get_by_label("density of B", exact=True).fill("0.2")
    page.keyboard.press("Tab")
    expect(page.locator("#command")).to_contain_text("density=0.4,0.2")
    page.locator("#merge-try").click()
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true", timeout=PATIENCE_MS)
    expect(page.get_by_role("combobox", name="Model in column A")).to_have_value("TIES #1")


def test_a_curve_is_drawn_by_mouse_and_by_keyboard(merge_tab):
    page = merge_tab
    pick(page, "On the sphere", "SLERP")
    page.get_by_label("How t is given").select_option("By layer")
    points = page.locator("#method-form .fm-point")
    expect(points).to_have_count(5)
    assert recipe_when(page, "curve: [0.5, 0.5, 0.5, 0.5, 0.5]").options["t"] == Curve((0.5,) * 5)
    points.nth(1).focus()
    for _ in range(4):
        page.keyboard.press("ArrowUp")
    assert recipe_when(page, "curve: [0.5, 0.7, 0.5").options["t"].points[1] == 0.7
    expect(points.nth(1)).to_be_focused()
    box, whole = points.nth(3).bounding_box(), page.locator("#method-form .fm-curve svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, whole["y"] + whole["height"] - 2, steps=4)
    page.mouse.up()
    expect(points.nth(3)).to_have_attribute("aria-valuenow", "0")
    assert recipe_when(page, "curve: [0.5, 0.7, 0.5, 0, 0.5]").options["t"].points[3] == 0
    page.get_by_role("button", name="One point more").click()
    expect(points).to_have_count(6)
    expect(page.locator("#command")).to_contain_text("t=curve:0.5,0.66")


def test_weights_by_pattern_and_measured(merge_tab):
    page = merge_tab
    pick(page, "Averages", "Linear")
    page.get_by_label("How Weight of B is given").select_option("By pattern")
    page.get_by_label("Weight of B by pattern").fill("* = 1\n*.mlp.* = 3")
    page.keyboard.press("Tab")
    recipe = recipe_when(page, "*.mlp.*")
    assert recipe.weights == (1, Table((("*", 1.0), ("*.mlp.*", 3.0))))
    expect(page.locator("#weights-glance")).to_contain_text("B 75%")
    page.get_by_label("Weight of B by pattern").fill("*.nothing.* = 3")
    page.keyboard.press("Tab")
    expect(page.locator("#recipe")).to_contain_text("no tensor matches")
    page.get_by_role("button", name="Reset").first.click()
    expect(page.get_by_label("Weight of B", exact=True)).to_have_value("1")
    page.get_by_label("How Weight of A is given").select_option("Measured")
    expect(page.locator("#merge-granularity")).to_be_visible()
    assert recipe_when(page, "variation").weights == ("variation", 1)


def test_layers_are_stacked(merge_tab, studio):  # noqa: F811
    page = merge_tab
    page.locator("#family").get_by_label("Others").click()
    page.locator("#method").get_by_label("Passthrough", exact=True).click()
    expect(page.locator("#method-form .fm-problem")).to_contain_text("which layers each gives")
    page.locator("#advanced").get_by_text("Stack layers, vocabulary, seed").click()
    write(page.locator("#stack textarea"), "A 0-2\nB 1-3")
    expect(page.locator("#stacked")).to_contain_text("6 layers in all")
    recipe = recipe_when(page, "slices")
    assert recipe.slices == (Slice({"target-qwen": (0, 3)}), Slice({"target-neox": (1, 4)}))
    page.locator("#merge-try").click()
    expect(page.get_by_role("combobox", name="Model in column A")).to_have_value("Passthrough #1", timeout=PATIENCE_MS)
    model = next(reversed(studio._recipes))
    with studio.pool.lease(model, lambda: studio._again(model)) as live:
        assert live.model.config.num_hidden_layers == 6
    open_tab(page, "Merge")
    page.locator("#stack textarea").fill("A 0-99")
    page.keyboard.press("Tab")
    expect(page.locator("#recipe")).to_contain_text("#")


def test_mergekit_comes_in_with_its_notes_and_goes_out(merge_tab):
    page = merge_tab
    page.locator("#load-recipe").get_by_text("Load a recipe").click()
    folder = demo.FOLDER
    page.locator("#recipe-in .cm-content").fill(
        f"merge_method: ties\nbase_model: {folder / 'pivot'}\nmodels:\n  - model: {folder / 'target-qwen'}\n    parameters:\n"
        f"      weight: 0.7\n      density: [0.2, 0.8]\n  - model: {folder / 'target-neox'}\n    parameters: {{weight: 0.3}}\n"
        "dtype: bfloat16\n")
    page.locator("#recipe-load").click()
    expect(page.locator("#recipe-notes")).to_contain_text("line 1", timeout=PATIENCE_MS)
    recipe = recipe_when(page, "method: ties")
    assert recipe.weights == (0.7, 0.3) and recipe.options["density"][0] == Curve((0.2, 0.8), 0.2)
    page.locator("#export-recipe").get_by_text("Export for mergekit").click()
    page.locator("#mergekit-export").click()
    expect(page.locator("#mergekit")).to_contain_text("merge_method: ties", timeout=PATIENCE_MS)


def test_the_form_is_accessible_light_and_dark(merge_tab):
    from axe_playwright_python.sync_playwright import Axe

    page = merge_tab
    pick(page, "Task vectors", "DARE-TIES")
    page.get_by_label("How density is given").select_option("By layer")
    expect(page.locator("#method-form .fm-point")).to_have_count(5)
    for dark in (False, True):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        found = Axe().run(page, context="#method-form").response["violations"]
        assert not [its["id"] for its in found if its["impact"] in ("serious", "critical")], found
