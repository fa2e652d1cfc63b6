"""docker/nginx.conf in a real nginx, in front of the real service: streams, restarts, a dead replica, probes."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.nginx import Nginx, free_port, running
from tests.deploy.replica import Replica
from tests.service.conftest import connect, one_thread, scripted_model, tokenizer  # noqa: F401 - fixtures
from tests.service.scripted_model import LONGEST, ScriptedModel
from tests.service.server import Client, Connect, Server, eventually, until_drained

PROBE_SECONDS = 5.0  # as the image's health check and the manifests have it
STREAM = {**LONGEST, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.fixture(scope="module")
def server(scripted_model: ScriptedModel) -> Iterator[Server]:  # noqa: F811
    """The scripted model, so slow that a test can stop it in the middle; patient with an engine that is suspended."""
    yield from until_drained(Server(str(scripted_model.folder), "--stall-seconds", "200"))


@pytest.fixture(params=["as it is", "hostile"])
def nginx(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Iterator[Nginx]:
    """Before the one server; the hostile one buffers whatever it can, and packs it by gzip."""
    with running(tmp_path, [port_of(server)], hostile=request.param == "hostile") as nginx:
        yield nginx


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[list[Replica]]:
    """Two of the demo model, ready."""
    both = [Replica(tmp_path / f"replica-{number}.log") for number in range(2)]
    try:
        await asyncio.gather(*(replica.start() for replica in both))
        yield both
    finally:
        for replica in both:
            replica.kill()


def port_of(server: Server) -> int:
    port = httpx.URL(server.url).port
    assert port is not None
    return port


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream as they come, to [DONE]."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("a stream without [DONE]")


async def test_every_token_is_through_at_once(
    server: Server,
    connect: Connect,  # noqa: F811
    nginx: Nginx,
) -> None:
    """Whenever the engine is suspended, the client has what was generated until then, to the last whole character."""
    direct = connect(server)
    before = await direct.metric("generated_tokens_total")
    received = 0
    finish = None
    arrived = asyncio.Event()

    async def read() -> None:
        nonlocal received, finish
        headers = {"Accept-Encoding": "gzip"}
        async with (
            httpx.AsyncClient(base_url=nginx.url, timeout=100, headers=headers) as http,
            http.stream("POST", "/v1/completions", json=STREAM) as response,
        ):
            assert 200 == response.status_code
            async for event in events(response):
                received = event["usage"]["completion_tokens"]
                finish = event["choices"][0]["finish_reason"] if event["choices"] else finish
                arrived.set()

    reading = asyncio.create_task(read())
    try:
        for _ in range(4):
            for _ in range(3):
                arrived.clear()
                await asyncio.wait_for(arrived.wait(), 20)
            server.engine.suspend()

            async def all_received() -> bool:
                left = await direct.metric("generated_tokens_total") - before - received
                return 0 <= left < 4  # tokens, of which each has at least a byte of a character

            await eventually(all_received)
            assert LONGEST["max_tokens"] > received  # it was stopped in the middle
            server.engine.resume()
    finally:
        server.engine.resume()
        await reading
    assert (LONGEST["max_tokens"], "length") == (received, finish)


async def test_the_hostile_nginx_is_hostile(server: Server, connect: Connect, tmp_path: Path) -> None:  # noqa: F811
    """Without the service's X-Accel-Buffering it holds a stream back until there is no more to come."""
    direct = connect(server)
    body = {**STREAM, "max_tokens": 50}
    with running(tmp_path, [port_of(server)], hostile=True, deaf=True) as nginx:
        async with (
            httpx.AsyncClient(base_url=nginx.url, timeout=100, headers={"Accept-Encoding": "gzip"}) as http,
            http.stream("POST", "/v1/completions", json=body) as response,
        ):
            async for event in events(response):
                assert event["usage"]["completion_tokens"]
                break
            assert 0 == await direct.metric("requests_running")


async def test_a_client_that_leaves_ends_the_work(server: Server, connect: Connect, nginx: Nginx) -> None:  # noqa: F811
    """nginx passes it on that nobody waits any more."""
    direct = connect(server)
    aborted = await direct.metric("requests_aborted_total")
    async with (
        httpx.AsyncClient(base_url=nginx.url, timeout=100) as http,
        http.stream("POST", "/v1/completions", json=STREAM) as response,
    ):
        async for _ in events(response):
            await direct.wait_metric("requests_running", 1)
            break
    await direct.wait_metric("requests_aborted_total", aborted + 1)
    await direct.wait_metric("requests_running", 0)


async def test_a_request_has_one_id(server: Server, nginx: Nginx) -> None:
    """The client's own, or one of nginx's: in the answer, in nginx's log and in the service's."""
    async with httpx.AsyncClient(base_url=nginx.url, timeout=100) as http:
        body = {"prompt": "", "max_tokens": 1}
        given = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
        made = await http.post("/v1/completions", json=body)
    assert ["mine-1"] == given.headers.get_list("x-request-id")
    (new,) = made.headers.get_list("x-request-id")
    for name in ("mine-1", new):

        async def logged(name: str = name) -> bool:  # each writes its line when the answer has gone out
            return bool(nginx.lines(name)) and any(name in line for line in server.log)

        await eventually(logged)


