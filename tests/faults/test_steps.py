"""Steps that go wrong within an engine: their sequences end with an error, and all others are answered."""

import asyncio

import pytest

from tests.faults.conftest import Watching
from tests.faults.trigger import Triggers
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Server, Start, survivors

_TIMES = 6  # in one engine's life: what a fault leaves behind would add up


@pytest.mark.parametrize("fault", ["launch", "collect"])
async def test_a_step_that_raises(
    shared_server: Server, shared_triggers: Triggers, watching: Watching, fault: str
) -> None:
    """What it worked on ends with an error that says so, what waited is answered, and the engine lives on."""
    engine = shared_server.engine
    async with watching(shared_server) as watch:
        for _ in range(_TIMES):
            load = await watch.load()
            shared_triggers.pull(fault)
            await load.running_failed()
            error = (await load.running[0]).error
            assert error is not None
            assert "a step failed: injected" in error["message"]
    assert engine == shared_server.engine


async def test_a_step_that_finds_no_memory(
    shared_server: Server, shared_triggers: Triggers, watching: Watching
) -> None:
    """It is tried again with less, as often as it takes: nobody notices."""
    engine = shared_server.engine
    async with watching(shared_server) as watch:
        for _ in range(_TIMES):
            requests = [watch.ask(max_tokens=100, stream=True, n=2), watch.ask(max_tokens=60, n=3)]
            await watch.client.wait_metric("requests_running", 4)
            shared_triggers.pull("out_of_memory", 2, times=5)
            await shared_triggers.taken("out_of_memory")
            for request in requests:
                assert (await request).whole
    assert engine == shared_server.engine
    assert any("did not fit in memory" in line for line in shared_server.log)


async def test_memory_that_never_comes(shared_server: Server, shared_triggers: Triggers, watching: Watching) -> None:
    """Where not even one token fits, requests end with an error, one batch after the other."""
    engine = shared_server.engine
    async with watching(shared_server) as watch:
        for _ in range(3):
            load = await watch.load()
            shared_triggers.pull("out_of_memory", 0, times=10**9)
            for request in (*load.running, *load.waiting):
                error = (await request).error
                assert error is not None
                assert "out of memory" in error["message"]
            shared_triggers.pull("out_of_memory", times=0)
    assert engine == shared_server.engine


async def test_a_logit_that_is_not_finite(shared_server: Server, shared_triggers: Triggers, watching: Watching) -> None:
    """Its sequence ends with an error, and gets no token of it; the one beside it does not notice."""
    engine = shared_server.engine
    async with watching(shared_server) as watch:
        for _ in range(_TIMES):
            requests = [watch.ask(max_tokens=200, stream=True), watch.ask(max_tokens=200, stream=True)]
            await watch.client.wait_metric("requests_running", 2)
            shared_triggers.pull("not_finite")
            one, other = sorted([await request for request in requests], key=lambda answer: answer.whole)
            assert one.error is not None
            assert "not finite" in one.error["message"]
            assert other.whole
    assert engine == shared_server.engine


async def test_a_device_that_is_lost(shared_server: Server, shared_triggers: Triggers, watching: Watching) -> None:
    """The engine ends, as its device's context is gone; what waited is answered by the next one."""
    async with watching(shared_server) as watch:
        for _ in range(2):
            restarts = await watch.client.metric("engine_restarts_total")
            load = await watch.load()
            shared_triggers.pull("device_lost")
            await load.running_failed()
            await watch.restarted(since=restarts)
    assert any("the device is lost: CUDA error: injected" in line for line in shared_server.log)


@pytest.mark.parametrize("fault", ["launch", "device_lost"])
async def test_a_step_that_raises_on_a_rank(
    start: Start, scripted_model: ScriptedModel, triggers: Triggers, watching: Watching, fault: str
) -> None:
    """Of two, whichever comes first: the engine ends with both of them, and not only when it is found silent."""
    server = start(
        *(str(scripted_model.folder), "--max-num-seqs", "4", "--tensor-parallel-size", "2"),
        environment=triggers.environment(),
    )
    async with watching(server) as watch:
        ranks = server.ranks
        load = await watch.load()
        triggers.pull(fault)
        await load.running_failed()
        await watch.restarted(since=0)
    assert not await asyncio.to_thread(survivors, ranks, seconds=1)
    assert not any("has not said a word" in line for line in server.log)
