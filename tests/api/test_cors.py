"""Pages of other origins: nothing without the setting; with it, every answer can be read by the origins it names."""

import json

import pytest

from service.api.cors import check_origins
from service.api.keys import AccessError
from tests.api.conftest import Service, Start
from tests.api.test_access import bearer, key, keyed

ORIGIN = "https://app.example:8443"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}


async def test_off_without_the_setting(api: Service) -> None:
    response = await api.http.post("/v1/completions", json={"max_tokens": 1}, headers={"Origin": ORIGIN})
    preflight = await api.http.options("/v1/completions", headers=PREFLIGHT)
    assert (200, 405) == (response.status_code, preflight.status_code)
    for answer in (response, preflight):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [(ORIGIN,), ("*",), ("https://other.example", ORIGIN)])
async def test_every_answer_can_be_read(start: Start, origins: tuple[str, ...]) -> None:
    """Plain, streamed, refused, unknown and failed ones, with the headers that a client needs; never with cookies."""
    api: Service = await start(cors_origins=origins, access=keyed(key("alice", max_concurrent=1)), max_body_bytes=1000)
    allowed = "*" if origins == ("*",) else ORIGIN

    async def ask(path: str, **body: object) -> tuple[int, str]:
        headers = {"Origin": ORIGIN, **bearer("alice")}
        response = await api.http.post(path, content=json.dumps(body), headers=headers)
        assert allowed == response.headers["access-control-allow-origin"]
        exposed = {"X-Request-Id", "Retry-After", "Server-Timing"}
        assert exposed == set(response.headers["access-control-expose-headers"].split(", "))
        assert "access-control-allow-credentials" not in response.headers
        return response.status_code, response.text

    assert 200 == (await ask("/v1/completions", max_tokens=1))[0]
    status, text = await ask("/v1/completions", max_tokens=3, stream=True)
    assert (200, True) == (status, text.endswith("data: [DONE]\n\n"))
    assert 400 == (await ask("/v1/completions", n=0))[0]
    assert 413 == (await ask("/v1/completions", user="x" * 1000))[0]
    assert 404 == (await ask("/nothing"))[0]
    assert 405 == (await ask("/livez"))[0]
    await api.engine.die()
    assert 503 == (await ask("/v1/completions"))[0]
    refused = await api.http.post("/v1/completions", headers={"Origin": ORIGIN})
    assert (401, allowed) == (refused.status_code, refused.headers["access-control-allow-origin"])


@pytest.mark.parametrize("path", ["/v1/completions", "/api", "/nothing"])
async def test_a_preflight_needs_no_key(start: Start, path: str) -> None:
    """A browser sends none with it. Any header may be sent afterwards: clients in browsers send some of their own."""
    api: Service = await start(cors_origins=(ORIGIN,), access=keyed())
    asked = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
    response = await api.http.options(path, headers=PREFLIGHT | asked)
    assert (200, ORIGIN) == (response.status_code, response.headers["access-control-allow-origin"])
    assert asked["Access-Control-Request-Headers"] == response.headers["access-control-allow-headers"]
    assert "POST" in response.headers["access-control-allow-methods"]
    assert 401 == (await api.http.options(path, headers={"Origin": ORIGIN})).status_code, "no preflight"


@pytest.mark.parametrize("change", [{"Origin": "https://evil.example"}, {"Access-Control-Request-Method": "DELETE"}])
async def test_a_preflight_that_is_refused(start: Start, change: dict[str, str]) -> None:
    """Another origin, or a method that no route has: in the envelope, and another origin is not allowed."""
    api: Service = await start(cors_origins=(ORIGIN,))
    response = await api.http.options("/v1/completions", headers=PREFLIGHT | change)
    error = response.json()["error"]
    assert (400, "invalid_request_error", "cors_refused") == (response.status_code, error["type"], error["code"])
    assert ("Origin" in change) == ("access-control-allow-origin" not in response.headers)
    assert "Origin" in response.headers["vary"]


async def test_another_origin_cannot_read(start: Start) -> None:
    """It is answered as a client without an origin is, and a browser keeps that from the page."""
    api: Service = await start(cors_origins=(ORIGIN,))
    response = await api.http.get("/v1/models", headers={"Origin": "https://app.example"})
    assert (200, False) == (response.status_code, "access-control-allow-origin" in response.headers)
    assert "Origin" in response.headers["vary"]


def test_origins_as_browsers_send_them() -> None:
    check_origins([])
    check_origins(["*", "https://a.example", "http://127.0.0.1:8000", "http://[::1]:80", "tauri://localhost"])
    for origin in (
        "a.example",
        "https://a.example/",
        "https://A.example",
        "https://a.example:",
        "https://",
        "null",
        "**",
    ):
        with pytest.raises(AccessError, match=r"^cors_origins: "):
            check_origins(["https://a.example", origin])
