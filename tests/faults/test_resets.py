"""Clients that reset their connections, at every stage of a request: its work ends, and nobody else notices."""

import asyncio
import itertools
from typing import Any

import pytest

from tests.api.raw_http import request, reset_on_close
from tests.faults.conftest import Watching
from tests.faults.watch import LONG
from tests.service.server import Server, eventually

_TIMES = 5
_COMPLETIONS = "POST /v1/completions"
_new_ids = itertools.count(50_000, -1)


def _blocks() -> list[list[int]]:
    """Prompts that share nothing, also with those before them: seconds of prefill."""
    return [[next(_new_ids)] * 700 for _ in range(64)]


_STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "prefill": (_COMPLETIONS, {"prompt": _blocks, "max_tokens": 1}),
    "prefill of a stream": (_COMPLETIONS, {"prompt": _blocks, "max_tokens": 1, "stream": True}),
    "plain": (_COMPLETIONS, {"prompt": "", "max_tokens": LONG}),
    "plain with n": (_COMPLETIONS, {"prompt": "", "max_tokens": LONG, "n": 3}),
    "stream": (_COMPLETIONS, {"prompt": "", "max_tokens": LONG, "stream": True}),
    "stream with n": (_COMPLETIONS, {"prompt": "", "max_tokens": LONG, "n": 3, "stream": True}),
    "scored": ("POST /v1/score", {"items": lambda: [{"context": ids[:1], "continuation": ids} for ids in _blocks()]}),
    "sampled texts": ("PUT /api", {"prompts": [""], "add_BOS": True, "tokens_to_generate": LONG}),
    "beams": ("PUT /api", {"prompts": [""], "add_BOS": True, "tokens_to_generate": LONG, "beam_width": 3}),
}


class Leaver:
    """A client that sends `content` and then leaves without a word."""

    def __init__(self, server: Server, content: bytes) -> None:
        self.socket = server.open_connection()
        self.socket.sendall(content)

    def hear(self) -> None:
        """Return when something of the answer has come."""
        self.socket.settimeout(60)
        assert self.socket.recv(1)

    def reset(self) -> None:
        reset_on_close(self.socket)
        self.socket.close()


@pytest.mark.parametrize("num_bytes", [0, 30, 100_000], ids=["connected", "head", "body"])
async def test_a_reset_before_there_is_a_request(shared_server: Server, watching: Watching, num_bytes: int) -> None:
    """In the midst of its head or of its body."""
    content = request({"prompt": _blocks()})[:num_bytes]
    assert num_bytes == len(content)
    async with watching(shared_server) as watch:
        beside = watch.ask(stream=True, max_tokens=100)
        for _ in range(_TIMES * 2):
            leaver = await asyncio.to_thread(Leaver, shared_server, content)
            await watch.client.status("/livez")  # a turn of the process
            leaver.reset()
        assert (await beside).whole


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_reset_in_the_queue(shared_server: Server, watching: Watching, stream: bool) -> None:
    """What waits leaves the queue."""
    content = request({"prompt": "", "max_tokens": 20, "n": 2, "stream": stream})
    async with watching(shared_server) as watch:
        aborted = await watch.client.metric("requests_aborted_total")
        beside = watch.ask(stream=True, n=4)
        await watch.client.wait_metric("requests_running", 4)
        leavers = [Leaver(shared_server, content) for _ in range(_TIMES)]
        await watch.client.wait_metric("requests_waiting", 2 * _TIMES)
        for leaver in leavers:
            leaver.reset()
        await watch.client.wait_metric("requests_waiting", 0)
        assert not beside.done()
        assert aborted + _TIMES == await watch.client.metric("requests_aborted_total")
        assert (await beside).whole


@pytest.mark.parametrize("stage", _STAGES)
async def test_a_reset_while_it_is_worked_on(shared_server: Server, watching: Watching, stage: str) -> None:
    """Its sequences end within a step or two, whatever they were at."""
    route, body = _STAGES[stage]
    async with watching(shared_server) as watch:
        beside = watch.ask(stream=True)
        await watch.client.wait_metric("requests_running", 1)

        async def runs() -> bool:
            nonlocal beside
            if beside.done():  # before this one was seen to begin: on a fast machine it may end at any time
                assert (await beside).whole
                beside = watch.ask(stream=True)
            # Prompts that begin and end within one step are in no report as running; those behind them wait.
            at_work = [await watch.client.metric(f"requests_{state}") for state in ("running", "waiting")]
            return sum(at_work) > 1

        async def has_ended() -> bool:
            return await watch.client.metric("requests_running") == int(not beside.done())

        for _ in range(_TIMES):
            aborted = await watch.client.metric("requests_aborted_total")
            fields = {name: value() if callable(value) else value for name, value in body.items()}
            leaver = await asyncio.to_thread(Leaver, shared_server, request(fields, route))
            if stage.startswith("stream"):
                await asyncio.to_thread(leaver.hear)
            else:
                await eventually(runs)
            leaver.reset()
            await watch.client.wait_metric("requests_aborted_total", aborted + 1)
            await eventually(has_ended)
            if beside.done():
                assert (await beside).whole
                beside = watch.ask(stream=True)
                await watch.client.wait_metric("requests_running", 1)
        assert (await beside).whole
