"""When an engine is started again, and when no more."""

import asyncio
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.serve import engine_config
from service.settings import load
from service.supervised import SupervisedEngine


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def supervised(*, max_restarts: int) -> SupervisedEngine:
    def never(*_: object) -> None:
        raise AssertionError

    return SupervisedEngine(
        0,
        name="the engine",
        config=never,  # type: ignore[arg-type]
        max_restarts=max_restarts,
        restart_window_seconds=100,
        on_start=never,
        on_end=never,
    )


def test_back_off(clock: Clock) -> None:
    """At once, then after 1, 2, 4 … 30 seconds; then it is given up."""
    engine = supervised(max_restarts=8)
    delays = [engine.next_delay(1) for _ in range(9)]
    assert [0, 1, 2, 4, 8, 16, 30, 30, None] == delays
    assert engine.given_up


def test_what_was_long_ago_is_forgiven(clock: Clock) -> None:
    """Ends count for as long as the window is."""
    engine = supervised(max_restarts=1)
    for _ in range(5):
        assert 0 == engine.next_delay(1)
        clock.now += 101
    assert not engine.given_up
    assert [0, None] == [engine.next_delay(1), engine.next_delay(1)]


class Ends:
    """An engine of the demo model whose channel goes to a process that is gone, and the ends that are heard of."""

    def __init__(self) -> None:
        self.codes: asyncio.Queue[int | None] = asyncio.Queue()
        self.num_started = 0
        settings = load({"device": "cpu", "kv_memory": "12MiB"})
        self.engine = SupervisedEngine(
            0,
            name="the engine",
            config=lambda number: engine_config(settings, number=number, json_lines=False),
            max_restarts=1,
            restart_window_seconds=100,
            on_start=self.pass_on,
            on_end=lambda _, code: self.codes.put_nowait(code),
        )

    def pass_on(self, _number: int, channel: socket.socket) -> None:
        self.num_started += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        theirs.close()
        with ours:
            socket.send_fds(ours, [b"engine"], [channel.fileno()])


async def test_a_process_that_cannot_be_started_is_an_end(caplog: pytest.LogCaptureFixture) -> None:
    """As no descriptor is left, say: there is a next time, until it is given up."""
    ends = Ends()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        ends.engine.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ends.codes.get_nowait() is None
    assert (0, None) == (ends.num_started, ends.engine.process)
    assert "the engine cannot be started: [Errno 24] Too many open files" in caplog.messages


async def test_a_process_whose_channel_is_not_passed_on_ends(caplog: pytest.LogCaptureFixture) -> None:
    """By itself, as any whose channel closes; that is heard of."""
    ends = Ends()
    ends.engine.start()
    process = ends.engine.process
    assert process is not None
    await asyncio.wait_for(ends.codes.get(), 60)
    assert (1, None, False) == (ends.num_started, ends.engine.process, process.is_alive())
    assert any(message.startswith("the channel of the engine cannot be passed on: ") for message in caplog.messages)


def test_a_child_does_not_begin_as_the_program_did(tmp_path: Path) -> None:
    """A spawned process imports the main module first; that of a command brings what only the command needs."""
    script = tmp_path / "program.py"
    script.write_text(
        "import multiprocessing\n"
        "print('program', __name__, flush=True)\n"
        "from service.supervised import start_process\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=print, args=('child',))\n"
        "    start_process(process)\n"
        "    process.join()\n"
        "    import __main__\n"
        "    print(__main__.__file__ == __file__, process.exitcode)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert ["program __main__", "child", "True 0"] == done.stdout.splitlines(), done.stderr
