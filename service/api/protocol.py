"""Below the app: uvicorn's HTTP, given to it by process.py, with bounds. What is refused here is in the envelope too.

A body under way can be written without ASGI's layers: those of FastAPI, Starlette and uvicorn take longer for an
event than all the rest. And a route hears that its client has left by a call, not by a task that waits for it.
"""

import asyncio
import contextlib
import enum
import http
import logging
import math
import os
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import httptools
from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.errors import ApiError
from service.api.transport import GatheredWrites, num_untaken

log = logging.getLogger(__name__)

Write = Callable[[bytes], bool]
Left = Callable[[], None]
Watch = Callable[[Left | None], None]
_WRITE = "megatron_gpt2.write"
_WATCH = "megatron_gpt2.watch"

_MAX_PIPELINED = 32  # requests of one connection that wait for the one before them to be answered
_LINGER_SECONDS = 2.0  # between a refusal and the end: closed at once, what still arrives would wipe it out
_READ_BYTES = 65536
_AT_ONCE = struct.pack("ii", 1, 0)  # for SO_LINGER: what the kernel holds goes too
_LEAST_RATE = 16_384  # bytes a second that a reader takes of what waits in memory for it
_NEVER = math.inf


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one connection's requests, and of how many connections there are."""

    max_url_bytes: int = 8192
    max_header_bytes: int = 32768
    max_connections: int = 4096
    header_seconds: float = 20.0
    body_seconds: float = 120.0
    send_seconds: float = 60.0


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


class _Stage(enum.Enum):
    """What of the connection's next request has arrived."""

    NOTHING = enum.auto()
    HEAD = enum.auto()  # some of it
    BODY = enum.auto()  # the head; not all of the body
    REFUSED = enum.auto()  # nothing is read any more, only thrown away until the connection ends


class EnvelopeProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on size, time and number; what breaks one is answered in the envelope.

    Stricter than its parser: one Host, no encoding but chunked, HTTP/1.0 and 1.1 alone. Trailers are dropped, and a
    request to change the protocol is served as if it had not asked.
    """

    limits = HttpLimits()
    on_refused: Callable[[int], None] = staticmethod(lambda _status: None)
    _stage = _Stage.NOTHING
    _num_idle_bytes = 0  # that have arrived since the last head, piece of a body, or end of a request
    _due = _NEVER  # loop time by which the stage must be over
    _timer: asyncio.TimerHandle | None = None  # at or before `_due`: most often it finds that all has arrived
    _answering: RequestResponseCycle | None = None  # what was handed to the app last; uvicorn's own is the newest
    _reader_timer: asyncio.TimerHandle | None = None  # while more waits for the reader than a little
    _refusal: ApiError | None = None  # to be said when all before it is answered
    _left: Left | None = None  # of the one request that is being answered
    _is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.limits.max_connections:
            self._turn_away(transport)
            return
        super().connection_made(cast(asyncio.Transport, GatheredWrites(transport)))
        self._wait(self.limits.header_seconds)

    def data_received(self, data: bytes) -> None:
        if self._stage is _Stage.REFUSED:
            return
        self._unset_keepalive_if_required()
        self._num_idle_bytes += len(data)
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade() + data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError as error:
                reason = error.__context__
                if not isinstance(reason, ApiError | ValueError | None):  # a bug of a callback
                    log.error("unexpected error", exc_info=reason)
                self._refuse(reason if isinstance(reason, ApiError) else _no_http())
                return
            break
        if self._num_idle_bytes > self.limits.max_header_bytes:
            self._refuse(self._head_too_large())
        elif self._stage is not _Stage.NOTHING or self._num_idle_bytes:
            self._expect_more()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._stage = _Stage.HEAD

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.max_url_bytes:
            raise ApiError(414, f"The URL is longer than {self.limits.max_url_bytes} bytes.", code="url_too_long")

    def on_headers_complete(self) -> None:
        self._check_head()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                allowed = {"Allow": "GET, POST"}
                raise ApiError(405, "The service is no proxy.", code="method_not_allowed", headers=allowed)
            return
        if len(self.pipeline) >= _MAX_PIPELINED:
            message = "Too many requests wait on this connection."
            again = {"Retry-After": "1"}
            raise ApiError(429, message, type="overloaded_error", code="too_many_pipelined", headers=again)
        super().on_headers_complete()
        self.headers = []  # for trailers: the request has its own
        self._begin(_Stage.BODY)
        extensions: dict[str, Any] = {_WRITE: _writer(self.cycle), _WATCH: self._watch}
        self.scope["extensions"] = extensions

    def on_body(self, body: bytes) -> None:
        self._num_idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._begin(_Stage.NOTHING)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._stage is _Stage.BODY and self.expect_100_continue and self.cycle.response_complete:
            self._refuse(None)  # who waited for the 100 may or may not send the body now
        elif self._stage is _Stage.REFUSED:
            self._end_if_answered()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is None:  # turned away
            return
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        self.pipeline.clear()
        if self._answering is not None:
            _disconnect(self._answering)
        self._is_lost = True
        self._tell()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # Who reads the answers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_reader(math.inf)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()

    def _check_reader(self, num_before: float) -> None:
        """Cut a reader off that has taken too little since there were so many bytes for it, or look again."""
        seconds = self.limits.send_seconds
        num_unsent = num_untaken(self.transport)
        if num_before - num_unsent < _LEAST_RATE * seconds:
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            self.transport.abort()
        else:
            self._reader_timer = self.loop.call_later(seconds, self._check_reader, num_unsent)

    # Who listens

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

    # What is read

    def _check_head(self) -> None:
        """Raises ApiError for a head that is too large, or that two readers could understand differently."""
        num_bytes = len(self.url)
        num_hosts = 0
        version = self.parser.get_http_version()
        for name, value in self.headers:
            num_bytes += len(name) + len(value) + 4
            if name == b"host":
                num_hosts += 1
            elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version == "1.0"):
                raise ApiError(400, "Transfer-Encoding must be chunked, in HTTP/1.1.", code="invalid_http")
        if num_bytes > self.limits.max_header_bytes:
            raise self._head_too_large()
        if version not in ("1.0", "1.1"):
            raise ApiError(400, "The service speaks HTTP/1.1 and 1.0.", code="invalid_http")
        if num_hosts > 1 or (num_hosts == 0 and version == "1.1"):
            raise ApiError(400, "A request must have one Host header.", code="invalid_http")

    def _head_too_large(self) -> ApiError:
        message = f"What is not the body is larger than {self.limits.max_header_bytes} bytes."
        return ApiError(431, message, code="headers_too_large")

    def _without_upgrade(self) -> bytes:
        """The head that was just read, for a new parser: the one before takes what follows for another protocol."""
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = parser
        return b"\r\n".join([*lines, b"", b""])

    # Time

    def _begin(self, stage: _Stage) -> None:
        self._stage = stage
        self._due = _NEVER
        self._num_idle_bytes = 0

    def _expect_more(self) -> None:
        """The request is not whole: its head, or its body, has so much time from its first byte on."""
        if self._due == _NEVER:
            is_body = self._stage is _Stage.BODY
            self._wait(self.limits.body_seconds if is_body else self.limits.header_seconds)

    def _wait(self, seconds: float) -> None:
        self._due = self.loop.time() + seconds
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._due > self.loop.time():
            if self._due != _NEVER:
                self._timer = self.loop.call_at(self._due, self._on_timer)
        elif self._stage is _Stage.REFUSED:
            self.transport.abort()
        elif self._stage is _Stage.NOTHING and not self._num_idle_bytes:
            self.transport.close()  # it never said a word
        elif self.flow.read_paused:  # by us: its time has not begun
            self._due = _NEVER
            self._expect_more()
        else:
            what = "body" if self._stage is _Stage.BODY else "head"
            self._refuse(ApiError(408, f"The request's {what} did not arrive in time.", code="request_timeout"))

    # The end

    def _refuse(self, refusal: ApiError | None) -> None:
        """Answer what is being read with `refusal`, after all before it, and close; nothing more is read."""
        if self._stage is _Stage.BODY:
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
            elif self.cycle.response_started:
                refusal = None  # it has its answer
            else:
                _disconnect(self.cycle)
                self._answering = None
                self._tell()
        self._begin(_Stage.REFUSED)
        self._refusal = refusal
        self.flow.resume_reading()
        self._end_if_answered()

    def _end_if_answered(self) -> None:
        is_answered = self._answering is None or self._answering.response_complete
        if not is_answered or self.pipeline or self.transport.is_closing() or self._due != _NEVER:
            return
        if self._refusal is not None:
            log.info("refused status=%d code=%s", self._refusal.status, self._refusal.body["error"]["code"])
            self.on_refused(self._refusal.status)
            self.transport.write(_answer(self._refusal))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._wait(_LINGER_SECONDS)

    def _turn_away(self, transport: asyncio.Transport) -> None:
        """A connection over the bound. It is not kept for a moment, as descriptors may be scarce."""
        self._stage = _Stage.REFUSED
        error = ApiError(
            503,
            "Too many connections are open; try again later",
            type="service_unavailable",
            code="too_many_connections",
            headers={"Retry-After": "1"},
        )
        self.on_refused(error.status)
        transport.write(_answer(error))
        if transport.get_extra_info("sslcontext") is None:
            with contextlib.suppress(OSError):  # closed with something unread, the answer would be lost
                os.read(transport.get_extra_info("socket").fileno(), _READ_BYTES)
        transport.close()


def protocol_within(
    limits: HttpLimits, *, on_refused: Callable[[int], None] = lambda _status: None
) -> type[EnvelopeProtocol]:
    """The protocol with these limits: uvicorn makes its objects itself, so they can only be the class's.

    `on_refused` hears the status of whatever is answered here.
    """
    return type("EnvelopeProtocol", (EnvelopeProtocol,), {"limits": limits, "on_refused": staticmethod(on_refused)})


def _no_http() -> ApiError:
    return ApiError(400, "Invalid HTTP request received.", code="invalid_http")


def _answer(error: ApiError) -> bytes:
    """The whole of an answer after which the connection is closed."""
    response = error.response({})
    response.headers["X-Request-Id"] = secrets.token_hex(16)
    response.headers["Connection"] = "close"
    head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    status = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n".encode()
    return status + head + b"\r\n" + bytes(response.body)


def _disconnect(cycle: RequestResponseCycle) -> None:
    """The app hears that the client has left, and what it still says goes nowhere."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()


def _writer(cycle: RequestResponseCycle) -> Write:
    transport, flow = cycle.transport, cycle.flow

    def write(body: bytes) -> bool:
        if flow.write_paused or not cycle.chunked_encoding:
            return False
        if not cycle.disconnected:
            transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    return write
