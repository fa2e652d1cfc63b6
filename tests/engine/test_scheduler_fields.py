"""What single fields of a request make the scheduler do: priority, salt, grammar, bad words, log-probabilities."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.request import Finish, Request
from service.model.batch import Int32
from tests.engine.fake_grammar import FakeConstraint
from tests.engine.fake_model import END_OF_TEXT
from tests.engine.harness import Engine, check_answers, greedy
from tests.engine.oracle import Ask, alone


def started_in(engine: Engine) -> list[int]:
    """Run to the end; requests in the order in which they left the queue."""
    started: list[int] = []
    while not engine.core.idle:
        engine.record(engine.core.step(started.extend))
    return list(dict.fromkeys(started))


# Priority


@given(priorities=st.lists(st.integers(-2, 2), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_requests_leave_the_queue_by_priority_then_arrival(priorities: list[int]) -> None:
    """Lower first, whatever their ids."""
    engine = Engine(max_num_seqs=1)
    for number, priority in enumerate(priorities):
        engine.add(greedy(100 - number, (number,), 1, priority=priority))
    ordered = sorted(range(len(priorities)), key=lambda number: (priorities[number], number))
    assert [100 - number for number in ordered] == started_in(engine)


def waiting_in(engine: Engine) -> list[int]:
    """Ids of the requests that wait, in the order of their priorities and turns."""
    lines = sorted(engine.scheduler._waiting._lines.items())
    return [sequence.request.id for _, line in lines for sequence in line.sequences]


def test_the_worst_of_the_running_is_preempted_and_comes_back_before_those_that_came_later() -> None:
    """Of equal priority the one that came last; a preempted sequence keeps its place among those that wait."""
    engine = Engine(num_blocks=16, block_size=4, max_num_seqs=3)
    asks = [greedy(1, (1,), 40, priority=5), greedy(2, (2,), 40), greedy(3, (3,), 40)]
    engine.add_all(asks)
    engine.step()
    late = [greedy(4, (4,), 40, priority=5), greedy(5, (5,), 3, priority=4)]
    engine.add_all(late)
    scheduler = engine.scheduler
    while not scheduler.stats().num_preemptions:
        engine.step()
    assert [2, 3] == [sequence.request.id for sequence in scheduler._running]
    assert [5, 1, 4] == waiting_in(engine)
    while scheduler.stats().num_preemptions == 1:  # in between, request 5 comes and goes
        engine.step()
    assert [2] == [sequence.request.id for sequence in scheduler._running]
    assert [3, 1, 4] == waiting_in(engine)
    engine.run()
    check_answers(engine, [*asks, *late])


# Salt


def test_blocks_are_shared_only_within_one_salt() -> None:
    """Neither with another salt nor with none; the answers are the same."""
    engine = Engine(num_blocks=64)
    prompt = tuple(range(30))
    asks = []
    for number, salt in enumerate(("a", "", "b", "a", "", "b", "0")):
        ask = greedy(number, prompt, 3)
        asks.append(replace(ask, request=Request(number, prompt, cache_salt=salt)))
        engine.add(asks[-1])
        engine.run()
    assert [0, 0, 0, 28, 28, 28, 0] == [engine.deltas[number, 0][0].cached_tokens for number in range(7)]
    check_answers(engine, asks)


# Grammars


def test_a_grammar_is_waited_for_outside_the_queue() -> None:
    """Nothing is there to step meanwhile; those that came later go first; it is counted as waiting."""
    engine = Engine(max_num_seqs=1)
    constrained, plain = greedy(1, (1, 2), 5, n=2, grammar="one"), greedy(2, (3,), 2)
    engine.add(constrained)
    assert engine.core.idle
    assert 2 == engine.scheduler.stats().num_waiting
    engine.add(plain)
    engine.run()
    assert engine.core.idle
    assert 2 == engine.scheduler.stats().num_waiting
    engine.supply(constrained)
    assert [1] == started_in(engine)
    check_answers(engine, [constrained, plain])


def test_a_request_that_waits_for_its_grammar_can_be_ended() -> None:
    """By an abort, of a choice or all, or because the grammar is refused; a constraint that comes later is nothing."""
    engine = Engine()
    asks = [greedy(number, (1, 2), 5, n=2, grammar="one") for number in (1, 2)]
    for ask in asks:
        engine.add(ask)
    engine.record(engine.scheduler.abort(1, 0))
    engine.record(engine.scheduler.abort(1, None))
    engine.record(engine.scheduler.refuse(2, "no"))
    for ask in asks:
        engine.supply(ask)
    assert [] == engine.scheduler.refuse(2, "no")
    engine.check_finished(asks)
    assert engine.core.idle
    assert {Finish.ABORT} == {engine.answer(1, choice).finish for choice in (0, 1)}
    assert [(Finish.GRAMMAR, "no")] * 2 == [(d.finish, d.error) for c in (0, 1) for d in engine.deltas[2, c]]


def test_where_nothing_is_allowed_the_text_ends() -> None:
    """Also before min_tokens, and where end of text is ignored."""
    engine = Engine()
    asks = [
        greedy(1, (1, 2), 5, allowed_token_ids=(7,), banned_token_ids=(7,)),
        greedy(2, (1, 2), 5, allowed_token_ids=(END_OF_TEXT,), min_tokens=3, ignore_eos=False),
        greedy(3, (1, 2), 5, allowed_token_ids=(7,), bad_words=((7, 7),)),
    ]
    engine.add_all(asks)
    engine.run()
    check_answers(engine, asks)
    assert [([END_OF_TEXT], Finish.STOP)] * 2 == [
        (engine.answer(number, 0).tokens, engine.answer(number, 0).finish) for number in (1, 2)
    ]
    assert [7, END_OF_TEXT] == engine.answer(3, 0).tokens


def test_a_bad_word_that_the_prompt_begins_is_not_completed() -> None:
    """What stands before may be of the prompt."""
    engine = Engine()
    (first,) = alone(greedy(1, (1, 2), 1))[0]
    ask = greedy(1, (1, 2), 1, bad_words=((1, 2, first),))
    engine.add(ask)
    engine.run()
    assert [first] != engine.answer(1, 0).tokens
    check_answers(engine, [ask])


def test_stop_ids_are_not_sampled_before_min_tokens() -> None:
    """The best token is a stop id: without min_tokens the text ends at it, with it another comes until then."""
    (first, *_) = alone(greedy(1, (1, 2), 6))[0]
    engine = Engine()
    asks = [
        greedy(1, (1, 2), 6, stop_token_ids=(first,)),
        greedy(2, (1, 2), 6, stop_token_ids=(first,), min_tokens=4),
    ]
    engine.add_all(asks)
    engine.run()
    assert [first] == engine.answer(1, 0).tokens
    assert first not in engine.answer(2, 0).tokens[:4]
    check_answers(engine, asks)
    # Past min_tokens there is nothing to mask any more.
    assert [True] * 4 + [False] * 2 == [batch.masks is not None for batch in engine.runner.launches]


@pytest.mark.parametrize("fields", [{"grammar": "one"}, {"bad_words": ((1, 2),)}])
def test_a_sequence_whose_mask_follows_its_tokens_runs_every_second_step(fields: dict[str, Any]) -> None:
    """With a step in flight; the others run in all of them."""
    engine = Engine(depth=1)
    follower, other = greedy(1, (1, 2), 12, **fields), greedy(2, (3, 4), 12)
    engine.add_all([follower, other])
    engine.run()
    num_tokens = len(engine.answer(1, 0).tokens)
    assert num_tokens > 3
    together = [2 if step % 2 == 0 and step // 2 < num_tokens else 1 for step in range(12)]
    assert together + [1] * (num_tokens - 6) == [len(batch.sampling) for batch in engine.runner.launches]
    check_answers(engine, [follower, other])


class Broken(FakeConstraint):
    """Its library fails at one of its calls."""

    def __init__(self, at: str) -> None:
        super().__init__("one")
        self._at = at

    def fill(self, words: Int32) -> None:
        if self._at == "fill":
            raise RuntimeError("too complex")
        super().fill(words)

    def accept(self, token_id: int) -> None:
        if self._at == "accept":
            raise RuntimeError("too complex")
        super().accept(token_id)

    def copy(self) -> FakeConstraint:
        return Broken(self._at)


@pytest.mark.parametrize("at", ["fill", "accept"])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_constraint_that_fails_ends_its_sequence_alone(at: str, depth: int) -> None:
    """With an error that tells why."""
    engine = Engine(depth=depth)
    broken, other = greedy(1, (1, 2), 5, grammar="one"), greedy(2, (1, 2), 5)
    engine.add_all([other])
    engine.add(broken)
    engine.scheduler.supply(1, Broken(at))
    engine.run()
    engine.check_finished([broken, other])
    (delta,) = engine.deltas[1, 0]
    assert (Finish.GRAMMAR, "the grammar failed: too complex", ()) == (delta.finish, delta.error, delta.token_ids)
    assert alone(other) == engine.tokens(other)


# Log-probabilities


@pytest.mark.parametrize("which", ["logprobs", "scores"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_log_probability_that_is_not_finite_ends_its_sequence_with_an_error(which: str, value: float) -> None:
    """Also one of a prompt; its neighbour goes on, and what the step wrote is shared with nobody."""
    engine = Engine(budget=64)
    asks = [
        Ask(Request(number, tuple(range(30)), score_from=29), greedy(0, (), 4, num_logprobs=1).params)
        for number in (1, 2)
    ]
    engine.add_all(asks)
    batch = engine.scheduler.schedule()
    assert batch is not None
    engine.runner.launch(batch)
    output = engine.runner.collect()
    found = getattr(output, which)
    assert found is not None
    found.chosen[0] = value
    engine.record(engine.scheduler.commit(output))
    engine.run()
    engine.check_finished(asks)
    (delta,) = engine.deltas[1, 0]
    assert (Finish.ERROR, "the model gave a number that is not finite") == (delta.finish, delta.error)
    assert alone(asks[1]) == engine.tokens(asks[1])
    again = replace(asks[0], request=Request(3, tuple(range(30))))
    engine.add(again)
    engine.run()
    assert 0 == engine.deltas[3, 0][0].cached_tokens


def test_scores_survive_a_preemption_in_the_middle_of_the_prompt() -> None:
    """Computed again, told once; here by a scheduler that admits it again before the first attempt is committed."""
    engine = Engine(budget=10, num_blocks=16)
    ask = Ask(Request(1, tuple(range(40)), score_from=3), greedy(0, (), 4, num_logprobs=2).params)
    engine.add(ask)
    engine.step()
    batch = engine.scheduler.schedule()
    assert batch is not None
    engine.runner.launch(batch)
    engine.scheduler._running.preempt(next(iter(engine.scheduler._running)))
    again = engine.scheduler.schedule()
    assert again is not None
    engine.runner.launch(again)
    for _ in range(2):
        engine.record(engine.scheduler.commit(engine.runner.collect()))
    engine.run()
    check_answers(engine, [ask])
