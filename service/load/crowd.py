"""The client processes, as command.py sees them: spawned once, given one level after another."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Self, cast

from service.load import worker
from service.load.plan import Level, Plan
from service.load.worker import Tally, Task

_START_SECONDS = 0.1  # for every process to hear of a level
_WAIT_SECONDS = 0.25  # after which whoever shows progress is told


class CrowdError(Exception):
    """A client process has ended by itself."""


class Crowd:
    """A context manager; its processes end with it."""

    def __init__(self, plan: Plan) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._count = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(plan.processes):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=worker.main, args=(plan, number, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        """Returns when every process is ready. Raises CrowdError."""
        try:
            with _told():
                for pipe in self._pipes:
                    pipe.recv()  # READY
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()

    def measure(self, level: Level, *, on_wait: Callable[[float], object] = lambda _: None) -> tuple[list[Tally], bool]:
        """What each process measured, and whether Ctrl-C cut it short. Raises CrowdError.

        `on_wait` hears now and then for how many seconds it has gone on.
        """
        self._count += 1
        task = Task(level, self._count, time.monotonic() + _START_SECONDS)
        with _told():
            for pipe in self._pipes:
                pipe.send(task)
            tallies: dict[Connection, Tally] = {}
            interrupted = False
            while awaited := [pipe for pipe in self._pipes if pipe not in tallies]:
                try:  # all are heard, so one that ends is heard of before the others have measured
                    for pipe in cast(list[Connection], wait(awaited, _WAIT_SECONDS)):
                        tallies[pipe] = pipe.recv()
                    on_wait(time.monotonic() - task.begin_at)
                except KeyboardInterrupt:
                    interrupted = True
                    for pipe in awaited:
                        pipe.send(worker.STOP)
            return list(tallies.values()), interrupted


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A pipe whose other end is gone is a client process that is."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise CrowdError("a client process has ended by itself") from error
