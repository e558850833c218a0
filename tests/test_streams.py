"""What the page's handlers stream: nothing that a later yield leaves out, and not more often than a page can draw."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import gradio as gr
import pytest

from components import inspecting
from components.inspecting import paced
from components.page import build
from components.state import Selection, Settings
from components.studio import Studio
from fusion import FusionError, finish
from fusion.errors import CheckpointError
from fusion.progress import Progress
from tests.conftest import save_family
from tests.streams import Stream, streams, watch

ASKED = SimpleNamespace(session_hash="one")


class Page:
    """A page of a tiny family of which nobody has seen anything yet; `run` drives one of its handlers to its end."""

    def __init__(self, folder):
        names = [made.name for made in save_family(folder / "outputs", "llama")]
        self.studio = Studio(outputs=folder / "outputs", family=folder / "none")
        self.now = Selection(f"outputs/{names[0]}", tuple(f"outputs/{name}" for name in names[1:]))
        self.blocks = build(self.studio)
        self.wrong = watch(self.blocks)

    def run(self, name: str, *values) -> list:
        event = next(its for its in streams(self.blocks) if its.fn.__qualname__.endswith(name))
        made = event.fn(*values)
        return asyncio.run(_all(made)) if hasattr(made, "__aiter__") else list(made)


async def _all(made) -> list:
    return [given async for given in made]


@pytest.fixture
def page(tmp_path):
    return Page(tmp_path)


@pytest.fixture
def large(monkeypatch):
    """Every family counts as a large one: estimated first, measured and inspected when that is asked for."""
    monkeypatch.setattr(Studio, "measures_at_once", lambda studio, selection: False)
    monkeypatch.setattr(inspecting, "AT_ONCE_BYTES", 0)


def test_the_first_look_is_some_events_not_a_thousand(page):
    """Waiting, heatmap, heatmap with flags: the price of every yield is that of drawing the tab."""
    given = page.run("_bind.<locals>.look", page.now, Settings(), ())
    assert page.wrong == [] and 2 <= len(given) <= 8
    assert given[-1][3]["blocks"] and given[-1][3]["closer"] and "fs-flags" in given[-1][2].value
    again = page.run("_bind.<locals>.look", page.now, Settings(), (page.now.pivot, *page.now.targets))
    assert len(again) == 1 and page.wrong == []


def test_what_belongs_to_other_models_goes_at_once(page):
    """Heatmap, charts, table, downloads and summary of a former selection are cleared with the first event."""
    first = page.run("_bind.<locals>.look", page.now, Settings(), ("other/pivot", "other/target"))[0]
    heat, glance, *charts = first[3], *first[7:11]
    assert "waiting" in heat or "blocks" in heat
    assert glance == "" and charts == [None, None, None] and all(button.value is None for button in first[11:])
    kept = page.run("_bind.<locals>.look", page.now, Settings(), (page.now.pivot, *page.now.targets))[0]
    assert all(its == gr.skip() for its in kept[7:])


def test_what_cannot_be_measured_is_not_told_to_pick_models(page):
    torn = Selection(page.now.pivot, (page.now.pivot + "-gone",))
    (last,) = page.run("_bind.<locals>.look", torn, Settings(), ())
    assert "cannot be measured" in last[3]["waiting"] and "unknown model" in last[0].value and page.wrong == []


def test_no_handler_takes_back_what_it_gave(page, large):
    page.run("_bind.<locals>.look", page.now, Settings(), ())
    page.run("_bind_work.<locals>.refine", page.now, 0, (), ASKED)
    page.run("_bind_work.<locals>.measure_now", page.now, 0, ASKED)
    page.run("_bind_work.<locals>.look_closer", page.now, Settings(), 0, ASKED)
    page.run("_bind.<locals>.look", page.now, Settings(), ())
    page.run("build.<locals>.show", *page.now.targets, page.now, ASKED)
    page.run("merge_and_try", page.now, Settings(method="linear"))
    page.run("merge_and_try", page.now, Settings(exclude=("nothing*",)))
    page.run("bind.<locals>.check", page.now.targets[0], page.now, ASKED)
    page.run("bind.<locals>.check_saved", page.now.targets[0].removeprefix("outputs/"), page.now, ASKED)
    page.run("bind.<locals>.check_saved", "nothing", page.now, ASKED)
    assert page.wrong == []


def test_no_handler_takes_back_what_it_gave_when_its_work_fails(page, monkeypatch):
    def broken(*_, **__):
        yield Progress("Reading")
        raise CheckpointError("a shard went away")

    monkeypatch.setattr(inspecting, "inspect", broken)
    given = page.run("_bind.<locals>.look", page.now, Settings(), ())
    assert "a shard went away" in given[-1][0].value
    page.run("_bind_work.<locals>.look_closer", page.now, Settings(), 0, ASKED)
    assert page.wrong == []


def test_a_save_that_is_followed_takes_nothing_back(page):
    begin = next(event.fn for event in page.blocks.fns.values() if event.api_name == "save")
    job = begin("kept", page.now, Settings(method="linear"))
    given = page.run("bind_saving.<locals>.attach", job)
    assert "Saved as" in given[-1][0].value and page.wrong == []


@pytest.mark.parametrize(("given", "lost"), [
    ([["a", gr.skip()], [gr.skip(), 1]], ["value"]), ([[{"blocks": 1}, 1], [gr.skip(), 1]], ["value"]),
    ([[gr.HTML("", visible=True), 1], [gr.HTML(visible=False), 1]], ["value"]),
    ([[gr.HTML("", visible=True), 1], ["b", 1]], ["visible"]),
    ([[gr.skip(), 1], ["a", 2], ["b", 3]], []), ([[gr.HTML("", visible=True), 1], [gr.HTML("x", visible=False), 1]], [])])
def test_what_is_lost_would_be_seen(given, lost):
    wrong = []
    seen = Stream("handler", [gr.HTML(elem_id="one"), gr.Number(elem_id="two")], wrong)
    for values in given:
        seen.add(values)
    assert [words.rsplit(" ", 1)[1] for words in wrong] == lost


def test_progress_reaches_a_page_five_times_a_second_at_most(monkeypatch):
    clock = iter(range(100_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 100)  # every look at the clock takes 10 ms

    def work(steps: int):
        for step in range(steps):
            yield Progress("Reading", step)
        return "found"

    shown = []
    assert finish(paced(work(1000)), shown.append) == "found"
    assert shown[0].done == 0 and 30 <= len(shown) <= 51
    assert finish(paced(work(0))) == "found"


def test_a_work_that_is_left_ends_and_one_that_fails_says_so():
    ended = []

    def work():
        try:
            yield Progress("Reading")
            raise FusionError("broken")
        finally:
            ended.append(True)

    left = paced(work())
    next(left)
    left.close()
    assert ended == [True]
    with pytest.raises(FusionError, match="broken"):
        finish(paced(work()))
