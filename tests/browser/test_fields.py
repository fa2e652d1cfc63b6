"""The form: every field of the schema with its limits, wrong values told beside them, the state in the address."""

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser.conftest import PROMPT, Visiting, complete
from tests.service.server import Server


def test_every_field_of_the_schema_is_there(server: Server, visit: Visiting) -> None:
    """With its description, and a number's limits and default; the common ones without unfolding anything."""
    page = visit(server)
    schema = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    for name, about in schema.items():
        if name == "prompt":
            continue
        control = page.page.locator(f"#a-{name}")
        assert about["description"].strip() in page.page.locator(f"#a-{name}-help").text_content()
        first = name in ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
        assert first == control.is_visible(), name
        numbers = [form for form in about.get("anyOf", [about]) if form.get("type") in ("integer", "number")]
        if not numbers:
            continue
        (limits,) = numbers
        for attribute, bound in (("min", limits.get("minimum")), ("max", limits.get("maximum"))):
            if bound is not None and abs(bound) < 2**31:
                assert bound == float(control.get_attribute(attribute)), name
        if about.get("default") is not None:
            assert about["default"] == float(control.get_attribute("placeholder"))
    assert schema.keys() - {"prompt"} == set(
        page.page.locator("#panes .field").evaluate_all("all => all.map(e => e.dataset.field)")
    )


WRONG = [
    ("temperature", "2.5", "must be 0 to 2"),
    ("temperature", "-1", "must be 0 to 2"),
    ("max_tokens", "1.5", "must be a whole number"),
    ("n", "0", "must be 1 to 128"),
    ("timeout_seconds", "0", "must be above 0, up to 86400"),
    ("seed", "9223372036854775808", "must fit 64 bits"),
    ("logit_bias", "{", "must be JSON"),
    ("stop_token_ids", "5, x", "must be a whole number"),
    ("stop_token_ids", "-5", "must be 0 or more"),
    ("stop", "\n".join("abcdefghij" for _ in range(65)), "must be at most 64"),
    ("cache_salt", "x" * 257, "must have 0 to 256 characters"),
]


def test_a_wrong_value_is_told_beside_its_field_and_not_sent(server: Server, visit: Visiting) -> None:
    """The field is marked and gets the focus; mended, it is sent."""
    page = visit(server)
    for name, value, told in WRONG:
        page.set(name, value)
        expect(page.page.locator(f"#a-{name}-error")).to_contain_text(told)
        assert "true" == page.page.get_attribute(f"#a-{name}", "aria-invalid")
        page.page.click("#run")
        expect(page.page.locator("#status")).to_contain_text("nothing was sent")
        expect(page.page.locator(f"#a-{name}")).to_be_focused()
        page.page.evaluate("document.getElementById('status').textContent = ''")
        page.set(name, "")
        expect(page.page.locator(f"#a-{name}-error")).to_be_hidden()
    assert [] == page.sent()
    page.set("max_tokens", "1")
    page.run()
    assert 1 == len(page.sent())


@pytest.mark.parametrize(
    ("name", "value"), [("best_of", "3"), ("model", "no-such-model"), ("guided_regex", "("), ("prompt", "word " * 2000)]
)
def test_what_the_server_says_is_told_beside_the_field_that_it_names(
    server: Server, visit: Visiting, name: str, value: str
) -> None:
    """And in the pane, with status and request id; editing the field takes the mark away."""
    page = visit(server)
    control, wrong = ("#prompt", "#prompt-wrong") if name == "prompt" else (f"#a-{name}", f"#a-{name}-error")
    if name == "prompt":
        page.page.fill("#prompt", value)
    else:
        page.set(name, value)
    page.run()
    (sent,) = page.sent()
    response = httpx.post(f"{server.url}/v1/completions", json=sent)
    error = response.json()["error"]
    if name == "prompt":
        control, wrong = (control, wrong) if error["param"] == "prompt" else ("#a-max_tokens", "#a-max_tokens-error")
    assert error["message"] in page.page.inner_text(wrong)
    expect(page.page.locator(control)).to_have_attribute("aria-invalid", "true")
    assert error["message"] in page.page.inner_text(".error")
    assert f"HTTP {response.status_code}" in page.page.inner_text(".error .about")
    page.shot(f"error-{name}")
    page.page.get_by_text("Code", exact=True).click()
    expect(page.page.locator("pre code")).not_to_be_empty()
    page.set("seed", "3")
    assert error["message"] in page.page.inner_text(wrong)  # the code is read from the fields, which tells nothing anew
    page.page.fill(control, "")
    expect(page.page.locator(wrong)).to_be_hidden()


