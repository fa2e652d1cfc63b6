"""The admin listener and `megatron-gpt2 drain` over a real service, and the order of a shutdown as others see it.

An engine that is suspended keeps its requests open for as long as a test has something to see.
"""

import asyncio
import json
import stat
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import httpx
import pytest

from tests.service.scripted_model import LONGEST, ScriptedModel
from tests.service.server import COMMAND, Connect, Server, Start, assert_unavailable


async def begin(*arguments: str) -> Process:
    """`megatron-gpt2 drain`, as a preStop hook runs it."""
    return await asyncio.create_subprocess_exec(COMMAND, "drain", *arguments, stdout=PIPE, stderr=PIPE)


async def end(process: Process) -> tuple[int | None, str]:
    """Its exit code and its one line."""
    output, errors = await process.communicate()
    text = (output + errors).decode()
    assert 1 == text.count("\n"), text
    return process.returncode, text


async def drain(*arguments: str) -> tuple[int | None, str]:
    return await end(await begin(*arguments))


def messages(server: Server) -> list[str]:
    return [json.loads(line)["message"] for line in server.log]


def admin_port(server: Server) -> str:
    (url,) = (line.split()[-1] for line in messages(server) if line.startswith("admin routes are on http"))
    return url.rpartition(":")[2]


@pytest.mark.parametrize("by", ["port", "socket"])
async def test_the_command_waits_for_what_is_open(
    start: Start, connect: Connect, scripted_model: ScriptedModel, tmp_path: Path, by: str
) -> None:
    """Running and queued requests are answered whole, new ones refused; the service stays until SIGTERM, then 0."""
    socket = tmp_path / "admin"
    listener = ("--admin-port", "0") if by == "port" else ("--admin-socket", str(socket))
    server = start(str(scripted_model.folder), "--max-num-seqs", "2", "--stall-seconds", "200", *listener)
    where = ("--admin-port", admin_port(server)) if by == "port" else listener
    client = connect(server)
    stream = asyncio.create_task(client.stream(prompt="", max_tokens=400, n=2))
    await client.wait_metric("requests_running", 2)
    queued = asyncio.create_task(client.complete(prompt="", max_tokens=7))
    await client.wait_metric("requests_waiting", 1)
    server.engine.suspend()
    assert await client.metric("requests_open") == 2
    code, line = await drain(*where, "--seconds", "0")
    assert (1, True) == (code, line.startswith("still open after ")), line
    assert "2 requests (2 sequences running, 1 waiting)" in line
    waiting = await begin(*where)
    assert await client.status("/readyz") == 503
    assert_unavailable(await client.post(prompt=""))
    server.engine.resume()
    code, line = await end(waiting)
    assert (0, True) == (code, line.startswith("nothing is open after ")), line
    assert [scripted_model.text(400)] * 2 == [(await stream).text(choice) for choice in range(2)]
    assert (await stream).done
    assert scripted_model.text(7) == (await queued)["choices"][0]["text"]

    assert 0 == (await drain(*where))[0], "again"
    assert await client.status("/livez") == 200
    assert_unavailable(await client.post(prompt=""))
    assert (1, 0) == (await client.metric("draining"), await client.metric("requests_open"))
    assert server.process.poll() is None
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 10) == 0
    assert 2 == (await drain(*where))[0]
    assert "draining: 2 requests are open; new ones are refused" in messages(server)
    assert "drained: 0 requests were cut" in messages(server)


async def test_a_socket_is_its_owners_alone(start: Start, connect: Connect, tmp_path: Path) -> None:
    """From a killed service's file on to the end, when it is removed. The public port knows nothing of it."""
    socket = tmp_path / "admin"
    killed = start("--admin-socket", str(socket), ready=False)
    killed.process.kill()
    killed.process.wait()
    await asyncio.to_thread(killed._reader.join)  # its children have ended too
    assert socket.is_socket()
    server = start("--admin-socket", str(socket))
    assert stat.S_IFSOCK | 0o600 == socket.stat().st_mode
    client = connect(server)
    assert 404 == (await client.http.post("/admin/drain")).status_code
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(socket)), base_url="http://localhost"
    ) as admin:
        assert 404 == (await admin.post("/v1/completions", json={})).status_code
        assert 405 == (await admin.get("/admin/drain")).status_code
    assert await client.status("/readyz") == 200
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 10) == 0
    assert not socket.exists()


