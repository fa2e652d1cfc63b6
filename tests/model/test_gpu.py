"""The model on an NVIDIA GPU against transformers on the same one: run with `pytest -m gpu tests/model`.

The kernels in 16 bits, at the served sizes, are compared with plain operators in test_gpu_kernels.py.
"""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import transformers

from bench.random_model import write_random_model
from service.checkpoint.hub import read_config, read_state
from service.engine.core import Core
from service.engine.request import Finish, Request, SamplingParams
from service.engine.scheduler import Scheduler
from service.model.batch import Batch, Biases, Scored, StepOutput, TopLogprobs
from service.model.gpt2 import GPT2, logits_of
from service.model.graphs import GraphRunner
from service.serve import DEMO_MODEL
from tests.model.batches import BLOCK_SIZE, MOST_BLOCKS, Part, make_batch
from tests.model.rows import pack_mask
from tests.model.test_batch_fields import PENALTIES, PROMPTS, generate, make_runner

pytestmark = pytest.mark.gpu

EVERYTHING = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": ((77, 4.5),),
    "banned_token_ids": (5,),
    "num_logprobs": 5,
}


@pytest.fixture(scope="module", params=["demo", "random 345M"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return DEMO_MODEL
    return write_random_model(tmp_path_factory.mktemp("random-345m"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).cuda().eval()


def load(folder: Path, dtype: torch.dtype, device: str = "cuda") -> GPT2:
    config = read_config(folder)
    return GPT2(config, read_state(folder, config, dtype=dtype, device=device))


def make_engine(model: GPT2) -> tuple[GraphRunner, Scheduler]:
    """Room for sixteen sequences of 512 tokens."""
    runner = GraphRunner(model, num_blocks=512, block_size=16, max_num_seqs=16, max_num_batched_tokens=256)
    runner.capture()
    return runner, Scheduler(
        num_blocks=runner.num_blocks,
        block_size=16,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        context_length=1024,
        vocab_size=50257,
        end_of_text_id=50256,
    )


def test_fp32_logits_equal_transformers(folder: Path, theirs: transformers.GPT2LMHeadModel) -> None:
    """Within 1e-4 of transformers on the CPU, over a full context; TF32 would be off by a thousand times that."""
    token_ids = torch.randint(0, 50257, (1024,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs.cpu()(token_ids[None]).logits[0]
    theirs.cuda()
    torch.testing.assert_close(
        logits_of(load(folder, torch.float32), token_ids.tolist()).cpu(), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_close(folder: Path, theirs: transformers.GPT2LMHeadModel, dtype: torch.dtype) -> None:
    """Within 2e-2 relative (norms) of transformers in fp32 on the same rounded weights."""
    token_ids = torch.randint(0, 50257, (1024,), generator=torch.Generator().manual_seed(1)).tolist()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    rounded = theirs.to(dtype).float()
    with torch.inference_mode():
        expected = rounded(torch.tensor([token_ids], device="cuda")).logits[0]
    theirs.load_state_dict(state)
    got = logits_of(load(folder, dtype), token_ids)
    error = float((got - expected).norm() / expected.norm())
    print(f"{folder.name} {dtype}: relative error {error:.2e}")
    assert error < 2e-2


@pytest.mark.parametrize("depth", [0, 1])
def test_fp32_greedy_ids_equal_transformers(folder: Path, theirs: transformers.GPT2LMHeadModel, depth: int) -> None:
    """A batch of 16 prompts of 1 to 200 tokens, 40 tokens each, with a step in flight and without."""
    model = load(folder, torch.float32)
    runner, scheduler = make_engine(model)
    runner.depth = depth
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 50000, (1 + 13 * number,), generator=generator).tolist() for number in range(16)]
    params = SamplingParams(40, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        scheduler.add(Request(number, tuple(prompt)), params)
    core = Core(scheduler, runner)
    tokens: dict[int, list[int]] = {number: [] for number in range(16)}
    while not core.idle:
        for delta in core.step():
            tokens[delta.request_id] += delta.token_ids
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            whole = torch.tensor([prompt + tokens[number]], device="cuda")
            logits = theirs(whole).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        agreed = logits.argmax(-1).tolist()
        for position, (expected, got) in enumerate(zip(agreed, tokens[number], strict=True)):
            close = float(best[position, 0] - best[position, 1]) < 1e-3
            assert expected == got or close, f"prompt {number}, token {position}"


def ask_for_everything(model: GPT2, *, in_flight: bool) -> tuple[list[list[int]], list[StepOutput]]:
    """Four prompts of 2 to 100 tokens, greedy with penalties, a bias and a mask, with log-probabilities and scores."""
    allowed = np.ones((4, 50257), bool)
    allowed[2] = np.arange(50257) % 5 == 0
    return generate(
        make_runner(model),
        PROMPTS,
        PENALTIES,
        24,
        in_flight=in_flight,
        masks=pack_mask(allowed),
        biases=Biases(np.array([1, 3], np.int32), np.array([77, 9], np.int32), np.array([4.5, 3.5], np.float32)),
        logprobs=True,
        scored=Scored(np.arange(4, dtype=np.int32), np.array([9, 4, 21, 401], np.int32)),
    )


@pytest.mark.parametrize("in_flight", [False, True])
def test_fp32_rows_that_ask_for_everything_are_as_on_a_cpu(folder: Path, in_flight: bool) -> None:
    """The same tokens; log-probabilities within 1e-4, with a step in flight and without."""
    tokens, outputs = ask_for_everything(load(folder, torch.float32), in_flight=in_flight)
    expected_tokens, expected_outputs = ask_for_everything(load(folder, torch.float32, "cpu"), in_flight=False)
    assert expected_tokens == tokens
    for expected, output in zip(expected_outputs, outputs, strict=True):
        for name in ("logprobs", "scores"):
            found, there = getattr(output, name), getattr(expected, name)
            np.testing.assert_allclose(found.chosen, there.chosen, atol=1e-4, rtol=0)
            np.testing.assert_allclose(found.top, there.top, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_log_probabilities_are_finite_and_consistent(folder: Path, dtype: torch.dtype) -> None:
    """Best first, equals by id, a chosen value to the bit that in the top; a mask keeps what it bans out."""
    tokens, outputs = ask_for_everything(load(folder, dtype), in_flight=True)
    assert [0] * 24 == [token % 5 for token in tokens[2]]
    for output in outputs:
        chosen_ids = {"logprobs": output.token_ids, "scores": np.array([9, 4, 21, 401])}
        for name, ids in chosen_ids.items():
            found = getattr(output, name)
            assert np.isfinite(found.chosen).all()
            assert np.isfinite(found.top).all()
            assert (found.top[:, :-1] >= found.top[:, 1:]).all()
            equal = found.top[:, :-1] == found.top[:, 1:]
            assert (found.top_ids[:, :-1] < found.top_ids[:, 1:])[equal].all()
            is_chosen = found.top_ids == ids[:, None]
            np.testing.assert_array_equal(found.top[is_chosen], found.chosen[is_chosen.any(-1)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_of_many_prompts_take_the_memory_of_one_slice(folder: Path, dtype: torch.dtype) -> None:
    """Of 8,000 prompt tokens, whose logits alone are 1.6 GB; they equal those of each prompt alone."""
    model = load(folder, dtype)
    runner = GraphRunner(
        model, num_blocks=64 * MOST_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=64, max_num_batched_tokens=8192
    )
    runner.capture()
    prompts = torch.randint(0, 50257, (64, 125), generator=torch.Generator().manual_seed(4)).tolist()
    indices = np.arange(124, dtype=np.int32)

    def score(*parts: Part) -> TopLogprobs:
        places = np.arange(len(parts), dtype=np.int32)[:, None] * 125
        targets = np.asarray([part.tokens[1:] for part in parts], np.int32)
        runner.launch(make_batch(*parts, scored=Scored((places + indices).ravel(), targets.ravel())))
        scores = runner.collect().scores
        assert scores is not None
        return scores

    parts = [Part(prompt, place=number, sampled=False) for number, prompt in enumerate(prompts)]
    alone = score(parts[5])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    together = score(*parts)
    assert torch.cuda.max_memory_allocated() - before < 1.2e9
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    np.testing.assert_allclose(together.chosen[5 * 124 : 6 * 124], alone.chosen, atol=tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_launch_waits_for_nothing(folder: Path, drawn: bool, asking: bool) -> None:
    """No step of the launch makes the host wait for the device: the next step is launched while this one computes."""
    model = load(folder, torch.float16)
    runner, scheduler = make_engine(model)
    for number in range(8):
        params = SamplingParams(8, temperature=float(drawn), top_p=0.9, seed=number)
        if asking:
            params = msgspec.structs.replace(params, **EVERYTHING)
        scheduler.add(Request(number, tuple(range(1, 2 + 40 * number)), score_from=1 if asking else None), params)
    core = Core(scheduler, runner)
    core.step()
    launch = runner.launch

    def watched(batch: Batch) -> None:
        try:
            torch.cuda.set_sync_debug_mode("error")
            launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.launch = watched  # type: ignore[method-assign]
    finishes = []
    while not core.idle:
        finishes += [delta.finish for delta in core.step() if delta.finish]
    assert finishes
    assert Finish.ERROR not in finishes
