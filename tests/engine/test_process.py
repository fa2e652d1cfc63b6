"""The engine's loop and its publisher, over a fake runner and a real socket pair."""

import functools
import socket
import threading
import time
from collections import defaultdict
from typing import Any

import msgspec
import pytest

from service.engine.channel import Channel, frame
from service.engine.process import Publisher
from service.engine.request import (
    Abort,
    Delta,
    Finish,
    Logprobs,
    Publish,
    Ready,
    Request,
    SamplingParams,
    Submit,
    ToApi,
)
from service.engine.scheduler import Scheduler
from tests.engine.fake_grammar import FakeConstraint
from tests.engine.loop_thread import LoopThread
from tests.engine.oracle import Answer, Ask, alone, answers


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


PARAMS = SamplingParams(20, seed=5, ignore_eos=True)


def request(request_id: int, prompt: tuple[int, ...] = (1, 2, 3), n: int = 1) -> Request:
    return Request(request_id, prompt, n)


def params(**fields: Any) -> SamplingParams:
    return msgspec.structs.replace(PARAMS, **fields)


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("depth", [0, 1])
def test_many_requests_get_their_answers(depth: int) -> None:
    """Through the channel, in groups drawn alike, with held and merged tokens; then the blocks are back."""
    engine = LoopThread(depth=depth)
    with engine.peer as peer:
        api = Api(peer)
        assert isinstance(api.receive(), Ready)
        prompts = [tuple(range(number, number + number % 7 + 1)) for number in range(40)]
        requests = [Request(number, prompt, 1 + number % 3, score_from=1) for number, prompt in enumerate(prompts)]
        groups = [
            Submit(tuple(requests[:20]), PARAMS),
            Submit(tuple(requests[20:30]), params(num_logprobs=2, presence_penalty=1.0), bytes(range(13))),
            Submit(tuple(requests[30:35]), params(grammar="one", num_logprobs=0)),
            Submit(tuple(requests[35:]), params(max_tokens=0)),
        ]
        for group in groups:
            api.send(group)
        deltas = api.until_finished(sum(each.n for each in requests))
        for group in groups:
            for each in group.requests:
                for choice, expected in enumerate(answers(Ask(each, group.params))):
                    got = functools.reduce(Delta.then, deltas[each.id, choice])
                    assert expected == Answer(list(got.token_ids), got.finish, got.logprobs, got.prompt_logprobs)
    engine.thread.join(timeout=10)
    assert not engine.thread.is_alive()
    assert engine.scheduler.stats().num_blocks_used == 0


def test_starts_are_told_before_the_first_tokens() -> None:
    """So that, should the step kill the engine, the API knows who was in it."""
    engine = LoopThread()
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit((request(1), request(2)), PARAMS))
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
        api.send(Submit((request(1),), params(max_tokens=100)))
        api.send(Submit((request(2, n=2),), params(max_tokens=3)))
        api.send(Abort(1))
        deltas = api.until_finished(3)
        assert deltas[1, 0][-1].finish in (Finish.ABORT, Finish.LENGTH)
        assert Finish.LENGTH is deltas[2, 1][-1].finish
        api.send(Abort(1))
        api.send(Submit((request(3),), PARAMS))
        assert {(3, 0)} == set(api.until_finished(1))


@pytest.mark.parametrize("at_collect", [False, True])
def test_a_step_that_raises_answers_its_requests_and_the_loop_goes_on(at_collect: bool) -> None:
    """The error names the cause; the next request is served."""
    engine = LoopThread()
    (engine.runner.fail_collect_at if at_collect else engine.runner.fail_at)[0] = RuntimeError("injected")
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit((request(1, n=2),), PARAMS))
        for deltas in api.until_finished(2).values():
            assert (Finish.ERROR, "a step failed: injected") == (deltas[-1].finish, deltas[-1].error)
        api.send(Submit((request(2),), PARAMS))
        assert alone(Ask(request(2), PARAMS)) == [tokens(api.until_finished(1)[2, 0])]


def test_a_step_too_large_for_the_memory_is_made_smaller() -> None:
    """OutOfMemory at launch costs nobody anything."""
    engine = LoopThread()
    engine.runner.max_tokens = 5
    requests = [request(number, tuple(range(20))) for number in range(4)]
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit(tuple(requests), PARAMS))
        deltas = api.until_finished(4)
        for each in requests:
            assert alone(Ask(each, PARAMS)) == [tokens(deltas[each.id, 0])]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_steps_size_counts_those_that_end_in_it(depth: int) -> None:
    """Stats tell as many seconds as sizes, one a step, and the sizes sum to the tokens that were sampled."""
    engine = LoopThread(depth=depth)
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        groups = [Submit((request(number, n=1 + number),), params(max_tokens=5 + number)) for number in range(3)]
        for group in groups:
            api.send(group)
        sizes: list[int] = []
        seconds: list[float] = []
        stats = None
        while stats is None or sum(sizes) < 5 + 12 + 21 or stats.num_running or stats.num_waiting:
            message = api.receive()
            assert isinstance(message, Publish)
            if message.stats is not None:
                stats = message.stats
                sizes += stats.batch_sizes
                seconds += stats.step_seconds
    assert stats.num_steps == len(sizes) == len(seconds)
    assert 5 + 12 + 21 + stats.num_dropped_tokens == sum(sizes)


