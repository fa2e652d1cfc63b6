"""Keys: asked for where the service asks for one, tried before it is taken, kept for the tab, forgotten at a word."""

from playwright.sync_api import expect

from tests.browser.conftest import KEY, Visit, Visiting
from tests.service.scripted_model import LONGEST
from tests.service.server import Server, Start


def enter(page: Visit, key: str) -> None:
    page.page.fill("#key-value", key)
    page.page.click("#key button.main")


def test_a_wrong_key_and_the_right_one(keyed: Server, visit: Visiting) -> None:
    """The wrong one is refused beside its field and not kept; with the right one all is there as without keys."""
    page = visit(keyed, ready=False)
    expect(page.page.locator("#key")).to_be_visible()
    page.shot("key")
    enter(page, "mgpt-another-key")
    expect(page.page.locator("#key-wrong")).to_contain_text("not known here")
    assert 0 == page.page.evaluate("sessionStorage.length")
    enter(page, "clé")
    expect(page.page.locator("#key-wrong")).to_contain_text("ASCII")
    enter(page, KEY)
    expect(page.page.locator("#key")).to_be_hidden()
    page.wait_ready()
    expect(page.page.locator("#load")).to_be_visible()
    page.set("max_tokens", "3")
    page.run()
    assert 3 == page.page.locator(".token").count()
    (sent,) = [request for request in page.requests if request.url.endswith("v1/completions")]
    assert f"Bearer {KEY}" == sent.headers["authorization"]


def test_a_key_that_is_entered_twice(keyed: Server, visit: Visiting) -> None:
    """It is tried once, and a wrong one is not kept."""
    page = visit(keyed, ready=False)
    page.page.fill("#key-value", "mgpt-another-key")
    page.page.evaluate("[1, 2].forEach(() => document.querySelector('#key form').requestSubmit())")
    expect(page.page.locator("#key-wrong")).to_contain_text("not known here")
    page.page.wait_for_timeout(200)  # a second try would be on its way
    assert 1 == sum("mgpt-another-key" in each.headers.get("authorization", "") for each in page.requests)
    assert 0 == page.page.evaluate("sessionStorage.length")


def test_before_the_key(keyed: Server, visit: Visiting) -> None:
    """What cannot be done is greyed out, Run asks for the key, and what was typed is there with it."""
    page = visit(keyed, ready=False)
    expect(page.page.locator("#key")).to_be_visible()
    page.page.keyboard.press("Escape")
    expect(page.page.locator("#key")).to_be_hidden()
    page.page.fill("#prompt", "Typed before")
    for each in ("#run", "#compare", "#share"):
        expect(page.page.locator(each)).to_be_disabled()
    expect(page.page.locator("#reference")).to_be_hidden()  # a link has no key
    page.page.click("#run", force=True)
    expect(page.page.locator("#key")).to_be_visible()
    enter(page, KEY)
    page.page.wait_for_selector("#a-seed")
    page.wait_ready()
    for each in ("#run", "#compare", "#share"):
        expect(page.page.locator(each)).to_be_enabled()
    assert "Typed before" == page.page.input_value("#prompt")


def test_the_load_asks_nothing_while_the_key_is_used(keyed: Server, visit: Visiting) -> None:
    """Which may allow one request at a time."""
    page = visit(keyed, ready=False)
    enter(page, KEY)
    page.page.wait_for_selector("#a-seed")
    page.wait_ready()
    expect(page.page.locator("#load")).to_be_visible()
    page.page.fill("#prompt", "")
    for name, value in {"max_tokens": str(LONGEST["max_tokens"]), "ignore_eos": "true"}.items():
        page.set(name, value)
    page.page.click("#run")
    expect(page.page.locator(".token").nth(3)).to_be_attached()
    look = "document.dispatchEvent(new Event('visibilitychange'))"
    with page.page.expect_response("**/readyz"):
        before = len(page.requests)
        page.page.evaluate(look)
    page.page.wait_for_timeout(300)  # the metrics would be asked for next
    assert not [each.url for each in page.requests[before:] if each.url.endswith("metrics")]
    expect(page.page.locator("#load")).to_be_visible()
    page.page.click("#stop")
    page.wait_done()
    with page.page.expect_response("**/metrics"):
        page.page.evaluate(look)


def test_a_key_is_kept_for_the_tab_alone(keyed: Server, visit: Visiting) -> None:
    """A reload needs none again; address, document, local storage and cookies have none; forgotten, it is asked for."""
    page = visit(keyed, ready=False)
    enter(page, KEY)
    page.page.wait_for_selector("#a-seed")
    page.set("seed", "1")
    page.page.wait_for_url("**seed=1**")
    page.page.reload()
    page.page.wait_for_selector("#a-seed")
    page.wait_ready()
    expect(page.page.locator("#key")).to_be_hidden()
    assert KEY not in page.page.url
    assert KEY not in page.page.evaluate(
        "JSON.stringify(localStorage) + document.cookie + document.documentElement.outerHTML"
    )
    page.page.click("#key-button")
    page.page.click("#key .forget")
    expect(page.page.locator("#notice")).to_be_visible()
    assert 0 == page.page.evaluate("sessionStorage.length")
    page.page.reload()
    expect(page.page.locator("#key")).to_be_visible()


def test_a_key_that_is_withdrawn(keyed: Server, visit: Visiting) -> None:
    """The page asks for another one."""
    page = visit(keyed, ready=False)
    enter(page, KEY)
    page.page.wait_for_selector("#a-seed")
    page.wait_ready()
    name = page.page.evaluate("Object.keys(sessionStorage)[0]")
    page.page.evaluate("name => sessionStorage.setItem(name, 'mgpt-old')", name)
    page.page.reload()
    expect(page.page.locator("#key-wrong")).to_contain_text("not known here")
    enter(page, KEY)
    page.page.wait_for_selector("#a-seed")


def test_a_schema_that_is_open(start: Start, visit: Visiting) -> None:
    """Then the form is there at once, and the page still knows that a key is needed."""
    server = start("--kv-memory", "64MiB", "--open-routes", "/openapi.json,/docs", environment={"MGPT_API_KEY": KEY})
    page = visit(server, ready=False)
    expect(page.page.locator("#key")).to_be_visible()
    page.page.wait_for_selector("#a-max_tokens")
    expect(page.page.locator("#reference")).to_be_visible()
    page.page.keyboard.press("Escape")
    page.wait_ready()
    page.run()
    expect(page.page.locator(".error")).to_contain_text("asks for a key")
    expect(page.page.locator("#key")).to_be_visible()
    enter(page, KEY)
    page.set("max_tokens", "2")
    page.run()
    assert 2 == page.page.locator(".token").count()


def test_without_keys_none_is_asked_for(server: Server, visit: Visiting) -> None:
    page = visit(server)
    assert page.page.is_hidden("#key-button")
    assert not any("authorization" in request.headers for request in page.requests)
