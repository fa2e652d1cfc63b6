"""Readers that stop, and clients that vanish: their connections end in the kernel, and their work with them."""

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.api import raw_http
from tests.service.scripted_model import ScriptedModel
from tests.service.server import Client, Connect, Server, eventually, until_drained

_TCP_REPAIR = 19  # of linux/tcp.h: a socket closed under it sends no word
_SEND_SECONDS = 2


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
    yield from until_drained(
        Server(
            *(str(scripted_model.folder), "--max-num-seqs", "2", "--served-model-name", "n" * 8000),
            *("--send-seconds", str(_SEND_SECONDS)),
        )
    )


async def test_a_stream_that_nobody_reads_is_cut(impatient_server: Server, connect: Connect) -> None:
    """Its sequences are aborted in mid-stream, their blocks are back, and the next request is served."""
    client = connect(impatient_server)
    with impatient_server.open_connection(receive_bytes=4096) as reader:
        reader.sendall(raw_http.request({"prompt": "", "ignore_eos": True, "max_tokens": 900, "n": 2, "stream": True}))
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        await wait_gone(impatient_server, reader.getsockname())
    await client.wait_metric("requests_aborted_total", 1)
    await client.wait_metric("requests_running", 0)
    await client.wait_metric("kv_cache_usage_ratio", 0)
    await client.complete(prompt="", max_tokens=3)


async def test_a_large_answer_that_nobody_reads_is_cut(impatient_server: Server, connect: Connect) -> None:
    """A plain one, too: it has left the service, and stands in buffers that are then given up."""
    client = connect(impatient_server)
    with impatient_server.open_connection(receive_bytes=4096) as reader:
        reader.sendall(raw_http.request({"prompt": "", "ignore_eos": True, "max_tokens": 250, "n": 4, "logprobs": 20}))
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
    with impatient_server.open_connection(receive_bytes=65536) as reader:
        reader.sendall(raw_http.request({"prompt": "", "ignore_eos": True, "max_tokens": 250, "n": 4, "stream": True}))
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


def test_a_client_that_vanished_is_found(impatient_server: Server, request: pytest.FixtureRequest) -> None:
    """Without a word, while its plain request waits in the queue: it is aborted, and those before it are not."""
    if may_vanish():
        asyncio.run(find_vanished(impatient_server))
        return
    # Whoever may not, may in a network of their own, where that can be had: there this test runs once more.
    alone = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no connection can be left half-open here: no CAP_NET_ADMIN, and no `unshare -rn` to have it in")
    command = [*alone, sys.executable, "-c", _IN_A_NETWORK, request.node.nodeid]
    done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


_IN_A_NETWORK = """
import fcntl, socket, struct, sys, pytest
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]]))
"""


def may_vanish() -> bool:
    with socket.socket() as connection:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        except PermissionError:
            return False
    return True


async def find_vanished(server: Server) -> None:
    client = Client(server.url)
    aborted = await client.metric("requests_aborted_total")
    running = [asyncio.create_task(client.stream(prompt="", max_tokens=400)) for _ in range(2)]
    await client.wait_metric("requests_running", 2)
    connection = server.open_connection()
    connection.sendall(raw_http.request({"prompt": "", "max_tokens": 900}))
    peer = connection.getsockname()
    await client.wait_metric("requests_waiting", 1)
    connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    connection.close()
    assert is_connected(server, peer)
    await client.wait_metric("requests_waiting", 0)
    await client.wait_metric("requests_aborted_total", aborted + 1)
    assert [{0: "length"}] * 2 == [(await task).finish_reasons for task in running]
    await client.wait_metric("kv_cache_usage_ratio", 0)
    await client.http.aclose()
