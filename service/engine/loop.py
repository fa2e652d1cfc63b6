"""What the engine process does once it has a model: receive, schedule, launch, collect, publish. Run by process.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.engine.channel import Channel, ChannelClosed
from service.engine.compiler import Compile, GrammarCompiler
from service.engine.core import Core
from service.engine.request import Abort, Delta, EngineStats, Publish, Submit
from service.engine.scheduler import Scheduler
from service.model.batch import Runner

if TYPE_CHECKING:
    from service.engine.grammar import Constraint

_STATS_SECONDS = 0.25  # while work is open, the API hears from the engine at least this often, or once a step
_PUBLISH_SECONDS_A_STREAM = 60e-6  # an event costs the API about half as much, on a slow host
_PUBLISH_AT_ONCE = 4  # streams, up to which every token goes out as it comes


class Publisher:
    """What the API is to hear, and when: starts, first tokens, urgent ones and ends at once, the rest by interval."""

    def __init__(self, channel: Channel, *, max_interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_interval`: seconds that tokens are held at most."""
        self._channel = channel
        self._max_interval = max_interval
        self._clock = clock  # seconds
        self._published_at = 0.0
        self._stats_at = 0.0
        self._step_seconds: list[float] = []
        self._batch_sizes: list[int] = []

    def started(self, request_ids: tuple[int, ...]) -> None:
        """These requests left the queue: told before their step is launched, which the engine might not survive."""
        self._channel.send(Publish(started=request_ids))

    def step(self, seconds: float, batch_size: int) -> None:
        self._step_seconds.append(seconds)
        self._batch_sizes.append(batch_size)

    def ended(self, deltas: list[Delta]) -> None:
        """Send how sequences ended outside of a step."""
        if deltas:
            self._channel.send(Publish(deltas=tuple(deltas)))

    def due(self, scheduler: Scheduler, deltas: list[Delta], *, idle: bool) -> None:
        """Send a step's `deltas`, with held tokens and stats whose time has come; all before the engine goes idle."""
        now = self._clock()
        num_streams = scheduler.num_streams
        interval = 0.0 if num_streams <= _PUBLISH_AT_ONCE else _PUBLISH_SECONDS_A_STREAM * num_streams
        if idle or now - self._published_at >= min(interval, self._max_interval):
            deltas = deltas + scheduler.take_held()
            self._published_at = now
        send_stats = idle or now - self._stats_at >= _STATS_SECONDS
        if not deltas and not send_stats:
            return
        stats: EngineStats | None = None
        if send_stats:
            stats = scheduler.stats(step_seconds=tuple(self._step_seconds), batch_sizes=tuple(self._batch_sizes))
            self._step_seconds.clear()
            self._batch_sizes.clear()
            self._stats_at = now
        self._channel.send(Publish(deltas=tuple(deltas), stats=stats))


class Loop:
    """Steps the engine for as long as the channel is open."""

    def __init__(
        self,
        channel: Channel,
        scheduler: Scheduler,
        runner: Runner,
        compile_grammar: Compile,
        *,
        max_event_interval: float,
    ) -> None:
        """`max_event_interval` is the Publisher's, in seconds."""
        self._channel = channel
        self._scheduler = scheduler
        self._core = Core(scheduler, runner)
        self._publisher = Publisher(channel, max_interval=max_event_interval)
        self._compiler = GrammarCompiler(compile_grammar, scheduler.is_open)

    def run(self) -> None:
        """Return when the channel closes. Raises DeviceLost, after which the process must end."""
        stepped_at = time.perf_counter()
        try:
            while True:
                if self._core.idle:
                    self._publisher.due(self._scheduler, [], idle=True)
                    self._channel.wait(self._compiler.wake)
                    stepped_at = time.perf_counter()
                for message in self._channel.receive():
                    self._take(message)
                for request_ids, compiled in self._compiler.take():
                    self._supply(request_ids, compiled)
                num_steps, num_sampled = self._scheduler.num_steps, self._scheduler.num_sampled
                deltas = self._core.step(self._publisher.started)
                if self._scheduler.num_steps > num_steps:
                    now = time.perf_counter()
                    self._publisher.step(now - stepped_at, self._scheduler.num_sampled - num_sampled)
                    stepped_at = now
                self._publisher.due(self._scheduler, deltas, idle=False)
        except ChannelClosed:
            return
        finally:
            self._compiler.close()

    def _take(self, message: object) -> None:
        match message:
            case Submit(requests, params, completing_ids, patient, client):
                for request in requests:
                    self._scheduler.add(request, params, completing_ids=completing_ids, patient=patient, client=client)
                if params.grammar is not None:
                    self._compiler.submit(tuple(request.id for request in requests), params.grammar)
            case Abort(request_id, choice):
                self._publisher.ended(self._scheduler.abort(request_id, choice))

    def _supply(self, request_ids: tuple[int, ...], compiled: Constraint | BaseException) -> None:
        for request_id in request_ids:
            try:
                if isinstance(compiled, BaseException):
                    raise compiled
                self._scheduler.supply(request_id, compiled)
            except Exception as error:  # of the grammar's library, which also makes a copy for each sequence
                message = f"the grammar could not be compiled: {error}"
                self._publisher.ended(self._scheduler.refuse(request_id, message))
