"""A real Chromium, Debian's, on pages of running services. Run by `make browser`; pictures go to browser-screenshots/.

Whatever a test does on a page, the page must load and ask nothing but its own service, keep its own policy, and leave
no error on the console: each visit is held to that at its end.
"""

import operator
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from tests.service.conftest import one_thread, scripted_model, start, tokenizer
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Server, until_drained

__all__ = ["one_thread", "scripted_model", "start", "tokenizer"]

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "browser-screenshots"
SANDBOX = [] if os.getuid() else ["--no-sandbox"]  # which root has none of
FONTS = {"FONTCONFIG_FILE": str(Path(__file__).with_name("fonts.conf"))}  # pictures must not depend on the machine's
KEY = "mgpt-a-key-of-the-tests"
PROMPT = "The people of the United States"
# What the page itself adds to a request that is otherwise left alone.
PRESETS: dict[str, Any] = {"max_tokens": 64, "temperature": 0.8, "logprobs": 5}
# Chromium notes each answer that is an error, also one that the page expects and tells.
_EXPECTED = re.compile(r"Failed to load resource: (the server responded with a status of [45]\d\d|net::ERR_FAILED)")
_WATCH = "addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective, e.blockedURI))"

expect.set_options(timeout=20_000)


@dataclass
class Visit:
    """A page of a service, and what it did."""

    url: str  # of the service, with a slash at its end
    page: Page
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Press Run and wait for the end of what was begun."""
        self.page.click("#run")
        self.wait_done()

    def wait_done(self) -> None:
        expect(self.page.locator("body.running")).to_have_count(0, timeout=60_000)

    def wait_ready(self) -> None:
        expect(self.page.locator("body")).to_have_attribute("data-state", "ready", timeout=60_000)

    def text(self, pane: int = 0, choice: int = 0) -> str:
        """That of a choice on the page."""
        found = self.page.locator(".pane").nth(pane).locator(".tokens").nth(choice).text_content()
        assert found is not None
        return found

    def set(self, name: str, value: str, *, pane: str = "a") -> None:
        """Type into a field, wherever it is."""
        control = self.page.locator(f"#{pane}-{name}")
        control.evaluate("element => { element.closest('details')?.setAttribute('open', '') }")
        if control.get_attribute("type") == "checkbox":
            control.set_checked(value == "true")
        elif control.evaluate("element => element.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)

    def sent(self) -> list[dict[str, Any]]:
        """The bodies of the completions that were asked for."""
        return [request.post_data_json for request in self.requests if request.url.endswith("v1/completions")]

    def shot(self, name: str) -> None:
        """Keep a picture of the whole page."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def check(self) -> None:
        assert [] == self.complaints
        assert set() == {request.url for request in self.requests if not request.url.startswith(self.url)}


class Visiting(Protocol):
    """Opens the playground of a server or URL, and waits for its form and for the model; `ready=False` does not."""

    def __call__(self, server: Server | str, *, fragment: str = "", ready: bool = True, **context: Any) -> Visit: ...


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=SANDBOX, env={**os.environ, **FONTS}
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visiting]:
    contexts: list[BrowserContext] = []
    visits: list[Visit] = []

    def open_page(server: Server | str, *, fragment: str = "", ready: bool = True, **context: Any) -> Visit:
        options: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light", **context}
        contexts.append(browser.new_context(**options))
        url = server if isinstance(server, str) else f"{server.url}/"
        visit = Visit(url, contexts[-1].new_page())
        visits.append(visit)
        visit.page.add_init_script(_WATCH)
        visit.page.on("request", lambda request: visit.requests.append(request))
        visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        visit.page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and not _EXPECTED.match(message.text)
                and visit.complaints.append(message.text)
            ),
        )
        visit.page.goto(url + fragment)
        if ready:
            visit.page.wait_for_selector("#a-max_tokens")
            visit.wait_ready()
        return visit

    yield open_page
    for each in visits:
        each.check()
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model in fp32."""
    yield from until_drained(Server("--kv-memory", "256MiB"))


@pytest.fixture(scope="session")
def scripted(scripted_model: ScriptedModel) -> Iterator[Server]:
    """The model whose text is known, full of characters of several tokens."""
    yield from until_drained(Server(str(scripted_model.folder), "--kv-memory", "256MiB"))


@pytest.fixture(scope="session")
def keyed(scripted_model: ScriptedModel) -> Iterator[Server]:
    """One that asks for KEY."""
    keys = {"MGPT_API_KEY": KEY}
    yield from until_drained(Server(str(scripted_model.folder), "--kv-memory", "64MiB", environment=keys))


def complete(server: Server | str, **body: Any) -> dict[str, Any]:
    """The API's own plain answer, which must be a 200."""
    url = server if isinstance(server, str) else server.url
    response = httpx.post(f"{url.rstrip('/')}/v1/completions", json=body, timeout=100)
    assert 200 == response.status_code, response.text
    answer: dict[str, Any] = response.json()
    return answer


def metric(server: Server, name: str) -> float:
    """The value of the metric megatron_gpt2_`name`, which has no labels."""
    text = httpx.get(f"{server.url}/metrics").text
    return float(re.search(rf"^megatron_gpt2_{name} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


def wait_metric(server: Server, name: str, value: float) -> None:
    """Return once the metric has this value; a counter may have gone past it."""
    deadline = time.monotonic() + 20
    reached = operator.ge if name.endswith("_total") else operator.eq
    while not reached(metric(server, name), value):
        assert time.monotonic() < deadline, name
        time.sleep(0.02)
