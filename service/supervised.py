"""One engine as the supervisor sees it: its process, restarts with back-off, and when these are too many."""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import ModuleType

import service.engine.process as engine_process
from service.engine.config import EngineConfig, engine_name

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LONGEST_BACK_OFF_SECONDS = 30.0


class SupervisedEngine:
    """Engine `number` over all the processes that it is; belongs to the event loop's thread."""

    def __init__(
        self,
        number: int,
        *,
        name: str,
        config: Callable[[int], EngineConfig],
        max_restarts: int,
        restart_window_seconds: float,
        on_start: Callable[[int, socket.socket], None],
        on_end: Callable[["SupervisedEngine", int | None], None],
    ) -> None:
        """`name` is what the log calls it. `config` is asked at each start, of whose channel `on_start` gets the API's
        end. `on_end` hears of each end with its exit code, and says what follows. Without one it never started."""
        self.number = number
        self.name = name
        self.process: BaseProcess | None = None
        self.given_up = False
        self._config = config
        self._max_restarts = max_restarts
        self._restart_window_seconds = restart_window_seconds
        self._on_start = on_start
        self._on_end = on_end
        self._restarts: deque[float] = deque()

    def start(self) -> None:
        try:
            self.process, ours = start_engine(self._config(self.number))
        except OSError as error:
            log.error("%s cannot be started: %s", self.name, error)
            self._on_end(self, None)
            return
        asyncio.get_running_loop().add_reader(self.process.sentinel, self._ended)
        with ours:
            try:
                self._on_start(self.number, ours)
            except OSError as error:  # nobody has the channel: as it is closed here, the process ends, and is heard of
                log.error("the channel of %s cannot be passed on: %s", self.name, error)

    def kill(self) -> None:
        """It has stalled."""
        if self.process is not None:
            log.error("%s has stalled; killing it", self.name)
            self.process.kill()

    def next_delay(self, code: int | None) -> float | None:
        """Seconds until it is to be started again after an end with this exit code; None where it is given up."""
        now = time.monotonic()
        self._restarts.append(now)
        while now - self._restarts[0] > self._restart_window_seconds:
            self._restarts.popleft()
        num_ends = len(self._restarts)
        if num_ends > self._max_restarts:
            log.critical("%s ended %d times (exit code %s); giving up", self.name, num_ends, code)
            self.given_up = True
            return None
        delay = 0.0 if num_ends == 1 else min(2.0 ** (num_ends - 2), _LONGEST_BACK_OFF_SECONDS)
        log.error("%s ended (exit code %s); restarting it in %g s", self.name, code, delay)
        return delay

    def _ended(self) -> None:
        assert self.process is not None
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        code = exit_code(self.process)
        self.process = None
        self._on_end(self, code)


def start_engine(config: EngineConfig) -> tuple[BaseProcess, socket.socket]:
    """A new engine process, and the API's end of its channel. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.ExitStack() as on_error:
        on_error.enter_context(ours)
        # No daemon: those may not have children, as its ranks are.
        process = multiprocessing.get_context("spawn").Process(
            target=engine_process.main,
            args=(config, theirs),
            name=engine_name(config.engine_number, of=config.data_parallel_size),
        )
        start_process(process)
        on_error.pop_all()
    return process, ours


def start_process(process: BaseProcess) -> None:
    """Start a child that Ctrl-C, sent to the whole group, does not reach while it is not yet ignoring signals.

    It does not import what this program began with, as spawned processes do: its target is all that it needs.
    """
    resource_tracker.ensure_running()  # starting it would unblock them
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")  # without a file or a name to import
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def exit_code(process: BaseProcess) -> int | None:
    """Of a process that has ended."""
    process.join()
    return process.exitcode
