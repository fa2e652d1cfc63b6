"""The engines as the API process sees them: submit requests, stream their deltas, abort by leaving.

Errors:
    EngineUnavailable          the request was not taken; try again later
    ├── EngineNotReady         every engine is loading, or being restarted
    ├── EngineDraining         the service is shutting down
    └── EngineFailed           the supervisor has given up on every engine
    Overloaded                 the service has no time for it; `retry_after_seconds` says when to try again
    ├── QueueFull              there is no room in the queue, or it was given to others
    └── QueueTimeout           a request of the group did not start in time
    DeadlineExceeded           the group did not finish in time
A sequence that fails after it was taken ends with a Delta whose finish is ERROR.
"""

import asyncio
import functools
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from service.engine.backlog import Backlog, Overloaded, QueueFull, QueueLimits, QueueTimeout
from service.engine.config import engine_name
from service.engine.handle import EngineHandle
from service.engine.request import EngineStats, Finish, ModelInfo, Request, SamplingParams, Status, Submit
from service.engine.routing import Router
from service.engine.stream import DeadlineExceeded, Stream

__all__ = [
    "DeadlineExceeded",
    "EngineClient",
    "EngineDraining",
    "EngineFailed",
    "EngineHandle",
    "EngineNotReady",
    "EngineUnavailable",
    "Overloaded",
    "QueueFull",
    "QueueTimeout",
    "Stream",
]

# An engine's phases, the furthest from taking requests first.
_PHASES = {
    phase: rank
    for rank, phase in enumerate(("failed", "restart", "start", "download", "convert", "load", "warmup", "ready"))
}
# How many more sequences than the least loaded an engine that has all of a prompt may owe: a share of max_num_seqs.
_PREFIX_MARGIN = 1 / 8


class EngineUnavailable(Exception):
    """No engine takes requests now."""


class EngineNotReady(EngineUnavailable):
    """Every engine is loading, or being restarted."""


class EngineDraining(EngineUnavailable):
    """The service is shutting down."""


class EngineFailed(EngineUnavailable):
    """The supervisor has given up on every engine."""


