"""Attention of single tokens by the CUDA kernel: right, against plain operators, and how fast, against Triton's.

python -m bench.attention [--steps 2@256,8@512] [--kv-cache-dtype fp8] [--best 3] [--seconds 45]

Shapes are warps x passes / splits (CudaDecode). Of every one, microseconds a layer of attention alone, and milliseconds
of the whole step; then the best of them in turns with Triton's, as served. Steps past `--seconds` are left out.
"""

import argparse
import faulthandler
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from bench.decode import parse_steps
from bench.random_model import gpt2_345m
from bench.step import BLOCK_SIZE, TABLE, Step, captured, replay_ms, sharp_345m
from service.model.attention import LayerCache
from service.model.formats import Plain
from service.model.gpt2 import GPT2
from service.model.kernels import attention
from service.model.kernels.cuda.decode import DecodeKernels, load_decode
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import CudaDecode, Library, Plan, Product
from service.model.kernels.plans import head_for, plan_for

SHAPES = tuple(CudaDecode(warps, passes) for warps in (2, 4, 8) for passes in (2, 4))
STEPS = "2@256,8@512,64@192,256@192,16@256,32@256,128@192,4@256,64@512,8@128,2@900,32@768,256@512"
ROUNDS = 5
HEAD = 64
LENGTHS = (1, 2, 15, 16, 17, 33, 100, 129, 257, 300, 511, 513, 640, 1000, 1023, 1024)


def splits_for(num: int) -> tuple[int, ...]:
    if num >= 128:
        return (1,)
    return (1, 2) if num >= 32 else (1, 2, 4) if num >= 8 else (2, 4, 8)


def shown(shape: CudaDecode) -> str:
    return f"{shape.warps}x{shape.passes}/{shape.splits}"


def loaded(model: GPT2) -> DecodeKernels:
    return load_decode(model, SHAPES, block_size=BLOCK_SIZE, folder=None)


class Rows:
    """Single tokens of sequences of LENGTHS, in a cache of which all else are NaNs; and rows that do not decode."""

    def __init__(self, dtype: torch.dtype, num_heads: int, *, beside: bool, cache_dtype: torch.dtype) -> None:
        """`beside`: the new keys and values stand behind the queries, and not in the cache."""
        generator = torch.Generator("cuda").manual_seed(3)
        count, self.hidden, self.heads = len(LENGTHS), num_heads * HEAD, num_heads
        used = [-(-length // BLOCK_SIZE) for length in LENGTHS]
        order = torch.split(torch.randperm(sum(used), generator=generator, device="cuda"), used)

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, device="cuda").normal_(generator=generator)

        self.tables = torch.full((count + 3, TABLE), 10**6, dtype=torch.int32, device="cuda")
        numbers = torch.full((2, sum(used) * BLOCK_SIZE, self.hidden), torch.nan, device="cuda")
        newest, expected = [], []
        q = normal(count + 3, self.hidden).to(dtype)
        for row, (length, blocks) in enumerate(zip(LENGTHS, order, strict=True)):
            self.tables[row, : len(blocks)] = blocks
            positions = torch.arange(length, device="cuda")
            slots = blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            numbers[:, slots] = normal(2, length, self.hidden).to(cache_dtype).float()
            newest.append(int(slots[-1]))
            k, v = numbers[:, slots].double().view(2, length, num_heads, HEAD)
            scores = torch.einsum("hd,lhd->hl", q[row].double().view(num_heads, HEAD), k) * HEAD**-0.5
            expected.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v).flatten())
        self.expected = torch.stack(expected)
        self.lengths = torch.tensor([*LENGTHS, 10**6, 0, -7], dtype=torch.int32, device="cuda")
        self.num_rows = torch.tensor([count], dtype=torch.int32, device="cuda")
        self.q, before = q, numbers.clone()
        if beside:
            new = torch.full((2, len(q), self.hidden), torch.nan, dtype=dtype, device="cuda")
            new[:, :count] = numbers[:, newest].to(dtype)
            self.q = torch.cat((q, *new), 1)
            before[:, newest] = torch.nan
        self.before, self.after = before.to(cache_dtype), numbers.to(cache_dtype)

    def error(self, kernels: DecodeKernels | None, shape: CudaDecode) -> float:
        """Of the norms; infinite where something beside is touched. Without kernels Triton's, of so many splits."""
        cache, out = self.before.clone(), torch.full_like(self.q[:, : self.hidden], torch.nan).contiguous()
        split = (
            torch.full((len(self.q), shape.splits, self.hidden), torch.nan, device="cuda"),
            torch.full((len(self.q), shape.splits, 2, self.hidden), torch.nan, device="cuda"),
            torch.zeros(len(self.q), self.heads, dtype=torch.int32, device="cuda"),
        )
        given = (self.tables, self.lengths, self.num_rows, out)
        stride, scale = self.q.shape[1], HEAD**-0.5
        for _ in range(2):  # counters are 0 again
            if kernels is not None:
                layer = LayerCache(*cache)
                kernels(shape, self.q, layer, *given, split, scale=scale, stride=stride, together=False, pdl=True)
                continue
            attention.decode_attention[(self.heads, len(self.q), shape.splits)](
                *(self.q, *cache, *given, *split, scale),
                H=self.hidden,
                HEAD=HEAD,
                DIM=HEAD,
                TABLE=TABLE,
                BLOCK_SIZE=BLOCK_SIZE,
                STRIDE=stride,
                BLOCK=32,
                SPLITS=shape.splits,
                MERGED=True,
                BESIDE=False,
                PDL=True,
                launch_pdl=True,
                num_warps=1,
            )
        torch.cuda.synchronize()
        count = len(LENGTHS)
        same = torch.equal(cache.view(torch.uint8), self.after.view(torch.uint8))
        if not same or not out[count:].isnan().all() or split[2].any():
            return float("inf")
        return float(((out[:count].double() - self.expected).norm(dim=1) / self.expected.norm(dim=1)).max())


