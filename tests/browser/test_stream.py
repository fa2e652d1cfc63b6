"""A run on the page: its text is the API's, token by token; it stops when it is told to; every end is told."""

import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from playwright.sync_api import Route, expect

from tests.browser.conftest import PRESETS, PROMPT, Visiting, complete, metric, wait_metric
from tests.service.scripted_model import LONGEST, ScriptedModel
from tests.service.server import Server

CHUNK = 'data: {"choices": [{"index": 0, "text": " so", "logprobs": null, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize("fields", [{"seed": 7}, {"seed": 3, "temperature": 2.0}, {"seed": 5, "echo": True}])
def test_the_text_and_the_shades_are_those_of_the_api(server: Server, visit: Visiting, fields: dict[str, Any]) -> None:
    """Each token has its own span and its own surprise; at temperature 2 some are pieces of characters."""
    expected = complete(server, prompt=PROMPT, **{**PRESETS, **fields})["choices"][0]
    page = visit(server)
    page.page.fill("#prompt", PROMPT)
    for name, value in fields.items():
        page.set(name, json.dumps(value))
    page.run()
    assert expected["text"] == page.text()
    shades = page.page.locator(".token").evaluate_all(
        "spans => spans.map(span => Number(span.style.getPropertyValue('--surprise')))"
    )
    logprobs = expected["logprobs"]["token_logprobs"]
    assert [pytest.approx(min(1, -(value or 0) / math.log(2) / 10), abs=2e-3) for value in logprobs] == shades
    assert f"{64} tokens" in page.page.inner_text(".figures")
    assert "Ended at max_tokens" == page.page.inner_text(".reason")


def test_text_comes_while_it_is_made(scripted: Server, visit: Visiting) -> None:
    """Part of it is there long before the end, and the figures count."""
    page = visit(scripted)
    page.page.fill("#prompt", "")
    page.set("max_tokens", "1000")
    page.set("ignore_eos", "true")
    page.page.click("#run")
    expect(page.page.locator(".token").nth(5)).to_be_attached()
    assert page.page.locator("body.running").count()
    page.page.click("#stop")
    page.wait_done()


