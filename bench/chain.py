"""A lone token's step by the CUDA kernels: right, against plain operators, and how fast, against Triton's kernels.

python -m bench.chain [--dtype bfloat16] [--contexts 64,256,512,1024] [--splits 4,8] [--seconds 0.1] [--steps 1000]
"""

import argparse
import faulthandler
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.random_model import gpt2_345m
from bench.step import BLOCK_SIZE, Step, replay_ms
from service.model.attention import Decodes, LayerCache, PagedAttention
from service.model.chained import ChainedLayers
from service.model.gpt2 import GPT2
from service.model.kernels.cuda.chain import ChainKernels, load_chain, sources
from service.model.kernels.plan import Chain, Plan
from service.model.kernels.plans import head_for, plan_for

ROUNDS = 5


def sharp_345m(dtype: torch.dtype) -> GPT2:
    """Random weights, in which attention looks somewhere: a token that is left out shows."""
    generator = torch.Generator("cuda").manual_seed(7)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, device="cuda").normal_(float("norm.weight" in name), 0.02, generator=generator)
        if "qkv.weight" in name:
            tensor[: 2 * shape[1]] *= 3
        return tensor.to(dtype)

    return gpt2_345m(make, num_layers=24)


def compiled(model: GPT2, chain: Chain, *, bounded: bool = False) -> ChainKernels:
    """`bounded`: a copy that is waited for in vain is an error instead of a hang."""
    named = sources(model.config, model.dtype, chain, block_size=BLOCK_SIZE)
    if bounded:
        named = {name: replace(each, defines=(*each.defines, ("BOUNDED", 1))) for name, each in named.items()}
    return load_chain(named, chain, folder=None)


def plan_of(model: GPT2, chain: Chain | None, *, pdl: bool = True) -> Plan:
    plan = plan_for(
        1,
        dtype=model.dtype,
        decodes_only=True,
        narrow=False,
        split=False,
        head_size=model.config.head_size,
        shared_memory=232448,
    )
    return replace(plan, chain=chain, pdl=pdl)


def layers_of(step: Step) -> ChainedLayers:
    found = step.fused._chained
    assert found is not None
    return found


