"""Microseconds of a sum over ranks, as one stands between a product and the residual stream of a split model.

python -m bench.allreduce [--ranks 2] [--rows 1,8,64,256,2048] [--hidden 1024] [--out FILE.json]

Rows of fp32, one process a GPU. `sum` is the collective alone, `with norm` what a layer needs: the sum, bias, residual
and layer norm, which is one kernel where ranks store into each other's memory (kernels/peers.py), else two. Each is in
a graph many times, as the layers of a model have it; graphs are replayed in turns, and the median of the rounds is that
of the slowest rank. All are compared before with the sum that one process makes. Without GPUs it runs under
TRITON_INTERPRET=1, and its numbers say nothing.
"""

import argparse
import json
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from service.model.kernels import norms, peers
from service.model.kernels.plan import power_of_two
from service.model.parallel import Group
from service.model.peers import Peers

ON_GPU = torch.cuda.is_available()
_SUMS = 48 if ON_GPU else 2  # in a graph, as in a step of the 345M
_ROUNDS = 20 if ON_GPU else 2
_REPLAYS = 10 if ON_GPU else 1  # of a graph in a round
_EPSILON = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=min(2, torch.cuda.device_count()) or 2)
    parser.add_argument("--rows", type=_numbers, default="1,8,64,256,2048" if ON_GPU else "1,3")
    parser.add_argument("--hidden", type=int, default=1024 if ON_GPU else 48)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    mp.spawn(run, (address, arguments), nprocs=arguments.ranks)  # type: ignore[attr-defined, no-untyped-call]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


class Sums:
    """The ways to sum `rows` rows, over buffers of their own."""

    def __init__(self, group: dist.ProcessGroup, ranks: Peers | None, *, rows: int, hidden: int, dtype: torch.dtype):
        self.group = Group(group)
        self._process_group, self._ranks = group, ranks
        self._rows, self._hidden = rows, hidden
        device = torch.device("cuda", group.rank()) if ON_GPU else torch.device("cpu")
        pdl = ON_GPU and torch.cuda.get_device_capability() >= (9, 0)
        self._chain = {"PDL": pdl, "launch_pdl": pdl}

        def random(*shape: int, seed: int) -> Tensor:  # the same on every device
            return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)

        self.all = [random(rows, hidden, seed=1000 + rank) for rank in range(group.size())]
        self.parts = torch.empty(rows, hidden, device=device)
        self.before = random(rows, hidden, seed=1)
        self.bias, self.gain, self.shift = (random(hidden, seed=seed) for seed in (2, 3, 4))
        self.x = torch.empty(rows, hidden, device=device)
        self.normed = torch.empty(rows, hidden, dtype=dtype, device=device)
        self._shared: Tensor | None = None
        if ON_GPU and group.size() > 1 and ranks is not None:
            import torch.distributed._symmetric_memory as symmetric

            self._shared = symmetric.empty(rows, hidden, device=device)
            symmetric.rendezvous(self._shared, group)

    def ways(self) -> dict[str, Callable[[int], object]]:
        """By name; each is told how many sums went before."""
        name = "nccl" if ON_GPU else "gloo"
        ways: dict[str, Callable[[int], object]] = {
            f"{name} sum": lambda _: self._collective(),
            f"{name} with norm": lambda _: self._norm(self._collective()),
        }
        if self._shared is not None:
            ways["torch one-shot sum"] = lambda _: self._one_shot()
            ways["torch one-shot with norm"] = lambda _: self._norm(self._one_shot())
        if self._ranks is not None:
            ways["peers with norm"] = self._by_peers
        return ways

    def reset(self) -> None:
        """What each sum begins with; in-place sums then are of their own results."""
        own = self.all[self.group.rank]
        self.parts.copy_(own)
        if self._shared is not None:
            self._shared.copy_(own)
        self.x.copy_(self.before)

    def zero(self) -> None:
        """So that sums of sums stay finite."""
        for tensor in (self.parts, self._shared, self.bias):
            if tensor is not None:
                tensor.zero_()

    def check(self, name: str) -> None:
        """What the first sum gave is right, and on every rank the same. Raises AssertionError."""
        total = torch.stack(self.all).double().sum(0)
        if name.endswith(" sum"):
            if name.startswith("torch"):
                return  # the same as with norm
            torch.testing.assert_close(self.parts.double(), total, rtol=1e-5, atol=1e-5)
            return
        expected = self.before.double() + self.bias.double() + total
        torch.testing.assert_close(self.x.double(), expected, rtol=1e-5, atol=1e-5)
        normed = torch.nn.functional.layer_norm(
            expected, (self._hidden,), self.gain.double(), self.shift.double(), _EPSILON
        )
        torch.testing.assert_close(self.normed.double(), normed, rtol=2e-2, atol=2e-2)
        everywhere = self.group.gather(self.x)
        assert all(torch.equal(everywhere[0], other) for other in everywhere), f"{name}: ranks differ"

    def _collective(self) -> Tensor:
        self.group.sum(self.parts)
        return self.parts

    def _one_shot(self) -> Tensor:
        result: Tensor = torch.ops.symm_mem.one_shot_all_reduce(self._shared, "sum", self._process_group.group_name)
        return result

    def _norm(self, parts: Tensor) -> None:
        norms.add_and_norm[(self._rows,)](self.x, parts, *self._rest(), **self._shape())

    def _by_peers(self, number: int) -> None:
        ranks = self._ranks
        assert ranks is not None
        received = ranks.received.own[number % 2]
        peers.sum_and_norm[(min(self._rows, peers.MOST_PROGRAMS),)](
            self.x,
            self.parts,
            ranks.places(number % 2),
            received,
            *self._rest(),
            **self._shape(),
            RANKS=ranks.num_ranks,
            MOST_ROWS=received.shape[1],
        )

    def _rest(self) -> tuple[Any, ...]:
        return self.bias, self.gain, self.shift, self.normed, self._rows, _EPSILON

    def _shape(self) -> dict[str, Any]:
        return {"H": self._hidden, "WIDTH": power_of_two(self._hidden), "SPLITS": 1, **self._chain}


