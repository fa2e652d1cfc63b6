"""Connections that are no use any more, or that there are too many of, end in the kernel or at the door."""

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.service.scripted_model import ScriptedModel
from tests.service.server import Client, Server, eventually

Start = Callable[..., Server]
Connect = Callable[[Server], Client]
_TCP_REPAIR = 19  # of linux/tcp.h: a socket closed under it sends no word
_SEND_SECONDS = 2


def open_connection(server: Server, *, receive_bytes: int | None = None) -> socket.socket:
    url = urlsplit(server.url)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((url.hostname, url.port))
    return connection


def send(connection: socket.socket, **body: object) -> None:
    content = json.dumps({"prompt": "", "ignore_eos": True, **body})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall((head + content).encode())


def is_answered(connection: socket.socket) -> bool:
    connection.settimeout(10)
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection.recv(100).startswith(b"HTTP/1.1 200")
    return False


def is_connected(server: Server, peer: tuple[str, int]) -> bool:
    """Whether the API process has a socket whose other end is `peer`."""
    return any(tuple(connection.raddr) == peer for connection in server.api.net_connections("tcp"))


async def wait_gone(server: Server, peer: tuple[str, int]) -> None:
    async def gone() -> bool:
        return not is_connected(server, peer)

    await eventually(gone, seconds=30)


@pytest.fixture(scope="module")
def impatient_server(scripted_model: ScriptedModel) -> Iterator[Server]:
    """A server that cuts a reader after 2 s; its long name is in every event, so that sockets hold few of them."""
    server = Server(
        *(str(scripted_model.folder), "--max-num-seqs", "2", "--served-model-name", "n" * 8000),
        *("--send-seconds", str(_SEND_SECONDS)),
    )
    try:
        server.wait_ready()
        yield server
        server.process.terminate()
        assert 0 == server.wait(20)
    finally:
        server.kill()


async def test_a_stream_that_nobody_reads_is_cut(impatient_server: Server, connect: Connect) -> None:
    """Its sequences are aborted in mid-stream, their blocks are back, and the next request is served."""
    client = connect(impatient_server)
    with open_connection(impatient_server, receive_bytes=4096) as reader:
        send(reader, max_tokens=900, n=2, stream=True)
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        await wait_gone(impatient_server, reader.getsockname())
    await client.wait_metric("requests_aborted_total", 1)
    await client.wait_metric("requests_running", 0)
    await client.wait_metric("kv_cache_usage_ratio", 0)
    await client.complete(prompt="", max_tokens=3)


async def test_a_large_answer_that_nobody_reads_is_cut(impatient_server: Server, connect: Connect) -> None:
    """A plain one, too: it has left the service, and stands in buffers that are then given up."""
    client = connect(impatient_server)
    with open_connection(impatient_server, receive_bytes=4096) as reader:
        send(reader, max_tokens=250, n=4, logprobs=20)
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        await wait_gone(impatient_server, reader.getsockname())
    await client.wait_metric("kv_cache_usage_ratio", 0)
    await client.complete(prompt="", max_tokens=3)


async def test_a_slow_reader_is_not_cut(
    impatient_server: Server, connect: Connect, scripted_model: ScriptedModel
) -> None:
    """As long as it takes something now and then, it gets all of it."""
    client = connect(impatient_server)
    aborted = await client.metric("requests_aborted_total")
    answer = bytearray()
    with open_connection(impatient_server, receive_bytes=65536) as reader:
        send(reader, max_tokens=250, n=4, stream=True)
        reader.settimeout(60)
        for _ in range(4):  # so long that one which takes nothing would be cut twice over
            await asyncio.sleep(_SEND_SECONDS / 2)
            answer += await asyncio.to_thread(reader.recv, 131_072)
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            piece = await asyncio.to_thread(reader.recv, 1 << 20)
            assert piece
            answer += piece
    assert b"data: [DONE]" in answer
    assert aborted == await client.metric("requests_aborted_total")


async def test_a_client_that_vanished_is_found(impatient_server: Server, connect: Connect) -> None:
    """Without a word, while its plain request waits in the queue: it is aborted, and those before it are not."""
    client = connect(impatient_server)
    aborted = await client.metric("requests_aborted_total")
    running = [asyncio.create_task(client.stream(prompt="", max_tokens=400)) for _ in range(2)]
    await client.wait_metric("requests_running", 2)
    connection = open_connection(impatient_server)
    send(connection, max_tokens=900)
    peer = connection.getsockname()
    await client.wait_metric("requests_waiting", 1)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    except OSError as error:
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        connection.close()
        pytest.skip(f"no connection can be left half-open here: {error}")
    connection.close()
    assert is_connected(impatient_server, peer)
    await client.wait_metric("requests_waiting", 0)
    await client.wait_metric("requests_aborted_total", aborted + 1)
    assert [{0: "length"}] * 2 == [(await task).finish_reasons for task in running]
    await client.wait_metric("kv_cache_usage_ratio", 0)


async def test_descriptors_used_up(start: Start, connect: Connect, scripted_model: ScriptedModel) -> None:
    """What is under way goes on; the service does not spin; with room again it serves as before."""
    server = start(str(scripted_model.folder))
    client = connect(server)
    stream = asyncio.create_task(client.stream(prompt="", max_tokens=500))
    await client.wait_metric("requests_running", 1)
    api = server.api
    limits = api.rlimit(psutil.RLIMIT_NOFILE)
    api.rlimit(psutil.RLIMIT_NOFILE, (api.num_fds() + 10, limits[1]))
    idle = [open_connection(server) for _ in range(100)]
    assert 0 < sum(map(is_answered, idle)) < 100
    assert scripted_model.text(500) == (await stream).text()
    before = api.cpu_times()
    await asyncio.sleep(1)
    after = api.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.5
    for connection in idle:
        connection.close()
    api.rlimit(psutil.RLIMIT_NOFILE, limits)
    for _ in range(20):
        async with httpx.AsyncClient(base_url=server.url) as http:
            assert 200 == (await http.get("/readyz")).status_code
    assert api.is_running()


def test_few_descriptors_are_said_and_bound_the_connections(start: Start, scripted_model: ScriptedModel) -> None:
    """The soft limit is raised as far as it goes; what that is too few for is told in one line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        server = start(str(scripted_model.folder), "--max-connections", str(hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (hard, hard) == server.api.rlimit(psutil.RLIMIT_NOFILE)
    (line,) = (json.loads(line)["message"] for line in server.log if "max_connections" in line)
    assert f"max_connections: {hard - 128} instead of {hard}, as {hard} files may be open" == line