class Gate:
    """Compiles as the fake grammar does, once it is open."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()
        self.compiled: list[str] = []

    def __call__(self, text: str) -> FakeConstraint:
        self.begun.set()
        assert self.open.wait(10)
        self.compiled.append(text)
        return FakeConstraint(text)


def test_a_grammar_is_compiled_once_a_group_while_others_stream() -> None:
    """Beside the steps; an abort meanwhile is answered at once, and the rest gets its constraint."""
    gate = Gate()
    engine = LoopThread(compile_grammar=gate)
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        group = Submit((request(1), request(2, n=2)), params(grammar="one"))
        api.send(group)
        assert gate.begun.wait(10)
        api.send(Submit((request(3),), PARAMS))
        assert {(3, 0)} == set(api.until_finished(1))
        api.send(Abort(1))
        assert Finish.ABORT is api.until_finished(1)[1, 0][-1].finish
        gate.open.set()
        deltas = api.until_finished(2)
        assert alone(Ask(request(2, n=2), group.params)) == [tokens(deltas[2, choice]) for choice in (0, 1)]
    assert ["one"] == gate.compiled


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled() -> None:
    """Aborted while another was compiled."""
    gate = Gate()
    engine = LoopThread(compile_grammar=gate)
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        for number in (1, 2, 3):
            api.send(Submit((request(number),), params(grammar=f"grammar {number}")))
        assert gate.begun.wait(10)
        api.send(Abort(2))
        assert {(2, 0)} == set(api.until_finished(1))
        gate.open.set()
        assert {(1, 0), (3, 0)} == set(api.until_finished(2))
    assert ["grammar 1", "grammar 3"] == gate.compiled


def test_the_loop_waits_for_a_grammar_without_a_turn() -> None:
    """It schedules nothing and reads nothing until the grammar, or a message, wakes it."""
    gate = Gate()
    engine = LoopThread(compile_grammar=gate)
    turns: list[int] = []
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: turns.append(1) or schedule()  # type: ignore[func-returns-value, method-assign]
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit((request(1),), params(grammar="one", max_tokens=1)))
        assert gate.begun.wait(10)
        message = api.receive()
        while not (isinstance(message, Publish) and message.stats is not None and message.stats.num_waiting):
            message = api.receive()
        time.sleep(0.1)  # in which a loop that polls would turn
        num_turns = len(turns)
        assert num_turns <= 2
        gate.open.set()
        api.until_finished(1)


def test_a_grammar_that_cannot_be_compiled_ends_its_requests_with_an_error() -> None:
    """All of the group, with the reason; the next grammar is compiled."""
    engine = LoopThread()
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        api.send(Submit((request(1, n=2), request(2)), params(grammar="wrong: line 1")))
        for deltas in api.until_finished(3).values():
            (delta,) = deltas
            assert Finish.GRAMMAR is delta.finish
            assert "the grammar could not be compiled: wrong: line 1" == delta.error
        api.send(Submit((request(3),), params(grammar="two")))
        assert alone(Ask(request(3), params(grammar="two"))) == [tokens(api.until_finished(1)[3, 0])]


def test_the_loop_ends_while_a_grammar_is_compiled() -> None:
    """When the channel closes, with what is compiled and what waits for the compiler."""
    gate = Gate()
    engine = LoopThread(compile_grammar=gate)
    with engine.peer as peer:
        api = Api(peer)
        api.receive()
        for number in range(3):
            api.send(Submit((request(number),), params(grammar=f"{number}")))
        assert gate.begun.wait(10)
    gate.open.set()
    engine.thread.join(timeout=10)
    assert not engine.thread.is_alive()


def scheduler() -> Scheduler:
    return Scheduler(
        num_blocks=8,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=4,
        context_length=16,
        vocab_size=8,
        end_of_text_id=0,
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


def test_an_urgent_token_goes_out_at_once_with_those_held_before_it() -> None:
    """With its log-probability; the other streams' tokens stay for their time."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        publisher = Publisher(Channel(ours, ToApi))
        everyone = range(400)
        publisher.deltas([Delta(number, 0, (1,)) for number in everyone])
        publisher.due(scheduler(), idle=False)
        found = [Logprobs(bytes([number] * 4)) for number in range(4)]
        publisher.deltas([Delta(number, 0, (2,), logprobs=found[2]) for number in everyone])
        publisher.deltas([Delta(7, 0, (3,), logprobs=found[3], urgent=True)])
        deltas = [message.deltas for message in published(theirs) if message.deltas]
    assert (Delta(7, 0, (2, 3), logprobs=found[2] + found[3], urgent=True),) == deltas[-1]
    assert 2 == len(deltas)
