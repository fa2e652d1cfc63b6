"""What the kernels compute, in plain torch operators and 64-bit numbers on the CPU.

Those of sampling and adjusting are service.model.sampler's `sample` and `adjust`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from service.model.attention import Decodes, LayerCache, PagedAttention, Prefill
from service.model.gpt2 import ACTIVATIONS


def embed(
    token_ids: Tensor, sources: Tensor, sampled: Tensor, positions: Tensor, tokens: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """The step's token ids [T], and the sums [T, H] of their embeddings and those of their positions."""
    ids = torch.where(sources >= 0, sampled[sources.clamp(min=0).long()].clamp(min=0), token_ids).long()
    return ids, tokens.double()[ids] + places.double()[positions.long()]


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x.double(), gain.shape, gain.double(), shift.double(), epsilon)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """[T, N]: x W^T, with bias and activation where they are given."""
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return y if activation is None else ACTIVATIONS[activation](y)


def merge(parts: Tensor, stats: Tensor) -> Tensor:
    """[T, H]: attention of a context that was split, from its parts [T, splits, H] and stats [T, splits, 2, H]."""
    peaks, masses = stats.double().unbind(2)
    shares = torch.exp(peaks - peaks.max(1, keepdim=True).values)
    return (parts.double() * shares).sum(1) / (masses * shares).sum(1)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, *, tables: Tensor, lengths: list[int], counts: list[int], scale: float
) -> Tensor:
    """[T, heads, head]: of the last `counts` tokens of each context, whose keys and values [., ., heads, head] hold.

    The first sequences have one new token each, in any order of their lengths.
    """
    block_size = keys.shape[1]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    decodes, prefills = [], []
    slots = []
    for row, (start, length, count) in enumerate(zip(starts, lengths, counts, strict=False)):
        blocks = tables[row, : -(-length // block_size)].long()
        new = torch.arange(length - count, length)
        slots.append(blocks[new // block_size] * block_size + new % block_size)
        if count == 1:
            decodes.append(Decodes(start, start + 1, length, blocks[None], torch.tensor([length])))
        else:
            prefills.append(Prefill(start, start + count, length, blocks, torch.arange(length) <= new[:, None]))
    attend = PagedAttention(slots=torch.cat(slots), decodes=decodes, prefills=prefills, block_size=block_size)
    cache = LayerCache(keys.double(), values.double())
    new_keys, new_values = (side.flatten(0, 1)[torch.cat(slots)] for side in cache)
    return attend(q.double(), new_keys, new_values, cache, scale=scale, upcast=False)