def test_each_kind_of_field_is_sent_as_it_was_meant(server: Server, visit: Visiting) -> None:
    """Whole numbers with all their digits, lines with escapes, lists, JSON; what is at its default is left out."""
    page = visit(server)
    page.page.fill("#prompt", PROMPT)
    typed = {
        "max_tokens": "4",
        "temperature": "1",
        "top_p": "",
        "seed": "-9223372036854775807",
        "stop": "\\n\\n\n\\\\n\na b",
        "ignore_eos": "true",
        "skip_special_tokens": "true",
        "truncation_side": "right",
        "stop_token_ids": "5, 7  9",
        "bad_words": "king\n queen",
        "logit_bias": '{"50256": -100}',
        "user": "me",
    }
    for name, value in typed.items():
        page.set(name, value)
    page.run()
    expected: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 4,
        "seed": -9223372036854775807,
        "stop": ["\n\n", "\\n", "a b"],
        "ignore_eos": True,
        "truncation_side": "right",
        "stop_token_ids": [5, 7, 9],
        "bad_words": ["king", " queen"],
        "logit_bias": {"50256": -100},
        "user": "me",
        "logprobs": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = [request.post_data for request in page.requests if request.url.endswith("v1/completions")]
    assert [expected] == [json.loads(each or "") for each in sent]
    assert complete(server, **{**expected, "stream": False})["choices"][0]["text"] == page.text()


def test_sliders_and_numbers_are_one(server: Server, visit: Visiting) -> None:
    page = visit(server)
    slider = page.page.get_by_label("temperature, slider").first
    slider.fill("1.5")
    assert "1.5" == page.page.input_value("#a-temperature")
    page.set("temperature", "0.25")
    assert "0.25" == slider.input_value()
    page.set("temperature", "")
    assert "1" == slider.input_value()  # the default


def test_the_address_has_the_state(server: Server, visit: Visiting) -> None:
    """Opened elsewhere it shows the same: prompt, fields of both settings; but not what is nobody's business."""
    page = visit(server)
    page.page.fill("#prompt", "Une ligne &\n#2 = 100 %")
    page.set("seed", "7")
    page.set("max_tokens", "")
    page.set("cache_salt", "secret-salt")
    page.page.check("#compare")
    page.set("temperature", "1.5", pane="b")
    page.page.wait_for_url("**b.temperature=1.5**")
    address = page.page.url
    assert "salt" not in address
    state = parse_qs(urlsplit(address).fragment, keep_blank_values=True)
    assert {"seed": ["7"], "b.temperature": ["1.5"], "max_tokens": [""]}.items() <= state.items()
    other = visit(server, fragment=address.removeprefix(page.url))
    assert "Une ligne &\n#2 = 100 %" == other.page.input_value("#prompt")
    assert ("7", "", "0.8") == tuple(
        other.page.input_value(f"#a-{name}") for name in ("seed", "max_tokens", "temperature")
    )
    assert ("7", "1.5") == (other.page.input_value("#b-seed"), other.page.input_value("#b-temperature"))
    other.page.get_by_role("button", name="Reset").first.click()
    assert ("", "64") == (other.page.input_value("#a-seed"), other.page.input_value("#a-max_tokens"))


def test_a_link_without_its_prompt(server: Server, visit: Visiting) -> None:
    """A prompt that is too long for an address stays out of it, and that is said."""
    page = visit(server, permissions=["clipboard-read", "clipboard-write"])
    for length, left in ((2000, False), (2001, True)):
        page.page.fill("#prompt", "x" * length)
        page.page.get_by_role("button", name="Copy link").click()
        words = (
            "The link is copied without the prompt, which is over 2000 characters." if left else "The link is copied."
        )
        expect(page.page.locator("#status")).to_have_text(words)
        expect(page.page.locator("#status")).to_be_visible()
        assert left != ("xxxx" in page.page.evaluate("navigator.clipboard.readText()"))


def test_an_address_that_makes_no_sense(server: Server, visit: Visiting) -> None:
    """Unknown names and wrong values: the one are ignored, the other told."""
    page = visit(server, fragment="#a.b=3&__proto__=4&temperature=hot&seed=12&nothing=x&b.seed=9&%E0%A4%A")
    assert "12" == page.page.input_value("#a-seed")
    assert 1 == page.page.locator(".pane").count()


def test_two_settings_side_by_side(server: Server, visit: Visiting) -> None:
    """Both run at once on one prompt, each by its own fields; one may fail while the other goes on."""
    page = visit(server)
    page.page.fill("#prompt", PROMPT)
    page.set("seed", "7")
    page.page.check("#compare")
    assert "7" == page.page.input_value("#b-seed")  # begins as the first
    page.set("seed", "8", pane="b")
    page.run()
    sent = page.sent()
    assert [7, 8] == sorted(body["seed"] for body in sent)
    for pane, body in enumerate(sorted(sent, key=lambda body: body["seed"])):
        assert complete(server, **{**body, "stream": False})["choices"][0]["text"] == page.text(pane)
    assert 2 == page.page.locator("datalist").count()
    left, right = (page.page.locator(".pane").nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    page.set("model", "nothing", pane="b")
    page.run()
    expect(page.page.locator(".pane").nth(1).locator(".error")).to_be_visible()
    assert page.text(0)
    page.page.set_viewport_size({"width": 390, "height": 800})
    upper, lower = (page.page.locator(".pane").nth(place).bounding_box() for place in (0, 1))
    assert upper["y"] + upper["height"] <= lower["y"]
    page.page.uncheck("#compare")
    assert 1 == page.page.locator(".pane").count()
