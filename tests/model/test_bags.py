"""Attention in place over a CPU's cache against dense attention over the same keys and values."""

import mmap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.model.attention import Decodes, KVCache, Prefill
from service.model.bags import BagCache

HEADS, HEAD = 3, 8
STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Sequence:
    """`length` tokens in `blocks`, of which the last `new` are of this step."""

    length: int
    new: int
    blocks: list[int]


def check(sequences: list[Sequence], *, block_size: int, dtype: torch.dtype, tolerance: float) -> None:
    """What a step gives is what each sequence's own dense attention in fp64 gives; what lies elsewhere may be NaN."""
    generator = torch.Generator().manual_seed(0)
    num_blocks = max(block for sequence in sequences for block in sequence.blocks) + 2
    cache = BagCache(
        num_layers=2, num_blocks=num_blocks, block_size=block_size, num_heads=HEADS, head_size=HEAD, dtype=dtype
    )
    keys, values = cache.layer(1)
    keys.fill_(torch.nan)
    values.fill_(torch.nan)
    whole: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by block and offset: shared blocks hold one content

    def at(block: int, offset: int) -> tuple[Tensor, Tensor]:
        if (block, offset) not in whole:
            k, v = torch.randn(2, HEADS, HEAD, generator=generator).to(dtype)
            whole[block, offset] = (k, v)
        return whole[block, offset]

    q = torch.randn(sum(sequence.new for sequence in sequences), HEADS, HEAD, generator=generator)
    slots, new_k, new_v, expected = [], [], [], []
    decodes: list[Decodes] = []
    prefills: list[Prefill] = []
    start = 0
    for sequence in sequences:
        places = [(sequence.blocks[i // block_size], i % block_size) for i in range(sequence.length)]
        content = [at(*place) for place in places]
        old = sequence.length - sequence.new
        for (block, offset), (k, v) in zip(places[:old], content[:old], strict=True):
            keys[block, :, :, offset], values[block, offset] = k, v
        slots += [block * block_size + offset for block, offset in places[old:]]
        new_k += [k for k, _ in content[old:]]
        new_v += [v for _, v in content[old:]]
        ks, vs = (torch.stack([pair[i] for pair in content]).double() for i in (0, 1))
        for number in range(sequence.new):
            scores = torch.einsum("hd,lhd->hl", q[start + number].double(), ks[: old + number + 1]) * 0.3
            expected.append(torch.einsum("hl,lhd->hd", scores.softmax(1), vs[: old + number + 1]))
        end, blocks = start + sequence.new, torch.tensor(sequence.blocks)
        if sequence.new > 1:
            queries = torch.arange(old, sequence.length)
            visible = torch.arange(sequence.length) <= queries[:, None] if old else None
            prefills.append(Prefill(start, end, sequence.length, blocks, visible))
        start = end
    singles = [sequence for sequence in sequences if sequence.new == 1]
    if singles:
        tables = torch.zeros(len(singles), max(len(sequence.blocks) for sequence in singles), dtype=torch.int32)
        for row, sequence in zip(tables, singles, strict=True):
            row[: len(sequence.blocks)] = torch.tensor(sequence.blocks)
        lengths = torch.tensor([sequence.length for sequence in singles])
        decodes.append(Decodes(0, len(singles), int(lengths.min()), tables, lengths))
    attention = cache.attention(slots=torch.tensor(slots), decodes=decodes, prefills=prefills)
    found = attention(
        q, torch.stack(new_k).float(), torch.stack(new_v).float(), cache.layer(1), scale=0.3, upcast=False
    )
    torch.testing.assert_close(torch.stack(expected).float(), found, rtol=tolerance, atol=tolerance)
    assert not cache.layer(0).keys.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize("scattered", [False, True])
def test_attention_in_place_equals_dense(
    dtype: torch.dtype, tolerance: float, block_size: int, scattered: bool
) -> None:
    """Single tokens in consecutive blocks and in scattered ones, prompts whole and in part, in one step."""
    lengths, news = [1, 7, 8, 9, 40, 5, 21], [1, 1, 1, 1, 1, 5, 4]
    counts = [-(-length // block_size) for length in lengths]
    order = list(range(1, sum(counts) + 1))
    if scattered:
        order = [order[i] for i in torch.randperm(len(order), generator=torch.Generator().manual_seed(1)).tolist()]
    taken = iter(order)
    sequences = [
        Sequence(length, new, [next(taken) for _ in range(count)])
        for length, new, count in zip(lengths, news, counts, strict=True)
    ]
    check(sequences, block_size=block_size, dtype=dtype, tolerance=tolerance)


def test_sequences_that_share_a_prefix() -> None:
    """Blocks of several sequences are read by each of them, also as one of them is only being filled."""
    sequences = [
        Sequence(18, 1, [3, 5, 1]),
        Sequence(20, 1, [3, 5, 2]),
        Sequence(9, 1, [3, 7]),
        Sequence(20, 4, [3, 5, 9]),
    ]
    check(sequences, block_size=8, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.skipif(not STATM.exists(), reason="the system does not say so how much memory is taken")
def test_memory_is_taken_at_once() -> None:
    """A new cache is zero, and what it will take is taken: growth later would be a leak."""

    def taken() -> int:
        return int(STATM.read_text().split()[1]) * mmap.PAGESIZE

    before = taken()
    cache = BagCache(num_layers=1, num_blocks=2**12, block_size=16, num_heads=16, head_size=64, dtype=torch.float16)
    assert 2**27 == cache.layer(0).keys.nbytes
    assert taken() - before > 2**27
    assert not cache.layer(0).values[-1].any()


def test_both_caches_hold_as_much() -> None:
    """The layout for a CPU takes no more bytes than the kernels' own."""
    sizes = {"num_layers": 2, "num_blocks": 5, "block_size": 4, "num_heads": HEADS, "head_size": HEAD}
    own = BagCache(**sizes, dtype=torch.float16).layer(0)
    other = KVCache(**sizes, dtype=torch.float16, device=torch.device("cpu")).layer(0)
    assert own.keys.nbytes + own.values.nbytes == other.keys.nbytes + other.values.nbytes
