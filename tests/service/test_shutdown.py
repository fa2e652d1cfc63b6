"""SIGTERM, and Ctrl-C as a terminal sends it: drain, then end with nobody left; a second one ends it at once."""

import asyncio
import signal
import time
from collections.abc import Callable

import httpx
import pytest

from tests.service.scripted_model import CONTEXT, ScriptedModel
from tests.service.server import Client, Server, eventually
from tests.service.test_faults import _LONG, assert_unavailable, is_broken_off

_AT_ONCE_SECONDS = 3.0

Connect = Callable[[Server], Client]
Start = Callable[..., Server]


def terminate(server: Server) -> None:
    """SIGTERM to the supervisor, as an init or Kubernetes sends it."""
    server.process.terminate()


def interrupt(server: Server) -> None:
    """SIGINT to every process of the tree, as a terminal's Ctrl-C."""
    server.signal_group(signal.SIGINT)


signals = pytest.mark.parametrize("send", [terminate, interrupt])


@signals
async def test_a_drain_answers_what_is_open(
    start: Start, connect: Connect, scripted_model: ScriptedModel, send: Callable[[Server], None]
) -> None:
    """Streams and plain requests are answered whole, queued ones too; new ones are 503, readiness too; then 0."""
    server = start(str(scripted_model.folder), "--max-num-seqs", "2")
    client = connect(server)
    stream = asyncio.create_task(client.stream(prompt="", max_tokens=200))
    plain = asyncio.create_task(client.complete(prompt="", max_tokens=150))
    await client.wait_metric("requests_running", 2)
    queued = asyncio.create_task(client.complete(prompt="", max_tokens=7))
    await client.wait_metric("requests_waiting", 1)
    send(server)
    await client.wait_status("/readyz", 503)
    refused, refused_stream = await asyncio.gather(client.post(prompt=""), client.post(prompt="", stream=True))
    assert_unavailable(refused)
    assert_unavailable(refused_stream)
    assert await client.status("/livez") == 200
    assert await client.metric("draining") == 1
    assert not stream.done(), "the drain was to be seen while a stream was open"
    assert scripted_model.text(200) == (await stream).text()
    assert {0: "length"} == (await stream).finish_reasons
    assert (await stream).done
    assert scripted_model.text(150) == (await plain)["choices"][0]["text"]
    assert scripted_model.text(7) == (await queued)["choices"][0]["text"]
    assert await asyncio.to_thread(server.wait, 10) == 0


async def test_a_second_signal_ends_it_at_once(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """Of either kind. Open requests get an error, the exit code says that something was cut off, and nobody is left."""
    server = start(str(scripted_model.folder))
    client = connect(server)
    stream = asyncio.create_task(client.stream(**_LONG))
    plain = asyncio.create_task(client.post(**_LONG))
    await client.wait_metric("requests_running", 2)
    terminate(server)
    await client.wait_status("/readyz", 503)
    sent_at = time.monotonic()
    interrupt(server)
    assert is_broken_off(await stream, scripted_model)
    assert (await plain).status_code == 503
    assert await asyncio.to_thread(server.wait, 10) == 1
    assert time.monotonic() - sent_at < _AT_ONCE_SECONDS


async def test_a_second_signal_ends_what_is_frozen(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """Neither an engine nor an API process that does nothing any more holds it up."""
    server = start(str(scripted_model.folder))
    client = connect(server)
    stream = asyncio.create_task(client.stream(**_LONG))
    await client.wait_metric("requests_running", 1)
    server.engine.suspend()
    terminate(server)
    await client.wait_status("/readyz", 503)
    server.api.suspend()
    sent_at = time.monotonic()
    terminate(server)
    assert await asyncio.to_thread(server.wait, 10) == 1
    assert time.monotonic() - sent_at < _AT_ONCE_SECONDS
    await asyncio.wait([stream])


async def test_a_drain_has_an_end(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """What is still open after drain_seconds ends with an error that says try again, and the exit code is 0."""
    server = start(str(scripted_model.folder), "--drain-seconds", "1")
    client = connect(server)
    stream = asyncio.create_task(client.stream(**_LONG, n=4))
    plain = asyncio.create_task(client.post(**_LONG, n=4))
    await client.wait_metric("requests_running", 8)
    terminate(server)
    assert (await stream).error is not None
    assert (await stream).done
    assert not (await stream).finish_reasons
    assert len((await stream).text()) < len(scripted_model.text(CONTEXT))
    assert_unavailable(await plain)
    assert await asyncio.to_thread(server.wait, 10) == 0


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
