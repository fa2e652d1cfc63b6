"""A client of the engine's own loop in a thread, for the tests of both halves of the API process's face."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from service.engine.backlog import QueueLimits
from service.engine.client import EngineClient
from tests.engine.attached import Attach, until
from tests.engine.loop_thread import LoopThread


@pytest.fixture
def stalls() -> list[float]:
    return []


@pytest.fixture
def queue() -> QueueLimits:
    return QueueLimits()


@pytest.fixture
async def client(stalls: list[float], queue: QueueLimits) -> AsyncIterator[EngineClient]:
    client = EngineClient(
        api_number=3,
        stall_seconds=0.2,
        queue=queue,
        on_stall=lambda _: stalls.append(asyncio.get_running_loop().time()),
    )
    yield client
    await client.close()


@pytest.fixture
def attach(client: EngineClient) -> Attach:
    async def attach(*, max_num_seqs: int = 16, before_step: Callable[[], None] | None = None) -> LoopThread:
        engine = LoopThread(max_num_seqs=max_num_seqs, before_step=before_step)
        ready = asyncio.Event()

        async def on_ready(_: object) -> None:
            asyncio.get_running_loop().call_soon(ready.set)

        client.on_ready = on_ready
        client.attach(engine.peer)
        await ready.wait()
        await until(lambda: client.ready or client.phase in ("drain", "failed"))
        return engine

    return attach
