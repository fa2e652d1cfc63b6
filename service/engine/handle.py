"""One engine as the API process sees it: its channel, what it owes, and what it last said. Made by the client."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING

import msgspec

from service.engine.channel import HEADER_BYTES, MAX_MESSAGE_BYTES, MalformedMessage, decode, frame
from service.engine.request import Abort, EngineStats, ModelInfo, Publish, Ready, Status, Submit, ToApi

if TYPE_CHECKING:
    from service.engine.client import EngineClient
    from service.engine.stream import Stream

log = logging.getLogger(__name__)

_MAX_UNSENT_BYTES = 64 * 2**20  # of messages to an engine that reads nothing: some twenty of the largest


class EngineHandle:
    """Engine `number` over all the processes that it has been. All methods belong to the event loop's thread.

    What it had not begun when its process was lost stays here until the client moves it to an engine that is ready.
    """

    def __init__(self, client: EngineClient, number: int, *, name: str, stall_seconds: float) -> None:
        """`name` is what the log calls it."""
        self.number = number
        self.model: ModelInfo | None = None  # of the last process; kept over a restart
        self.status = Status(phase="start", progress=0.0)
        self.stats = EngineStats()
        self.num_restarts = 0
        self.num_owed = 0  # sequences that were handed over and have not ended
        self.given_up = False  # the supervisor starts it no more
        self._client = client
        self._name = name
        self._stall_seconds = stall_seconds
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToApi)
        self._streams: dict[int, Stream] = {}  # request id -> its stream
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None  # the process attached last
        self._watcher: asyncio.Task[None] | None = None
        self._work_open = asyncio.Event()
        self._last_message = time.monotonic()

    @property
    def phase(self) -> str:
        """start, download, convert, load, warmup, ready, restart or failed."""
        return "failed" if self.given_up else self.status.phase

    @property
    def ready(self) -> bool:
        return self.phase == "ready"

    @property
    def clogged(self) -> bool:
        """It reads nothing now, and more waits for it than should."""
        return self._writer is not None and self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES

    @property
    def last_message_age_seconds(self) -> float:
        """Seconds since it last said anything; 0 while it owes nothing."""
        return time.monotonic() - self._last_message if self.num_owed else 0.0

    @property
    def streams(self) -> list[Stream]:
        """Those that have requests here."""
        return list(dict.fromkeys(self._streams.values()))

    def attach(self, sock: socket.socket) -> None:
        """Speak to a new process over `sock`; ends by itself when that process closes its end."""
        self.status = Status(phase="start" if self.model is None else "restart", progress=0.0)
        self._serving = self._spawn(self._serve(sock, self._serving))

    def hand_over(self, stream: Stream, submit: Submit) -> None:
        """Ask for requests of a group, whose deltas are the stream's."""
        for request in submit.requests:
            self._streams[request.id] = stream
            stream._engines[request.id] = self
            self._owe(stream._num_open(request))
        self._send(submit)

    def settled(self) -> None:
        """A sequence has ended: nothing more of it is owed, though a reader may still take its time."""
        self._owe(-1)

    def forget(self, request_id: int, *, num_open: int = 0) -> None:
        """The request, of which so many sequences have not ended, is no longer to be answered from here."""
        if self._streams.pop(request_id, None) is not None:
            self._owe(-num_open)

    def abort(self, request_id: int, choice: int | None) -> None:
        self._send(Abort(request_id, choice))

    async def close(self) -> None:
        """Close the channel, which ends the engine process."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Inside

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, sock: socket.socket, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])  # what the process before left in its channel may still be on its way
            self.num_restarts += 1  # only now are figures those of the new one
        reader, writer = await asyncio.open_connection(sock=sock)
        self._writer = writer
        try:
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                size = int.from_bytes(header, "big")
                if size > MAX_MESSAGE_BYTES:
                    raise MalformedMessage(f"a message of {size} bytes")
                message = decode(await reader.readexactly(size), self._decoder)
                if isinstance(message, Ready):
                    await self._client._loaded(message.model)
                self._take(message)
        except (asyncio.IncompleteReadError, OSError):
            log.warning("the process of %s closed its channel", self._name)
        except MalformedMessage:
            log.exception("malformed message from %s", self._name)
        finally:
            if self._watcher is not None:
                self._watcher.cancel()
            writer.close()
            self._writer = None
            self.status = Status(phase="restart", progress=0.0)
            self.stats = EngineStats()
            self._client._lost(self)

    async def _watch(self) -> None:
        """Tell the client when it has owed something for stall_seconds without a word."""
        await self._work_open.wait()
        while (wait_seconds := self._last_message + self._stall_seconds - time.monotonic()) > 0:
            await asyncio.sleep(wait_seconds)
            await self._work_open.wait()
        log.error("%s has not said a word for %g s while work is open", self._name, self._stall_seconds)
        self._client._stalled(self)

    def _take(self, message: ToApi) -> None:
        self._last_message = time.monotonic()
        match message:
            case Publish(started, deltas, stats):
                for request_id in started:
                    if request_id in self._streams:
                        self._streams[request_id]._mark_started(request_id)
                for delta in deltas:
                    if delta.request_id in self._streams:
                        self._streams[delta.request_id]._deliver(delta)
                if stats is not None:
                    self.stats = stats
                    self._client.on_stats(self.number, stats)
            case Status():
                self.status = message
            case Ready(model):
                self.model = model
                self.status = Status(phase="ready", progress=1.0)
                self._watcher = self._spawn(self._watch())
                self._client._up(self, model)

    def _owe(self, num_sequences: int) -> None:
        if not self.num_owed:
            self._last_message = time.monotonic()
        self.num_owed += num_sequences
        if self.num_owed:
            self._work_open.set()
        else:
            self._work_open.clear()

    def _send(self, message: Submit | Abort) -> None:
        # Without a process there is nothing to tell: a new one starts empty, and unstarted requests are sent again.
        if self._writer is not None:
            self._writer.write(frame(message, self._encoder))
