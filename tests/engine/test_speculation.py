"""Drafts: no text changes by them, they take nothing from others, and there are few where they are wrong."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.request import Finish, Logprobs
from service.engine.running import Running
from service.engine.sequence import Sequence as EngineSequence
from service.engine.speculation import FIXED_ROWS, MOST_SAMPLED, Chances, StepCost, propose
from service.model.batch import Batch, Float32
from tests.engine import fake_runner
from tests.engine.fake_model import REPEATS_FROM, VOCAB_SIZE
from tests.engine.harness import Engine, check_answers, greedy
from tests.engine.oracle import Ask, alone, answers

REPEATING = (80, 81, 82, 83, 84, 85)  # continued by itself, but for a token now and then
NOISE = (3, 4, 5, 6, 7, 8)


# Proposals


def slowly(tokens: Sequence[int], most: int) -> tuple[int, list[int]]:
    """The longest end of up to four tokens that stood before, the latest time; what followed, round and round."""
    for match in (4, 3, 2):
        for start in range(len(tokens) - match - 1, -1, -1):
            if tokens[start : start + match] == tokens[-match:]:
                after = list(tokens[start + match :])
                return match, [after[number % len(after)] for number in range(most)]
    return 0, []


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), most=st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_proposals_are_what_followed_the_latest_of_the_longest_matches(tokens: list[int], most: int) -> None:
    match, found = propose(np.asarray(tokens, np.int32), most=most)
    assert slowly(tokens, most) == (match, found.tolist())


# The same text


@st.composite
def repeating_asks(draw: st.DrawFn) -> list[Ask]:
    """Requests whose texts repeat, and stop, urge, score and adjust in the middle of that."""
    asks = []
    for number in range(draw(st.integers(1, 8))):
        prompt = (*REPEATING, *draw(st.lists(st.integers(80, 90), max_size=6)))
        params: dict[str, Any] = {
            "temperature": draw(st.sampled_from([0.0, 1.0])),
            "seed": number,
            "num_logprobs": draw(st.sampled_from([None, 0, 3])),
            "ignore_eos": draw(st.booleans()),
            "min_tokens": draw(st.integers(0, 8)),
        }
        params |= draw(
            st.sampled_from(
                [
                    {},
                    {"stop_token_ids": (prompt[draw(st.integers(0, len(prompt) - 1))],)},
                    {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1},
                    {"logit_bias": ((prompt[-1], -3.0),), "banned_token_ids": (prompt[0],)},
                    {"bad_words": ((prompt[1], prompt[2]),)},
                    {"grammar": "two"},
                    {"top_p": 0.9, "top_p_decay": 0.9},
                ]
            )
        )
        n = draw(st.sampled_from([1, 1, 3]))
        ask = greedy(number, prompt, draw(st.integers(0, 64 - len(prompt))), n=n, **params)
        completing_ids = draw(st.sampled_from([b"", bytes([0] * 10 + [255, 7, 0])]))
        asks.append(Ask(ask.request, ask.params, completing_ids, patient=draw(st.booleans())))
    return asks


@st.composite
def drafting_engines(draw: st.DrawFn) -> Engine:
    block_size = draw(st.sampled_from([1, 3, 16]))
    least = -(-64 // block_size)
    max_num_seqs = draw(st.integers(1, 6))
    return Engine(
        num_blocks=least + draw(st.integers(0, 2 * least)),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + draw(st.integers(0, 40)),
        publish_every=draw(st.sampled_from([1, 3, 1000])),
        drafts=draw(st.sampled_from([1, 3, 8])),
    )


@given(engine=drafting_engines(), asks=repeating_asks())
@settings(max_examples=150, deadline=None)
def test_drafts_change_nothing_of_any_answer(engine: Engine, asks: list[Ask]) -> None:
    """Tokens, log-probabilities and finish are those of each alone, in any shortage; a step is within its budget, and
    of a sequence it has no more drafts than it may; the host is told of sequences, not of rows."""
    engine.add_all(asks)
    engine.run()
    check_answers(engine, asks)
    for batch in engine.runner.launches:
        assert len(batch.token_ids) <= engine.budget
        tables = [tuple(table) for table in batch.block_tables[: batch.num_decodes].tolist()]
        assert all(tables.count(table) <= 1 + engine.drafts for table in tables)
    assert engine.scheduler.num_sampled <= engine.scheduler.num_steps * engine.max_num_seqs
    stats = engine.scheduler.stats()
    assert 0 <= stats.num_accepted_tokens <= stats.num_draft_tokens


def test_a_repeating_text_takes_fewer_steps() -> None:
    """One sequence of 50 tokens, greedy: right drafts are counted, and each saves a step."""
    ask = greedy(1, REPEATING, 50, num_logprobs=2)
    engine = Engine(drafts=8)
    engine.add(ask)
    engine.run()
    check_answers(engine, [ask])
    stats = engine.scheduler.stats()
    assert 50 == engine.scheduler.num_steps + stats.num_accepted_tokens
    assert 25 <= stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("patient", [False, True])
def test_a_stop_in_the_middle_of_right_drafts_ends_the_text_there(patient: bool) -> None:
    """What was right past it is in no Delta, and is counted as dropped."""
    period = (1, 2, 3, 4, 5, 6, 7)
    num_dropped = []
    for length, stop in enumerate(period, 1):
        asked = greedy(1, (84, *period, *period), 30, stop_token_ids=(stop,))
        engine = Engine(drafts=8)
        engine.add(ask := Ask(asked.request, asked.params, patient=patient))
        engine.run()
        check_answers(engine, [ask])
        assert (list(period[:length]), Finish.STOP) == (engine.answer(1, 0).tokens, engine.answer(1, 0).finish)
        num_dropped.append(engine.scheduler.stats().num_dropped_tokens)
    assert 1 in num_dropped


def test_what_follows_tokens_is_not_drafted() -> None:
    """A grammar or bad words of several tokens say of each token what may come after it; others beside them are."""
    asks = [
        greedy(1, REPEATING, 30, bad_words=((1, 2),)),
        greedy(2, REPEATING, 30, grammar="two"),
    ]
    engine = Engine(drafts=8)
    engine.add_all(asks)
    engine.run()
    assert 0 == engine.scheduler.stats().num_draft_tokens
    other = greedy(3, REPEATING, 30)
    engine.add_all([Ask(asks[0].request, asks[0].params), other])
    engine.run()
    assert 0 < engine.scheduler.stats().num_accepted_tokens


# What drafts take from others


@given(data=st.data(), block_size=st.sampled_from([1, 3, 16]), drafts=st.sampled_from([1, 8]))
@settings(max_examples=60, deadline=None)
def test_nobody_is_preempted_for_a_draft(data: st.DataObject, block_size: int, drafts: int) -> None:
    """Sequences that fit in the blocks to their ends are not preempted, however many drafts are wrong."""
    asks = []
    num_blocks = -(-64 // block_size)
    for number in range(data.draw(st.integers(1, 6))):
        prompt = (*REPEATING, number, number)
        ask = greedy(number, prompt, data.draw(st.integers(1, 50)))
        asks.append(ask)
    # One block each at admission besides its own (Running.admit), then as many as its last token but one needs.
    needed = sum(-(-(8 + ask.params.max_tokens) // block_size) for ask in asks) + len(asks)
    engine = Engine(num_blocks=max(num_blocks, needed), block_size=block_size, budget=200, drafts=drafts)
    engine.add_all(asks)
    engine.run()
    check_answers(engine, asks)
    assert 0 == engine.scheduler.stats().num_preemptions


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_draft_takes_no_block_that_others_may_need_next(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes blocks only if each sequence that runs can go as far then; else it stays within its sequence's own."""
    num_grown, num_held_back = 0, 0
    grow_draft = Running.grow_draft

    def watched(running: Running, sequence: EngineSequence, count: int) -> int:
        nonlocal num_grown, num_held_back
        before = running.pool.num_free
        room = grow_draft(running, sequence, count)
        if running.pool.num_free < before:
            num_grown += 1
            assert running.pool.num_free >= len(running) * running.pool.blocks_for(count)
        num_held_back += room < count
        return room

    monkeypatch.setattr(Running, "grow_draft", watched)
    asks = [greedy(number, (*REPEATING, 80, 81), 40) for number in range(4)]
    engine = Engine(num_blocks=100 // block_size, block_size=block_size, budget=100, drafts=8)
    engine.add_all(asks)
    engine.run()
    check_answers(engine, asks)
    assert num_grown > 0
    assert num_held_back > 0


def test_prompts_come_before_drafts() -> None:
    """A step that a prompt fills has none: the budget is for what is asked first."""
    engine = Engine(budget=9, drafts=8)
    engine.add(greedy(1, REPEATING, 50))
    for _ in range(6):
        engine.step()
    drafted = engine.scheduler.stats().num_draft_tokens
    assert drafted > 0
    engine.add(greedy(2, tuple(range(40)), 1))
    for _ in range(5):
        engine.step()
        assert 9 == len(engine.runner.launches[-1].token_ids)
    assert drafted == engine.scheduler.stats().num_draft_tokens


# Undone steps


def test_an_undone_step_is_computed_again_without_its_drafts() -> None:
    """Out of memory: where its sequences stood is where they stand again, and nothing drafted was told."""
    engine = Engine(drafts=8, budget=40)
    asks = [greedy(number, REPEATING, 40) for number in range(3)]
    engine.add_all(asks)
    engine.step()
    engine.runner.max_tokens = 3
    engine.run()
    check_answers(engine, asks)
    undone = [batch for batch in engine.runner.launches[1:] if len(batch.token_ids) > 3]
    assert undone
    assert all(map(rows_of_drafts, undone))
    assert 0 == engine.scheduler.stats().num_preemptions


def rows_of_drafts(batch: Batch) -> int:
    tables = {tuple(table) for table in batch.block_tables[: batch.num_decodes].tolist()}
    return batch.num_decodes - len(tables)


# When there are drafts


def test_text_that_does_not_repeat_has_no_drafts_soon_and_has_some_again_when_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first two of three tokens come again and again, and between positions 21 and 42 the third never does."""

    def scripted(context: Sequence[int]) -> Float32:
        position = len(context)
        token = 20 + position if 21 <= position < 42 and not position % 3 else position % 3
        return np.eye(VOCAB_SIZE, dtype=np.float32)[token]

    monkeypatch.setattr(fake_runner, "logits", scripted)
    engine = Engine(drafts=8)
    engine.add(greedy(1, (0, 1, 2), 60))
    drafts = {}  # by position
    while not engine.core.idle:
        engine.step()
        batch = engine.runner.launches[-1]
        drafts[int(batch.positions[0])] = len(batch.positions) - 1
    assert [position % 3 for position in range(42, 63)] == engine.answer(1, 0).tokens[-21:]
    assert sum(count for position, count in drafts.items() if position < 21) > 8
    assert 0 == sum(count for position, count in drafts.items() if 30 <= position < 42)
    assert sum(count for position, count in drafts.items() if position >= 42) > 8


def test_a_match_of_two_is_not_drafted_before_one_has_come_true() -> None:
    """Though a lone stream's rows cost little."""
    engine = Engine(drafts=8)
    engine.add(greedy(1, (5, 1, 2, 6, 1, 2), 10))
    engine.step()
    engine.step()
    assert [6, 1] == [len(batch.token_ids) for batch in engine.runner.launches]


def test_chances_are_of_late_and_by_length() -> None:
    """A match of two that comes to nothing says nothing of one of four; and two hits make good for many misses."""
    chances = Chances()
    before = [chances.of(match) for match in (2, 3, 4)]
    assert before == sorted(before)
    for _ in range(30):
        chances.take(2, False)
    assert chances.of(2) < 0.02
    assert before[1:] == [chances.of(3), chances.of(4)]
    assert chances.of(7) == chances.of(4)
    for _ in range(3):
        chances.take(2, True)
    assert chances.of(2) > 0.3


@pytest.mark.parametrize(("fixed", "a_row"), [(0.010, 0.001), (0.010, 0.0002), (0.002, 0.0005)])
def test_the_cost_of_a_row_is_measured(fixed: float, a_row: float) -> None:
    """From steps of several sizes, with noise of a tenth and steps that something else delays."""
    random = np.random.default_rng(0)
    cost = StepCost()
    for number in range(400):
        num_rows = 1 + number % 9
        seconds = (fixed + a_row * num_rows) * random.uniform(0.95, 1.05)
        cost.take(num_rows, seconds * (20 if number % 50 == 49 else 1))
    assert 0.5 < cost.fixed_rows / (fixed / a_row) < 1.6


def test_without_steps_of_several_sizes_the_cost_is_what_was_assumed() -> None:
    """Also after it has been measured."""
    cost = StepCost()
    assumed = cost.fixed_rows
    for num_rows in (1, 8) * 50:
        cost.take(num_rows, 0.001 * num_rows + 0.001)
    assert cost.fixed_rows < assumed / 2
    for _ in range(500):
        cost.take(1, 0.002)
    assert cost.fixed_rows == pytest.approx(assumed, rel=0.05)


def test_more_sequences_need_better_chances() -> None:
    """The same texts have fewer drafts each where a step has many rows already; noise beside them has none."""
    per_sequence = []
    for num_sequences in (1, 8):
        asks = [greedy(number, (*REPEATING, number), 40) for number in range(num_sequences)]
        engine = Engine(num_blocks=200, budget=100, drafts=8)
        engine.add_all(asks)
        engine.run()
        check_answers(engine, asks)
        per_sequence.append(engine.scheduler.stats().num_draft_tokens / num_sequences)
    assert per_sequence[1] < 0.8 * per_sequence[0]


@pytest.mark.parametrize("num_repeating", [1, 3, 15])
def test_who_has_no_drafts_does_not_wait_long_for_those_of_others(num_repeating: int) -> None:
    """Beside a text that is noise, a step has no more rows than take a quarter of its time; alone, texts have more."""
    most = []
    for num_others in (1, 0):
        asks = [greedy(number, (*REPEATING, number), 40) for number in range(num_repeating)]
        asks += [greedy(100, (5, 7), 40)] * num_others
        engine = Engine(num_blocks=400, budget=200, max_num_seqs=16, drafts=8)
        engine.add_all(asks)
        engine.run()
        check_answers(engine, asks)
        decodes = [batch for batch in engine.runner.launches if batch.num_decodes == len(batch.token_ids)]
        most.append(max(len(batch.token_ids) for batch in decodes if not num_others or is_noise_in(batch)))
    assert most[0] <= 1.25 * (FIXED_ROWS + num_repeating + 1) - FIXED_ROWS + 1
    assert most[0] < most[1] <= MOST_SAMPLED


def is_noise_in(batch: Batch) -> bool:
    """Whether the text of the test above that begins with 5 has a row."""
    return bool((batch.sampling["num_prompt"] == 2).any())


@pytest.mark.parametrize("block_size", [4, 16])
def test_blocks_filled_by_drafts_are_found_too(block_size: int) -> None:
    """As many tokens of a text's next turn are found as without drafts, but for less than a block a text."""
    hits = []
    for drafts in (0, 8):
        engine = Engine(num_blocks=100, block_size=block_size, drafts=drafts)
        for number in range(8):
            ask = greedy(2 * number, (84 + number % 4, *range(number, number + 9), *REPEATING[1:]), 37 + number)
            engine.add(ask)
            engine.run()
            said = engine.answer(2 * number, 0).tokens
            engine.add(greedy(2 * number + 1, (*ask.request.prompt, *said, 1), 1))
            engine.run()
        hits.append(engine.scheduler.stats().num_prefix_hits)
    assert hits[0] - 8 * block_size < hits[1]


def test_logprobs_are_those_of_each_accepted_token() -> None:
    """In order, also where several come of one step."""
    ask = greedy(1, REPEATING, 30, num_logprobs=3, temperature=1.0, seed=5)
    engine = Engine(drafts=8, publish_every=1000)
    engine.add(ask)
    engine.run()
    (expected,) = answers(ask)
    got = engine.answer(1, 0)
    assert isinstance(got.logprobs, Logprobs)
    assert expected == got
    assert engine.scheduler.stats().num_accepted_tokens > 0


def test_the_fake_model_repeats_and_does_not() -> None:
    """So that the tests above can fail."""
    assert REPEATING[0] >= REPEATS_FROM > NOISE[0]
    repeating, noise = (alone(greedy(1, prompt, 50))[0] for prompt in (REPEATING, NOISE))
    assert len(set(repeating)) < 20 < len(set(noise))
