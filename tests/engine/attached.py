"""What tests ask of an attached engine, and how they read it."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from service.engine.client import EngineClient, Stream
from service.engine.request import Delta, Request, SamplingParams
from tests.engine.loop_thread import LoopThread

PARAMS = SamplingParams(20, seed=5, ignore_eos=True)
LONG = SamplingParams(100, seed=5, ignore_eos=True)


class Attach(Protocol):
    """Starts an engine and attaches it; returns when it is ready."""

    async def __call__(
        self, *, max_num_seqs: int = 16, before_step: Callable[[], None] | None = None
    ) -> LoopThread: ...


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop its turns until `condition` holds; a test's time-out is its bound."""
    while not condition():  # noqa: ASYNC110 - what it waits for is the product's state, which has no event for tests
        await asyncio.sleep(0.001)


def request(client: EngineClient, *, n: int = 1, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(client.new_request_id(), prompt, n)


async def collect(stream: Stream) -> dict[tuple[int, int], list[Delta]]:
    """All deltas, by sequence."""
    deltas: dict[tuple[int, int], list[Delta]] = {}
    async for batch in stream:
        for delta in batch:
            deltas.setdefault((delta.request_id, delta.choice), []).append(delta)
    return deltas


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
