"""The engine's loop and its publisher, over a fake runner and a real socket pair."""

import functools
import socket
import threading
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from service.engine.channel import Channel, frame
from service.engine.loop import Publisher
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
from tests.engine.fake_grammar import FakeConstraint
from tests.engine.harness import Engine, greedy
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


class Published:
    """A publisher between an engine that is stepped by hand and the API's end, and the time that it goes by."""

    def __init__(self, asks: list[Ask], *, max_interval: float = 0.016) -> None:
        self.now = 100.0
        self.ours, self.theirs = socket.socketpair()
        self._channel = Channel(self.theirs, ToApi)
        self._publisher = Publisher(Channel(self.ours, ToApi), max_interval=max_interval, clock=lambda: self.now)
        self._engine = Engine(num_blocks=400, max_num_seqs=16, budget=100)
        self._engine.add_all(asks)

    def __enter__(self) -> "Published":
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()

    def step(self) -> list[list[Delta]]:
        """The deltas of each message of one step."""
        self._publisher.due(self._engine.scheduler, self._engine.core.step(), idle=False)
        return self.messages()

    def due(self, *, idle: bool = False) -> list[list[Delta]]:
        self._publisher.due(self._engine.scheduler, [], idle=idle)
        return self.messages()

    def abort(self, request_id: int) -> list[list[Delta]]:
        self._publisher.ended(self._engine.scheduler.abort(request_id, None))
        return self.messages()

    def messages(self) -> list[list[Delta]]:
        messages = [message for message in self._channel.receive() if isinstance(message, Publish)]
        return [list(message.deltas) for message in messages if message.deltas]


def streams(count: int) -> tuple[list[Ask], list[list[int]]]:
    """Asks of 20 tokens, and these."""
    asks = [greedy(number, (number, 2), 20) for number in range(count)]
    return asks, [alone(ask)[0] for ask in asks]


def test_with_many_streams_tokens_are_held_and_sent_together() -> None:
    """First tokens and ends go out at once, an end with what was held; the rest in one message when due."""
    asks, expected = streams(8)
    with Published(asks) as published:
        published.due()
        assert [[Delta(number, 0, (expected[number][0],)) for number in range(8)]] == published.step()
        assert [] == published.step() + published.step()
        assert [[Delta(7, 0, tuple(expected[7][1:3]), Finish.ABORT)]] == published.abort(7)
        published.now += 7 * 60e-6 + 1e-6
        assert [[Delta(number, 0, tuple(expected[number][1:3])) for number in range(7)]] == published.due()
        assert [] == published.step()
        assert [[Delta(number, 0, (expected[number][3],)) for number in range(7)]] == published.due(idle=True)


def test_a_few_streams_get_every_token_at_once() -> None:
    """No interval below five streams."""
    asks, expected = streams(4)
    with Published(asks) as published:
        published.due()
        for step in range(20):
            finish = Finish.LENGTH if step == 19 else None
            assert [[Delta(number, 0, (expected[number][step],), finish) for number in range(4)]] == published.step()


def test_a_patient_request_hears_of_its_first_token_and_its_end() -> None:
    """And of an urgent token, with those before it; of nothing else, however long it takes."""
    asks, expected = streams(2)
    bits = bytes(1 << expected[1][7] % 8 if index == expected[1][7] // 8 else 0 for index in range(13))
    first = expected[1].index(expected[1][7])
    assert 1 <= first
    patient = [replace(asks[0], patient=True), replace(asks[1], patient=True, completing_ids=bits)]
    heard: list[list[Delta]] = []
    with Published(patient) as published:
        published.due()
        for _ in range(20):
            heard += published.step()
            published.now += 1
            heard += published.due()
    of_0 = [delta for deltas in heard for delta in deltas if delta.request_id == 0]
    assert [Delta(0, 0, (expected[0][0],)), Delta(0, 0, tuple(expected[0][1:]), Finish.LENGTH)] == of_0
    of_1 = [delta for deltas in heard for delta in deltas if delta.request_id == 1]
    assert expected[1] == [token for delta in of_1 for token in delta.token_ids]
    assert [False, *[True] * expected[1][1:-1].count(expected[1][7])] == [delta.urgent for delta in of_1[:-1]]


def test_patient_requests_make_no_stream_wait() -> None:
    """The interval counts who hears of each token."""
    asks, expected = streams(12)
    with Published([*asks[:4], *(replace(ask, patient=True) for ask in asks[4:])]) as published:
        published.due()
        published.step()
        assert [[Delta(number, 0, (expected[number][1],)) for number in range(4)]] == published.step()


def test_no_token_is_held_where_none_may_be() -> None:
    """With an interval of 0, however many streams there are."""
    asks, expected = streams(8)
    with Published(asks, max_interval=0) as published:
        published.due()
        for step in range(4):
            assert [[Delta(number, 0, (expected[number][step],)) for number in range(8)]] == published.step()


def test_an_urgent_token_goes_out_at_once_with_those_held_before_it() -> None:
    """With their log-probabilities; the other streams' tokens stay for their time."""
    asks, _ = streams(8)
    params = msgspec.structs.replace(asks[7].params, num_logprobs=1)
    (answer,) = answers(Ask(asks[7].request, params))
    token = answer.tokens[2]
    assert token not in answer.tokens[:2]
    bits = bytes(1 << token % 8 if index == token // 8 else 0 for index in range(13))
    with Published([*asks[:7], Ask(asks[7].request, params, bits)]) as published:
        published.due()
        published.step()
        assert [] == published.step()
        ((delta,),) = published.step()
    assert answer.logprobs is not None
    told = Logprobs(answer.logprobs.chosen[4:12], answer.logprobs.top_ids[4:12], answer.logprobs.top[4:12])
    assert Delta(7, 0, tuple(answer.tokens[1:3]), logprobs=told, urgent=True) == delta