def launches(step: Step, *, pdl: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    given = step.step
    return layers_of(step).launches(slot=given.slots, table=given.tables, length=given.lengths, pdl=pdl)


def check_kernels(model: GPT2, chain: Chain, context: int) -> bool:
    """Each kernel of all layers, by itself, against plain operators in fp32 on what it really reads."""
    kernels = compiled(model, chain, bounded=True)
    step = Step(model, num=1, context=context, prompt=False, pdl=False, cuda=kernels)
    chained = layers_of(step)
    slot, heads = int(step.step.slots[0]), model.config.num_heads
    worst: dict[str, tuple[float, int]] = {}
    chained.x.normal_(0, 1)
    for number, (name, launch) in enumerate(launches(step)):
        layer = number // 5
        qkv, out, up, down = chained._matrices[layer]
        cache = step.cache.layer(layer)
        before = chained.x.clone()
        poisoned = {
            "qkv": [chained.q, cache.keys.flatten(0, 1)[slot], cache.values.flatten(0, 1)[slot]],
            "attention": [chained.parts, chained.stats],
            "up": [chained.inner],
        }
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
            assert matrix.norm is not None
            normed = F.layer_norm(before, before.shape, matrix.norm.weight, matrix.norm.bias, matrix.norm.epsilon)
            expected = F.linear(normed, matrix.weight.float(), matrix.bias.float())
            got = chained.inner
            if name == "qkv":
                got = torch.cat([chained.q, *(side.flatten(0, 1)[slot].flatten() for side in cache)])
            else:
                expected = model.activation(expected)
        elif name == "attention":
            share = chained.stats[..., 1] * torch.exp2(chained.stats[..., 0] - chained.stats[..., 0].max(0).values)
            share = share.repeat_interleave(64, 1)
            got = (chained.parts.float() * share).sum(0) / share.sum(0)
            decodes = Decodes(0, 1, context, step.step.tables[:, : -(-context // BLOCK_SIZE)], step.step.lengths)
            attend = PagedAttention(slots=step.step.slots.long(), decodes=[decodes], prefills=[], block_size=BLOCK_SIZE)
            single = LayerCache(*(side.float() for side in cache))
            key, value = (side.flatten(0, 1)[slot][None].clone() for side in single)
            scale = model.attention_scale(layer)
            query = chained.q.float().view(1, heads, 64)
            expected = attend(query, key, value, single, scale=scale, upcast=False).flatten()
            merged = got
        else:
            matrix, read = (out, merged) if name == "out" else (down, chained.inner.float())
            expected = F.linear(read, matrix.weight.float(), matrix.bias.float())
            got = chained.x - before
        error = float((got.float() - expected).norm() / expected.norm())
        error_at = int((got.float() - expected).abs().argmax())
        if not error <= 1e-2:  # NaN, too
            wrong = (
                ~torch.isclose(got.float(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
            ).nonzero()
            print(
                f"  WRONG layer {layer} {name}: relative error {error:.2e}, worst at {error_at} "
                f"({float(got[error_at])} for {float(expected[error_at])}), {len(wrong)} of {len(got)} wrong, "
                f"first {wrong[:16, 0].tolist()}, last {wrong[-4:, 0].tolist()}"
            )
            return False
        worst[name] = max(worst.get(name, (0.0, 0)), (error, layer))
    print(f"  kernels at context {context}, {chain.splits} splits:", *(f"{k} {e:.1e}" for k, (e, _) in worst.items()))
    return True


def check_steps(model: GPT2, chain: Chain, context: int) -> bool:
    """A whole step by the chain and by Triton, both against plain fp32."""
    exact = gpt2_345m(lambda name, _: _float(model, name), num_layers=model.config.num_layers)
    step = Step(model, num=1, context=context, prompt=False, cuda=compiled(model, chain, bounded=True))
    head = head_for(1, dtype=model.dtype, narrow=False, shared_memory=232448)
    chained = layers_of(step)
    filled = step.cache._cache.clone()
    found = {}
    for name, plan in (("chain", plan_of(model, chain)), ("triton", plan_of(model, None))):
        for tensor in (step.fused.x, chained.q, chained.inner, chained.parts, chained.stats, step.fused._q):
            tensor.fill_(torch.nan)
        step.cache._cache.copy_(filled)
        found[name] = step.run(plan, head).clone()
        torch.cuda.synchronize()
    step.cache._cache.copy_(filled)
    step.model = exact
    single = step.cache._cache.float()
    step.cache._cache = single
    expected = step.plain()
    errors = {name: float((got - expected).norm() / expected.norm()) for name, got in found.items()}
    picks = {name: int(got.argmax()) for name, got in found.items()}
    best = int(expected.argmax())
    gap = float(expected[0, best] - expected[0, picks["chain"]]) / float(expected.std())
    print(
        f"  step at context {context}: logits off by",
        *(f"{name} {error:.1e}" for name, error in errors.items()),
        f"; picks {picks}, plain fp32 {best}, the chain's {gap:.4f} deviations below the best",
    )
    return errors["chain"] < 2e-2 and gap < 0.1


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


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def turns(graphs: dict[str, torch.cuda.CUDAGraph], seconds: float) -> None:
    """Times them in turns, and prints the median and the range of each."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(replay_ms(graph, seconds))
    for name, found in times.items():
        found.sort()
        print(f"    {found[len(found) // 2]:.4f} ms ({found[0]:.4f} to {found[-1]:.4f})  {name}", flush=True)


def compare(model: GPT2, contexts: Sequence[int], splits: Sequence[int], seconds: float) -> None:
    head = head_for(1, dtype=model.dtype, narrow=False, shared_memory=232448)
    kernels = {count: compiled(model, Chain(splits=count)) for count in splits}
    for name in ("qkv", "attention", "out", "up", "down"):
        print(f"  {name}: registers", *(getattr(each, name).registers for each in kernels.values()))
    for context in contexts:
        print(f"  context {context}")
        steps = {count: Step(model, num=1, context=context, prompt=False, cuda=kernels[count]) for count in splits}
        graphs = {}
        for count, step in steps.items():
            for pdl in (True, False):
                plan = plan_of(model, Chain(splits=count), pdl=pdl)
                title = f"chain, {count} splits{'' if pdl else ', no dependent launch'}"
                graphs[title] = captured(partial(step.run, plan, head))
        graphs["triton"] = captured(partial(steps[splits[0]].run, plan_of(model, None), head))
        turns(graphs, seconds)


def left_out(model: GPT2, chain: Chain, context: int, seconds: float) -> None:
    """What each kind of kernel adds: the chain without it."""
    head = head_for(1, dtype=model.dtype, narrow=False, shared_memory=232448)
    step = Step(model, num=1, context=context, prompt=False, cuda=compiled(model, chain))
    plan = plan_of(model, chain)
    graphs = {
        "whole": captured(partial(step.run, plan, head)),
        "without head and sampling": captured(partial(step.fused.body, step.step, step.tail.sampled, plan)),
        "layers alone": captured(partial(_run, step, ())),
    }
    for name in ("qkv", "attention", "out", "up", "down"):
        graphs[f"layers without {name}"] = captured(partial(_run, step, (name,)))
    print(f"  left out, context {context}, {chain.splits} splits")
    turns(graphs, seconds)


def _run(step: Step, without: tuple[str, ...]) -> None:
    for name, launch in launches(step, pdl=True):
        if name not in without:
            launch()


def feed(model: GPT2, chain: Chain, num_steps: int) -> bool:
    """Each step goes on from what the one before sampled: the same tokens with dependent launch, without, and again."""
    context = 1024
    head = head_for(1, dtype=model.dtype, narrow=False, shared_memory=232448)
    step = Step(model, num=1, context=context, prompt=False, cuda=compiled(model, chain))
    given = step.step
    filled = step.cache._cache.clone()
    step.rows.records[0, 0] = torch.tensor(1.0).view(torch.int32)  # temperature
    given.sources.fill_(0)
    plans = {"chain": plan_of(model, chain), "no dependent launch": plan_of(model, chain, pdl=False)}
    graphs = {name: captured(partial(step.run, plan, head)) for name, plan in plans.items()}
    graphs["triton"] = captured(partial(step.run, plan_of(model, None), head))
    found = {}
    for name in ("chain", "no dependent launch", "chain again", "triton"):
        step.cache._cache.copy_(filled)
        step.tail.sampled.fill_(17)
        tokens = torch.zeros(num_steps, dtype=torch.int32, device="cuda")
        for number in range(num_steps):
            position = context - num_steps + number
            given.positions.fill_(position)
            given.lengths.fill_(position + 1)
            step.rows.positions.fill_(position + 1)
            given.slots.copy_(given.tables[0, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            graphs[name.removesuffix(" again")].replay()
            tokens[number] = step.tail.sampled[0]
        found[name] = (tokens, step.fused.x[0].clone())
    tokens, x = found["chain"]
    same = True
    for name, (others, other_x) in found.items():
        differ = (tokens != others).nonzero()
        first = int(differ[0]) if len(differ) else None
        print(f"  {num_steps} steps, {name}: first difference {first}, {len(set(tokens.tolist()))} tokens", flush=True)
        if name != "triton":
            same = same and first is None and torch.equal(x, other_x)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16,float16")
    parser.add_argument("--contexts", default="64,256,512,1024")
    parser.add_argument("--splits", default="4,8")
    parser.add_argument("--seconds", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=110, help="seconds after which all is given up")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    contexts = [int(context) for context in arguments.contexts.split(",")]
    splits = [int(count) for count in arguments.splits.split(",")]
    began = time.perf_counter()
    good = True
    with torch.inference_mode():
        for number, dtype in enumerate(arguments.dtype.split(",")):
            model = sharp_345m(getattr(torch, dtype))
            print(f"{dtype}, {torch.cuda.get_device_name()}, {time.perf_counter() - began:.1f} s", flush=True)
            first = time.perf_counter()
            compiled(model, Chain(splits=splits[0]))
            print(f"  compiled and loaded in {time.perf_counter() - first:.2f} s", flush=True)
            for count in splits:
                for context in (1, 2, 100, 257, 1024) if count == splits[0] else (257, 1024):
                    good = good and check_kernels(model, Chain(splits=count), context)
            for context in (1, 256, 1000):
                good = good and check_steps(model, Chain(splits=splits[0]), context)
            print(f"  checked: {good}, {time.perf_counter() - began:.1f} s", flush=True)
            if good and number == 0:
                compare(model, contexts, splits, arguments.seconds)
                for count in splits:
                    left_out(model, Chain(splits=count), 256, arguments.seconds)
            if good:
                good = feed(model, Chain(splits=splits[0]), arguments.steps)
    print(f"all right: {good}, {time.perf_counter() - began:.1f} s")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
