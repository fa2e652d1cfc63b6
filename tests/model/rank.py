"""A rank's process, apart from the tests that start it, so that it imports no more than it needs."""

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from service.checkpoint.hub import read_config, read_state
from service.model.batch import Batch
from service.model.formats import Format, format_for
from service.model.gpt2 import GPT2, logits_of
from service.model.kernels.plan import Library, Vector
from service.model.parallel import Group, ParallelGPT2, part_of, plain
from service.model.peers import EMBEDDING, EMPTY


class SharedGroup(Group):
    """Of ranks that share one GPU, which NCCL refuses: sums and gathers on the host."""

    def sum(self, tensor: Tensor) -> None:
        summed = tensor.cpu()
        super().sum(summed)
        tensor.copy_(summed)

    def gather(self, part: Tensor) -> Tensor:
        return super().gather(part.cpu()).to(part.device)


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
    most_programs: int,
    name: str | None = None,
) -> None:
    """The process: steps-RANK.pickle, what the runner of graphs gives; without GPUs, Triton interprets its kernels.

    A sum has up to `most_programs`. `name` is of a GPU's format in 8 bits; without one, weights are in `dtype`.
    """
    from service.model.graphs import GraphRunner, most_rows
    from service.model.kernels import peers

    peers.MOST_PROGRAMS = most_programs
    weights = None
    if name is not None:
        weights = format_for(name, torch.device("cuda"), stored=str(dtype).removeprefix("torch."))
    with _joined(rank, num_ranks, address, folder, dtype, on_gpu=on_gpu, weights=weights) as model:
        assert model.connect(most_rows=80, most_logits=most_rows(5))
        runner = GraphRunner(model, num_blocks=64, block_size=block_size, max_num_seqs=5, max_num_batched_tokens=80)
        runner.capture()
        outputs = []
        for batch in batches:
            runner.launch(batch)
            outputs.append(runner.collect())
    (folder / f"steps-{rank}.pickle").write_bytes(pickle.dumps(outputs))


