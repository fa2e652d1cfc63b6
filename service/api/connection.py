"""What an answer owes its connection: work ends when the client leaves, and a silent event stream says it is alive."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.errors import to_api_error
from service.api.protocol import Write, watch_of, write_of

_Result = TypeVar("_Result")
_KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


async def while_connected(scope: Scope, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client of the request of `scope` leaves.

    Raises ClientDisconnect, and whatever `work` raises.
    """
    # Not in a task of its own, nor with one that waits for the client: the event loop keeps account of every task.
    task = asyncio.current_task()
    assert task is not None
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        task.cancel()

    watch = watch_of(scope)
    watch(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        watch(None)


class EventStream(Response):
    """Server-sent events. The status line waits for the first event, or for the first keep-alive comment.

    An exception before the status line is raised, so that it becomes an HTTP error; one after it becomes an error
    event and the end of the stream. `events` ends with DONE, which goes out in one piece with the end of the answer.
    `close` is called at the end, also where `events` was never begun.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, keep_alive_seconds: float, close: Callable[[], None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._close = close
        self._keep_alive_seconds = keep_alive_seconds
        self._last_write = time.monotonic()
        self._started = False
        self._sending = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None  # the last one, kept while it is on its way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(scope, self._run(send, write_of(scope)))
        except ClientDisconnect:
            if not self._started:
                raise
        finally:
            self._close()

    async def _run(self, send: Send, write: Write) -> None:
        self._keep_alive(send)
        last = b""
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    if event.endswith(DONE):
                        last = event
                    elif self._started and not self._sending.locked() and write(event):
                        self._last_write = time.monotonic()
                    else:
                        await self._send(send, event)
        except Exception as error:
            answer = to_api_error(error)
            if not self._started:
                raise answer from error
            last = b"data: %b\n\n" % json.dumps(answer.body).encode() + DONE
        except asyncio.CancelledError:
            if self._comment is not None:
                self._comment.cancel()
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
        await self._send(send, last, more_body=False)

    def _keep_alive(self, send: Send) -> None:
        """Send a comment if there was silence for so long, and look again when there may be."""
        left_seconds = self._last_write + self._keep_alive_seconds - time.monotonic()
        if left_seconds <= 0:
            if not self._sending.locked():  # else the reader is behind, and nothing goes out
                self._comment = asyncio.ensure_future(self._send(send, _KEEP_ALIVE))
            left_seconds = self._keep_alive_seconds
        self._timer = asyncio.get_running_loop().call_later(left_seconds, self._keep_alive, send)

    async def _send(self, send: Send, event: bytes, *, more_body: bool = True) -> None:
        async with self._sending:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": event, "more_body": more_body})
            self._last_write = time.monotonic()
