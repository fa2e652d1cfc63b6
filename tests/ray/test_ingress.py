"""The service through the proxies of Ray Serve, with nothing broken: its routes, its streams, and who gets what."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil

from tests.ray.cluster import RayCluster
from tests.service.server import Client, Server, Streamed, eventually

LONG = 400  # tokens: seconds of work


async def test_the_routes_are_those_of_the_command(cluster: RayCluster, client: Client) -> None:
    """Each route of `megatron-gpt2 serve` answers a GET as there, at both proxies; the schemas are equal."""
    server = Server("--kv-memory", "64MiB")
    there, worker = Client(server.url), Client(cluster.worker_url)
    try:
        server.wait_ready()
        schema = (await there.http.get("/openapi.json")).json()
        assert "/v1/completions" in schema["paths"]
        for path in (*schema["paths"], "/docs", "/openapi.json", "/", "/nothing"):
            expected = await there.http.get(path)
            for proxy in (client, worker):
                found = await proxy.http.get(path)
                assert expected.status_code == found.status_code, path
                assert expected.headers["content-type"] == found.headers["content-type"], path
                assert 1 == len(found.headers.get_list("x-request-id")), path
        assert schema == (await client.http.get("/openapi.json")).json()
        server.process.terminate()
        assert 0 == server.wait(20)
    finally:
        for one in (there, worker):
            await one.http.aclose()
        server.kill()


async def test_an_answer_is_that_of_the_command(client: Client) -> None:
    """Plain and streamed texts are equal, and a refused request has its envelope and its own request id."""
    body = {"prompt": "The people of the United States", "max_tokens": 24, "temperature": 0}
    answer = await client.complete(**body)
    streamed = await client.stream(**body)
    assert answer["choices"][0]["text"] == streamed.text()
    assert streamed.done
    refused = await client.http.post("/v1/completions", json={"prompt": 7}, headers={"X-Request-Id": "mine"})
    assert 400 == refused.status_code
    assert "prompt" == refused.json()["error"]["param"]
    assert ["mine"] == refused.headers.get_list("x-request-id")


async def test_a_stream_comes_token_by_token(cluster: RayCluster, client: Client) -> None:
    """What is computed is there before the rest is: with the engines suspended, events stop, and go on afterwards."""
    streamed = Streamed()
    engines = cluster.engines
    num_tokens = 0
    body = {"prompt": "The people", "max_tokens": LONG, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.http.stream("POST", "/v1/completions", json=body) as response:
        assert 200 == response.status_code
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.aiter_lines()
        async for line in lines:
            streamed.take(line)
            num_tokens += line.startswith("data: ")
            if num_tokens == 3:
                for engine in engines:
                    engine.suspend()
                break
        rest = asyncio.create_task(read(lines, streamed))
        try:
            await asyncio.wait([rest], timeout=1)
            assert not rest.done()
            assert not streamed.done
            assert "" != streamed.text()
        finally:
            for engine in engines:
                engine.resume()
        await rest
    assert streamed.done
    assert {0: "length"} == streamed.finish_reasons


async def read(lines: AsyncIterator[str], streamed: Streamed) -> None:
    """All that is left."""
    async for line in lines:
        streamed.take(line)


async def test_both_engines_work(cluster: RayCluster, client: Client) -> None:
    """Requests that come through one proxy, one after another, go to the replica with fewer, also on the other node."""
    before = [engine.cpu_times().user for engine in cluster.engines]
    requests: list[asyncio.Task[dict[str, Any]]] = []

    async def is_there() -> bool:
        return len(requests) == sum(await asyncio.to_thread(lambda: cluster.num_ongoing))

    for _ in range(4):
        requests.append(asyncio.create_task(client.complete(prompt="The people", max_tokens=900, ignore_eos=True)))
        await eventually(is_there)
    await asyncio.gather(*requests)
    after = [engine.cpu_times().user for engine in cluster.engines]
    assert all(later - earlier > 0.2 for earlier, later in zip(before, after, strict=True)), (before, after)


async def test_work_ends_when_the_client_leaves(cluster: RayCluster, client: Client) -> None:
    """The engine of a stream that nobody reads any more has nothing to do."""
    body = {"prompt": "The people", "max_tokens": 1000, "n": 16, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    async with client.http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            assert json.loads(line.removeprefix("data: "))["choices"]
            break

    async def idle() -> bool:
        return await used(cluster.engines, seconds=0.5) < 0.05

    await eventually(idle)
    assert time.monotonic() - began < 5  # it would have been more than ten


async def used(engines: list[psutil.Process], *, seconds: float) -> float:
    """Processor seconds that they use in these."""

    def total() -> float:
        return sum(engine.cpu_times().user for engine in engines)

    before = total()
    await asyncio.sleep(seconds)
    return total() - before
