"""POST /admin/drain: what it says and waits for, and that the public application has nothing of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.admin import create_admin
from service.api.drain import Drain
from tests.api.clock import Clock
from tests.api.conftest import Service

STATE = {"status": "draining", "phase": "drain", "requests_open": 0, "running": 0, "waiting": 0}


def admin_of(
    api: Service, *, unready_seconds: float = 0, clock: Callable[[], float] = time.monotonic
) -> httpx.AsyncClient:
    """A client of the admin application over the service's own engine client."""
    app = create_admin(Drain(api.client, unready_seconds=unready_seconds, clock=clock), api.client)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://admin")


@pytest.fixture
async def admin(api: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with admin_of(api) as client:
        yield client


async def drained(admin: httpx.AsyncClient, **query: Any) -> dict[str, Any]:
    """The state, which must have the documented fields."""
    response = await admin.post("/admin/drain", params=query)
    assert 200 == response.status_code, response.text
    state: dict[str, Any] = response.json()
    assert {*STATE, "waited_seconds", "unready_seconds"} == set(state)
    return state


async def test_it_answers_at_once_and_again(api: Service, admin: httpx.AsyncClient) -> None:
    """Without a wait it says what is open; new requests are refused, and the next call says the same."""
    api.engine.gate.clear()
    running = asyncio.ensure_future(api.complete(prompt=["x", "y"]))
    await api.engine.wait_for(lambda: 2 == len(api.engine.submitted))
    for _ in range(2):
        state = await drained(admin)
        assert STATE | {"requests_open": 1} == {name: state[name] for name in STATE}
    assert 0 == state["unready_seconds"]
    refused = await api.http.post("/v1/completions", json={})
    assert (503, "1") == (refused.status_code, refused.headers["retry-after"])
    assert 503 == (await api.http.get("/readyz")).status_code
    assert 200 == (await api.http.get("/livez")).status_code
    text = (await api.http.get("/metrics")).text
    assert "megatron_gpt2_draining 1.0" in text
    assert "megatron_gpt2_requests_open 1.0" in text
    api.engine.gate.set()
    assert 32 == (await running)["usage"]["completion_tokens"]
    await api.wait_metric("megatron_gpt2_draining", 1)
    assert "megatron_gpt2_requests_open 0.0" in (await api.http.get("/metrics")).text


async def test_the_documented_answer_is_of_this_form(admin: httpx.AsyncClient) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    documented = json.loads(page.split("```json\n")[1].split("```")[0])
    state = await drained(admin)
    assert {name: type(value) for name, value in documented.items()} == {name: type(state[name]) for name in state}


async def test_it_waits_until_nothing_is_open(api: Service, admin: httpx.AsyncClient) -> None:
    api.engine.gate.clear()
    running = asyncio.ensure_future(api.complete(prompt="x"))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    waiting = asyncio.ensure_future(drained(admin, wait_seconds=60))
    await api.wait_metric("megatron_gpt2_draining", 1)
    assert not waiting.done()
    api.engine.gate.set()
    assert STATE.items() <= (await waiting).items()
    await running


async def test_it_waits_no_longer_than_it_was_asked_to(api: Service, admin: httpx.AsyncClient) -> None:
    """What is open stays open."""
    api.engine.gate.clear()
    running = asyncio.ensure_future(api.complete(prompt="x"))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    state = await drained(admin, wait_seconds=0.05)
    assert 1 == state["requests_open"]
    assert state["waited_seconds"] >= 0.05
    assert not running.done()
    api.engine.gate.set()
    await running


async def test_a_wait_gives_balancers_time(api: Service) -> None:
    """With nothing open too; the time counts from the drain's beginning, once."""
    clock = Clock()
    async with admin_of(api, unready_seconds=1000, clock=clock) as admin:
        assert 1000 == (await drained(admin))["unready_seconds"]
        clock.now += 400
        assert 600 == (await drained(admin))["unready_seconds"]
        waiting = asyncio.ensure_future(drained(admin, wait_seconds=0))
        assert 600 == (await drained(admin))["unready_seconds"]
        assert not waiting.done()
        waiting.cancel()
        clock.now += 599.9
        state = await drained(admin, wait_seconds=0)
        assert 0.1 <= state["waited_seconds"]
        clock.now += 1
        for _ in range(2):
            assert 0 == (await drained(admin, wait_seconds=0))["unready_seconds"]


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "86401", "soon", ""])
async def test_a_wait_that_is_none(api: Service, admin: httpx.AsyncClient, value: str) -> None:
    """400 that names it, and nothing is drained."""
    response = await admin.post("/admin/drain", params={"wait_seconds": value})
    assert 400 == response.status_code
    error = response.json()["error"]
    assert ("invalid_request_error", "wait_seconds") == (error["type"], error["param"])
    assert error["message"].startswith("wait_seconds: ")
    assert not api.client.draining


async def test_a_page_of_a_browser_may_not(api: Service, admin: httpx.AsyncClient) -> None:
    """Whatever page someone on this machine looks at could ask a port of 127.0.0.1; a browser then sends Origin."""
    response = await admin.post("/admin/drain", headers={"Origin": "http://somewhere.example"})
    assert (403, "forbidden") == (response.status_code, response.json()["error"]["code"])
    assert not api.client.draining


async def test_there_is_nothing_else(api: Service, admin: httpx.AsyncClient) -> None:
    """Errors are in the envelope, those of nobody's expectation too."""
    for path in ("/", "/docs", "/openapi.json", "/metrics", "/v1/models", "/readyz", "/admin", "/admin/drain/"):
        response = await admin.get(path)
        assert (404, "not_found") == (response.status_code, response.json()["error"]["code"])
    response = await admin.get("/admin/drain")
    assert (405, "method_not_allowed") == (response.status_code, response.json()["error"]["code"])
    assert not api.client.draining
    api.client.drain = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    response = await admin.post("/admin/drain")
    assert (500, "internal_error") == (response.status_code, response.json()["error"]["code"])


async def test_the_public_application_has_no_admin_route(api: Service) -> None:
    """Not among its routes, nor by asking for it in any way."""
    paths = {route.path for route in api.routes()}
    assert {"/v1/completions", "/v1/score", "/api", "/tokenize", "/readyz", "/docs", "/openapi.json"} <= paths
    assert set() == {path for path in paths if "admin" in path or "drain" in path}
    for path in ("/admin/drain", "/admin/drain/", "/v1/admin/drain", "//admin/drain", "/admin%2Fdrain", "/drain"):
        for method in ("POST", "PUT", "GET"):
            response = await api.http.request(method, api.url + path)
            assert (404, "not_found") == (response.status_code, response.json()["error"]["code"]), path
    assert 200 == (await api.http.get("/readyz")).status_code


async def test_connections_end_while_it_drains(api: Service, admin: httpx.AsyncClient) -> None:
    """Answers keep the connection before, and end it after, so that the next request finds another replica."""
    for path in ("/readyz", "/nothing"):
        assert "connection" not in (await api.http.get(path)).headers
    api.engine.gate.clear()
    running = asyncio.ensure_future(api.http.post("/v1/completions", json={"prompt": "x"}))
    await api.engine.wait_for(lambda: bool(api.engine.submitted))
    await drained(admin)
    for path in ("/readyz", "/nothing", "/metrics"):
        assert "close" == (await api.http.get(path)).headers["connection"]
    refused = await api.http.post("/v1/completions", json={"prompt": "x"})
    assert (503, "close") == (refused.status_code, refused.headers["connection"])
    api.engine.gate.set()
    assert (200, "close") == ((await running).status_code, (await running).headers["connection"])
