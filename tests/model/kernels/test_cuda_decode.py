"""Attention of single tokens by the CUDA kernel without a GPU, against plain operators: see test_cuda.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.random_model import gpt2_345m
from service.model.attention import KVCache, LayerCache
from service.model.formats import Plain
from service.model.fused import FusedGPT2, StepTensors
from service.model.kernels import attention, plans
from service.model.kernels.cuda.compiler import Source
from service.model.kernels.cuda.decode import DecodeKernels, sources, suits
from service.model.kernels.cuda.hopper import CudaKernels
from service.model.kernels.plan import CudaDecode, Decode, Library, Plan, Product, Tiled
from service.model.kernels.plans import plan_for
from tests.model.kernels import twins
from tests.model.kernels.emulating import Run

BF16 = torch.bfloat16
BLOCK_SIZE, TABLE = 16, 64
HEADS, HEAD = 2, 64
HIDDEN = HEADS * HEAD
# The token alone, and of cached ones: one, a block of the cache less one and whole, a part of a round and many rounds.
LENGTHS = [1, 2, 15, 16, 17, 100, 257, 1024]
SPARE = 2  # rows that do not decode
SHAPES = [CudaDecode(2, 8), CudaDecode(2, 2, splits=3), CudaDecode(4, 4, splits=2), CudaDecode(8, 4, splits=8)]


class Rows:
    """Single tokens of sequences over a cache in which only their contexts are numbers; all else are NaNs."""

    def __init__(self, splits: int, *, beside: bool, cache_dtype: torch.dtype = BF16) -> None:
        """`beside`: the new keys and values stand behind the queries, and not in the cache."""
        count = len(LENGTHS)
        num_rows = count + SPARE
        used = [-(-length // BLOCK_SIZE) for length in LENGTHS]
        order = torch.split(torch.randperm(sum(used)), used)
        self.tables = torch.full((num_rows, TABLE), 10**6, dtype=torch.int32)  # far outside
        self.numbers = torch.full((2, sum(used) * BLOCK_SIZE, HIDDEN), torch.nan)
        self.slots = []
        for row, (length, blocks) in enumerate(zip(LENGTHS, order, strict=True)):
            self.tables[row, : len(blocks)] = blocks
            positions = torch.arange(length)
            slots = blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            self.numbers[:, slots] = torch.randn(2, length, HIDDEN).to(cache_dtype).float()
            self.slots.append(int(slots[-1]))
        self.lengths = torch.tensor([*LENGTHS, 10**6, -5], dtype=torch.int32)
        self.q = torch.randn(num_rows, 3 * HIDDEN if beside else HIDDEN).to(BF16)
        before = self.numbers.clone()
        if beside:
            new = self.numbers[:, self.slots]
            if cache_dtype != BF16:
                new = new * 1.01  # is rounded
            self.q[:count, HIDDEN:] = new.transpose(0, 1).flatten(1)
            before[:, self.slots] = torch.nan
        self.cache, self.after = before.to(cache_dtype), self.numbers.to(cache_dtype)
        self.out = torch.full((num_rows, HIDDEN), torch.nan, dtype=BF16)
        self.parts = torch.full((num_rows, splits, HIDDEN), torch.nan)
        self.stats = torch.full((num_rows, splits, HEADS, 2), torch.nan)
        self.arrived = torch.zeros(num_rows, HEADS, dtype=torch.int32)

    def expected(self, scale: float) -> Tensor:
        """[rows that decode, HIDDEN]"""
        shape = (HEADS, HEAD)
        keys, values = self.numbers.view(2, -1, BLOCK_SIZE, *shape)
        q = self.q[: len(LENGTHS), :HIDDEN].reshape(-1, *shape)
        counts = [1] * len(LENGTHS)
        return twins.attention(
            q, keys, values, tables=self.tables, lengths=LENGTHS, counts=counts, scale=scale
        ).flatten(1)


def source_of(shape: CudaDecode, heads: int = HEADS, cache_dtype: torch.dtype = BF16) -> Source:
    model = tiny(num_heads=heads)
    model.format = Plain(BF16, cache_dtype=cache_dtype)
    (source,) = sources(model, [shape], block_size=BLOCK_SIZE).values()
    return source


def tiny(dtype: torch.dtype = BF16, *, num_heads: int = 16, device: str = "meta") -> Any:
    """A model of which only the shape counts."""
    model = gpt2_345m(
        lambda _, shape: torch.empty(shape, dtype=dtype, device=device), num_layers=1, weights=Plain(dtype)
    )
    model.attention_width = num_heads * HEAD
    return model


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("shape", "cache_dtype"),
    [*((shape, BF16) for shape in SHAPES), *((shape, torch.float8_e4m3fn) for shape in SHAPES[:2])],
    ids=str,
)
def test_rows_of_every_kind_of_length(
    emulate: Callable[[Source], Run], shape: CudaDecode, cache_dtype: torch.dtype, beside: bool
) -> None:
    """In one launch; whatever stands in the cache and in tables beside them. Rows that do not decode are left alone.

    New keys and values beside the queries are put into their slots, and nothing else of the cache changes. Counters
    are 0 again afterwards: the same once more, as behind a prompt's attention, when all is there before it.
    """
    rows = Rows(shape.splits, beside=beside, cache_dtype=cache_dtype)
    source = source_of(shape, cache_dtype=cache_dtype)
    kernels = DecodeKernels({(shape.warps, shape.passes): emulate(source)}, num_heads=HEADS)
    count = len(LENGTHS)
    num_rows = torch.tensor([count], dtype=torch.int32)
    places = () if beside else tuple(side[slot] for side in rows.cache for slot in rows.slots)
    launch = kernels.kernels[shape.warps, shape.passes]
    late = (rows.q, *places)
    kernels.kernels = {(shape.warps, shape.passes): lambda *a, **k: launch(*a, late=late, **k)}
    for together in (False, True):
        late = () if together else late
        rows.out.fill_(torch.nan)
        kernels(
            shape,
            rows.q,
            LayerCache(*rows.cache),
            rows.tables,
            rows.lengths,
            num_rows,
            rows.out,
            (rows.parts, rows.stats, rows.arrived),
            scale=0.3,
            stride=rows.q.shape[1],
            together=together,
            pdl=True,
        )
        expected = rows.expected(0.3)
        error = (rows.out[:count].double() - expected).abs().amax(1)
        assert (error <= 1e-2 * expected.abs().max()).all(), error
        assert rows.out[count:].isnan().all()
        assert not rows.arrived.any()
        assert torch.equal(rows.cache.view(torch.uint8), rows.after.view(torch.uint8))
        if shape.splits > 1:
            assert rows.parts[count:].isnan().all()


def test_large_scores_do_not_overflow(emulate: Callable[[Source], Run]) -> None:
    """Of some thousands either way."""
    shape = CudaDecode(4, 2, splits=2)
    rows = Rows(shape.splits, beside=False)
    kernels = DecodeKernels({(shape.warps, shape.passes): emulate(source_of(shape))}, num_heads=HEADS)
    num_rows = torch.tensor([len(LENGTHS)], dtype=torch.int32)
    arguments = (rows.q, LayerCache(*rows.cache), rows.tables, rows.lengths, num_rows, rows.out)
    split = (rows.parts, rows.stats, rows.arrived)
    kernels(shape, *arguments, split, scale=300.0, stride=HIDDEN, together=False, pdl=True)
    expected = rows.expected(300.0)
    assert ((rows.out[: len(LENGTHS)].double() - expected).abs() <= 2e-2 * expected.abs().max()).all()


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("qkv", [Library(), Tiled(16, 32, 128, 1, 4, 1)], ids=["library", "tiled"])
def test_a_step_with_it_is_the_step_with_tritons(
    emulate: Callable[[Source], Run], qkv: Product, prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the body launches them: with a product that puts keys and values into the cache, and one that leaves it.

    With a prompt beside single tokens, one of which reads the block that the prompt fills.
    """
    generator = torch.Generator().manual_seed(7)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape).normal_(float("norm.weight" in name), 0.05, generator=generator).to(BF16)

    model = gpt2_345m(make, num_layers=1)
    shape = CudaDecode(2, 4, splits=2)
    decode = DecodeKernels({(2, 4): emulate(source_of(shape, heads=16))}, num_heads=16)
    tokens, lengths, positions = [17, 300, 4000], [1, 21, 50], [0, 20, 49]
    tables = [[5, 0, 0, 0], [3, 1, 0, 0], [2, 7, 4, 6]]
    slots = [
        tables[row][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for row, position in enumerate(positions)
    ]
    filled = torch.randn(2, 8, BLOCK_SIZE, 16, HEAD, generator=generator).to(BF16)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    tiles: dict[str, Tensor] = {}
    if prompt:
        tokens, positions = [*tokens, 5, 6, 7, 8, 9], [*positions, 0, 1, 2, 3, 4]
        lengths, tables = [*lengths, 5], [*tables, [7, 0, 0, 0]]
        slots += range(7 * BLOCK_SIZE, 7 * BLOCK_SIZE + 5)
        tiles = {"query_starts": ints(0, 1, 2, 3, 8), "tile_sequences": ints(3), "tile_starts": ints(0)}
        tiles["num_tiles"] = ints(1)
    step = StepTensors(
        token_ids=ints(*tokens),
        sources=ints(*[-1] * len(tokens)),
        positions=ints(*positions),
        slots=ints(*slots),
        tables=torch.tensor(tables, dtype=torch.int32),
        lengths=ints(*lengths),
        num_decodes=ints(3),
        turn=ints(0),
        num_turns=3,
        **tiles,
    )
    plan = Plan(qkv, Library(), Library(), Library(), Decode(16, 1, 1, cuda=shape), pdl=False)
    found = []
    for kernels in (CudaKernels(decode=decode), None):
        cache = KVCache(**model._cache_sizes(num_blocks=8, block_size=BLOCK_SIZE), dtype=BF16, device=model.device)
        cache._cache.copy_(filled)
        fused = FusedGPT2(model, cache, max_tokens=len(tokens), block_size=BLOCK_SIZE, pdl=False, cuda=kernels)
        fused._mixed.fill_(torch.nan)
        if kernels is not None:
            monkeypatch.setattr(attention, "decode_attention", None)
        fused.body(step, ints(0), plan)
        monkeypatch.undo()
        found.append((fused._mixed.float(), fused.x, cache._cache.float()))
    for got, expected in zip(*found, strict=True):
        assert ((got - expected).abs() <= 1e-2 * expected.abs().max()).all()


def test_plans_have_it_where_it_is_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in fp32; on a rank of several, too. A step with prompts counts as a third of its tokens."""
    small, large = CudaDecode(8, 4, splits=2), CudaDecode(4, 4)
    monkeypatch.setattr(plans, "CUDA_DECODES", ((8, small), (64, large)))
    common: dict[str, Any] = {"narrow": False, "head_size": HEAD, "shared_memory": 2**18}

    def found(num_tokens: int, dtype: torch.dtype = BF16, *, decodes_only: bool = True, split: bool = False) -> Any:
        plan = plan_for(num_tokens, dtype=dtype, decodes_only=decodes_only, split=split, **common)
        return plan.decode.cuda

    assert [small, small, large, large, None] == [found(number) for number in (2, 8, 9, 64, 65)]
    assert found(1) is None  # all of the layer is in CUDA
    assert found(1, split=True) == found(8, torch.float16, split=True) == small
    assert found(8, torch.float32) is None
    assert [small, large, None] == [found(number, decodes_only=False) for number in (26, 27, 195)]


def test_suits_only_what_the_kernel_can_do() -> None:
    assert suits(tiny())
    assert suits(tiny(torch.float16, num_heads=2))
    assert not suits(tiny(torch.float32))
    narrow = tiny()
    narrow.format = Plain(BF16, cache_dtype=torch.float8_e4m3fn)
    assert suits(narrow)
    narrow.config = replace(narrow.config, num_heads=8)
    assert not suits(narrow)


def test_of_keys_in_8_bits_there_are_twice_as_many_passes() -> None:
    """Which are as many bytes."""
    shape = CudaDecode(4, 2)
    passes = [dict(source_of(shape, cache_dtype=dtype).defines)["PASSES"] for dtype in (BF16, torch.float8_e4m3fn)]
    assert [2, 4] == passes
