"""A model split over ranks: the parts make up the whole, and the ranks together compute what one computes."""

import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from service.checkpoint.hub import read_config, read_state
from service.model.batch import Scored
from service.model.gpt2 import GPT2, logits_of
from service.model.parallel import ParallelError, check_split, part_of
from service.model.runner import TorchRunner
from tests.model.batches import BLOCK_SIZE, Part, make_batch
from tests.model.conftest import Pair
from tests.model.kernels.conftest import ON_GPU
from tests.model.rank import write_logits, write_steps
from tests.model.test_graphs import check_output, run

TOKEN_IDS = [*range(3, 400, 7), 514, 0]


def run_ranks(work: Callable[..., None], num_ranks: int, *arguments: object) -> None:
    """`work` in a process for each rank, with its rank, how many there are, and where they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    mp.spawn(work, (num_ranks, address, *arguments), nprocs=num_ranks)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_parts_make_up_the_whole(make_pair: Callable[..., Pair], tmp_path: Path, num_ranks: int) -> None:
    """Every number is in one rank's part of a split tensor, in order, and in each rank's of the others."""
    make_pair()
    config = read_config(tmp_path)
    state = read_state(tmp_path, config, dtype=None)
    for name, whole in state.items():
        parts = [part_of(name, whole, config, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        assert 1 == len({part.shape for part in parts})
        stem, kind = name.split(".")[-2:]
        match stem:
            case "token_embedding":
                joined = torch.cat(parts)
                assert 0 == len(joined) % (128 * num_ranks)
                assert not joined[len(whole) :].any()
                assert torch.equal(whole, joined[: len(whole)])
            case "qkv":
                by_kind = [part.unflatten(0, (3, -1)) for part in parts]
                assert torch.equal(whole, torch.cat(by_kind, 1).flatten(0, 1))
            case "up":
                assert torch.equal(whole, torch.cat(parts))
            case "attention_output" | "down" if kind == "weight":
                assert torch.equal(whole, torch.cat(parts, 1))
            case _:
                assert all(torch.equal(whole, part) for part in parts)


def test_what_does_not_split_is_refused(make_pair: Callable[..., Pair]) -> None:
    """Heads and the units of the MLP are whole on a rank; the error says which are not."""
    _, ours = make_pair(n_inner=100)
    check_split(ours.config, 4)
    with pytest.raises(ParallelError, match="tensor_parallel_size: 4 attention heads do not split over 3 ranks"):
        check_split(ours.config, 3)
    _, ours = make_pair(n_inner=98)
    with pytest.raises(ParallelError, match="tensor_parallel_size: 98 MLP units do not split over 4 ranks"):
        check_split(ours.config, 4)


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2), ("int8", 3e-2)])
def test_ranks_on_a_cpu_compute_what_one_does_in_every_format(
    make_pair: Callable[..., Pair], tmp_path: Path, name: str, tolerance: float
) -> None:
    """Logits of two ranks within the format's own error of plain fp32's on one, and the same to the bit on both."""
    _, whole = make_pair()
    run_ranks(write_logits, 2, tmp_path, TOKEN_IDS, name)
    logits = [torch.load(tmp_path / f"logits-{rank}.pt") for rank in range(2)]
    assert torch.equal(logits[0], logits[1])
    expected = logits_of(whole, TOKEN_IDS)
    assert float((logits[0] - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(("num_ranks", "tied"), [(2, True), (4, False)])
def test_ranks_compute_what_one_does(
    make_pair: Callable[..., Pair], tmp_path: Path, num_ranks: int, tied: bool
) -> None:
    """Logits within 1e-4 in fp32, the best the same; the same to the bit on all ranks, as each samples by itself."""
    theirs, whole = make_pair(tie_word_embeddings=tied)
    run_ranks(write_logits, num_ranks, tmp_path, TOKEN_IDS)
    logits = [torch.load(tmp_path / f"logits-{rank}.pt") for rank in range(num_ranks)]
    assert all(torch.equal(logits[0], other) for other in logits)
    expected = logits_of(whole, TOKEN_IDS)
    assert 1e-4 > (expected - logits[0]).abs().max()
    assert torch.equal(expected.argmax(-1), logits[0].argmax(-1))
    with torch.inference_mode():
        assert 1e-4 > (theirs(torch.tensor([TOKEN_IDS])).logits[0] - logits[0]).abs().max()


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "most_programs"),
    [
        (2, torch.float32, 256),
        (2, torch.float32, 16),
        (4, torch.float16, 64),
        pytest.param(2, torch.bfloat16, 256, marks=pytest.mark.gpu),
        pytest.param(2, torch.bfloat16, 16, marks=pytest.mark.gpu),
    ],
)
def test_the_kernels_of_ranks(
    make_pair: Callable[..., Pair], tmp_path: Path, num_ranks: int, dtype: torch.dtype, most_programs: int
) -> None:
    """Prompts, then single tokens that the step before sampled: what plain operators make of the whole model.

    Steps have up to 80 tokens, so more than there are programs of a sum, and no more.
    """
    check_ranks(make_pair, tmp_path, num_ranks, dtype, most_programs)


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.02), ("fp8", 0.06)])
def test_the_kernels_of_ranks_with_weights_in_8_bits(
    make_pair: Callable[..., Pair], tmp_path: Path, name: str, tolerance: float
) -> None:
    """Each rank scales its own part, so that they differ from the whole by what 8 bits cost."""
    check_ranks(make_pair, tmp_path, 2, torch.float16, 16, name, tolerance=tolerance)


def check_ranks(
    make_pair: Callable[..., Pair],
    tmp_path: Path,
    num_ranks: int,
    dtype: torch.dtype,
    most_programs: int,
    name: str | None = None,
    *,
    tolerance: float = 5e-3,
) -> None:
    config = make_pair(n_layer=2)[1].config
    asked = {"logprobs": True, "scored": Scored(np.array([0, 3, 5], np.int32), np.array([4, 514, 0], np.int32))}
    drawn = {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "seed": 9}
    prompts = [[3, 4, 5, 4, 3, 4], list(range(400, 430))]
    first = make_batch(
        Part([7], place=2), *(Part(prompt, place=place) for place, prompt in enumerate(prompts)), **asked
    )
    longer = [Part([*prompt, -1], len(prompt), place, source=place + 1) for place, prompt in enumerate(prompts)]
    second = make_batch(Part([7, -1], 1, 2, source=0, sampling=drawn), *longer, logprobs=True)
    batches = [first, second, make_batch(Part([9], place=3))]
    run_ranks(write_steps, num_ranks, tmp_path, batches, dtype, BLOCK_SIZE, ON_GPU, most_programs, name)
    whole = GPT2(config, read_state(tmp_path, config, dtype=dtype, device="cuda" if ON_GPU else "cpu"))
    plain = TorchRunner(whole, num_blocks=64, block_size=BLOCK_SIZE)
    by_rank = [pickle.loads((tmp_path / f"steps-{rank}.pickle").read_bytes()) for rank in range(num_ranks)]
    for number, batch in enumerate(batches):
        expected = run(plain, batch)
        for outputs in by_rank:
            if dtype == torch.float32:
                check_output(expected, outputs[number])
            elif expected.logprobs is not None:
                np.testing.assert_allclose(outputs[number].logprobs.top, expected.logprobs.top, atol=tolerance, rtol=0)
        assert 1 == len({tuple(outputs[number].token_ids) for outputs in by_rank})
