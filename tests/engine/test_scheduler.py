"""The scheduler's invariants, over a fake runner: no torch, no processes."""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.core import Core
from service.engine.request import Delta, Finish, Request, SamplingParams
from service.engine.scheduler import Scheduler
from tests.engine.fake_runner import END_OF_TEXT, VOCAB_SIZE, FakeRunner, next_token

CONTEXT_LENGTH = 64


@dataclass
class Engine:
    """The engine's core over a fake runner, and what it said."""

    num_blocks: int = 40
    block_size: int = 4
    max_num_seqs: int = 8
    budget: int = 16
    depth: int = 0
    deltas: dict[tuple[int, int], list[Delta]] = field(default_factory=lambda: defaultdict(list))
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.runner = FakeRunner(self.num_blocks, self.block_size, depth=self.depth)
        self.scheduler = Scheduler(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            context_length=CONTEXT_LENGTH,
            end_of_text_id=END_OF_TEXT,
        )
        self.core = Core(self.scheduler, self.runner)

    def record(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id, delta.choice].append(delta)

    def step(self) -> None:
        self.num_steps += 1
        self.record(self.core.step())

    def run(self) -> None:
        while not self.core.idle:
            self.step()
            assert self.num_steps < 20_000, "no progress"

    def tokens(self, request: Request) -> list[list[int]]:
        return [
            [token for delta in self.deltas[request.id, choice] for token in delta.token_ids]
            for choice in range(request.n)
        ]

    def check_finished(self, requests: list[Request]) -> None:
        for request in requests:
            for choice in range(request.n):
                finishes = [delta.finish for delta in self.deltas[request.id, choice]]
                assert [None] * (len(finishes) - 1) == finishes[:-1]
                assert finishes[-1] is not None
        assert 0 == self.scheduler.stats().num_blocks_used
        assert 0 == self.scheduler.num_open


def alone(request: Request) -> list[list[int]]:
    """What the request's choices must be, computed with no engine at all."""
    params = request.params
    outputs = []
    for choice in range(request.n):
        tokens = list(request.prompt)
        while len(tokens) < len(request.prompt) + params.max_tokens:
            num_generated = len(tokens) - len(request.prompt)
            token = next_token(
                tokens,
                temperature=params.temperature,
                seed=params.seed,
                choice=choice,
                may_end=num_generated >= params.min_tokens,
            )
            tokens.append(token)
            ends = () if params.ignore_eos else (END_OF_TEXT,)
            if token in (*ends, *params.stop_token_ids) and num_generated + 1 >= params.min_tokens:
                break
        outputs.append(tokens[len(request.prompt) :])
    return outputs


PREFIXES = [tuple(range(base, base + 40)) for base in (3, 50)]


