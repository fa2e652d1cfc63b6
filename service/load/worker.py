"""A client process: its share of the clients or of the arrivals of one level after another. Spawned by crowd.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import resource
import signal
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe

from service.load.connection import Answer, Connection
from service.load.plan import Level, Plan, share

READY, STOP = "ready", "stop"
_REFUSALS = frozenset({"429", "503"})  # statuses
_PAUSE_SECONDS = 0.1  # of a client whose request failed: a server that refuses all must not be asked in a circle


@dataclass(frozen=True, slots=True)
class Task:
    """A level, the moment that its warm-up begins (monotonic seconds), and its number, which seeds its arrivals."""

    level: Level
    number: int
    begin_at: float


@dataclass(slots=True)
class Tally:
    """What one process measured of one level. Requests are parallel arrays, without those that failed."""

    measured_from: float = math.inf  # monotonic seconds
    measured_to: float = 0.0
    begun_at: array[float] = field(default_factory=lambda: array("d"))
    ended_at: array[float] = field(default_factory=lambda: array("d"))
    first_at: array[float] = field(default_factory=lambda: array("d"))  # first event; the end, without stream
    last_at: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("q"))
    completion_tokens: array[int] = field(default_factory=lambda: array("q"))
    num_events: array[int] = field(default_factory=lambda: array("q"))
    gaps: array[float] = field(default_factory=lambda: array("d"))  # seconds between events, as latencies are counted
    errors: Counter[str] = field(default_factory=Counter)
    refused: array[float] = field(default_factory=lambda: array("d"))  # seconds until a 429 or 503
    processor_seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        if answer.error is not None:
            self.errors[answer.error] += 1
            if answer.error in _REFUSALS:
                self.refused.append(answer.ended_at - answer.begun_at)
            return
        times = answer.event_times or [answer.ended_at]
        self.begun_at.append(answer.begun_at)
        self.ended_at.append(answer.ended_at)
        self.first_at.append(times[0])
        self.last_at.append(times[-1])
        self.prompt_tokens.append(answer.prompt_tokens)
        self.completion_tokens.append(answer.completion_tokens)
        self.num_events.append(len(answer.event_times))
        if answer.begun_at >= self.measured_from:
            self.gaps.extend(later - earlier for earlier, later in itertools.pairwise(times))


class _Run:
    """One level in this process, from its warm-up to its last answer."""

    def __init__(self, plan: Plan, task: Task, number: int, bodies: Iterator[bytes]) -> None:
        self._plan = plan
        self._level = task.level
        self._number = number
        self._bodies = bodies
        self._begin_at = task.begin_at
        self._measure_at = task.begin_at + plan.warmup_seconds
        self._end_at = math.inf if plan.seconds is None else self._measure_at + plan.seconds
        self._quota = math.inf
        if plan.requests is not None:
            processes = plan.processes
            if self._level.loop == "closed":
                processes = min(processes, int(self._level.load))  # those that have a client
            self._quota = share(plan.requests, number, processes) if number < processes else 0
        self._arrivals = random.Random(f"{plan.seed} {number} {task.number}")  # noqa: S311 - no secret
        self._stopped = asyncio.Event()
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._processor_seconds = _processor_seconds()
        self.tally = Tally(measured_from=self._measure_at)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(self._measure_at - time.monotonic(), self._start_clock)
        if self._end_at < math.inf:
            loop.call_later(self._end_at - time.monotonic(), self._stop_clock)
        await self._sleep_until(self._begin_at)
        if self._level.loop == "closed":
            count = share(int(self._level.load), self._number, self._plan.processes)
            await asyncio.gather(*(self._client() for _ in range(count)))
        else:
            await self._arrive()
        self._stop_clock()
        for connection in self._idle:
            connection.abort()

    def stop(self) -> None:
        """End now: nothing more is begun or measured, and what is open is not counted."""
        self._stop_clock()
        self._stopped.set()
        for connection in list(self._open):
            connection.abort("stopped")

    def _start_clock(self) -> None:
        self._processor_seconds = _processor_seconds()

    def _stop_clock(self) -> None:
        if not self.tally.measured_to:
            self.tally.measured_to = time.monotonic()
            if self.tally.measured_to > self._measure_at:
                self.tally.processor_seconds = _processor_seconds() - self._processor_seconds

    def _takes_another(self, now: float) -> bool:
        """Whether a request is to begin `now`; one that will be measured is taken off the quota."""
        if now >= self._end_at or self._quota <= 0 or self._stopped.is_set():
            return False
        if now >= self._measure_at:
            self._quota -= 1
        return True

    async def _client(self) -> None:
        """Closed loop: ask, read the whole answer, ask again."""
        while self._takes_another(begun_at := time.monotonic()):
            answer = await self._ask(begun_at)
            if answer.error is not None:
                await self._sleep_until(time.monotonic() + _PAUSE_SECONDS)

    async def _arrive(self) -> None:
        """Open loop: requests begin at their moments, whatever became of those before."""
        rate = self._level.load / self._plan.processes
        asking: set[asyncio.Task[Answer]] = set()
        moment = self._begin_at
        while True:
            moment += self._arrivals.expovariate(rate)
            if not self._takes_another(moment):
                break
            await self._sleep_until(moment)
            if self._stopped.is_set():
                break
            task = asyncio.ensure_future(self._ask(moment))
            asking.add(task)
            task.add_done_callback(asking.discard)
        if asking:
            await asyncio.wait(asking)

    async def _sleep_until(self, moment: float) -> None:
        """Until `moment`, or until all is stopped."""
        while (seconds := moment - time.monotonic()) > 0 and not self._stopped.is_set():  # timers may be early
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), seconds)

    async def _ask(self, begun_at: float) -> Answer:
        """One request. It counts from `begun_at`, which in an open loop is when it should have begun."""
        plan = self._plan
        request = plan.server.request("/v1/completions", next(self._bodies))
        connection = None
        while self._idle and connection is None:
            connection = self._idle.pop()
            if connection.closed:
                connection = None
        try:
            if connection is None:
                async with asyncio.timeout(plan.timeout_seconds):
                    connection = await Connection.open(plan.server)
            self._open.add(connection)
            answer = await connection.ask(
                request, stream=plan.stream, begun_at=begun_at, timeout_seconds=plan.timeout_seconds
            )
            self._open.discard(connection)
            if not connection.closed:
                self._idle.append(connection)
        except OSError as error:  # TimeoutError is one
            answer = Answer(begun_at, time.monotonic(), [], error=f"connection: {_reason(error)}")
        begun, ended = answer.begun_at, answer.ended_at
        measured = begun >= self._measure_at if plan.requests is not None else ended >= self._measure_at
        if measured and answer.error != "stopped":
            self.tally.add(answer)
        return answer


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).split(":")[0]


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(plan: Plan, number: int, pipe: Pipe) -> None:
    """The process: tasks come through the pipe, a tally of each goes back. STOP ends a task, a closed pipe all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and says STOP
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner, contextlib.suppress(ConnectionError):
        runner.run(_work(plan, number, pipe))  # its pipe is broken: the parent has gone, or given up


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # where there is none
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _work(plan: Plan, number: int, pipe: Pipe) -> None:
    bodies = plan.bodies(number)
    heard: asyncio.Queue[Task | None] = asyncio.Queue()
    running: _Run | None = None

    def hear() -> None:
        try:
            word = pipe.recv()
        except (EOFError, ConnectionError):  # a reset, where the parent has closed it without reading
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            word = None
        if isinstance(word, Task):
            heard.put_nowait(word)
        else:
            if running is not None:
                running.stop()
            if word is None:
                heard.put_nowait(None)

    asyncio.get_running_loop().add_reader(pipe.fileno(), hear)
    os.set_blocking(pipe.fileno(), True)  # uvloop has changed it; a tally is long
    pipe.send(READY)
    while (task := await heard.get()) is not None:
        running = _Run(plan, task, number, bodies)
        await running.run()
        tally, running = running.tally, None
        pipe.send(tally)
