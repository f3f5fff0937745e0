"""Drives the page of `ltxkern serve` in a real browser: `python -m tools.drive_page URL --screenshot docs/serve.png`.

Asks for a video by the keyboard alone, sees its progress and preview, plays it, cancels another, has a wrong request refused, and
sees that nothing is fetched from elsewhere. Needs Chromium, and playwright from PyPI, which no other part of the project does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from playwright.sync_api import Locator, Page, expect, sync_playwright

PATIENCE = 300_000.0


def submit(page: Page, prompt: str, **numbers: int) -> None:
    """Fill the form and send it, without a pointer."""
    page.get_by_label("What it shows and sounds like").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(prompt)
    for label in ("Height", "Width", "Frames", "Steps", "Seed"):
        page.keyboard.press("Tab")
        expect(page.get_by_label(label, exact=True)).to_be_focused()
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        page.keyboard.type(str(numbers.get(label.lower(), "")))
    page.keyboard.press("Enter")


def focused(page: Page, prompt: str) -> Locator:
    """The new video, which has the focus."""
    item = page.locator("li:focus", has_text=prompt)
    expect(item).to_be_visible(timeout=PATIENCE)
    return page.locator(f'li[data-video="{item.get_attribute("data-video")}"]')


def drive(page: Page, screenshot: str | None) -> None:
    """Everything the page is for.

    Raises:
        AssertionError: something is not as it should be.
    """
    submit(page, "waves at dusk", height=64, width=128, frames=9, steps=300)
    submitted = focused(page, "waves at dusk")
    submit(page, "a red kite over a winter beach", height=128, width=192, frames=25, steps=12)
    kite = focused(page, "a red kite")
    expect(submitted.locator("p").first).to_contain_text("running: stage 1", timeout=PATIENCE)
    expect(submitted.get_by_role("progressbar")).to_have_attribute("aria-label", "Progress of stage 1")
    expect(submitted.get_by_alt_text("Preview of the video at work")).to_be_visible(timeout=PATIENCE)
    if screenshot is not None:
        page.screenshot(path=screenshot)
    submitted.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    expect(submitted.locator("p").first).to_have_text("cancelled", timeout=PATIENCE)
    expect(page.get_by_role("log")).to_contain_text("waves at dusk: cancelled", timeout=PATIENCE)
    expect(kite.locator("p").first).to_contain_text("done in", timeout=PATIENCE)
    player = kite.locator("video")
    expect(player).to_be_visible(timeout=PATIENCE)
    player.evaluate("player => player.play()")
    # The policy of the page forbids what playwright would wait with.
    for _ in range(600):
        if player.evaluate("player => player.currentTime") > 0.2:
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError("the video does not play")
    assert player.evaluate("player => [player.videoWidth, player.videoHeight]") == [192, 128]
    submit(page, "no such size", height=65)
    expect(page.get_by_role("alert")).to_have_text("height 65 is not a multiple of 64: use 64 or 128", timeout=PATIENCE)
    submitted.get_by_role("button", name="Remove").click()
    expect(submitted).to_have_count(0, timeout=PATIENCE)
    fields = "[...document.querySelectorAll('input, textarea')]"
    unnamed = page.evaluate(f"{fields}.filter(field => !field.hidden && !field.labels.length).length")
    assert not unnamed, f"{unnamed} fields without a label"


def main(argv: Sequence[str] | None = None) -> int:
    """Drive it; the status says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshot", metavar="FILE")
    arguments = parser.parse_args(argv)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 860})
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.goto(arguments.url)
        try:
            drive(page, arguments.screenshot)
        finally:
            print(*said, sep="\n")
        foreign = [url for url in asked if not url.startswith((arguments.url, "blob:", "data:"))]
        # The one refusal that was asked for is on the console.
        wrong = [line for line in said if "status of 422" not in line]
        browser.close()
    print(f"{len(asked)} requests, {len(foreign)} to elsewhere, {len(wrong)} complaints of the browser")
    return 1 if foreign or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
