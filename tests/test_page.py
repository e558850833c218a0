"""The page as a person uses it, in headless Chromium, on the shipped demo family."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect
from transformers import AutoModelForCausalLM

from components.merging import running
from components.page import build
from components.studio import Studio
from components.theme import HEAD, css, theme
from fusion import Recipe, demo
from fusion.demo.family import members
from fusion.loading import LOADING
from tests.browser import open_tab, two_targets, write
from tests.streams import watch

pytestmark = pytest.mark.browser
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return two_targets(Studio(outputs=tmp_path_factory.mktemp("page") / "outputs"))


@pytest.fixture(scope="module")
def url(studio):
    page = build(studio)
    wrong = watch(page)
    page.queue(max_size=64, default_concurrency_limit=8)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=theme(), css=css(), head=HEAD, footer_links=["api"],
                                run_history=False, enable_monitoring=False, max_file_size="1mb", ssr_mode=False)
    yield address
    page.close()
    assert wrong == []  # no handler took back what it had streamed


@pytest.fixture
def visit(browser, url):
    """Open the page as a new visitor; errors in its scripts and requests to the outside fail the test."""
    contexts, wrong = [], []

    def start(width: int = 1440, query: str = ""):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if not _inside(request.url, url) else None)
        page.goto(url + query)
        expect(page.get_by_role("tab").first).to_be_visible(timeout=PATIENCE_MS)
        return page

    yield start
    for context in contexts:
        context.close()
    assert wrong == []


def _inside(address: str, url: str) -> bool:
    return address.startswith((url, "data:", "blob:"))


def cell(page, name, target="A"):
    return page.locator(f".hm-card[aria-label^='Target {target}']").get_by_role("gridcell", name=name)


def recipe_text(page) -> str:
    return "\n".join(page.locator("#recipe .cm-line").all_inner_texts())


def set_cell(page, name, weight):
    cell(page, name).click()
    page.locator(".hm-editor input[type=number], dialog input[type=number]").fill(str(weight))
    page.get_by_role("button", name="Set", exact=True).click()


def save_as(page, name):
    page.locator("#save-name").get_by_role("textbox").fill(name)
    page.locator("#save").click()


def choose(page, menu, option):
    page.locator(f"#{menu} input").click()
    page.locator(f"#{menu}").get_by_role("option", name=option, exact=True).click()
    page.keyboard.press("Escape")


def test_the_first_screen_is_filled(visit):
    page = visit()
    expect(page.locator("#preflight")).to_contain_text("These models can be merged")
    expect(page.locator("#preflight")).to_contain_text("LlamaForCausalLM")
    expect(page.locator("#glance")).to_contain_text("Who moved which part", timeout=PATIENCE_MS)


def test_the_page_opens_with_the_whole_family(tmp_path):
    picked = Studio(outputs=tmp_path / "outputs").first_selection()
    assert [picked.pivot, *picked.targets, *picked.sources] == [f"demo/{name}" for role in ("pivot", "target", "source")
                                                                for name in members(role)]


def test_the_main_job_from_picking_to_a_saved_folder(visit, studio):
    page = visit()
    open_tab(page, "Variation")
    expect(cell(page, "layer 0, q_proj:")).to_be_visible(timeout=PATIENCE_MS)
    set_cell(page, "layer 0, q_proj:", 0.9)
    open_tab(page, "Merge")
    expect(page.locator("#recipe")).to_contain_text("model.layers.0.self_attn.q_proj.weight")
    expect(page.locator("#command")).to_contain_text("q_proj.weight:target-qwen=0.9")
    recipe = Recipe.from_yaml(recipe_text(page))
    assert recipe.overrides[0].weights == {"target-qwen": 0.9}
    page.locator("#merge-try").click()
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true", timeout=PATIENCE_MS)
    expect(page.get_by_role("combobox", name="Model in column A")).to_have_value("VARM #1")
    page.locator("#chat-prompt textarea").fill("Who are you?")
    page.keyboard.press("Enter")
    expect(page.locator("#chat-columns .bot").first).to_contain_text(re.compile(r"\w"), timeout=PATIENCE_MS)
    expect(page.locator("#chat-columns")).to_contain_text("tok/s", timeout=PATIENCE_MS)
    open_tab(page, "Merge")
    save_as(page, "first-merge")
    expect(page.locator("#merge-status")).to_contain_text("Saved as outputs/first-merge", timeout=PATIENCE_MS)
    same_logits(studio, studio.outputs / "first-merge")
    open_tab(page, "Models")
    choose(page, "sources", "first-merge")
    expect(page.locator("#sources")).to_contain_text("first-merge")


def same_logits(studio: Studio, folder: Path) -> None:
    """The saved folder in plain transformers answers as the merge in memory did."""
    key = next(reversed(studio._recipes))
    with LOADING:  # a column may still be loading its model
        saved, facts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    ids = torch.arange(3, 40)[None]
    with studio.pool.lease(key, lambda: studio._again(key)) as live, torch.no_grad():
        assert torch.equal(live.model(ids).logits, saved(ids).logits)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "README.md", "fusechat_recipe.yaml"} <= names


def test_a_row_a_column_and_a_lock_reach_the_recipe_and_reset_takes_them_back(visit):
    page = visit()
    open_tab(page, "Variation")
    target = cell(page, "layer 1, up_proj:")
    expect(target).to_be_visible(timeout=PATIENCE_MS)
    target.focus()
    page.keyboard.press("l")
    expect(page.locator("#reset-edits")).to_be_enabled()
    open_tab(page, "Merge")
    expect(page.locator("#recipe")).to_contain_text("model.layers.1.mlp.up_proj.weight")
    open_tab(page, "Variation")
    page.locator("#reset-edits").click()
    expect(page.locator("#reset-edits")).to_be_disabled()
    open_tab(page, "Merge")
    expect(page.locator("#recipe")).not_to_contain_text("overrides")


def test_the_granularity_is_one_setting_on_both_tabs(visit):
    page = visit()
    open_tab(page, "Variation")
    expect(cell(page, "layer 0, q_proj:")).to_be_visible(timeout=PATIENCE_MS)
    page.locator("#granularity").get_by_label("layer").click()
    row = [cell(page, f"layer 2, {name}:") for name in ("q_proj", "up_proj")]
    ratio = re.compile(r"ratio ([\d.e-]+)")

    def ratios():
        return {ratio.search(one.get_attribute("aria-label"))[1] for one in row}

    deadline = time.monotonic() + 15
    while len(ratios()) > 1 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert len(ratios()) == 1
    open_tab(page, "Merge")
    expect(page.locator("#recipe")).to_contain_text("granularity: layer")
    expect(page.locator("#merge-granularity").get_by_label("layer")).to_be_checked()


def test_linear_shows_weights_and_hides_what_is_measured(visit):
    page = visit()
    open_tab(page, "Merge")
    page.locator("#method").get_by_label("Linear").click()
    page.get_by_label("Weight of B", exact=True).fill("3")
    page.keyboard.press("Tab")
    expect(page.locator("#command")).to_contain_text("--weights 1,3")
    expect(page.locator("#merge-granularity")).to_be_hidden()


def test_models_of_another_shape_are_refused_in_words(visit):
    page = visit()
    choose(page, "targets", "Source NeoX")
    expect(page.locator("#preflight")).to_contain_text("needs pairwise fusion first")
    expect(page.locator("#preflight")).to_contain_text("cannot be merged")
    open_tab(page, "Merge")
    page.locator("#merge-try").click()
    expect(page.locator("#merge-status")).to_contain_text("needs pairwise fusion first")


def test_a_bad_name_and_a_bad_pattern_are_explained(visit, studio):
    page = visit()
    open_tab(page, "Merge")
    for name, why in (("../escape", "no folder name"), (".hidden", "no folder name")):
        save_as(page, name)
        expect(page.get_by_text(why).last).to_be_visible()
    page.locator("#exclude textarea").fill("model.layers.9.*")
    page.keyboard.press("Tab")
    expect(page.locator("#recipe")).to_contain_text("no tensor matches")
    page.locator("#merge-try").click()
    expect(page.locator("#merge-status")).to_contain_text("no tensor matches")
    assert not (studio.outputs.parent / "escape").exists()


def test_a_recipe_can_be_loaded_and_a_broken_one_says_why(visit):
    page = visit()
    open_tab(page, "Merge")
    page.locator("#load-recipe").get_by_text("Load a recipe").click()
    box = page.locator("#recipe-in .cm-content")
    expect(box).to_be_visible()
    box.fill("fusechat: 1\nmethd: varm")
    page.locator("#recipe-load").click()
    expect(page.get_by_text("Did you mean 'method'?").last).to_be_visible()
    targets = [str(demo.FOLDER / name) for name in ("target-neox", "target-qwen")]
    box.fill(Recipe(str(demo.FOLDER / "pivot"), tuple(targets), granularity="module", exclude=("*norm*",)).to_yaml())
    page.locator("#recipe-load").click()
    expect(page.locator("#merge-granularity").get_by_label("module")).to_be_checked()
    expect(page.locator("#exclude textarea")).to_have_value("*norm*")
    assert Recipe.from_yaml(recipe_text(page)).names == ("target-neox", "target-qwen")


def test_a_recipe_with_a_seed_keeps_its_method_whatever_stood_there(visit):
    page = visit()
    open_tab(page, "Merge")
    page.locator("#load-recipe").get_by_text("Load a recipe").click()
    page.locator("#advanced").get_by_text("Stack layers, vocabulary, seed").click()
    box = page.locator("#recipe-in .cm-content")
    for name in ("demo-ties", "demo-dare-ties", "demo-slerp", "demo-dare-ties", "demo-varm", "demo-dare-ties"):
        recipe = Recipe.from_yaml((demo.FOLDER.parent / "recipes" / f"{name}.yaml").read_text())
        box.fill(recipe.to_yaml())
        page.locator("#recipe-load").click()
        expect(page.locator("#recipe")).to_contain_text(f"method: {recipe.method}")
        expect(page.locator("#seed input")).to_have_value(str(recipe.seed))
        page.wait_for_timeout(700)  # what the fields of the page might send back comes now
        shown = Recipe.from_yaml(recipe_text(page))
        assert (shown.method, shown.seed, shown.options, shown.weights) == (
            recipe.method, recipe.seed, recipe.options, recipe.weights)


def test_the_cross_of_a_menu_empties_the_selection(visit):
    page = visit()
    expect(page.locator("#glance")).to_contain_text("Who moved which part", timeout=PATIENCE_MS)
    page.locator("#sources .remove-all").click()
    page.locator("#targets .remove-all").click()
    expect(page.locator("#preflight")).to_contain_text("Pick at least one target")
    expect(page.locator("#glance")).not_to_contain_text("Who moved which part")  # nothing stays of what was picked before
    open_tab(page, "Merge")
    page.locator("#merge-try").click()
    expect(page.locator("#merge-status")).to_contain_text("there is none")
    open_tab(page, "Evaluate")
    page.locator("#evaluate-models .remove-all").click()
    expect(page.get_by_label("Compared with")).to_have_value("nobody")
    open_tab(page, "Models")
    choose(page, "targets", "Target Qwen")
    expect(page.locator("#preflight")).to_contain_text("These models can be merged")


@pytest.fixture
def slow_saving(monkeypatch):
    """Saving takes a few seconds, as it does with real models; it is the same merge otherwise."""
    real = running.merge

    def slow(*args, **options):
        result = None
        work = real(*args, **options)
        try:
            while True:
                yield next(work)
                time.sleep(0.3)
        except StopIteration as end:
            result = end.value
        finally:
            work.close()
        return result

    monkeypatch.setattr(running, "merge", slow)


def test_stop_leaves_nothing_behind(visit, studio, slow_saving):
    page = visit()
    open_tab(page, "Merge")
    save_as(page, "stopped")
    expect(page.get_by_role("progressbar", name="Saving stopped")).to_be_visible(timeout=PATIENCE_MS)
    page.locator("#save-stop").click()
    expect(page.locator("#merge-status")).to_contain_text("was stopped")
    expect(page.locator("#save")).to_be_visible()
    left = [path.name for path in studio.outputs.iterdir()] if studio.outputs.exists() else []
    assert not [name for name in left if "stopped" in name]


def test_a_save_survives_a_reload_and_is_nobody_elses_business(visit, studio, slow_saving):
    page = visit()
    open_tab(page, "Merge")
    save_as(page, "reloaded")
    expect(page.get_by_role("progressbar", name="Saving reloaded")).to_be_visible(timeout=PATIENCE_MS)
    stranger = visit()
    page.reload()
    open_tab(page, "Merge")
    expect(page.get_by_role("progressbar", name="Saving reloaded")).to_be_visible(timeout=PATIENCE_MS)
    open_tab(stranger, "Merge")
    expect(stranger.locator("#merge-status")).not_to_contain_text("reloaded")
    expect(page.locator("#merge-status")).to_contain_text("Saved as outputs/reloaded", timeout=PATIENCE_MS)
    assert (studio.outputs / "reloaded" / "model.safetensors").is_file()


def test_downloads_hold_the_numbers_of_the_heatmap(visit):
    page = visit()
    open_tab(page, "Variation")
    for kind in ("csv", "json", "html"):
        expect(page.locator(f"#download-{kind}")).to_be_enabled(timeout=PATIENCE_MS)
        with page.expect_download() as started:
            page.locator(f"#download-{kind}").click()
        text = Path(started.value.path()).read_text()
        if kind == "json":
            rows = json.loads(text)["tensors"]
            by_tensor = [row["ratio"] for row in rows if row["tensor"] == "model.layers.0.mlp.up_proj.weight"]
            assert sum(by_tensor) == pytest.approx(1, abs=1e-5)
        assert "model.layers.0.mlp.up_proj.weight" in text


def test_a_folder_can_be_opened_and_a_wrong_one_is_explained(visit, tmp_path):
    page = visit()
    page.locator("#open-folder").get_by_text("Open a folder").click()
    box = page.locator("#folder-path").get_by_role("textbox")
    write(box, str(tmp_path))
    page.locator("#folder-add").click()
    expect(page.get_by_text("there is no config.json").last).to_be_visible()
    box.fill(str(demo.FOLDER / "pivot"))
    page.locator("#folder-add").click()
    expect(page.get_by_text("is in the menus now").last).to_be_visible()


def test_no_view_overflows_a_phone(visit):
    page = visit(width=400)
    for name in ("Models", "Variation", "Merge", "Chat"):
        open_tab(page, name)
        page.wait_for_timeout(700)
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, name


@pytest.mark.parametrize("look", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, look):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(query=f"?__theme={look}")
    expect(page.locator("#glance")).to_contain_text("Who moved", timeout=PATIENCE_MS)
    for name in ("Models", "Variation", "Merge", "Chat"):
        open_tab(page, name)
        page.wait_for_timeout(1200)
        found = [f"{name}: {one['id']} {[node['target'] for node in one['nodes']][:3]}"
                 for one in Axe().run(page).response["violations"] if one["impact"] in ("serious", "critical")]
        assert [text for text in found if not _of_gradio(text)] == []


def _of_gradio(text: str) -> bool:
    """Known weaknesses inside Gradio's own components: colours of code tokens and of the chosen tab."""
    return "color-contrast" in text and (".cm-" in text or "ͼ" in text or "selected" in text)
