"""What is lost with an engine, a replica, or a node: requests without an answer are asked elsewhere, streams end."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from tests.ray.cluster import RayCluster
from tests.ray.conftest import two_replicas, wait_states
from tests.ray.load import Load
from tests.service.server import Client


def kill_an_engine(cluster: RayCluster) -> None:
    cluster.engines[-1].kill()


def stop_an_engine(cluster: RayCluster) -> None:
    """Which is killed when it has stalled for long enough."""
    cluster.engines[-1].suspend()


def kill_a_replica(cluster: RayCluster) -> None:
    cluster.replicas[-1].kill()


@pytest.mark.parametrize("harm", [kill_an_engine, stop_an_engine, kill_a_replica])
async def test_a_replica_is_lost(cluster: RayCluster, client: Client, harm: Callable[[RayCluster], None]) -> None:
    """No plain request is lost with it, no stream ends in silence, and there are two again."""
    before = {replica.pid for replica in cluster.replicas}
    load = Load(client)
    await load.begin(cluster)
    harm(cluster)
    await load.check()
    await two_replicas(cluster)
    assert 1 == len(before & {replica.pid for replica in cluster.replicas})


async def test_a_node_is_lost(cluster: RayCluster, client: Client) -> None:
    """The same for all of a node; who was connected to its own proxy finds the connection broken."""
    there = Client(cluster.worker_url)
    load, load_there = Load(client), Load(there)
    try:
        await load_there.begin(cluster, num_plain=2)
        await load.begin(cluster)
        cluster.lose_worker()
        await load.check()
        for task in (*load_there.plain, *load_there.streams):
            with pytest.raises(httpx.TransportError):
                await task
        assert not any(streamed.done for streamed in load_there.streamed)
    finally:
        await there.http.aclose()
        cluster.add_worker()
    await two_replicas(cluster)
    assert 200 == (await client.post(prompt="The people", max_tokens=3)).status_code


async def test_the_only_replica_is_lost(cluster: RayCluster, client: Client) -> None:
    """What had no answer, and what comes meanwhile, waits for the next one."""
    cluster.deploy(min_replicas=1, max_replicas=1)
    await wait_states(cluster, {"RUNNING": 1})
    load = Load(client)
    await load.begin(cluster)
    kill_an_engine(cluster)
    late = asyncio.create_task(client.post(prompt="The people", max_tokens=3))
    assert {200} == {answer.status_code for answer in await asyncio.gather(*load.plain, late)}
    await asyncio.gather(*load.streams)
    assert all(streamed.done and streamed.error for streamed in load.streamed)