def test_a_thousand_tokens(scripted: Server, scripted_model: ScriptedModel, visit: Visiting) -> None:
    """One span each, of characters that take several; what was drawn before is not drawn again."""
    page = visit(scripted)
    page.page.fill("#prompt", "")
    for name, value in {"max_tokens": "1000", "ignore_eos": "true", "temperature": "0"}.items():
        page.set(name, value)
    body = {"prompt": "", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor() as pool:
        expected = pool.submit(complete, scripted, **body)
        page.page.click("#run")
        first = page.page.locator(".token").first
        expect(first).to_be_attached()
        first.evaluate("span => { span.dataset.seen = 'yes' }")
        page.wait_done()
    assert 1000 == page.page.locator(".token").count()
    assert expected.result()["choices"][0]["text"] == page.text()
    assert page.text().startswith(scripted_model.text(scripted_model.end))  # then babble, of pieces of characters
    assert "yes" == first.get_attribute("data-seen")
    assert 1 == page.page.locator(".tokens [role=button]").count()  # the others are text to a screen reader
    page.shot("thousand-tokens")


@pytest.mark.parametrize("how", ["button", "key", "gone"])
def test_stop_aborts_the_request(scripted: Server, visit: Visiting, how: str) -> None:
    """The engine lets go of it, what came so far stays, and the page can run again."""
    aborted = metric(scripted, "requests_aborted_total")
    page = visit(scripted)
    page.page.fill("#prompt", "")
    page.set("max_tokens", str(LONGEST["max_tokens"]))
    page.set("ignore_eos", "true")
    page.page.click("#run")
    expect(page.page.locator(".token").nth(3)).to_be_attached()
    match how:
        case "button":
            page.page.click("#stop")
        case "key":
            composing = "new KeyboardEvent('keydown', { key: 'Escape', isComposing: true, bubbles: true })"
            page.page.evaluate(f"document.getElementById('prompt').dispatchEvent({composing})")
            num_tokens = page.page.locator(".token").count()
            expect(page.page.locator(".token").nth(num_tokens + 3)).to_be_attached()  # it was for the input method
            page.page.keyboard.press("Escape")
        case "gone":
            page.page.goto("about:blank")
    wait_metric(scripted, "requests_aborted_total", aborted + 1)
    wait_metric(scripted, "requests_running", 0)
    if how != "gone":
        expect(page.page.locator(".figures")).to_contain_text("Stopped")
        expect(page.page.locator("#status")).to_contain_text("Stopped")
        assert 3 < page.page.locator(".token").count() < LONGEST["max_tokens"]
        page.set("max_tokens", "3")
        page.run()
        assert 3 == page.page.locator(".token").count()


def test_stop_before_the_first_token(scripted: Server, visit: Visiting) -> None:
    """Nothing has come of the answer, not even its head, and the request ends all the same."""
    aborted = metric(scripted, "requests_aborted_total")
    page = visit(scripted)
    scripted.engine.send_signal(signal.SIGSTOP)
    try:
        page.page.click("#run")
        wait_metric(scripted, "requests_open", 1)
        page.page.keyboard.press("Escape")
        expect(page.page.locator(".figures")).to_have_text("Stopped before the first token")
        wait_metric(scripted, "requests_aborted_total", aborted + 1)
    finally:
        scripted.engine.send_signal(signal.SIGCONT)


def test_stop_holds_whatever_still_comes(server: Server, visit: Visiting) -> None:
    """A chunk that is on its way is not shown any more, and the run has ended."""
    page = visit(server)
    page.set("logprobs", "")
    page.page.evaluate(
        """chunk => {
            const real = window.fetch;
            window.fetch = (url, options) => {
                if (!url.endsWith("v1/completions")) return real(url, options);
                const body = new ReadableStream({
                    async pull(controller) {
                        await new Promise(resolve => setTimeout(resolve, 5));
                        controller.enqueue(new TextEncoder().encode(chunk));
                    },
                });
                return Promise.resolve(new Response(body, { headers: { "Content-Type": "text/event-stream" } }));
            };
        }""",
        CHUNK,
    )
    page.page.click("#run")
    expect(page.page.locator(".flow .text").nth(3)).to_be_attached()
    page.page.click("#stop")
    page.wait_done()
    expect(page.page.locator(".figures")).to_contain_text("Stopped")
    text = page.text()
    page.page.wait_for_timeout(100)
    assert text == page.text()


def test_run_begins_anew(scripted: Server, visit: Visiting) -> None:
    """While one runs: that one is aborted, and nothing of it is left."""
    page = visit(scripted)
    page.page.fill("#prompt", "")
    page.set("max_tokens", "900")
    page.set("ignore_eos", "true")
    page.page.click("#run")
    expect(page.page.locator(".token").nth(3)).to_be_attached()
    page.set("max_tokens", "4")
    page.run()
    assert 4 == page.page.locator(".token").count()
    assert "4 tokens" in page.page.inner_text(".figures")


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": "false", "seed": "7"},
        {"stream": "false", "best_of": "3", "seed": "7"},
        {"n": "3", "seed": "7"},
        {"logprobs": "", "seed": "7"},
        {"stop": "the\\n\n,", "seed": "7"},
    ],
    ids=str,
)
def test_other_forms_of_answer(server: Server, visit: Visiting, fields: dict[str, str]) -> None:
    """Whole, the best of some, several choices, without log-probabilities, ended by a stop string."""
    page = visit(server)
    page.page.fill("#prompt", PROMPT)
    for name, value in fields.items():
        page.set(name, value)
    page.run()
    (sent,) = page.sent()
    choices = complete(server, **{**sent, "stream": False})["choices"]
    assert [choice["text"] for choice in choices] == [page.text(choice=place) for place in range(len(choices))]
    assert len(choices) == page.page.locator(".choice").count()
    if "stop" in fields:
        assert 'Ended at the stop string ","' == page.page.inner_text(".reason")


