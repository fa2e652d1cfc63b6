"""What a batch carries for the rows that ask for more than a plain one, and that it carries nothing else."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.engine import masks, rows, running, scheduler, sequence
from service.engine.request import Finish, Request
from service.model.batch import Batch
from tests.engine.array_calls import ArrayCalls
from tests.engine.fake_model import VOCAB_SIZE
from tests.engine.harness import Engine, check_answers, greedy
from tests.engine.oracle import Ask

# Array calls of a decode of a plain sequence, commit included: where the batch before was of a prompt, where it repeats
# the one before, and where it needs a block. Recorded; what plain sequences do not ask for must not add to them.
ANEW, REPEATED, GROWING = 61, 23, 77


def plain(request_id: int, prompt: tuple[int, ...]) -> Ask:
    """With everything that a row of SAMPLING says by itself."""
    return greedy(request_id, prompt, 8, temperature=1.0, top_p=0.9, min_tokens=2)


def demanding(request_id: int, prompt: tuple[int, ...], max_tokens: int = 8, **params: Any) -> Ask:
    """With everything else; its tokens are few, and come again and again."""
    everything: dict[str, Any] = {
        "allowed_token_ids": tuple(range(20)),
        "bad_words": ((1, 2), (3, 4)),
        "presence_penalty": 0.5,
        "logit_bias": ((5, 1.0), (7, -2.0)),
        "num_logprobs": 3,
    }
    ask = greedy(request_id, prompt, max_tokens, **(everything | params))
    return replace(ask, request=Request(request_id, prompt, score_from=1), completing_ids=bytes([1, *[0] * 12]))


def extras(batch: Batch) -> list[object]:
    return [batch.masks, batch.biases, batch.histories, batch.scored, batch.logprobs or None]


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch, num_steps: int) -> list[Counter[str]]:
    """The array calls of each step: functions, methods, operators and indexing; its batch must be a plain one."""
    numpy = ArrayCalls()
    assert not hasattr(scheduler, "np"), "then it must be watched too"
    held = engine.scheduler._rows
    for name, value in vars(held).items():
        setattr(held, name, numpy.watch(value))
    calls = []
    with monkeypatch.context() as patch:
        for module in (rows, running, masks, sequence):
            patch.setattr(module, "np", numpy)
        for _ in range(num_steps):
            numpy.calls.clear()
            numpy.counting = True
            batch = engine.scheduler.schedule()
            numpy.counting = False
            assert batch is not None
            assert [None] * 5 == extras(batch)
            engine.runner.launch(batch)
            output = engine.runner.collect()
            watched = replace(output, token_ids=numpy.watch(output.token_ids))
            numpy.counting = True
            engine.record(engine.scheduler.commit(watched))
            numpy.counting = False
            calls.append(+numpy.calls)
    return calls


def test_a_plain_batch_calls_as_much_in_rows_that_demanding_sequences_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step by step, with prompts of several steps and decodes in one batch."""
    calls = []
    for after_others in (False, True):
        engine = Engine(num_blocks=64, budget=16)
        if after_others:
            engine.add_all([demanding(number, (number, 50, 60)) for number in range(10, 18)])
            engine.run()
        for number, length in enumerate((3, 9, 21)):
            engine.add(plain(number, tuple(range(number * 20, number * 20 + length))))
        calls.append(counted(engine, monkeypatch, 6))
    assert calls[0] == calls[1]


