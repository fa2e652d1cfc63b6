"""Attention over a paged KV cache: what the model asks of one, once a layer, and one in plain torch operators.

That is a GPU's where it cannot have the kernels (model/kernels/attention.py); a CPU's is in model/bags.py, which takes
from here what a sequence with several new tokens does.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a cache in `dtype` keeps it: in fp8 what is past its largest number becomes that, as with the kernels."""
    if dtype != torch.float8_e4m3fn:
        return x
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def _bits(x: Tensor) -> Tensor:
    """What operators copy where they do not know fp8."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _gathered(side: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of these blocks of a layer's keys or values, in `dtype`."""
    return _bits(side)[blocks].view(side.dtype).to(dtype)


class Attention(Protocol):
    """One step's, the same in every layer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, *, scale: float, upcast: bool) -> Tensor:
        """[T, heads, head] for q, k, v of that shape; writes k and v to their slots of a layer's `cache` first."""


class Cache(Protocol):
    """Keys and values of every layer, laid out for an attention."""

    def layer(self, number: int) -> Any:
        """One layer's."""

    def attention(self, *, slots: Tensor, decodes: list["Decodes"], prefills: list["Prefill"]) -> Attention:
        """One step's, where the keys and values of its T tokens go to `slots` [T]."""


class LayerCache(NamedTuple):
    """One layer's keys and values, each [num_blocks, block_size, heads, head]; on a GPU also in fp8 (e4m3)."""

    keys: Tensor
    values: Tensor


class KVCache:
    """Keys and values of every layer. Zeroed."""

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
        self.dtype = dtype
        self._cache = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self._cache[number, 0], self._cache[number, 1])

    def attention(self, *, slots: Tensor, decodes: list["Decodes"], prefills: list["Prefill"]) -> "PagedAttention":
        """One step's."""
        block_size = self._cache.shape[3]
        return PagedAttention(slots=slots, decodes=decodes, prefills=prefills, block_size=block_size)


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence with several new tokens, or with cached ones before them."""

    start: int  # its tokens among the step's
    end: int
    length: int  # of its context, these tokens included
    blocks: Tensor  # [ceil(length / block_size)]
    visible: Tensor | None  # [end - start, length] bool; None when the whole context is new


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences with one new token each, alike enough in length to attend as one rectangle."""

    start: int  # their tokens among the step's
    end: int
    shortest: int  # of their contexts
    tables: Tensor  # [end - start, blocks of the longest]
    lengths: Tensor  # [end - start]


class PagedAttention:
    """What one step's attention needs, the same in every layer: where each token goes and what it may see."""

    def __init__(self, *, slots: Tensor, decodes: list[Decodes], prefills: list[Prefill], block_size: int) -> None:
        """`slots` [T]: where each token's key and value go."""
        self._slots = slots
        self._prefills = prefills
        self._decodes = []
        for group in decodes:
            positions = torch.arange(group.tables.shape[1] * block_size, device=slots.device)
            self._decodes.append((group, positions < group.lengths[:, None]))  # visible: [rows, width]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, *, scale: float, upcast: bool) -> Tensor:
        """[T, heads, head] for q, k, v of that shape; writes k and v to their slots first."""
        k, v = narrowed(k, cache.keys.dtype), narrowed(v, cache.values.dtype)
        _bits(cache.keys).flatten(0, 1).index_copy_(0, self._slots, _bits(k))
        _bits(cache.values).flatten(0, 1).index_copy_(0, self._slots, _bits(v))
        k, v = k.to(q.dtype), v.to(q.dtype)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group, visible in self._decodes:
            rows = slice(group.start, group.end)
            keys = _gathered(cache.keys, group.tables, q.dtype).flatten(1, 2)  # [rows, width, heads, head]
            values = _gathered(cache.values, group.tables, q.dtype).flatten(1, 2)
            # A slot past a context may hold another's non-finite numbers, which no mask added to a score undoes.
            past = ~visible[:, group.shortest :, None, None]
            keys[:, group.shortest :].masked_fill_(past, 0)
            values[:, group.shortest :].masked_fill_(past, 0)
            mixed = attend(
                q[rows, :, None], keys.transpose(1, 2), values.transpose(1, 2), visible[:, None, None], scale, upcast
            )
            out[rows] = mixed[:, :, 0]
        for prefill in self._prefills:
            rows = slice(prefill.start, prefill.end)
            if prefill.visible is None:
                keys, values = k[rows], v[rows]
            else:
                keys = _gathered(cache.keys, prefill.blocks, q.dtype).flatten(0, 1)[: prefill.length]
                values = _gathered(cache.values, prefill.blocks, q.dtype).flatten(0, 1)[: prefill.length]
            mixed = attend(
                q[rows].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                prefill.visible,
                scale,
                upcast,
            )
            out[rows] = mixed[0].transpose(0, 1)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, upcast: bool) -> Tensor:
    """Softmax attention, [..., heads, queries, head]; causal where `visible` is None."""
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale)
    return out.to(dtype)
