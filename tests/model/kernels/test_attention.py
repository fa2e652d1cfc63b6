"""Attention over the paged cache against its twin: single tokens with and without splits, and tiles of prompts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from service.model.kernels import attention
from service.model.kernels.plan import whole_tile
from tests.model.kernels import twins
from tests.model.kernels.poisoned import DTYPES, Poisoned, check_close, random

BLOCK_SIZE = 8
TABLE = 16  # blocks that a table has room for
BLOCK = 16  # tokens that a kernel reads at once
# With the new token: none before it, one, exactly a block of the kernel's, one more, several of each, and the most.
LENGTHS = [1, 2, 16, 17, 18, 33, 50, 128]
CACHES = [pytest.param(None, id="cache as served"), pytest.param(torch.float8_e4m3fn, id="cache in fp8")]
SHAPES = [(48, 16), (48, 24), (80, 80), (24, 8)]  # hidden and head size

Chain = dict[str, bool]


class Step:
    """New tokens of sequences over a cache in which only their contexts are numbers; all else are NaNs."""

    def __init__(
        self,
        hidden: int,
        head: int,
        lengths: list[int],
        counts: list[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        cache_dtype: torch.dtype | None = None,
        spare: int = 3,
    ) -> None:
        """`spare`: sequences and tokens that the buffers have room for besides. The cache is in `dtype` by default."""
        self.hidden, self.head, self.lengths, self.counts, self.device = hidden, head, lengths, counts, device
        self.heads = hidden // head
        self.num_tokens = sum(counts)
        self.scale = head**-0.5
        num_rows = len(lengths)
        num_blocks = num_rows * TABLE + 1  # the first is poison, and where tables have nothing to say
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)).int() + 1
        tables = torch.zeros(num_rows + spare, TABLE, dtype=torch.int32)
        cache = torch.full((2, num_blocks, BLOCK_SIZE, hidden), torch.nan)
        numbers = torch.randn(cache.shape, generator=torch.Generator().manual_seed(2))
        for row, length in enumerate(lengths):
            used = -(-length // BLOCK_SIZE)
            tables[row, :used] = order[row * TABLE : row * TABLE + used]
            for position in range(length):
                block, offset = int(tables[row, position // BLOCK_SIZE]), position % BLOCK_SIZE
                cache[:, block, offset] = numbers[:, block, offset]
        self.cache = cache.to(cache_dtype or dtype).to(device)
        self.before = self.cache.clone()
        self.tables = tables.to(device)
        self.padded_lengths = torch.tensor([*lengths, *[10**6] * spare], dtype=torch.int32, device=device)
        rows = self.num_tokens + spare
        self.q = random(rows, hidden, dtype=dtype, device=device, seed=3) * 2
        self.out = Poisoned(rows, hidden, dtype=dtype, device=device)
        self.stride = hidden
        self.shape: dict[str, Any] = {"H": hidden, "HEAD": head, "DIM": whole_tile(head), "TABLE": TABLE}
        self.shape["BLOCK_SIZE"] = BLOCK_SIZE

    def expected(self) -> Tensor:
        """[T, H]."""
        keys, values = self.before.cpu().unflatten(-1, (self.heads, self.head))
        found = twins.attention(
            self.q[: self.num_tokens, : self.hidden].cpu().unflatten(-1, (self.heads, self.head)),
            keys,
            values,
            tables=self.tables.cpu(),
            lengths=self.lengths,
            counts=self.counts,
            scale=self.scale,
        )
        return found.flatten(1)

    def take_new_out(self) -> None:
        """Put the keys and values of the new tokens, one a sequence, beside the queries, and poison in their places."""
        new = torch.full((2, *self.q.shape), torch.nan, dtype=self.q.dtype, device=self.device)
        for row, length in enumerate(self.lengths):
            place = int(self.tables[row, (length - 1) // BLOCK_SIZE]), (length - 1) % BLOCK_SIZE
            new[:, row] = self.cache[:, *place].to(new.dtype)
            self.cache[:, *place] = torch.full((self.hidden,), torch.nan).to(self.cache)
        self.q = torch.cat((self.q, *new), dim=1)
        self.stride = 3 * self.hidden

    def check_read_only(self) -> None:
        """The cache is as it was."""
        as_bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[self.cache.itemsize]
        assert torch.equal(self.before.view(as_bits), self.cache.view(as_bits))


def decode(step: Step, *, splits: int, merged: bool, beside: bool, chain: Chain) -> tuple[Poisoned, Poisoned]:
    """Launch it for as many rows as the buffers have; the parts and stats."""
    rows, device = len(step.padded_lengths), step.device
    parts = Poisoned(rows, splits, step.hidden, dtype=torch.float32, device=device)
    stats = Poisoned(rows, splits, 2, step.hidden, dtype=torch.float32, device=device)
    arrived = Poisoned(rows, step.heads, dtype=torch.int32, device=device)
    arrived.inside.zero_()
    attention.decode_attention[(step.heads, rows, splits)](
        step.q,
        step.cache[0],
        step.cache[1],
        step.tables,
        step.padded_lengths,
        torch.tensor([step.counts.count(1)], dtype=torch.int32, device=device),
        step.out.inside,
        parts.inside,
        stats.inside,
        arrived.inside,
        step.scale,
        **step.shape,
        STRIDE=step.stride,
        BLOCK=BLOCK,
        SPLITS=splits,
        MERGED=merged,
        BESIDE=beside,
        num_warps=2,
        **chain,
    )
    assert bool((arrived.inside == 0).all())
    step.check_read_only()
    for buffer in (parts, stats, arrived, step.out):
        buffer.check()
    return parts, stats


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "head"), SHAPES)
def test_single_tokens_attend_to_their_contexts(
    hidden: int,
    head: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    device: torch.device,
    chain: Chain,
) -> None:
    """Whatever stands in the cache beside them; rows that do not decode are left alone."""
    step = Step(hidden, head, LENGTHS, [1] * len(LENGTHS), dtype=dtype, device=device, cache_dtype=cache_dtype)
    parts, stats = decode(step, splits=1, merged=True, beside=True, chain=chain)
    check_close(step.expected(), step.out.inside[: step.num_tokens], dtype)
    assert step.out.is_untouched(slice(step.num_tokens, None))
    assert parts.is_untouched()
    assert stats.is_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("splits", "beside"), [(2, False), (4, True), (8, False)])
def test_the_last_split_to_arrive_merges_all(
    splits: int, beside: bool, dtype: torch.dtype, device: torch.device, chain: Chain
) -> None:
    """Also where the context has fewer blocks than there are splits, and the counters are 0 again for the next step."""
    step = Step(48, 24, LENGTHS, [1] * len(LENGTHS), dtype=dtype, device=device)
    decode(step, splits=splits, merged=True, beside=beside, chain=chain)
    check_close(step.expected(), step.out.inside[: step.num_tokens], dtype)
    assert step.out.is_untouched(slice(step.num_tokens, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [2, 4, 8])
def test_splits_give_the_parts_of_a_merge(splits: int, dtype: torch.dtype, device: torch.device, chain: Chain) -> None:
    """In fp32; every column of a head has the head's maximum and sum, but for rounding; no context weighs nothing."""
    step = Step(48, 24, LENGTHS, [1] * len(LENGTHS), dtype=dtype, device=device)
    parts, stats = decode(step, splits=splits, merged=False, beside=False, chain=chain)
    found = stats.inside[: step.num_tokens]
    merged = twins.merge(parts.inside[: step.num_tokens], found)
    check_close(step.expected(), merged, torch.float32)
    by_head = found.unflatten(-1, (step.heads, step.head))
    check_close(by_head[..., :1].expand_as(by_head), by_head, torch.float32)  # warps sum in orders of their own
    assert bool((found[0, 1:, 1] == 0).all())  # the first context is one token, which the first split has
    for buffer in (parts, stats):
        assert buffer.is_untouched(slice(step.num_tokens, None))
    assert step.out.is_untouched()


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
def test_new_keys_and_values_beside_the_queries_are_put_into_the_cache(
    splits: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, device: torch.device, chain: Chain
) -> None:
    """Once, into their slots, and attended to; nothing else of the cache changes."""
    step = Step(48, 24, LENGTHS, [1] * len(LENGTHS), dtype=dtype, device=device, cache_dtype=cache_dtype)
    step.take_new_out()
    decode(step, splits=splits, merged=True, beside=False, chain=chain)
    check_close(step.expected(), step.out.inside[: step.num_tokens], dtype)