def check(dtype: torch.dtype, num_heads: int, cache_dtype: torch.dtype | None = None) -> bool:
    """Every shape and number of splits, with new keys in the cache and beside the queries."""
    cache_dtype = cache_dtype or dtype
    model = gpt2_345m(lambda _, shape: torch.empty(shape, dtype=dtype, device="meta"), num_layers=1)
    model.attention_width = num_heads * HEAD
    model.format = Plain(dtype, cache_dtype=cache_dtype)
    began = time.perf_counter()
    kernels = loaded(model)
    print(
        f"{dtype}, keys in {cache_dtype}, {num_heads} heads: compiled and loaded in {time.perf_counter() - began:.2f} s"
    )
    print("  registers", {f"{w}x{p}": kernel.registers for (w, p), kernel in kernels.kernels.items()})
    good = True
    for beside in (False, True):
        rows = Rows(dtype, num_heads, beside=beside, cache_dtype=cache_dtype)
        worst: dict[str, float] = {}
        for shape in SHAPES:
            for splits in (1, 2, 4, 8):
                worst[shown(replace(shape, splits=splits))] = rows.error(kernels, replace(shape, splits=splits))
        limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
        wrong = {name: error for name, error in worst.items() if not error <= limit}  # NaN, too
        triton = [rows.error(None, CudaDecode(1, 1, splits)) for splits in (1, 4)] if num_heads == 16 else []
        most = max(worst.values())
        print(f"  beside {beside}: worst row {most:.1e}; Triton's", *(f"{error:.1e}" for error in triton), flush=True)
        if wrong:
            print("  WRONG", wrong, flush=True)
            good = False
    return good


def plans(model: GPT2, num: int) -> tuple[Plan, Product]:
    """As served without the CUDA kernel."""
    shared_memory = driver.active.utils.get_device_properties(0)["max_shared_mem"]
    kind: dict[str, Any] = {"dtype": model.dtype, "narrow": False, "shared_memory": shared_memory}
    plan = plan_for(num, decodes_only=True, split=False, head_size=HEAD, **kind)
    return with_cuda(plan, None), head_for(num, **kind)


