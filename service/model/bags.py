"""Attention over a paged KV cache on a CPU, without copying it. Called by the model, once a layer.

Both halves of a single query's attention are weighted sums of rows that lie scattered: its output is one of the
values' rows, weighted by the softmax; and its scores against the keys of a block are one of the block's rows, if the
block is kept transposed, weighted by the query's numbers. torch's embedding_bag sums such rows where they are, in
fp32, at the memory's speed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from service.model.attention import Decodes, Prefill, attend


class BagLayer(NamedTuple):
    """One layer's keys and values."""

    keys: Tensor  # [num_blocks, heads, head, block_size]
    values: Tensor  # [num_blocks, block_size, heads, head]


class _Group(NamedTuple):
    rows: slice  # of the step's tokens
    key_rows: Tensor  # [rows * heads * blocks, head] of keys as [num_blocks * heads * head, block_size]
    value_rows: Tensor  # [rows * heads, width] of values as [num_blocks * block_size * heads, head]
    num_blocks: int
    past: Tensor  # [rows, 1, width]: what a row does not see


class BagCache:
    """Keys and values of every layer. Zeroed, which takes the memory at once: none is missing later, under load."""

    def __init__(
        self, *, num_layers: int, num_blocks: int, block_size: int, num_heads: int, head_size: int, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self._keys = torch.zeros(num_layers, num_blocks, num_heads, head_size, block_size, dtype=dtype)
        self._values = torch.zeros(num_layers, num_blocks, block_size, num_heads, head_size, dtype=dtype)

    def layer(self, number: int) -> BagLayer:
        return BagLayer(self._keys[number], self._values[number])

    def attention(self, *, slots: Tensor, decodes: list[Decodes], prefills: list[Prefill]) -> "BagAttention":
        """One step's."""
        _, _, num_heads, head_size, block_size = self._keys.shape
        return BagAttention(
            slots=slots,
            decodes=decodes,
            prefills=prefills,
            num_heads=num_heads,
            head_size=head_size,
            block_size=block_size,
        )


class BagAttention:
    """What one step's attention needs, the same in every layer: where each token goes and what it may see."""

    def __init__(
        self,
        *,
        slots: Tensor,
        decodes: list[Decodes],
        prefills: list[Prefill],
        num_heads: int,
        head_size: int,
        block_size: int,
    ) -> None:
        """`slots` [T]: where each token's key and value go."""
        self._slots = slots
        self._blocks, self._offsets = slots // block_size, slots % block_size
        self._prefills = prefills
        self._groups = []
        heads = torch.arange(num_heads, dtype=torch.int32)
        numbers = torch.arange(head_size, dtype=torch.int32)
        offsets = torch.arange(block_size, dtype=torch.int32)
        for group in decodes:
            tables = group.tables.int()
            key_rows = (tables[:, None, :, None] * num_heads + heads[:, None, None]) * head_size + numbers
            own = (tables[:, :, None] * block_size + offsets).flatten(1)  # [rows, width]
            past = torch.arange(own.shape[1]) >= group.lengths[:, None]
            # A slot past a context may hold another's non-finite numbers, which a weight of 0 does not undo.
            own = torch.where(past, own[:, :1], own)
            self._groups.append(
                _Group(
                    slice(group.start, group.end),
                    key_rows.view(-1, head_size),
                    (own[:, None] * num_heads + heads[:, None]).flatten(0, 1),
                    tables.shape[1],
                    past[:, None],
                )
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: BagLayer, *, scale: float, upcast: bool) -> Tensor:
        """[T, heads, head] for q, k, v of that shape; writes k and v to their slots first."""
        keys, values = cache
        head_size, block_size = keys.shape[2:]
        stored_k, stored_v = k.to(keys.dtype), v.to(keys.dtype)
        keys[self._blocks, :, :, self._offsets] = stored_k
        values.flatten(0, 1).index_copy_(0, self._slots, stored_v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, key_rows, value_rows, num_blocks, past in self._groups:
            query = q[rows].mul(scale).to(keys.dtype)
            weights = query[:, :, None].expand(-1, -1, num_blocks, -1).reshape(key_rows.shape)
            scores = _sum_rows(keys.view(-1, block_size), key_rows, weights).view(*query.shape[:2], -1)
            shares = scores.masked_fill_(past, -torch.inf).softmax(-1, dtype=torch.float32).to(keys.dtype)
            mixed = _sum_rows(values.view(-1, head_size), value_rows, shares.view(value_rows.shape))
            out[rows] = mixed.view(query.shape)
        for prefill in self._prefills:
            rows = slice(prefill.start, prefill.end)
            if prefill.visible is None:
                seen_k, seen_v = stored_k[rows].transpose(0, 1), stored_v[rows].transpose(0, 1)
            else:
                seen_k = keys[prefill.blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, : prefill.length]
                seen_v = values[prefill.blocks].flatten(0, 1)[: prefill.length].transpose(0, 1)
            mixed = attend(
                q[rows].transpose(0, 1)[None],
                seen_k[None].to(q.dtype),
                seen_v[None].to(q.dtype),
                prefill.visible,
                scale,
                upcast,
            )
            out[rows] = mixed[0].transpose(0, 1)
        return out


def _sum_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """[N, width] of a table [rows, width] and indices and weights [N, M]: sums of M rows each."""
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")
