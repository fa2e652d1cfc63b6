"""Clients that leave end their work in the engine, and a silent stream keeps its connection alive."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import Message
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from service.api.connection import EventStream, while_connected
from service.api.protocol import EnvelopeProtocol
from tests.api.conftest import Service, Start
from tests.api.raw_http import connect, request


async def send(api: Service, *, stream: bool, n: int = 1) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request over a bare connection, which a test can drop at any moment."""
    connection = await connect(api)
    connection.writer.write(request({"prompt": ["a", "b"], "n": n, "max_tokens": 500, "stream": stream}))
    await api.engine.wait_for(lambda: 2 == len(api.engine.submitted))
    return connection.reader, connection.writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 3])
async def test_a_client_that_leaves_ends_its_sequences(api: Service, stream: bool, tokens_before: int) -> None:
    """Plain or streamed, before or after the first token: every sequence is aborted, and it is counted."""
    api.engine.tokens_before_gate = tokens_before
    api.engine.gate.clear()
    reader, writer = await send(api, stream=stream, n=2)
    if tokens_before:
        await api.wait_metric("megatron_gpt2_generated_tokens_total", 4 * tokens_before)
        if stream:
            assert b"200 OK" in await reader.readline()
    writer.close()
    await api.engine.wait_for(lambda: 2 == len(api.engine.aborted))
    assert {request.id for request in api.engine.submitted} == {abort.request_id for abort in api.engine.aborted}
    assert 0 == api.engine.num_open
    await api.wait_metric("megatron_gpt2_requests_aborted_total", 1)
    metrics = (await api.http.get("/metrics")).text
    assert 'megatron_gpt2_requests_finished_total{finish_reason="abort"} 4.0' in metrics
    status = 200 if stream and tokens_before else 499
    assert f'method="POST",route="/v1/completions",status="{status}"}} 1.0' in metrics


async def test_a_client_that_leaves_while_the_stream_waits(start: Start) -> None:
    """The 200 is out, no token is: the next thing that happens is the abort."""
    api: Service = await start(stream_keep_alive_seconds=0.05)
    api.engine.gate.clear()
    reader, writer = await send(api, stream=True)
    assert b"200 OK" in await reader.readline()
    writer.close()
    await api.engine.wait_for(lambda: 2 == len(api.engine.aborted))


async def test_a_finished_request_is_not_aborted(api: Service) -> None:
    """The engine hears of an end only when it is not its own."""
    await api.complete(prompt="a", n=3)
    await api.http.post("/v1/completions", json={"stream": True})
    assert [] == api.engine.aborted


async def test_a_stream_cancelled_before_its_first_event_is_closed() -> None:
    """Its request is with the engine already. Nothing is sent, and it is not the client who left."""
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")
        yield b""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("nobody sends")

    async def send(_: Message) -> None:
        raise AssertionError("nothing is sent")

    response = EventStream(events(), keep_alive_seconds=15, close=lambda: closed.append(True))
    answering = asyncio.ensure_future(response({"type": "http"}, receive, send))
    await asyncio.sleep(0)  # it waits for the first event
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert [True] == closed


async def test_a_client_that_leaves_with_requests_in_its_pipeline(api: Service) -> None:
    """The one that is being answered ends in the engine, though the one that waits behind it was read after it."""
    api.engine.gate.clear()
    writer = (await connect(api)).writer
    writer.write(request({"prompt": "a", "max_tokens": 500}) * 2)
    await api.engine.wait_for(lambda: 1 == len(api.engine.submitted))
    writer.close()
    await api.engine.wait_for(lambda: 1 == len(api.engine.aborted))
    await api.wait_metric("megatron_gpt2_requests_aborted_total", 1)


@pytest.mark.parametrize("num_rest", [30_000, 120_000, 1_000_000])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_after_a_large_body(api: Service, stream: bool, num_rest: int) -> None:
    """However much of it came at once: the server stops reading a connection from which it has read a lot."""
    api.engine.gate.clear()
    writer = (await connect(api)).writer
    content = request({"prompt": "a", "max_tokens": 500, "stream": stream, "user": "x" * num_rest})
    num_first = content.index(b"{") + 1
    writer.write(content[:num_first])
    await asyncio.sleep(0.05)
    writer.write(content[num_first:])
    await api.engine.wait_for(lambda: 1 == len(api.engine.submitted))
    writer.close()
    await api.engine.wait_for(lambda: 1 == len(api.engine.aborted))


