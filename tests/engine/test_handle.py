"""Two engines behind one client: every request ends once, whoever dies, and is asked of nobody in vain."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engine.channel import Channel, ChannelClosed, frame
from service.engine.client import EngineClient, EngineFailed, EngineNotReady, Stream
from service.engine.request import (
    Abort,
    Delta,
    EngineStats,
    Finish,
    Publish,
    Ready,
    Request,
    Status,
    Submit,
    ToApi,
    ToEngine,
)
from tests.engine.attached import PARAMS, collect, until
from tests.engine.loop_thread import MODEL

_ENCODER = msgspec.msgpack.Encoder()
_ENDED = "the engine stopped while it worked on this request"


class Peer:
    """The other end of an engine's channel: says what it is told to, and keeps what it is asked for."""

    def __init__(self, client: EngineClient, number: int) -> None:
        ours, self._sock = socket.socketpair()
        self._channel = Channel(self._sock, ToEngine)
        self._client, self._engine = client, client.engines[number]
        self.requests: dict[int, Request] = {}
        self.aborted: list[Abort] = []
        client.attach(ours, number)

    async def ready(self) -> None:
        self.say(Ready(MODEL))
        await until(lambda: self._engine.ready)

    def say(self, message: ToApi) -> None:
        self._sock.sendall(frame(message, _ENCODER))

    def hear(self) -> list[Request]:
        """What it was newly asked for."""
        news: list[Request] = []
        with suppress(ChannelClosed):
            for message in self._channel.receive():
                if isinstance(message, Submit):
                    news += message.requests
                elif isinstance(message, Abort):
                    self.aborted.append(message)
        self.requests |= {request.id: request for request in news}
        return news

    def close(self) -> None:
        self._sock.close()

    async def die(self) -> None:
        self.close()
        await until(lambda: not self._engine.ready and self._engine.phase != "start")


@dataclass
class Fate:
    """Of a request, as far as the engines know."""

    request: Request
    num_asked: int = 0  # how often an engine was asked for it
    at: int | None = None  # the engine
    begun: bool = False
    open: set[int] = field(default_factory=set)
    failed: bool = False


class World:
    """Two engines, each of which may be there, and groups that are asked for; all moves are made one at a time."""

    def __init__(self) -> None:
        self.client = EngineClient(api_number=0, num_engines=2, stall_seconds=60, on_stall=lambda _: None)
        self.peers: list[Peer | None] = [None, None]
        self.fates: dict[int, Fate] = {}
        self.readers: list[asyncio.Task[dict[tuple[int, int], list[Delta]]]] = []
        self.streams: list[Stream] = []

    async def settle(self) -> None:
        """Let the client hear all that was said, and note what the engines were asked for."""
        for _ in range(12):
            await asyncio.sleep(0)
        for number, peer in enumerate(self.peers):
            for request in peer.hear() if peer is not None else ():
                fate = self.fates[request.id]
                fate.num_asked += 1
                fate.at = number
                assert not fate.begun, "it was computed twice"
                assert fate.num_asked <= 2, "it outlives engine after engine"
        if any(self.peers):
            waiting = [fate for fate in self.fates.values() if fate.open and not fate.failed]
            assert all(fate.at is not None and self.peers[fate.at] for fate in waiting), "one is ready, and not asked"

    async def submit(self, group: list[int]) -> None:
        client = self.client
        requests = [Request(client.new_request_id(), (7, 8, 9, each, each), each) for each in group]
        try:
            stream = client.submit(requests, PARAMS)
        except EngineNotReady:
            assert not any(engine.ready for engine in client.engines)
            return
        for request in requests:
            self.fates[request.id] = Fate(request, open=set(range(request.n)))
        self.streams.append(stream)
        self.readers.append(asyncio.ensure_future(collect(stream)))

    async def work(self, number: int, step: Callable[[Peer, Fate], None]) -> None:
        """Something happens to what engine `number` was asked for first."""
        peer = self.peers[number]
        here = [fate for fate in self.fates.values() if fate.at == number and fate.open and not fate.failed]
        if peer is not None and here:
            step(peer, here[0])

    async def die(self, number: int) -> None:
        peer, self.peers[number] = self.peers[number], None
        if peer is None:
            return
        for fate in self.fates.values():
            if fate.at == number and fate.open:
                fate.failed = fate.begun or fate.num_asked == 2
        await peer.die()

    async def start(self, number: int) -> None:
        if self.peers[number] is None:
            self.peers[number] = peer = Peer(self.client, number)
            await peer.ready()


def start(peer: Peer, fate: Fate) -> None:
    peer.say(Publish(started=(fate.request.id,)))
    fate.begun = True


def token(peer: Peer, fate: Fate) -> None:
    peer.say(Publish(deltas=(Delta(fate.request.id, min(fate.open), (1,)),)))
    fate.begun = True


