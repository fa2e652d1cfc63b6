"""A model split over ranks: the parts make up the whole, and the ranks together compute what one computes."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from service.checkpoint.hub import read_config, read_state
from service.model.gpt2 import logits_of
from service.model.parallel import ParallelError, check_split, part_of
from tests.model.conftest import Pair
from tests.model.rank import write_logits

TOKEN_IDS = [*range(3, 400, 7), 514, 0]


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


@pytest.mark.parametrize(("num_ranks", "tied"), [(2, True), (4, False)])
def test_ranks_compute_what_one_does(
    make_pair: Callable[..., Pair], tmp_path: Path, num_ranks: int, tied: bool
) -> None:
    """Logits within 1e-4 in fp32, the best the same; the same to the bit on all ranks, as each samples by itself."""
    theirs, whole = make_pair(tie_word_embeddings=tied)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    mp.spawn(write_logits, (num_ranks, address, tmp_path, TOKEN_IDS), nprocs=num_ranks)  # type: ignore[no-untyped-call]
    logits = [torch.load(tmp_path / f"logits-{rank}.pt") for rank in range(num_ranks)]
    assert all(torch.equal(logits[0], other) for other in logits)
    expected = logits_of(whole, TOKEN_IDS)
    assert 1e-4 > (expected - logits[0]).abs().max()
    assert torch.equal(expected.argmax(-1), logits[0].argmax(-1))
    with torch.inference_mode():
        assert 1e-4 > (theirs(torch.tensor([TOKEN_IDS])).logits[0] - logits[0]).abs().max()
