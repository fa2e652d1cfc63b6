"""The layers of one token, or two to eight, as a chain of CUDA kernels, five a layer. Called by model/fused.py."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from service.model.attention import KVCache
from service.model.gpt2 import GPT2
from service.model.kernels.cuda.chain import BLOCKS, ChainKernels
from service.model.matrix import Matrix

Layer = tuple[Matrix, Matrix, Matrix, Matrix]  # qkv, out, up, down


@dataclass(frozen=True, slots=True)
class Buffers:
    """What layers of at least T tokens read and write."""

    x: Tensor  # [T, H] fp32, the residual stream
    q: Tensor  # [T, H], these are in the served dtype
    mixed: Tensor  # [T, H]
    inner: Tensor  # [T, FFN]

    def of(self, num_tokens: int) -> "Buffers":
        return Buffers(*(each[:num_tokens] for each in (self.x, self.q, self.mixed, self.inner)))


class ChainedLayers:
    """The layers of `model` for `num_tokens` single tokens, over `buffers`; rows that fill them up are any numbers."""

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        layers: list[Layer],
        weights: list[tuple[Tensor, ...]],
        kernels: ChainKernels,
        buffers: Buffers,
        num_tokens: int,
    ) -> None:
        """`weights` are those of `layers`, for more tokens than one as `packed` makes them."""
        config, device = model.config, model.device
        self._model, self._cache, self._kernels = model, cache, kernels
        self._weights, self._num_tokens = weights, num_tokens
        self.layers = layers
        self._biases = [(out.bias.float(), down.bias.float()) for _, out, _, down in layers]
        self.buffers = buffers.of(num_tokens)
        # Of each split of the context: what it attends to, and of each head's scores the largest and the mass.
        shape = num_tokens, kernels.splits
        self.parts = torch.zeros(*shape, config.hidden_size, dtype=model.dtype, device=device)
        self.stats = torch.zeros(*shape, config.num_heads, 2, dtype=torch.float32, device=device)

    def run(
        self, *, slots: Tensor, tables: Tensor, lengths: Tensor, num: Tensor, attend: Callable[[int], None], pdl: bool
    ) -> None:
        """Of tokens whose keys and values go to `slots`, of the first `num` [1] sequences of `tables`.

        Of those `lengths` tell the tokens, the new one included. `attend` does a layer's attention, from `q` to
        `mixed`, if these kernels have none.
        """
        for _, launch in self.launches(slots=slots, tables=tables, lengths=lengths, num=num, attend=attend, pdl=pdl):
            launch()

    def launches(
        self, *, slots: Tensor, tables: Tensor, lengths: Tensor, num: Tensor, attend: Callable[[int], None], pdl: bool
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """The same, one kernel at a time, by the names of ChainKernels' fields."""
        kernels, x, q, inner = self._kernels, self.buffers.x, self.buffers.q, self.buffers.inner
        grid, heads = (BLOCKS, 1, 1), (self._model.config.num_heads, kernels.splits, self._num_tokens)
        merged = (self.parts, self.stats)
        mixed = merged if kernels.splits else (self.buffers.mixed, None)
        for number, (matrices, weights, biases) in enumerate(
            zip(self.layers, self._weights, self._biases, strict=True)
        ):
            (qkv, _, up, _), (w_qkv, w_out, w_up, w_down), (out_bias, down_bias) = matrices, weights, biases
            keys, values = self._cache.layer(number)
            # x, its statistics, weights, bias, those of a norm; y, where keys and values go; the norm's epsilon.
            places = (q, keys, values, slots)
            yield "qkv", partial(kernels.qkv, grid, x, None, w_qkv, *_norm(qkv), *places, _epsilon(qkv), pdl=pdl)
            if kernels.splits:
                scale = float(self._model.attention_scale(number))
                reads = (q, keys, values, tables, lengths)
                rows = (num, tables.shape[1])
                yield "attention", partial(kernels.attention, heads, *reads, *merged, scale, *rows, pdl=pdl)
            else:
                yield "attention", partial(attend, number)
            rest = (None, None, x, None, None, None, 0.0)
            yield "out", partial(kernels.out, grid, *mixed, w_out, out_bias, *rest, pdl=pdl)
            nowhere = (None, None, None)
            yield "up", partial(kernels.up, grid, x, None, w_up, *_norm(up), inner, *nowhere, _epsilon(up), pdl=pdl)
            yield "down", partial(kernels.down, grid, inner, None, w_down, down_bias, *rest, pdl=pdl)


def chained_layers(
    model: GPT2, cache: KVCache, layers: list[Layer], kernels: Mapping[int, ChainKernels], buffers: Buffers
) -> dict[int, ChainedLayers]:
    """By how many tokens they are for: those of more than one share weights that are packed here."""
    plain = [tuple(matrix.weight for matrix in layer) for layer in layers]
    tiles = [tuple(map(packed, layer)) for layer in plain] if any(num > 1 for num in kernels) else plain
    return {
        num: ChainedLayers(model, cache, layers, plain if num == 1 else tiles, each, buffers, num)
        for num, each in kernels.items()
        if num <= len(buffers.x)
    }


def packed(weight: Tensor) -> Tensor:
    """[N, K] as [N / 8, K / 32] tiles of [8 rows, 32 columns], what few.cu reads."""
    size, depth = weight.shape
    return weight.view(size // 8, 8, depth // 32, 32).transpose(1, 2).contiguous()


def _norm(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    assert matrix.norm is not None
    return matrix.folded_bias, matrix.scaled, matrix.norm.weight


def _epsilon(matrix: Matrix) -> float:
    assert matrix.norm is not None
    return float(matrix.norm.epsilon)