def finish(peer: Peer, fate: Fate) -> None:
    choice = min(fate.open)
    fate.open.remove(choice)
    peer.say(Publish(deltas=(Delta(fate.request.id, choice, (1,), Finish.LENGTH),)))
    fate.begun = True


_STEPS = {"begin": start, "token": token, "finish": finish}
_MOVES = st.one_of(
    st.tuples(st.just("submit"), st.lists(st.integers(1, 2), min_size=1, max_size=4)),
    st.tuples(st.sampled_from([*_STEPS, "die", "start"]), st.integers(0, 1)),
)


async def live(moves: list[tuple[str, int | list[int]]]) -> None:
    world = World()
    for number in range(2):
        await world.start(number)
    for kind, what in moves:
        if isinstance(what, list):
            await world.submit(what)
        elif kind in _STEPS:
            await world.work(what, _STEPS[kind])
        else:
            await getattr(world, kind)(what)
        await world.settle()
    for number in range(2):
        await world.start(number)
        await world.settle()
    while any(fate.open and not fate.failed for fate in world.fates.values()):
        for number in range(2):
            await world.work(number, finish)
        await world.settle()
    found: dict[tuple[int, int], list[Delta]] = {}
    for reader in world.readers:
        found |= await asyncio.wait_for(reader, 5)
    for request_id, fate in world.fates.items():
        for choice in range(fate.request.n):
            deltas = found[request_id, choice]
            assert 1 == sum(delta.finish is not None for delta in deltas)
            expected = (Finish.ERROR, _ENDED) if fate.failed and choice in fate.open else (Finish.LENGTH, None)
            assert expected == (deltas[-1].finish, deltas[-1].error)
    for stream in world.streams:
        stream.close()
    assert [0, 0] == [engine.num_owed for engine in world.client.engines]
    assert (0, 0) == (world.client.num_open, world.client.backlog.num_requests)
    assert not any(engine.streams for engine in world.client.engines)
    await asyncio.wait_for(world.client.wait_idle(), 1)
    for number in range(2):
        await world.die(number)
    await world.client.close()


@settings(deadline=None, max_examples=150)
@given(st.lists(_MOVES, max_size=40))
@example([("submit", [1]), ("die", 1), ("die", 0), ("start", 1)])
def test_every_request_ends_once_under_any_deaths(moves: list[tuple[str, int | list[int]]]) -> None:
    """What an engine had begun ends with an error at its death; all else is answered, by whoever is there first."""
    asyncio.run(live(moves))


# One thing at a time


Join = Callable[[int], Peer]


@pytest.fixture
def stalled() -> list[int]:
    return []


@pytest.fixture
async def client(stalled: list[int]) -> AsyncIterator[EngineClient]:
    """Of two engines, with little patience."""
    client = EngineClient(api_number=0, num_engines=2, stall_seconds=0.2, on_stall=stalled.append)
    yield client
    await client.close()


@pytest.fixture
def join(client: EngineClient) -> Iterator[Join]:
    """Make a process of one of its engines, which is not ready yet."""
    with ExitStack() as stack:
        yield lambda number: stack.enter_context(closing(Peer(client, number)))


@pytest.fixture
async def pair(join: Join) -> tuple[Peer, Peer]:
    """One of each, and both are ready."""
    peers = join(0), join(1)
    for peer in peers:
        await peer.ready()
    return peers


async def test_a_group_is_shared_out(client: EngineClient, pair: tuple[Peer, Peer]) -> None:
    """Each prompt with all its samples goes to one engine, and engines get about as many sequences."""
    requests = [Request(client.new_request_id(), (number,) * 9, 1 + number % 3) for number in range(60)]
    with closing(client.submit(requests, PARAMS)) as stream:
        parts = [peer.hear() for peer in pair]
        assert sorted(request.id for request in requests) == sorted(each.id for part in parts for each in part)
        assert abs(sum(each.n for each in parts[0]) - sum(each.n for each in parts[1])) <= 3
        assert [sum(each.n for each in part) for part in parts] == [engine.num_owed for engine in client.engines]
        stream.abort(parts[1][0].id, 0)
    pair[0].hear(), pair[1].hear()
    assert {each.id for each in parts[0]} == {abort.request_id for abort in pair[0].aborted}
    assert {each.id for each in parts[1]} == {abort.request_id for abort in pair[1].aborted}
    assert [0, 0] == [engine.num_owed for engine in client.engines]


