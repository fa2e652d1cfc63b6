"""What faults excuse: only what was open while the engine was away, and only an end that says so."""

import asyncio
import random
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.chaos import Chaos, Outage
from bench.mixture import Answer


@pytest.mark.parametrize(
    ("begin", "end", "excused"),
    [(0, 9, False), (0, 10, True), (11, 12, True), (0, 100, True), (20, 21, True), (20.1, 29, False), (31, 99, True)],
)
def test_an_outage_excuses_what_was_open_within_it(begin: float, end: float, excused: bool) -> None:
    """One that is not over yet excuses all that is open since."""
    chaos = Chaos(cast(Any, None), cast(Any, None), random.Random(0), outages=[Outage(10, 20), Outage(30)])
    assert excused == chaos.may_cut(begin, end)


@pytest.mark.parametrize("fault", ["_say_nothing", "_read_nothing", "_reset_connections", "_talk_nonsense"])
async def test_a_fault_that_is_broken_off_leaves_no_connection(fault: str) -> None:
    """The load may end while one is under way; what it has open would be counted as the service's."""
    connections: list[socket.socket] = []
    connected = asyncio.Event()

    class Recorded(Chaos):
        async def _connect(self, *, receive_bytes: int | None = None) -> socket.socket:
            connections.append(await super()._connect(receive_bytes=receive_bytes))
            connected.set()
            return connections[-1]

    with socket.create_server(("127.0.0.1", 0), backlog=200) as server:
        service = SimpleNamespace(url=f"http://127.0.0.1:{server.getsockname()[1]}")
        chaos = Recorded(cast(Any, service), cast(Any, None), random.Random(0))
        under_way = asyncio.create_task(getattr(chaos, fault)())
        await connected.wait()
        under_way.cancel()
        await asyncio.wait([under_way])
    assert under_way.cancelled()
    assert [connection.fileno() for connection in connections] == [-1] * len(connections)


@pytest.mark.parametrize(
    ("answer", "was_cut"),
    [
        (Answer(200), False),
        (Answer(200, error="{}"), True),
        (Answer(200, error="{}", done=False), False),
        (Answer(200, done=False), False),
        (Answer(503, error="{}"), True),
        (Answer(500, error="{}"), True),
        (Answer(500), False),
        (Answer(429, error="{}"), False),
    ],
)
def test_a_cut_answer_says_so(answer: Answer, was_cut: bool) -> None:
    """A stream that breaks off without an error event and [DONE] has no excuse."""
    assert was_cut == answer.was_cut
