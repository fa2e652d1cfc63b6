"""What one turn of the event loop has to say: it goes out whole and in order, or its connection is gone."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from service.api.transport import GatheredWrites, num_untaken

Talk = Callable[[asyncio.Transport, GatheredWrites], None]


async def heard(talk: Talk) -> tuple[bytes, list[dict[str, Any]]]:
    """What the other end of a connection reads of what `talk` does with it, and what the event loop complains of."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        talk(transport, GatheredWrites(transport))
        await asyncio.sleep(0)  # the turn is over
        transport.close()
        said = b""
        while piece := await loop.sock_recv(theirs, 65536):
            said += piece
    return said, complaints


def run(work: Awaitable[tuple[bytes, list[dict[str, Any]]]], factory: Callable[[], Any]) -> tuple[bytes, list[Any]]:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)  # type: ignore[arg-type]


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("talk", "said"),
    [
        (lambda transport, gathered: [gathered.write(b"a"), gathered.write(b"b")], b"ab"),
        (lambda transport, gathered: [gathered.write(b"a"), gathered.close()], b"a"),
        (lambda transport, gathered: [gathered.write(b"a"), gathered.write_eof()], b"a"),
        (lambda transport, gathered: [gathered.write(b"a"), transport.abort()], b""),
        (lambda transport, gathered: [gathered.write(b"a"), transport.close()], b""),
        (lambda transport, gathered: [gathered.close(), gathered.write(b"a")], b""),
        (lambda transport, gathered: [transport.abort(), gathered.write(b"a"), gathered.close()], b""),
    ],
    ids=["twice", "closed", "eof", "torn down", "closed below", "after the end", "after it was torn down"],
)
def test_all_or_nothing(talk: Talk, said: bytes, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A connection that was torn down in the same turn takes nothing more, and nobody complains."""
    assert (said, []) == run(heard(talk), factory)


async def test_what_a_slow_reader_takes_is_seen_at_once() -> None:
    """Also while the kernel's buffer is so full that it asks the transport for nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    reader = socket.create_connection(listener.getsockname())
    connection, _ = listener.accept()
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, connection)
    try:
        assert 0 == num_untaken(transport)
        transport.write(bytes(32 * 2**20))
        in_transport, before = transport.get_write_buffer_size(), num_untaken(transport)
        assert before > in_transport > 0
        while num_untaken(transport) == before:  # until a good part of the reader's own buffer is empty
            assert reader.recv(2**16)
        assert before > num_untaken(transport)
        assert in_transport == transport.get_write_buffer_size()
    finally:
        transport.abort()
        reader.close()
        listener.close()