def test_an_alternative_is_taken_and_the_text_goes_on_from_it(server: Server, visit: Visiting) -> None:
    """The text before stays, the alternative is in the token's place, and the server continues both."""
    page = visit(server)
    page.page.fill("#prompt", PROMPT)
    page.set("seed", "7")
    page.run()
    first = complete(server, prompt=PROMPT, seed=7, **PRESETS)["choices"][0]
    kept = first["text"][: first["logprobs"]["text_offset"][4]]
    page.page.locator(".token").nth(4).click()
    rows = page.page.locator("#alternatives .row")
    best = sorted(first["logprobs"]["top_logprobs"][4].items(), key=lambda pair: -pair[1])
    assert len(best) == rows.count()
    for place, (_, logprob) in enumerate(best):
        assert f"{100 * math.exp(logprob):.1f} %" in rows.nth(place).inner_text()
    other = next(place for place, (name, _) in enumerate(best) if name != first["logprobs"]["tokens"][4])
    rows.nth(other).click()
    page.wait_done()
    taken = kept + best[other][0]
    rest = complete(server, prompt=PROMPT + taken, seed=7, **PRESETS)["choices"][0]["text"]
    assert taken + rest == page.text()
    assert PROMPT + taken == page.sent()[-1]["prompt"]
    assert 5 + 64 == page.page.locator(".token").count()


def test_events_may_be_cut_anywhere(server: Server, visit: Visiting) -> None:
    """Within a character, a line or its end, and an event; with comments and each kind of line end."""
    page = visit(server)
    body = 'data: {"text":"ä日🦜"}\r\n\r\n: keep-alive\r\n\r\ndata:one\rdata: two\r\r'
    body += "id: 5\ndata: \u2028[DONE]\n\ndata: cut"
    found = page.page.evaluate(
        """async body => {
            const { events } = await import("./playground/stream.js");
            const bytes = new TextEncoder().encode(body);
            const found = new Set();
            for (let size = 1; size <= bytes.length; size += 1) {
                const stream = new ReadableStream({
                    start(controller) {
                        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                        controller.close();
                    },
                });
                const data = [];
                for await (const each of events(stream)) data.push(each);
                found.add(JSON.stringify(data));
            }
            return [...found].map(JSON.parse);
        }""",
        body,
    )
    assert [['{"text":"ä日🦜"}', "one\ntwo", "\u2028[DONE]"]] == found


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (CHUNK, "The connection broke off before the end."),
        (
            CHUNK + 'data: {"error": {"message": "a step failed", "code": "internal_error"}}\n\ndata: [DONE]\n\n',
            "a step failed",
        ),
        ("<html>", "The connection broke off"),
    ],
)
def test_a_stream_that_breaks(server: Server, visit: Visiting, body: str, told: str) -> None:
    """Its error is told, beside the text that came."""
    page = visit(server)
    page.set("logprobs", "")

    def answer(route: Route) -> None:
        route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=body)

    page.page.route("**/v1/completions", answer)
    page.run()
    expect(page.page.locator(".error")).to_contain_text(told)
    if body.startswith("data"):
        assert " so" == page.text()