def with_cuda(plan: Plan, shape: CudaDecode | None) -> Plan:
    return replace(plan, decode=replace(plan.decode, cuda=shape))


def attend(step: Step, plan: Plan) -> None:
    """The attention of all layers."""
    for number in range(step.model.config.num_layers):
        layer = step.cache.layer(number)
        scale, whole = step.model.attention_scale(number), isinstance(plan.qkv, Library)
        step.fused._attend(layer, scale, step.step, plan, whole=whole)


@torch.inference_mode()
def compile_triton(num: int, cache_dtype: torch.dtype) -> None:
    """The kernels of one step, for another process to find."""
    generator = torch.Generator("cuda").manual_seed(7)
    model = gpt2_345m(
        lambda _, shape: torch.empty(shape, device="cuda").normal_(0, 0.02, generator=generator).bfloat16(),
        num_layers=1,
    )
    model.format = Plain(torch.bfloat16, cache_dtype=cache_dtype)
    Step(model, num=num, context=64, prompt=False).run(*plans(model, num))
    torch.cuda.synchronize()


def measure(model: GPT2, kernels: DecodeKernels, num: int, context: int, best: int) -> str:
    """Prints what it finds; the line of the table."""
    step = Step(model, num=num, context=context, prompt=False, cuda=CudaKernels(decode=kernels))
    plan, head = plans(model, num)
    layers = model.config.num_layers

    def times(shape: CudaDecode | None) -> tuple[float, float]:
        made = with_cuda(plan, shape)
        alone = replay_ms(captured(partial(attend, step, made)), 0.01)
        return 1000 * alone / layers, replay_ms(captured(partial(step.run, made, head)), 0.01)

    alone, whole = times(None)
    print(f"{num}@{context}: Triton {alone:.1f} us a layer alone, {whole:.4f} ms the step", flush=True)
    found: dict[CudaDecode, tuple[float, float]] = {}
    for shape in SHAPES:
        for splits in splits_for(num):
            candidate = replace(shape, splits=splits)
            found[candidate] = times(candidate)
    for splits in splits_for(num):
        of_one = {shape: each for shape, each in found.items() if shape.splits == splits}
        print(f"  splits {splits}:", *(f"{s.warps}x{s.passes} {a:.1f} {w:.4f}," for s, (a, w) in of_one.items()))
    best_shapes = sorted(found, key=lambda shape: found[shape][1])[:best]
    # Small steps are served without dependent launch: it did not pay with Triton's attention.
    ways = (True, False) if num <= 16 else (plan.pdl,)
    chosen = [(shape, pdl) for shape in (None, *best_shapes) for pdl in ways]
    graphs = {
        (shape, pdl): captured(partial(step.run, replace(with_cuda(plan, shape), pdl=pdl), head))
        for shape, pdl in chosen
    }
    turns: dict[tuple[CudaDecode | None, bool], list[float]] = {each: [] for each in chosen}
    for _ in range(ROUNDS):
        for each, graph in graphs.items():
            turns[each].append(replay_ms(graph, 0.02))
    medians = {each: statistics.median(times) for each, times in turns.items()}
    for (kind, pdl), ms in turns.items():
        name = f"{'triton' if kind is None else shown(kind)}{'' if pdl else ', no dependent launch'}"
        print(f"    {medians[kind, pdl]:.4f} ms ({min(ms):.4f} to {max(ms):.4f})  {name}", flush=True)
    served = min((each for each in chosen if each[0] is None), key=medians.__getitem__)
    fastest = min((each for each in chosen if each[0] is not None), key=medians.__getitem__)
    ours, pdl = fastest
    assert ours is not None
    ratio = statistics.median(a / b for a, b in zip(turns[served], turns[fastest], strict=True))
    errors = [step.error(replace(with_cuda(plan, each), pdl=way), head)[0] for each, way in (served, fastest)]
    return (
        f"{num:4}@{context:<5} Triton {medians[served]:.4f} ms ({'' if served[1] else 'not '}dependent), "
        f"{shown(ours)} {medians[fastest]:.4f} ms ({'' if pdl else 'not '}dependent; x {ratio:.3f}), "
        f"alone {alone:.1f} and {found[ours][0]:.1f} us a layer, logits off by {errors[0]:.1e} and {errors[1]:.1e}"
    )


