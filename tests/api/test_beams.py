"""Beam search against Megatron-LM's rules, followed naively, and against transformers where the rules agree."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from service.api.access import Caller
from service.api.beams import MAX_BEAMS, NUM_MORE_CANDIDATES, BeamSearch, Hypothesis, search_beams
from service.api.metrics import Metrics
from service.engine.client import EngineClient
from service.model.batch import NUM_TOP
from tests.engine.attached import Attach, until
from tests.engine.conftest import attach, client, queue, stalls  # noqa: F401 - fixtures
from tests.engine.fake_model import logits as fake_logits

NextLogprobs = Callable[[tuple[int, ...]], np.ndarray[Any, np.dtype[np.float64]]]
VOCAB_SIZE = 60
PROMPT = (7, 21, 3)


def search(
    next_logprobs: NextLogprobs,
    prompt: tuple[int, ...] = PROMPT,
    *,
    banned: tuple[int, int] | None = None,
    **rules: Any,
) -> list[Hypothesis]:
    """BeamSearch, given no more than a step of the engine gives."""
    beams = BeamSearch(**rules)
    num_best = rules["width"] + NUM_MORE_CANDIDATES
    while beams.open:
        candidates = []
        for beam in beams.open:
            context = prompt + beam.token_ids
            values = next_logprobs(context)
            best = np.argsort(-values, kind="stable")[:num_best].tolist()
            candidates.append([(token, float(values[token])) for token in best if (context[-1], token) != banned])
        beams.advance(candidates)
    return beams.best()


def megatron(
    next_logprobs: NextLogprobs,
    prompt: tuple[int, ...] = PROMPT,
    *,
    width: int,
    num_tokens: int,
    stop_token: int,
    length_penalty: float,
    banned: tuple[int, int] | None = None,
) -> list[tuple[list[int], float]]:
    """The same from the rules of upstream's server: every token of every beam is ranked, and 2 * width looked at."""
    open_beams: list[tuple[list[int], float]] = [([], 0.0)]
    kept: list[tuple[float, list[int]]] = []

    def keep(tokens: list[int], total: float) -> None:
        score = total / len(tokens) ** length_penalty
        if len(kept) < width or score > min(kept)[0]:
            kept.append((score, tokens))
            if len(kept) > width:
                kept.remove(min(kept))

    for length in range(1, num_tokens + 1):
        everything = []
        for tokens, total in open_beams:
            values = next_logprobs((*prompt, *tokens)).copy()
            if banned is not None and (*prompt, *tokens)[-1] == banned[0]:
                values[banned[1]] = -np.inf
            everything += [(total + value, tokens, token) for token, value in enumerate(values.tolist())]
        everything.sort(key=lambda each: -each[0])
        open_beams = []
        for rank, (total, tokens, token) in enumerate(everything[: 2 * width]):
            if token == stop_token:
                if rank < width:
                    keep([*tokens, token], total)
            else:
                open_beams.append(([*tokens, token], total))
            if len(open_beams) == width:
                break
        if len(kept) == width and min(kept)[0] >= everything[0][0] / length**length_penalty:
            break
    else:
        for tokens, total in open_beams:
            keep(tokens, total)
    return [(tokens, score) for score, tokens in sorted(kept, reverse=True)]


class Tiny:
    """A random GPT-2 of 60 tokens that likes some of them, so that stop tokens come up."""

    def __init__(self) -> None:
        torch.manual_seed(11)
        config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        config.bos_token_id = config.eos_token_id = None
        self.model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter *= 4
        self._known: dict[tuple[int, ...], Any] = {}

    @torch.inference_mode()
    def next_logprobs(self, tokens: tuple[int, ...]) -> Any:
        if tokens not in self._known:
            values = self.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            self._known[tokens] = values.double().numpy()
        return self._known[tokens]

    @torch.inference_mode()
    def generate(
        self, *, width: int, num_tokens: int, stop_token: int, length_penalty: float
    ) -> list[tuple[list[int], float]]:
        prompt = torch.tensor([PROMPT])
        found = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=stop_token,
            pad_token_id=VOCAB_SIZE - 1,
            length_penalty=length_penalty,
            early_stopping=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        sequences = []
        for row, score in zip(found.sequences[:, len(PROMPT) :].tolist(), found.sequences_scores.tolist(), strict=True):
            end = row.index(stop_token) + 1 if stop_token in row else len(row)
            sequences.append((row[:end], score))
        return sequences


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny()


