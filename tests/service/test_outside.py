"""What a client says stays inside: no path, URL or name of it reaches the file system, a socket, or a process."""

import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.scripted_model import ScriptedModel
from tests.service.server import Server, Start

MARK = "m4rk3d"
# Forms that something might take for a file, an address, a command or a module.
VALUES = [
    f"/tmp/{MARK}",
    f"../../../{MARK}/config.json",
    f"file:///tmp/{MARK}",
    f"http://127.0.0.1:9/{MARK}",
    f"$(touch /tmp/{MARK})",
    f"{MARK}.module",
    f"org/{MARK}",
]
HEADERS = (
    *("X-Request-Id", "Authorization", "Referer", "Cookie", "Range", "Accept", "User-Agent", "If-None-Match"),
    *("X-Forwarded-For", "X-Forwarded-Host", "X-Original-URL", "X-Sendfile", "traceparent"),
)
# Read by every Python process of the service as it starts, which then notes what it asks of the system.
_SITECUSTOMIZE = """
    import os
    import sys

    notes = os.open(os.path.join(os.environ["AUDIT_FOLDER"], str(os.getpid())), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    parts = ("compile", "ctypes", "exec", "glob", "import", "marshal", "open", "os", "pathlib", "pickle", "shutil",
             "socket", "sqlite3", "subprocess", "tempfile", "urllib", "webbrowser")

    def note(event, arguments):
        if event.split(".")[0] in parts:
            os.write(notes, (event + " " + ascii(arguments) + chr(10)).encode())

    sys.addaudithook(note)
"""


@pytest.fixture
def audited(
    start: Start, scripted_model: ScriptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Server, Path]:
    """A server, and the folder with a file of notes for each of its processes."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(textwrap.dedent(_SITECUSTOMIZE))
    monkeypatch.setenv("AUDIT_FOLDER", str(tmp_path / "notes"))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), *([before] if before else [])]))
    return start(str(scripted_model.folder)), tmp_path / "notes"


def bodies(schema: dict[str, Any], value: str) -> Iterator[dict[str, Any]]:
    """The marked value in every field, in the forms that a field might take, one at a time and all at once."""
    fields = list(schema["properties"])
    required: dict[str, Any] = dict.fromkeys(schema.get("required", ()), "a")
    required |= {"items": [{"context": "a", "continuation": "b"}]} if "items" in fields else {}
    required |= {"tokens": [1]} if "tokens" in fields else {}
    required |= {"prompts": ["a"], "tokens_to_generate": 2} if "prompts" in fields else {}
    for form in (value, [value], {"type": "json_schema", value: value}, [{"context": value, "continuation": value}]):
        yield dict.fromkeys(fields, form)
        for name in fields:
            yield {"max_tokens": 2, **required, name: form}
    yield {**required, value: value}


async def test_nothing_of_a_request_gets_outside(audited: tuple[Server, Path]) -> None:
    """On every route, in the path, the query, the headers and every field of the body."""
    server, notes = audited
    statuses: set[int] = set()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        document = (await http.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        for value in VALUES:
            headers = dict.fromkeys(HEADERS, value)
            for path, operations in document["paths"].items():
                place = re.sub(r"\{.*?\}", value, path)
                for method, operation in operations.items():
                    urls = [place, f"{place}?path={value}&file={value}", f"{path}/{value}", f"/{value}"]
                    for url in urls:
                        response = await http.request(method.upper(), url, headers=headers)
                        statuses.add(response.status_code)
                    content = operation.get("requestBody", {}).get("content", {})
                    for form in content.values():
                        name = form["schema"]["$ref"].rpartition("/")[2]
                        for body in bodies(schemas[name], value):
                            response = await http.request(method.upper(), path, json=body, headers=headers)
                            statuses.add(response.status_code)
                            assert response.status_code < 500, response.text
        answer = await http.post("/v1/completions", json={"prompt": f"{VALUES}", "stop": VALUES, "max_tokens": 5})
        assert 200 == answer.status_code
    assert {200, 400, 404} <= statuses
    written = {file.name: file.read_text() for file in notes.iterdir()}
    for process in (server.process, server.api, server.engine):
        assert "\nopen " in written[str(process.pid)]
    assert "vocab.json" in written[str(server.api.pid)] + written[str(server.engine.pid)]
    for text in written.values():
        assert [] == [line for line in text.splitlines() if MARK in line]
