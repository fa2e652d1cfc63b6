"""schemathesis: requests made up from /openapi.json get no 5xx and no status that the schema does not list."""

import contextlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.server import Server, until_drained

_SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
_DEADLINE = "timeout_seconds"  # a request may ask for a 504


@pytest.mark.timeout(300)
def test_no_5xx_and_no_undocumented_status(small_server: Server, tmp_path: Path) -> None:
    """Of every operation, valid and invalid, also one after another: answers, headers and refusals are as documented.

    A valid request may be refused for what no schema can say, such as the context's length. So it is no failure when
    one is, but every operation must also have been served.
    """
    report = tmp_path / "report.har"
    arguments = {
        "checks": "all",
        "exclude-checks": "positive_data_acceptance,not_a_server_error",  # the latter knows of no deadlines
        "phases": "examples,coverage,fuzzing,stateful",
        "mode": "all",
        "max-examples": "60",
        "seed": "1",
        "request-timeout": "30",
        "suppress-health-check": "all",
        "generation-database": "none",
        "report": "har",
        "report-har-path": str(report),
    }
    options = [f"--{name}={value}" for name, value in arguments.items()]
    done = subprocess.run(
        [_SCHEMATHESIS, "run", f"{small_server.url}/openapi.json", "--no-color", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # it leaves a folder
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    seen: dict[str, set[int]] = defaultdict(set)
    documented = _documented(small_server)
    for entry in json.loads(report.read_text())["log"]["entries"]:
        method, status = entry["request"]["method"], entry["response"]["status"]
        path = "/" + entry["request"]["url"].removeprefix(small_server.url).lstrip("/").split("?")[0]
        name = f"{method} /v1/models/{{model_id}}" if path.startswith("/v1/models/") else f"{method} {path}"
        assert status < 500 or (status == 504 and _DEADLINE in _body(entry)), entry
        if name in documented:  # else it is a method that a path does not have
            assert status in documented[name], entry
            seen[name].add(status)
        else:
            assert status in (404, 405), entry
    assert documented.keys() == seen.keys()
    assert [] == [name for name, statuses in seen.items() if 200 not in statuses]
    refusing = {name for name, statuses in documented.items() if 400 in statuses}
    assert [] == [name for name in refusing if 400 not in seen[name]]


_BODIES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/score": {"items": [{"context": "x", "continuation": " y"}]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/api": {"prompts": ["x"], "tokens_to_generate": 4},
}
_SOON = 1e-6  # seconds


@pytest.fixture(scope="module")
def impatient_servers(small_folder: Path) -> Iterator[dict[int, Server]]:
    """By status, a server that answers so whatever needs the engine: its deadline has passed before a step is done."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for status, setting in ((429, "--queue-timeout-seconds"), (504, "--request-timeout-seconds")):
            server = Server(str(small_folder), "--kv-memory", "64MiB", setting, str(_SOON))
            servers[status] = stack.enter_context(contextlib.contextmanager(until_drained)(server))
        yield servers


def test_refusals_that_chance_seldom_finds_are_documented(
    small_server: Server, impatient_servers: dict[int, Server]
) -> None:
    """Each status of each route that takes a body, but those of a service that is not ready or has a bug.

    Without keys 401 is none of them.
    """
    documented = _documented(small_server)
    assert _BODIES.keys() == {name.removeprefix("POST ") for name in documented if name.startswith("POST ")}
    for path, body in _BODIES.items():
        right = json.dumps(body).encode()
        asked = {200: right, 400: b"{", 413: b" " * (9 << 20)}
        if path != "/api":  # it names no model
            asked[404] = json.dumps(body | {"model": "gpt-4"}).encode()
        if path not in ("/tokenize", "/detokenize"):  # the engine is not asked
            asked |= {429: right, 504: right}
        for status, content in asked.items():
            server = impatient_servers.get(status, small_server)
            response = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
            assert status == response.status_code, (path, response.text)
            assert status == 200 or {"message", "type", "param", "code"} == response.json()["error"].keys()
        assert asked.keys() | {500, 503} == documented[f"POST {path}"], path


def test_a_request_may_ask_for_its_own_deadlines(small_server: Server) -> None:
    """Where the service sets none: the same statuses."""
    for path, field, status in (
        ("/v1/completions", "timeout_seconds", 504),
        ("/v1/completions", "queue_timeout_seconds", 429),
        ("/v1/score", "timeout_seconds", 504),
    ):
        response = httpx.post(small_server.url + path, json=_BODIES[path] | {field: _SOON})
        assert status == response.status_code, response.text


def test_answers_while_loading_are_documented() -> None:
    """503 from every route that needs the model, and no other status that its operation does not list."""
    server = Server()
    try:
        documented = _documented(server)
        for name, statuses in documented.items():
            method, path = name.split()
            url = server.url + path.replace("{model_id}", "megatron-gpt2-demo")
            response = httpx.request(method, url, json=_BODIES.get(path))
            assert response.status_code in statuses, name
            if path in _BODIES:
                assert response.status_code == 503, name
                assert int(response.headers["retry-after"]) >= 1
    finally:
        server.kill()


def _documented(server: Server) -> dict[str, set[int]]:
    """The statuses of every operation, each as a number: a schema that says "default" has said nothing."""
    paths: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    return {
        f"{method.upper()} {path}": set(map(int, operation["responses"]))
        for path, operations in paths.items()
        for method, operation in operations.items()
    }


def _body(entry: dict[str, Any]) -> str:
    text: str = entry["request"].get("postData", {}).get("text", "")
    return text
