"""What the service is at: loading, ready, restarting, gone, and behind a proxy that has other things beside it."""

import re
import signal
import time
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import PROMPT, Visiting, complete
from tests.browser.proxy import under_prefix
from tests.service.server import Server, Start

# What Chromium notes of a service that goes, by what was on its way.
GONE = "ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE|INCOMPLETE_CHUNKED_ENCODING)"


def wait_engine(server: Server) -> None:
    """Return when the engine process is there; it then takes a second at least to be ready."""
    deadline = time.monotonic() + 30
    while not server.engines:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_while_the_model_loads(start: Start, visit: Visiting) -> None:
    """The form is there, what the service is at is said, nothing is sent; then it becomes ready by itself."""
    server = start("--kv-memory", "64MiB", ready=False)
    wait_engine(server)
    server.engine.send_signal(signal.SIGSTOP)
    page = visit(server, ready=False)
    page.page.wait_for_selector("#a-max_tokens")
    expect(page.page.locator("body")).to_have_attribute("data-state", "waiting")
    expect(page.page.locator("#phase")).to_have_text(re.compile("starting|loading the model|warming up|downloading"))
    page.page.click("#run", force=True)  # it says that it is disabled, and why when it is pressed
    expect(page.page.locator("#status")).to_contain_text("not ready")
    assert [] == page.sent()
    page.shot("loading")
    server.engine.send_signal(signal.SIGCONT)
    page.wait_ready()
    expect(page.page.locator("#model")).to_contain_text("megatron-gpt2-demo")
    page.set("max_tokens", "2")
    page.run()
    assert 2 == page.page.locator(".token").count()


def test_an_engine_that_dies_and_a_service_that_is_gone(start: Start, visit: Visiting) -> None:
    """What ran ends with its error; the page says what is under way, and is ready again by itself, or not."""
    server = start("--kv-memory", "64MiB")
    page = visit(server)
    page.set("max_tokens", "900")
    page.set("ignore_eos", "true")
    page.page.click("#run")
    expect(page.page.locator(".token").nth(2)).to_be_attached()
    server.engine.kill()
    page.wait_done()
    expect(page.page.locator(".error")).to_be_visible()
    expect(page.page.locator("#phase")).to_have_text("engine restarting")
    page.shot("restart")
    page.wait_ready()
    page.set("max_tokens", "2")
    page.run()
    assert 2 == page.page.locator(".token").count()
    assert page.page.is_hidden(".error")
    server.kill()
    expect(page.page.locator("#phase")).to_have_text("service not reachable")
    page.complaints[:] = [each for each in page.complaints if not re.search(GONE, each)]


def test_behind_a_path_prefix(server: Server, visit: Visiting) -> None:
    """Page, files, stream, load and code all stay below it."""
    with under_prefix(server.url, "/models/demo") as url:
        page = visit(url)
        page.page.fill("#prompt", PROMPT)
        page.set("seed", "7")
        page.run()
        (sent,) = page.sent()
        assert complete(server, **{**sent, "stream": False})["choices"][0]["text"] == page.text()
        expect(page.page.locator("#load")).to_be_visible()
        page.page.get_by_text("Code", exact=True).click()
        expect(page.page.locator("pre")).to_contain_text(f"{url}v1/completions")
        assert url + "docs" == page.page.evaluate("document.querySelector('.tools a').href")
        page.check()
        page.page.close()


ODD = [
    {"status": 200, "content_type": "text/html", "body": "<html>a login page</html>"},
    {"status": 503, "content_type": "text/html", "body": "<html>"},
    {"status": 503, "content_type": "application/json", "body": "null"},
    {"status": 200, "content_type": "application/json", "body": '{"ph'},
    {"status": 200, "content_type": "application/json", "body": "null"},
]


@pytest.mark.parametrize("answer", ODD, ids=str)
def test_an_odd_answer_does_not_end_the_asking(server: Server, visit: Visiting, answer: dict[str, Any]) -> None:
    """Of a proxy, or cut off: the next one is asked for, and shown."""
    page = visit(server)
    page.page.route("**/readyz", lambda route: route.fulfill(**answer), times=1)
    page.page.route("**/metrics", lambda route: route.fulfill(status=502), times=1)
    expect(page.page.locator("#load")).to_be_hidden()
    expect(page.page.locator("#load")).to_be_visible()
    page.wait_ready()


@pytest.mark.parametrize("body", ["<html>", "null", "{}"])
def test_a_schema_that_does_not_come(server: Server, visit: Visiting, body: str) -> None:
    """It is said where it can be seen, asked for again, and what was typed meanwhile stays."""
    page = visit("about:blank", ready=False)
    page.url = f"{server.url}/"
    page.page.route("**/openapi.json", lambda route: route.fulfill(status=200, body=body))
    page.page.goto(page.url)
    expect(page.page.locator("#status")).to_contain_text("not one that this service gives")
    expect(page.page.locator("#status")).to_be_visible()
    page.page.fill("#prompt", PROMPT)
    page.page.unroute("**/openapi.json")
    page.page.wait_for_selector("#a-max_tokens")
    expect(page.page.locator("#status")).to_have_text("")
    assert PROMPT == page.page.input_value("#prompt")
