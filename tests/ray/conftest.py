"""A cluster of two nodes, each with a replica of the demo model. Run by `make ray-test`."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.ray.cluster import RayCluster
from tests.service.server import Client, eventually


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster(port=free_port(), worker_port=free_port())
    try:
        cluster.deploy(min_replicas=2, max_replicas=2)
        yield cluster
    finally:
        cluster.close()


async def wait_states(cluster: RayCluster, expected: dict[str, int]) -> None:
    """Return when the replicas are in these states, and none in others."""

    async def reached() -> bool:
        return expected == await asyncio.to_thread(lambda: cluster.states)

    await eventually(reached, seconds=90)


async def two_replicas(cluster: RayCluster) -> None:
    """Return when there are two, with their engines."""
    await wait_states(cluster, {"RUNNING": 2})
    assert 2 == len(cluster.engines)


@pytest.fixture
async def client(cluster: RayCluster) -> AsyncIterator[Client]:
    """Of the head node's proxy, with both replicas there."""
    await two_replicas(cluster)
    client = Client(cluster.url)
    yield client
    await client.http.aclose()
