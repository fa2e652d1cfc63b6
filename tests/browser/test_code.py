"""The code that the page shows asks for what the page asks for, whatever is in the prompt. Each is run."""

import os
import subprocess
import sys

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import KEY, Visit, Visiting, complete
from tests.service.server import Server, Streamed

HOSTILE = 'It\'s "quoted" $HOME `id` \\n %s {x}\n\tsecond line — 日本 🦜\u2028 ${1+1} \'\'\'""" \\'
FIELDS = {"seed": "9007199254740993", "max_tokens": "12", "stop": "\\n\n'", "top_k": "40", "ignore_eos": "true"}


def fill(page: Visit, **more: str) -> None:
    page.page.fill("#prompt", HOSTILE)
    for name, value in {**FIELDS, **more}.items():
        page.set(name, value)
    page.page.get_by_text("Code", exact=True).click()


def code(page: Visit, language: str) -> str:
    expect(page.page.locator("pre code")).not_to_be_empty()  # unfolding is told a moment later
    page.page.get_by_label(language, exact=True).check()
    found = page.page.text_content("pre code")
    assert found is not None
    return found


def expected(server: Server, page: Visit) -> str:
    """The text of what the page itself sends."""
    page.run()
    text: str = complete(server, **{**page.sent()[-1], "stream": False})["choices"][0]["text"]
    assert text == page.text()
    return text


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


def printed(page: Visit, script: str) -> str:
    """What JavaScript prints, run in the page."""
    console = "const said = []; const console = { log: text => said.push(text) };"
    said: list[str] = page.page.evaluate(f"async () => {{ {console}\n{script}\nreturn said; }}")
    return "".join(said)


def streamed_text(output: str) -> str:
    streamed = Streamed()
    for line in output.split("\n"):
        streamed.take(line)
    assert streamed.done
    return streamed.text()


@pytest.mark.parametrize("more", [{}, {"stream": "false"}], ids=["streamed", "whole"])
def test_each_language_gives_the_text_of_the_page(server: Server, visit: Visiting, more: dict[str, str]) -> None:
    page = visit(server)
    fill(page, **more)
    text = expected(server, page)
    shell = run(["bash", "-euc", code(page, "curl")])
    if more:
        assert text in complete(server, **page.sent()[-1])["choices"][0]["text"]
        assert '"object":"text_completion"' in shell
    else:
        assert text == streamed_text(shell)
    assert text == run([sys.executable, "-c", code(page, "Python")]).removesuffix("\n" if more else "")
    assert text == printed(page, code(page, "JavaScript"))


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_the_key_is_a_variable(keyed: Server, visit: Visiting, language: str) -> None:
    """The key itself is nowhere in the code; with the variable set the code runs."""
    page = visit(keyed, ready=False)
    page.page.fill("#key-value", KEY)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#a-max_tokens")
    page.wait_ready()
    page.set("logprobs", "")
    fill(page)
    page.run()
    shown = code(page, language)
    assert KEY not in shown
    assert "API_KEY" in shown
    match language:
        case "curl":
            text = streamed_text(run(["bash", "-euc", shown], API_KEY=KEY))
        case "Python":
            text = run([sys.executable, "-c", shown], API_KEY=KEY)
        case _:
            text = printed(page, shown.replace('"your key"', f'"{KEY}"'))
    assert page.text() == text


def test_code_and_text_are_copied(server: Server, visit: Visiting) -> None:
    """Also where the page may not use the clipboard, as over plain HTTP from another machine."""
    page = visit(server, permissions=["clipboard-read", "clipboard-write"])
    fill(page)
    page.run()
    read = "navigator.clipboard.readText()"
    for simulated in (False, True):
        if simulated:
            page.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not here')) }")
        page.page.get_by_role("button", name="Copy code").click()
        page.page.locator("#status", has_text="The code is copied.").wait_for(state="attached")
        assert page.page.text_content("pre code") == page.page.evaluate(read)
        page.page.get_by_role("button", name="Copy text").click()
        page.page.locator("#status", has_text="The text is copied.").wait_for(state="attached")
        assert page.text() == page.page.evaluate(read)
        page.page.get_by_role("button", name="Copy link").click()
        page.page.locator("#status", has_text="The link is copied.").wait_for(state="attached")
        assert page.page.url == page.page.evaluate(read)


def test_code_follows_the_fields(server: Server, visit: Visiting) -> None:
    page = visit(server)
    page.page.get_by_text("Code", exact=True).click()
    assert '"max_tokens": 64' in code(page, "curl")
    page.set("max_tokens", "5")
    assert '"max_tokens": 5' in page.page.inner_text("pre")
    page.set("max_tokens", "-1")
    assert "A field is wrong." == page.page.inner_text("pre")