def test_a_decode_calls_as_much_for_many_sequences_as_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is made anew, repeats the batch before, or takes blocks; but for what each block costs."""
    of_blocks = {"getitem", "tobytes"}
    calls = []
    for num_sequences in (1, 7):
        engine = Engine(num_blocks=64, budget=16)
        engine.add_all([plain(number, (number,)) for number in range(num_sequences)])
        engine.step()
        calls.append(counted(engine, monkeypatch, 6))
    assert [ANEW, REPEATED, REPEATED, GROWING, REPEATED, REPEATED] == [step.total() for step in calls[0]]
    for one, many in zip(*calls, strict=True):
        kept = [{name: count for name, count in step.items() if name not in of_blocks} for step in (one, many)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_repeated_batch_is_what_would_be_made_anew(depth: int) -> None:
    """Field by field, but for the ids of tokens in flight; and it is repeated whenever nothing else is to do."""
    asks = [plain(number, tuple(range(number, 2 * number + 1))) for number in range(5)]
    engines = [Engine(block_size=16, depth=depth), Engine(block_size=16, depth=depth)]
    num_repeated = 0
    for engine in engines:
        engine.add_all(asks)
    repeating, anew = engines
    while not anew.core.idle:
        before = repeating.scheduler._last
        anew.scheduler._last = None
        for engine in engines:
            engine.step()
        last = repeating.scheduler._last
        num_repeated += bool(before and last and before is not last and before[0].block_tables is last[0].block_tables)
    assert num_repeated >= 3
    for one, other in zip(*(engine.runner.launches for engine in engines), strict=True):
        for name in Batch.__slots__:
            expected, got = getattr(other, name), getattr(one, name)
            if name == "token_ids":
                expected, got = (np.where(one.token_sources < 0, ids, 0) for ids in (expected, got))
            np.testing.assert_array_equal(expected, got)
    check_answers(repeating, asks)


def test_array_calls_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to make numpy work counts once, so that the test above can fail."""
    numpy = ArrayCalls()
    numpy.counting = True
    array = numpy.zeros(4, np.int32) + 1
    array[1:] *= 2
    assert 7 == array.sum()
    assert [1, 2, 2, 2] == numpy.concatenate([array[:1], array[1:]]).tolist()
    expected = {"zeros": 1, "add": 1, "getitem": 3, "multiply": 1, "setitem": 1, "sum": 1, "concatenate": 1}
    assert Counter(expected | {"tolist": 1}) == numpy.calls


def test_what_a_row_asks_for_comes_with_its_samples_and_not_before() -> None:
    """While a prompt is computed in pieces, a step scores tokens and nothing more."""
    engine = Engine(budget=8)
    ask = demanding(1, tuple(range(20, 40)))
    engine.add(ask)
    engine.run()
    asked = [[extra is not None for extra in extras(batch)] for batch in engine.runner.launches]
    scoring, both, sampling = [[False] * 3 + [True, False], [True] * 5, [True] * 3 + [False, True]]
    assert [scoring, scoring, both, *[sampling] * 7] == asked
    check_answers(engine, [ask])


def test_rows_that_ask_for_nothing_stay_as_they_are() -> None:
    """Beside a demanding row: every token allowed, no history, no bias."""
    engine = Engine(budget=32)
    asks = [plain(1, (1, 2, 3)), demanding(2, (4, 5)), plain(3, (6,))]
    engine.add_all(asks)
    engine.step()
    batch = engine.runner.launches[0]
    prompts = batch.sampling["num_prompt"].tolist()
    assert batch.masks is not None
    assert batch.biases is not None
    assert batch.histories is not None
    for row, num_prompt in enumerate(prompts):
        assert (num_prompt == 2) == (row in batch.biases.rows)
        assert (num_prompt != 2) == (batch.masks[row] == -1).all()
        assert (num_prompt != 2) == (batch.histories[row] == -1).all()
        assert (0 if num_prompt == 2 else num_prompt + 2) == batch.sampling["min_length"][row]
    engine.run()
    check_answers(engine, asks)


