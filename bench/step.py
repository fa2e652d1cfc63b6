"""One step of the model captured in a graph: by our kernels, as a plan shapes them, and by plain operators.

Called by the benchmarks of kernels.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.random_model import gpt2_345m
from service.model.attention import Decodes, PagedAttention
from service.model.attention import Prefill as PlainPrefill
from service.model.batch import SAMPLING
from service.model.fused import FusedGPT2, StepTensors
from service.model.gpt2 import GPT2
from service.model.kernels.cuda.head import HeadKernel
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import Plan, Product
from service.model.tail import RowTensors, Tail

BLOCK_SIZE, TABLE = 16, 64


class Step:
    """One step's graph by plan: `num` single tokens of `context`, or with `prompt` one prompt a sequence."""

    def __init__(
        self,
        model: GPT2,
        *,
        num: int,
        context: int,
        prompt: bool,
        pdl: bool = True,
        cuda: CudaKernels | None = None,
    ) -> None:
        self.model = model
        counts = [context if prompt else 1] * num
        tokens = sum(counts)
        device = model.device
        generator = torch.Generator(device).manual_seed(1)
        num_blocks = num * -(-context // BLOCK_SIZE)
        self.cache = model.new_cache(num_blocks=num_blocks + 1, block_size=BLOCK_SIZE)
        for side in self.cache._cache:
            side.copy_(torch.empty(side.shape, device=device).normal_(0, 0.5, generator=generator))

        def ints(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int32, device=device)

        tables = torch.zeros(num, TABLE, dtype=torch.int32, device=device)
        order = torch.randperm(num_blocks, generator=generator, device=device)
        tables[:, : num_blocks // num] = order.view(num, -1)
        positions = (
            torch.arange(context, device=device).repeat(num)
            if prompt
            else torch.full((num,), context - 1, device=device)
        )
        sequences = torch.repeat_interleave(torch.arange(num, device=device), torch.tensor(counts, device=device))
        slots = tables[sequences, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = torch.arange(num + 1, device=device) * counts[0]
        self.step = StepTensors(
            token_ids=torch.randint(0, 50000, (tokens,), dtype=torch.int32, device=device, generator=generator),
            sources=ints([-1] * tokens),
            positions=ints(positions),
            slots=ints(slots),
            tables=tables,
            lengths=ints([context] * num),
            num_decodes=ints([0 if prompt else num]),
            turn=ints([0]),
            num_turns=3,
        )
        if prompt:
            tiles = [(number, start) for number in range(num) for start in range(0, context, 64)]
            self.step = dataclasses.replace(
                self.step,
                query_starts=ints(starts),
                tile_sequences=ints([tile[0] for tile in tiles]),
                tile_starts=ints([tile[1] for tile in tiles]),
                num_tiles=ints([len(tiles)]),
            )
        records = torch.zeros(num, SAMPLING.itemsize // 4, dtype=torch.int32, device=device)
        records[:, 2] = torch.tensor(1.0).view(torch.int32)
        self.rows = RowTensors(ints(starts[1:] - 1), ints([context] * num), records)
        self.fused = FusedGPT2(model, self.cache, max_tokens=max(tokens, 16), block_size=BLOCK_SIZE, pdl=pdl, cuda=cuda)
        self.tail = self.tail_of({} if cuda is None else cuda.heads, pdl=pdl)
        self.counts, self.context = counts, context

    def tail_of(self, heads: Mapping[int, HeadKernel], *, pdl: bool = True) -> Tail:
        most = len(self.rows.indices)
        return Tail(self.model, max_rows=most, turn=self.step.turn, num_turns=3, pdl=pdl, heads=heads)

    def run(self, plan: Plan, head: Product, tail: Tail | None = None) -> torch.Tensor:
        """The logits, by another `tail` where it is given."""
        tail = tail or self.tail
        self.fused.body(self.step, tail.sampled, plan)
        normed = None if plan.fused or self.step.query_starts is not None else self.fused.normed
        logits = tail.logits(self.fused.x, self.rows, head, normed=normed)
        tail.sample(logits, self.rows, head=head)
        return logits

    def milliseconds(self, plan: Plan, head: Product, *, seconds: float = 0.04) -> float:
        """Median of ten groups of replays back to back."""
        return replay_ms(captured(lambda: self.run(plan, head)), seconds)

    def error(self, plan: Plan, head: Product) -> tuple[float, float]:
        """Relative error of the logits against plain operators on the same weights in fp32, and equal greedy picks."""
        got = self.run(plan, head).clone()
        expected = self.plain()
        same = (got.argmax(-1) == expected.argmax(-1)).float().mean()
        picked = (self.tail.sampled[: len(got)] == got.argmax(-1)).float().mean()
        assert picked == 1, "the sampler disagrees with argmax"
        return float((got - expected).norm() / expected.norm()), float(same)

    def profile(self, plan: Plan, head: Product) -> str:
        """Microseconds a kernel, by name, one after the other."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                self.run(plan, head)
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
        return "\n".join(
            f"    {event.device_time_total / event.count:8.2f} us x {event.count // 3:3}  {event.key[:60]}"
            for event in events[:12]
        )

    def plain(self) -> torch.Tensor:
        step, model = self.step, self.model
        lengths = [self.context] * len(self.counts)
        prefills, decodes = [], []
        if step.query_starts is None:
            decodes = [
                Decodes(0, len(lengths), lengths[0], step.tables[:, : -(-lengths[0] // BLOCK_SIZE)], step.lengths)
            ]
        else:
            starts = [number * self.context for number in range(len(lengths) + 1)]
            prefills = [PlainPrefill(starts[i], starts[i + 1], n, step.tables[i], None) for i, n in enumerate(lengths)]
        attention = PagedAttention(slots=step.slots.long(), decodes=decodes, prefills=prefills, block_size=BLOCK_SIZE)
        hidden = model.hidden(step.token_ids.long(), step.positions.long(), self.cache, attention)
        return model.logits(hidden[self.rows.indices.long()])


def sharp_345m(dtype: torch.dtype) -> GPT2:
    """Random weights, in which attention looks somewhere: a token that is left out shows."""
    generator = torch.Generator("cuda").manual_seed(7)

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, device="cuda").normal_(float("norm.weight" in name), 0.02, generator=generator)
        if "qkv.weight" in name:
            tensor[: 2 * shape[1]] *= 3
        return tensor.to(dtype)

    return gpt2_345m(make, num_layers=24)


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()  # kernels are compiled and loaded by their first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, seconds: float) -> float:
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    for _ in range(int(seconds / 2 / max(time.perf_counter() - began, 1e-5))):  # clocks go up under load
        graph.replay()
    count = max(1, min(20, int(seconds / 10 / max(time.perf_counter() - began, 1e-5))))
    times: list[float] = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / count)
    return statistics.median(times)