async def test_the_phase_is_that_of_the_nearest(client: EngineClient, pair: tuple[Peer, Peer], join: Join) -> None:
    """Readiness is there while one is; else what is told is how far the one is that will be ready first."""
    first, second = pair
    assert (True, "ready") == (client.ready, client.phase)
    await first.die()
    assert (True, "ready", ["restart", "ready"]) == (client.ready, client.phase, [e.phase for e in client.engines])
    assert client.check_ready() == MODEL
    await second.die()
    assert (False, "restart") == (client.ready, client.phase)
    with pytest.raises(EngineNotReady):
        client.check_ready()
    again = [join(number) for number in range(2)]
    again[0].say(Status("load", 0.75))
    again[1].say(Status("load", 0.25))
    await until(lambda: {"load"} == {engine.phase for engine in client.engines})
    assert 0.75 == client.status.progress
    again[1].say(Status("warmup", 0.0))
    await until(lambda: client.phase == "warmup")
    client.drain()
    assert ["drain", "drain"] == [client.phase_of(engine) for engine in client.engines]


async def test_an_engine_that_is_given_up_is_missed_by_nobody(client: EngineClient, pair: tuple[Peer, Peer]) -> None:
    """The other serves on. When that is given up too, what waits for it ends, and the service has failed."""
    first, second = pair
    client.give_up(0)
    with closing(client.submit([Request(1, (1, 2)), Request(2, (3, 4))], PARAMS)) as stream:
        assert {1, 2} == {each.id for each in second.hear()}
        assert ("ready", "failed") == (client.phase, client.phase_of(client.engines[0]))
        await second.die()
        assert "restart" == client.phase
        client.give_up(1)
        deltas = await collect(stream)
    assert {"the engine failed too often and is not being restarted"} == {d[-1].error for d in deltas.values()}
    assert "failed" == client.phase
    with pytest.raises(EngineFailed):
        client.check_ready()
    await first.die()


async def test_an_engine_is_stalled_by_itself(
    client: EngineClient, pair: tuple[Peer, Peer], stalled: list[int]
) -> None:
    """The word of the other is no sign of its life; one that owes nothing may be silent."""
    peers = pair
    with closing(client.submit([Request(1, (1, 2)), Request(2, (3, 4))], PARAMS)):
        assert [[1], [2]] == [[each.id for each in peer.hear()] for peer in peers]
        peers[0].say(Publish(deltas=(Delta(1, 0, (1,), Finish.LENGTH),)))
        while not stalled:
            peers[0].say(Publish(stats=EngineStats(num_steps=1)))
            await asyncio.sleep(0.02)
        assert 0 == client.engines[0].last_message_age_seconds
        assert 0.2 <= client.engines[1].last_message_age_seconds
    assert [1] == stalled


async def test_stats_are_told_by_engine_and_summed(client: EngineClient, pair: tuple[Peer, Peer]) -> None:
    """Those of a lost engine are gone."""
    first, second = pair
    heard: list[tuple[int, int]] = []
    client.on_stats = lambda number, stats: heard.append((number, stats.num_steps))
    first.say(Publish(stats=EngineStats(num_running=2, num_blocks=64, num_blocks_used=8, num_steps=3)))
    second.say(Publish(stats=EngineStats(num_running=5, num_blocks=64, num_steps=4, step_seconds=(0.5,))))
    await until(lambda: len(heard) == 2)
    assert [(0, 3), (1, 4)] == sorted(heard)
    assert EngineStats(7, 0, 128, 8, 7, step_seconds=(0.5,)) == client.stats
    await first.die()
    assert 5 == client.stats.num_running


async def test_the_hook_of_readiness_is_awaited_by_one_at_a_time(client: EngineClient, join: Join) -> None:
    """Two that are ready at once do not both load what the first one loads."""
    entered, most, gate = 0, 0, asyncio.Event()

    async def on_ready(_: object) -> None:
        nonlocal entered, most
        entered += 1
        most = max(most, entered)
        await gate.wait()
        entered -= 1

    client.on_ready = on_ready
    for number in range(2):
        join(number).say(Ready(MODEL))
    await until(lambda: entered == 1)
    assert not client.ready
    gate.set()
    await until(lambda: all(engine.ready for engine in client.engines))
    assert 1 == most


async def test_a_group_goes_on_where_it_was(client: EngineClient, pair: tuple[Peer, Peer]) -> None:
    """Its next requests begin with what that engine has computed; at its death the group ends."""
    first, second = pair
    with closing(client.submit([Request(1, (1, 2))], PARAMS)) as stream:
        for request_id in range(1, 6):
            assert [request_id] == [each.id for each in first.hear()]
            first.say(Publish(deltas=(Delta(request_id, 0, (1,), Finish.LENGTH),)))
            assert (request_id, 0) in await collect(stream)
            stream.go_on([Request(request_id + 1, (1, 2))])
            with closing(client.submit([Request(100 + request_id, (5, 6))], PARAMS)):
                second.hear()
        assert not second.requests.keys() & set(range(10))
        first.hear()
        first.say(Publish(started=(6,)))
        await until(lambda: not stream._unstarted)
        await first.die()
        (delta,) = (await collect(stream))[6, 0]
        assert Finish.ERROR is delta.finish
