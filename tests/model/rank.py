"""A rank's process, apart from the tests that start it, so that it imports no more than it needs."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from service.checkpoint.hub import read_config, read_state
from service.model.batch import Batch
from service.model.formats import Format, format_for
from service.model.gpt2 import GPT2, logits_of
from service.model.parallel import Group, ParallelGPT2, part_of, plain


def write_logits(
    rank: int, num_ranks: int, address: str, folder: Path, token_ids: list[int], name: str | None = None
) -> None:
    """The process: logits-RANK.pt in the model's folder, computed with the other ranks, which meet at `address`.

    `name` is of a CPU's weight format; without one, plain fp32.
    """
    weights = None if name is None else format_for(name, torch.device("cpu"))
    dtype = torch.float32 if weights is None else weights.dtype
    with _joined(rank, num_ranks, address, folder, dtype, weights=weights) as model:
        torch.save(logits_of(model, token_ids), folder / f"logits-{rank}.pt")
        if weights is not None:
            return
        whole = GPT2(model.config, read_state(folder, model.config, dtype=torch.float32))
        assert matrix_bytes(whole) == num_ranks * matrix_bytes(model)


def write_steps(
    rank: int,
    num_ranks: int,
    address: str,
    folder: Path,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    block_size: int,
    on_gpu: bool,
    most_rows: int,
) -> None:
    """The process: steps-RANK.pickle, what the runner of graphs gives; without GPUs, Triton interprets its kernels.

    These sum up to `most_rows` tokens over the ranks by themselves; 0: the group sums all.
    """
    from service.model.graphs import GraphRunner

    if on_gpu:
        torch.cuda.set_device(rank)
    with _joined(rank, num_ranks, address, folder, dtype, on_gpu=on_gpu) as model:
        if most_rows:
            model.connect()
            assert model.peers is not None
            model.peers = replace(model.peers, most_rows=most_rows)
        runner = GraphRunner(model, num_blocks=64, block_size=block_size, max_num_seqs=5, max_num_batched_tokens=80)
        runner.capture()
        outputs = []
        for batch in batches:
            runner.launch(batch)
            outputs.append(runner.collect())
    (folder / f"steps-{rank}.pickle").write_bytes(pickle.dumps(outputs))


@contextmanager
def _joined(
    rank: int,
    num_ranks: int,
    address: str,
    folder: Path,
    dtype: torch.dtype,
    *,
    on_gpu: bool = False,
    weights: Format | None = None,
) -> Iterator[ParallelGPT2]:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(
        backend, init_method=address, rank=rank, world_size=num_ranks, device_id=device if on_gpu else None
    )
    group = dist.group.WORLD
    assert group is not None
    config = read_config(folder)
    part = partial(part_of, config=config, rank=rank, num_ranks=num_ranks)
    state = read_state(folder, config, dtype=dtype, device=device, part=part)
    yield ParallelGPT2(config, state, Group(group), weights)
    dist.barrier(group)
    dist.destroy_process_group()


def matrix_bytes(model: GPT2) -> int:
    """Of the matrices of its layers."""
    return sum(
        plain(product)[0].nbytes
        for layer in model.layers
        for product in (layer.qkv, layer.attention_output, layer.up, layer.down)
    )
