"""Framing and the engine's end of the channel, over a real socket pair."""

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from service.engine.channel import Channel, ChannelClosed, MalformedMessage, frame
from service.engine.request import Abort, Request, SamplingParams, Submit, ToEngine

Pair = tuple[Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The engine's channel, and the API's raw end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, ToEngine), theirs


@pytest.fixture
def wake() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What else a channel waits for, and the end that is written to."""
    reader, writer = socket.socketpair()
    with reader, writer:
        yield reader, writer


MESSAGES = [
    Submit(
        (Request(2**48 + 1, (1, 2, 50256), 2, score_from=1, priority=-1, cache_salt="s"),),
        SamplingParams(
            5, seed=-(2**63), stop_token_ids=(7,), logit_bias=((7, -1.5),), bad_words=((1, 2),), grammar="g"
        ),
        b"\x00\xff",
    ),
    Abort(3, None),
    Abort(4, 2),
]


@pytest.mark.parametrize("piece", [1, 3, 7, 10_000])
def test_messages_survive_any_split(pair: Pair, piece: int) -> None:
    """However the bytes arrive, each message comes out once, whole, in order."""
    channel, theirs = pair
    data = b"".join(frame(message, msgspec.msgpack.Encoder()) for message in MESSAGES)
    received: list[object] = []
    for start in range(0, len(data), piece):
        theirs.sendall(data[start : start + piece])
        received += channel.receive()
    assert MESSAGES == received


def test_sending_never_blocks_and_wait_delivers_the_rest(pair: Pair, wake: tuple[socket.socket, socket.socket]) -> None:
    """More than the socket holds stays in the channel, and goes out while it waits for the peer."""
    channel, theirs = pair
    big = Submit((Request(1, tuple(range(1000))),) * 1000, SamplingParams(1))
    channel.send(big)
    data = bytearray()

    def read() -> None:
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            data.extend(theirs.recv(65536))
        theirs.sendall(frame(MESSAGES[1], msgspec.msgpack.Encoder()))

    reader = threading.Thread(target=read)
    reader.start()
    channel.wait(wake[0])
    reader.join()
    assert big == msgspec.msgpack.decode(bytes(data[4:]), type=Submit)
    assert [MESSAGES[1]] == channel.receive()


def test_a_wake_ends_the_wait_and_is_taken_by_it(pair: Pair, wake: tuple[socket.socket, socket.socket]) -> None:
    """However often it was rung; with nothing read from the channel, and nothing left that would end the next wait."""
    channel, theirs = pair
    reader, writer = wake
    for _ in range(3):
        writer.send(b"\0")
    channel.wait(reader)
    assert [] == channel.receive()
    reader.setblocking(False)
    with pytest.raises(BlockingIOError):
        reader.recv(1)
    theirs.sendall(frame(MESSAGES[1], msgspec.msgpack.Encoder()))
    channel.wait(reader)
    assert [MESSAGES[1]] == channel.receive()


def test_a_closed_peer_is_told_on_both_ways(pair: Pair, wake: tuple[socket.socket, socket.socket]) -> None:
    """Reading and writing raise ChannelClosed, and wait returns."""
    channel, theirs = pair
    theirs.close()
    channel.wait(wake[0])
    with pytest.raises(ChannelClosed):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(MESSAGES[1])


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\1\xc1",
        b"\0\0\0\3\x92\xa1x",
        frame(["abort", "x"], msgspec.msgpack.Encoder()),
        b"\0\0\0\4\x91\xa2a\x95",
        b"\0\0\x27\x19\x94\xa5abort\x01\xc0" + b"\x91" * 10_000,
    ],
)
def test_a_malformed_message_is_refused(pair: Pair, data: bytes) -> None:
    """A length past the bound, no msgpack, an unknown tag, a wrong type, no UTF-8, too deep a nesting."""
    channel, theirs = pair
    theirs.sendall(data)
    with pytest.raises(MalformedMessage):
        channel.receive()