def feed(model: GPT2, kernels: DecodeKernels, num: int, shape: CudaDecode, num_steps: int) -> bool:
    """Each step goes on from what the one before sampled: the same tokens with dependent launch, without, and again."""
    context = 700
    step = Step(model, num=num, context=context, prompt=False, cuda=CudaKernels(decode=kernels))
    plan, head = plans(model, num)
    plan = with_cuda(plan, shape)
    given = step.step
    filled = step.cache._cache.clone()
    step.rows.records[:, 0] = torch.tensor(1.0).view(torch.int32)  # temperature
    given.sources.copy_(torch.arange(num))
    graphs = {pdl: captured(partial(step.run, replace(plan, pdl=pdl), head)) for pdl in (True, False)}
    rows = torch.arange(num, device="cuda")
    found = []
    for pdl in (True, False, True):
        step.cache._cache.copy_(filled)
        step.tail.sampled.fill_(17)
        tokens = []
        for number in range(num_steps):
            positions = (context - num_steps + number - 3 * rows).clamp(min=0)  # lengths of their own
            given.positions.copy_(positions)
            given.lengths.copy_(positions + 1)
            step.rows.positions.copy_(positions + 1)
            blocks = given.tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0]
            given.slots.copy_(blocks * BLOCK_SIZE + positions % BLOCK_SIZE)
            graphs[pdl].replay()
            tokens.append(step.tail.sampled[:num].clone())
        found.append((torch.stack(tokens), step.fused.x.clone()))
    same = [all(map(torch.equal, found[0], other)) for other in found[1:]]
    print(
        f"{num_steps} steps of {num} by {shown(shape)}: the same without dependent launch, and again: {same}",
        flush=True,
    )
    return all(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=STEPS, type=parse_steps)
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of what is timed")
    parser.add_argument("--best", type=int, default=3, help="of them to take in turns with Triton's")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--limit", type=int, default=100, help="seconds after which all is given up")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    began = time.perf_counter()

    def passed() -> str:
        return f"{time.perf_counter() - began:.1f} s"

    cache_dtype = torch.float8_e4m3fn if arguments.kv_cache_dtype == "fp8" else torch.bfloat16
    sizes = sorted({num for num, _ in arguments.steps})
    table: list[str] = []
    torch.zeros(1, device="cuda")  # a context for the driver's calls
    with (
        torch.inference_mode(),
        ProcessPoolExecutor(len(sizes), mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        compiling = [pool.submit(compile_triton, num, cache_dtype) for num in sizes]
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
        kinds = ((torch.bfloat16, 16), (torch.float16, 16), (torch.bfloat16, 4))
        narrow = (torch.bfloat16, 16, torch.float8_e4m3fn), (torch.float16, 16, torch.float8_e4m3fn)
        good = all(check(*kind) for kind in (*kinds, *narrow))
        print(f"checked: {good}, {passed()}", flush=True)
        if good:
            model = sharp_345m(torch.bfloat16)
            model.format = Plain(torch.bfloat16, cache_dtype=cache_dtype)
            kernels = loaded(model)
            for job in compiling:
                job.result()
            print(f"Triton's are compiled, {passed()}", flush=True)
            good = feed(model, kernels, 8, CudaDecode(4, 4, splits=4), 300)
            good = feed(model, kernels, 64, CudaDecode(4, 2), 100) and good
            good = feed(model, kernels, 256, CudaDecode(2, 2), 40) and good
            for num, context in arguments.steps:
                if time.perf_counter() - began > arguments.seconds:
                    print(f"{num}@{context} is left out, {passed()}", flush=True)
                    continue
                table.append(measure(model, kernels, num, context, arguments.best))
    print("\n".join(table))
    print(f"all right: {good}, {passed()}")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
