"""What a batch may ask of the runner besides a plain draw, driven by hand and compared with transformers."""

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import service.demo
from service.checkpoint.hub import read_config, read_state
from service.model import runner as runner_module
from service.model.batch import NUM_TOP, Biases, Int32, Runner, Scored, StepOutput, TopLogprobs
from service.model.gpt2 import GPT2
from service.model.runner import TorchRunner
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch
from tests.model.conftest import Pair
from tests.model.rows import pack_mask

PROMPTS = [[7, 9], [3, 4, 5, 4, 3, 4], list(range(20, 60)), list(range(400, 500))]
PENALTIES = [
    {"repetition_penalty": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 1.0, "frequency_penalty": 0.7},
    {"repetition_penalty": 0.8, "frequency_penalty": -0.3, "presence_penalty": 1.5},
]


def make_runner(model: GPT2) -> Runner:
    """Room for four sequences; on a GPU the runner of graphs."""
    if model.device.type == "cpu":
        return TorchRunner(model, num_blocks=4 * MOST_BLOCKS, block_size=BLOCK_SIZE)
    from service.model.graphs import GraphRunner

    runner = GraphRunner(
        model, num_blocks=4 * MOST_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=256
    )
    runner.capture()
    return runner


def make_demo(_: Callable[..., Pair]) -> Pair:
    folder = Path(service.demo.__file__).parent / "model"
    config = read_config(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    return theirs, GPT2(config, read_state(folder, config, dtype=torch.float32))


def raw_logits(model: transformers.GPT2LMHeadModel, tokens: list[int]) -> torch.Tensor:
    """[T, V]."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def histories(known: list[list[int]]) -> Int32:
    """Rows of Batch.histories for these tokens before the last."""
    found = np.full((len(known), max(1, *map(len, known))), -1, np.int32)
    for row, tokens in zip(found, known, strict=True):
        row[: len(tokens)] = tokens
    return found


def generate(
    runner: Runner,
    prompts: list[list[int]],
    sampling: list[dict[str, float]],
    num_tokens: int,
    *,
    in_flight: bool = False,
    penalised: bool = True,
    **asked: object,
) -> tuple[list[list[int]], list[StepOutput]]:
    """Tokens of each prompt and every step's output; with `in_flight` a step is launched before the last is known."""
    known = [list(prompt) for prompt in prompts]
    outputs: list[StepOutput] = []

    def collect() -> None:
        outputs.append(runner.collect())
        for tokens, token in zip(known, outputs[-1].token_ids.tolist(), strict=True):
            tokens.append(token)

    for step in range(num_tokens):
        waits = in_flight and step > 0
        parts = []
        for row, (tokens, given) in enumerate(zip(known, sampling, strict=True)):
            context = [*tokens, 0] if waits else tokens
            start = len(context) - 1 if step else 0
            given = given | {"num_prompt": len(prompts[row])}
            parts.append(Part(context, start=start, place=row, source=row if waits else -1, sampling=given))
        if penalised:
            asked["histories"] = histories([tokens if waits else tokens[:-1] for tokens in known])
        runner.launch(make_batch(*parts, **asked))
        if waits or not in_flight:
            collect()
    if in_flight:
        collect()
    return [tokens[len(prompt) :] for tokens, prompt in zip(known, prompts, strict=True)], outputs


def penalise(logits: torch.Tensor, tokens: list[int], num_prompt: int, **given: float) -> torch.Tensor:
    """[V] by transformers for the repetition penalty, by the definition for the other two."""
    process = transformers.RepetitionPenaltyLogitsProcessor(given.get("repetition_penalty", 1.0))
    logits = process(torch.tensor([tokens]), logits[None].clone())[0]
    counts = torch.bincount(torch.tensor(tokens[num_prompt:], dtype=torch.int64), minlength=len(logits))
    return logits - given.get("frequency_penalty", 0) * counts - given.get("presence_penalty", 0) * (counts > 0)


def cut(found: TopLogprobs, start: int, stop: int) -> TopLogprobs:
    return TopLogprobs(*(array[start:stop] for array in astuple(found)))


def check_logprobs(found: TopLogprobs, logits: torch.Tensor, token_ids: list[int]) -> None:
    """Within 1e-4 of transformers' log_softmax [N, V], the best in order, and the chosen equal to its own entry."""
    expected = logits.log_softmax(-1).numpy()
    rows = np.arange(len(token_ids))
    np.testing.assert_allclose(found.chosen, expected[rows, token_ids], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.top, np.sort(expected)[:, : -NUM_TOP - 1 : -1], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.top, expected[rows[:, None], found.top_ids], atol=1e-4, rtol=0)
    is_chosen = found.top_ids == np.asarray(token_ids)[:, None]
    np.testing.assert_array_equal(found.top[is_chosen], found.chosen[is_chosen.any(-1)])


@pytest.mark.parametrize("in_flight", [False, True])
def test_penalties_count_every_token_once(make_pair: Callable[..., Pair], in_flight: bool) -> None:
    """Greedy tokens are the best of transformers' penalised logits, also while the newest token is in flight."""
    theirs, ours = make_pair()
    tokens, _ = generate(make_runner(ours), PROMPTS, PENALTIES, 24, in_flight=in_flight)
    plain, _ = generate(make_runner(ours), PROMPTS, [{}] * 4, 24, penalised=False)
    assert [True, False, False, False] == [a == b for a, b in zip(tokens, plain, strict=True)]
    for prompt, found, given in zip(PROMPTS, tokens, PENALTIES, strict=True):
        logits = raw_logits(theirs, prompt + found)
        for number, token in enumerate(found):
            before = prompt + found[:number]
            expected = penalise(logits[len(before) - 1], before, len(prompt), **given)
            assert expected[token] >= expected.max() - 1e-4


@pytest.mark.parametrize("make", [lambda make_pair: make_pair(), make_demo], ids=["random", "demo"])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_scores_of_a_prompt_equal_transformers(
    make_pair: Callable[..., Pair], make: Callable[[Callable[..., Pair]], Pair], chunk: int
) -> None:
    """Whole or in chunks, of which none but the last samples a token; prompts side by side in one step."""
    theirs, ours = make(make_pair)
    runner = make_runner(ours)
    found: list[list[TopLogprobs]] = [[] for _ in PROMPTS]
    for start in range(0, 100, chunk):
        parts: list[Part] = []
        indices: list[int] = []
        targets: list[int] = []
        counts: dict[int, int] = {}
        for number, prompt in sorted(enumerate(PROMPTS), key=lambda pair: len(pair[1][start : start + chunk])):
            stop = min(start + chunk, len(prompt))
            if start >= stop:
                continue
            at = sum(len(part.tokens) - part.start for part in parts)
            parts.append(Part(prompt[:stop], start=start, place=number, sampled=stop == len(prompt)))
            following = prompt[start + 1 : stop + 1]
            indices += range(at, at + len(following))
            targets += following
            counts[number] = len(following)
        scored = Scored(np.asarray(indices, np.int32), np.asarray(targets, np.int32))
        runner.launch(make_batch(*parts, scored=scored))
        output = runner.collect()
        assert sum(part.sampled for part in parts) == len(output.token_ids)
        assert output.scores is not None
        first = 0
        for number, count in counts.items():
            found[number].append(cut(output.scores, first, first + count))
            first += count
    for prompt, pieces in zip(PROMPTS, found, strict=True):
        joined = TopLogprobs(*(np.concatenate(arrays) for arrays in zip(*map(astuple, pieces), strict=True)))
        check_logprobs(joined, raw_logits(theirs, prompt)[:-1], prompt[1:])


def test_scores_are_computed_in_slices(make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more rows of logits at once than a slice has; the scores are those of one slice."""
    _, ours = make_pair()
    prompt = PROMPTS[3]
    scored = Scored(np.arange(99, dtype=np.int32), np.asarray(prompt[1:], np.int32))
    batch = make_batch(Part(prompt), scored=scored)
    runner = make_runner(ours)
    runner.launch(batch)
    whole = runner.collect().scores
    rows = []
    logits = ours.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(ours, "logits", counted)
    monkeypatch.setitem(runner_module._MOST_SCORED, "cpu", 7)
    runner.launch(batch)
    sliced = runner.collect().scores
    assert [7] * 14 + [1, 1] == rows  # 99 scores, and the sampled row
    assert whole is not None
    assert sliced is not None
    np.testing.assert_allclose(sliced.chosen, whole.chosen, atol=1e-5, rtol=0)
    np.testing.assert_allclose(sliced.top, whole.top, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(sliced.top_ids, whole.top_ids)


@pytest.mark.parametrize("in_flight", [False, True])
def test_log_probabilities_are_of_the_raw_distribution(make_pair: Callable[..., Pair], in_flight: bool) -> None:
    """Whatever a row's temperature, filters, penalties, biases and mask do to the token that is drawn."""
    theirs, ours = make_pair()
    allowed = np.ones((4, 515), bool)
    allowed[2] = np.arange(515) % 5 == 0
    biases = Biases(np.array([1, 3], np.int32), np.array([77, 9], np.int32), np.array([4.5, 99], np.float32))
    sampling = [given | {"temperature": 0.7, "seed": 3, "top_k": 50} for given in PENALTIES]
    tokens, outputs = generate(
        make_runner(ours),
        PROMPTS,
        sampling,
        12,
        in_flight=in_flight,
        masks=pack_mask(allowed),
        biases=biases,
        logprobs=True,
    )
    assert [0] * 12 == [token % 5 for token in tokens[2]]
    assert [9] * 12 == tokens[3]
    contexts = [raw_logits(theirs, prompt + found)[-13:-1] for prompt, found in zip(PROMPTS, tokens, strict=True)]
    for number, output in enumerate(outputs):
        assert output.logprobs is not None
        assert output.scores is None
        check_logprobs(output.logprobs, torch.stack([rows[number] for rows in contexts]), output.token_ids.tolist())


def test_rows_that_ask_for_nothing_draw_what_they_draw_without_the_others(make_pair: Callable[..., Pair]) -> None:
    """Two plain rows, greedy and drawn, beside two that have penalties, a mask and a bias; all have the rest."""
    _, ours = make_pair()
    sampling = [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}]
    sampling = [given | {"repetition_penalty": 1.0} for given in sampling]
    plain, _ = generate(make_runner(ours), PROMPTS, [*sampling, {}, {}], 20, penalised=False)
    allowed = np.ones((4, 515), bool)
    allowed[2:] = np.arange(515) < 300
    together, outputs = generate(
        make_runner(ours),
        PROMPTS,
        [*sampling, *PENALTIES[2:]],
        20,
        masks=pack_mask(allowed),
        biases=Biases(np.array([2], np.int32), np.array([77], np.int32), np.array([4.5], np.float32)),
        logprobs=True,
        scored=Scored(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32)),
    )
    assert plain[:2] == together[:2]
    assert plain[2] != together[2]
    assert plain[3] != together[3]
    assert (4, NUM_TOP) == outputs[-1].scores.top.shape  # type: ignore[union-attr]


