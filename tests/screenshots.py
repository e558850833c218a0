"""Make the README's pictures from the real page: `python -m tests.screenshots`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect

from components.page import build
from components.studio import Studio
from components.theme import ASSETS, HEAD, css, theme
from tests.browser import chromium, open_tab

FOLDER = ASSETS / "screenshots"
WAIT_MS = 60_000


def main() -> None:
    """Start the page on the demo family, do the main job once, and picture it."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as outputs, chromium() as browser:
        page = build(Studio(outputs=Path(outputs) / "outputs"))
        page.queue(default_concurrency_limit=8)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=theme(), css=css(), head=HEAD, footer_links=["api"],
                                run_history=False, ssr_mode=False)
        view = browser.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=1.5)
        view.goto(f"{url}?__theme=light")
        picture_main_job(view)
        picture_alignment(view)
        picture_evaluation(view)
        page.close()


def picture_main_job(view: Page) -> None:
    """The heatmap, and two example prompts answered by the merge and its sources."""
    open_tab(view, "Variation")
    expect(view.locator("#ratio-by-depth .plot-container")).to_be_visible(timeout=WAIT_MS)
    view.screenshot(path=FOLDER / "variation.png")
    open_tab(view, "Merge")
    picture_form(view)
    view.locator("#family").get_by_label("Averages").click()
    expect(view.locator("#recipe")).to_contain_text("method: varm", timeout=WAIT_MS)
    view.locator("#merge-try").click()
    expect(view.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true", timeout=WAIT_MS)
    for domain in ("math", "humanities"):
        view.locator("#chat-domain").get_by_text(domain, exact=False).click()
        view.locator("#chat-examples button").first.click()
        expect(view.locator("#chat-stop")).to_be_enabled(timeout=WAIT_MS)
        expect(view.locator("#chat-retry")).to_be_enabled(timeout=WAIT_MS)
    view.evaluate("window.scrollTo(0, 0)")
    view.mouse.move(5, 5)
    view.wait_for_timeout(500)
    view.screenshot(path=FOLDER / "chat.png")


def picture_form(view: Page) -> None:
    """A task-vector method with a curve drawn over the layers."""
    view.locator("#family").get_by_label("Task vectors").click()
    view.locator("#method").get_by_label("TIES", exact=True).click()
    expect(view.locator("#recipe")).to_contain_text("method: ties", timeout=WAIT_MS)
    view.get_by_label("How density is given").select_option("By layer")
    points = view.locator("#method-form .fm-point")
    for i, steps in enumerate((12, 8, 6, 8, 10)):
        points.nth(i).focus()
        for _ in range(steps):
            view.keyboard.press("ArrowDown")
        view.wait_for_timeout(1000)
    expect(view.locator("#command")).to_contain_text("density=curve:0.4", timeout=WAIT_MS)
    view.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    view.mouse.move(5, 5)
    view.wait_for_timeout(500)
    view.screenshot(path=FOLDER / "merge.png")


def picture_alignment(view: Page) -> None:
    """One reply as the pivot and a source read it."""
    open_tab(view, "Fuse")
    expect(view.locator("#alignment .al-card")).to_be_visible(timeout=WAIT_MS)
    view.wait_for_timeout(500)
    view.locator("#alignment-box").screenshot(path=FOLDER / "fuse.png")


def picture_evaluation(view: Page) -> None:
    """The pivot and the targets in eight domains."""
    open_tab(view, "Evaluate")
    view.locator("#evaluate-prompts input[type=number]").fill("50")
    view.keyboard.press("Tab")
    view.locator("#evaluate-run").click()
    expect(view.locator("#evaluate-table tbody tr").first).to_be_visible(timeout=5 * WAIT_MS)
    view.wait_for_timeout(2000)
    view.evaluate("window.scrollTo(0, 0)")
    view.screenshot(path=FOLDER / "evaluate.png", full_page=True)


if __name__ == "__main__":
    main()