def test_biases_name_their_rows() -> None:
    """One entry a biased id of each row, in order."""
    engine = Engine(budget=32)
    first, second = ((5, 1.0), (7, -2.0)), ((5, 3.5),)
    engine.add_all([greedy(1, (1,), 5, logit_bias=first), greedy(2, (2,), 5, n=2, logit_bias=second)])
    engine.step()
    biases = engine.runner.launches[0].biases
    assert biases is not None
    assert [0, 0, 1, 2] == biases.rows.tolist()
    assert [5, 7, 5, 5] == biases.token_ids.tolist()
    assert [1.0, -2.0, 3.5, 3.5] == biases.values.tolist()
    assert ["int32", "int32", "float32"] == [str(each.dtype) for each in (biases.rows, biases.token_ids, biases.values)]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_history_holds_all_but_the_rows_last_token(depth: int) -> None:
    """Of prompt and output, as wide as the longest needs, also where that last token is still in flight."""
    engine = Engine(depth=depth, budget=32)
    asks = [greedy(1, (1, 2, 3), 6, presence_penalty=1.0), greedy(2, (9,), 6, repetition_penalty=1.5)]
    engine.add_all(asks)
    engine.run()
    whole = {len(ask.request.prompt): [*ask.request.prompt, *engine.tokens(ask)[0]] for ask in asks}
    batches = engine.runner.launches
    assert 6 == len(batches)
    for number, batch in enumerate(batches):
        assert batch.histories is not None
        assert 2 + number == batch.histories.shape[1]
        for num_prompt, history in zip(batch.sampling["num_prompt"].tolist(), batch.histories.tolist(), strict=True):
            known = whole[num_prompt][: num_prompt + number - 1]
            assert [*known, *[-1] * (2 + number - len(known))] == history
        assert (depth == 1 and number > 0) == bool((batch.token_sources >= 0).any())


def test_a_prefix_hit_ends_before_the_first_token_that_is_scored() -> None:
    """Its log-probability needs the hidden state of the one before; the scores are those of a cold prompt."""
    engine = Engine()
    prompt = tuple(range(30))
    warm = greedy(1, prompt, 2)
    asks = [
        Ask(Request(2 + score_from, prompt, score_from=score_from), greedy(0, (), 3, num_logprobs=2).params)
        for score_from in (1, 4, 5, 10, 29, 30)
    ]
    engine.add(warm)
    engine.run()
    for ask in asks:
        engine.add(ask)
        engine.run()
    assert [0, 0, 4, 8, 28, 28] == [engine.deltas[ask.request.id, 0][0].cached_tokens for ask in asks]
    check_answers(engine, [warm, *asks])


@pytest.mark.parametrize("length", [1, 30, 64])
def test_with_max_tokens_0_a_prompt_is_scored_and_nothing_generated(length: int) -> None:
    """Up to the whole context; the one Delta ends the sequence with LENGTH."""
    engine = Engine()
    prompt = tuple(number % VOCAB_SIZE for number in range(length))
    ask = Ask(Request(1, prompt, 2, score_from=1), greedy(0, (), 0, num_logprobs=1).params)
    engine.add(ask)
    engine.run()
    check_answers(engine, [ask])
    (scored,), (other,) = engine.deltas[1, 0], engine.deltas[1, 1]
    for delta in (scored, other):
        assert (Finish.LENGTH, (), None) == (delta.finish, delta.token_ids, delta.logprobs)
    assert scored.prompt_logprobs is not None
    assert 4 * (length - 1) == len(scored.prompt_logprobs.chosen)
    assert other.prompt_logprobs is None
    assert 0 == engine.scheduler.stats().num_dropped_tokens


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_top_p_falls_with_each_token_to_its_bound(depth: int, bound: float) -> None:
    """By the tokens that the row has generated, those in flight included; also after it gave its blocks up."""
    engine = Engine(num_blocks=16, max_num_seqs=4, budget=8, depth=depth)
    falls = {"temperature": 1.0, "top_p": 0.9, "top_p_decay": 0.8, "top_p_bound": bound}
    asks = [greedy(number, tuple(range(number)), 40, **falls) for number in range(1, 4)]
    steady = greedy(9, tuple(range(9)), 40, temperature=1.0, top_p=0.7)
    engine.add_all([*asks, steady])
    engine.run()
    assert engine.scheduler.stats().num_preemptions
    seen = set()
    for batch in engine.runner.launches:
        for row, position in zip(batch.sampling, batch.sample_positions.tolist(), strict=True):
            num_generated = position - int(row["num_prompt"])
            if row["num_prompt"] == 9:
                assert np.float32(0.7) == row["top_p"]
            else:
                assert pytest.approx(max(0.9 * 0.8**num_generated, bound), rel=1e-6) == row["top_p"]
                seen.add((int(row["num_prompt"]), num_generated))
    assert {(number, place) for number in range(1, 4) for place in range(40)} == seen
    check_answers(engine, [*asks, steady])
