"""`python -m tests.browser.pictures`, within `make browser`'s environment, takes the pictures of docs/ anew."""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.conftest import FONTS, PROMPT, ROOT, SANDBOX
from tests.service.server import Server

FOLDER = ROOT / "docs" / "pictures"
SHARE = "max_tokens=90&temperature=0.8&seed=7"
SIZE: dict[str, Any] = {"viewport": {"width": 1120, "height": 720}, "device_scale_factor": 1.5}
MAX_BYTES = 150_000


def save(page: Page, name: str) -> None:
    """With as many colours as fit the bound."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colours in (256, 128, 64, 32):
        packed = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
        if packed.tell() <= MAX_BYTES:
            break
    FOLDER.mkdir(parents=True, exist_ok=True)
    Path(FOLDER / f"{name}.png").write_bytes(packed.getvalue())


def take() -> None:
    server = Server("--kv-memory", "256MiB")
    try:
        server.wait_ready()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=SANDBOX, env={**os.environ, **FONTS}
            )
            for scheme in ("light", "dark"):
                page = browser.new_context(color_scheme=scheme, **SIZE).new_page()
                page.goto(f"{server.url}/#{SHARE}&prompt={PROMPT}")
                expect(page.locator("body")).to_have_attribute("data-state", "ready")
                page.wait_for_selector("#a-seed")
                page.click("#run")
                expect(page.locator(".reason")).not_to_be_empty(timeout=60_000)
                # Of the last line: what opens below it hides no text.
                page.locator(".token", has_text="hearts").first.click()
                page.mouse.move(0, 0)
                save(page, f"playground-{scheme}")
            browser.close()
    finally:
        server.kill()


if __name__ == "__main__":
    take()
