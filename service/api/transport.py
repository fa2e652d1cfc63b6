"""How an answer's bytes go out: once a turn of the event loop; and how many are still there. Used by protocol.py."""

import asyncio
import fcntl
import sys
import termios
from typing import Any


class GatheredWrites:
    """A transport that writes once for all that one turn of the event loop has to say.

    That is fewer system calls, and cheaper ones: when hundreds of streams get tokens in one turn, Python's work for
    all of them comes first and the kernel's after it, so that neither throws the other out of the processor's caches.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def _flush(self) -> None:
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            if not self._transport.is_closing():  # else it was torn down in the same turn: uvloop would raise
                self._transport.write(data)


def num_untaken(transport: asyncio.Transport) -> int:
    """Bytes that were written and the peer has not taken: the transport's, and on Linux those in the kernel's buffer.

    The kernel asks for more only when a good part of its buffer, which may be megabytes, is empty: until then a slow
    reader takes nothing from the transport.
    """
    num_bytes = transport.get_write_buffer_size()
    if sys.platform == "linux":
        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        num_bytes += int.from_bytes(queued, sys.byteorder)
    return num_bytes