@st.composite
def requests_strategy(draw: st.DrawFn) -> list[Request]:
    requests = []
    for request_id in range(draw(st.integers(1, 12))):
        prefix = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 40))]
        tail = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0 if prefix else 1, max_size=8))
        prompt = (*prefix, *tail)
        params = SamplingParams(
            max_tokens=draw(st.integers(1, CONTEXT_LENGTH - len(prompt))),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(0, 3)),
            min_tokens=draw(st.integers(0, 3)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2))),
        )
        requests.append(Request(request_id, prompt, params, draw(st.sampled_from([1, 1, 1, 2, 5]))))
    return requests


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    least = -(-CONTEXT_LENGTH // block_size)
    max_num_seqs = draw(st.integers(1, 8))
    return Engine(
        num_blocks=least + draw(st.integers(0, least)),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + draw(st.integers(0, 40)),
        depth=draw(st.integers(0, 1)),
    )


@settings(max_examples=80, deadline=None)
@given(
    engine=engines(),
    requests=requests_strategy(),
    arrivals=st.lists(st.integers(0, 30), min_size=12, max_size=12),
)
def test_any_mix_gives_each_request_what_it_gets_alone(
    engine: Engine, requests: list[Request], arrivals: list[int]
) -> None:
    """In any company, block size, budget, depth and shortage of blocks; and all blocks come back."""
    for now in range(31):
        for request, arrival in zip(requests, arrivals, strict=False):
            if arrival == now:
                engine.scheduler.add(request)
        engine.step()
    engine.run()
    for request in requests:
        assert alone(request) == engine.tokens(request)
    engine.check_finished(requests)


@settings(max_examples=60, deadline=None)
@given(engine=engines(), requests=requests_strategy(), data=st.data())
def test_an_abort_at_any_step_frees_its_blocks_and_leaves_the_others_alone(
    engine: Engine, requests: list[Request], data: st.DataObject
) -> None:
    """The aborted get exactly one final Delta, with a prefix of their own tokens; the rest get all of theirs."""
    for request in requests:
        engine.scheduler.add(request)
    for _ in range(data.draw(st.integers(0, 20))):
        engine.step()
    victims = data.draw(st.sets(st.sampled_from([request.id for request in requests])))
    for victim in victims:
        choice = data.draw(st.sampled_from([None, 0]))
        engine.record(engine.scheduler.abort(victim, choice))
        assert [] == engine.scheduler.abort(victim, choice)
    engine.run()
    engine.check_finished(requests)
    for request in requests:
        for expected, got, choice in zip(alone(request), engine.tokens(request), range(request.n), strict=True):
            aborted = engine.deltas[request.id, choice][-1].finish is Finish.ABORT
            assert aborted <= (request.id in victims)
            assert expected[: len(got)] == got
            assert aborted or expected == got


@settings(max_examples=60, deadline=None)
@given(engine=engines(), requests=requests_strategy(), data=st.data())
def test_a_step_that_raises_ends_its_sequences_alone(
    engine: Engine, requests: list[Request], data: st.DataObject
) -> None:
    """They end with an error; everybody else gets the right tokens, also those that share prefixes with them."""
    error = RuntimeError("injected")
    engine.runner.fail_at = dict.fromkeys(data.draw(st.sets(st.integers(0, 20), max_size=2)), error)
    engine.runner.fail_collect_at = dict.fromkeys(data.draw(st.sets(st.integers(0, 20), max_size=2)), error)
    for request in requests:
        engine.scheduler.add(request)
    engine.run()
    engine.check_finished(requests)
    for request in requests:
        for expected, got, choice in zip(alone(request), engine.tokens(request), range(request.n), strict=True):
            last = engine.deltas[request.id, choice][-1]
            assert expected[: len(got)] == got
            if last.finish is Finish.ERROR:
                assert "a step failed: injected" == last.error
            else:
                assert expected == got


@settings(max_examples=40, deadline=None)
@given(engine=engines(), requests=requests_strategy(), limit=st.integers(2, 12))
def test_out_of_memory_is_met_by_smaller_steps(engine: Engine, requests: list[Request], limit: int) -> None:
    """A device with room for few tokens a step still gives everybody the right tokens."""
    engine.runner.max_tokens = limit
    for request in requests:
        engine.scheduler.add(request)
    engine.run()
    engine.check_finished(requests)
    for request in requests:
        assert alone(request) == engine.tokens(request)


def greedy(request_id: int, prompt: tuple[int, ...], max_tokens: int, n: int = 1) -> Request:
    return Request(
        request_id,
        prompt,
        SamplingParams(max_tokens, temperature=0.0, ignore_eos=True),
        n,
    )


def test_the_samples_of_a_prompt_compute_it_once() -> None:
    """n = 4 over a prompt of 33 tokens: 33 tokens for the first, and the unshared end for each of the others."""
    engine = Engine(budget=64)
    engine.scheduler.add(greedy(1, tuple(range(33)), 2, n=4))
    engine.run()
    assert 33 + 3 * 1 == len(engine.runner.launches[0].token_ids)
    assert 0 == engine.deltas[1, 0][0].cached_tokens


def test_a_repeated_prompt_is_a_prefix_hit_and_gives_the_same_tokens() -> None:
    """cached_tokens tells the hit; the answer does not change."""
    engine = Engine()
    first, second = greedy(1, tuple(range(30)), 5), greedy(2, tuple(range(30)), 5)
    engine.scheduler.add(first)
    engine.run()
    engine.scheduler.add(second)
    engine.run()
    assert 28 == engine.deltas[2, 0][0].cached_tokens
    assert engine.tokens(first) == engine.tokens(second)


def test_a_long_prompt_does_not_stall_a_running_stream() -> None:
    """Every step until the long prompt is through also computes a token for the stream, within the budget."""
    engine = Engine(budget=10)
    engine.scheduler.add(greedy(1, (1, 2), 40))
    engine.step()
    engine.scheduler.add(greedy(2, tuple(range(60)), 1))
    before = len(engine.deltas[1, 0])
    for _ in range(6):
        engine.step()
    assert before + 6 == len(engine.deltas[1, 0])
    assert max(len(batch.token_ids) for batch in engine.runner.launches) <= 10


def test_requests_start_in_the_order_they_came() -> None:
    """Told before their launch, first come first, each once."""
    engine = Engine(max_num_seqs=2, num_blocks=20)
    for request_id in (5, 3, 4):
        engine.scheduler.add(greedy(request_id, (1, 2, 3), 3, n=2))
    started: list[int] = []

    def on_start(request_ids: tuple[int, ...]) -> None:
        assert len(engine.runner.launches) == engine.scheduler.num_steps
        started.extend(request_ids)

    while not engine.core.idle:
        engine.core.step(on_start)
    assert [5, 3, 4] == started


def test_a_preempted_sequence_tells_no_prefix_hit_of_its_own() -> None:
    """cached_tokens, starts and the prefix counters speak of what was there when it first left the queue."""
    engine = Engine(num_blocks=16, block_size=4, max_num_seqs=4, budget=12)
    requests = [greedy(number, (number,) * 10, 50) for number in range(4)]
    for request in requests:
        engine.scheduler.add(request)
    engine.run()
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0
    assert (40, 0) == (stats.num_prefix_queries, stats.num_prefix_hits)
    assert {0} == {delta.cached_tokens for deltas in engine.deltas.values() for delta in deltas}


def test_preemption_happens_and_is_counted() -> None:
    """Two sequences that outgrow the blocks together: one is preempted, both are right."""
    engine = Engine(num_blocks=16, block_size=4)
    requests = [greedy(1, (1, 2), 50), greedy(2, (3, 4), 50)]
    for request in requests:
        engine.scheduler.add(request)
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    assert [alone(request) for request in requests] == [engine.tokens(request) for request in requests]


def test_a_row_that_is_not_finite_ends_its_sequence_with_an_error() -> None:
    """Never with a token; its neighbour goes on."""
    engine = Engine()
    for request_id in (1, 2):
        engine.scheduler.add(greedy(request_id, (request_id, 2), 4))
    batch = engine.scheduler.schedule()
    assert batch is not None
    engine.runner.launch(batch)
    output = engine.runner.collect()
    output.token_ids[0] = -1
    engine.record(engine.scheduler.commit(output))
    engine.run()
    assert Finish.ERROR is engine.deltas[1, 0][-1].finish
    assert [] == engine.tokens(greedy(1, (1, 2), 4))[0]
    assert alone(greedy(2, (2, 2), 4)) == engine.tokens(greedy(2, (2, 2), 4))


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_past_a_stop_are_dropped_and_counted(depth: int) -> None:
    """With a step in flight one token past the stop is computed; it is in no Delta."""
    engine = Engine(depth=depth)
    first = alone(greedy(1, (1, 2), 8))[0]
    stop_at = next(i for i, token in enumerate(first) if token not in first[:i] and i > 1)
    params = SamplingParams(8, temperature=0.0, ignore_eos=True, stop_token_ids=(first[stop_at],))
    request = Request(1, (1, 2), params)
    engine.scheduler.add(request)
    engine.run()
    assert [first[: stop_at + 1]] == engine.tokens(request)
    assert Finish.STOP is engine.deltas[1, 0][-1].finish
    assert depth == engine.scheduler.stats().num_dropped_tokens


def test_host_work_a_step_grows_in_line_with_the_running_sequences() -> None:
    """Lines of Python run by a decode step, all of it: with eight times the sequences no more than eight times."""

    def lines(num_sequences: int) -> int:
        engine = Engine(num_blocks=num_sequences * 16, max_num_seqs=num_sequences, budget=num_sequences + 512)
        for request_id in range(num_sequences):
            engine.scheduler.add(greedy(request_id, (request_id % 90, 1), 20))
        for _ in range(3):
            engine.step()
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> object:
            nonlocal count
            count += event == "line" and "/service/" in frame.f_code.co_filename
            return trace

        sys.settrace(trace)  # type: ignore[arg-type]
        deltas = engine.core.step()
        sys.settrace(None)
        assert num_sequences == len(deltas)
        return count

    assert lines(256) <= 8 * lines(32)
