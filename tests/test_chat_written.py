"""What a model wrote is shown as it was written, thoughts folded, and nothing of it is run or fetched: in headless Chromium."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from components.chat import build
from components.chat.history import Turn, messages_for, turn_at, view
from components.chat.markdown import as_written, original
from components.state import Selection
from components.theme import HEAD, css, theme
from fusion.chat import Reply, Sampling
from tests.scripted import TEMPLATE, scripted
from tests.test_evaluate_judge import serving

FAR = "http://203.0.113.9"  # nobody's address
TAGS = ["<b>bold</b>", "<br>", "<input type=text>", "<!-- a comment -->", "<script>window.hacked=1</script>", "<em>x</em>",
        "<details><summary>s</summary>inside</details>", "<style>body{display:none}</style>", "<table><tr><td>cell</table>",
        "<p onclick=x>", "<custom-tag>", "</div></div>", "<form action=/x><button>go</button></form>", "<|im_end|>",
        "<textarea>", "\\<q>", "`a\n<p>`", "&lt;b&gt; & &amp;", "a < b > c", "<a href='javascript:window.hacked=2'>click</a>",
        "[link](javascript:window.hacked=3)"]
FETCHED = [  # every one names an address of its own, by its number
    f"<img src={FAR}/1>", f"![pic]({FAR}/2.png)", f"<video src={FAR}/3 autoplay></video>", f"<audio src={FAR}/4 autoplay></audio>",
    f"<video><source src={FAR}/5></video>", f"<svg><image href={FAR}/6 /></svg>", f"<link rel=stylesheet href={FAR}/7>",
    f"<iframe src={FAR}/8></iframe>", f"<object data={FAR}/9></object>", f"<embed src={FAR}/10>", f"![pic][ref]\n\n[ref]: {FAR}/11",
    f"<div style='background:url({FAR}/12)'>x</div>", f"<style>@import url({FAR}/13)</style>",
    f"<meta http-equiv=refresh content='0;url={FAR}/14'>", f"<picture><source srcset={FAR}/15><img></picture>",
    f"<base href={FAR}/16>", f"<link rel=prefetch href={FAR}/17>", f"[![x]({FAR}/18)](/y)", f"<input type=image src={FAR}/19>",
    f"<body background={FAR}/20>", f"<track src={FAR}/21>",
    f"![a](<{FAR}/22>)",
    f"```mermaid\ngraph TD\nA@{{ img: \"{FAR}/23\" }}\n```",
    f"$$\\includegraphics{{{FAR}/formula}}$$"]
CODE = ["```html\n<b>in a block</b>\n```", "Inline `<i>code</i>` and ``a ` <u>``.", "def f(x):\n    return x < 3",
        "```\nunclosed <p>"]
HALF_CODE = [  # ticks that are no code in the chat window, and backslashes that would eat an entity's first letter
    "| a `b | <u>1</u> ` |\n|---|---|\n| x `y | <u>2</u> ` |", "`a\n<div><u>3</u></div>\n`", "``a\n<!-- c -->\n<u>4</u>``",
    "\\(`\\) <u>5</u>`", "$$\n`\n$$\n<u>6</u>`", "\\<u>7</u> \\\\<u> \\&lt;", "```<u>8</u>\nx\n```", "\\\\`<u>9`"]
THOUGHT = "I must hide 42 here."


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("text", [
    *TAGS, *FETCHED, *CODE, "  two\n three\n\n    code <x>\n", "> <q> `a\n> b<` c", "- <a>\n  - `<b>`\n"])
def test_the_letters_can_be_taken_back(text):
    assert original(as_written(text)) == text or "mermaid" in text


@pytest.mark.parametrize(("text", "markdown"), [
    ("<b> & &lt; `<b>`", "&#x0003C;b> & &#x00026;lt; `<b>`"), ("```html\n<b>\n```\n<i>", "```html\n<b>\n```\n&#x0003C;i>"),
    ("![x](http://y)", "!&#x0005B;x](http://y)"), ("[x]: http://y", "&#x0005B;x]: http://y"), ("[x](y) <http://z>", "[x](y) <http://z>"),
    ("f:\n  a", "f:\n&#x000A0;&#x000A0;a"), ("    <x>", "    <x>"), ("- a\n\n  ~~~\n  <b>\n  ~~~", "- a\n\n  ~~~\n  <b>\n  ~~~"),
    ("| a |\n|---|\n| <b> `<c>` |", "| a |\n|---|\n| &#x0003C;b> `<c>` |"), ("\\`<b>\\`", "\\`&#x0003C;b>\\`"), ("", ""),
    ("|a|b|\n|---|---|\n|`x | <b>`|", "|a|b|\n|---|---|\n|&#x00060;x | &#x0003C;b>`|"), ("\\<b>", "&#x0005C;&#x0003C;b>"),
    ("|a|\n|---|\n|`x \\| <b>`|", "|a|\n|---|\n|`x \\| <b>`|"), ("`a\n<p>`", "&#x00060;a\n&#x0003C;p>`"),
    ("`a\nb<p>`", "`a\nb<p>`"), ("\\(`\\)<b>`", "\\(`\\)&#x0003C;b>`"), ("\\\\`<b>`", "\\\\`<b>`")])
def test_markup_is_written_as_entities_outside_of_code(text, markdown):
    assert as_written(text) == markdown


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_thoughts_are_messages_of_their_own_and_no_index_is_mistaken():
    said = Reply(f"<think>a</think>One.<think>{THOUGHT}</think>Two.", 9, 1, "stop")
    cut, running = Reply(f"<think>{THOUGHT}", 9, 1, "length"), Reply(f"<think>{THOUGHT}", 9, 1)
    talk = (Turn("Hi", Sampling(), (("m", said),)), Turn("Bye", Sampling(), (("m", cut), ("n", running))))
    shown = view(talk, "m")
    assert [message.get("metadata", {}).get("title", message["role"]) for message in shown] == [
        "user", "Reasoning", "assistant", "Reasoning", "assistant", "user", "Reasoning", "assistant"]
    assert {message["metadata"]["status"] for message in shown if "metadata" in message} == {"done"}
    assert "before an answer" in shown[-1]["content"][0]["text"]
    assert view(talk, "n")[-1]["metadata"]["status"] == "pending"
    assert [turn_at(talk, i, "m") for i in (0, 4, 5, 7, 8)] == [0, 0, 1, 1, -1]
    told = messages_for(talk, "m", "New")
    assert [message["content"] for message in told] == ["Hi", "One.\n\nTwo.", "New"], "a turn without an answer is not told"


# ── in the browser ───────────────────────────────────────────────────────────────────────────────────────────────────────────

OPENS = TEMPLATE.replace("<|go|>", "<|go|><think>\n")
MODELS = {
    "tags": scripted(["\n\n".join(TAGS)]), "fetched": scripted(["\n\n".join(FETCHED)]),
    "code": scripted(["\n\n".join(CODE)]), "half": scripted(["\n\n".join(HALF_CODE)]),
    "orphan": scripted([THOUGHT, "\n</think>\n\n", "The answer is 4."]),
    "open": scripted(["<think>", "\nstill thinking without an end"]),
    "template": scripted([THOUGHT, " cut here"], OPENS, after="Ċ"),
    "marks": scripted(["[THINK]", THOUGHT, "[/THINK]", "The answer is 5."], special=["[THINK]", "[/THINK]"])}


class Studio:
    """What the Chat tab needs of the real one."""

    examples: dict[str, list[str]] = {}  # noqa: RUF012

    def title(self, key):
        return key

    def role(self, key, selection):
        return "source"

    @contextmanager
    def chat_model(self, key, selection):
        yield MODELS[key]


@pytest.fixture(scope="module")
def page(browser):
    from playwright.sync_api import expect

    with gr.Blocks() as demo:
        build(Studio(), gr.State(Selection("", (), tuple(MODELS))))
    address = demo.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, theme=theme(), css=css(), head=HEAD)[1]
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address.rstrip("/"))
    page = context.new_page()
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    expect(page.locator("#chat-prompt textarea")).to_be_visible(timeout=30_000)
    page.locator("#chat-count label", has_text="4").click()
    yield page
    context.close()
    demo.close()


def ask(page, *models: str, said: str = "Hi", clear: bool = True):
    from playwright.sync_api import expect

    from tests.browser import settle

    if clear and page.locator("#chat-clear").is_enabled():
        page.locator("#chat-clear").click()
        settle(page)
    for letter, name in zip("abcd", models, strict=False):
        page.locator(f"#chat-model-{letter} input").click()
        page.locator(f"#chat-model-{letter}").get_by_role("option", name=name, exact=True).click()
        settle(page)
    page.locator("#chat-prompt textarea").fill(said)
    page.locator("#chat-prompt textarea").press("Enter")
    expect(page.locator("#chat-prompt textarea")).to_have_value("", timeout=60_000)
    expect(page.locator("#chat-clear")).to_be_enabled(timeout=60_000)
    settle(page)
    return [page.locator(f"#chat-bot-{letter}") for letter, _ in zip("abcd", models, strict=False)]


@pytest.mark.browser
def test_every_tag_is_read_and_none_works(page):
    tags, fetched, code, half = ask(page, "tags", "fetched", "code", "half")
    text = tags.locator("[data-testid=bot]").inner_text()
    assert not [written for written in TAGS[:-1] if " ".join(written.split()) not in " ".join(text.split())], text
    assert page.evaluate("window.hacked") is None and page.locator("[href^='javascript:']").count() == 0
    assert not [url for url in page.asked if "203.0.113.9" in url]
    text = fetched.locator("[data-testid=bot]").inner_text()
    assert not [n for n in range(1, 24) if f"203.0.113.9/{n}" not in text], text
    text = code.locator("[data-testid=bot]").inner_text().replace("\u00a0", " ")
    for written in ("<b>in a block</b>", "Inline <i>code</i> and a ` <u>.", "    return x < 3", "unclosed <p>"):
        assert written in text, text
    assert half.locator("u").count() == 0 and not [n for n in "1234567" if f"<u>{n}</u>" not in half.inner_text()]
    assert code.locator("pre code").count() == 2 and "&#x" not in page.locator("#chat-columns").inner_text()


@pytest.mark.browser
def test_the_policy_alone_keeps_the_page_from_fetching(page):
    """The second wall: were a tag let through, the browser would not fetch for it."""
    with serving(lambda body: "") as server:
        far = f"http://127.0.0.1:{server.server_port}"
        html = "\n".join(tag.replace(FAR, far) for tag in FETCHED if "refresh" not in tag and "<base" not in tag)
        page.evaluate("html => { const box = document.createElement('div'); box.innerHTML = html; "
                      "document.body.append(box); setTimeout(() => box.remove(), 1500) }", html)
        page.evaluate(f"fetch('{far}/a').catch(() => 0); new Image().src = '{far}/b'; "
                      f"new Audio('{far}/c').play().catch(() => 0); 1")
        page.wait_for_timeout(2000)
        assert not server.requests


@pytest.mark.browser
def test_thoughts_are_folded_and_nothing_turns_at_the_end(page):
    windows = ask(page, "orphan", "open", "template", "marks")
    answers = "The answer is 4.", "without a word", "without a word", "The answer is 5."
    for window, answer in zip(windows, answers, strict=True):
        text = window.inner_text()
        assert "Reasoning" in text and answer in text
        assert not [hidden for hidden in ("42", "think>", "THINK") if hidden in text]
        assert "spinner" not in window.inner_html()
    windows[0].get_by_text("Reasoning").click()
    assert THOUGHT in windows[0].inner_text()


@pytest.mark.browser
def test_copy_and_edit_give_what_was_written(page):
    from playwright.sync_api import expect

    window, other = ask(page, "tags", "orphan", said="What is <b>?")
    expect(window.locator("[data-testid=user]")).to_have_text("What is <b>?")
    window.get_by_label("Copy message").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == "\n\n".join(TAGS)
    ask(page, said="And <i>?", clear=False)
    other.get_by_label("Edit").last.click()
    expect(other.locator("textarea")).to_have_value("And <i>?")
    other.locator("textarea").fill("Or <u>?")
    other.get_by_label("Submit").click()
    for shown in (window, other):
        expect(shown.locator("[data-testid=user]")).to_have_text(["What is <b>?", "Or <u>?"], timeout=60_000)
    expect(page.locator("#chat-clear")).to_be_enabled(timeout=60_000)
