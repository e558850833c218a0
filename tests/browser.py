"""What the page's tests share: headless Chromium (the system's, else Playwright's own), and a page with two targets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from components.studio import Studio

# No background traffic: on a closed network it only makes noise.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
WAIT_MS = 40_000  # for what a page comes to show; a busy machine is slow, not wrong
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser and close it at the end; FUSECHAT_CHROMIUM names another one."""
    expect.set_options(timeout=WAIT_MS)
    path = os.environ.get("FUSECHAT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_tab(page: Page, name: str) -> None:
    """Choose a tab by its title; on narrow pages the later ones are in a menu. A page that just came may miss the first click."""
    page.get_by_role("tab").first.wait_for()
    tab = page.get_by_role("tab", name=name)
    for patience_ms in (3_000, WAIT_MS):
        if tab.is_visible():
            tab.click()
        else:
            page.locator(".overflow-menu > button").click()
            page.locator(".overflow-dropdown").get_by_text(name).click()
        try:
            expect(tab).to_have_attribute("aria-selected", "true", timeout=patience_ms)
            return settle(page)
        except AssertionError:
            if patience_ms == WAIT_MS:
                raise
    return None


def settle(page: Page) -> None:
    """Wait as a person does, who sees first what was opened.

    Gradio makes the fields of a tab or a box when it is first opened and sets their values some frames later, over what a test
    was quick to type.
    """
    page.evaluate("new Promise(done => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 300))")


def write(field: Locator, text: str) -> None:
    """Fill a field of a box that was just opened, and leave it."""
    field.wait_for()
    settle(field.page)
    field.fill(text)
    field.page.keyboard.press("Tab")


def two_targets(studio: Studio) -> Studio:
    """The same studio, whose page opens with the first two of the demo's targets: weights of two are easy to check by eye."""
    first = studio.first_selection()
    studio.first_selection = lambda: replace(first, targets=first.targets[:2])
    return studio
