"""The engine's loop and its publisher, over a fake runner and a real socket pair."""

import socket
from collections import defaultdict

import msgspec
import pytest

from service.engine.channel import Channel, frame
from service.engine.process import Publisher
from service.engine.request import Abort, Delta, Finish, Publish, Ready, Request, SamplingParams, Submit, ToApi
from service.engine.scheduler import Scheduler
from tests.engine.loop_thread import LoopThread
from tests.engine.test_scheduler import alone


class Api:
    """The API's end: sends records, reads them back."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._peer.settimeout(10)

    def send(self, message: object) -> None:
        self._peer.sendall(frame(message, msgspec.msgpack.Encoder()))

    def receive(self) -> ToApi:
        size = int.from_bytes(self._peer.recv(4, socket.MSG_WAITALL), "big")
        return msgspec.msgpack.decode(self._peer.recv(size, socket.MSG_WAITALL), type=ToApi)

    def until_finished(self, count: int) -> dict[tuple[int, int], list[Delta]]:
        """Deltas by sequence, until `count` sequences have finished; checks that each finishes once."""
        deltas: dict[tuple[int, int], list[Delta]] = defaultdict(list)
        finished: set[tuple[int, int]] = set()
        while len(finished) < count:
            message = self.receive()
            assert isinstance(message, Publish)
            for delta in message.deltas:
                key = (delta.request_id, delta.choice)
                assert key not in finished
                deltas[key].append(delta)
                if delta.finish is not None:
                    finished.add(key)
        return deltas


def request(request_id: int, prompt: tuple[int, ...] = (1, 2, 3), n: int = 1, max_tokens: int = 20) -> Request:
    return Request(request_id, prompt, SamplingParams(max_tokens, seed=request_id, ignore_eos=True), n)


@pytest.mark.parametrize("depth", [0, 1])
def test_many_requests_get_their_tokens(depth: int) -> None:
    """Through the channel, with held and coalesced tokens; then the blocks are back."""
    engine = LoopThread(depth=depth)
    with engine.peer as peer:
        api = Api(peer)
        assert isinstance(api.receive(), Ready)
        requests = [
            request(number, tuple(range(number, number + number % 7 + 1)), 1 + number % 3) for number in range(40)
        ]
        api.send(Submit(tuple(requests)))
        deltas = api.until_finished(sum(each.n for each in requests))
        for each in requests:
            for choice, expected in enumerate(alone(each)):
                assert expected == [token for delta in deltas[each.id, choice] for token in delta.token_ids]
    engine.thread.join(timeout=10)
    assert not engine.thread.is_alive()
    assert engine.scheduler.stats().num_blocks_used == 0


def test_starts_are_told_before_the_first_tokens() -> None:
    """So that, should the step kill the engine, the API knows who was in it."""
    engine = LoopThread()
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit((request(1), request(2))))
        said = []
        while not said or not said[-1].deltas:
            message = api.receive()
            assert isinstance(message, Publish)
            said += [message] if message.started or message.deltas else []
        assert [(1, 2), ()] == [each.started for each in said]
        api.until_finished(2)


def test_an_abort_ends_the_sequence_with_one_delta() -> None:
    """Finish ABORT; an abort of what is unknown or over is passed over."""
    engine = LoopThread()
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Abort(99))
        api.send(Submit((request(1, max_tokens=100), request(2, n=2, max_tokens=3))))
        api.send(Abort(1))
        deltas = api.until_finished(3)
        assert deltas[1, 0][-1].finish in (Finish.ABORT, Finish.LENGTH)
        assert Finish.LENGTH is deltas[2, 1][-1].finish
        api.send(Abort(1))
        api.send(Submit((request(3),)))
        assert {(3, 0)} == set(api.until_finished(1))


@pytest.mark.parametrize("at_collect", [False, True])
def test_a_step_that_raises_answers_its_requests_and_the_loop_goes_on(at_collect: bool) -> None:
    """The error names the cause; the next request is served."""
    engine = LoopThread()
    (engine.runner.fail_collect_at if at_collect else engine.runner.fail_at)[0] = RuntimeError("injected")
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit((request(1, n=2),)))
        for deltas in api.until_finished(2).values():
            assert (Finish.ERROR, "a step failed: injected") == (deltas[-1].finish, deltas[-1].error)
        api.send(Submit((request(2),)))
        tokens = [token for delta in api.until_finished(1)[2, 0] for token in delta.token_ids]
        assert alone(request(2)) == [tokens]


def test_a_step_too_large_for_the_memory_is_made_smaller() -> None:
    """OutOfMemory at launch costs nobody anything."""
    engine = LoopThread()
    engine.runner.max_tokens = 5
    requests = [request(number, tuple(range(20))) for number in range(4)]
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit(tuple(requests)))
        deltas = api.until_finished(4)
        for each in requests:
            assert alone(each) == [[token for delta in deltas[each.id, 0] for token in delta.token_ids]]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_steps_size_counts_those_that_end_in_it(depth: int) -> None:
    """Stats tell as many seconds as sizes, one a step, and the sizes sum to the tokens that were sampled."""
    engine = LoopThread(depth=depth)
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        requests = [request(number, n=1 + number, max_tokens=5 + number) for number in range(3)]
        api.send(Submit(tuple(requests)))
        sizes: list[int] = []
        seconds: list[float] = []
        stats = None
        while stats is None or stats.num_steps == 0 or stats.num_running or stats.num_waiting:
            message = api.receive()
            assert isinstance(message, Publish)
            if message.stats is not None:
                stats = message.stats
                sizes += stats.batch_sizes
                seconds += stats.step_seconds
    assert stats.num_steps == len(sizes) == len(seconds)
    assert sum(each.n * each.params.max_tokens for each in requests) + stats.num_dropped_tokens == sum(sizes)


def scheduler() -> Scheduler:
    return Scheduler(
        num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=4, context_length=16, end_of_text_id=0
    )


def published(peer: socket.socket) -> list[Publish]:
    peer.setblocking(False)
    channel = Channel(peer, ToApi)
    return [message for message in channel.receive() if isinstance(message, Publish)]


def test_with_many_streams_tokens_are_held_and_sent_together() -> None:
    """First tokens and ends go out at once, an end with what was held; the rest in one message when due."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        publisher = Publisher(Channel(ours, ToApi))
        everyone = range(400)  # an interval of 8 ms, far above the time of this test's calls
        publisher.deltas([Delta(number, 0, (1,)) for number in everyone])
        publisher.due(scheduler(), idle=False)
        for token in (2, 3):
            publisher.deltas([Delta(number, 0, (token,)) for number in everyone])
        publisher.deltas([Delta(7, 0, (4,), Finish.STOP)])
        publisher.due(scheduler(), idle=True)
        messages = published(theirs)
        deltas = [message.deltas for message in messages if message.deltas]
    assert [Delta(number, 0, (1,)) for number in everyone] == list(deltas[0])
    assert (Delta(7, 0, (2, 3, 4), Finish.STOP),) in deltas
    assert [Delta(number, 0, (2, 3)) for number in everyone if number != 7] == list(deltas[-1])
    assert len(deltas) == 3


def test_a_single_stream_gets_every_token_at_once() -> None:
    """No interval below five streams."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        publisher = Publisher(Channel(ours, ToApi))
        for token in range(5):
            publisher.deltas([Delta(1, 0, (token,))])
            publisher.due(scheduler(), idle=False)
        deltas = [delta for message in published(theirs) for delta in message.deltas]
    assert [Delta(1, 0, (token,)) for token in range(5)] == deltas
