"""The scheduler's invariants, over a fake runner: no torch, no processes."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.request import Finish
from tests.engine.harness import Engine, asks_strategy, check_answers, engines, greedy, is_beginning
from tests.engine.oracle import Ask, alone, answers


@settings(max_examples=100, deadline=None)
@given(
    engine=engines(),
    asks=asks_strategy(),
    arrivals=st.lists(st.integers(0, 30), min_size=14, max_size=14),
    delays=st.lists(st.integers(0, 9), min_size=14, max_size=14),
)
def test_any_mix_gives_each_request_what_it_gets_alone(
    engine: Engine, asks: list[Ask], arrivals: list[int], delays: list[int]
) -> None:
    """Tokens, log-probabilities and finish, in any company, block size, budget, depth and shortage of blocks.

    However late a constraint is supplied; and all blocks come back.
    """
    for now in range(40):
        for ask, arrival, delay in zip(asks, arrivals, delays, strict=False):
            if arrival == now:
                engine.add(ask)
            if arrival + delay == now:
                engine.supply(ask)
        engine.step()
    engine.run()
    check_answers(engine, asks)


@settings(max_examples=60, deadline=None)
@given(engine=engines(), asks=asks_strategy(), data=st.data())
def test_an_abort_at_any_step_frees_its_blocks_and_leaves_the_others_alone(
    engine: Engine, asks: list[Ask], data: st.DataObject
) -> None:
    """The aborted get exactly one final Delta, with a beginning of their own answer; the rest get all of theirs."""
    for ask in asks:
        engine.add(ask)
    late = data.draw(st.sets(st.sampled_from(range(len(asks)))))
    for number in set(range(len(asks))) - late:
        engine.supply(asks[number])
    for _ in range(data.draw(st.integers(0, 20))):
        engine.step()
    victims = data.draw(st.sets(st.sampled_from([ask.request.id for ask in asks])))
    for victim in victims:
        choice = data.draw(st.sampled_from([None, 0]))
        engine.record(engine.scheduler.abort(victim, choice))
        assert [] == engine.scheduler.abort(victim, choice)
    for number in late:
        engine.supply(asks[number])
    engine.run()
    engine.check_finished(asks)
    for ask in asks:
        for expected, got in zip(answers(ask), engine.answers(ask), strict=True):
            aborted = got.finish is Finish.ABORT
            assert aborted <= (ask.request.id in victims)
            assert is_beginning(got, expected) if aborted else expected == got


@settings(max_examples=60, deadline=None)
@given(engine=engines(), asks=asks_strategy(), data=st.data())
def test_a_step_that_raises_ends_its_sequences_alone(engine: Engine, asks: list[Ask], data: st.DataObject) -> None:
    """They end with an error; everybody else gets the right answer, also those that share prefixes with them."""
    error = RuntimeError("injected")
    engine.runner.fail_at = dict.fromkeys(data.draw(st.sets(st.integers(0, 20), max_size=2)), error)
    engine.runner.fail_collect_at = dict.fromkeys(data.draw(st.sets(st.integers(0, 20), max_size=2)), error)
    engine.add_all(asks)
    engine.run()
    engine.check_finished(asks)
    for ask in asks:
        for choice, (expected, got) in enumerate(zip(answers(ask), engine.answers(ask), strict=True)):
            if got.finish is Finish.ERROR:
                assert "a step failed: injected" == engine.deltas[ask.request.id, choice][-1].error
                assert is_beginning(got, expected)
            else:
                assert expected == got


@settings(max_examples=60, deadline=None)
@given(engine=engines(), asks=asks_strategy(), limit=st.integers(2, 12))
def test_out_of_memory_is_met_by_smaller_steps(engine: Engine, asks: list[Ask], limit: int) -> None:
    """A device with room for few tokens a step still gives everybody the right answer."""
    engine.runner.max_tokens = limit
    engine.add_all(asks)
    engine.run()
    check_answers(engine, asks)


def test_the_samples_of_a_prompt_compute_it_once() -> None:
    """n = 4 over a prompt of 33 tokens: 33 tokens for the first, and the unshared end for each of the others."""
    engine = Engine(budget=64)
    engine.add(greedy(1, tuple(range(33)), 2, n=4))
    engine.run()
    assert 33 + 3 * 1 == len(engine.runner.launches[0].token_ids)
    assert 0 == engine.deltas[1, 0][0].cached_tokens


def test_a_repeated_prompt_is_a_prefix_hit_and_gives_the_same_tokens() -> None:
    """cached_tokens tells the hit; the answer does not change."""
    engine = Engine()
    first, second = greedy(1, tuple(range(30)), 5), greedy(2, tuple(range(30)), 5)
    engine.add(first)
    engine.run()
    engine.add(second)
    engine.run()
    assert 28 == engine.deltas[2, 0][0].cached_tokens
    assert engine.tokens(first) == engine.tokens(second)


def test_a_long_prompt_does_not_stall_a_running_stream() -> None:
    """Every step until the long prompt is through also computes a token for the stream, within the budget."""
    engine = Engine(budget=10)
    engine.add(greedy(1, (1, 2), 40))
    engine.step()
    engine.add(greedy(2, tuple(range(60)), 1))
    before = len(engine.deltas[1, 0])
    for _ in range(6):
        engine.step()
    assert before + 6 == len(engine.deltas[1, 0])
    assert max(len(batch.token_ids) for batch in engine.runner.launches) <= 10


def test_requests_start_in_the_order_they_came() -> None:
    """Told before their launch, first come first, each once."""
    engine = Engine(max_num_seqs=2, num_blocks=20)
    for request_id in (5, 3, 4):
        engine.add(greedy(request_id, (1, 2, 3), 3, n=2))
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
    engine.add_all([greedy(number, (number,) * 10, 50) for number in range(4)])
    engine.run()
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0
    assert (40, 0) == (stats.num_prefix_queries, stats.num_prefix_hits)
    assert {0} == {delta.cached_tokens for deltas in engine.deltas.values() for delta in deltas}


def test_preemption_happens_and_is_counted() -> None:
    """Two sequences that outgrow the blocks together: one is preempted, both are right."""
    engine = Engine(num_blocks=16, block_size=4)
    asks = [greedy(1, (1, 2), 50), greedy(2, (3, 4), 50)]
    engine.add_all(asks)
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    check_answers(engine, asks)


def test_a_row_that_is_not_finite_ends_its_sequence_with_an_error() -> None:
    """Never with a token; its neighbour goes on."""
    engine = Engine()
    for request_id in (1, 2):
        engine.add(greedy(request_id, (request_id, 2), 4))
    batch = engine.scheduler.schedule()
    assert batch is not None
    engine.runner.launch(batch)
    output = engine.runner.collect()
    output.token_ids[0] = -1
    engine.record(engine.scheduler.commit(output))
    engine.run()
    assert (Finish.ERROR, []) == (engine.answer(1, 0).finish, engine.answer(1, 0).tokens)
    assert answers(greedy(2, (2, 2), 4)) == [engine.answer(2, 0)]


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_past_a_stop_are_dropped_and_counted(depth: int) -> None:
    """With a step in flight one token past the stop is computed; it is in no Delta."""
    engine = Engine(depth=depth)
    first = alone(greedy(1, (1, 2), 8))[0]
    stop_at = next(i for i, token in enumerate(first) if token not in first[:i] and i > 1)
    ask = greedy(1, (1, 2), 8, stop_token_ids=(first[stop_at],))
    engine.add(ask)
    engine.run()
    assert [first[: stop_at + 1]] == engine.tokens(ask)
    assert Finish.STOP is engine.deltas[1, 0][-1].finish
    assert depth == engine.scheduler.stats().num_dropped_tokens


def lines_of(work: Callable[[], object]) -> int:
    """Lines of the service's Python that it runs."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal count
        count += event == "line" and "/service/" in frame.f_code.co_filename
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    work()
    sys.settrace(None)
    return count


