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


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("fault", ["_say_nothing", "_read_nothing", "_reset_connections", "_talk_nonsense"])
async def test_a_fault_that_is_broken_off_leaves_no_connection(
    fault: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load may end while a connection is made or held; what stays open would be counted as the service's."""
    made: list[socket.socket] = []
    enough = asyncio.Event()

    class Recorded(socket.socket):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)
            if len(made) == number:
                enough.set()

    with socket.create_server(("127.0.0.1", 0), backlog=200) as server:
        service = SimpleNamespace(url=f"http://127.0.0.1:{server.getsockname()[1]}")
        chaos = Chaos(cast(Any, service), cast(Any, None), random.Random(0))
        monkeypatch.setattr("bench.chaos.socket.socket", Recorded)
        under_way = asyncio.create_task(getattr(chaos, fault)())
        await enough.wait()
        under_way.cancel()
        await asyncio.wait([under_way])
    assert under_way.cancelled()
    assert [connection.fileno() for connection in made] == [-1] * len(made)


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