def likely(tiny: Tiny, rank: int) -> int:
    """The token that is `rank`th after the prompt."""
    return int(np.argsort(-tiny.next_logprobs(PROMPT))[rank])


def check(expected: list[tuple[list[int], float]], found: list[Hypothesis], stop_token: int) -> None:
    assert [tokens for tokens, _ in expected] == [list(hypothesis.token_ids) for hypothesis in found]
    np.testing.assert_allclose(
        [hypothesis.score for hypothesis in found], [score for _, score in expected], rtol=1e-5, atol=1e-4
    )
    assert [tokens[-1] == stop_token for tokens, _ in expected] == [hypothesis.stopped for hypothesis in found]


@pytest.mark.parametrize("width", [2, 3, 8, 25])
@pytest.mark.parametrize("length_penalty", [1.0, 2.0, 0.0, -1.0])
def test_without_a_stop_it_is_transformers(tiny: Tiny, width: int, length_penalty: float) -> None:
    """Every beam has the same length, so that only the scores show the penalty."""
    rules = {"width": width, "num_tokens": 9, "length_penalty": length_penalty}
    never = int(tiny.next_logprobs(PROMPT).argmin())
    expected = tiny.generate(**rules, stop_token=never)
    assert all(len(tokens) == 9 for tokens, _ in expected), "then choose another stop token"
    check(expected, search(tiny.next_logprobs, **rules, stop_token=never), never)


@pytest.mark.parametrize("width", [2, 3, 8, 25])
@pytest.mark.parametrize("length_penalty", [0.0, -0.5, -2.0])
def test_with_a_stop_and_no_reward_for_length_it_is_transformers(tiny: Tiny, width: int, length_penalty: float) -> None:
    """A longer beam then never scores more than its beginning, so that how early both end makes no difference."""
    num_stopped = 0
    for rank in range(6):
        stop_token = likely(tiny, rank)
        rules = {"width": width, "num_tokens": 9, "length_penalty": length_penalty, "stop_token": stop_token}
        expected = tiny.generate(**rules)
        check(expected, search(tiny.next_logprobs, **rules), stop_token)
        num_stopped += sum(tokens[-1] == stop_token for tokens, _ in expected)
    assert num_stopped > width