def decoding(num_sequences: int, *, depth: int) -> Engine:
    """An engine whose sequences all decode, and need blocks in different steps."""
    engine = Engine(num_blocks=num_sequences * 16, max_num_seqs=num_sequences, budget=num_sequences + 2048, depth=depth)
    for number in range(num_sequences):
        engine.add(greedy(number, tuple(range(1 + number % 4)), 40))
    for _ in range(6):
        engine.step()
    return engine


@pytest.mark.parametrize("depth", [0, 1])
def test_host_work_a_step_grows_in_line_with_the_running_sequences(depth: int) -> None:
    """Lines of Python run by a decode step, all of it: with eight times the sequences no more than eight times."""

    def lines(num_sequences: int) -> int:
        engine = decoding(num_sequences, depth=depth)
        return lines_of(engine.core.step) + lines_of(engine.scheduler.take_held)

    assert lines(256) <= 8 * lines(32)


@pytest.mark.parametrize("depth", [0, 1])
def test_host_work_of_a_decode_does_not_grow_with_its_sequences(depth: int) -> None:
    """Where nobody needs a block a step runs as many lines for 128 sequences as for 2."""

    def lines(num_sequences: int) -> list[int]:
        engine = Engine(num_blocks=2048, block_size=16, max_num_seqs=128, budget=2048, depth=depth)
        engine.add_all([greedy(number, (number % 90, 1), 20) for number in range(num_sequences)])
        for _ in range(3):
            engine.step()
        return [lines_of(engine.core.step) for _ in range(8)]

    assert lines(2) == lines(128)
