"""The Evaluate tab: what may be asked for, how it is shown, and a whole evaluation in headless Chromium."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import expect

from components.evaluating import asking, showing
from components.evaluating.asking import Form, asked
from components.evaluating.chart import chart
from components.evaluating.running import _followed
from components.state import COLORS, MergeRef, Settings
from components.studio import Studio
from fusion import FusionError, Recipe, RecipeError, finish
from fusion.evaluate import Evaluation, Scores, from_scores, tasks
from tests.browser import open_tab, two_targets
from tests.test_evaluate_judge import serving
from tests.test_page_inspect import choose, serious, served, visiting

PATIENCE_MS = 120_000
FORM = Form(models=["demo/pivot", "demo/target-qwen"], reference="demo/pivot", kind="domains", domains=["math", "stem"], prompts=5,
            longest=64, text="", source="", pieces=10, questions="", endpoint="", judge="", mode="grades", name="judged",
            answer_tokens=1024, verdict_tokens=2048, references="", tasks="", limit=5)
JUDGED = replace(FORM, kind="judge", questions="What is 2 + 2?", endpoint="http://127.0.0.1:9/v1", judge="m")


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio(outputs=tmp_path_factory.mktemp("evaluate") / "outputs")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return Studio(outputs=tmp_path_factory.mktemp("public") / "outputs", public=True)


def ran(studio, form, now=None):
    return finish(asked(studio, form, now or studio.first_selection()).work())


# ── what may be asked for ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("change", "said"), [
    ({"models": ["demo/pivot", "../pivot"]}, "unknown model"), ({"models": ["/etc"]}, "unknown model"),
    ({"models": []}, "no model"),
    ({"models": [["demo/pivot"]]}, "unknown model"), ({"models": "demo/pivot"}, "no model"),
    ({"models": ["demo/pivot"] * 9}, "9 models"), ({"models": ["merge/0123"]}, "unknown model"),
    ({"reference": "demo/target-neox"}, "not among"), ({"reference": ["x"]}, "not among"),
    ({"kind": "arena"}, "unknown way"), ({"kind": ["domains"]}, "unknown way"), ({"domains": []}, "no domain"),
    ({"domains": ["maths"]}, "Did you mean 'math'"), ({"prompts": 0}, "out of range"), ({"prompts": 201}, "out of range"),
    ({"prompts": 7.5}, "out of range"), ({"prompts": float("nan")}, "out of range"), ({"prompts": "10"}, "out of range"),
    ({"prompts": True}, "out of range"), ({"longest": 10**9}, "out of range"),
    ({"kind": "perplexity"}, "nothing to read"), ({"kind": "perplexity", "text": "x" * 200_001}, "too long"),
    ({"kind": "perplexity", "source": "data.txt", "pieces": float("inf")}, "out of range"),
])
def test_what_makes_no_sense_is_refused_before_any_work(studio, change, said):
    with pytest.raises(RecipeError, match=said):
        asked(studio, replace(FORM, **change), studio.first_selection())


@pytest.mark.parametrize(("change", "said"), [
    ({"questions": " "}, "no question"), ({"endpoint": "file:///etc/passwd"}, "no address"), ({"endpoint": None}, "no address"),
    ({"endpoint": "http://me:secret@host/v1"}, "OPENAI_API_KEY"), ({"judge": " "}, "no name"), ({"mode": "both"}, "unknown kind"),
    ({"name": "../out"}, "no folder name"), ({"questions": '{"turns": []}'}, "line 1")])
def test_a_judge_is_checked_before_any_work(studio, change, said):
    with pytest.raises(FusionError, match=said):
        asked(studio, replace(JUDGED, **change), studio.first_selection())


def test_strangers_reach_no_address_no_file_and_no_task(studio, public, monkeypatch):
    monkeypatch.setattr("fusion.evaluate.harness.installed", lambda: True)
    assert list(asking.kinds(public)) == ["domains", "perplexity"] and "lm-eval" in asking.kinds(studio)
    now = public.first_selection()
    for form, said in ((JUDGED, "not offered"), (replace(FORM, kind="lm-eval", tasks="arc"), "not offered"),
                       (replace(FORM, kind="perplexity", source="/etc/hostname"), "no text is pasted"),
                       (replace(FORM, prompts=51), "out of range")):
        with pytest.raises(RecipeError, match=said):
            asked(public, form, now)


def test_lm_eval_is_offered_only_where_it_is_installed(studio, monkeypatch):
    monkeypatch.setattr("fusion.evaluate.harness.installed", lambda: False)
    with pytest.raises(RecipeError, match="pip install lm-eval"):
        asked(studio, replace(FORM, kind="lm-eval", tasks="arc"), studio.first_selection())


def test_a_merge_in_memory_is_evaluated_and_is_nobody_elses(studio):
    now = studio.first_selection()
    merge = finish(studio.try_merge(now, Settings()))
    form, mine = replace(FORM, models=[merge.key, "demo/pivot"]), now.with_merge(merge)
    found = ran(studio, form, mine)
    done = found.evaluation
    assert [row.model for row in done.table.rows] == [merge.title, "Pivot"] and done.table.baseline == "Pivot"
    assert done.settings["models"][merge.title] == f"{merge.title}, in memory"
    assert Recipe.from_yaml(done.details["recipes"][merge.title]) == studio.merge_recipe(merge.key)
    assert "# VARM #1 is only in memory: save it in Merge as varm-1 first\n" in found.command
    assert found.command.endswith("evaluate ./outputs/varm-1 assets/demo/pivot --domains --prompts 5 --only math,stem "
                                  "--baseline assets/demo/pivot --out my-evaluation")
    with pytest.raises(RecipeError, match="unknown model"):
        asked(studio, form, now)  # another visitor
    with pytest.raises(RecipeError, match="no longer known"):
        asked(studio, replace(form, models=["merge/gone"], reference=""), now.with_merge(MergeRef("merge/gone", "VARM #2")))


def test_pasted_text_is_read_and_lower_is_better(studio):
    text = "The capital of Norway is Oslo.\n\nA word that rhymes with frog is log."
    found = ran(studio, replace(FORM, kind="perplexity", text=text))
    table = found.evaluation.table
    assert table.better == "low" and "2 of 2 texts" in table.title
    best = min(table.rows, key=lambda row: row.cells[1].value).model
    assert table.best("nats per character") == {best} and f"<b title='the best of this column'>{_value(table, best)}</b>" in \
        showing.table_html(table)
    assert found.command.startswith("# with the text above saved as text.txt\n") and "--perplexity text.txt" in found.command
    assert "piece 2" in showing.answers_html(found.evaluation)


def _value(table, model):
    row = next(row for row in table.rows if row.model == model)
    return f"{row.cells[1].value:.4f}"


def test_a_judge_is_asked_and_its_reasons_are_shown(studio):
    with serving(lambda body: "Good <b>enough</b>. [[7]]") as server:
        found = ran(studio, replace(JUDGED, endpoint=server.url))
    assert len(server.requests) == 2 and (studio.outputs / "judged" / "table.md").is_file()
    page = showing.answers_html(found.evaluation)
    assert page.count("7 of 10") == 2 and "Judge: Good &lt;b&gt;enough" in page
    assert "--judge prompts.txt --endpoint" in found.command and "OPENAI_API_KEY" in found.command
    with pytest.raises(FusionError, match="exists already"):
        asked(studio, replace(JUDGED, endpoint=server.url), studio.first_selection())


def test_errors_name_titles_not_paths(studio, monkeypatch):
    folder = str(studio.entry("demo/pivot").folder)

    def broken(*_, **__):
        raise FusionError(f"cannot be read ({folder}/config.json)")
        yield
    monkeypatch.setattr("fusion.evaluate.by_questions", broken)
    with pytest.raises(FusionError) as caught:
        ran(studio, FORM)
    assert folder not in str(caught.value) and "Pivot/config.json" in str(caught.value)


def test_the_menu_follows_the_selection_but_keeps_a_persons_choice(studio):
    was = studio.first_selection()
    now = was.with_merge(MergeRef("merge/1", "VARM #1"))
    assert _followed(studio, now, was, asking.usual(was)) == ("merge/1", was.pivot, *was.targets)
    assert _followed(studio, now, was, ("demo/source-qwen",)) == ("merge/1", "demo/source-qwen")
    assert _followed(studio, now, now, ("demo/source-qwen", "gone")) == ("demo/source-qwen",)


# ── how it is shown ──────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def hostile():
    """Two models with hostile names; the first is right twice, the second once and is cut off."""
    import numpy as np

    names = ("<img src=x onerror=a()>", "${b()}|{{c}}")
    cut = np.array([[False, False, False], [False, True, False]])
    scores = Scores("Right", names, ("1", "2", "3"), ("math", "<i>stem", "coding"), np.array([[1, 1, 0], [1, 0, 0]], float), cut,
                    right_or_wrong=True, unit="%", scale=100)
    records = [{"model": name, "domain": domain, "prompt": f"<b>{i}", "reply": "<script>d()</script>", "tokens": 3,
                "right": bool(scores.values[m, i]), "finish": "length" if cut[m, i] else "stop"}
               for m, name in enumerate(names) for i, domain in enumerate(scores.domains)]
    return Evaluation("domains", {}, from_scores(scores, names[0]), scores, tuple(records))


def test_foreign_text_stays_text(hostile):
    page = showing.table_html(hostile.table) + showing.answers_html(hostile) + showing.summary(hostile) + \
        showing.notes_html(hostile.table)
    assert not any(tag in page for tag in ("<img", "<script", "<b>0", "<i>stem")) and "&lt;script&gt;" in page
    drawn = chart(hostile.table)
    assert "<" not in "".join((*(trace.name for trace in drawn.data), *drawn.data[0].theta))


def test_the_table_says_who_is_best_what_changed_and_what_was_cut_off(hostile):
    page = showing.table_html(hostile.table)
    best, other = page.split("<tbody>")[1].split("</tr>")[:2]
    assert best.count("the best of this column") == 2 and "the best" not in other  # math is a draw, coding too
    assert "reference" in best and "-50.0 %" in other and "<td>1.000</td>" in other
    assert "⚠ 1/3" in other and "0/3" in best
    assert "1 of 6 answers were cut off" in showing.summary(hostile)
    answers = showing.answers_html(hostile)
    assert answers.count("ev-same") == 2 and "cut off by its length" in answers and "A 1/1" in answers and "B 0/1" in answers


def test_the_chart_has_the_letters_and_colours_of_the_table(hostile):
    drawn = chart(hostile.table)
    assert [trace.name[:4] for trace in drawn.data] == ["A · ", "B · "] and drawn.data[1].line.color == COLORS[1]
    assert drawn.data[0].r == (100, 100, 0, 100) and drawn.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert chart(replace(hostile.table, columns=("average",) * 4)) is None


# ── in the browser ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def begin(page, models=("Pivot", "Target Qwen"), prompts=5):
    open_tab(page, "Evaluate")
    menu = page.locator("#evaluate-models")
    for title in ("Pivot", "Target Qwen", "Target NeoX"):
        if title not in models:
            menu.locator(".token", has_text=title).locator(".token-remove").click()
    page.locator("#evaluate-prompts input[type=number]").fill(str(prompts))
    page.keyboard.press("Tab")
    page.locator("#evaluate-run").click()


def downloaded(page, kind):
    with page.expect_download() as started:
        page.locator(f"#evaluate-{kind}").click()
    return Path(started.value.path()).read_text()


@pytest.mark.browser
@pytest.mark.parametrize(("look", "width"), [("light", 1440), ("dark", 400)])
def test_two_models_are_evaluated_and_the_result_survives_a_reload(browser, tmp_path, look, width):
    with served(two_targets(Studio(outputs=tmp_path / "outputs"))) as url, visiting(browser, url, width, look) as page:
        begin(page)
        table = page.locator("#evaluate-table")
        expect(table.locator("tbody tr")).to_have_count(2, timeout=PATIENCE_MS)
        expect(table).to_contain_text("vs Pivot")
        for _ in range(2):
            expect(page.locator("#evaluate-chart .scatterlayer .trace")).to_have_count(2, timeout=PATIENCE_MS)
            rows = list(csv.DictReader(io.StringIO(downloaded(page, "csv"))))
            average = {row["model"]: float(row["value"]) for row in rows if row["column"] == "average"}
            assert f"{average['Target Qwen']:.1f}" in table.locator("tbody tr").nth(1).inner_text()
            assert "| Target Qwen |" in downloaded(page, "markdown")
            assert len(json.loads(downloaded(page, "json"))["answers"]) == 2 * 8 * 5
            expect(page.locator("#evaluate-command")).to_contain_text("--baseline")
            page.reload()
            open_tab(page, "Evaluate")
        page.locator("#evaluate-answers-box").get_by_text("Every prompt and every answer").click()
        page.locator("#evaluate-answers summary").first.click()
        expect(page.locator("#evaluate-answers details[open] li")).to_have_count(5)
        page.get_by_label("Only where the models differ").check()
        expect(page.locator("#evaluate-answers details[open] li.ev-same:visible")).to_have_count(0)
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


@pytest.fixture
def slow_answers(monkeypatch):
    """Answers take until they are released, a step every tenth of a second."""
    real, released = tasks.answer, threading.Event()

    def slow(model, conversations, max_new_tokens, meter, keep=None):
        while not released.is_set():
            yield meter.step(note=model.name)
            time.sleep(0.1)
        return (yield from real(model, conversations, max_new_tokens, meter, keep))

    monkeypatch.setattr(tasks, "answer", slow)
    yield released
    released.set()


@pytest.mark.browser
def test_a_run_survives_a_reload_and_can_be_stopped(browser, tmp_path, slow_answers):
    studio = two_targets(Studio(outputs=tmp_path / "outputs"))
    with served(studio) as url, visiting(browser, url) as page, visiting(browser, url) as stranger:
        begin(page)
        expect(page.get_by_role("progressbar", name="Asking Pivot")).to_be_visible(timeout=PATIENCE_MS)
        page.reload()
        open_tab(page, "Evaluate")
        expect(page.get_by_role("progressbar", name="Asking Pivot")).to_be_visible(timeout=PATIENCE_MS)
        open_tab(stranger, "Evaluate")
        expect(stranger.locator("#evaluate-status")).not_to_contain_text("Asking")
        page.locator("#evaluate-stop").click()
        expect(page.locator("#evaluate-status")).to_contain_text("Stopped", timeout=PATIENCE_MS)
        expect(page.locator("#evaluate-run")).to_be_visible()
        assert all(slot.users == 0 for slot in studio.pool._slots.values())  # the model was given back
        slow_answers.set()
        page.locator("#evaluate-run").click()
        expect(page.locator("#evaluate-table tbody tr")).to_have_count(3, timeout=PATIENCE_MS)


@pytest.mark.browser
def test_the_form_shows_what_belongs_to_it_and_says_what_is_wrong(browser, tmp_path):
    with served(Studio(outputs=tmp_path / "outputs")) as url, visiting(browser, url) as page:
        open_tab(page, "Evaluate")
        page.locator("#evaluate-kind").get_by_label("Perplexity").click()
        expect(page.locator("#evaluate-text")).to_be_visible()
        expect(page.locator("#evaluate-prompts")).to_be_hidden()
        page.locator("#evaluate-run").click()
        expect(page.get_by_text("there is nothing to read").last).to_be_visible()
        page.locator("#evaluate-kind").get_by_label("A judge").click()
        expect(page.locator("#evaluate-endpoint")).to_be_visible()
        assert page.locator("#evaluate-judge input[type=password]").count() == 0
        choose(page, "evaluate-reference", "Target Qwen")
        page.locator("#evaluate-kind").get_by_label("Perplexity").click()
        page.locator("#evaluate-text textarea").fill("The capital of Norway is Oslo.\n\nMy friend found the castle.")
        page.locator("#evaluate-run").click()
        expect(page.locator("#evaluate-table")).to_contain_text("vs Target Qwen", timeout=PATIENCE_MS)
        expect(page.locator("#evaluate-chart")).to_be_hidden()


@pytest.mark.browser
def test_a_public_page_offers_no_judge_and_no_files(browser, public):
    with served(public) as url, visiting(browser, url) as page:
        open_tab(page, "Evaluate")
        expect(page.locator("#evaluate-kind label")).to_have_count(2)
        page.locator("#evaluate-kind").get_by_label("Perplexity").click()
        expect(page.locator("#evaluate-text")).to_be_visible()
        expect(page.locator("#evaluate-source")).to_be_hidden()
