"""Signals under load: SIGTERM once and twice, SIGINT as a terminal sends it, SIGKILL of whoever holds the port."""

import asyncio
import signal
import time
from collections.abc import Callable

import httpx
import pytest

from tests.faults.conftest import Watching
from tests.faults.trigger import Triggers
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Connect, Server, Start, eventually, survivors

_FOUR = ("--max-num-seqs", "4")
_AT_ONCE_SECONDS = 3.0
_GONE_SECONDS = 5.0


def terminate(server: Server) -> None:
    """SIGTERM to the supervisor, as an init or Kubernetes sends it."""
    server.process.terminate()


def interrupt(server: Server) -> None:
    """SIGINT to every process of the tree, as a terminal's Ctrl-C."""
    server.signal_group(signal.SIGINT)


signals = pytest.mark.parametrize("send", [terminate, interrupt])


@signals
async def test_a_drain_under_full_load(
    start: Start, scripted_model: ScriptedModel, watching: Watching, send: Callable[[Server], None]
) -> None:
    """Streams, plain requests, samples, beams, scores, running or queued: all whole. New ones are 503; then 0."""
    server = start(str(scripted_model.folder), *_FOUR)
    async with watching(server, ends=True) as watch:
        load = await watch.load()
        http = watch.client.http
        beams = {"prompts": [""], "add_BOS": True, "tokens_to_generate": 30, "beam_width": 3}
        others = [
            asyncio.create_task(http.put("/api", json=beams)),
            asyncio.create_task(http.put("/api", json={"prompts": [""] * 3, "add_BOS": True, "tokens_to_generate": 9})),
            asyncio.create_task(http.post("/v1/score", json={"items": [{"context": "a", "continuation": " b"}] * 9})),
        ]
        await watch.client.wait_metric("requests_waiting", 3 + 1 + 3 + 9)
        send(server)
        await watch.client.wait_status("/readyz", 503)
        refused = [await watch.ask(max_tokens=1, stream=stream) for stream in (False, True)]
        assert [503, 503] == [answer.status for answer in refused]
        assert await watch.client.metric("draining") == 1
        for request in (*load.running, *load.waiting):
            assert (await request).whole
        for other in others:
            assert (await other).status_code == 200
        assert scripted_model.text(30) in (await others[0]).json()["text"][0]
        assert await asyncio.to_thread(server.wait, 10) == 0


async def test_a_drain_has_an_end(start: Start, scripted_model: ScriptedModel, watching: Watching) -> None:
    """What is still open after drain_seconds ends with an error that says try again, and the exit code is 0."""
    server = start(str(scripted_model.folder), *_FOUR, "--drain-seconds", "0.5")
    async with watching(server, ends=True) as watch:
        load = await watch.load()
        longer = [watch.ask(n=4), watch.ask(n=4, stream=True)]
        await watch.client.wait_metric("requests_waiting", 3 + 8)
        terminate(server)
        for request in (*load.running, *longer):
            answer = await request
            assert answer.error is not None
            assert answer.error["code"] == "service_unavailable"
        assert await asyncio.to_thread(server.wait, 10) == 0


async def test_a_second_signal_ends_it_at_once(start: Start, scripted_model: ScriptedModel, watching: Watching) -> None:
    """Of either kind. Open requests get an error, the exit code says that something was cut off, and nobody is left."""
    server = start(str(scripted_model.folder), *_FOUR)
    async with watching(server, ends=True) as watch:
        load = await watch.load()
        terminate(server)
        await watch.client.wait_status("/readyz", 503)
        sent_at = time.monotonic()
        interrupt(server)
        for request in (*load.running, *load.waiting):
            assert (await request).error is not None
        assert await asyncio.to_thread(server.wait, 10) == 1
        assert time.monotonic() - sent_at < _AT_ONCE_SECONDS


