"""Attention over a paged KV cache in plain torch operators, on any device. Called by the model, once a layer."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's keys and values, each [num_blocks, block_size, heads, head]."""

    keys: Tensor
    values: Tensor


class KVCache:
    """Keys and values of every layer. Zeroed: on a CPU the memory is taken only as blocks are first written."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_blocks, block_size, num_heads, head_size)
        self._cache = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self._cache[number, 0], self._cache[number, 1])


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence with several new tokens, or with cached ones before them."""

    start: int  # its tokens among the step's
    end: int
    length: int  # of its context, these tokens included
    blocks: Tensor  # [ceil(length / block_size)]
    visible: Tensor | None  # [end - start, length] bool; None when the whole context is new


class PagedAttention:
    """What one step's attention needs, the same in every layer: where each token goes and what it may see."""

    def __init__(
        self,
        *,
        slots: Tensor,  # [T]
        decode_tables: Tensor,  # [D, W] blocks of the first D sequences, which have one token each
        decode_lengths: Tensor,  # [D]
        prefills: list[Prefill],
        block_size: int,
    ) -> None:
        self._slots = slots
        self._num_decodes = len(decode_tables)
        self._prefills = prefills
        self._tables = decode_tables
        width = decode_tables.shape[1] * block_size
        hidden = torch.arange(width, device=slots.device) >= decode_lengths[:, None]
        self._hidden = hidden[:, :, None, None]  # [D, W * block_size, 1, 1]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        *,
        scale: float,
        upcast: bool,
    ) -> Tensor:
        """[T, heads, head] for q, k, v of that shape; writes k and v to their slots first."""
        cache.keys.flatten(0, 1).index_copy_(0, self._slots, k)
        cache.values.flatten(0, 1).index_copy_(0, self._slots, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        num_decodes = self._num_decodes
        if num_decodes:
            # A slot past the context may hold another's non-finite numbers, which no mask added to a score undoes.
            keys = (
                cache.keys[self._tables].flatten(1, 2).masked_fill_(self._hidden, 0)
            )  # [D, W * block_size, heads, head]
            values = cache.values[self._tables].flatten(1, 2).masked_fill_(self._hidden, 0)
            visible = ~self._hidden.permute(0, 2, 3, 1)  # [D, 1, 1, W * block_size]
            mixed = _attend(
                q[:num_decodes, :, None],
                keys.transpose(1, 2),
                values.transpose(1, 2),
                visible,
                scale,
                upcast,
            )
            out[:num_decodes] = mixed[:, :, 0]
        for prefill in self._prefills:
            rows = slice(prefill.start, prefill.end)
            if prefill.visible is None:
                keys, values = k[rows], v[rows]
            else:
                keys = cache.keys[prefill.blocks].flatten(0, 1)[: prefill.length]
                values = cache.values[prefill.blocks].flatten(0, 1)[: prefill.length]
            mixed = _attend(
                q[rows].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                prefill.visible,
                scale,
                upcast,
            )
            out[rows] = mixed[0].transpose(0, 1)
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, upcast: bool) -> Tensor:
    """Softmax attention, [..., heads, queries, head]; causal where `visible` is None."""
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale)
    return out.to(dtype)
