"""Replicas that come and go: as many as the queue asks for, and none goes before it has answered."""

import asyncio

import pytest

from tests.ray.cluster import RayCluster
from tests.ray.conftest import wait_states
from tests.ray.load import Load
from tests.service.server import Client

ONE, TWO, ONE_GOES = {"RUNNING": 1}, {"RUNNING": 2}, {"RUNNING": 1, "STOPPING": 1}


@pytest.mark.parametrize(("drain_seconds", "is_cut"), [(60, False), (3, True)])
async def test_the_queue_brings_a_replica_and_its_end_takes_one(
    cluster: RayCluster, drain_seconds: float, is_cut: bool
) -> None:
    """What waits brings a second replica. When nothing does, one goes, but its streams run to their end, or for
    drain_seconds, after which they end with an error; nothing is left of it.
    """
    cluster.deploy(
        min_replicas=1,
        max_replicas=2,
        max_num_seqs=16,
        target_queued=2,
        upscale_delay_seconds=0,
        downscale_delay_seconds=10,
        look_back_seconds=11,
        drain_seconds=drain_seconds,
        stall_seconds=100,
    )
    await wait_states(cluster, ONE)
    client = Client(cluster.url)
    try:
        burst = [
            asyncio.create_task(client.complete(prompt="The people", max_tokens=200, ignore_eos=True))
            for _ in range(120)
        ]
        await wait_states(cluster, TWO)
        await asyncio.gather(*burst)

        engines = cluster.engines
        load = Load(client)
        await load.begin(cluster, num_plain=0)
        for engine in engines:  # what is open stays open
            engine.suspend()
        num_ongoing = cluster.num_ongoing
        await wait_states(cluster, ONE_GOES)
        if is_cut:
            await wait_states(cluster, ONE)
        for engine in engines:
            if engine.is_running():
                engine.resume()
        await asyncio.gather(*load.streams)
        assert all(streamed.done for streamed in load.streamed)
        num_cut = sum(streamed.error is not None for streamed in load.streamed)
        assert num_cut in (num_ongoing if is_cut else [0])
        await wait_states(cluster, ONE)
        assert 1 == sum(engine.is_running() for engine in engines)
    finally:
        await client.http.aclose()