def check_sums(
    rank: int, num_ranks: int, address: str, folder: Path, on_gpu: bool, num_sums: int, most_rows: int
) -> None:
    """The process: sums of few rows and many, one after the other as a model of two layers has them, are right."""
    from service.model.kernels import norms, peers

    with _joined(rank, num_ranks, address, folder, torch.float32, on_gpu=on_gpu) as model:
        model.connect(most_rows=most_rows, most_logits=1)
        ranks, device, hidden = model.peers, model.device, model.config.hidden_size
        assert ranks is not None
        pdl = on_gpu and torch.cuda.get_device_capability() >= (9, 0)
        shape = {"H": hidden, "WIDTH": hidden, "PDL": pdl, "launch_pdl": pdl}

        def random(seed: int, *sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))

        gain, shift, bias = (random(seed, hidden).to(device) for seed in range(3))
        cases, found = [], []
        for number in range(num_sums):
            splits = 1 + number % 3 if number % 5 else 1
            num_tokens = (1, 3, 7, 1, most_rows)[number // 5 % 5]
            before = random(10 + number, num_tokens, hidden)
            parts = random(10_000 + number, num_ranks, splits, num_tokens, hidden)
            parts[0, :, :, ::5] = -0.0
            parts[:, :, 0, 3] = -0.0  # on all ranks
            if num_tokens > 1:
                parts[-1, :, -1, 1] = torch.nan if number % 4 == 1 else torch.inf
            cases.append((before, parts))
        for number, (before, parts) in enumerate(cases):
            buffer, splits, num_tokens = (EMBEDDING, 0, 1, 0, 1)[number % 5], parts.shape[1], len(before)
            own = parts[rank].to(device)
            x = (own[0] if buffer == EMBEDDING else before.to(device)).clone()
            normed = torch.empty_like(x)
            received = ranks.received.own[buffer]
            if number % 7 == rank:
                time.sleep(0.03)  # the others wait for what it sends
            peers.sum_and_norm[(min(num_tokens, most_rows // 4),)](
                x,
                own,
                ranks.places(buffer),
                received,
                bias,
                gain,
                shift,
                normed,
                num_tokens,
                1e-5,
                **shape,
                SPLITS=0 if buffer == EMBEDDING else splits,
                RANKS=num_ranks,
                MOST_ROWS=received.shape[1],
            )
            found.append((x, normed))
        for number, ((before, parts), (x, normed)) in enumerate(zip(cases, found, strict=True)):
            expected = parts.double().sum((0, 1))
            if number % 5:
                expected = before.double() + bias.cpu().double() + expected
            torch.testing.assert_close(x.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            again = torch.empty_like(normed)
            norms.add_and_norm[(len(x),)](x, x, bias, gain, shift, again, len(x), 1e-5, **shape, SPLITS=0)
            torch.testing.assert_close(normed, again, rtol=0, atol=0, equal_nan=True)
            assert len(x) == 1 or normed[-1].isnan().all()
            everywhere = model.group.gather(x.view(torch.int32))
            assert all(torch.equal(everywhere[0], other) for other in everywhere), "ranks differ"
        assert bool((ranks.received.own == EMPTY).all())


def check_logits(rank: int, num_ranks: int, address: str, folder: Path, on_gpu: bool, num_gathers: int) -> None:
    """The process: logits are all there and stay until they are read, also with nothing between two gathers."""
    from service.model.tail import RowTensors, Tail

    with _joined(rank, num_ranks, address, folder, torch.float32, on_gpu=on_gpu) as model:
        model.connect(most_rows=1, most_logits=4)
        ranks, device = model.peers, model.device
        assert ranks is not None
        ranks.count.fill_(2**31 - 5)  # counts overflow on the way
        ranks.arrived.own.fill_(2**31 - 5)
        model.group.least(0, device)
        pdl = on_gpu and torch.cuda.get_device_capability() >= (9, 0)
        tail = Tail(model, max_rows=4, turn=torch.zeros(1, dtype=torch.int32, device=device), num_turns=3, pdl=pdl)
        hidden = model.config.hidden_size
        steps = torch.randn(num_gathers, 5, hidden, generator=torch.Generator().manual_seed(0)).to(device)
        found = []
        for number, x in enumerate(steps):
            indices = torch.tensor([4, 0, 2][: 1 + number % 3], dtype=torch.int32, device=device)
            rows = RowTensors(indices, indices, torch.zeros(len(indices), 10, dtype=torch.int32, device=device))
            logits = tail.logits(x, rows, Vector(16, 64, 4) if len(indices) == 1 else Library())
            if number % 3 == rank:
                time.sleep(0.03)  # the others may be at the next by now
            found.append((x[indices.long()], logits.clone()))
        for number, (x, logits) in enumerate(found):
            torch.testing.assert_close(
                logits, model.logits(x), rtol=1e-4, atol=1e-4, msg=lambda m, n=number: f"{n}: {m}"
            )
            everywhere = model.group.gather(logits.contiguous())
            assert all(torch.equal(everywhere[0], other) for other in everywhere), "ranks differ"


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
    shared = on_gpu and torch.cuda.device_count() < num_ranks
    if shared:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", 0 if shared else rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    by_nccl = on_gpu and not shared
    dist.init_process_group(
        "nccl" if by_nccl else "gloo",
        init_method=address,
        rank=rank,
        world_size=num_ranks,
        device_id=device if by_nccl else None,
    )
    group = dist.group.WORLD
    assert group is not None
    config = read_config(folder)
    part = partial(part_of, config=config, rank=rank, num_ranks=num_ranks)
    state = read_state(folder, config, dtype=dtype, device=device, part=part)
    yield ParallelGPT2(config, state, (SharedGroup if shared else Group)(group), weights)
    dist.barrier(group)
    dist.destroy_process_group()


def matrix_bytes(model: GPT2) -> int:
    """Of the matrices of its layers."""
    return sum(
        plain(product)[0].weight.nbytes
        for layer in model.layers
        for product in (layer.qkv, layer.attention_output, layer.up, layer.down)
    )
