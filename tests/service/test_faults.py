"""Processes that die or freeze: who asked is told, who waited is answered, and nobody is left behind."""

import asyncio
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.service.scripted_model import CONTEXT, ScriptedModel
from tests.service.server import Client, Server, Streamed, eventually, survivors

# The scripted server's answers take seconds at this length, and it works on two at a time.
_LONG: dict[str, Any] = {"prompt": "", "max_tokens": CONTEXT - 1, "ignore_eos": True}
_GONE_SECONDS = 5.0

Connect = Callable[[Server], Client]
Start = Callable[..., Server]


def is_broken_off(streamed: Streamed, model: ScriptedModel) -> bool:
    """It said what was right so far, then an error and [DONE], and never that a choice has finished."""
    assert streamed.error is not None
    assert {"message", "type", "param", "code"} == set(streamed.error)
    assert model.text(CONTEXT).startswith(streamed.text())
    return streamed.done and not streamed.finish_reasons


def assert_unavailable(response: httpx.Response) -> None:
    """503 + Retry-After, in the envelope."""
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "service_unavailable"


async def test_an_engine_that_is_killed(
    scripted_server: Server, scripted: Client, scripted_model: ScriptedModel
) -> None:
    """What it worked on ends with an error, what it had not begun is answered after the restart, and all goes on.

    Readiness falls and rises by itself, liveness stays; OpenAI's client, told to wait, is answered by its own retries.
    """
    restarts = await scripted.metric("engine_restarts_total")
    stream = asyncio.create_task(scripted.stream(**_LONG))
    plain = asyncio.create_task(scripted.post(**_LONG))
    await scripted.wait_metric("requests_running", 2)
    queued = asyncio.create_task(scripted.complete(prompt="", max_tokens=20))
    queued_stream = asyncio.create_task(scripted.stream(prompt="", max_tokens=30, n=2))
    await scripted.wait_metric("requests_waiting", 3)
    scripted_server.engine.kill()

    await scripted.wait_status("/readyz", 503)
    assert await scripted.status("/livez") == 200
    assert await scripted.status("/v1/models") == 200
    assert is_broken_off(await stream, scripted_model)
    assert (await plain).status_code == 500
    assert (await plain).json()["error"]["type"] == "server_error"
    assert_unavailable(await scripted.post(prompt=""))
    assert not queued.done()
    async with openai.AsyncOpenAI(base_url=f"{scripted_server.url}/v1", api_key="none", max_retries=8) as client:
        (model,) = (await client.models.list()).data
        answer = await client.completions.create(model=model.id, prompt="", max_tokens=9)
    assert scripted_model.text(9) == answer.choices[0].text

    await scripted.wait_status("/readyz", 200)
    assert scripted_model.text(20) == (await queued)["choices"][0]["text"]
    for choice in range(2):
        assert scripted_model.text(30) == (await queued_stream).text(choice)
    assert {0: "length", 1: "length"} == (await queued_stream).finish_reasons
    assert restarts + 1 == await scripted.metric("engine_restarts_total")
    await scripted.wait_metric("kv_cache_usage_ratio", 0)
    assert (0, 0) == (await scripted.metric("requests_running"), await scripted.metric("requests_waiting"))


async def test_an_engine_that_freezes(scripted_server: Server, scripted: Client, scripted_model: ScriptedModel) -> None:
    """Silent for stall_seconds with open work, it is killed and restarted; a request that it never saw is answered."""
    restarts = await scripted.metric("engine_restarts_total")
    stream = asyncio.create_task(scripted.stream(**_LONG))
    await scripted.wait_metric("requests_running", 1)
    frozen = scripted_server.engine
    frozen.suspend()
    unseen = asyncio.create_task(scripted.complete(prompt="", max_tokens=20))
    assert is_broken_off(await stream, scripted_model)
    assert not survivors([frozen], seconds=1)  # its channel closes a moment before it is gone
    assert scripted_model.text(20) == (await unseen)["choices"][0]["text"]
    assert restarts + 1 == await scripted.metric("engine_restarts_total")
    assert await scripted.status("/readyz") == 200


async def test_an_engine_that_was_replaced_unseen(
    scripted_server: Server, scripted: Client, scripted_model: ScriptedModel
) -> None:
    """An API process that stood still meanwhile finds the old one's end and the new one's readiness at once."""
    restarts = await scripted.metric("engine_restarts_total")
    num_lines = len(scripted_server.log)
    api, old = scripted_server.api, scripted_server.engine

    async def replaced() -> bool:
        return any("model loaded in" in line for line in scripted_server.log[num_lines:])

    api.suspend()
    try:
        old.kill()
        await eventually(replaced, seconds=60)
    finally:
        api.resume()
    await scripted.wait_metric("engine_restarts_total", restarts + 1)
    await scripted.wait_status("/readyz", 200)
    assert scripted_model.text(5) == (await scripted.complete(prompt="", max_tokens=5))["choices"][0]["text"]