def test_the_load_is_shown_while_the_page_is_seen(scripted: Server, visit: Visiting) -> None:
    """What runs and how fast, from the metrics; nobody is asked while nobody looks."""
    page = visit(scripted)
    page.page.fill("#prompt", "")
    for name, value in {"max_tokens": str(LONGEST["max_tokens"]), "ignore_eos": "true", "n": "4"}.items():
        page.set(name, value)
    page.page.click("#run")
    expect(page.page.locator("#running")).to_have_text("4")
    expect(page.page.locator("#rate")).not_to_have_text("0")
    page.page.click("#stop")
    page.page.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.page.wait_for_timeout(500)  # what was on its way
    before = len(page.requests)
    page.page.wait_for_timeout(4000)
    assert before == len(page.requests)
    page.page.evaluate(
        "Object.defineProperty(document, 'hidden', { value: false });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    expect(page.page.locator("#running")).to_have_text("0")
    assert before < len(page.requests)
    assert 200 == httpx.get(f"{scripted.url}/readyz").status_code


NOT_OURS = "not one that this service gives"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", "<html>a login page</html>"),
        ("application/json", '{"choices": [{"ind'),
        ("application/json", "null"),
        ("application/json", '{"object": "list"}'),
        ("application/json", '{"choices": [null]}'),
        ("text/event-stream", 'data: {"object": "list"}\n\n'),
        ("text/event-stream", "data: {\n\n"),
    ],
)
def test_an_answer_that_is_not_of_the_service(server: Server, visit: Visiting, kind: str, body: str) -> None:
    """It is told as an error, and the page runs no more."""
    page = visit(server)
    page.page.route("**/v1/completions", lambda route: route.fulfill(status=200, content_type=kind, body=body), times=1)
    page.run()
    expect(page.page.locator(".error")).to_be_visible()
    if "null]" not in body:
        expect(page.page.locator(".error")).to_contain_text(NOT_OURS)
    expect(page.page.locator("#stop")).to_have_attribute("aria-disabled", "true")
    page.set("max_tokens", "2")
    page.run()
    assert 2 == page.page.locator(".token").count()
    assert page.page.is_hidden(".error")


def test_an_alternative_with_a_wrong_field(server: Server, visit: Visiting) -> None:
    """Nothing is sent, the text stays, and the field is told."""
    page = visit(server)
    page.set("max_tokens", "4")
    page.run()
    before = page.text()
    page.set("temperature", "9")
    page.page.locator(".token").nth(1).click()
    page.page.locator("#alternatives .row:enabled").last.click()
    expect(page.page.locator("#a-temperature")).to_be_focused()
    assert 1 == len(page.sent())
    assert before == page.text()


def test_keys_after_text_without_scores(server: Server, visit: Visiting) -> None:
    """They go to the last token that has one, which Enter opens."""
    page = visit(server)
    page.set("max_tokens", "4")
    page.run()
    page.set("logprobs", "")
    page.page.locator(".token").nth(2).click()
    page.page.locator("#alternatives .row:enabled").last.click()
    page.wait_done()
    expect(page.page.locator(".token").nth(2)).to_be_focused()
    for key in ("ArrowRight", "End"):
        page.page.keyboard.press(key)
        expect(page.page.locator(".token").nth(2)).to_be_focused()
    page.page.keyboard.press("Enter")
    expect(page.page.locator("#alternatives")).to_be_visible()


def test_a_run_closes_the_alternatives(server: Server, visit: Visiting) -> None:
    page = visit(server)
    page.set("max_tokens", "4")
    page.run()
    page.page.locator(".token").nth(1).click()
    expect(page.page.locator("#alternatives")).to_be_visible()
    page.page.keyboard.press("Control+Enter")
    expect(page.page.locator("#alternatives")).to_be_hidden()
    page.wait_done()


def test_many_alternatives_fit_the_screen(server: Server, visit: Visiting) -> None:
    """Each can be scrolled to."""
    page = visit(server, viewport={"width": 1000, "height": 400})
    page.set("logprobs", "20")
    page.set("max_tokens", "4")
    page.run()
    page.page.locator(".token").nth(1).click()
    box = page.page.locator("#alternatives").bounding_box()
    assert 0 <= box["y"] <= box["y"] + box["height"] <= 400
    page.page.locator("#alternatives .close").click()
    expect(page.page.locator("#alternatives")).to_be_hidden()
