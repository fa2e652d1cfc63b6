"""The CUDA kernels without a GPU: compiled for a processor, where they compute what plain operators do.

How NVRTC compiles them is tested in test_cuda_compiler.py; how fast they are, on a GPU, is for bench/chain.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.random_model import CONFIG_345M, gpt2_345m
from service.model.attention import KVCache, Prefill
from service.model.fused import FusedGPT2, StepTensors
from service.model.kernels.cuda.chain import BLOCKS, ChainKernels, sources, suits
from service.model.kernels.cuda.compiler import Source
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import Chain
from service.model.kernels.plans import plan_for
from tests.model.kernels import twins
from tests.model.kernels.emulating import Run, check, folded, normal

BLOCK_SIZE = 16
SPLITS = 4
HIDDEN, INNER, HEADS, HEAD = 1024, 4096, 16, 64
BF16 = torch.bfloat16


def named(
    dtype: torch.dtype = BF16,
    activation: str = "gelu_tanh",
    splits: int = SPLITS,
    ring: int = 0,
    block_size: int = BLOCK_SIZE,
    warps: int = 8,
) -> dict[str, Source]:
    config = replace(CONFIG_345M, activation=activation)
    return sources(config, dtype, Chain(splits=splits, warps=warps, ring=ring), block_size=block_size)


def test_qkv_norms_and_puts_keys_and_values_into_their_slot(emulate: Callable[[Source], Run]) -> None:
    """And writes nothing else of the cache."""
    x = normal(HIDDEN, deviation=2, mean=0.5)
    weight, bias = normal(3 * HIDDEN, HIDDEN, deviation=0.02).to(BF16), normal(3 * HIDDEN)
    gain, shift = normal(HIDDEN, mean=1), normal(HIDDEN)
    q = torch.full((HIDDEN,), torch.nan, dtype=BF16)
    keys, values = (torch.full((8, HIDDEN), torch.nan, dtype=BF16) for _ in range(2))
    slot = torch.tensor([5], dtype=torch.int32)
    offset, scaled = folded(weight, bias, gain, shift)
    expected = twins.product(twins.layer_norm(x, gain, shift, 1e-5), weight, bias)
    run = emulate(named()["qkv"])
    run((BLOCKS, 1, 1), x, None, weight, offset, scaled, gain, q, keys, values, slot, 1e-5, late=(x,))
    check(torch.cat([q, keys[5], values[5]]), expected, 5e-3)
    for side in (keys, values):
        side[5] = torch.nan
        assert side.isnan().all()


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu", "tanh"])
def test_up_norms_and_activates(emulate: Callable[[Source], Run], activation: str) -> None:
    x = normal(HIDDEN, deviation=2, mean=0.5)
    weight, bias = normal(INNER, HIDDEN, deviation=0.05).to(BF16), normal(INNER)
    gain, shift = normal(HIDDEN, mean=1), normal(HIDDEN)
    inner = torch.full((INNER,), torch.nan, dtype=BF16)
    offset, scaled = folded(weight, bias, gain, shift)
    expected = twins.product(twins.layer_norm(x, gain, shift, 1e-5), weight, bias, activation)
    run = emulate(named(activation=activation)["up"])
    run((BLOCKS, 1, 1), x, None, weight, offset, scaled, gain, inner, None, None, None, 1e-5, late=(x,))
    check(inner, expected, 5e-3)


@pytest.mark.parametrize("splits", [1, 4, 8])
def test_out_merges_splits_and_adds(emulate: Callable[[Source], Run], splits: int) -> None:
    """Of which one may be empty, if there are several."""
    parts = normal(splits, HIDDEN).to(BF16)
    peaks, masses = normal(splits, HEADS, deviation=3), torch.rand(splits, HEADS) + 0.5
    if splits > 1:
        peaks[-1], masses[-1] = -1e30, 0
    stats = torch.stack([peaks, masses], 2).contiguous()
    weight, bias, x = normal(HIDDEN, HIDDEN, deviation=0.02).to(BF16), normal(HIDDEN), normal(HIDDEN)
    share = (masses.double() * torch.exp2(peaks.double() - peaks.max(0).values)).repeat_interleave(HEAD, 1)
    merged = (parts.double() * share).sum(0) / share.sum(0)
    expected = x + twins.product(merged, weight, bias)
    run = emulate(named(splits=splits)["out"])
    run((BLOCKS, 1, 1), parts, stats, weight, bias, None, None, x, None, None, None, 0.0, late=(parts, stats))
    check(x, expected, 1e-5)


def test_down_adds(emulate: Callable[[Source], Run]) -> None:
    inner, weight = normal(INNER).to(BF16), normal(HIDDEN, INNER, deviation=0.02).to(BF16)
    bias, x = normal(HIDDEN), normal(HIDDEN)
    expected = x + twins.product(inner, weight, bias)
    run = emulate(named()["down"])
    run((BLOCKS, 1, 1), inner, None, weight, bias, None, None, x, None, None, None, 0.0, late=(inner,))
    check(x, expected, 1e-5)


@pytest.mark.parametrize(
    ("splits", "block_size", "ring", "warps"),
    [
        (4, 16, 0, 8),
        (8, 16, 0, 8),
        (4, 7, 0, 8),
        (4, 256, 0, 8),
        (4, 16, 4, 8),
        (1, 7, 6, 8),
        (1, 16, 0, 16),
        (1, 7, 4, 16),
        (1, 16, 8, 16),
        (2, 16, 4, 16),
    ],
)
def test_attention_of_every_kind_of_length(
    emulate: Callable[[Source], Run], splits: int, block_size: int, ring: int, warps: int
) -> None:
    """Of the token alone, of a part of a pass, and of more passes than are asked for early. The rest is NaN."""
    run = emulate(named(splits=splits, block_size=block_size, ring=ring, warps=warps)["attention"])
    num_blocks = -(-1024 // block_size)
    table = torch.randperm(num_blocks).to(torch.int32)
    for length in (1, 2, 8, 31, 34, 63, 65, 66, 129, 130, 257, 513, 700, 1024):
        q = normal(HIDDEN).to(BF16)
        cache = torch.full((2, num_blocks * block_size, HIDDEN), torch.nan, dtype=BF16)
        positions = torch.arange(length)
        slots = table[positions // block_size].long() * block_size + positions % block_size
        cache[:, slots] = normal(2, length, HIDDEN).to(BF16)
        parts = torch.full((splits, HIDDEN), torch.nan, dtype=BF16)
        stats = torch.full((splits, HEADS, 2), torch.nan)
        keys, values = cache
        expected = twins.attention(
            *(q.view(1, HEADS, HEAD), *(side.view(num_blocks, block_size, HEADS, HEAD) for side in cache)),
            tables=table[None],
            lengths=[length],
            counts=[1],
            scale=0.3,
        )
        newest = tuple(side[slots[-1]] for side in cache)  # written by the kernel before
        arguments = (q, keys, values, table, torch.tensor([length], dtype=torch.int32), parts, stats, 0.3, None, 0)
        run((HEADS, splits, 1), *arguments, late=(q, *newest))
        peaks, masses = stats.double().unbind(2)
        share = (masses * torch.exp2(peaks - peaks.max(0).values)).repeat_interleave(HEAD, 1)
        check((parts.double() * share).sum(0) / share.sum(0), expected.flatten(), 1e-2)
        if splits == 1:  # nothing merges it
            check(parts[0], expected.flatten(), 1e-2)


def test_layers_of_a_token_are_those_of_the_model(emulate: Callable[[Source], Run]) -> None:
    """As a step's body launches them, over a cache that the model filled."""
    generator = torch.Generator().manual_seed(7)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape).normal_(float("norm.weight" in name), 0.05, generator=generator).to(BF16)

    model = gpt2_345m(make, num_layers=2)
    cache = KVCache(**model._cache_sizes(num_blocks=4, block_size=BLOCK_SIZE), dtype=BF16, device=model.device)
    chain = Chain(splits=SPLITS)
    kernels = {
        name: emulate(source) for name, source in sources(model.config, BF16, chain, block_size=BLOCK_SIZE).items()
    }
    cuda = CudaKernels({1: ChainKernels(**kernels, splits=SPLITS)})
    fused = FusedGPT2(model, cache, max_tokens=1, block_size=BLOCK_SIZE, pdl=False, cuda=cuda)
    length = 37
    tokens = torch.randint(0, 50000, (length,), generator=generator)
    positions = torch.arange(length)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    slots = table[0].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    prefill = Prefill(0, length, length, table[0].long(), None)
    attention = cache.attention(slots=slots, decodes=[], prefills=[prefill])
    expected = model.hidden(tokens, positions, cache, attention)[-1]
    filled = cache._cache.clone()
    cache._cache.flatten(2, 3)[:, :, slots[-1]] = torch.nan

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    step = StepTensors(
        token_ids=tokens[-1:].int(),
        sources=ints(-1),
        positions=ints(length - 1),
        slots=slots[-1:].int(),
        tables=table,
        lengths=ints(length),
        num_decodes=ints(1),
        turn=ints(0),
        num_turns=3,
    )
    plan = plan_for(1, dtype=BF16, decodes_only=True, narrow=False, split=False, head_size=HEAD, shared_memory=2**18)
    assert plan.chain is not None
    fused.body(step, ints(0), plan)
    start = model.embed(tokens[-1:])[0] + model.position_embedding[length - 1].float()
    check(fused.x[0] - start, (expected - start).double(), 2e-2)
    check(cache._cache, filled.double(), 2e-2)


def test_suits_only_what_the_kernels_can_do() -> None:
    assert suits(CONFIG_345M, BF16)
    assert suits(CONFIG_345M, torch.float16)
    assert not suits(CONFIG_345M, torch.float32)
    assert not suits(replace(CONFIG_345M, hidden_size=768, num_heads=12, intermediate_size=3072), BF16)
    assert not suits(replace(CONFIG_345M, num_heads=8), BF16)
    assert suits(replace(CONFIG_345M, intermediate_size=2048), BF16)
    assert not suits(replace(CONFIG_345M, intermediate_size=3072), BF16)
    assert not suits(replace(CONFIG_345M, intermediate_size=8192), BF16)
