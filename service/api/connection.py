"""What an answer owes its connection: work ends when the client leaves, and a silent event stream says it is alive."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.errors import to_api_error

_Result = TypeVar("_Result")
_KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client leaves. The request's body must have been read.

    Raises ClientDisconnect, and whatever `work` raises. Starlette does this only for its own streams.
    """

    async def until_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = task, _ = (asyncio.ensure_future(work), asyncio.ensure_future(until_disconnect()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. The status line waits for the first event, or for the first keep-alive comment.

    An exception before the status line is raised, so that it becomes an HTTP error; one after it becomes an error
    event and the end of the stream.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *, keep_alive_seconds: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._keep_alive_seconds = keep_alive_seconds
        self._last_write = time.monotonic()
        self._started = False
        self._writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send))
        except ClientDisconnect:
            if not self._started:
                raise

    async def _run(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            keep_alive = asyncio.ensure_future(self._keep_alive(send))
            try:
                async for event in events:
                    await self._write(send, event)
            except Exception as error:
                answer = to_api_error(error)
                if not self._started:
                    raise answer from error
                await self._write(send, b"data: %b\n\n" % json.dumps(answer.body).encode() + DONE)
            finally:
                keep_alive.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_seconds = time.monotonic() - self._last_write
            if silent_seconds >= self._keep_alive_seconds:
                await self._write(send, _KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive_seconds - silent_seconds)

    async def _write(self, send: Send, event: bytes) -> None:
        async with self._writing:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._last_write = time.monotonic()
