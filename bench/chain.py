"""A step of one to 32 tokens by the CUDA kernels: right, against plain operators, and how fast, against Triton's.

python -m bench.chain [--batches 1,2,4,8,16,32] [--dtype float16] [--points 1:256,8:512,16:256] [--steps 1000]
"""

import argparse
import faulthandler
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.random_model import gpt2_345m
from bench.step import BLOCK_SIZE, Step, captured, replay_ms, sharp_345m
from service.model.attention import Decodes, LayerCache, PagedAttention
from service.model.chained import ChainedLayers
from service.model.gpt2 import GPT2
from service.model.kernels.cuda.chain import ChainKernels, load_chains, normed_apart
from service.model.kernels.cuda.head import Ring, load_heads
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import Chain, Plan, Product
from service.model.kernels.plans import CHAINS, head_for, plan_for
from service.model.matrix import Matrix

ROUNDS = 5
SHARED_MEMORY = 232448
NAMES = ("qkv", "attention", "out", "up", "down", "norm")
# What is tried of a chain, one after the other.
SPLITS: list[dict[str, Any]] = [
    *({"splits": splits} for splits in (0, 1, 2, 4, 8)),  # 0: attention by Triton
    {"pdl": False},
    *({"ring": ring} for ring in (4, 6, 8)),
    {"ring": 8, "splits": 1},
    *({"warps": 16, "splits": 1, "ring": ring} for ring in (4, 6, 8)),
]
SETTINGS: list[dict[str, Any]] = [
    {"ahead": 2},
    {"pieces": 2},
    {"resident": 2},
    {"resident": 4},
    {"hand": 4},
    {"hand": 16, "resident": 2},
    {"room": 0},
    {"room": 80 * 1024},
]
# Of more than eight tokens, whose splits of a context nothing merges.
APART: list[dict[str, Any]] = [
    {"splits": 0},
    {"pdl": False},
    *({"ring": ring} for ring in (4, 8)),
    {"warps": 16, "ring": 4},
    *({"out_splits": splits} for splits in (1, 2, 4)),
    {"down_splits": 2},
    {"resident": 4, "hand": 4},
    {"resident": 3, "hand": 4, "room": 80 * 1024},
]
RINGS = [Ring(), Ring(2, 2), Ring(4, 4), Ring(3, 1), Ring(3, 3)]  # of the head; the first is served


def compiled(model: GPT2, num: int, chains: list[Chain], *, bounded: bool = False) -> list[ChainKernels]:
    """`bounded`: a copy that is waited for in vain is an error, not a hang. What several share is compiled once."""
    asked: dict[str, Any] = {"BOUNDED": 1} if bounded else {}

    with tempfile.TemporaryDirectory() as folder:
        place: dict[str, Any] = {"block_size": BLOCK_SIZE, "folder": Path(folder)}
        return [load_chains(model.config, model.dtype, {num: each}, **place, **asked)[num] for each in chains]


def cuda_of(model: GPT2, num: int, kernels: ChainKernels, ring: Ring = RINGS[0]) -> CudaKernels:
    found = torch.cuda.get_device_properties(model.device).multi_processor_count
    return CudaKernels({num: kernels}, heads=load_heads(model, [num], multiprocessors=found, folder=None, ring=ring))


def plan_of(model: GPT2, num: int, chain: Chain | None) -> Plan:
    plan = plan_for(
        num,
        dtype=model.dtype,
        decodes_only=True,
        narrow=False,
        split=False,
        head_size=model.config.head_size,
        shared_memory=SHARED_MEMORY,
    )
    return replace(plan, chain=chain)


def head_of(model: GPT2, num: int) -> Product:
    return head_for(num, dtype=model.dtype, narrow=False, shared_memory=SHARED_MEMORY)


def layers_of(step: Step) -> ChainedLayers:
    (found,) = step.fused._chained.values()
    return found


def change(step: Step, kernels: ChainKernels) -> ChainedLayers:
    """The step's chain is of these kernels from now on; what is returned is to be kept as long as its graphs."""
    now, num = layers_of(step), len(step.counts)
    args = (step.model, step.cache, now.layers, now._weights, now._biases, kernels, now.buffers, num)
    step.fused._chained[num] = ChainedLayers(*args)
    return step.fused._chained[num]


