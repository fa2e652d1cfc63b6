"""A rank's process, apart from the test that starts it, so that it imports no more than it needs."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from service.checkpoint.hub import read_config, read_state
from service.model.gpt2 import GPT2, logits_of
from service.model.parallel import ParallelGPT2, part_of


def write_logits(rank: int, num_ranks: int, address: str, folder: Path, token_ids: list[int]) -> None:
    """The process: logits-RANK.pt in the model's folder, computed with the other ranks, which meet at `address`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    assert group is not None
    config = read_config(folder)
    part = partial(part_of, config=config, rank=rank, num_ranks=num_ranks)
    model = ParallelGPT2(config, read_state(folder, config, dtype=torch.float32, part=part), group)
    whole = GPT2(config, read_state(folder, config, dtype=torch.float32))
    assert matrix_bytes(whole) == num_ranks * matrix_bytes(model)
    torch.save(logits_of(model, token_ids), folder / f"logits-{rank}.pt")


def matrix_bytes(model: GPT2) -> int:
    """Of the matrices of its layers."""
    return sum(
        linear.weight.nbytes
        for layer in model.layers
        for linear in (layer.qkv, layer.attention_output, layer.up, layer.down)
    )