async def test_an_engine_that_dies_too_often(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """Past max_restarts nothing is tried again: liveness falls, requests end or are refused; SIGTERM still works."""
    server = start(str(scripted_model.folder), "--max-restarts", "0", "--max-num-seqs", "1")
    client = connect(server)
    stream = asyncio.create_task(client.stream(**_LONG))
    await client.wait_metric("requests_running", 1)
    queued = asyncio.create_task(client.post(prompt=""))
    await client.wait_metric("requests_waiting", 1)
    server.engine.kill()
    await client.wait_status("/livez", 503)
    assert is_broken_off(await stream, scripted_model)
    assert (await queued).status_code == 500
    assert (await client.http.get("/readyz")).json()["phase"] == "failed"
    assert_unavailable(await client.post(prompt=""))
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 10) == 0


async def test_an_engine_that_dies_while_it_loads(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """It is started again, and counted."""
    server = start(str(scripted_model.folder), ready=False)
    client = connect(server)
    await client.wait_status("/livez", 200)
    server.engine.kill()
    await client.wait_status("/readyz", 200)
    assert await client.metric("engine_restarts_total") == 1
    assert scripted_model.text(5) == (await client.complete(prompt="", max_tokens=5))["choices"][0]["text"]


async def test_a_supervisor_that_is_killed_leaves_nobody(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """Its children end by themselves, in the midst of their work."""
    server = start(str(scripted_model.folder))
    client = connect(server)
    asking = asyncio.create_task(client.post(**_LONG))
    await client.wait_metric("requests_running", 1)
    children = server.children
    server.process.kill()
    assert not await asyncio.to_thread(survivors, children, seconds=_GONE_SECONDS)
    await asyncio.wait([asking])
    assert isinstance(asking.exception(), httpx.TransportError)


async def test_an_api_process_that_is_killed_ends_the_service(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """The supervisor ends with a code that is not 0, and nobody is left: whoever runs the service starts it again."""
    server = start(str(scripted_model.folder))
    client = connect(server)
    asking = asyncio.create_task(client.post(**_LONG))
    await client.wait_metric("requests_running", 1)
    server.api.kill()
    assert await asyncio.to_thread(server.wait, 10) == 1
    await asyncio.wait([asking])
    assert isinstance(asking.exception(), httpx.TransportError)


async def test_a_model_that_cannot_be_used_ends_the_service(start: Start, scripted_model: ScriptedModel) -> None:
    """No restart would mend it: the exit code is 2, the log names the setting, and nobody is left."""
    server = start(str(scripted_model.folder), "--kv-memory", "1MiB", ready=False)
    await server.wait_children()
    assert await asyncio.to_thread(server.wait, 60) == 2
    assert any("kv_memory: 1048576 bytes hold" in line for line in server.log)


async def test_what_a_running_service_cannot_load_again_it_tries_again(
    start: Start, connect: Connect, scripted_model: ScriptedModel, tmp_path: Path
) -> None:
    """A folder that is away for a while ends a first start, but not a service that has been ready."""
    folder = tmp_path / "model"
    shutil.copytree(scripted_model.folder, folder)
    server = start(str(folder))
    client = connect(server)
    folder.rename(tmp_path / "away")
    server.engine.kill()
    await client.wait_metric("engine_restarts_total", 2)
    assert await client.status("/livez") == 200
    assert await client.status("/readyz") == 503
    (tmp_path / "away").rename(folder)
    await client.wait_status("/readyz", 200)
    answer = await client.complete(prompt="", max_tokens=20)
    assert scripted_model.text(20) == answer["choices"][0]["text"]


async def test_a_reader_that_stops_reading_is_no_fault_of_the_engine(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """Its answer waits for it; the engine, which has nothing more to do, is not taken for stalled."""
    name = "n" * 8000  # in every event, so that a few hundred are more than sockets hold
    server = start(str(scripted_model.folder), "--stall-seconds", "1", "--served-model-name", name)
    client = connect(server)
    port = int(server.url.rpartition(":")[2])
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port))
        body = json.dumps({"prompt": "", "max_tokens": 250, "ignore_eos": True, "n": 4, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        reader.sendall((head + body).encode())
        await client.wait_metric("requests_running", 4)
        await client.wait_metric("requests_running", 0, seconds=60)
        await asyncio.sleep(2.5)
        assert await client.metric("engine_restarts_total") == 0
        assert await client.status("/readyz") == 200
