"""Who may ask, over HTTP: which routes need a key, what a key may do, and what is told of it."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.access import Access, AccessConfig, Caller
from service.api.keys import AccessError, Key, named_keys
from tests.api.clock import Clock
from tests.api.conftest import Service, Start
from tests.api.test_keys import sha256
from tests.api.test_metrics import scrape

SECRET = "mgpt-the-key-of-alice"
OPEN = {"/livez", "/readyz", "/health", "/ping"}


def key(name: str, **limits: int) -> Key:
    return Key(name=name, sha256=sha256(f"mgpt-the-key-of-{name}"), **limits)


def keyed(*keys: Key, clock: Clock | None = None, **options: Any) -> Access:
    return Access(AccessConfig(keys or (key("alice"),), **options), clock=clock or Clock())


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer mgpt-the-key-of-{name}"}


@pytest.fixture
async def guarded(start: Start) -> Service:
    """With keys of alice and bob."""
    api: Service = await start(access=keyed(key("alice"), key("bob")))
    return api


# Routes


def paths(api: Service) -> list[tuple[str, str]]:
    """Each method and path of the app, a path's parameters filled in; and some that are not there."""
    routes = [
        (method, re.sub(r"\{[^}]*\}", "demo", route.path)) for route in api.routes() for method in route.methods or ()
    ]
    assert len(routes) > 25
    unknown = [
        "/nothing",
        "/v1/chat/completions",
        "/livez/",
        "/LIVEZ",
        "/livez%00",
        "/docs/x",
        "/admin/drain",
        "/playground",
    ]
    return [*routes, *(("GET", path) for path in unknown), ("OPTIONS", "/v1/completions"), ("DELETE", "/metrics")]


@pytest.mark.parametrize("opened", [(), ("/metrics",), ("/docs", "/openapi.json"), ("/version",)])
async def test_every_route_asks_for_a_key_but_those_that_are_open(start: Start, opened: tuple[str, ...]) -> None:
    """Before it says whether the path is there at all; also while the model loads. With the key none does."""
    api: Service = await start(access=keyed(open_routes=frozenset(opened)), ready=False)
    asked = paths(api)
    assert {"/", "/playground/theme.js", "/v1/completions", "/api", "/v1/models/demo"} <= {path for _, path in asked}
    for method, path in asked:
        response = await api.http.request(method, path)
        is_open = path in {"/", *OPEN, *opened} or path.startswith("/playground/")
        is_open = is_open or (path.startswith("/docs/") and "/docs" in opened)
        assert (401 != response.status_code) == is_open, path
        if not is_open:
            assert "Bearer" == response.headers["www-authenticate"]
            assert response.headers["x-request-id"]
        assert 401 != (await api.http.request(method, path, headers=bearer("alice"))).status_code


async def test_the_refusal(guarded: Service) -> None:
    """In the envelope; where Megatron-LM's clients look for it too; the same for no key and a wrong one."""
    for path in ("/v1/completions", "/api"):
        texts = set()
        for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {SECRET}x"}):
            response = await guarded.http.put(path, json={"prompts": ["x"]}, headers=headers)
            texts.add(response.text)
            body = response.json()
            assert ("message" in body) == (path == "/api")
            error = body["error"]
            assert ("authentication_error", None, "invalid_api_key") == (error["type"], error["param"], error["code"])
        assert 1 == len(texts)