async def test_a_second_signal_ends_what_is_frozen(
    start: Start, scripted_model: ScriptedModel, watching: Watching
) -> None:
    """Neither an engine nor an API process that does nothing any more holds it up."""
    server = start(str(scripted_model.folder), *_FOUR)
    async with watching(server, ends=True, may_break=True) as watch:
        await watch.load()
        server.engine.suspend()
        terminate(server)
        await watch.client.wait_status("/readyz", 503)
        server.api.suspend()
        sent_at = time.monotonic()
        terminate(server)
        assert await asyncio.to_thread(server.wait, 10) == 1
        assert time.monotonic() - sent_at < _AT_ONCE_SECONDS


async def test_an_engine_that_is_killed_in_a_drain(
    start: Start, scripted_model: ScriptedModel, watching: Watching
) -> None:
    """What waited is answered by the next one, for which the drain waits; then 0."""
    server = start(str(scripted_model.folder), *_FOUR)
    async with watching(server, ends=True) as watch:
        load = await watch.load()
        terminate(server)
        await watch.client.wait_status("/readyz", 503)
        server.engine.kill()
        await load.running_failed()
        assert await asyncio.to_thread(server.wait, 20) == 0


async def test_a_broken_message_in_a_drain(
    start: Start, scripted_model: ScriptedModel, triggers: Triggers, watching: Watching
) -> None:
    """The engine then ends with 0, as at the end of a drain; what waited is answered by the next one all the same."""
    server = start(str(scripted_model.folder), *_FOUR, environment=triggers.environment())
    async with watching(server, ends=True) as watch:
        load = await watch.load()
        terminate(server)
        await watch.client.wait_status("/readyz", 503)
        triggers.pull("to_api", bytes([0, 0, 0, 2, 0xC1, 0xC1]).hex())
        await load.running_failed()
        for waiting in load.waiting:
            assert (await waiting).whole
        assert await asyncio.to_thread(server.wait, 20) == 0


async def test_a_signal_while_it_starts(start: Start, scripted_model: ScriptedModel) -> None:
    """As soon as there are children: 0, nobody left, and no trace of an exception."""
    server = start(str(scripted_model.folder), ready=False)
    await server.wait_children()
    interrupt(server)
    assert await asyncio.to_thread(server.wait, 30) == 0
    assert "Traceback" not in "".join(server.log)


async def test_children_leave_signals_to_the_supervisor(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """From their first moment: a Ctrl-C is the whole group's, and it must be the supervisor that says what follows."""
    server = start(str(scripted_model.folder), ready=False)
    client = connect(server)
    await server.wait_children()
    children = server.children

    async def ready_under_fire() -> bool:
        for child in children:
            for number in (signal.SIGINT, signal.SIGTERM):
                child.send_signal(number)
        try:
            return await client.status("/readyz") == 200
        except httpx.TransportError:
            return False

    client.http.timeout = httpx.Timeout(0.05)
    await eventually(ready_under_fire, seconds=60)
    assert children == server.children


async def test_an_api_process_that_is_killed_ends_the_service(
    start: Start, scripted_model: ScriptedModel, watching: Watching
) -> None:
    """The supervisor ends with a code that is not 0, and nobody is left: whoever runs the service starts it again."""
    server = start(str(scripted_model.folder), *_FOUR)
    async with watching(server, ends=True, may_break=True) as watch:
        load = await watch.load()
        engine = server.engine
        server.api.kill()
        assert not await asyncio.to_thread(survivors, [engine], seconds=_GONE_SECONDS)
        assert await asyncio.to_thread(server.wait, 10) == 1
        assert (await load.running[0]).broken


async def test_a_supervisor_that_is_killed_leaves_nobody(
    start: Start, scripted_model: ScriptedModel, watching: Watching
) -> None:
    """Its children end by themselves, in the midst of their work."""
    server = start(str(scripted_model.folder), *_FOUR)
    async with watching(server, ends=True, may_break=True) as watch:
        load = await watch.load()
        children = server.children
        server.process.kill()
        assert not await asyncio.to_thread(survivors, children, seconds=_GONE_SECONDS)
        assert (await load.running[0]).broken
