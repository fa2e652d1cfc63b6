"""What the proxies of Ray Serve do by themselves, without service/ray_proxy.py: what that is for."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.ray.cluster import RayCluster
from tests.ray.conftest import free_port, two_replicas
from tests.ray.load import Load
from tests.service.server import Client


@pytest.fixture
async def bare() -> AsyncIterator[RayCluster]:
    """A cluster whose proxies have nothing of ours."""
    cluster = RayCluster(port=free_port(), worker_port=free_port(), retries=False)
    try:
        cluster.deploy(min_replicas=2, max_replicas=2)
        await two_replicas(cluster)
        yield cluster
    finally:
        cluster.close()


async def test_without_the_middleware(bare: RayCluster) -> None:
    """What the middleware is for: by themselves the proxies answer a bare 500, and break streams off."""
    client = Client(bare.url)
    load = Load(client)
    try:
        await load.begin(bare)
        for engine in bare.engines:  # both: at once Serve may have given all plain requests to one
            engine.kill()
        answers = await asyncio.gather(*load.plain)
        assert {(500, "Internal Server Error")} == {(answer.status_code, answer.text) for answer in answers}
        outcomes = await asyncio.gather(*load.streams, return_exceptions=True)
        assert {httpx.RemoteProtocolError} == {type(outcome) for outcome in outcomes}
        assert not any(streamed.done for streamed in load.streamed)
    finally:
        await client.http.aclose()