def launches(step: Step, plan: Plan, *, pdl: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    plan = replace(plan, pdl=pdl)
    return layers_of(step).launches(**step.fused._chain_inputs(step.step, plan), pdl=pdl)


def check_kernels(model: GPT2, num: int, chain: Chain, context: int) -> bool:
    """Each kernel of all layers, by itself, against plain operators in fp32 on what it really reads."""
    (kernels,) = compiled(model, num, [chain], bounded=True)
    step = Step(model, num=num, context=context, prompt=False, pdl=False, cuda=CudaKernels({num: kernels}))
    chained = layers_of(step)
    x, q, mixed, inner = (getattr(chained.buffers, name) for name in ("x", "q", "mixed", "inner"))
    slots, heads = step.step.slots.long(), model.config.num_heads
    apart, layer = normed_apart(num), -1
    normed, sums = chained.buffers.normed, chained.buffers.sums
    previous, added = "", torch.zeros_like(x)  # what a norm adds to x
    worst: dict[str, float] = {}
    x.normal_(0, 1)
    for name, launch in launches(step, plan_of(model, num, chain)):
        layer += previous in ("", "down")
        qkv, out, up, down = chained.layers[layer]
        cache = step.cache.layer(layer)
        keys, values = (side.flatten(0, 1).flatten(1) for side in cache)
        before = x.clone()
        if name == "qkv":
            q.fill_(torch.nan)
            keys[slots] = values[slots] = torch.nan
        poisoned = {"attention": [chained.parts, chained.stats, mixed], "up": [inner], "norm": [normed]}
        poisoned |= {"out": [sums], "down": [sums]} if apart else {}
        for tensor in poisoned.get(name, []):
            tensor.fill_(torch.nan)
        launch()
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"  FAILED layer {layer} {name}", flush=True)
            raise
        if name in ("qkv", "up"):
            matrix = qkv if name == "qkv" else up
            read = normed.float() if apart else _normed(before, matrix)
            expected = F.linear(read, matrix.weight.float(), matrix.bias.float())
            got = torch.cat([q, keys[slots], values[slots]], 1) if name == "qkv" else inner
            expected = expected if name == "qkv" else model.activation(expected)
        elif name == "attention":
            got = mixed.float()
            if chain.splits:
                peaks, masses = chained.stats.unbind(3)
                share = (masses * torch.exp2(peaks - peaks.amax(1, keepdim=True))).repeat_interleave(64, 2)
                got = (chained.parts.float() * share).sum(1) / share.sum(1)
            decodes = Decodes(0, num, context, step.step.tables[:, : -(-context // BLOCK_SIZE)], step.step.lengths)
            attend = PagedAttention(slots=slots, decodes=[decodes], prefills=[], block_size=BLOCK_SIZE)
            single = LayerCache(*(side.float() for side in cache))
            key, value = (side.flatten(0, 1)[slots].clone() for side in single)
            scale = model.attention_scale(layer)
            query = q.float().view(num, heads, 64)
            expected = attend(query, key, value, single, scale=scale, upcast=False).flatten(1)
            merged = got
        elif name == "norm":
            expected = torch.cat([x, _normed(x, up if previous == "out" else qkv)], 1)
            expected[:, : x.shape[1]] = before + added
            got = torch.cat([x, normed.float()], 1)
        else:
            matrix, read = (out, merged) if name == "out" else (down, inner.float())
            expected = F.linear(read, matrix.weight.float(), matrix.bias.float())
            got = x - before
            if apart:
                splits = chain.out_splits if name == "out" else chain.down_splits
                added = got = sums[: splits * x.numel()].view(splits, *x.shape).sum(0) + matrix.bias.float()
        previous = name
        rows = (got.float() - expected).norm(dim=1) / expected.norm(dim=1)
        if not bool((rows <= 1e-2).all()):  # NaN, too
            close = torch.isclose(got.float(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
            wrong = (~close).nonzero()
            print(
                f"  WRONG {num} tokens at {context}, layer {layer} {name}: relative errors {rows.tolist()}, "
                f"{len(wrong)} of {got.numel()} wrong, first {wrong[:16].tolist()}, last {wrong[-4:].tolist()}, "
                f"{got.flatten()[:4].tolist()} for {expected.flatten()[:4].tolist()}"
            )
            return False
        worst[name] = max(worst.get(name, 0.0), float(rows.max()))
    found = " ".join(f"{name} {error:.1e}" for name, error in worst.items())
    print(f"  kernels, {num} tokens at context {context}, {chain.splits} splits: {found}", flush=True)
    return True


def check_steps(model: GPT2, num: int, chain: Chain, context: int) -> bool:
    """A whole step by the chain and by Triton, both against plain fp32."""
    exact = gpt2_345m(lambda name, _: _float(model, name), num_layers=model.config.num_layers)
    (kernels,) = compiled(model, num, [chain], bounded=True)
    step = Step(model, num=num, context=context, prompt=False, cuda=cuda_of(model, num, kernels))
    head = head_of(model, num)
    chained, buffers = layers_of(step), layers_of(step).buffers
    filled = step.cache._cache.clone()
    found = {}
    by_triton = step.tail_of({})
    for name, plan, tail in (
        ("chain", plan_of(model, num, chain), step.tail),
        ("triton", plan_of(model, num, None), by_triton),
    ):
        for tensor in (buffers.x, buffers.q, buffers.mixed, buffers.inner, buffers.normed, buffers.sums):
            tensor.fill_(torch.nan)
        for tensor in (chained.parts, chained.stats):
            tensor.fill_(torch.nan)
        step.cache._cache.copy_(filled)
        found[name] = step.run(plan, head, tail).clone()
        torch.cuda.synchronize()
    step.cache._cache.copy_(filled)
    step.model = exact
    single = step.cache._cache.float()
    step.cache._cache = single
    expected = step.plain()
    errors = {name: float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max()) for name, got in found.items()}
    picks = {name: got.argmax(1) for name, got in found.items()}
    gaps = expected.max(1).values - expected.gather(1, picks["chain"][:, None])[:, 0]
    gap = float((gaps / expected.std(1)).max())
    same = int((picks["chain"] == expected.argmax(1)).sum())
    print(
        f"  step, {num} tokens at context {context}: logits off by",
        *(f"{name} {error:.1e}" for name, error in errors.items()),
        f"; {same} of {num} picks are plain fp32's, the others {gap:.4f} deviations below the best or less",
        flush=True,
    )
    return errors["chain"] < 2e-2 and gap < 0.1


def _normed(x: Tensor, matrix: Matrix) -> Tensor:
    assert matrix.norm is not None
    return F.layer_norm(x, x.shape[1:], matrix.norm.weight, matrix.norm.bias, matrix.norm.epsilon)


def _float(model: GPT2, name: str) -> Tensor:
    """The canonical tensor of that name."""
    *path, kind = name.split(".")
    if path[0].endswith("_embedding"):
        path, kind = [], path[0]
    found: Any = model
    for word in path:
        found = found[int(word)] if word.isdigit() else getattr(found, word)
    tensor: Tensor = getattr(found, kind)
    return tensor.float()


def turns(graphs: dict[str, torch.cuda.CUDAGraph], seconds: float) -> dict[str, float]:
    """Times them in turns, and prints the median and the range of each; the medians."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(replay_ms(graph, seconds))
    for name, found in times.items():
        found.sort()
        print(f"    {found[len(found) // 2]:.4f} ms ({found[0]:.4f} to {found[-1]:.4f})  {name}", flush=True)
    return {name: found[len(found) // 2] for name, found in times.items()}


def compare(model: GPT2, num: int, context: int, changes: list[dict[str, Any]], seconds: float) -> None:
    """The chain of the table, with one thing changed, and without a kernel; Triton's. Then all at once that helps."""
    base, head = CHAINS[num], head_of(model, num)
    chains, changed = {"chain": base}, {}
    for each in changes:
        other = replace(base, **each)
        if other not in chains.values():
            name = ", ".join(f"{key} {value}" for key, value in each.items())
            chains[name], changed[name] = other, each
    made = dict(zip(chains, compiled(model, num, list(chains.values())), strict=True))
    print(f"  {num} tokens at context {context}: {base}", flush=True)
    step = Step(model, num=num, context=context, prompt=False, cuda=cuda_of(model, num, made["chain"]))
    by_triton = step.tail_of({})
    graphs = {
        "triton": captured(partial(step.run, plan_of(model, num, None), head, by_triton)),
        "head by Triton": captured(partial(step.run, plan_of(model, num, base), head, by_triton)),
    }
    kept = []
    for name, chain in chains.items():
        kept.append(change(step, made[name]))
        graphs[name] = captured(partial(step.run, plan_of(model, num, chain), head))
    kept.append(change(step, made["chain"]))
    plan = plan_of(model, num, base)
    tails = {ring: step.tail_of(cuda_of(model, num, made["chain"], ring).heads) for ring in RINGS[1:]}
    graphs |= {f"head by {ring}": captured(partial(step.run, plan, head, tail)) for ring, tail in tails.items()}
    body = partial(step.fused.body, step.step, step.tail.sampled, plan)
    graphs["without head and sampling"] = captured(body)
    graphs["layers alone"] = captured(partial(_run, step, plan, ""))
    for name in NAMES:
        if name != "norm" or normed_apart(num):
            graphs[f"layers without {name}"] = captured(partial(_run, step, plan, name))
    times = turns(graphs, seconds)
    better: dict[str, Any] = {}
    for name in sorted(changed, key=times.__getitem__):
        if times[name] < 0.995 * times["chain"] and not better.keys() & changed[name].keys():
            better |= changed[name]
    both = replace(base, **better)
    if both not in chains.values():
        kept.append(change(step, *compiled(model, num, [both])))
        again = {"chain": graphs["chain"], f"{better}": captured(partial(step.run, plan_of(model, num, both), head))}
        turns(again, seconds)
    used = {name: [k.registers for k in (each.qkv, each.out, each.up, each.down)] for name, each in made.items()}
    print("    registers of qkv, out, up, down:", ", ".join(f"{name} {counts}" for name, counts in used.items()))


def _run(step: Step, plan: Plan, without: str) -> None:
    for name, launch in launches(step, plan, pdl=True):
        if name != without:
            launch()


def feed(model: GPT2, num: int, chain: Chain, num_steps: int) -> bool:
    """Each step goes on from what the one before sampled: the same tokens with dependent launch, without, and again."""
    context = 1024
    head = head_of(model, num)
    (kernels,) = compiled(model, num, [chain])
    step = Step(model, num=num, context=context, prompt=False, cuda=cuda_of(model, num, kernels))
    given = step.step
    filled = step.cache._cache.clone()
    step.rows.records[:, 0] = torch.tensor(1.0).view(torch.int32)  # temperature
    given.sources.copy_(torch.arange(num))
    plans = {"chain": plan_of(model, num, chain)}
    plans["no dependent launch"] = plan_of(model, num, replace(chain, pdl=False))
    plans["triton"] = plan_of(model, num, None)
    graphs = {name: captured(partial(step.run, plan, head)) for name, plan in plans.items()}
    found = {}
    for name in ("chain", "no dependent launch", "chain again", "triton"):
        step.cache._cache.copy_(filled)
        step.tail.sampled.fill_(17)
        tokens = torch.zeros(num_steps, num, dtype=torch.int32, device="cuda")
        for number in range(num_steps):
            position = context - num_steps + number
            given.positions.fill_(position)
            given.lengths.fill_(position + 1)
            step.rows.positions.fill_(position + 1)
            given.slots.copy_(given.tables[:, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            graphs[name.removesuffix(" again")].replay()
            tokens[number] = step.tail.sampled[:num]
        found[name] = (tokens, step.fused.x[:num].clone())
    tokens, x = found["chain"]
    same = True
    for name, (others, other_x) in found.items():
        differ = (tokens != others).nonzero()
        first = int(differ[0, 0]) if len(differ) else None
        different = len(set(tokens.flatten().tolist()))
        print(f"  {num_steps} steps of {num} tokens, {name}: first difference {first}, {different} tokens", flush=True)
        if name != "triton":
            same = same and first is None and torch.equal(x, other_x)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="2,4,8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--points", default="1:256,2:256,4:256,8:512,8:1024", help="tokens:context of what is timed, or none"
    )
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=int, default=58, help="seconds after which all is given up")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    batches = [int(num) for num in arguments.batches.split(",")]
    points = [tuple(map(int, point.split(":"))) for point in arguments.points.split(",") if point]
    began = time.perf_counter()
    good = True
    with torch.inference_mode():
        for number, dtype in enumerate(arguments.dtype.split(",")):
            model = sharp_345m(getattr(torch, dtype))
            print(f"{dtype}, {torch.cuda.get_device_name()}, {time.perf_counter() - began:.1f} s", flush=True)
            for num in batches:
                chain = CHAINS[num]
                for context in (1, 257, 1024):
                    good = good and check_kernels(model, num, chain, context)
                if num > 1 and number == 0:
                    for other in (replace(chain, splits=0), replace(chain, warps=16, splits=1, ring=4)):
                        good = good and check_kernels(model, num, other, 257)
                for context in (256, 1000):
                    good = good and check_steps(model, num, chain, context)
                print(f"  checked: {good}, {time.perf_counter() - began:.1f} s", flush=True)
            timed: set[int] = set()
            for num, context in points:
                if good and number == 0 and num in batches:
                    settings = [] if num == 1 or num in timed else SETTINGS  # once are enough
                    changes = APART if normed_apart(num) else SPLITS
                    changes = [each for each in changes if num > 1 or each.get("splits", 4) >= 4]
                    compare(model, num, context, [*changes, *settings], arguments.seconds)
                    timed.add(num)
            for num in batches:
                good = good and feed(model, num, CHAINS[num], arguments.steps)
    print(f"all right: {good}, {time.perf_counter() - began:.1f} s")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
