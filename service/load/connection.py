"""One HTTP/1.1 connection, read as cheaply as Python can: httptools under a bare asyncio protocol. Used by worker.py.

An event costs it some 10 us of processor time, most of that in the kernel; aiohttp takes twice as long and httpx six
times: a client of either would be what is measured.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import Any, Self, cast

import httptools
import msgspec

from service.load.plan import Server

_DONE = b"data: [DONE]"
_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request. Moments are in monotonic seconds, which all processes of a machine share."""

    begun_at: float
    ended_at: float
    event_times: list[float]  # when each event with a choice was read; none without stream
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None  # in few words, the same for the same reason


class Connection(asyncio.Protocol):
    """Carries one request at a time. Once `closed`, another is needed."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._answered: asyncio.Future[None] | None = None
        self._now = 0.0
        self._stream = False
        self._body = b""  # of a plain answer; of a stream, what is no whole event yet
        self._event_times: list[float] = []
        self._last_event = b""
        self._done = False
        self._complete = False
        self._lost = "connection lost"

    @classmethod
    async def open(cls, server: Server) -> Self:
        """Raises OSError."""
        tls = ssl.create_default_context() if server.tls else None
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, server.host, server.port, ssl=tls)
        return connection

    async def ask(self, request: bytes, *, stream: bool, begun_at: float, timeout_seconds: float) -> Answer:
        """Send `request` and read the answer to it. Never raises for what the server does."""
        assert self._answered is None, "one request at a time"
        self._stream, self._body, self._last_event = stream, b"", b""
        self._event_times = []
        self._done = self._complete = False
        if self.closed:
            return Answer(begun_at, time.monotonic(), [], error=self._lost)
        loop = asyncio.get_running_loop()
        self._answered = loop.create_future()
        timer = loop.call_later(timeout_seconds, self.abort, "timeout")
        self._transport.write(request)
        try:
            await self._answered
        finally:
            timer.cancel()
            self._answered = None
        return self._answer(begun_at)

    async def fetch(self, request: bytes) -> tuple[int, bytes]:
        """The status and body of a plain answer. Raises OSError."""
        answer = await self.ask(request, stream=False, begun_at=0.0, timeout_seconds=60)
        if self.closed and answer.error == self._lost:
            raise ConnectionError(self._lost)
        return self._parser.get_status_code(), self._body

    def abort(self, reason: str = "connection lost") -> None:
        """Close at once; what is open ends with `reason`."""
        self._lost = reason
        self.closed = True
        self._transport.abort()
        self._wake()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of no such class

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._wake()

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort("no HTTP")

    # What httptools calls

    def on_headers_complete(self) -> None:
        self._stream = self._stream and self._parser.get_status_code() == 200

    def on_body(self, body: bytes) -> None:
        if not self._stream:
            self._body += body
            return
        if self._body:
            body = self._body + body
        if b"\r" in body:  # JSON has none of its own
            body = body.replace(b"\r", b"")
        *events, self._body = body.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and event != _DONE:
                self.on_event(event, self._now)
            elif event == _DONE:
                self._done = True

    def on_event(self, event: bytes, read_at: float) -> None:
        """An event but [DONE], with its `data:`."""
        self._event_times.append(read_at)
        self._last_event = event

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.closed = True
            self._transport.close()
        self._complete = True
        self._wake()

    # Inside

    def _wake(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def _answer(self, begun_at: float) -> Answer:
        times = self._event_times
        if not self._complete:
            return Answer(begun_at, time.monotonic(), times, error=self._lost)
        status = self._parser.get_status_code()
        if status != 200:
            return Answer(begun_at, self._now, times, error=str(status))
        if self._stream and not self._done:
            return Answer(begun_at, self._now, times, error="a stream without [DONE]")
        try:
            last = _decode(self._last_event.removeprefix(b"data:") if self._stream else self._body)
            if "error" in last:
                return Answer(begun_at, self._now, times, error=f"error event: {_code(last['error'])}")
            if self._stream and not last["choices"]:
                times.pop()  # of the usage
            usage = last["usage"]
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (msgspec.DecodeError, LookupError, TypeError, ValueError):
            return Answer(begun_at, self._now, times, error="no usage in the answer")
        return Answer(begun_at, self._now, times, *tokens)


def _code(error: Any) -> str:
    return str(error.get("code") or error.get("type") if isinstance(error, dict) else error)[:100]
