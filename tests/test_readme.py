"""README.md says what is so, and docs/settings.md: Settings' own; the examples run against a served demo model.

`python -m tests.test_readme` writes the settings table and the answer of the curl example anew.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import ENV_PREFIX, Settings
from tests.commands import DOCUMENTED_URL, curl

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SETTINGS = ROOT / "docs" / "settings.md"
COMMAND = Path(sys.executable).with_name("megatron-gpt2")
VARYING = ("id", "created", "system_fingerprint")
TABLE_HEAD = "| flag | environment variable | default | what |\n| --- | --- | --- | --- |\n"


@contextmanager
def served_demo() -> Iterator[str]:
    """The URL of a demo model served by the real command, which drains and ends with 0 afterwards."""
    command = [COMMAND, "serve", "--port", "0", "--log-format", "text", "--kv-memory", "64MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = next(match[1] for line in process.stderr if (match := re.search(r"listening on (http://\S+)", line)))
            next(line for line in process.stderr if "model loaded" in line)
            # A moment later it is ready, which nothing but the route tells.
            with httpx.Client(base_url=url) as http:
                while http.get("/readyz").status_code != 200:
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.communicate(timeout=20)
        assert process.returncode == 0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_demo() as url:
        yield url


def block(language: str, start: str) -> str:
    """The README's block of `language` that begins with `start`."""
    match = re.search(rf"^```{language}\n({re.escape(start)}.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert match is not None, f"README.md has no block of {language} that begins with {start!r}"
    return match[1]


def curl_answer(command: str, url: str) -> str:
    """What the README's curl command prints, asked of `url`."""
    response = curl(command, url)
    assert 200 == response.status_code, response.text
    return response.text


def events(answer: str) -> list[dict[str, Any]]:
    """The events of a stream without what differs from run to run. It must end as streams do."""
    lines = [line for line in answer.splitlines() if line]
    assert "data: [DONE]" == lines[-1]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return [{key: value for key, value in chunk.items() if key not in VARYING} for chunk in chunks]


def merged(chunks: list[dict[str, Any]], ends: list[int]) -> list[dict[str, Any]]:
    """Chunks of one choice, joined so that their text ends at the characters `ends`."""
    joined: list[dict[str, Any]] = []
    text = ""
    start = 0
    for chunk in chunks:
        choice = chunk["choices"][0]
        text += choice["text"]
        if len(text) in ends:
            joined.append(chunk | {"choices": [choice | {"text": text[start:]}]})
            start = len(text)
    return joined


def text_ends(chunks: list[dict[str, Any]]) -> list[int]:
    lengths = [len(chunk["choices"][0]["text"]) for chunk in chunks]
    return [sum(lengths[: place + 1]) for place in range(len(lengths))]


def settings_table() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        flag = "MODEL" if name == "model" else "--" + name.replace("_", "-")
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        rows.append(f"| `{flag}` | `{ENV_PREFIX}{name.upper()}` | {default} | {field.description} |\n")
    return "".join(rows)


def test_settings_table_is_that_of_the_class() -> None:
    """Flag, variable, default and description of every setting, and no other row."""
    after = SETTINGS.read_text().split(TABLE_HEAD)[1]
    assert settings_table() == after[: after.index("\n\n") + 1]


def test_curl_prints_the_documented_answer(url: str) -> None:
    """Line by line but for id, time and fingerprint. On a busy machine an event may carry what were two."""
    command, documented = block("console", "$ curl").split("\n", 1)
    expected, answer = events(documented), events(curl_answer(command.removeprefix("$ "), url))
    assert merged(expected, text_ends(answer)) == answer


def test_python_example_runs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the text of both prompts, the same each time."""
    source = block("python", "from openai").replace(DOCUMENTED_URL, url)
    printed = []
    for _ in range(2):
        exec(compile(source, "README.md", "exec"), {})
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert 2 <= printed[0].count("\n")


def test_documented_routes_answer(url: str) -> None:
    """Every route that the README names is there."""
    routes = set(re.findall(r"`(/[a-z]\w+)`", README.read_text()))
    assert {"/livez", "/readyz", "/health", "/ping", "/metrics", "/version", "/docs"} == routes
    assert dict.fromkeys(routes, 200) == {route: httpx.get(url + route).status_code for route in routes}


def test_it_has_what_a_reader_looks_for() -> None:
    """Two commands first, a picture of the playground, one figure against vLLM with its command, as docs/performance.md
    has it, three ways to deploy, and a link to each document."""
    text = README.read_text()
    first = re.search(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert first is not None
    assert ["$ make run", "$ make test"] == [line.partition("#")[0].strip() for line in first[1].splitlines()]
    assert "```" not in text[: first.start()]
    assert re.search(r"!\[The playground: [^]]+\]\(docs/pictures/playground-light.png\)", text)
    fast = " ".join(_section(text, "How fast").split())
    compared = re.search(
        r"at (\d+) streams .*? gives ([\d,]+) tokens/s, where vLLM [\d.]+ gives ([\d,]+): ([\d.]+)", fast
    )
    assert compared is not None
    streams, ours, theirs, ratio = compared.groups()
    assert f"--concurrency {streams} " in block("console", "$ megatron-gpt2 bench")
    assert float(ratio) == round(int(ours.replace(",", "")) / int(theirs.replace(",", "")), 1)
    performance = (ROOT / "docs/performance.md").read_text()
    assert ours in performance
    assert theirs in performance
    ways = re.findall(r"^(\d)\. \*\*(.+?)\*\*", _section(text, "Deploying it"), re.MULTILINE)
    assert [("1", "An image"), ("2", "Compose"), ("3", "Kubernetes")] == ways
    linked = set(re.findall(r"\]\((docs/\w+\.md|[A-Z]+\.md)\)", _section(text, "Read on")))
    documents = {file.relative_to(ROOT).as_posix() for file in ROOT.glob("docs/*.md")}
    assert documents | {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} == linked


def _section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def write() -> None:
    head, after = SETTINGS.read_text().split(TABLE_HEAD)
    table_end = after.index("\n\n") + 1 if after.startswith("|") else 0
    SETTINGS.write_text(head + TABLE_HEAD + settings_table() + after[table_end:])
    text = README.read_text()
    command, documented = block("console", "$ curl").split("\n", 1)
    with served_demo() as url:
        README.write_text(text.replace(documented, curl_answer(command.removeprefix("$ "), url).removesuffix("\n")))


if __name__ == "__main__":
    write()
