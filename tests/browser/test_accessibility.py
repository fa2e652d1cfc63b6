"""For whoever uses a keyboard, a screen reader, another colour scheme or a phone. axe looks at every state."""

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.browser.conftest import PROMPT, Visit, Visiting
from tests.service.server import Server

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": PHONE,
    "phone-dark": {**PHONE, "color_scheme": "dark"},
    "forced": {"forced_colors": "active"},
}
AXE = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    "resultTypes": ["violations"],
}


def look(page: Visit, name: str) -> None:
    """Keep a picture; axe finds nothing; nothing is wider than the screen."""
    page.shot(name)
    found = Axe().run(page.page, options=AXE).response["violations"]
    told = [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]
    assert [] == told
    assert page.page.evaluate("document.documentElement.scrollWidth") <= page.page.viewport_size["width"]


@pytest.mark.parametrize("name", LOOKS)
def test_every_state(server: Server, visit: Visiting, name: str) -> None:
    """Before a run, after it, alternatives open, all fields, code, an error, two settings."""
    page = visit(server, **LOOKS[name])
    look(page, f"{name}-start")
    page.page.fill("#prompt", PROMPT)
    page.set("seed", "7")
    page.set("temperature", "1.3")  # likely and unlikely ones
    page.run()
    look(page, f"{name}-run")
    page.page.locator(".token").nth(9).click()
    expect(page.page.locator("#alternatives")).to_be_visible()
    look(page, f"{name}-alternatives")
    page.page.keyboard.press("Escape")
    page.page.get_by_text("Code", exact=True).click()
    page.set("top_k", "-5")
    page.set("best_of", "2")
    look(page, f"{name}-wrong-fields")
    page.set("top_k", "")
    page.run()
    look(page, f"{name}-error")
    page.set("best_of", "")
    page.page.check("#compare")
    look(page, f"{name}-compare-fields")
    page.page.uncheck("#compare")
    page.page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = false })")
    page.page.check("#compare")
    page.set("seed", "8", pane="b")
    page.run()
    look(page, f"{name}-compare")


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_the_key_dialog(keyed: Server, visit: Visiting, name: str) -> None:
    page = visit(keyed, ready=False, **LOOKS[name])
    expect(page.page.locator("#key")).to_be_visible()
    look(page, f"{name}-key")
    page.page.keyboard.press("Escape")
    look(page, f"{name}-notice")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_can_be_chosen(server: Server, visit: Visiting, scheme: str) -> None:
    """Against the system's, and for the next visit too."""
    other = {"light": "dark", "dark": "light"}[scheme]
    page = visit(server, color_scheme=other)
    before = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.page.select_option("#theme", scheme)
    after = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    page.page.reload()
    assert after == page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.page.select_option("#theme", "system")
    assert before == page.page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_with_the_keyboard_alone(server: Server, visit: Visiting) -> None:
    """Prompt, run, to a token, its alternatives, one taken, back, stop."""
    page = visit(server, fragment="#seed=7&max_tokens=24")
    press = page.page.keyboard.press
    focused = "document.activeElement"
    page.page.locator("#prompt").focus()
    page.page.keyboard.insert_text("")
    press("Control+A")
    page.page.keyboard.type(PROMPT)
    press("Control+Enter")
    expect(page.page.locator("#status")).to_contain_text("Done: 24 tokens")
    for _ in range(60):
        press("Tab")
        if page.page.evaluate(f"{focused}.classList.contains('token')"):
            break
    tokens = page.page.locator(".token")
    expect(tokens.first).to_be_focused()
    for key, place in [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 23),
        ("Home", 0),
        ("ArrowRight", 1),
    ]:
        press(key)
        expect(tokens.nth(place)).to_be_focused()
    label = tokens.nth(1).get_attribute("aria-label")
    assert label.startswith(tokens.nth(1).inner_text().strip())
    assert label.endswith("%")
    press("Enter")
    expect(page.page.locator("#alternatives")).to_be_visible()
    assert page.page.evaluate(f"document.getElementById('alternatives').contains({focused})")
    press("Escape")
    expect(page.page.locator("#alternatives")).to_be_hidden()
    expect(tokens.nth(1)).to_be_focused()
    press("Enter")
    rows = page.page.locator("#alternatives .row")
    expect(page.page.locator("#alternatives .here")).to_be_focused()
    press("ArrowUp" if rows.last.evaluate(f"row => row === {focused}") else "ArrowDown")
    press("Enter")
    expect(tokens.nth(1)).to_be_focused()
    page.wait_done()
    expect(tokens.nth(1)).to_be_focused()
    assert 2 + 24 == tokens.count()
    assert "taken" in tokens.nth(1).get_attribute("class")


def test_motion_and_names(server: Server, visit: Visiting) -> None:
    """Nothing moves where nothing should; each control has a name of its own; the status is told politely."""
    page = visit(server, reduced_motion="reduce")
    assert 0 == page.page.evaluate("document.getAnimations().length")
    assert "status" == page.page.get_attribute("#status", "role")
    page.page.check("#compare")
    for pane in ("a", "b"):
        assert page.page.locator(f"#{pane}-temperature").is_visible()
    assert {"Settings A and their text", "Settings B and their text"} == set(
        page.page.locator(".pane").evaluate_all("all => all.map(each => each.getAttribute('aria-label'))")
    )
