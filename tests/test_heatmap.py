"""The heatmap: how names become a table, what leaves for the page and what is let in again, and the page itself."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from components.heatmap import Grid, layout, parse_edit, payload, standalone_html
from fusion.errors import RecipeError

HOSTILE = "<img src=x onerror=alert(1)>${alert(1)}</script>{{x}}"


def grid(tensors, targets=("Maths", "Code"), shape=(4, 2)):
    """A grid with ratios 1/4 and 3/4 and weights 0.4 and 0.6 of two targets, and variation 1e-6 × (1, 2 … per tensor)."""
    n, j = len(tensors), len(targets)
    weight = np.tile(np.array([0.4, 0.6, 0.5, 0.5][:j]), (n, 1))
    ratio = np.tile(np.array([0.25, 0.75, 0.5, 0.5][:j]), (n, 1))
    variation = np.tile(np.arange(1, n + 1)[:, None] * 1e-6, (1, j))
    return Grid(tuple(targets), tuple(tensors), (shape,) * n, ratio, variation, weight, np.zeros((n, j), bool),
                np.zeros(n, bool))


def llama(layers=2):
    inside = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "post_attention_layernorm")
    return ("model.embed_tokens.weight", *(f"model.layers.{n}.{m}.weight" for n in range(layers) for m in inside),
            "model.norm.weight", "lm_head.weight")


def table(names):
    """{block title: (rows, columns as group/label)}."""
    return {b.title: (b.rows, [f"{g}/{c}" for g, c in b.columns]) for b in layout(tuple(names))}


# ------------------------------------------------------------------------------------------------ layout

def test_llama_puts_attention_before_norms_and_what_is_outside_first():
    blocks = table(llama())
    assert list(blocks) == ["Outside the layers", "model.layers"]
    assert blocks["Outside the layers"] == (("all",), ["/embed_tokens", "/norm", "/lm_head"])
    assert blocks["model.layers"] == (("0", "1"), [
        "self_attn/q_proj", "self_attn/k_proj", "mlp/up_proj", "norms/input_layernorm", "norms/post_attention_layernorm"])


def test_biases_are_columns_of_their_own():
    gpt2 = [f"transformer.h.{n}.{m}.{p}" for n in range(2) for m in ("ln_1", "attn.c_attn", "mlp.c_fc") for p in ("weight", "bias")]
    assert table(gpt2)["transformer.h"][1] == [
        "attn/c_attn", "attn/c_attn.bias", "mlp/c_fc", "mlp/c_fc.bias", "norms/ln_1", "norms/ln_1.bias"]
    neox = ["gpt_neox.layers.0.attention.query_key_value.bias", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    assert table(neox)["gpt_neox.layers"][1] == ["attention/query_key_value.bias", "mlp/dense_h_to_4h"]


def test_rows_are_in_the_order_of_numbers_and_stacks_get_a_block_each():
    names = [f"{side}.layers.{n}.self_attn.q_proj.weight" for side in ("encoder", "decoder") for n in (10, 9, 0)]
    assert {title: rows for title, (rows, _) in table(names).items()} == {
        "encoder.layers": ("0", "9", "10"), "decoder.layers": ("0", "9", "10")}


def test_same_short_name_outside_the_layers_is_told_apart():
    assert table(["text.norm.weight", "vision.norm.weight"])["Outside the layers"][1] == ["/text.norm", "/vision.norm"]


def moe(experts):
    return [f"model.layers.0.mlp.experts.{e}.{m}.weight" for e in range(experts) for m in ("gate_proj", "up_proj")]


def test_many_experts_share_a_column_and_few_do_not():
    assert table(moe(64))["model.layers"][1] == ["mlp/experts.*.gate_proj", "mlp/experts.*.up_proj"]
    assert len(table(moe(4))["model.layers"][1]) == 8
    value = payload(grid(moe(64)))["blocks"][0]
    assert value["count"] == [64, 64] and value["name"][0] == "model.layers.0.mlp.experts.*.gate_proj.weight"
    assert value["values"][0]["variation"][0] == pytest.approx(np.arange(1, 128, 2).mean() * 1e-6, rel=1e-4)


def test_an_edit_of_shared_experts_reaches_every_one():
    tensors = moe(64)
    edit = parse_edit({"target": 0, "block": 0, "row": 0, "column": 1, "action": "lock", "weight": None}, grid(tensors))
    assert set(edit.tensors) == {name for name in tensors if "up_proj" in name}


# ------------------------------------------------------------------------------------------------ payload

def test_payload_rounds_to_five_digits_and_writes_null_for_what_is_not_there():
    g = grid(llama())
    g.ratio[1, 0] = 1 / 3
    for array in (g.ratio, g.variation, g.weight):
        array[2, 1] = math.nan
    value = payload(g)
    json.dumps(value, allow_nan=False)
    inside = value["blocks"][1]
    at = inside["name"].index("model.layers.0.input_layernorm.weight")
    assert inside["values"][0]["ratio"][at] == 0.33333
    gone = inside["name"].index("model.layers.0.self_attn.q_proj.weight")
    assert inside["values"][1]["ratio"][gone] is None and inside["values"][1]["present"][gone] == 0
    assert inside["values"][0]["present"][gone] == 1


def test_mean_of_a_target_counts_parameters_not_matrices():
    g = replace(grid(["a.0.mlp.up.weight", "a.0.mlp.down.weight"]), shapes=((9, 1), (1, 1)))
    g.ratio[:, 0] = (0.0, 1.0)
    assert payload(g)["targets"][0]["mean"]["ratio"] == 0.1


def test_payload_marks_fixed_and_excluded():
    g = grid(llama())
    g.fixed[0, 1] = g.excluded[0] = True
    outside = payload(g)["blocks"][0]
    assert outside["values"][1]["fixed"] == [1, 0, 0] and outside["values"][0]["fixed"] == [0, 0, 0]
    assert outside["excluded"] == [1, 0, 0]


def test_no_tensors_and_one_scalar_are_fine():
    assert payload(grid([]))["blocks"] == []
    assert payload(grid(["scale"], shape=()))["blocks"][0]["shape"] == ["scalar"]


# ------------------------------------------------------------------------------------------------ parse_edit

GOOD = {"target": 1, "block": 1, "row": 0, "column": 0, "action": "set", "weight": 0.5}


def test_a_cell_a_row_a_column_and_everything():
    g = grid(llama())
    assert parse_edit(GOOD, g).tensors == ("model.layers.0.self_attn.q_proj.weight",)
    assert (parse_edit(GOOD, g).target, parse_edit(GOOD, g).action, parse_edit(GOOD, g).weight) == (1, "set", 0.5)
    assert parse_edit({**GOOD, "row": None}, g).tensors == tuple(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    assert len(parse_edit({**GOOD, "column": None}, g).tensors) == 5
    assert len(parse_edit({**GOOD, "row": None, "column": None}, g).tensors) == 10
    assert parse_edit({**GOOD, "weight": 1}, g).weight == 1.0
    assert parse_edit({**GOOD, "action": "reset", "weight": None}, g).weight is None


@pytest.mark.parametrize("change", [
    {"target": 2}, {"target": -1}, {"target": True}, {"target": "0"}, {"target": 0.0}, {"target": None},
    {"block": 2}, {"block": None}, {"row": 2}, {"row": -1}, {"row": False}, {"column": 5}, {"column": [0]},
    {"action": "drop"}, {"action": None}, {"action": ["set"]},
    {"weight": math.nan}, {"weight": math.inf}, {"weight": -0.01}, {"weight": 1.01}, {"weight": True}, {"weight": "0.5"},
    {"weight": None}, {"weight": 10 ** 400}, {"action": "lock"},
])
def test_what_is_refused(change):
    with pytest.raises(RecipeError):
        parse_edit({**GOOD, **change}, grid(llama()))


@pytest.mark.parametrize("data", [None, [], "set", 3, {}])
def test_what_is_no_request_at_all_is_refused(data):
    with pytest.raises(RecipeError):
        parse_edit(data, grid(llama()))


def test_what_is_kept_from_the_pivot_or_missing_is_left_alone():
    g = grid(llama())
    q = g.tensors.index("model.layers.0.self_attn.q_proj.weight")
    g.excluded[q] = True
    assert g.tensors[q] not in parse_edit({**GOOD, "column": None}, g).tensors
    with pytest.raises(RecipeError, match="nothing to edit"):
        parse_edit(GOOD, g)
    g.excluded[q] = False
    g.ratio[q, 1] = g.variation[q, 1] = g.weight[q, 1] = math.nan
    with pytest.raises(RecipeError, match="nothing to edit"):
        parse_edit(GOOD, g)


# ------------------------------------------------------------------------------------------------ files

def test_css_survives_the_template_it_is_passed_through():
    css = (Path(__file__).parents[1] / "assets" / "heatmap.css").read_text(encoding="utf-8")
    assert not [bad for bad in ("`", "${", "{{", "\\") if bad in css]


def test_standalone_asks_nothing_of_the_network_and_escapes_names():
    page = standalone_html(grid([f"model.layers.0.mlp.{HOSTILE}.weight"], (HOSTILE, "B")), title=HOSTILE, recipe_text=HOSTILE)
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]{2,}|\ssrc=(?!x)|\shref=|@import|url\(", page, re.I)
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<img" not in page
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])
    assert data["targets"][0]["name"] == HOSTILE


def test_standalone_keeps_a_title_that_spells_a_placeholder():
    page = standalone_html(grid(llama()), title="@@DATA@@", recipe_text="@@JS@@")
    assert "<h1>@@DATA@@</h1>" in page and "<pre>@@JS@@</pre>" in page


# ------------------------------------------------------------------------------------------------ the page

class Served:
    """A page with one heatmap; `edits` collects what it asked for, and an edit is answered like the app answers it."""

    def __init__(self):
        self.edits, self.grid = [], None

    def fresh(self, tensors=None, targets=("Maths", "Code")):
        self.edits.clear()
        self.grid = grid(tensors or llama(), targets)
        self.grid.excluded[self.grid.tensors.index("lm_head.weight") if not tensors else 0] = not tensors
        return payload(self.grid)

    def answer(self, data):
        edit = parse_edit(data, self.grid)
        self.edits.append(edit)
        for name in edit.tensors:
            t = self.grid.tensors.index(name)
            self.grid.fixed[t, edit.target] = edit.action != "reset"
            if edit.action == "set":
                self.grid.weight[t, :] = 1 - edit.weight
                self.grid.weight[t, edit.target] = edit.weight
        return payload(self.grid)


@pytest.fixture(scope="module")
def served():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    from components.heatmap import WAITING, heatmap

    state = Served()

    def on_edit(evt: gr.EventData):
        return state.answer(evt._data)

    with gr.Blocks() as demo:
        view = heatmap(None)
        view.edit(on_edit, None, view, show_progress="hidden")
        gr.Button("wait").click(lambda: WAITING, None, view)
        gr.Button("fill").click(lambda: state.fresh(), None, view)
        gr.Button("wide").click(lambda: state.fresh([f"model.layers.0.mlp.m{n}.weight" for n in range(22)]), None, view)
        gr.Button("hostile").click(
            lambda: state.fresh([f"model.layers.0.mlp.{HOSTILE}.weight"], (HOSTILE, "B")), None, view)
    _, state.url, _ = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield state
    demo.close()


@pytest.fixture
def page(browser, served):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(15000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.goto(served.url)
    page.get_by_text("Pick a pivot and at least one target").wait_for()
    page.get_by_role("button", name="wait").click()
    page.get_by_text("Measuring how far every matrix moved").wait_for()
    page.get_by_role("button", name="fill").click()
    page.locator(".hm-cell").first.wait_for()
    yield page
    context.close()
    assert problems == []


def cell(page, name, target="A"):
    return page.locator(f".hm-card[aria-label^='Target {target}']").get_by_role("gridcell", name=name)


def settled(served, page, count=1):
    """Wait until so many edits were answered and the page announces what is there now."""
    page.wait_for_function("/[^…]$/.test(document.querySelector('.hm [role=status]').textContent)")
    assert len(served.edits) == count
    return served.edits[-1]


@pytest.mark.browser
def test_hover_and_focus_show_the_exact_numbers(page):
    tip = page.get_by_role("tooltip")
    cell(page, "layer 0, k_proj:").hover()
    assert "model.layers.0.self_attn.k_proj.weight" in tip.inner_text() and "4 × 2" in tip.inner_text()
    assert re.search(r"A Maths\s+B Code\s+ratio\s+0\.25\s+0\.75\s", tip.inner_text())
    assert re.search(r"variation\s+4\.0000e-6\s+4\.0000e-6\s+weight\s+0\.4\s+0\.6\b", tip.inner_text())
    page.mouse.move(2, 2)
    assert not tip.is_visible()
    cell(page, "layer 0, q_proj:").focus()
    page.keyboard.press("ArrowRight")
    assert "k_proj" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


@pytest.mark.browser
def test_a_click_sets_a_weight_and_the_answer_is_drawn_in_place(page, served):
    target = cell(page, "layer 1, q_proj:", "B")
    target.evaluate("node => { node.mark = 1; }")
    target.click()
    dialog = page.get_by_role("dialog")
    assert "The other targets share the rest in proportion" in dialog.inner_text()
    dialog.get_by_role("spinbutton").fill("0.126")
    dialog.get_by_role("button", name="Set", exact=True).click()
    edit = settled(served, page)
    assert (edit.target, edit.tensors, edit.action, edit.weight) == (
        1, ("model.layers.1.self_attn.q_proj.weight",), "set", 0.126)
    assert "weight 0.126, fixed" in target.get_attribute("aria-label")
    assert "hm-fixed" in target.get_attribute("class")
    assert "hm-fixed" not in cell(page, "layer 0, q_proj:", "B").get_attribute("class")
    assert target.evaluate("node => node.mark === 1 && node === document.activeElement")
    assert "weight 0.126, fixed" in page.locator(".hm [role=status]").inner_text()
    page.get_by_text("Weight", exact=True).click()
    assert target.get_attribute("data-number") == ".13"


@pytest.mark.browser
def test_keyboard_walks_edits_locks_and_resets(page, served):
    cell(page, "layer 0, q_proj:").focus()
    for key in ("ArrowDown", "End", "Home", "ArrowRight", "ArrowRight"):  # layer header, q_proj, k_proj
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("layer 1, k_proj")
    assert served.edits == []
    page.keyboard.press("Enter")
    page.keyboard.type("0.75")
    page.keyboard.press("Enter")
    assert settled(served, page).weight == 0.75
    for count, (key, action, fixed) in enumerate((("Delete", "reset", False), ("l", "lock", True), ("r", "reset", False)), 2):
        page.keyboard.press(key)
        assert settled(served, page, count).action == action
        assert ("fixed" in page.locator(".hm [role=status]").inner_text()) == fixed
    assert {edit.tensors for edit in served.edits} == {("model.layers.1.self_attn.k_proj.weight",)}


@pytest.mark.browser
def test_row_column_and_corner_edit_together(page, served):
    card = page.locator(".hm-card").first
    heads = (("all of layer 1", 5), ("every up_proj", 2), ("all of model.layers", 10))
    for count, (head, size) in enumerate(heads, 1):
        card.get_by_label(head, exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Lock at present value").click()
        assert len(settled(served, page, count).tensors) == size
    assert page.locator(".hm-card").first.locator(".hm-grid .hm-fixed").count() == 10


@pytest.mark.browser
def test_one_tab_stop_per_grid_and_kept_from_pivot_is_not_edited(page, served):
    assert page.locator(".hm-grid [tabindex='0']").count() == page.locator(".hm-grid").count() == 4
    kept = cell(page, "lm_head:")
    assert "kept from pivot" in kept.get_attribute("aria-label")
    kept.click()
    page.locator(".hm [role=status]", has_text="kept from pivot").wait_for()
    assert not page.get_by_role("dialog").is_visible() and served.edits == []


@pytest.mark.browser
def test_quantity_and_scale_are_switched_here_and_survive_an_update(page, served):
    page.get_by_text("Log variation").click()
    page.get_by_text("Own scale").click()
    first = cell(page, "layer 0, q_proj:")
    assert first.get_attribute("data-number") == "−5.5"  # log10 of 3e-6
    assert page.locator(".hm-card .hm-legend:visible").count() == 2
    first.focus()
    page.keyboard.press("l")
    settled(served, page)
    assert first.get_attribute("data-number") == "−5.5"
    assert page.get_by_role("radio", name="Log variation").is_checked()
    assert page.get_by_role("radio", name="Own scale").is_checked()


@pytest.mark.browser
def test_hostile_names_are_shown_as_text(page):
    page.get_by_role("button", name="hostile").click()
    page.locator(".hm-name", has_text="onerror").wait_for()
    assert page.locator(".hm-name").first.inner_text() == HOSTILE
    assert page.locator(".hm img").count() == 0
    page.locator(".hm-cell").first.hover()
    assert HOSTILE in page.get_by_role("tooltip").inner_text()
    page.locator(".hm-cell").first.click()
    assert HOSTILE in page.get_by_role("dialog").inner_text()


@pytest.mark.browser
def test_narrow_page_scrolls_inside_the_block_only(page):
    page.set_viewport_size({"width": 400, "height": 800})
    page.get_by_role("button", name="wide").click()
    page.get_by_text("m21", exact=True).first.wait_for()
    assert page.evaluate("document.querySelector('.hm-cards').style.gridTemplateColumns").startswith("repeat(1,")
    assert page.evaluate("(box => { box.scrollLeft = 40; return box.scrollLeft; })(document.querySelector('.hm-scroll'))") == 40
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_standalone_page_is_readable_and_read_only(browser, tmp_path):
    g = grid(llama())
    g.fixed[0, 0] = True
    file = tmp_path / "figure.html"
    file.write_text(standalone_html(g, quantity="weight", title=HOSTILE, recipe_text="method: varm"), encoding="utf-8")
    page = browser.new_page()
    requests, problems = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    assert page.get_by_role("radio", name="Weight").is_checked()
    page.locator(".hm-cell").first.click()
    assert "model.embed_tokens.weight" in page.get_by_role("tooltip").inner_text()
    assert "fixed" in page.get_by_role("tooltip").inner_text()
    assert page.get_by_role("dialog").count() == 0
    page.keyboard.press("ArrowRight")
    assert "model.norm.weight" in page.get_by_role("tooltip").inner_text()
    assert page.locator("h1").inner_text() == HOSTILE
    page.close()
    assert requests == [file.as_uri()] and problems == []
