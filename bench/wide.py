"""A step of 33 tokens or more with its products by the CUDA kernel: right, and how fast, against Triton's.

python -m bench.wide [--dtype float16] [--points 48@192,64@192,96@192,128@192] [--prompts 64,128]
    [--seconds 100]

Every product is compared with plain operators first, then the logits of steps with those in fp32; then steps are timed
in turns: as served, by Triton's kernels, without one kind of kernel, and with one setting changed. `--prompts`: steps
that are one prompt of so many tokens, too, which are served by Triton's.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.chain import SHARED_MEMORY
from bench.decode import parse_steps
from bench.step import BLOCK_SIZE, Step, captured, replay_ms, sharp_345m
from service.model.gpt2 import GPT2
from service.model.kernels.cuda.chain import load_chains, packed, sources
from service.model.kernels.cuda.compiler import CompilerError
from service.model.kernels.cuda.decode import load_decode
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.cuda.launch import LaunchError, tiled_map
from service.model.kernels.plan import Plan, Wide
from service.model.kernels.plans import CUDA_DECODES, WIDES, head_for, plan_for

ROUNDS = 5
TOLERANCE = 8e-3  # of the largest number: results are rounded to 16 bits
# What is tried, one after the other.
SETTINGS: list[dict[str, Any]] = [
    {"blocks": 64},
    {"blocks": 128},
    {"ahead": 1},
    {"ahead": 4},
    {"stages": 4},
    {"stages": 6},
    {"step": 64, "stages": 8},
    {"step": 256, "stages": 2},
    {"groups": 2, "stages": 3},
    {"out_splits": 8},
    {"down_splits": 2},
    {"pdl": False},
]


def check_products(model: GPT2, num_tokens: int, wide: Wide) -> bool:
    """Each against torch's, of random numbers."""
    kernels = load_chains(model.config, model.dtype, {num_tokens: wide}, block_size=BLOCK_SIZE, folder=None)[num_tokens]
    errors = {}
    for name, source in sources(model.config, model.dtype, wide, block_size=BLOCK_SIZE, num_tokens=num_tokens).items():
        shape = dict(source.defines)
        size, depth, parts = shape["N"], shape["K"], shape["PARTS"]
        normal = partial(torch.randn, device="cuda")
        x = normal(num_tokens, depth * parts).to(model.dtype)
        weight, bias = (normal(size, depth * parts) * 0.02).to(model.dtype), normal(size)
        rows = torch.full((num_tokens, size), torch.nan, dtype=model.dtype, device="cuda")
        sums = torch.full((parts, num_tokens, size), torch.nan, device="cuda")
        expected = x.float() @ weight.float().t() + bias
        slots = torch.randperm(num_tokens, device="cuda").int()
        q, keys, values = (rows[:, each * size // 3 : (each + 1) * size // 3].clone() for each in range(3))
        given = (
            (size // shape["ROWS"], parts, kernels.token_blocks),
            tiled_map(x, wide.step),
            None,
            packed(weight),
            bias,
        )
        put = {"qkv": (q, keys, values, slots), "up": (rows, None, None, None)}.get(name, (sums, None, None, None))
        getattr(kernels, name)(*given, None, None, *put, 0.0, pdl=True)
        if name == "qkv":
            rows = torch.cat([q, keys[slots.long()], values[slots.long()]], 1)
        elif name == "up":
            expected = torch.nn.functional.gelu(expected, approximate="tanh")
        found = rows.float() if put[0] is not sums else sums.sum(0) + bias
        errors[name] = float((found - expected).abs().max() / expected.abs().max())
    print(f"  products, {num_tokens} tokens:", *(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
    return max(errors.values()) < TOLERANCE


@contextmanager
def without(step: Step, name: str, num_tokens: int) -> Iterator[None]:
    """No kernels of that name."""
    chained = step.fused._chained[num_tokens]
    owner, field = {"norm": (step.fused, "_add_and_norm"), "attention": (step.fused, "_attend")}.get(
        name, (chained, "_kernels")
    )
    kept = getattr(owner, field)
    idle: Any = lambda *_, **__: None  # noqa: E731
    setattr(owner, field, replace(kept, **{name: idle}) if owner is chained else idle)
    yield
    setattr(owner, field, kept)


def turns(name: str, model: GPT2, shape: dict[str, Any], num_tokens: int, *, until: float) -> bool:
    """Whether logits are right; prints what takes how long."""
    kind: dict[str, Any] = {"dtype": model.dtype, "narrow": False, "shared_memory": SHARED_MEMORY}
    plan = plan_for(num_tokens, decodes_only=not shape["prompt"], split=False, head_size=64, **kind)
    head = head_for(shape["num"], **kind)
    decode = load_decode(model, (cuda for _, cuda in CUDA_DECODES), block_size=BLOCK_SIZE, folder=None)

    def step_of(wide: Wide | None) -> tuple[Step, Plan]:
        given = {} if wide is None else {num_tokens: wide}
        chains = load_chains(model.config, model.dtype, given, block_size=BLOCK_SIZE, folder=None)
        return Step(model, **shape, cuda=CudaKernels(chains, decode)), replace(plan, chain=wide)

    served = WIDES[num_tokens]
    step, chained = step_of(served)
    other, triton = step_of(None)
    error, same = step.error(chained, head)
    print(f"  {name}: {served}: logits off by {error:.1e}, Triton's {other.error(triton, head)[0]:.1e}", flush=True)
    graphs = {
        "Triton's": captured(lambda: other.run(triton, head)),
        "served": captured(lambda: step.run(chained, head)),
    }
    for part in ("qkv", "out", "up", "down", "norm", "attention"):
        with without(step, part, num_tokens):
            graphs[f"without {part}"] = captured(lambda: step.run(chained, head))
    times = {label: sorted(replay_ms(graph, 0.04) for _ in range(ROUNDS)) for label, graph in graphs.items()}
    for label, found in times.items():
        print(f"    {found[ROUNDS // 2]:.4f} ms ({found[0]:.4f} to {found[-1]:.4f})  {label}", flush=True)
    for change in SETTINGS:
        tried = replace(served, **change)
        if tried == served or time.monotonic() > until:
            continue
        try:
            changed, plan_of_it = step_of(tried)
            graph = captured(partial(changed.run, plan_of_it, head))
        except (CompilerError, LaunchError) as problem:
            print(f"    {change} cannot be had: {str(problem).splitlines()[0][:80]}")
            continue
        print(f"    {replay_ms(graph, 0.04):.4f} ms  {change}", flush=True)
    return error < 2e-2 and same > 0.95


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--points", type=parse_steps, default="48@192,64@192,96@192,128@192")
    parser.add_argument("--prompts", type=lambda text: [int(size) for size in text.split(",")], default=[])
    parser.add_argument("--seconds", type=float, default=100, help="no further setting is tried after so many")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    model = sharp_345m(getattr(torch, arguments.dtype))
    good = all(check_products(model, num, wide) for num, wide in WIDES.items())
    for num, context in arguments.points:
        shape = {"num": num, "context": context, "prompt": False}
        good &= turns(f"{num} single tokens at {context}", model, shape, num, until=until)
    for num in arguments.prompts:
        shape = {"num": 1, "context": num, "prompt": True}
        good &= turns(f"a prompt of {num}", model, shape, num, until=until)
    print(f"all right: {good}")


if __name__ == "__main__":
    main()
