"""The Chat tab: what stands in the columns, what the handlers refuse, and the page itself in a browser."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import torch

from components.chat import build
from components.chat.columns import checked_keys, default_keys, header, next_keys
from components.chat.handlers import MAX_TURNS, Handlers
from components.chat.history import NOT_ASKED, Turn, messages_for, turn_at, view
from components.chat.layout import MAX_PROMPT_CHARS
from components.chat.running import Running
from components.state import MergeRef, Selection
from fusion.chat import ChatModel, Reply, Sampling
from fusion.errors import CheckpointError, RecipeError
from tests.test_chat import tiny_chat

HOSTILE = "Look: <img src=x onerror=\"window.hacked=1\"><script>window.hacked=2</script> ${window.hacked=3} **done**"
PICKED = Selection("demo/pivot", ("demo/broken", "demo/hostile"), ("demo/a", "demo/b"))
MERGE = MergeRef("merge/1", "Merge 1")


class Scripted(torch.nn.Module):
    """Writes the given tokens, one every few milliseconds, through the same door as `generate`."""

    device = torch.device("cpu")

    def __init__(self, ids: list[int]):
        super().__init__()
        self.ids = ids

    def generate(self, input_ids, streamer, max_new_tokens, stopping_criteria, **_):
        streamer.put(input_ids)
        for i in self.ids[:max_new_tokens]:
            time.sleep(0.003)
            streamer.put(torch.tensor([i]))
            if stopping_criteria[0](input_ids, None).any():
                break
        streamer.end()


class FakeStudio:
    """Four members of the real one, over tiny random models; "demo/broken" fails and "demo/hostile" writes HTML."""

    def __init__(self):
        self.examples = {"math": ["What is 17 times 23? " * 5], "coding": ["Reverse <b>a list</b>."]}
        self.titles = {"demo/pivot": "Pivot", "demo/a": "Source A", "demo/b": "Source <i>B</i>", "demo/broken": "Broken",
                       "demo/hostile": "Hostile", "merge/1": "Merge 1"}
        plain = tiny_chat(context=100_000, endless=True)
        self.models: dict[str, ChatModel] = {
            "demo/pivot": plain, "merge/1": tiny_chat(seed=4, context=100_000, endless=True),
            "demo/a": tiny_chat("qwen2", seed=1, context=100_000, endless=True),
            "demo/b": tiny_chat("neox", seed=1, context=100_000, endless=True),
            "demo/hostile": replace(plain, model=Scripted([*plain.encode(HOSTILE), 2]), stop_ids=frozenset({2}))}

    def title(self, key):
        return self.titles[key]

    def role(self, key, selection):
        return ("merge" if key.startswith("merge/") else "pivot" if key == selection.pivot
                else "source" if key in selection.sources else "target")

    @contextmanager
    def chat_model(self, key, selection):
        if key not in self.models:
            raise CheckpointError("The file is cut short", where=self.title(key), todo="Download it again.")
        yield self.models[key]


# ── columns and history ───────────────────────────────────────────────────────────────────────────────────────────


def test_columns_start_with_newest_merge_two_sources_and_pivot():
    assert default_keys(PICKED) == ["demo/a", "demo/b", "demo/pivot", "demo/broken"]
    assert default_keys(PICKED.with_merge(MERGE)) == ["merge/1", "demo/a", "demo/b", "demo/pivot"]
    assert default_keys(Selection("demo/pivot")) == ["demo/pivot", None, None, None]


def test_a_new_merge_takes_the_first_column_and_the_others_keep_their_place():
    keys = ["demo/b", "demo/a", "demo/pivot", "demo/hostile"]
    assert next_keys(PICKED, keys, ()) == keys
    merged = PICKED.with_merge(MERGE)
    assert next_keys(merged, keys, ()) == ["merge/1", "demo/b", "demo/a", "demo/pivot"]
    again = merged.with_merge(MergeRef("merge/2", "Merge 2"))
    assert next_keys(again, ["merge/1", "demo/b", "demo/a", "demo/pivot"], ("merge/1",)) == [
        "merge/2", "demo/b", "demo/a", "demo/pivot"]
    assert next_keys(again, ["demo/b", "demo/a", "demo/pivot", "merge/1"], ("merge/1", "merge/2"))[0] == "demo/b"
    other = Selection("demo/pivot", (), ("demo/b",))
    assert next_keys(other, keys, ()) == ["demo/b", None, "demo/pivot", None]


@pytest.mark.parametrize(("keys", "count"), [
    (["demo/a", "/etc/passwd", None, None], 2), (["demo/a"] * 4, 5), (["demo/a"] * 4, True), ([None] * 4, 3)])
def test_unknown_models_and_numbers_of_columns_are_refused(keys, count):
    with pytest.raises(RecipeError):
        checked_keys(PICKED, keys, count)


def test_a_key_in_a_hidden_column_does_not_matter():
    assert checked_keys(PICKED, ["demo/a", None, "gone", None], 2) == ["demo/a"]


def test_columns_have_the_same_turns_and_models_read_only_what_they_answered():
    said, failed = Reply("Hello.", 2, 1, "stop"), Reply(finish="error", error="too large")
    talk = (Turn("Hi", Sampling(), (("a", said), ("b", failed))), Turn("Bye", Sampling(), (("a", said),)))
    assert [len(view(talk, key)) for key in ("a", "b", None)] == [4, 4, 4]
    assert [m["content"][0]["text"] for m in view(talk, "b")[1::2]] == ["⚠️ too large", NOT_ASKED]
    assert [m["content"] for m in messages_for(talk, "a", "New")] == ["Hi", "Hello.", "Bye", "Hello.", "New"]
    assert messages_for(talk, "b", "New") == [{"role": "user", "content": "New"}]
    assert [turn_at(talk, i) for i in (0, 1, 3, 4, -1, "0", True)] == [0, 0, 1, -1, -1, -1, -1]


def test_the_header_escapes_and_tells_how_it_ended():
    shown = header("<b>", Reply("x", 1_234, 10.0, "length", notes=("<script>",)))
    assert "1,234 tok · 123.4 tok/s" in shown and "stopped by length" in shown
    assert "<script>" not in shown and "&lt;b&gt;" in shown
    assert "reading the prompt" in header("pivot", Reply(status="reading the prompt …"))


def test_one_visitor_has_one_conversation_at_a_time():
    running = Running()
    stop = running.begin("s")
    with pytest.raises(RecipeError, match="still answering"):
        running.begin("s")
    assert not running.begin("other").is_set()
    running.stop("s")
    assert stop.is_set()
    running.end("s")
    assert not running.begin("s").is_set()


# ── handlers ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def studio() -> FakeStudio:
    return FakeStudio()


@pytest.fixture(scope="module")
def handlers(studio) -> Handlers:
    with gr.Blocks():
        tab = build(studio, gr.State(PICKED))
    return Handlers(studio, tab)


def ask(handlers: Handlers, prompt="Hi", talk=(), columns=2, keys=("demo/a", "demo/b", None, None), system="",
        temperature=0, top_p=1, max_tokens=8, seed=0):
    """Everything that one call of `chat` shows: the last value of every component."""
    shown = {}
    for update in handlers.chat(gr.Request(session_hash="t"), prompt, talk, PICKED, columns, *keys, system, temperature,
                                top_p, max_tokens, seed):
        shown |= update
    return shown


def test_chat_asks_all_columns_and_keeps_the_conversation(handlers):
    shown = ask(handlers)
    [turn] = shown[handlers.tab.conversation]
    assert {key: (reply.finish, reply.tokens) for key, reply in turn.replies} == {
        "demo/a": ("length", 8), "demo/b": ("length", 8)}
    shown = ask(handlers, "Again", shown[handlers.tab.conversation])
    assert [turn.prompt for turn in shown[handlers.tab.conversation]] == ["Hi", "Again"]
    assert [len(shown[bot]) for bot in handlers.tab.bots] == [4, 4, 4, 4]
    assert "Again" in shown[handlers.tab.rendered[0]] and turn.reply("demo/a").text in shown[handlers.tab.rendered[0]]


@pytest.mark.parametrize("wrong", [
    {"prompt": "x" * (MAX_PROMPT_CHARS + 1)}, {"columns": 7}, {"keys": ("nobody",) * 4}, {"temperature": 2.5},
    {"temperature": None}, {"top_p": 0}, {"max_tokens": 100_000}, {"seed": None}, {"system": "x" * 5_000},
    {"talk": (Turn("Hi", Sampling()),) * MAX_TURNS}])
def test_senseless_requests_are_refused_in_words(handlers, wrong):
    with pytest.raises(gr.Error) as caught:
        ask(handlers, **wrong)
    assert caught.value.title == "Not sent" and not caught.value.print_exception
    assert ask(handlers)[handlers.tab.conversation], "a refused request blocks the next one"


def retry(handlers: Handlers, talk, temperature, seed=3):
    shown = {}
    for update in handlers.retry(gr.Request(session_hash="t"), talk, PICKED, 2, "demo/a", "demo/b", None, None, "",
                                 temperature, 1, 8, seed):
        shown |= update
    return shown


def test_retry_goes_on_to_the_next_seed_unless_the_answer_is_greedy(handlers):
    warm = ask(handlers, temperature=1, seed=3)[handlers.tab.conversation]
    shown = retry(handlers, warm, 1)
    assert shown[handlers.tab.seed] == 4
    [again] = shown[handlers.tab.conversation]
    assert again.prompt == "Hi" and again.sampling.seed == 4
    assert again.reply("demo/a").text != warm[0].reply("demo/a").text
    cold = ask(handlers, seed=3)[handlers.tab.conversation]
    shown = retry(handlers, cold, 0)
    assert handlers.tab.seed not in shown
    assert shown[handlers.tab.conversation][0].reply("demo/a").text == cold[0].reply("demo/a").text


# ── in the browser ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def url(studio):
    with gr.Blocks() as demo:
        selection = gr.State(PICKED)
        with gr.Tabs():
            with gr.Tab("Chat"):
                build(studio, selection)
            with gr.Tab("Merge"):
                gr.Button("Make a merge").click(lambda picked: picked.with_merge(MERGE), selection, selection)
    demo.queue(default_concurrency_limit=8)
    css = (Path(__file__).parents[1] / "assets/chat.css").read_text()
    address = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, css=css, run_history=False)[1]
    yield address
    demo.close()


@pytest.fixture
def page(browser, url):
    from playwright.sync_api import expect

    page, errors = browser.new_page(viewport={"width": 1440, "height": 1000}), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    expect(page.locator("#chat-prompt textarea")).to_be_visible(timeout=30_000)
    yield page
    hacked = page.evaluate("window.hacked")
    page.close()
    assert not errors and hacked is None


def tokens(page, count: int) -> None:
    from playwright.sync_api import expect

    box = page.locator("#chat-max-tokens input[type=number]")
    if not box.is_visible():
        page.locator("#chat-settings > button").click()
        expect(box).to_have_value("256")
        page.wait_for_timeout(300)  # the slider sets its value once more when it appears, faster than any person types
    box.fill(str(count))
    box.blur()
    expect(box).to_have_value(str(count))


def idle(page) -> None:
    """Wait until the answers are complete and the page stands still: the end of an answer moves what a test would click."""
    from playwright.sync_api import expect

    from tests.browser import settle

    expect(page.locator("#chat-clear")).to_be_enabled(timeout=60_000)
    settle(page)


def send(page, text: str, wait: bool = True) -> None:
    from playwright.sync_api import expect

    page.locator("#chat-prompt textarea").fill(text)
    page.locator("#chat-prompt textarea").press("Enter")
    if wait:
        # A short answer is over before one could see that Stop was enabled; the emptied box tells that it was sent.
        expect(page.locator("#chat-prompt textarea")).to_have_value("", timeout=60_000)
        idle(page)


def said(page, column: str, who: str):
    return page.locator(f"#chat-bot-{column} [data-testid={who}]")


def pick(page, column: str, title: str) -> None:
    page.locator(f"#chat-model-{column} input").click()
    page.locator(f"#chat-model-{column}").get_by_role("option", name=title, exact=True).click()


@pytest.mark.browser
def test_send_fills_all_columns_with_badge_and_rendered_prompt(page):
    from playwright.sync_api import expect

    tokens(page, 20)
    send(page, "How are you?")
    for column in "abc":
        expect(said(page, column, "user")).to_have_text("How are you?")
        expect(page.locator(f"#chat-head-{column} .fc-badge")).to_have_text("stopped by length")
        expect(page.locator(f"#chat-head-{column} .fc-stats")).to_contain_text("20 tok ·")
    expect(page.locator("#chat-bot-d")).not_to_be_visible()
    expect(page.locator("#chat-prompt textarea")).to_have_value("")
    expect(page.locator("#chat-live .fc-live")).to_have_text("All answers are complete.")
    page.locator("#chat-rendered > button").click()
    expect(page.locator("#chat-rendered-b .cm-content")).to_contain_text("<|im_start|>assistant")


@pytest.mark.browser
def test_stop_keeps_what_was_written(page):
    from playwright.sync_api import expect

    tokens(page, 1024)
    send(page, "Never end", wait=False)
    expect(page.locator("#chat-head-a .fc-stats")).to_be_visible(timeout=60_000)
    expect(page.locator("#chat-prompt .stop-button")).to_have_attribute("aria-label", "Stop all models")
    page.locator("#chat-stop").click()
    for column in "abc":
        expect(page.locator(f"#chat-head-{column} .fc-badge")).to_have_text("stopped", timeout=5_000)
    expect(page.locator("#chat-clear")).to_be_enabled()
    expect(said(page, "a", "bot")).not_to_be_empty()


@pytest.mark.browser
def test_undo_retry_edit_and_clear_keep_the_columns_in_step(page):
    from playwright.sync_api import expect

    tokens(page, 6)
    send(page, "First")
    send(page, "Second")
    expect(said(page, "b", "user")).to_have_count(2)
    page.locator("#chat-undo").click()
    for column in "abc":
        expect(said(page, column, "user")).to_have_count(1)
    expect(page.locator("#chat-prompt textarea")).to_have_value("Second")
    send(page, "Third")
    page.locator("#chat-bot-b").get_by_label("Edit").first.click()
    box = page.locator("#chat-bot-b textarea")
    box.fill("Changed")
    page.locator("#chat-bot-b").get_by_label("Submit").click()
    for column in "abc":
        expect(said(page, column, "user")).to_have_text(["Changed"], timeout=60_000)
    idle(page)
    tokens(page, 9)
    page.locator("#chat-bot-c").get_by_label("Retry").click()
    expect(page.locator("#chat-head-a .fc-stats")).to_contain_text("9 tok", timeout=60_000)
    expect(said(page, "a", "user")).to_have_text(["Changed"])
    idle(page)
    page.locator("#chat-clear").click()
    for column in "abc":
        expect(said(page, column, "user")).to_have_count(0)
        expect(page.locator(f"#chat-head-{column} .fc-stats")).to_have_count(0)
    expect(page.locator("#chat-export")).to_be_disabled()


@pytest.mark.browser
def test_two_to_four_columns_and_a_model_that_was_not_asked(page):
    from playwright.sync_api import expect

    tokens(page, 5)
    page.locator("#chat-count label", has_text="2").click()
    expect(page.locator("#chat-column-c")).not_to_be_visible()
    send(page, "Hi")
    page.locator("#chat-count label", has_text="4").click()
    expect(page.locator("#chat-column-d")).to_be_visible()
    expect(said(page, "c", "bot")).to_contain_text("Not asked yet")
    page.locator("#chat-retry").click()
    expect(page.locator("#chat-head-c .fc-stats")).to_contain_text("5 tok", timeout=60_000)
    idle(page)


@pytest.mark.browser
def test_a_failing_and_a_hostile_model_stay_in_their_columns(page):
    from playwright.sync_api import expect

    tokens(page, 400)
    pick(page, "a", "Broken")
    pick(page, "b", "Hostile")
    send(page, "<script>window.hacked=4</script> Hi")
    expect(said(page, "a", "bot")).to_contain_text("Broken: The file is cut short. Download it again.")
    expect(page.locator("#chat-head-a .fc-badge")).to_have_text("error")
    expect(said(page, "b", "bot").locator("strong")).to_have_text("done")
    expect(said(page, "b", "bot").locator("script")).to_have_count(0)
    assert page.evaluate("[...document.querySelectorAll('#chat-bot-b img')].every(e => !e.hasAttribute('onerror'))")
    expect(page.locator("#chat-head-c .fc-stats")).to_contain_text("400 tok")


@pytest.mark.browser
def test_a_new_merge_stands_in_the_first_column(page):
    from playwright.sync_api import expect

    page.get_by_role("tab", name="Merge").click()
    page.get_by_role("button", name="Make a merge").click()
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#chat-model-a input")).to_have_value("Merge 1", timeout=10_000)
    expect(page.locator("#chat-model-b input")).to_have_value("Source A")
    expect(page.locator("#chat-head-a .fc-role")).to_have_text("merge")
    tokens(page, 5)
    send(page, "Hi")
    expect(page.locator("#chat-head-a .fc-stats")).to_contain_text("5 tok")


@pytest.mark.browser
def test_an_example_is_sent_and_the_conversation_can_be_downloaded(page):
    from playwright.sync_api import expect

    tokens(page, 5)
    page.locator("#chat-domain label", has_text="coding").click()
    page.locator("#chat-examples button", has_text="Reverse <b>a list</b>.").click()
    expect(page.locator("#chat-export")).to_be_enabled(timeout=20_000)
    with page.expect_download() as download:
        page.locator("#chat-export").click()
    assert download.value.suggested_filename == "fusechat-conversation.jsonl"
    lines = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]
    assert [line["model"] for line in lines] == ["Source A", "Source <i>B</i>", "Pivot"]
    assert all(line["messages"][0]["content"] == "Reverse <b>a list</b>." for line in lines)
    assert lines[0]["turns"][0]["sampling"]["max_new_tokens"] == 5 and lines[0]["turns"][0]["finish_reason"] == "length"


@pytest.mark.browser
def test_a_narrow_page_does_not_overflow_and_every_control_has_a_name(page):
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 400, "height": 860})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.evaluate("document.querySelector('#chat-columns').scrollLeft = 5000")
    pick(page, "c", "Broken")
    expect(page.locator("#chat-prompt button")).to_have_attribute("aria-label", "Send to all models")
    expect(page.locator("#chat-bot-a [role=log]")).to_have_attribute("aria-live", "off")
    nameless = page.evaluate("""() => [...document.querySelectorAll('#chat-columns ~ * button, #chat-columns button')]
        .filter(e => e.offsetParent && !(e.innerText.trim() || e.getAttribute('aria-label') || e.title))
        .map(e => e.outerHTML.slice(0, 80))""")
    assert nameless == []


def test_scripts_can_call_what_the_button_calls(url):
    from gradio_client import Client

    client = Client(url, verbose=False)
    *_, last = client.submit("Hi", 2, "demo/a", "demo/b", None, None, "", 0, 1, 4, 0, api_name="/chat")
    said = [part for part in last if isinstance(part, list) and len(part) == 2]
    assert [part[0]["content"][0]["text"] for part in said] == ["Hi"] * 4
    with pytest.raises(Exception, match="message has 8,001"):
        client.predict("x" * 8_001, 2, "demo/a", "demo/b", None, None, "", 0, 1, 4, 0, api_name="/chat")
