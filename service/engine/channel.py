"""Length-prefixed msgpack over a socket pair: the engine process's blocking end, and the framing both ends share."""

import select
import socket
from typing import TypeVar

import msgspec

HEADER_BYTES = 4
# A full submit (1,024 prompts of 1,023 ids) is about 3 MB; anything near this bound is a broken peer.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_READ_BYTES = 256 * 1024
_Message = TypeVar("_Message")


class ChannelClosed(Exception):
    """The other process has closed its end, or is gone."""


class MalformedMessage(Exception):
    """A frame that is no message of this channel."""


def frame(message: object, encoder: msgspec.msgpack.Encoder) -> bytes:
    """`message` as a length (big-endian, 4 bytes) and its msgpack bytes."""
    body = encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def decode(body: bytes | bytearray, decoder: msgspec.msgpack.Decoder[_Message]) -> _Message:
    """The message in a frame's body. Raises MalformedMessage."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(str(error)) from error


class Channel:
    """The engine's end. Receives messages of type `receives`; sends never block: what does not fit waits here."""

    def __init__(self, sock: socket.socket, receives: object) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(receives)
        self._encoder = msgspec.msgpack.Encoder()
        self._inbox = bytearray()
        self._outbox = bytearray()

    def send(self, message: object) -> None:
        """Queue `message` and send what the socket takes now. Raises ChannelClosed."""
        self._outbox += frame(message, self._encoder)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now. Raises ChannelClosed."""
        while self._outbox:
            try:
                sent = self._socket.send(self._outbox)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosed from error
            del self._outbox[:sent]

    def wait(self, wake: socket.socket) -> None:
        """Block until there is something to read here or in `wake`, whose bytes are taken; send meanwhile what waits.

        Raises ChannelClosed.
        """
        while True:
            self.flush()
            poll = select.poll()
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            poll.register(wake, select.POLLIN)
            ready = {file for file, event in poll.poll() if event & ~select.POLLOUT}
            if wake.fileno() in ready:
                wake.recv(_READ_BYTES)
            if ready:
                return

    def receive(self) -> list[object]:
        """Every whole message that has arrived, without waiting. Raises ChannelClosed, MalformedMessage."""
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            self._inbox += data
            if len(data) < _READ_BYTES:
                break
        messages = []
        offset = 0
        while len(self._inbox) - offset >= HEADER_BYTES:
            start = offset + HEADER_BYTES
            size = int.from_bytes(self._inbox[offset:start], "big")
            if size > MAX_MESSAGE_BYTES:
                raise MalformedMessage(f"a message of {size} bytes")
            if len(self._inbox) < start + size:
                break
            messages.append(decode(self._inbox[start : start + size], self._decoder))
            offset = start + size
        del self._inbox[:offset]
        return messages