def test_large_scores_do_not_overflow(device: torch.device, chain: Chain) -> None:
    """Of some thousands either way, where their exponentials would be infinite, or all 0."""
    step = Step(48, 16, LENGTHS, [1] * len(LENGTHS), dtype=torch.float32, device=device)
    step.q *= 1000
    decode(step, splits=4, merged=True, beside=False, chain=chain)
    check_close(step.expected(), step.out.inside[: step.num_tokens], torch.float32)


# Contexts and how many of their tokens are new: decodes first, then prompts whole and in chunks, of exactly a tile,
# one token more, less than one, and several.
MIXED = [(1, 1), (37, 1), (2, 2), (16, 16), (17, 17), (40, 3), (50, 33), (128, 16)]


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "head"), SHAPES)
@pytest.mark.parametrize(("block", "programs"), [(16, 200), (32, 3)])
def test_prompts_attend_in_tiles(
    hidden: int,
    head: int,
    block: int,
    programs: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    device: torch.device,
    chain: Chain,
) -> None:
    """Causally, whole and in chunks, with fewer programs than tiles and with more. Then single tokens get the rest."""
    lengths, counts = [length for length, _ in MIXED], [count for _, count in MIXED]
    step = Step(hidden, head, lengths, counts, dtype=dtype, device=device, cache_dtype=cache_dtype)
    tiles = [(row, start) for row, count in enumerate(counts) if count > 1 for start in range(0, count, 16)]
    spare = [(0, 0)] * 5
    starts = torch.tensor([0, *counts]).cumsum(0)
    owners, firsts = torch.tensor([*tiles, *spare], dtype=torch.int32, device=device).t().contiguous()
    attention.prefill_attention[(programs,)](
        step.q,
        step.cache[0],
        step.cache[1],
        step.tables,
        step.padded_lengths,
        starts.int().to(device),
        owners,
        firsts,
        torch.tensor([len(tiles)], dtype=torch.int32, device=device),
        step.out.inside,
        step.scale,
        **step.shape,
        BLOCK_T=16,
        BLOCK=block,
        num_warps=4,
        num_stages=2,
        **chain,
    )
    check_close(step.expected()[2:], step.out.inside[2 : step.num_tokens], dtype)
    assert step.out.is_untouched(slice(2))
    assert step.out.is_untouched(slice(step.num_tokens, None))
    step.check_read_only()
    step.out.check()
    decode(step, splits=4, merged=True, beside=True, chain=chain)
    check_close(step.expected(), step.out.inside[: step.num_tokens], dtype)
    assert step.out.is_untouched(slice(step.num_tokens, None))