@pytest.mark.parametrize("width", [1, 2, 3, 8, 25])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 3.0])
def test_with_a_reward_for_length_it_is_megatrons(tiny: Tiny, width: int, length_penalty: float) -> None:
    """Where it ends, and what it keeps; for some stop tokens before the last step."""
    lengths = set()
    for rank in range(6):
        stop_token = likely(tiny, rank)
        rules = {"width": width, "num_tokens": 9, "length_penalty": length_penalty, "stop_token": stop_token}
        expected = megatron(tiny.next_logprobs, **rules)
        check(expected, search(tiny.next_logprobs, **rules), stop_token)
        lengths.add(max(len(tokens) for tokens, _ in expected))
    assert width > 3 or length_penalty > 1 or min(lengths) < 9


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from([1, 2, 3, 7, MAX_BEAMS]),
    num_tokens=st.integers(1, 6),
    length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 1.7]),
    stop_token=st.integers(0, 5),
    banned=st.sampled_from([None, (3, 0), (3, 4), (0, 1)]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_the_likeliest_tokens_of_each_beam_are_enough(
    seed: int,
    width: int,
    num_tokens: int,
    length_penalty: float,
    stop_token: int,
    banned: tuple[int, int] | None,
    spread: float,
) -> None:
    """What a step gives of each beam leads to the same as all tokens of all beams do, also where one is banned."""

    def next_logprobs(tokens: tuple[int, ...]) -> Any:
        drawn = np.random.default_rng([seed, *tokens]).normal(size=VOCAB_SIZE) * spread
        drawn[:6] += spread  # where the stop tokens are
        return drawn - np.log(np.exp(drawn).sum())

    rules = {"width": width, "num_tokens": num_tokens, "length_penalty": length_penalty, "stop_token": stop_token}
    expected = megatron(next_logprobs, **rules, banned=banned)
    check(expected, search(next_logprobs, **rules, banned=banned), stop_token)
    assert width == len(expected)


def test_a_step_gives_what_the_widest_search_needs() -> None:
    assert MAX_BEAMS + NUM_MORE_CANDIDATES <= NUM_TOP


# Over the engine


BLOCK_SIZE = 4  # of the engine in a thread


class Watched(BeamSearch):
    """Notes the length of every context that it asks for."""

    def __init__(self, num_prompt: int, **rules: Any) -> None:
        super().__init__(**rules)
        self.lengths: list[int] = []
        self._num_prompt = num_prompt

    def advance(self, candidates: Any) -> None:
        self.lengths += [self._num_prompt + len(beam.token_ids) for beam in self.open]
        super().advance(candidates)


def fake_logprobs(tokens: tuple[int, ...]) -> Any:
    values = fake_logits(tokens).astype(np.float64)
    return values - np.log(np.exp(values).sum())


@pytest.mark.parametrize(("width", "stop_token"), [(1, 96), (4, 96), (4, 5), (16, 5), (MAX_BEAMS, 96)])
async def test_beams_share_the_blocks_of_what_they_have_in_common(
    client: EngineClient,  # noqa: F811
    attach: Attach,  # noqa: F811
    width: int,
    stop_token: int,
) -> None:
    """A step computes of a beam what is past the full blocks of the beam it came from; with 32, blocks run short."""
    await attach()
    prompt = tuple(range(9))
    rules: dict[str, Any] = {"width": width, "num_tokens": 20, "stop_token": stop_token, "length_penalty": 1.0}
    watched = Watched(len(prompt), **rules)
    metrics = Metrics(client, version="1")
    summary: dict[str, Any] = {}
    found = await search_beams(watched, client, metrics, prompt, banned=(7, 8), caller=Caller("x"), summary=summary)
    expected = megatron(fake_logprobs, prompt, **rules, banned=(7, 8))
    check(expected, found, stop_token)
    num_tokens = sum(len(tokens) for tokens, _ in expected)
    figures = {"num_choices": width, "prompt_tokens": 9, "completion_tokens": num_tokens, "num_unfinished": 0}
    assert figures == summary
    await until(lambda: client.stats.num_prefix_queries == sum(watched.lengths) and not client.stats.num_blocks_used)
    if width < MAX_BEAMS:
        first, *later = watched.lengths
        num_computed = first + sum(length - (length - 1) // BLOCK_SIZE * BLOCK_SIZE for length in later)
        assert num_computed == client.stats.num_prefix_queries - client.stats.num_prefix_hits
    assert metrics.registry.get_sample_value("megatron_gpt2_prompt_tokens_total") == 9
    assert num_tokens == metrics.registry.get_sample_value("megatron_gpt2_generated_tokens_total")
    assert metrics.registry.get_sample_value("megatron_gpt2_queue_seconds_count") == 1
    for reason in ("stop", "length"):
        count = sum(hypothesis.stopped == (reason == "stop") for hypothesis in found)
        labels = {"finish_reason": reason}
        assert count == metrics.registry.get_sample_value("megatron_gpt2_requests_finished_total", labels)
