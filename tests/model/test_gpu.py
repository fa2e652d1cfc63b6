"""The model on an NVIDIA GPU against transformers on the same one: run with `pytest -m gpu tests/model`."""

from pathlib import Path

import pytest
import torch
import transformers

from bench.random_model import write_random_model
from service.checkpoint.hub import read_config, read_state
from service.engine.core import Core
from service.engine.request import Finish, Request, SamplingParams
from service.engine.scheduler import Scheduler
from service.model.batch import Batch
from service.model.gpt2 import GPT2
from service.model.runner import TorchRunner
from service.serve import DEMO_MODEL
from tests.model.test_runner import forward

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["demo", "random 345M"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return DEMO_MODEL
    return write_random_model(tmp_path_factory.mktemp("random-345m"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).cuda().eval()


def load(folder: Path, dtype: torch.dtype) -> GPT2:
    config = read_config(folder)
    return GPT2(config, read_state(folder, config, dtype=dtype, device="cuda"))


def make_engine(model: GPT2) -> tuple[TorchRunner, Scheduler]:
    """Room for sixteen sequences of 512 tokens."""
    runner = TorchRunner(model, num_blocks=512, block_size=16)
    return runner, Scheduler(
        num_blocks=runner.num_blocks,
        block_size=16,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        context_length=1024,
        end_of_text_id=50256,
    )


def test_fp32_logits_equal_transformers(folder: Path, theirs: transformers.GPT2LMHeadModel) -> None:
    """Within 1e-4 of transformers on the CPU, over a full context; TF32 would be off by a thousand times that."""
    token_ids = torch.randint(0, 50257, (1024,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs.cpu()(token_ids[None]).logits[0]
    theirs.cuda()
    torch.testing.assert_close(
        forward(load(folder, torch.float32), token_ids.tolist()).cpu(), expected, atol=1e-4, rtol=0
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
    got = forward(load(folder, dtype), token_ids)
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
    for number, prompt in enumerate(prompts):
        scheduler.add(Request(number, tuple(prompt), SamplingParams(40, temperature=0.0, ignore_eos=True)))
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


@pytest.mark.parametrize("drawn", [False, True])
def test_a_launch_waits_for_nothing(folder: Path, drawn: bool) -> None:
    """No step of the launch makes the host wait for the device: the next step is launched while this one computes."""
    model = load(folder, torch.float16)
    runner, scheduler = make_engine(model)
    for number in range(8):
        params = SamplingParams(8, temperature=float(drawn), top_p=0.9, seed=number)
        scheduler.add(Request(number, tuple(range(1, 2 + 40 * number)), params))
    core = Core(scheduler, runner)
    core.step()
    launch = runner.launch

    def watched(batch: Batch) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.launch = watched  # type: ignore[method-assign]
    finishes = []
    while not core.idle:
        finishes += [delta.finish for delta in core.step() if delta.finish]
    assert finishes
    assert Finish.ERROR not in finishes