class EngineClient:
    """The engines' one face in the API process. All methods belong to the event loop's thread."""

    def __init__(
        self,
        *,
        api_number: int,
        stall_seconds: float,
        num_engines: int = 1,
        queue: QueueLimits = QueueLimits(),  # noqa: B008 - frozen
        request_timeout_seconds: float | None = None,
        on_stall: Callable[[int], None],
        on_up: Callable[[int, ModelInfo], None] = lambda *_: None,
    ) -> None:
        """`on_stall` hears of an engine that has stalled, `on_up` of each that requests are taken for from now on.

        No group has longer than `request_timeout_seconds`.
        """
        self._queue = queue
        self._request_timeout_seconds = request_timeout_seconds
        self.backlog = Backlog(queue)
        self._next_id = api_number << 48
        self._on_stall = on_stall
        self._on_up = on_up
        self.engines = tuple(
            EngineHandle(
                self,
                number,
                name=engine_name(number, of=num_engines),
                stall_seconds=stall_seconds,
            )
            for number in range(num_engines)
        )
        self._router = Router()
        self._streams: dict[Stream, None] = {}  # those whose answer is not whole
        self._idle = asyncio.Event()
        self._idle.set()
        self._loading = asyncio.Lock()
        self._draining = False
        self._failed: str | None = None  # why
        self.on_stats: Callable[[int, EngineStats], None] = lambda *_: None  # an engine's number, and what it said
        self.on_ready: Callable[[ModelInfo], Awaitable[None]] | None = None  # awaited before requests are taken
        self.num_cut = 0  # requests that `abandon` has ended

    # What the routes ask

    @property
    def phase(self) -> str:
        """failed, drain, or that of the engine that is nearest to ready: start, download, convert, load, warmup, ready
        or restart."""
        return self.phase_of(self._nearest)

    def phase_of(self, engine: EngineHandle) -> str:
        """The engine's own, while the service neither drains nor has failed."""
        if self._failed:
            return "failed"
        return "drain" if self._draining else engine.phase

    @property
    def status(self) -> Status:
        """Of the same engine."""
        return self._nearest.status

    @property
    def ready(self) -> bool:
        return self.phase == "ready"

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def model(self) -> ModelInfo | None:
        """What the lowest-numbered engine that has loaded one has loaded last; kept over a restart."""
        return next((engine.model for engine in self.engines if engine.model is not None), None)

    @property
    def stats(self) -> EngineStats:
        """Of all engines together."""
        return functools.reduce(EngineStats.__add__, (engine.stats for engine in self.engines))

    @property
    def num_open(self) -> int:
        """Requests that were taken and whose answer is not whole."""
        return len(self._streams)

    def new_request_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def check_ready(self) -> ModelInfo:
        """The model, if requests are taken now. Raises EngineUnavailable."""
        if self._failed:
            raise EngineFailed(self._failed)
        if self._draining:
            raise EngineDraining("the service is shutting down")
        for engine in self.engines:
            if engine.ready and engine.model is not None:
                return engine.model
        raise EngineNotReady(f"the model is not ready yet (phase: {self.phase})")

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
        """Hand `requests` to the engines as one group, drawn by `params`. Raises EngineUnavailable and QueueFull.

        `completing_ids`, `patient` and `client` are Submit's. All must have finished after `timeout_seconds`, and have
        started after `queue_timeout_seconds`, where the service's own limits are not less. The one is counted from
        `arrived_at`, in monotonic seconds, the other from now; None is now too.
        """
        self.check_ready()
        if all(engine.clogged for engine in self.engines if engine.ready):
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
        self._streams[stream] = None
        self._idle.clear()
        self._route(stream, submit)
        return stream

    # What the supervisor's words lead to

    def attach(self, sock: socket.socket, number: int = 0) -> None:
        """Speak to a new process of that engine over `sock`; ends by itself when that process closes its end."""
        self.engines[number].attach(sock)

    def drain(self) -> None:
        """Take no more requests."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    def abandon(self, error: str) -> int:
        """The service ends: so does everything open, as ABORT with an error. Returns how many requests that cut."""
        num_cut = sum(bool(stream._open) for stream in self._streams)
        self.num_cut += num_cut
        for stream in list(self._streams):
            stream._abort_all()
            stream._end(Finish.ABORT, error)
        return num_cut

    def give_up(self, number: int) -> None:
        """That engine is not started again. The others go on; where there is none, the service has failed."""
        self.engines[number].given_up = True
        if all(engine.given_up for engine in self.engines):
            self.fail("the engine failed too often and is not being restarted")

    def fail(self, reason: str) -> None:
        """Nothing can be served any more: everything open ends with an error, and liveness is false."""
        self._failed = reason
        for stream in list(self._streams):
            stream._end(Finish.ERROR, reason)

    async def close(self) -> None:
        """Close the channels, which ends the engine processes."""
        await asyncio.gather(*(engine.close() for engine in self.engines))

    # What the engines and streams tell

    async def _loaded(self, model: ModelInfo) -> None:
        if self.on_ready is not None:
            async with self._loading:  # one after the other: they have the same model
                await self.on_ready(model)

    def _up(self, engine: EngineHandle, model: ModelInfo) -> None:
        if self._failed is None:
            self._on_up(engine.number, model)
        self._move_unstarted(engine)  # of its process before; first, since what others had may come to it now
        for other in self.engines:
            if not other.ready:
                self._move_unstarted(other)

    def _lost(self, engine: EngineHandle) -> None:
        self._router.forget(engine.number)
        for stream in engine.streams:
            stream._engine_lost(engine, "the engine stopped while it worked on this request")
        self._move_unstarted(engine)

    def _stalled(self, engine: EngineHandle) -> None:
        self._on_stall(engine.number)

    def _forget(self, stream: Stream) -> None:
        self.backlog.remove(stream._entry)
        for request_id, engine in stream._engines.items():
            engine.forget(request_id)
        self._streams.pop(stream, None)
        if not self._streams:
            self._idle.set()

    # Inside

    @property
    def _nearest(self) -> EngineHandle:
        """The engine that is, or will be, the first to be ready."""
        return max(self.engines, key=lambda engine: (_PHASES.get(engine.phase, 0), engine.status.progress))

    def _move_unstarted(self, engine: EngineHandle) -> None:
        """Ask those that are ready for what a lost process had not begun. If none is, it waits for the first."""
        if not any(each.ready for each in self.engines):
            return
        for stream in engine.streams:
            if requests := stream._take_unstarted(engine):
                for request in requests:
                    engine.forget(request.id, num_open=stream._num_open(request))
                self._route(stream, msgspec.structs.replace(stream._submit, requests=requests))

    def _route(self, stream: Stream, submit: Submit) -> None:
        """Hand each request to an engine that is ready, with a message for each engine that gets some."""
        if len(self.engines) == 1:
            self.engines[0].hand_over(stream, submit)
            return
        ready = [engine for engine in self.engines if engine.ready]
        engines = [engine for engine in ready if not engine.clogged] or ready
        loads = {engine.number: engine.num_owed for engine in engines}
        model = engines[0].model
        assert model is not None, "it is ready"
        parts: dict[int, list[Request]] = {}
        for request in submit.requests:
            number = self._router.choose(
                request, loads, block_size=model.block_size, margin=_PREFIX_MARGIN * model.max_num_seqs
            )
            loads[number] += request.n
            parts.setdefault(number, []).append(request)
        for number, part in parts.items():
            self.engines[number].hand_over(stream, msgspec.structs.replace(submit, requests=tuple(part)))


def _deadline(arrived_at: float, *seconds: float | None) -> float | None:
    """The moment at which the shortest of these times is over; None is never."""
    return min((arrived_at + each for each in seconds if each is not None), default=None)