def run(rank: int, address: str, arguments: argparse.Namespace) -> None:
    """A rank's process."""
    device = torch.device("cuda", rank) if ON_GPU else torch.device("cpu")
    if ON_GPU:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if ON_GPU else "gloo",
        init_method=address,
        rank=rank,
        world_size=arguments.ranks,
        device_id=device if ON_GPU else None,
    )
    group = dist.group.WORLD
    assert group is not None
    found = []
    most_rows = max(arguments.rows)
    ranks = Group(group).peers(hidden=arguments.hidden, columns=128, most_rows=most_rows, most_logits=1, device=device)
    for rows in arguments.rows:
        sums = Sums(group, ranks, rows=rows, hidden=arguments.hidden, dtype=torch.bfloat16 if ON_GPU else torch.float32)
        microseconds = {name: round(value, 2) for name, value in measure(sums).items()}
        found.append({"rows": rows, "us": microseconds})
        if rank == 0:
            print(
                f"{rows:4} rows  " + "  ".join(f"{name} {value:.2f}" for name, value in microseconds.items()),
                flush=True,
            )
    if rank == 0 and arguments.out is not None:
        about = {
            "device": torch.cuda.get_device_name(device) if ON_GPU else "cpu",
            "ranks": arguments.ranks,
            "hidden": arguments.hidden,
            "torch": torch.__version__,
            "sums": found,
        }
        arguments.out.write_text(json.dumps(about, indent=1) + "\n")
    dist.barrier(group)
    dist.destroy_process_group()


def measure(sums: Sums) -> dict[str, float]:
    """Microseconds of one, by way."""
    graphs: dict[str, Callable[[], None]] = {}
    for name, way in sums.ways().items():
        sums.reset()
        try:
            way(0)
        except RuntimeError as error:
            if not name.startswith("torch"):
                raise
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            continue
        sums.check(name)
        way(1)  # an even number, for the buffers

        def work(way: Callable[[int], object] = way) -> None:
            for number in range(_SUMS):
                way(number)

        graphs[name] = _captured(work) if ON_GPU else work
    sums.zero()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, graph in graphs.items():
            sums.group.least(0, sums.x.device)  # all begin together
            times[name].append(_seconds(graph))
    medians = torch.tensor([statistics.median(values) for values in times.values()], dtype=torch.float64)
    slowest = sums.group.gather(medians.to(sums.x.device)).amax(0)
    return {name: 1e6 * float(value) / _SUMS for name, value in zip(graphs, slowest, strict=True)}


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _seconds(replay: Callable[[], None]) -> float:
    if not ON_GPU:
        began = time.perf_counter()
        replay()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    replay()
    start.record()
    for _ in range(_REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / _REPLAYS


if __name__ == "__main__":
    main()
