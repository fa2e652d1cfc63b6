"""Attention in plain operators where keys and values are kept in fp8."""

import torch

from service.model.attention import Decodes, LayerCache, PagedAttention, Prefill, narrowed

FP8 = torch.float8_e4m3fn
BLOCK_SIZE, HEADS, HEAD = 4, 2, 8


def test_a_cache_in_fp8_is_one_of_numbers_rounded_to_it() -> None:
    """Prompts whole and continued, and single tokens, see what the cache keeps of their own keys and values too."""
    generator = torch.Generator().manual_seed(1)
    caches = [LayerCache(*torch.zeros(2, 6, BLOCK_SIZE, HEADS, HEAD).to(dtype)) for dtype in (FP8, torch.float32)]
    first, second, third = torch.tensor([2, 5]), torch.tensor([0, 3]), torch.tensor([1])
    steps = [
        ([9, 10, 11, 8, *range(20, 23), 0, 1], [], [Prefill(0, 7, 7, first, None), Prefill(7, 9, 2, second[:1], None)]),
        (
            [23, 2, 3, 12, 13],
            [],
            [
                Prefill(0, 1, 8, first, torch.ones(1, 8).bool()),
                Prefill(1, 5, 6, second, torch.arange(6) <= torch.arange(2, 6)[:, None]),
            ],
        ),
        ([14, 4], [Decodes(0, 2, 1, torch.stack([second, third.repeat(2)]), torch.tensor([7, 1]))], []),
    ]
    for slots, decodes, prefills in steps:
        q, k, v = torch.randn(3, len(slots), HEADS, HEAD, generator=generator)
        k[0, 0, 0], v[-1, 0, 0] = 1e4, -1e4  # past its largest number
        attention = PagedAttention(slots=torch.tensor(slots), decodes=decodes, prefills=prefills, block_size=BLOCK_SIZE)
        rounded = [narrowed(side, FP8).float() for side in (k, v)]
        assert 448 == max(float(side.abs().max()) for side in rounded)
        found = attention(q, k, v, caches[0], scale=0.3, upcast=False)
        assert torch.equal(attention(q, *rounded, caches[1], scale=0.3, upcast=False), found)
        for narrow, exact in zip(*caches, strict=True):
            assert torch.equal(exact, narrow.float())
