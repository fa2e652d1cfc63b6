"""Searches the shapes of the kernels of a step, by batch, on this GPU: the plans of service/model/kernels/plans.py.

python -m bench.tune [--dtype bfloat16] [--kv-cache-dtype fp8] [--steps 1@256,8@512] [--prompts 1@512]
    [--seconds 240] [--out FILE]
"""

import argparse
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.random_model import random_gpt2
from bench.step import Step
from service.model.formats import Narrowed, format_for
from service.model.kernels.plan import Decode, Library, Plan, Prefill, Product, Tiled, Vector

Candidates = dict[str, list[Any]]


def vectors(narrow: bool, down: bool = False) -> list[Product]:
    if down and narrow:
        wide = [(8, 4096, 16), (16, 4096, 16), (8, 4096, 8), (4, 4096, 4), (4, 4096, 8), (8, 2048, 8), (16, 2048, 8)]
        return [Vector(n, k, w) for n, k, w in wide]
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
    if narrow:
        shapes = [
            (16, 1024, 8),
            (32, 1024, 8),
            (16, 1024, 4),
            (8, 1024, 4),
            (32, 1024, 16),
            (32, 1024, 4),
            (8, 1024, 2),
        ]
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
            (64, 128, 4, 8, 3),
            (128, 64, 4, 8, 4),
        ]
    else:
        shapes = [
            (32, 128, 1, 4, 4),
            (16, 128, 1, 4, 4),
            (64, 64, 1, 4, 5),
            (16, 256, 1, 4, 3),
            (32, 256, 1, 4, 2),
            (128, 64, 1, 8, 4),
            (64, 128, 1, 8, 3),
        ]
    return [
        Tiled(t, n, k, s, w, st, p)
        for t in times
        for n, k, s, w, st in shapes
        for p in (False, True)
        if p is False or not split
    ]


def searches(rows: int, *, prompt: bool, narrow: bool) -> Iterator[Candidates]:
    """Families of plans: in each, what every part may be."""
    decodes = [
        Decode(b, s, w)
        for b, w in ((32, 1), (32, 2), (16, 1), (64, 4), (64, 2), (64, 1))
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
            "qkv": vectors(narrow),
            "out": vectors(narrow),
            "up": vectors(narrow),
            "down": vectors(narrow, down=True),
            "decode": split,
            "prefill": prefills,
            "head": [Vector(16, 1024, 4), Vector(32, 1024, 8), Vector(16, 1024, 8), Vector(64, 1024, 16)],
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


def _compile(job: tuple[str, str, int, int, bool, list[tuple[Plan, Product]]]) -> int:
    dtype, kv_cache, num, context, prompt, plans = job
    weights = format_for(dtype, torch.device("cuda"), kv_cache=kv_cache)
    step = Step(random_gpt2(weights=weights, device="cuda", num_layers=1), num=num, context=context, prompt=prompt)
    done = 0
    for plan, head in plans:
        try:
            step.run(plan, head)
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
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--steps", default="1@256,2@256,4@256,8@512,16@256,32@192,64@192,128@192,256@192")
    parser.add_argument("--prompts", default="")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    weights = format_for(arguments.dtype, torch.device("cuda"), kv_cache=arguments.kv_cache_dtype)
    narrow = isinstance(weights, Narrowed)
    began = time.monotonic()
    jobs = [
        (int(num), int(context), prompt)
        for prompt, steps in ((False, arguments.steps), (True, arguments.prompts))
        for num, context in (text.split("@") for text in steps.split(",") if text)
    ]
    work = []
    for num, context, prompt in jobs:
        plans = [
            pair
            for candidates in searches(num * (context if prompt else 1), prompt=prompt, narrow=narrow)
            for pair in _variants(candidates)
        ]
        size = max(1, len(plans) // 3)
        kind = (arguments.dtype, arguments.kv_cache_dtype, num, context, prompt)
        work += [(*kind, plans[i : i + size]) for i in range(0, len(plans), size)]
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = sum(pool.map(_compile, work))
    print(f"compiled for {compiled} plans in {time.monotonic() - began:.0f} s", flush=True)
    model = random_gpt2(weights=weights, device="cuda")
    rows, profiled = [], []
    for num, context, prompt in jobs:
        step = Step(model, num=num, context=context, prompt=prompt)
        best, choice = float("inf"), {}
        for candidates in searches(num * (context if prompt else 1), prompt=prompt, narrow=narrow):
            print(f"{num}@{context}{' prompt' if prompt else ''}", flush=True)
            found, chosen = descend(candidates, step.milliseconds, time.monotonic() + arguments.seconds / len(jobs))
            print(f"  {found:.4f} ms: {chosen}", flush=True)
            if found < best:
                best, choice = found, chosen
        plan, head = Plan(**{k: v for k, v in choice.items() if k != "head"}), choice["head"]
        error, same = step.error(plan, head)
        again = step.milliseconds(plan, head, seconds=0.3)
        plain = Step(model, num=num, context=context, prompt=prompt, pdl=False).milliseconds(plan, head)
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
        profiled.append((step, plan, head))
    for step, plan, head in profiled:  # last: the profiler slows what comes after it
        print(step.profile(dataclasses.replace(plan, pdl=False), head))
    for row in rows:
        print(row["num"], row["context"], "prompt" if row["prompt"] else "step", f"{row['ms']:.4f}", row["plan"])


if __name__ == "__main__":
    main()
