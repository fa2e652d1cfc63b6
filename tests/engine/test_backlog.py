"""What waits, by itself and as the client counts it: bounds, who gives way, and the time that it is told to wait."""

import threading
from contextlib import closing
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.backlog import Backlog, Entry, QueueFull, QueueLimits
from service.engine.client import EngineClient, QueueTimeout
from service.engine.request import Finish
from tests.engine.attached import LONG, PARAMS, Attach, collect, request, until


@dataclass
class Queue:
    """A backlog of 10 requests and 1,000 tokens, with a clock that is told the time."""

    now: float = 0.0
    refused: list[Entry] = field(default_factory=list)
    backlog: Backlog = field(init=False)

    def __post_init__(self) -> None:
        self.backlog = Backlog(QueueLimits(max_requests=10, max_tokens=1000), clock=lambda: self.now)

    def add(self, client: str = "", num_requests: int = 1, num_tokens: int = 10, priority: int = 0) -> Entry:
        def refuse(error: QueueFull) -> None:
            assert 1 <= error.retry_after_seconds <= 60
            self.refused.append(entry)

        entry = Entry(client, priority, num_requests, num_tokens, refuse)
        self.backlog.add(entry)
        return entry

    def is_full(self, client: str = "", num_requests: int = 1, num_tokens: int = 10, priority: int = 0) -> bool:
        try:
            self.backlog.remove(self.add(client, num_requests, num_tokens, priority))
        except QueueFull:
            return True
        return False


@pytest.mark.parametrize(("num_requests", "num_tokens"), [(1, 1), (2, 20), (1, 100), (3, 400)])
def test_both_bounds_hold(num_requests: int, num_tokens: int) -> None:
    """Requests and tokens, whichever comes first; what leaves makes room."""
    queue = Queue()
    entries = []
    for _ in range(min(10 // num_requests, 1000 // num_tokens)):
        entries.append(queue.add("", num_requests, num_tokens))
    assert queue.is_full("", num_requests, num_tokens)
    assert (len(entries) * num_requests, len(entries) * num_tokens) == (
        queue.backlog.num_requests,
        queue.backlog.num_tokens,
    )
    queue.backlog.remove(entries[0])
    assert not queue.is_full("", num_requests, num_tokens)
    queue.backlog.shrink(entries[1], num_requests=num_requests, num_tokens=num_tokens, served=True)
    for entry in entries:
        queue.backlog.remove(entry)  # also what is not there any more
    assert (0, 0) == (queue.backlog.num_requests, queue.backlog.num_tokens)


def test_an_empty_queue_takes_any_group() -> None:
    """So nothing is refused for ever."""
    queue = Queue()
    large = queue.add("a", 1000, 10**6)
    assert queue.is_full("a", 1, 1)
    queue.backlog.remove(large)
    assert not queue.is_full("a", 1, 1)


def test_the_newest_of_who_has_most_gives_way() -> None:
    """To whoever has less; not to itself, nor once that would turn them round, nor when it has begun."""
    queue = Queue()
    many = [queue.add("many") for _ in range(10)]
    assert queue.is_full("many")
    others = [queue.add("few") for _ in range(5)]
    assert many[:4:-1] == queue.refused
    assert queue.is_full("few")
    assert queue.is_full("many")
    third = queue.add("third")
    assert {many[4], others[4]} & set(queue.refused)
    assert third not in queue.refused
    assert 10 == queue.backlog.num_requests


def test_what_has_begun_does_not_give_way() -> None:
    """Some of the group may have been sent already."""
    queue = Queue()
    begun = queue.add("many", 10, 100)
    queue.backlog.shrink(begun, num_requests=1, num_tokens=10, served=True)
    queue.add("few")
    assert queue.is_full("few")
    assert not queue.refused


def test_the_more_urgent_does_not_give_way_to_the_less() -> None:
    queue = Queue()
    for _ in range(10):
        queue.add("many", priority=-1)
    assert queue.is_full("few", priority=0)
    assert not queue.is_full("few", priority=-1)


def test_the_early_check_refuses_only_what_would_be_refused() -> None:
    queue = Queue()
    for _ in range(10):
        queue.add("many")
    queue.backlog.check("few")
    with pytest.raises(QueueFull):
        queue.backlog.check("many")
    assert not queue.refused


@given(
    asks=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 400), st.integers(0, 3))),
)
@settings(max_examples=300, deadline=None)
def test_every_group_is_in_refused_or_out(asks: list[tuple[str, int, int, int]]) -> None:
    """Bounds hold whenever more than one waits, and the figures are those of what waits."""
    queue = Queue()
    inside: list[Entry] = []
    for client, num_requests, num_tokens, leaves in asks:
        num_refused = len(queue.refused)
        try:
            inside.append(queue.add(client, num_requests, num_tokens))
        except QueueFull:
            assert num_refused == len(queue.refused), "nobody gives way for nothing"
        inside = [entry for entry in inside if entry not in queue.refused]
        for _ in range(min(leaves, len(inside))):
            queue.backlog.remove(inside.pop(0))
        assert sum(entry.num_requests for entry in inside) == queue.backlog.num_requests
        assert sum(entry.num_tokens for entry in inside) == queue.backlog.num_tokens
        if len(inside) > 1:
            assert queue.backlog.num_requests <= 10
            assert queue.backlog.num_tokens <= 1000
    assert set(queue.backlog._clients) == {entry.client for entry in inside}


