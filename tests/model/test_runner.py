"""Our model over the paged cache against transformers' GPT-2, driven through the scheduler as in service."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.core import Core
from service.engine.request import Delta, Finish, Request, SamplingParams
from service.engine.scheduler import Scheduler
from service.model.bags import BagCache
from service.model.batch import Batch, DeviceLost, OutOfMemory
from service.model.gpt2 import GPT2, logits_of
from service.model.runner import (
    TorchRunner,
    cut_decodes,
    translate,
    warm_up,
)
from tests.model.batches import BLOCK_SIZE
from tests.model.conftest import Pair

GREEDY = SamplingParams(20, temperature=0.0, ignore_eos=True)


def run(
    runner: TorchRunner, requests: list[Request], params: SamplingParams, *, budget: int = 32
) -> dict[int, list[Delta]]:
    """Every request's deltas (n = 1), batched by the engine's core."""
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        context_length=128,
        vocab_size=515,
        end_of_text_id=1,
    )
    for request in requests:
        scheduler.add(request, params)
    core = Core(scheduler, runner)
    deltas: dict[int, list[Delta]] = {request.id: [] for request in requests}
    while not core.idle:
        for delta in core.step():
            deltas[delta.request_id].append(delta)
    return deltas


def generate(
    model: GPT2, requests: list[Request], params: SamplingParams, *, num_blocks: int = 64, budget: int = 32
) -> dict[int, list[int]]:
    """Every request's tokens."""
    runner = TorchRunner(model, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    deltas = run(runner, requests, params, budget=budget)
    return {number: [token for delta in found for token in delta.token_ids] for number, found in deltas.items()}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"n_inner": 96, "layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "silu"},
        {"activation_function": "tanh"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"n_head": 1, "n_embd": 48},
    ],
)
def test_logits_equal_transformers(make_pair: Callable[..., Pair], config: dict[str, object]) -> None:
    """Within 1e-4 in fp32, for every switch of a GPT-2 config that changes the arithmetic."""
    theirs, ours = make_pair(**config)
    token_ids = torch.randint(0, 515, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(logits_of(ours, token_ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [9, 32, 1000])
def test_greedy_tokens_in_a_batch_equal_transformers_alone(make_pair: Callable[..., Pair], budget: int) -> None:
    """Prompts of 1 to 100 tokens, some with a common prefix, chunked or whole, preempted or not."""
    theirs, ours = make_pair()
    generator = torch.Generator().manual_seed(2)
    lengths = [1, 2, 7, 8, 9, 40, 64, 100]
    prompts = [torch.randint(2, 515, (length,), generator=generator).tolist() for length in lengths]
    prompts += [prompts[-1][:50], prompts[-1][:64], prompts[-1]]
    requests = [Request(number, tuple(prompt)) for number, prompt in enumerate(prompts)]
    tokens = generate(ours, requests, GREEDY, num_blocks=40, budget=budget)
    for number, prompt in enumerate(prompts):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=-1,
        )[0, len(prompt) :]
        assert expected.tolist() == tokens[number]


def test_a_seed_gives_the_same_tokens_in_any_company(
    make_pair: Callable[..., Pair],
) -> None:
    """Sampled with every filter, alone and among seven others."""
    _, ours = make_pair()
    params = SamplingParams(30, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=-5, ignore_eos=True)
    requests = [Request(number, tuple(range(number, number + 9))) for number in range(2, 9)]
    together = generate(ours, requests, params)
    for request in requests:
        assert generate(ours, [request], params)[request.id] == together[request.id]


@pytest.mark.parametrize("budget", [9, 1000])
def test_echoed_and_generated_tokens_have_the_log_probabilities_of_transformers(
    make_pair: Callable[..., Pair], budget: int
) -> None:
    """Within 1e-4, through the scheduler, with penalties; prompts that share a prefix, chunked or whole, preempted."""
    theirs, ours = make_pair()
    params = SamplingParams(
        20, temperature=0.8, seed=4, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4, num_logprobs=3
    )
    prompts = [tuple(range(5, 5 + length)) for length in (1, 9, 40, 64, 100, 100)]
    requests = [Request(number, prompt, score_from=1) for number, prompt in enumerate(prompts)]
    deltas = run(TorchRunner(ours, num_blocks=20, block_size=BLOCK_SIZE), requests, params, budget=budget)
    for number, prompt in enumerate(prompts):
        tokens = [token for delta in deltas[number] for token in delta.token_ids]
        assert 20 == len(tokens)
        with torch.inference_mode():
            expected = theirs(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1).numpy()
        expected = expected[np.arange(len(prompt) + 19), [*prompt[1:], *tokens]]
        parts = [deltas[number][0].prompt_logprobs] + [delta.logprobs for delta in deltas[number]]
        found = b"".join(part.chosen for part in parts if part is not None)
        np.testing.assert_allclose(np.frombuffer(found, np.float32), expected, atol=1e-4, rtol=0)


def test_what_others_left_in_a_block_poisons_nobody(make_pair: Callable[..., Pair]) -> None:
    """With a cache full of NaN, every token is as with a clean one: alone, and among contexts of other lengths."""
    _, ours = make_pair()
    runner = TorchRunner(ours, num_blocks=64, block_size=BLOCK_SIZE)
    assert isinstance(runner._cache, BagCache)
    for tensor in (runner._cache._keys, runner._cache._values):
        tensor.fill_(float("nan"))
    requests = [Request(number, tuple(range(2, 3 + 13 * number))) for number in range(6)]
    deltas = run(runner, requests, GREEDY)
    for request in requests:
        tokens = [token for delta in deltas[request.id] for token in delta.token_ids]
        assert generate(ours, [request], GREEDY)[request.id] == tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_a_row_that_is_not_finite_ends_alone(make_pair: Callable[..., Pair], depth: int) -> None:
    """With an error and no token; also where the next step is launched before the host knows. Its neighbour goes on."""
    _, ours = make_pair()
    runner = TorchRunner(ours, num_blocks=64, block_size=BLOCK_SIZE)
    runner.depth = depth
    ours.token_embedding = ours.token_embedding.clone()
    ours.token_embedding[7] = float("nan")
    bad, good = Request(1, (5, 6, 7)), Request(2, (5, 6, 8))
    deltas = run(runner, [bad, good], GREEDY)
    assert [Finish.ERROR] == [delta.finish for delta in deltas[1]]
    assert () == deltas[1][0].token_ids
    assert generate(ours, [good], GREEDY)[2] == [token for delta in deltas[2] for token in delta.token_ids]


@given(st.lists(st.integers(1, 1024), max_size=40), st.sampled_from(["cpu", "cuda"]))
def test_decodes_are_cut_into_rectangles_that_cover_them(lengths: list[int], device: str) -> None:
    """Every row once and in order; none but a single row's is larger than the bound, or padded past its own."""
    lengths.sort()
    groups = cut_decodes(lengths, device)
    assert list(range(len(lengths))) == [row for start, end in groups for row in range(start, end)]
    for start, end in groups:
        if end - start > 1:
            assert (end - start) * lengths[end - 1] <= {"cpu": 2**16, "cuda": 2**19}[device]
            assert device == "cuda" or lengths[end - 1] <= max(64, 2 * lengths[start])


def test_warm_up_leaves_the_runner_as_it_was(make_pair: Callable[..., Pair]) -> None:
    """The largest steps run; tokens afterwards are as without it."""
    _, ours = make_pair()
    runner = TorchRunner(ours, num_blocks=64, block_size=BLOCK_SIZE)
    warm_up(runner, max_num_seqs=4, max_num_batched_tokens=64)
    request, params = Request(1, (5, 6, 7)), SamplingParams(20, seed=3, ignore_eos=True)
    tokens = [token for delta in run(runner, [request], params)[1] for token in delta.token_ids]
    assert generate(ours, [request], params)[1] == tokens


def test_warm_up_asks_for_all_that_takes_memory(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the largest prefill, of which every token is scored, and in the largest decode step."""
    _, ours = make_pair()
    runner = TorchRunner(ours, num_blocks=1, block_size=BLOCK_SIZE)
    batches: list[Batch] = []
    launch = runner.launch
    monkeypatch.setattr(runner, "launch", lambda batch: (batches.append(batch), launch(batch)))
    warm_up(runner, max_num_seqs=4, max_num_batched_tokens=300)
    assert [(256, 2), (4, 4)] == [(len(batch.token_ids), len(batch.sampling)) for batch in batches]
    for batch in batches:
        assert batch.logprobs
        assert batch.masks is not None
        assert batch.biases is not None
        assert batch.histories is not None
        assert (len(batch.sampling), 127) == batch.histories.shape
        assert batch.scored is not None
        assert len(batch.token_ids) == len(batch.scored.indices)


def test_device_errors_are_told_apart() -> None:
    """Out of memory may be met by a smaller step; a lost device ends the process; the rest ends the batch."""
    assert isinstance(translate(torch.OutOfMemoryError("x")), OutOfMemory)
    assert isinstance(translate(RuntimeError("Triton Error [CUDA]: out of memory")), OutOfMemory)
    assert isinstance(translate(RuntimeError("CUDA error: an illegal memory access")), DeviceLost)
    other = RuntimeError("shapes")
    assert other is translate(other)
