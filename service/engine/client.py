"""The engine as the API process sees it: submit requests, stream their deltas, abort by leaving.

Errors:
    EngineUnavailable          the request was not taken; try again later
    ├── EngineNotReady         loading, or being restarted
    ├── EngineDraining         the service is shutting down
    └── EngineFailed           the supervisor has given up on the engine
    Overloaded                 the service has no time for it; `retry_after_seconds` says when to try again
    ├── QueueFull              there is no room in the queue, or it was given to others
    └── QueueTimeout           a request of the group did not start in time
    DeadlineExceeded           the group did not finish in time
A sequence that fails after it was taken ends with a Delta whose finish is ERROR.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence

import msgspec

from service.engine.backlog import Backlog, Overloaded, QueueFull, QueueLimits, QueueTimeout
from service.engine.channel import HEADER_BYTES, MAX_MESSAGE_BYTES, MalformedMessage, decode, frame
from service.engine.request import (
    Abort,
    EngineStats,
    Finish,
    ModelInfo,
    Publish,
    Ready,
    Request,
    SamplingParams,
    Status,
    Submit,
    ToApi,
)
from service.engine.stream import DeadlineExceeded, Stream

__all__ = [
    "DeadlineExceeded",
    "EngineClient",
    "EngineDraining",
    "EngineFailed",
    "EngineNotReady",
    "EngineUnavailable",
    "Overloaded",
    "QueueFull",
    "QueueTimeout",
    "Stream",
]

log = logging.getLogger(__name__)


_MAX_UNSENT_BYTES = 64 * 2**20  # of messages to an engine that reads nothing: some twenty of the largest


class EngineUnavailable(Exception):
    """The engine takes no requests now."""


class EngineNotReady(EngineUnavailable):
    """Loading, or being restarted."""


class EngineDraining(EngineUnavailable):
    """The service is shutting down."""


class EngineFailed(EngineUnavailable):
    """The supervisor has given up on the engine."""


class EngineClient:
    """One engine's face in the API process. All methods belong to the event loop's thread."""

    def __init__(
        self,
        *,
        api_number: int,
        stall_seconds: float,
        queue: QueueLimits = QueueLimits(),  # noqa: B008 - frozen
        request_timeout_seconds: float | None = None,
        on_stall: Callable[[], None],
        on_up: Callable[[ModelInfo], None] = lambda _: None,
    ) -> None:
        """`on_stall` hears of an engine that has stalled, `on_up` of each that requests are taken for from now on.

        No group has longer than `request_timeout_seconds`.
        """
        self._queue = queue
        self._request_timeout_seconds = request_timeout_seconds
        self.backlog = Backlog(queue)
        self._next_id = api_number << 48
        self._stall_seconds = stall_seconds
        self._on_stall = on_stall
        self._on_up = on_up
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToApi)
        self._streams: dict[int, Stream] = {}  # request id -> its stream
        self._busy: set[Stream] = set()  # those that the engine still owes something
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None  # the engine attached last
        self._watcher: asyncio.Task[None] | None = None
        self._work_open = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_message = time.monotonic()
        self._draining = False
        self._failed: str | None = None  # why
        self.model: ModelInfo | None = None  # the last engine's; kept over a restart
        self.status = Status(phase="start", progress=0.0)
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] = lambda _: None
        self.on_ready: Callable[[ModelInfo], Awaitable[None]] | None = None  # awaited before requests are taken
        self.num_restarts = 0
        self.num_cut = 0  # requests that `abandon` has ended

    # What the routes ask

    @property
    def phase(self) -> str:
        """start, download, convert, load, warmup, ready, restart, drain or failed."""
        if self._failed:
            return "failed"
        if self._draining:
            return "drain"
        return self.status.phase

    @property
    def ready(self) -> bool:
        return self.phase == "ready"

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def num_open(self) -> int:
        """Requests that were taken and whose answer is not whole."""
        return len(self._unique_streams())

    @property
    def last_message_age_seconds(self) -> float:
        """Seconds since the engine last said anything; 0 while no work is open."""
        return time.monotonic() - self._last_message if self._work_open.is_set() else 0.0

    def new_request_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def check_ready(self) -> ModelInfo:
        """The model, if requests are taken now. Raises EngineUnavailable."""
        if self._failed:
            raise EngineFailed(self._failed)
        if self._draining:
            raise EngineDraining("the service is shutting down")
        if self.status.phase != "ready" or self.model is None:
            raise EngineNotReady(f"the model is not ready yet (phase: {self.status.phase})")
        return self.model

    def check_room(self, client: str) -> None:
        """Raises QueueFull if whatever the client asks for now would be refused."""
        self.backlog.check(client)

    def submit(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        completing_ids: bytes = b"",
        patient: bool = False,
        client: str = "",
        timeout_seconds: float | None = None,
        queue_timeout_seconds: float | None = None,
        arrived_at: float | None = None,
    ) -> Stream:
        """Hand `requests` to the engine as one group, drawn by `params`. Raises EngineUnavailable and QueueFull.

        `completing_ids`, `patient` and `client` are Submit's. All must have finished after `timeout_seconds`, and have
        started after `queue_timeout_seconds`, where the service's own limits are not less. The one is counted from
        `arrived_at`, in monotonic seconds, the other from now; None is now too.
        """
        self.check_ready()
        if self._writer is not None and self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            raise QueueFull("the engine reads nothing now; try again later", retry_after_seconds=5)
        submit = Submit(tuple(requests), params, completing_ids, patient, client)
        arrived_at = time.monotonic() if arrived_at is None else arrived_at
        stream = Stream(
            self,
            submit,
            deadline=_deadline(arrived_at, timeout_seconds, self._request_timeout_seconds),
            queue_deadline=_deadline(time.monotonic(), queue_timeout_seconds, self._queue.timeout_seconds),
        )
        self.backlog.add(stream._entry)
        self._hand_over(stream, submit)
        return stream

    # What the supervisor's words lead to

    def attach(self, sock: socket.socket) -> None:
        """Speak to a new engine process over `sock`; ends by itself when that process closes its end."""
        self.status = Status(phase="start" if self.model is None else "restart", progress=0.0)
        self._serving = self._spawn(self._serve(sock, self._serving))

    def drain(self) -> None:
        """Take no more requests."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    def abandon(self, error: str) -> int:
        """The service ends: so does everything open, as ABORT with an error. Returns how many requests that cut."""
        num_cut = len(self._busy)
        self.num_cut += num_cut
        for stream in self._unique_streams():
            for request in stream._submit.requests:
                self._abort(request.id, None)
            stream._end(Finish.ABORT, error)
        return num_cut

    def fail(self, reason: str = "the engine failed too often and is not being restarted") -> None:
        """Nothing can be served any more: everything open ends with an error, and liveness is false."""
        self._failed = reason
        for stream in self._unique_streams():
            stream._end(Finish.ERROR, reason)

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
            await asyncio.wait([before])  # what the engine before left in its channel may still be on its way
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
                if isinstance(message, Ready) and self.on_ready is not None:
                    await self.on_ready(message.model)
                self._take(message)
        except (asyncio.IncompleteReadError, OSError):
            log.warning("the engine process closed its channel")
        except MalformedMessage:
            log.exception("malformed message from the engine process")
        finally:
            if self._watcher is not None:
                self._watcher.cancel()
            writer.close()
            self._writer = None
            self.status = Status(phase="restart", progress=0.0)
            self.stats = EngineStats()
            for stream in self._unique_streams():
                stream._engine_lost("the engine stopped while it worked on this request")

    async def _watch(self) -> None:
        """Call on_stall when work has been open for stall_seconds without a word from the ready engine."""
        await self._work_open.wait()
        while (wait_seconds := self._last_message + self._stall_seconds - time.monotonic()) > 0:
            await asyncio.sleep(wait_seconds)
            await self._work_open.wait()
        log.error(
            "the engine has not said a word for %g s while work is open",
            self._stall_seconds,
        )
        self._on_stall()

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
                    self.on_stats(stats)
            case Status():
                self.status = message
            case Ready(model):
                self.model = model
                self.status = Status(phase="ready", progress=1.0)
                self._watcher = self._spawn(self._watch())
                if self._failed is None:
                    self._on_up(model)
                for stream in self._unique_streams():
                    if (again := stream._take_unstarted()) is not None:
                        self._send(again)

    def _hand_over(self, stream: Stream, submit: Submit) -> None:
        for request in submit.requests:
            self._streams[request.id] = stream
        if not self._busy:
            self._last_message = time.monotonic()
        self._busy.add(stream)
        self._work_open.set()
        self._idle.clear()
        self._send(submit)

    def _go_on(self, stream: Stream, before: Sequence[Request]) -> None:
        """Hand over a stream's requests that follow those `before`. It is open all the while, so nothing is idle."""
        self._hand_over(stream, stream._submit)
        for request in before:
            del self._streams[request.id]

    def _unique_streams(self) -> list[Stream]:
        return list(dict.fromkeys(self._streams.values()))

    def _abort(self, request_id: int, choice: int | None) -> None:
        self._send(Abort(request_id, choice))

    def _forget(self, stream: Stream) -> None:
        self._settled(stream)
        self.backlog.remove(stream._entry)
        for request in stream._submit.requests:
            self._streams.pop(request.id, None)
        if not self._streams:
            self._idle.set()

    def _settled(self, stream: Stream) -> None:
        """The engine owes it nothing more; a reader may still take its time."""
        self._busy.discard(stream)
        if not self._busy:
            self._work_open.clear()

    def _send(self, message: Submit | Abort) -> None:
        # Without an engine there is nothing to tell: a new one starts empty, and unstarted requests are sent again.
        if self._writer is not None:
            self._writer.write(frame(message, self._encoder))


def _deadline(arrived_at: float, *seconds: float | None) -> float | None:
    """The moment at which the shortest of these times is over; None is never."""
    return min((arrived_at + each for each in seconds if each is not None), default=None)