def test_retry_after_is_how_long_the_backlog_takes() -> None:
    """By the rate of the last seconds, within 1 and 60; 5 while there is none."""
    queue = Queue()
    assert 5 == queue.backlog.retry_after_seconds
    running = queue.add("", 9, 900)
    for _ in range(9):  # 50 tokens a second
        queue.now += 2
        queue.backlog.shrink(running, num_requests=1, num_tokens=100, served=True)
    assert 1 == queue.backlog.retry_after_seconds
    queue.add("", 1, 1000)
    assert 20 == pytest.approx(queue.backlog.retry_after_seconds, rel=0.2)
    queue.now += 20_000  # nothing has left since
    assert 60 == queue.backlog.retry_after_seconds
    assert 60 == queue.backlog.retry_after_seconds


def test_time_without_a_queue_says_nothing_of_its_rate() -> None:
    """An hour in which nobody came does not make the next crowd wait."""
    queue = Queue()
    for _ in range(3):
        entry = queue.add("", 10, 1000)
        for _ in range(10):
            queue.now += 0.01
            queue.backlog.shrink(entry, num_requests=1, num_tokens=100, served=True)
        assert 0 == queue.backlog.num_tokens
        queue.now += 3600
    queue.add("", 1, 100_000)
    assert 10 == pytest.approx(queue.backlog.retry_after_seconds, rel=0.1)


def test_making_room_takes_no_more_than_a_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each client, and at each group that gives way: a large request cannot keep the event loop busy."""
    limits = QueueLimits(max_requests=2048)
    backlog = Backlog(limits)
    refused = []
    for number in range(2048):
        client = f"client {number}" if number < 200 else "many"
        backlog.add(Entry(client, 0, 1, 10, refused.append))
    looks = []
    share = Backlog._share
    monkeypatch.setattr(Backlog, "_share", lambda *arguments: looks.append(1) or share(*arguments))
    backlog.add(Entry("large", 0, 900, 10, refused.append))
    assert 900 == len(refused)
    assert len(looks) <= 1 + 201 + 900
    assert 2048 == backlog.num_requests


# As the client counts it


@pytest.fixture
def queue() -> QueueLimits:
    return QueueLimits(max_requests=4, max_tokens=10_000, timeout_seconds=60)


async def test_what_has_begun_counts_no_more(client: EngineClient, attach: Attach) -> None:
    """The engine's word that a request has left its queue makes room for the next; in the end nothing is counted."""
    gate = threading.Semaphore(1)
    await attach(max_num_seqs=1, before_step=gate.acquire)
    with closing(client.submit([request(client)], LONG)) as running:
        await until(lambda: bool(running.started_at))
        assert (0, 0) == (client.backlog.num_requests, client.backlog.num_tokens)
        with closing(client.submit([request(client, n=2), request(client, n=2)], LONG)) as waiting:
            assert (4, 2 * 3 + 4 * 100) == (client.backlog.num_requests, client.backlog.num_tokens)
            with pytest.raises(QueueFull) as full:
                client.submit([request(client)], LONG)
            assert 1 <= full.value.retry_after_seconds <= 60
            with pytest.raises(QueueFull):
                client.check_room("")
            gate.release(10_000)
            await collect(running)
            await collect(waiting)
    assert (0, 0) == (client.backlog.num_requests, client.backlog.num_tokens)
    client.check_room("")