async def test_a_refusal_reads_no_body(guarded: Service) -> None:
    """A client that waits for 100 Continue gets the 401 instead, and one that sends in pieces before the second."""
    host, port = guarded.url.removeprefix("http://").split(":")
    for head in (b"Content-Length: 1000000\r\nExpect: 100-continue", b"Content-Length: 1000000"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert b"HTTP/1.1 401 Unauthorized\r\n" == await reader.readline()
        writer.close()
    assert [] == guarded.engine.submitted


@pytest.mark.parametrize("route", ["/livez", "/v1/completions", "/docs/", "/nothing", "metrics"])
def test_other_routes_cannot_be_opened(route: str) -> None:
    message = f"open_routes: {route} is none of /metrics, /version, /docs, /openapi.json"
    with pytest.raises(AccessError, match=f"^{re.escape(message)}$"):
        keyed(open_routes=frozenset({"/docs", route}))


async def status(api: Service, authorization: bytes) -> int:
    """Of the answer to a header's value as it is, which httpx would not send."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: "
    writer.write(head + authorization + b"\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1])


@pytest.mark.parametrize("sent", [b"Bearer ", b"Bearer", b"Basic eDp5", SECRET.encode(), b""])
async def test_without_keys_any_header_is_taken(api: Service, guarded: Service, sent: bytes) -> None:
    """A bare `Bearer ` too, which lm-evaluation-harness sends where it has no key; with keys it is none."""
    assert (200, 401) == (await status(api, sent), await status(guarded, sent))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("space", [" ", "  "])
async def test_the_scheme_may_be_spelled_in_any_case(guarded: Service, scheme: str, space: str) -> None:
    headers = {"Authorization": f"{scheme}{space}{SECRET}"}
    assert 200 == (await guarded.http.post("/v1/completions", json={"max_tokens": 1}, headers=headers)).status_code


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": SECRET},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": f"Bearer{SECRET}"},
        {"Authorization": f"Bearer {sha256(SECRET)}"},
        {"X-API-Key": SECRET},
        {"Cookie": f"key={SECRET}"},
    ],
)
async def test_a_key_is_taken_from_one_place_alone(guarded: Service, headers: dict[str, str]) -> None:
    response = await guarded.http.get(f"/v1/models?key={SECRET}", headers=headers)
    assert 401 == response.status_code


@given(
    st.binary()
    | st.binary().map(lambda rest: b"Bearer " + rest)
    | st.sampled_from([SECRET[:-1], SECRET]).map(lambda key: b"Bearer " + key.encode())
)
def test_no_header_but_the_right_one_is_somebodys(authorization: bytes) -> None:
    """Whatever bytes it has; and nothing is raised."""
    caller = keyed().caller_of({"type": "http", "path": "/v1/models"}, authorization)
    assert (authorization == b"Bearer " + SECRET.encode()) == (caller is not None)


async def test_any_bytes_in_the_header_are_a_401(guarded: Service) -> None:
    """Or a 400, for those that no header may have."""
    for byte in {*range(1, 256)} - {*b"\r\n"}:
        allowed = (400, 401) if byte < 32 or byte == 127 else (401,)
        assert await status(guarded, b"Bearer %c" % byte) in allowed, byte


async def test_keys_change_without_a_restart(start: Start, tmp_path: Path) -> None:
    """A new key is known and one that is gone is not, within a second."""
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: alice, sha256: {sha256('mgpt-the-key-of-alice')}}}\n")
    clock = Clock()
    api: Service = await start(access=Access(AccessConfig(named_keys(["k"]), file), clock=clock))

    async def statuses() -> list[int]:
        sent = (bearer("alice"), bearer("bob"), {"Authorization": "Bearer k"})
        return [(await api.http.get("/v1/models", headers=headers)).status_code for headers in sent]

    assert [200, 401, 200] == await statuses()
    file.write_text(f"- {{name: bob, sha256: {sha256('mgpt-the-key-of-bob')}}}\n")
    assert [200, 401, 200] == await statuses()
    clock.now += 1
    assert [401, 200, 200] == await statuses()


# What a key may do


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_at_a_time(start: Start, stream: bool) -> None:
    """Counted to the end of the answer, by key; a client that leaves gives its place back."""
    api: Service = await start(access=keyed(key("alice", max_concurrent=2), key("bob")))
    api.engine.gate.clear()

    def ask(name: str, **body: Any) -> "asyncio.Task[Any]":
        sending = api.http.post("/v1/completions", json={"stream": stream, **body}, headers=bearer(name))
        return asyncio.ensure_future(sending)

    leaving, staying = ask("alice"), ask("alice")
    await api.engine.wait_for(lambda: 2 == len(api.engine.submitted))
    refused = await ask("alice")
    assert (429, "1") == (refused.status_code, refused.headers["retry-after"])
    assert "concurrency_limit_exceeded" == refused.json()["error"]["code"]
    others = ask("bob")
    await api.engine.wait_for(lambda: 3 == len(api.engine.submitted))
    for path in OPEN:
        assert 200 == (await api.http.get(path, headers=bearer("alice"))).status_code
    leaving.cancel()
    await api.engine.wait_for(lambda: 1 == len(api.engine.aborted))
    late = ask("alice")
    await api.engine.wait_for(lambda: 4 == len(api.engine.submitted))
    assert 429 == (await ask("alice")).status_code
    api.engine.gate.set()
    assert [200] * 3 == [(await asking).status_code for asking in (staying, others, late)]
    assert 400 == (await ask("alice", n=0)).status_code
    assert [200] * 2 == [(await ask("alice")).status_code for _ in range(2)]


async def test_requests_a_minute(start: Start) -> None:
    """By key, on every route that asks for one; a refusal says when to come again."""
    clock = Clock()
    api: Service = await start(access=keyed(key("alice", requests_per_minute=3), key("bob"), clock=clock))
    answers = [await api.http.get("/v1/models", headers=bearer("alice")) for _ in range(2)]
    answers += [await api.http.put("/api", headers=bearer("alice"), json={"prompts": ["x"]}) for _ in range(2)]
    assert [200, 200, 200, 429] == [answer.status_code for answer in answers]
    assert "20" == answers[-1].headers["retry-after"]
    assert answers[-1].json()["message"] == answers[-1].json()["error"]["message"]
    assert ("rate_limit_error", "rate_limit_exceeded") == tuple(
        answers[-1].json()["error"][name] for name in ("type", "code")
    )
    assert 200 == (await api.http.get("/v1/models", headers=bearer("bob"))).status_code
    clock.now += 20
    assert [200, 429] == [(await api.http.get("/v1/models", headers=bearer("alice"))).status_code for _ in range(2)]


async def submitted(api: Service, headers: dict[str, str]) -> list[tuple[int, str]]:
    """Priority and salt of what each route hands to the engine, once the routes have all been asked."""
    seen = len(api.engine.submitted)
    completion = {"prompt": "x", "max_tokens": 1}
    for path, body in (
        ("/v1/completions", completion),
        ("/v1/completions", {**completion, "stream": True, "cache_salt": "bob\n", "priority": -7}),
        ("/v1/score", {"items": [{"context": "a", "continuation": " b"}]}),
        ("/api", {"prompts": ["x"], "tokens_to_generate": 1}),
        ("/api", {"prompts": ["x"], "tokens_to_generate": 2, "beam_width": 2}),
    ):
        assert 200 == (await api.http.post(path, json=body, headers=headers)).status_code
    return [(request.priority, request.cache_salt) for request in api.engine.submitted[seen:]]


async def test_prefixes_are_shared_within_one_key(guarded: Service) -> None:
    """On every route; and whatever salt a request asks for, it is of its own key."""
    alice, bob = [{salt for _, salt in await submitted(guarded, bearer(name))} for name in ("alice", "bob")]
    assert {"alice\n", "alice\nbob\n"} == alice
    assert {"bob\n", "bob\nbob\n"} == bob


@given(st.lists(st.tuples(st.sampled_from(["a", "a.b", "b"]), st.text()), min_size=2, max_size=2, unique=True))
def test_different_keys_or_salts_are_different(asks: list[tuple[str, str]]) -> None:
    first, second = (Caller(name, salt=name).cache_salt(asked) for name, asked in asks)
    assert first != second


@pytest.mark.parametrize("keys_on", [False, True])
async def test_prefixes_are_shared_by_all_where_that_is_wanted(start: Start, keys_on: bool) -> None:
    """By the setting, or where there are no keys."""
    api: Service = await start(access=keyed(share_prefixes=True) if keys_on else Access(AccessConfig()))
    assert {"", "bob\n"} == {salt for _, salt in await submitted(api, bearer("alice") if keys_on else {})}


async def test_a_keys_floor_of_priority(start: Start) -> None:
    """Lower numbers are raised to it, on every route, and to 0 without; a beam search that has begun goes on."""
    api: Service = await start(access=keyed(key("alice", priority_floor=5), key("bob", priority_floor=-3), key("carl")))
    *alice, first, _second, _third = [priority for priority, _ in await submitted(api, bearer("alice"))]
    assert [5, 5, 5, 5, 5] == [*alice, first]
    assert [0, -3, 0, 0, 0] == [priority for priority, _ in await submitted(api, bearer("bob"))][:5]
    assert [0, 0, 0, 0, 0] == [priority for priority, _ in await submitted(api, bearer("carl"))][:5]
    body = {"priority": 9}
    await api.http.post("/v1/completions", json=body, headers=bearer("alice"))
    assert 9 == api.engine.submitted[-1].priority


async def test_without_keys_nobody_jumps_the_queue(api: Service) -> None:
    """A number below 0 is 0, and one above it stays."""
    for asked, raised in ((-100, 0), (-1, 0), (0, 0), (7, 7)):
        await api.complete(prompt="x", max_tokens=1, priority=asked)
        assert raised == api.engine.submitted[-1].priority


# What is told


async def test_requests_are_counted_by_key(guarded: Service) -> None:
    """By its name and the status; those without a known key are one client, and open routes are nobody's."""
    for name in ("alice", "alice", "bob", "mallory"):
        await guarded.http.get("/v1/models", headers=bearer(name))
    await guarded.http.get("/nothing", headers=bearer("bob"))
    await guarded.http.get("/livez", headers=bearer("bob"))
    guarded.http.headers.update(bearer("alice"))
    counted = {name: value for name, value in (await scrape(guarded)).items() if "client_requests_total" in name}
    name = "megatron_gpt2_client_requests_total client="
    assert counted == {
        f"{name}alice status=200": 2,
        f"{name}bob status=200": 1,
        f"{name}bob status=404": 1,
        f"{name}unknown status=401": 1,
    }


async def test_strangers_add_no_series(guarded: Service) -> None:
    """A thousand keys, paths and methods that nobody knows: as many series as after one."""

    async def junk(number: int) -> None:
        headers = {"Authorization": f"Bearer junk-{number}", "X-Request-Id": f"junk-{number}"}
        await guarded.http.request("GET", f"/junk/{number}", headers=headers)

    await junk(0)
    guarded.http.headers.update(bearer("alice"))
    await scrape(guarded)
    before = await scrape(guarded)
    for start in range(0, 1000, 50):
        await asyncio.gather(*(junk(number) for number in range(start, start + 50)))
    after = await scrape(guarded)
    assert before.keys() == after.keys()
    assert 1001 == after["megatron_gpt2_client_requests_total client=unknown status=401"]


async def test_the_log_line_has_the_name_and_never_the_key(guarded: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for name in ("alice", "mallory"):
            await guarded.http.get("/v1/models", headers=bearer(name))
        await guarded.http.get("/livez", headers=bearer("alice"))
    lines = [record.__dict__["figures"] for record in caplog.records if record.name == "service.api.middleware"]
    assert ["alice", "unknown", "127.0.0.1"] == [figures["client"] for figures in lines]
    assert "mgpt-" not in caplog.text


async def test_clients_take_turns_by_their_keys(guarded: Service) -> None:
    """On every route the engine hears whose requests they are."""
    await submitted(guarded, bearer("alice"))
    await submitted(guarded, bearer("bob"))
    clients = [submit.client for submit in guarded.engine.submits]
    assert {"alice", "bob"} == set(clients)
    assert clients == sorted(clients)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, name: str) -> None:
    """Whoever has one address of it has 2^64."""
    scope = {"type": "http", "path": "/x", "client": (address, 5)}
    assert Caller(name) == Access(AccessConfig()).caller_of(scope, b"")


async def test_without_keys_a_client_is_its_address(api: Service, caplog: pytest.LogCaptureFixture) -> None:
    """What a header says of it counts for nothing; where there is no address, it is local. No client is a series."""
    with caplog.at_level(logging.INFO, "service.api.middleware"):
        await api.http.get("/v1/models", headers={"X-Forwarded-For": "10.9.8.7", "Forwarded": "for=10.9.8.7"})
    assert "client='127.0.0.1'" in caplog.text
    assert not any("client_requests_total" in name for name in await scrape(api))
    assert Caller("local") == Access(AccessConfig()).caller_of({"type": "http", "path": "/x", "client": None}, b"")


async def test_the_schema_says_where_a_key_is_needed(start: Start) -> None:
    """So /docs can send one; without keys it says nothing of them."""
    for access, expected in ((Access(AccessConfig()), set()), (keyed(), {"/v1/completions", "/api", "/metrics"})):
        api: Service = await start(access=access)
        schema = (await api.http.get("/openapi.json", headers=bearer("alice"))).json()
        operations = [(path, each) for path, routes in schema["paths"].items() for each in routes.values()]
        secured = {path for path, operation in operations if operation.get("security") == [{"key": []}]}
        assert expected <= secured
        assert not secured & OPEN
        assert secured == {path for path, operation in operations if "401" in operation["responses"]}
        assert access.keys_on == ("securitySchemes" in schema["components"])


async def test_a_body_that_is_sent_slowly_holds_its_place(start: Start) -> None:
    """A request counts from its head on."""
    api: Service = await start(access=keyed(key("alice", max_concurrent=1)))
    more = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"max_tokens":'
        await more.wait()
        yield b"1}"

    slow = asyncio.ensure_future(api.http.post("/v1/completions", content=body(), headers=bearer("alice")))
    async with asyncio.timeout(5):
        while 429 != (await api.http.get("/v1/models", headers=bearer("alice"))).status_code:
            pass
    more.set()
    assert 200 == (await slow).status_code
    assert 200 == (await api.http.get("/v1/models", headers=bearer("alice"))).status_code
