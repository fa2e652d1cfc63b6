"""Around each HTTP proxy of Ray Serve: what a lost replica had not begun to answer is asked again, the rest is ended.

Ray Serve calls `middlewares` in its proxies when RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is
`service.ray_proxy:middlewares` as Ray starts on a node. Its proxies give an accepted request to one replica only: if
that is lost, they answer with a bare 500, or break off what they have begun. Imports nothing of Ray.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.connection import DONE
from service.api.errors import ApiError

log = logging.getLogger(__name__)

_PAUSES = (0.1, 0.3, 1.0)  # seconds before a request that was refused or lost is asked again
_MAX_LOSSES = 2  # a request that ends whatever works on it must not end them all
_MAX_KEPT_BYTES = 16 * 2**20  # of a body; a longer one is asked once


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around a proxy."""
    return [Middleware(Retries)]


class Retries:
    """Pure ASGI, around an app that may return without an answer, or without the end of one.

    Every request gets one whole answer, or the connection breaks. No answer of the service changes anything in it, so
    any request may be asked twice. One that got no answer is asked once more, one that got a 503 as often as there are
    `pauses`, in seconds. A stream that broke off ends with an error event and [DONE].
    """

    def __init__(self, app: ASGIApp, *, pauses: Sequence[float] = _PAUSES) -> None:
        self._app = app
        self._pauses = tuple(pauses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(receive)
        num_losses = 0
        for pause in (*self._pauses, None):
            answer = _Answer(request, send, is_last=pause is None)
            await self._app({**scope, "headers": list(scope["headers"])}, request.again(), answer.send)
            if answer.is_whole or request.is_left:
                return
            if answer.has_begun:
                log.warning("the answer to %r broke off", scope["path"])
                await answer.break_off()
                return
            num_losses += not answer.is_refused
            if pause is None or num_losses == _MAX_LOSSES or not request.is_kept:
                break
            await asyncio.sleep(pause)
        log.warning("%r was lost with its replica", scope["path"])
        await _lost().response(scope)(scope, receive, send)


class _Request:
    """What the client sends, kept so that it can be read from its beginning again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._num_bytes = 0
        self.is_kept = True
        self.is_left = False  # the client has gone

    def let_go(self) -> None:
        """It is not read again; the present reader may go on."""
        self.is_kept = False
        self._messages.clear()

    def again(self) -> Receive:
        """ASGI's `receive` for one more reader, who may stop at any time; there must be no other."""
        unread = deque(self._messages)

        async def receive() -> Message:
            if unread:
                return unread.popleft()
            message = await self._receive()
            self._num_bytes += len(message.get("body", b""))
            self.is_left = message["type"] == "http.disconnect"
            if self._num_bytes > _MAX_KEPT_BYTES:
                self.let_go()
            if self.is_kept:
                self._messages.append(message)
            return message

        return receive


class _Answer:
    """One try to answer. A 503 is not passed on unless it is the last."""

    def __init__(self, request: _Request, send: Send, *, is_last: bool) -> None:
        self._request = request
        self._send = send
        self._is_last = is_last
        self._is_stream = False
        self.has_begun = False
        self.is_refused = False
        self.is_whole = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_refused = message["status"] == 503 and not self._is_last and self._request.is_kept
            message = {**message, "headers": _once(message["headers"], b"x-request-id")}
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
        if self.is_refused:
            return
        self.has_begun = True
        self._request.let_go()
        await self._send(message)
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def break_off(self) -> None:
        """End a stream with an error event; the server breaks off the connection of anything else by itself."""
        if self._is_stream:
            event = b"data: %b\n\n" % json.dumps(_lost().body).encode() + DONE
            await self._send({"type": "http.response.body", "body": event})


def _once(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    """Without all but the first of this name: Ray Serve adds its own to the service's."""
    first = next((value for key, value in headers if key.lower() == name), None)
    kept = [(key, value) for key, value in headers if key.lower() != name]
    return kept if first is None else [*kept, (name, first)]


def _lost() -> ApiError:
    return ApiError(
        503,
        "the replica that worked on this request was lost; try again later",
        type="service_unavailable",
        code="service_unavailable",
        headers={"Retry-After": "1"},
    )