async def test_a_large_body_and_a_large_head_go_through(server: Server, nginx: Nginx) -> None:
    """What the service takes, nginx does not refuse: the answer is the service's own, which has its id."""
    async with httpx.AsyncClient(base_url=nginx.url, timeout=100) as http:
        body = {"prompt": "a" * (7 * 2**20), "max_tokens": 1}
        large = await http.post("/v1/completions", json=body)
        assert (400, True) == (large.status_code, "x-request-id" in large.headers)  # too many tokens for its context
        head = await http.get("/v1/models", headers={"X-Large": "a" * 30_000})
        assert 200 == head.status_code


async def test_metrics_are_not_for_everybody(nginx: Nginx) -> None:
    async with httpx.AsyncClient(base_url=nginx.url) as http:
        assert 404 == (await http.get("/metrics")).status_code
        assert 200 == (await http.get("/v1/models")).status_code


async def test_nobody_answers(tmp_path: Path) -> None:
    """Where no replica is there, the answer is one of the service's form, which says when to come again."""
    with running(tmp_path, [free_port(), free_port()]) as nginx:
        async with httpx.AsyncClient(base_url=nginx.url) as http:
            answer = await http.post("/v1/completions", json={"prompt": ""}, headers={"X-Request-Id": "mine-2"})
    assert (503, "5", "mine-2") == (answer.status_code, answer.headers["retry-after"], answer.headers["x-request-id"])
    assert {"message", "type", "param", "code"} == set(answer.json()["error"])
    assert "service_unavailable" == answer.json()["error"]["code"]


async def complete(client: Client, number: int) -> None:
    """One request, streamed or not, which must be answered whole."""
    body = {"prompt": f"Request {number}", "max_tokens": 40, "ignore_eos": True}
    if number % 2:
        streamed = await client.stream(**body, stream_options={"include_usage": True})
        assert (True, None, {0: "length"}) == (streamed.done, streamed.error, streamed.finish_reasons)
        usage = streamed.usage
    else:
        usage = (await client.complete(**body))["usage"]
    assert usage is not None
    assert body["max_tokens"] == usage["completion_tokens"]


async def test_a_rolling_restart_loses_no_request(replicas: list[Replica], tmp_path: Path) -> None:
    """Two replicas under load are restarted one after the other; no client tries again, and each gets its answer."""
    with running(tmp_path, [replica.port for replica in replicas]) as nginx:
        client = Client(nginx.url)
        over = False
        answered = 0

        async def ask(worker: int) -> None:
            nonlocal answered
            while not over:
                await complete(client, answered + worker)
                answered += 1

        async with asyncio.TaskGroup() as tasks:
            for worker in range(8):
                tasks.create_task(ask(worker))

            async def more(since: int) -> bool:
                return answered > since + 16

            for replica in replicas:
                since = answered
                await eventually(lambda since=since: more(since), seconds=60)
                await replica.stop()
                since = answered
                await eventually(lambda since=since: more(since), seconds=60)  # of the other one alone
                await replica.start()
            over = True
        await client.http.aclose()
    retried = len(nginx.lines("upstream_status=503, 200")) + len(nginx.lines("upstream_status=502, 200"))
    assert retried  # replicas did refuse, and nginx asked the other
    assert answered == len(nginx.lines('"POST /v1/completions" 200'))


async def test_a_killed_replica_loses_no_request_that_has_not_begun(replicas: list[Replica], tmp_path: Path) -> None:
    """Answers in one piece are computed again by the other replica."""
    with running(tmp_path, [replica.port for replica in replicas]) as nginx:
        client = Client(nginx.url)
        direct = Client(f"http://127.0.0.1:{replicas[0].port}")
        body = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True}
        asked = [asyncio.create_task(client.complete(**body)) for _ in range(4)]
        await direct.wait_metric("requests_running", 2)
        await direct.http.aclose()
        replicas[0].kill()
        for answer in await asyncio.gather(*asked):
            assert body["max_tokens"] == answer["usage"]["completion_tokens"]
        await client.http.aclose()
    assert nginx.lines("upstream_status=502, 200")


async def test_probes_answer_at_saturation(
    server: Server,
    connect: Connect,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the batch full and others waiting, every probe is a 200 within its timeout, also through nginx."""
    direct = connect(server)
    body = {**STREAM, "n": 64}
    probes = 100

    async def others_wait() -> bool:
        return await direct.metric("requests_waiting") > 0

    with running(tmp_path, [port_of(server)]) as nginx:
        load = [asyncio.create_task(direct.stream(**body)) for _ in range(3)]
        await direct.wait_metric("requests_running", 64)
        await eventually(others_wait)
        for place, url in (("direct", server.url), ("nginx", nginx.url)):
            async with httpx.AsyncClient(base_url=url, timeout=PROBE_SECONDS) as http:
                for path in ("/livez", "/readyz"):
                    milliseconds = []
                    for _ in range(probes):
                        began = time.perf_counter()
                        assert 200 == (await http.get(path)).status_code
                        milliseconds.append(1000 * (time.perf_counter() - began))
                    p50, p99 = sorted(milliseconds)[probes // 2], sorted(milliseconds)[-2]
                    with capsys.disabled():
                        print(f"\n{path} {place}, at saturation: p50 {p50:.1f} ms, p99 {p99:.1f} ms", end="")
        assert await others_wait()  # it was so to the end
        for task in load:
            task.cancel()
        await asyncio.wait(load)
        await direct.wait_metric("requests_running", 0)