async def test_samples_are_counted_until_each_has_begun(client: EngineClient, attach: Attach) -> None:
    """Three of a request wait while the first runs: with their tokens, and without the prompt that they share."""
    gate = threading.Semaphore(1)
    await attach(max_num_seqs=1, before_step=gate.acquire)
    with closing(client.submit([request(client, n=4)], LONG)) as stream:
        assert (4, 3 + 4 * 100) == (client.backlog.num_requests, client.backlog.num_tokens)
        await until(lambda: bool(stream.started_at))
        assert (3, 3 * 100) == (client.backlog.num_requests, client.backlog.num_tokens)
        gate.release(10_000)
        await collect(stream)
        assert (0, 0) == (client.backlog.num_requests, client.backlog.num_tokens)


@pytest.mark.parametrize("how", ["leaves", "aborts", "times out", "engine dies", "abandoned"])
async def test_whatever_ends_a_request_it_is_counted_no_more(client: EngineClient, attach: Attach, how: str) -> None:
    gate = threading.Semaphore(1)
    engine = await attach(max_num_seqs=1, before_step=gate.acquire)
    with closing(client.submit([request(client)], LONG)) as running:
        await until(lambda: bool(running.started_at))
        first, second = request(client), request(client)
        timeout = 0.05 if how == "times out" else None
        with closing(client.submit([first, second], LONG, queue_timeout_seconds=timeout)) as waiting:
            match how:
                case "aborts":
                    waiting.abort(first.id, 0)
                    assert 1 == client.backlog.num_requests
                    waiting.abort(second.id, 0)
                case "times out":
                    with pytest.raises(QueueTimeout):
                        await collect(waiting)
                case "engine dies":
                    engine.die(gate)
                    await until(lambda: not client.ready)
                    assert 2 == client.backlog.num_requests, "they wait for the next engine"
                    (await attach()).die(gate)
                    await collect(waiting)
                case "abandoned":
                    client.abandon("the service ends")
    gate.release(10_000)
    assert (0, 0) == (client.backlog.num_requests, client.backlog.num_tokens)


async def test_a_group_that_gives_way_hears_of_it(client: EngineClient, attach: Attach) -> None:
    """Its reader gets the QueueFull, the engine forgets it, and who came is served."""
    gate = threading.Semaphore(1)
    await attach(max_num_seqs=1, before_step=gate.acquire)
    with closing(client.submit([request(client)], LONG, client="many")) as running:
        await until(lambda: bool(running.started_at))
        with (
            closing(client.submit([request(client)], LONG, client="many")) as oldest,
            closing(client.submit([request(client, n=3)], LONG, client="many")) as newest,
            closing(client.submit([request(client)], PARAMS, client="few")) as few,
        ):
            with pytest.raises(QueueFull):
                await collect(newest)
            gate.release(10_000)
            for stream in (few, oldest, running):
                assert all(deltas[-1].finish is Finish.LENGTH for deltas in (await collect(stream)).values())
    await until(lambda: client.stats.num_waiting == client.stats.num_blocks_used == client.stats.num_running == 0)


@pytest.mark.parametrize("queue", [QueueLimits(timeout_seconds=0.05)])
async def test_a_request_waits_no_longer_than_the_service_lets_it(client: EngineClient, attach: Attach) -> None:
    """Whatever it asks for itself."""
    gate = threading.Semaphore(1)
    await attach(max_num_seqs=1, before_step=gate.acquire)
    with closing(client.submit([request(client)], LONG)) as running:
        await until(lambda: bool(running.started_at))
        for timeout in (None, 3600.0):
            with (
                pytest.raises(QueueTimeout) as late,
                closing(client.submit([request(client)], LONG, queue_timeout_seconds=timeout)) as waiting,
            ):
                await collect(waiting)
            assert 1 <= late.value.retry_after_seconds <= 60
        gate.release(10_000)
        await collect(running)