async def test_a_command_that_is_killed_takes_nothing_back(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """Nor does it hold up what follows: SIGTERM ends what is open after drain_seconds."""
    server = start(str(scripted_model.folder), "--admin-port", "0", "--drain-seconds", "1")
    client = connect(server)
    stream = asyncio.create_task(client.stream(**LONGEST, n=4))
    await client.wait_metric("requests_running", 4)
    server.engine.suspend()
    killed = await begin("--admin-port", admin_port(server))
    await client.wait_metric("draining", 1)
    killed.kill()
    await killed.wait()
    assert await client.status("/readyz") == 503
    reader, writer = await asyncio.open_connection("127.0.0.1", int(admin_port(server)))
    writer.write(b"POST /admin/drain?wait_seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    server.process.terminate()
    assert scripted_model.is_broken_off(await stream)
    server.engine.resume()
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert (b"HTTP/1.1 200 OK", 0) == (head.splitlines()[0], json.loads(body)["requests_open"])
    assert await asyncio.to_thread(server.wait, 10) == 0
    assert "drained: 1 requests were cut" in messages(server)


async def test_a_second_signal_after_the_command(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """The first SIGTERM after a drain by the command is still the first; the second stops at once."""
    server = start(str(scripted_model.folder), "--admin-port", "0")
    client = connect(server)
    stream = asyncio.create_task(client.stream(**LONGEST, n=4))
    await client.wait_metric("requests_running", 4)
    server.engine.suspend()
    assert 1 == (await drain("--admin-port", admin_port(server), "--seconds", "0"))[0]
    server.process.terminate()
    assert await client.status("/livez") == 200
    assert not stream.done()
    server.process.terminate()
    assert scripted_model.is_broken_off(await stream)
    assert await asyncio.to_thread(server.wait, 10) == 1


async def test_readiness_falls_before_the_port_closes(
    start: Start, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """A prober that connects anew each time sees 200s, then 503s for unready_seconds, then a closed port.

    What cannot end within drain_seconds ends with an error meanwhile, and the metrics of the open port tell.
    """
    unready_seconds = 3.0
    server = start(str(scripted_model.folder), "--drain-seconds", "1", "--unready-seconds", str(unready_seconds))
    client = connect(server)
    seen: list[tuple[float, int]] = []  # when, and the status; 0 is a port that is closed

    async def probe() -> None:
        while not seen or seen[-1][1]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as prober:
                try:
                    status = (await prober.get("/readyz")).status_code
                except httpx.TransportError:
                    status = 0
            seen.append((time.monotonic(), status))

    async def refused() -> int:
        async with httpx.AsyncClient(base_url=server.url) as other:
            response = await other.post("/v1/completions", json={"prompt": "", "max_tokens": 1})
        assert_unavailable(response)
        assert ("1", "close") == (response.headers["retry-after"], response.headers["connection"])
        return response.status_code

    prober = asyncio.create_task(probe())
    stream = asyncio.create_task(client.stream(**LONGEST, n=4))
    plain = asyncio.create_task(client.post(**LONGEST, n=4))
    short = asyncio.create_task(client.complete(prompt="", max_tokens=5))
    await client.wait_metric("requests_running", 8)
    await short
    engine = server.engine
    engine.suspend()
    signalled_at = time.monotonic()
    server.process.terminate()
    await client.wait_status("/readyz", 503)
    assert 503 == await refused()
    assert scripted_model.is_broken_off(await stream)
    engine.resume()
    assert_unavailable(await plain)
    await client.wait_metric("drain_cut_requests_total", 2)
    assert (1, 0) == (await client.metric("draining"), await client.metric("requests_open"))
    assert 503 == await refused()
    await prober
    statuses = [status for _, status in seen]
    assert [200, 503, 0] == sorted(set(statuses), key=statuses.index)
    assert statuses == sorted(statuses, key=[200, 503, 0].index), "each begins once"
    assert unready_seconds <= seen[-1][0] - signalled_at
    assert await asyncio.to_thread(server.wait, 15) == 0
    assert "draining: 2 requests are open; new ones are refused" in messages(server)
    assert "drained: 2 requests were cut" in messages(server)


async def test_the_command_gives_balancers_time(start: Start, scripted_model: ScriptedModel) -> None:
    """It does not return before unready_seconds are over, also where nothing is open and it is not to wait."""
    server = start(str(scripted_model.folder), "--admin-port", "0", "--unready-seconds", "2")
    began_at = time.monotonic()
    assert 0 == (await drain("--admin-port", admin_port(server), "--seconds", "0"))[0]
    assert 2 <= time.monotonic() - began_at
    server.process.terminate()
    assert await asyncio.to_thread(server.wait, 10) == 0
