"""The CUDA kernels of two to 32 tokens without a GPU, as test_cuda.py does those of one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.random_model import CONFIG_345M, gpt2_345m
from service.model.attention import KVCache, PagedAttention, Prefill
from service.model.fused import FusedGPT2, StepTensors
from service.model.kernels import plans
from service.model.kernels.cuda.chain import BLOCKS, loaded, normed_apart, packed, sources
from service.model.kernels.cuda.compiler import Source
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import Chain
from service.model.kernels.plans import plan_for
from tests.model.kernels import twins
from tests.model.kernels.emulating import Run, check, folded, normal, tiled

BLOCK_SIZE = 16
HIDDEN, INNER, HEADS, HEAD = 1024, 4096, 16, 64
BF16 = torch.bfloat16
GRID = (BLOCKS, 1, 1)

SIZES: dict[str, Any] = {"dtype": BF16, "narrow": False, "split": False, "head_size": HEAD, "shared_memory": 2**18}

Emulate = Callable[[Source], Run]


def chain_of(num_tokens: int, splits: int | None = None, **changes: Any) -> Chain:
    served = replace(plans.CHAINS[num_tokens], **changes)
    return served if splits is None else replace(served, splits=splits, ahead=2)


def named(num_tokens: int, splits: int | None = None, **changes: Any) -> dict[str, Source]:
    chain = chain_of(num_tokens, splits, **changes)
    return sources(CONFIG_345M, BF16, chain, block_size=BLOCK_SIZE, num_tokens=num_tokens)


def test_a_packed_matrix_is_of_tiles() -> None:
    """Of 8 rows and 32 columns, those of the same rows one after the other; any tile of a copy is 512 bytes."""
    weight = torch.arange(24 * 64).view(24, 64)
    tiles = packed(weight)
    assert tiles.is_contiguous()
    rows = weight[8:16, 32:].view(8, 4, 8)
    for row, places in enumerate(["0123", "0123", "1032", "1032", "2301", "2301", "3210", "3210"]):
        assert torch.equal(tiles[1, 1, row], rows[row, list(map(int, places))])


@pytest.mark.parametrize("num_tokens", [2, 4, 8, 16])
def test_qkv_norms_and_puts_keys_and_values_into_their_slots(emulate: Emulate, num_tokens: int) -> None:
    """And writes nothing else of the cache. Up to four tokens are normed as in fp32, though far from their mean."""
    x = normal(num_tokens, HIDDEN, deviation=2, mean=0.5) * torch.linspace(0.1, 10, num_tokens)[:, None]
    weight, bias = normal(3 * HIDDEN, HIDDEN, deviation=0.02).to(BF16), normal(3 * HIDDEN)
    gain, shift = normal(HIDDEN, mean=1), normal(HIDDEN)
    normed = twins.layer_norm(x, gain, shift, 1e-5)
    q = torch.full((num_tokens, HIDDEN), torch.nan, dtype=BF16)
    keys, values = (torch.full((40, HIDDEN), torch.nan, dtype=BF16) for _ in range(2))
    slots = torch.randperm(40)[:num_tokens].int()
    run = emulate(named(num_tokens)["qkv"])
    places = (q, keys, values, slots)
    if normed_apart(num_tokens):
        normed = normed.to(BF16)
        run(GRID, normed, None, packed(weight), bias, None, None, *places, 0.0, late=(normed,))
    else:
        offset, scaled = folded(weight, bias, gain, shift)
        run(GRID, x, None, packed(weight), offset, scaled, gain, *places, 1e-5, late=(x,))
    expected = twins.product(normed, weight, bias)
    check(torch.cat([q, keys[slots], values[slots]], 1), expected, 4e-3 if num_tokens <= 4 else 6e-3)
    for side in (keys, values):
        side[slots] = torch.nan
        assert side.isnan().all()


@pytest.mark.parametrize("num_tokens", [2, 4, 8, 32])
def test_up_norms_and_activates(emulate: Emulate, num_tokens: int) -> None:
    """A row that fills the step up may be no numbers: the others do not see it."""
    x = normal(num_tokens, HIDDEN, deviation=2, mean=0.5)
    x[-1] = torch.nan
    weight, bias = normal(INNER, HIDDEN, deviation=0.05).to(BF16), normal(INNER)
    gain, shift = normal(HIDDEN, mean=1), normal(HIDDEN)
    inner = torch.full((num_tokens, INNER), torch.nan, dtype=BF16)
    normed = twins.layer_norm(x, gain, shift, 1e-5)
    run = emulate(named(num_tokens)["up"])
    nowhere = (None, None, None)
    if normed_apart(num_tokens):
        normed = normed.to(BF16)
        run(GRID, normed, None, packed(weight), bias, None, None, inner, *nowhere, 0.0, late=(normed,))
    else:
        offset, scaled = folded(weight, bias, gain, shift)
        run(GRID, x, None, packed(weight), offset, scaled, gain, inner, *nowhere, 1e-5, late=(x,))
    expected = twins.product(normed, weight, bias, "gelu_tanh")
    check(inner[:-1], expected[:-1], 4e-3 if num_tokens <= 4 else 6e-3)
    assert inner[-1].isnan().all()


@pytest.mark.parametrize(("splits", "ring", "warps"), [(2, 8, 8), (1, 4, 16), (1, 0, 16), (2, 4, 16)])
def test_attention_of_several_tokens(emulate: Emulate, splits: int, ring: int, warps: int) -> None:
    """Of any lengths each; a row that fills the step up has any length and table, and nothing is written of it."""
    lengths = [513, 1, 63, 8, 129]
    num, num_tokens, width = len(lengths), 8, 33
    q = normal(num_tokens, HIDDEN).to(BF16)
    tables = torch.full((num_tokens, width), 10**6, dtype=torch.int32)
    tables[:num] = torch.randperm(num * width).view(num, width)
    counted = torch.tensor([*lengths, *[10**6] * (num_tokens - num)], dtype=torch.int32)
    cache = torch.full((2, num * width * BLOCK_SIZE, HIDDEN), torch.nan, dtype=BF16)
    newest = []
    for table, length in zip(tables, lengths, strict=False):
        positions = torch.arange(length)
        slots = table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        cache[:, slots] = normal(2, length, HIDDEN).to(BF16)
        newest += [side[slots[-1]] for side in cache]  # written by the kernel before
    expected = twins.attention(
        *(q[:num].view(num, HEADS, HEAD), *(side.view(-1, BLOCK_SIZE, HEADS, HEAD) for side in cache)),
        tables=tables[:num],
        lengths=lengths,
        counts=[1] * num,
        scale=0.3,
    ).flatten(1)
    parts = torch.full((num_tokens, splits, HIDDEN), torch.nan, dtype=BF16)
    stats = torch.full((num_tokens, splits, HEADS, 2), torch.nan)
    run = emulate(named(num_tokens, splits, ring=ring, warps=warps)["attention"])
    rows = (torch.tensor([num], dtype=torch.int32), width)
    run((HEADS, splits, num_tokens), q, *cache, tables, counted, parts, stats, 0.3, *rows, late=(q, *newest))
    peaks, masses = stats[:num].double().unbind(3)
    share = (masses * torch.exp2(peaks - peaks.amax(1, keepdim=True))).repeat_interleave(HEAD, 2)
    check((parts[:num].double() * share).sum(1) / share.sum(1), expected, 1e-2)
    if splits == 1:
        check(parts[:num, 0], expected, 1e-2)
    for each in (parts, stats):
        assert each[num:].isnan().all()


@pytest.mark.parametrize(("num_tokens", "splits"), [(2, 4), (4, 2), (8, 2), (2, 1), (4, 1), (8, 1), (8, 0)])
def test_out_merges_splits_and_adds(emulate: Emulate, num_tokens: int, splits: int) -> None:
    """Of which one may be empty, and of a row that fills the step up all.

    One is read as it is, as what is merged already. Of rows that fill the step up it may be no numbers.
    """
    weight, bias = normal(HIDDEN, HIDDEN, deviation=0.02).to(BF16), normal(HIDDEN)
    x = normal(num_tokens, HIDDEN)
    if splits > 1:
        parts = normal(num_tokens, splits, HIDDEN).to(BF16)
        peaks = normal(num_tokens, splits, HEADS, deviation=3)
        masses = torch.rand(num_tokens, splits, HEADS) + 0.5
        peaks[:, -1], masses[:, -1] = -1e30, 0
        masses[-1] = 0
        share = (masses.double() * torch.exp2(peaks.double() - peaks.amax(1, keepdim=True))).repeat_interleave(HEAD, 2)
        merged = ((parts.double() * share).sum(1) / share.sum(1)).nan_to_num()
        read: tuple[Tensor, Tensor | None] = (parts, torch.stack([peaks, masses], 3).contiguous())
    else:
        mixed = normal(num_tokens, HIDDEN).to(BF16)
        mixed[-1] = torch.nan
        merged, read = mixed.double(), (mixed, None)
    expected = x + twins.product(merged, weight, bias)
    run = emulate(named(num_tokens, splits)["out"])
    late = tuple(each for each in read if each is not None)
    run(GRID, *read, packed(weight), bias, None, None, x, None, None, None, 0.0, late=late)
    if splits <= 1:
        assert x[-1].isnan().all()
        x, expected = x[:-1], expected[:-1]
    check(x, expected, 2e-3 if splits > 1 and num_tokens == 8 else 2e-5)


@pytest.mark.parametrize(("num_tokens", "name"), [(16, "out"), (24, "out"), (16, "down"), (32, "down")])
def test_sums_of_parts_of_k(emulate: Emulate, num_tokens: int, name: str) -> None:
    """Each part's is of its own columns of the matrix and of what it multiplies; there is no bias yet."""
    depth, chain = (HIDDEN, chain_of(num_tokens)) if name == "out" else (INNER, chain_of(num_tokens))
    splits = chain.out_splits if name == "out" else chain.down_splits
    x, weight = normal(num_tokens, depth).to(BF16), normal(HIDDEN, depth, deviation=0.02).to(BF16)
    sums = torch.full((splits, num_tokens, HIDDEN), torch.nan)
    left, right = (each.double().view(len(each), splits, -1) for each in (x, weight))
    expected = torch.einsum("tsk,nsk->stn", left, right)
    run = emulate(named(num_tokens)[name])
    grid = (BLOCKS // splits, splits, 1)
    run(grid, x, None, packed(weight), None, None, None, sums, None, None, None, 0.0, late=(x,))
    check(sums, expected, 1e-5)


@pytest.mark.parametrize("num_tokens", [2, 4, 8])
def test_down_adds(emulate: Emulate, num_tokens: int) -> None:
    inner, weight = normal(num_tokens, INNER).to(BF16), normal(HIDDEN, INNER, deviation=0.02).to(BF16)
    bias, x = normal(HIDDEN), normal(num_tokens, HIDDEN)
    expected = x + twins.product(inner, weight, bias)
    run = emulate(named(num_tokens)["down"])
    run(GRID, inner, None, packed(weight), bias, None, None, x, None, None, None, 0.0, late=(inner,))
    check(x, expected, 1e-5)


MANY_WARPS: dict[str, Any] = {"splits": 1, "warps": 16, "ring": 4}


@pytest.mark.parametrize(
    ("num_tokens", "num", "changes"),
    [
        (2, 2, {"splits": 0}),
        (8, 5, {}),
        (8, 5, MANY_WARPS),
        (16, 5, {}),
        (16, 5, MANY_WARPS),
        (24, 5, {"splits": 0}),
        (48, 5, {}),
    ],
)
def test_layers_of_tokens_are_those_of_the_model(
    emulate: Emulate, num_tokens: int, num: int, changes: dict[str, Any]
) -> None:
    """As a step's body launches them, with Triton's attention or theirs, over a cache that the model filled.

    What fills the step up has a slot of its own, and writes nowhere else; what it attends to is no numbers.
    """
    generator = torch.Generator().manual_seed(7)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape).normal_(float("norm.weight" in name), 0.05, generator=generator).to(BF16)

    model = gpt2_345m(make, num_layers=2)
    num_blocks, width = 4 * num, 4
    cache = KVCache(
        **model._cache_sizes(num_blocks=num_blocks + 1, block_size=BLOCK_SIZE), dtype=BF16, device=model.device
    )
    chain = plans.WIDES.get(num_tokens) or chain_of(num_tokens, **changes)
    plan = replace(plan_for(num_tokens, decodes_only=True, **SIZES), chain=chain)
    named = sources(CONFIG_345M, BF16, chain, block_size=BLOCK_SIZE, num_tokens=num_tokens)
    kernels = {name: emulate(source) for name, source in named.items()}
    cuda = CudaKernels({num_tokens: loaded(kernels, chain, num_tokens=num_tokens, tiled=tiled)})
    fused = FusedGPT2(model, cache, max_tokens=num_tokens, block_size=BLOCK_SIZE, pdl=False, cuda=cuda)
    fused._chained[num_tokens].parts.fill_(torch.nan)
    lengths = [37, 1, 16, 17, 50][:num]
    tables = torch.randperm(num_blocks, generator=generator).view(num, width)
    tokens = torch.randint(0, 50000, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = torch.tensor(lengths).cumsum(0)
    owners = torch.repeat_interleave(torch.arange(num), torch.tensor(lengths))
    slots = tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = [0, *ends.tolist()]
    prefills = [Prefill(starts[row], starts[row + 1], lengths[row], tables[row], None) for row in range(num)]
    attention = PagedAttention(slots=slots, decodes=[], prefills=prefills, block_size=BLOCK_SIZE)
    last = ends - 1
    expected = model.hidden(tokens, positions, cache, attention)[last]
    filled = cache._cache.clone()
    cache._cache.flatten(2, 3)[:, :, slots[last]] = torch.nan

    def ints(values: Tensor, filler: int) -> Tensor:
        rest = torch.full((num_tokens - num, *values.shape[1:]), filler)
        return torch.cat([values, rest]).int()

    step = StepTensors(
        token_ids=ints(tokens[last], 0),
        sources=ints(torch.full((num,), -1), -1),
        positions=ints(positions[last], 0),
        slots=ints(slots[last], num_blocks * BLOCK_SIZE),
        tables=ints(tables, 10**6),
        lengths=ints(torch.tensor(lengths), 10**6),
        num_decodes=torch.tensor([num], dtype=torch.int32),
        turn=torch.zeros(1, dtype=torch.int32),
        num_turns=3,
    )
    fused.body(step, torch.zeros(num_tokens, dtype=torch.int32), plan)
    start = model.embed(tokens[last]) + model.position_embedding[positions[last]].float()
    check(fused.x[:num] - start, (expected - start).double(), 2e-2)
    norm = model.final_norm
    check(fused.normed[:num], twins.layer_norm(fused.x[:num], norm.weight, norm.bias, norm.epsilon), 1e-2)
    check(cache._cache[:, :, :-1], filled[:, :, :-1].double(), 2e-2)


def test_only_steps_of_single_tokens_have_a_chain_of_few() -> None:
    """Of as many tokens as there are kernels for; what a step without them does is of its size alone."""
    plans_of_8 = [plan_for(8, decodes_only=decodes_only, **SIZES) for decodes_only in (True, False)]
    assert [plans.CHAINS[8], None] == [plan.chain for plan in plans_of_8]
    one, other = (replace(plan, chain=None, decode=replace(plan.decode, cuda=None)) for plan in plans_of_8)
    assert one == other
    assert plan_for(5, decodes_only=True, **SIZES).chain is None
