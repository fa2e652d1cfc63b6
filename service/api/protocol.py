"""Below the app: uvicorn's HTTP, given to it by process.py. What is no HTTP request is answered in the envelope too.

A body under way can be written without ASGI's layers: those of FastAPI, Starlette and uvicorn take longer for an
event than all the rest. And a route hears that its client has left by a call, not by a task that waits for it.
"""

import asyncio
import http
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.errors import ApiError

Write = Callable[[bytes], bool]
Left = Callable[[], None]
Watch = Callable[[Left | None], None]
_WRITE = "megatron_gpt2.write"
_WATCH = "megatron_gpt2.watch"


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one connection's requests, and of how many connections there are."""

    max_url_bytes: int = 8192
    max_header_bytes: int = 32768
    max_connections: int = 4096
    header_seconds: float = 20.0
    body_seconds: float = 120.0


def write_of(scope: Scope) -> Write:
    """Writes some of the body of a chunked answer that has begun; False where it has to go through ASGI's `send`.

    That is under another server, and while the reader is behind: `send` waits for it.
    """
    write: Write = scope.get("extensions", {}).get(_WRITE, _cannot_write)
    return write


def _cannot_write(_body: bytes) -> bool:
    return False


def watch_of(scope: Scope) -> Watch:
    """Takes what is to be called once, soon, when the client has left; None takes it back.

    Under another server nothing is ever called.
    """
    watch: Watch = scope.get("extensions", {}).get(_WATCH, _cannot_watch)
    return watch


def _cannot_watch(_left: Left | None) -> None:
    pass


class _GatheredWrites:
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

    def _flush(self) -> None:
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._transport.write(data)


class EnvelopeProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, but for the body of its own 400, which is plain text there."""

    _left: Left | None = None  # of the one request that is being answered
    _is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _GatheredWrites(transport)))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:  # no upgrade
            extensions: dict[str, Any] = {_WRITE: _writer(self.cycle), _WATCH: self._watch}
            self.scope["extensions"] = extensions

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._is_lost = True
        self._tell()

    def _watch(self, left: Left | None) -> None:
        self._left = left
        if left is not None:
            self.flow.resume_reading()  # a large body has it paused, and what is not read is not heard to end
        if self._is_lost:
            self.loop.call_soon(self._tell)

    def _tell(self) -> None:
        left, self._left = self._left, None
        if left is not None:
            left()

    def send_400_response(self, msg: str) -> None:
        """Answer with the envelope and close the connection, as what follows on it cannot be told apart."""
        response = ApiError(400, msg, code="invalid_http").response({})
        response.headers["X-Request-Id"] = secrets.token_hex(16)
        response.headers["Connection"] = "close"
        head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
        status = f"HTTP/1.1 400 {http.HTTPStatus.BAD_REQUEST.phrase}\r\n".encode()
        self.transport.write(status + head + b"\r\n" + bytes(response.body))
        self.transport.close()


def _writer(cycle: RequestResponseCycle) -> Write:
    transport, flow = cycle.transport, cycle.flow

    def write(body: bytes) -> bool:
        if flow.write_paused or not cycle.chunked_encoding:
            return False
        if not cycle.disconnected:
            transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    return write