def test_a_row_that_is_not_finite_has_no_log_probability(make_pair: Callable[..., Pair]) -> None:
    """Neither its sampled token nor its prompt's from the bad token on; other rows' are as they are without it."""
    theirs, ours = make_pair()
    ours.token_embedding = ours.token_embedding.clone()
    ours.token_embedding[7] = float("nan")
    good, bad = [5, 6, 8, 9], [5, 6, 7, 8]
    scored = Scored(np.array([0, 1, 2, 4, 5, 6], np.int32), np.array([*good[1:], *bad[1:]], np.int32))
    runner = make_runner(ours)
    runner.launch(make_batch(Part(good), Part(bad, place=1), logprobs=True, scored=scored))
    output = runner.collect()
    assert output.logprobs is not None
    assert output.scores is not None
    assert [False, True] == (output.token_ids == -1).tolist() == np.isnan(output.logprobs.chosen).tolist()
    assert [False, False, False, True] == np.isnan(output.scores.chosen[[0, 1, 2, 5]]).tolist()
    logits = raw_logits(theirs, good)
    check_logprobs(cut(output.scores, 0, 3), logits[:-1], good[1:])


def test_what_a_batch_does_not_ask_for_is_not_given(make_pair: Callable[..., Pair]) -> None:
    """And a step that samples nothing may still score."""
    _, ours = make_pair()
    runner = make_runner(ours)
    plain = make_batch(Part([5, 6, 7, 8]))
    runner.launch(plain)
    output = runner.collect()
    assert output.logprobs is None
    assert output.scores is None
    scored = Scored(np.array([0, 2], np.int32), np.array([6, 8], np.int32))
    runner.launch(replace(make_batch(Part([5, 6, 7, 8], sampled=False)), scored=scored))
    output = runner.collect()
    assert 0 == len(output.token_ids)
    assert output.scores is not None
    assert (2,) == output.scores.chosen.shape
