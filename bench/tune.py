"""Searches the shapes of the kernels of a step, by batch, on this GPU: the plans of service/model/kernels/plans.py.

python -m bench.tune [--dtype bfloat16] [--steps 1@256,8@512] [--prompts 128,512] [--seconds 240] [--out FILE]
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.random_model import random_gpt2
from service.model.attention import Decodes, PagedAttention
from service.model.attention import Prefill as PlainPrefill
from service.model.batch import SAMPLING
from service.model.fused import FusedGPT2, StepTensors
from service.model.gpt2 import GPT2
from service.model.kernels.plan import Decode, Library, Plan, Prefill, Product, Tiled, Vector
from service.model.tail import RowTensors, Tail

BLOCK_SIZE, TABLE = 16, 64


class Bench:
    """One step's graph by plan: `num` single tokens of `context`, or with `prompt` one prompt a sequence."""

    def __init__(self, model: GPT2, *, num: int, context: int, prompt: bool, pdl: bool = True) -> None:
        self.model = model
        counts = [context if prompt else 1] * num
        tokens = sum(counts)
        device = model.device
        generator = torch.Generator(device).manual_seed(1)
        num_blocks = num * -(-context // BLOCK_SIZE)
        self.cache = model.new_cache(num_blocks=num_blocks + 1, block_size=BLOCK_SIZE)
        self.cache._cache.normal_(0, 0.5, generator=generator)

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
        self.fused = FusedGPT2(model, self.cache, max_tokens=max(tokens, 16), block_size=BLOCK_SIZE, pdl=pdl)
        self.tail = Tail(model, max_rows=num, pdl=pdl)
        self.counts = counts

    def run(self, plan: Plan, head: Product) -> torch.Tensor:
        self.fused.body(self.step, self.tail.sampled, plan)
        logits = self.tail.logits(self.fused.x, self.rows.indices, head)
        self.tail.sample(logits, self.rows)
        return logits

    def milliseconds(self, plan: Plan, head: Product, *, seconds: float = 0.04) -> float:
        """Median of ten groups of replays back to back."""
        self.run(plan, head)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(plan, head)
        return replay_ms(graph, seconds)

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
        lengths = step.lengths.tolist()
        prefills, decodes = [], []
        if step.query_starts is None:
            decodes = [
                Decodes(0, len(lengths), lengths[0], step.tables[:, : -(-lengths[0] // BLOCK_SIZE)], step.lengths)
            ]
        else:
            starts = step.query_starts.tolist()
            prefills = [PlainPrefill(starts[i], starts[i + 1], n, step.tables[i], None) for i, n in enumerate(lengths)]
        attention = PagedAttention(slots=step.slots.long(), decodes=decodes, prefills=prefills, block_size=BLOCK_SIZE)
        hidden = model.hidden(step.token_ids.long(), step.positions.long(), self.cache, attention)
        return model.logits(hidden[self.rows.indices.long()])


def replay_ms(graph: torch.cuda.CUDAGraph, seconds: float) -> float:
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    for _ in range(int(seconds / 2 / max(time.perf_counter() - began, 1e-5))):  # clocks go up under load
        graph.replay()
    count = max(1, min(20, int(seconds / 10 / max(time.perf_counter() - began, 1e-5))))
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / count)
    return statistics.median(times)


Candidates = dict[str, list[Any]]


def vectors(down: bool = False) -> list[Product]:
    if down:
        return [
            Vector(n, k, w)
            for n, k, w in (
                (8, 4096, 16),
                (4, 4096, 4),
                (8, 4096, 8),
                (4, 4096, 8),
                (8, 2048, 8),
                (4, 2048, 4),
                (16, 4096, 16),
            )
        ]
    shapes = [(16, 1024, 8), (8, 1024, 8), (32, 1024, 8), (8, 1024, 4), (16, 1024, 16), (16, 1024, 4), (32, 1024, 16)]
    return [Vector(n, k, w, p) for n, k, w in shapes for p in (False, True)]


def tiles(rows: int, split: bool) -> list[Product]:
    times = [max(rows, 16)] if rows <= 64 else [64, 128]
    if split:
        shapes = [
            (32, 128, 4, 4, 4),
            (32, 128, 2, 4, 4),
            (16, 256, 2, 4, 3),
            (32, 128, 8, 4, 4),
            (16, 128, 4, 4, 4),
            (64, 64, 4, 4, 4),
            (16, 256, 4, 4, 3),
        ]
    else:
        shapes = [
            (32, 128, 1, 4, 4),
            (16, 128, 1, 4, 4),
            (64, 64, 1, 4, 5),
            (16, 256, 1, 4, 3),
            (32, 256, 1, 4, 2),
            (128, 64, 1, 8, 4),
        ]
    return [
        Tiled(t, n, k, s, w, st, p)
        for t in times
        for n, k, s, w, st in shapes
        for p in (False, True)
        if p is False or not split
    ]


def searches(rows: int, *, prompt: bool) -> Iterator[Candidates]:
    """Families of plans: in each, what every part may be."""
    decodes = [
        Decode(b, s, w)
        for b, w in ((32, 1), (32, 2), (16, 1), (64, 4), (64, 2))
        for s in ((1,) if rows >= 64 else (4, 2, 1))
    ]
    split = [
        Decode(b, s, w, m)
        for b, s, w, m in (
            (32, 8, 2, False),
            (32, 4, 2, False),
            (64, 4, 4, False),
            (32, 8, 1, False),
            (16, 16, 1, False),
            (32, 8, 4, False),
            (32, 8, 2, True),
            (64, 4, 4, True),
        )
    ]
    heads: list[Product] = [
        Tiled(max(16, min(rows, 64)), 32, 128, 1, 4, 4),
        Tiled(max(16, min(rows, 64)), 64, 64, 1, 4, 4),
        Tiled(max(16, min(rows, 64)), 64, 128, 1, 4, 3, False),
        Tiled(max(16, min(rows, 64)), 128, 64, 1, 4, 4),
        Library(),
    ]
    prefills = (
        [Prefill(64, 64, 4, 2), Prefill(64, 64, 4, 3), Prefill(64, 32, 4, 3), Prefill(64, 128, 4, 2)]
        if prompt
        else [Prefill(64, 64, 4, 2)]
    )
    if prompt:
        decodes = decodes[:1]
    if rows == 1:
        yield {
            "qkv": vectors(),
            "out": vectors(),
            "up": vectors(),
            "down": vectors(down=True),
            "decode": split,
            "prefill": prefills,
            "head": [Vector(32, 1024, 8), Vector(16, 1024, 8), Vector(64, 1024, 16), *heads],
        }
    if rows > 1:
        library = [Library()] if rows >= 128 else []
        yield {
            "qkv": [*tiles(rows, False), *library],
            "out": [*tiles(rows, True), *library],
            "up": [*tiles(rows, False), *library],
            "down": [*tiles(rows, True), *library],
            "decode": decodes,
            "prefill": prefills,
            "head": heads,
            "pdl": [True, False],
        }


def descend(
    candidates: Candidates, measure: Callable[[Plan, Product], float], deadline: float
) -> tuple[float, dict[str, Any]]:
    """Coordinate descent from the first of each."""
    choice = {part: options[0] for part, options in candidates.items()}

    def cost(choice: dict[str, Any]) -> float:
        parts = dict(choice)
        return measure(Plan(**{k: v for k, v in parts.items() if k != "head"}), parts["head"])

    best = cost(choice)
    for round_ in range(2):
        before = best
        for part, options in candidates.items():
            for option in options:
                if option == choice[part] or time.monotonic() > deadline:
                    continue
                try:
                    found = cost(choice | {part: option})
                except Exception as error:  # a shape that does not fit
                    print(f"  {part} {option}: {type(error).__name__} {str(error)[:80]}")
                    continue
                if found < best * 0.998:
                    best, choice = found, choice | {part: option}
        print(f"  round {round_}: {before:.4f} -> {best:.4f}", flush=True)
        if best > before * 0.995:
            break
    return best, choice


def _compile(job: tuple[str, int, int, bool, list[tuple[Plan, Product]]]) -> int:
    dtype, num, context, prompt, plans = job
    bench = Bench(
        random_gpt2(dtype=getattr(torch, dtype), device="cuda", num_layers=1), num=num, context=context, prompt=prompt
    )
    done = 0
    for plan, head in plans:
        try:
            bench.run(plan, head)
            done += 1
        except Exception as error:  # told again when it is measured
            print(f"  {plan}: {error}")
    torch.cuda.synchronize()
    return done


def _variants(candidates: Candidates) -> Iterator[tuple[Plan, Product]]:
    """Plans that have every option in one at least."""
    length = max(map(len, candidates.values()))
    for number in range(length):
        parts = {part: options[number % len(options)] for part, options in candidates.items()}
        head = parts.pop("head")
        yield Plan(**parts), head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", default="1@256,2@256,4@256,8@512,16@256,32@192,64@192,128@192,256@192")
    parser.add_argument("--prompts", default="")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    jobs = [(*map(int, text.split("@")), False) for text in arguments.steps.split(",") if text]
    jobs += [(*map(int, text.split("@")), True) for text in arguments.prompts.split(",") if text]
    work = []
    for num, context, prompt in jobs:
        plans = [
            pair
            for candidates in searches(num * (context if prompt else 1), prompt=prompt)
            for pair in _variants(candidates)
        ]
        size = max(1, len(plans) // 3)
        work += [(arguments.dtype, num, context, prompt, plans[i : i + size]) for i in range(0, len(plans), size)]
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = sum(pool.map(_compile, work))
    print(f"compiled for {compiled} plans in {time.monotonic() - began:.0f} s", flush=True)
    model = random_gpt2(dtype=getattr(torch, arguments.dtype), device="cuda")
    rows, profiled = [], []
    for num, context, prompt in jobs:
        bench = Bench(model, num=num, context=context, prompt=prompt)
        best, choice = float("inf"), {}
        for candidates in searches(num * (context if prompt else 1), prompt=prompt):
            print(f"{num}@{context}{' prompt' if prompt else ''}", flush=True)
            found, chosen = descend(candidates, bench.milliseconds, time.monotonic() + arguments.seconds / len(jobs))
            print(f"  {found:.4f} ms: {chosen}", flush=True)
            if found < best:
                best, choice = found, chosen
        plan, head = Plan(**{k: v for k, v in choice.items() if k != "head"}), choice["head"]
        error, same = bench.error(plan, head)
        again = bench.milliseconds(plan, head, seconds=0.3)
        plain = Bench(model, num=num, context=context, prompt=prompt, pdl=False).milliseconds(plan, head)
        print(f"{num}@{context} {'prompt ' * prompt}{again:.4f} ms (unchained {plain:.4f})", flush=True)
        print(f"  error {error:.1e}, greedy picks equal {same:.3f}", flush=True)
        rows.append(
            {
                "num": num,
                "context": context,
                "prompt": prompt,
                "ms": again,
                "unchained": plain,
                "error": error,
                "equal": same,
                "plan": {k: repr(v) for k, v in choice.items()},
            }
        )
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        profiled.append((bench, plan, head))
    for bench, plan, head in profiled:  # last: the profiler slows what comes after it
        print(bench.profile(dataclasses.replace(plan, pdl=False), head))
    for row in rows:
        print(row["num"], row["context"], "prompt" if row["prompt"] else "step", f"{row['ms']:.4f}", row["plan"])


if __name__ == "__main__":
    main()