def connection() -> tuple[EnvelopeProtocol, dict[str, Any]]:
    """One that is open, and the scope of a request on it."""
    protocol = EnvelopeProtocol(uvicorn.Config(None), ServerState(), {})  # type: ignore[arg-type]
    protocol.transport = asyncio.Transport()
    protocol.flow = FlowControl(protocol.transport)
    return protocol, {"type": "http", "extensions": {"megatron_gpt2.watch": protocol._watch}}


@pytest.mark.parametrize("lost", ["before", "within", "as it is done", "after"])
async def test_work_is_cancelled_whenever_the_client_leaves(lost: str) -> None:
    """Also when it had left before the work began; after the work nothing is cancelled, and never anything else."""
    protocol, scope = connection()
    gate = asyncio.Event()
    outcomes: list[object] = []

    async def answer() -> None:
        try:
            outcomes.append(await while_connected(scope, gate.wait()))
        except ClientDisconnect:
            outcomes.append("left")
        task = asyncio.current_task()
        assert task is not None
        outcomes.append(task.cancelling())

    if lost == "before":
        protocol.connection_lost(OSError())
    answering = asyncio.ensure_future(answer())
    await asyncio.sleep(0)
    if lost in ("as it is done", "after"):
        gate.set()
    if lost == "after":
        await answering
    if lost != "before":
        protocol.connection_lost(OSError())
    await answering
    assert [lost == "after" or "left", 0] == outcomes


async def test_a_cancellation_of_someone_else_stays_one() -> None:
    """Also where the client leaves at the same time."""
    protocol, scope = connection()
    answering = asyncio.ensure_future(while_connected(scope, asyncio.Event().wait()))
    await asyncio.sleep(0)
    answering.cancel()
    protocol.connection_lost(OSError())
    with pytest.raises(asyncio.CancelledError):
        await answering


async def test_a_silent_stream_sends_comments(start: Start) -> None:
    """The status line comes with the first comment, comments go on while queued and between tokens, tokens follow."""
    api: Service = await start(stream_keep_alive_seconds=0.05)
    api.engine.gate.clear()
    async with api.http.stream("POST", "/v1/completions", json={"stream": True, "max_tokens": 3}) as response:
        assert 200 == response.status_code
        lines = response.aiter_lines()
        assert [": keep-alive", "", ": keep-alive", ""] == [await anext(lines) for _ in range(4)]
        api.engine.gate.set()
        rest = [line async for line in lines]
    assert "data: [DONE]" == rest[-2]
    assert any('"finish_reason":"length"' in line for line in rest)
    assert not any("_keep_alive" in repr(task) for task in asyncio.all_tasks())


async def test_an_error_after_a_comment_is_an_event(start: Start) -> None:
    """The 200 is out, so the refusal comes as an event with the same type and code."""
    api: Service = await start(stream_keep_alive_seconds=0.05)
    api.engine.gate.clear()
    async with api.http.stream("POST", "/v1/completions", json={"stream": True}) as response:
        lines = response.aiter_lines()
        assert ": keep-alive" == await anext(lines)
        api.engine.fail(api.engine.submitted[0], "a step failed")
        rest = [line async for line in lines if line.startswith("data")]
    assert 2 == len(rest)
    error = json.loads(rest[0].removeprefix("data: "))["error"]
    assert {"message": "a step failed", "type": "server_error", "param": None, "code": "internal_error"} == error
    assert "data: [DONE]" == rest[1]


async def test_a_busy_stream_sends_no_comment(start: Start) -> None:
    """Each event puts the next comment off."""
    api: Service = await start(stream_keep_alive_seconds=0.5)
    api.engine.seconds_per_delta = 0.05
    response = await api.http.post("/v1/completions", json={"stream": True, "max_tokens": 20})
    assert ": keep-alive" not in response.text


async def test_a_slow_reader_gets_every_token(api: Service) -> None:
    """A reader that is behind gets merged pieces and the whole text; the engine is not held up."""
    expected = (await api.complete(prompt="a", n=100, max_tokens=400, seed=1))["choices"][99]["text"]
    body = {"prompt": "a", "n": 100, "max_tokens": 400, "seed": 1, "stream": True}
    texts: dict[int, str] = {}
    async with api.http.stream("POST", "/v1/completions", json=body) as response:
        await api.wait_metric("megatron_gpt2_prompt_tokens_total", 2)
        await api.engine.wait_for(lambda: 0 == api.engine.num_open)  # it is done while nothing was read
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert 100 == len(texts)
    assert expected == texts[99]
