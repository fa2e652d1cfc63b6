"""The layers of a step as a chain of CUDA kernels. Called by model/fused.py.

Five a layer; seven of more than eight tokens: norms are then kernels of their own, which the caller has. Of more than
32 attention is the caller's, too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from service.model.attention import KVCache
from service.model.gpt2 import GPT2, LayerNorm
from service.model.kernels.cuda.chain import ChainKernels, packed
from service.model.matrix import Matrix

Layer = tuple[Matrix, Matrix, Matrix, Matrix]  # qkv, out, up, down
Sums = tuple[int, Tensor | None]  # of how many parts of a product `sums` is, and the product's bias
Norm = Callable[[int, Tensor | None, LayerNorm], None]  # adds Sums to `x`, and norms it to `normed`


@dataclass(frozen=True, slots=True)
class Buffers:
    """What layers of at least T tokens read and write."""

    x: Tensor  # [T, H] fp32, the residual stream
    q: Tensor  # [T, H], these are in the served dtype
    mixed: Tensor  # [T, H]
    inner: Tensor  # [T, FFN]
    normed: Tensor  # [T, H]
    sums: Tensor  # fp32, of [parts of K, T, H]

    def of(self, num: int) -> "Buffers":
        """For `num` tokens."""
        return Buffers(self.x[:num], self.q[:num], self.mixed[:num], self.inner[:num], self.normed[:num], self.sums)


class ChainedLayers:
    """The layers of `model` for `num_tokens` tokens, over `buffers`; rows that fill them up are any numbers."""

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        layers: list[Layer],
        weights: list[tuple[Tensor, ...]],
        biases: list[tuple[Tensor, ...]],
        kernels: ChainKernels,
        buffers: Buffers,
        num_tokens: int,
    ) -> None:
        """`weights` are those of `layers`, for more tokens than one as `packed` makes them; `biases` are in fp32."""
        config, device = model.config, model.device
        self._model, self._cache, self._kernels = model, cache, kernels
        self._weights, self._biases, self._num_tokens = weights, biases, num_tokens
        self.layers = layers
        self.buffers = buffers.of(num_tokens)
        view = kernels.view or (lambda activations: activations)
        self._normed, self._mixed, self._inner = map(
            view, (self.buffers.normed, self.buffers.mixed, self.buffers.inner)
        )
        # Of each split of the context: what it attends to, and of each head's scores the largest and the mass. What
        # rows that fill the step up have there is of a step before; a lone split's `parts` are read as they are.
        shape = num_tokens, kernels.splits
        self.parts = torch.zeros(*shape, config.hidden_size, dtype=model.dtype, device=device)
        self.stats = torch.zeros(*shape, config.num_heads, 2, dtype=torch.float32, device=device)

    @property
    def left(self) -> Sums:
        """What the last layer leaves to be added to `x`."""
        return self._kernels.down_splits, self.layers[-1][3].bias

    def run(self, **given: Any) -> None:
        """What `launches` makes."""
        for _, launch in self.launches(**given):
            launch()

    def launches(
        self,
        *,
        slots: Tensor,
        tables: Tensor,
        lengths: Tensor,
        num: Tensor,
        attend: Callable[[int], None],
        norm: Norm,
        pdl: bool,
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """The kernels in their order, by the names of ChainKernels' fields, and "norm".

        Of tokens whose keys and values go to `slots`, of the first `num` [1] sequences of `tables`. Of those `lengths`
        tell the tokens, the new one included. `attend` does a layer's attention, from `q` to `mixed`, if these kernels
        have none.
        """
        kernels, x, q, inner = self._kernels, self.buffers.x, self.buffers.q, self.buffers.inner
        heads = self._model.config.num_heads, kernels.splits, self._num_tokens
        grid, out_grid, down_grid = (_grid(kernels, splits) for splits in (1, kernels.out_splits, kernels.down_splits))
        merged = (self.parts, self.stats)
        mixed = merged if kernels.splits else (self._mixed, None)
        apart = kernels.down_splits > 0

        def reads(matrix: Matrix, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
            """x, its statistics, weights, bias, those of a norm."""
            return (self._normed, None, weight, bias, None, None) if apart else (x, None, weight, *_norm(matrix))

        def adds(bias: Tensor) -> tuple[Tensor | float | None, ...]:
            """Bias, those of a norm; y, where keys and values go; the norm's epsilon."""
            return None if apart else bias, None, None, self.buffers.sums if apart else x, None, None, None, 0.0

        left: Sums = (0, None)
        for number, (matrices, weights, biases) in enumerate(
            zip(self.layers, self._weights, self._biases, strict=True)
        ):
            (qkv, out, up, down), (w_qkv, w_out, w_up, w_down) = matrices, weights
            qkv_bias, out_bias, up_bias, down_bias = biases
            keys, values = self._cache.layer(number)
            if apart:
                assert qkv.norm is not None
                yield "norm", partial(norm, *left, qkv.norm)
            given = reads(qkv, w_qkv, qkv_bias)
            yield "qkv", partial(kernels.qkv, grid, *given, q, keys, values, slots, _epsilon(qkv), pdl=pdl)
            if kernels.splits:
                scale = float(self._model.attention_scale(number))
                cached = (q, keys, values, tables, lengths)
                rows = (num, tables.shape[1])
                yield "attention", partial(kernels.attention, heads, *cached, *merged, scale, *rows, pdl=pdl)
            else:
                yield "attention", partial(attend, number)
            yield "out", partial(kernels.out, out_grid, *mixed, w_out, *adds(out_bias), pdl=pdl)
            if apart:
                assert up.norm is not None
                yield "norm", partial(norm, kernels.out_splits, out.bias, up.norm)
            given = reads(up, w_up, up_bias)
            yield "up", partial(kernels.up, grid, *given, inner, None, None, None, _epsilon(up), pdl=pdl)
            yield "down", partial(kernels.down, down_grid, self._inner, None, w_down, *adds(down_bias), pdl=pdl)
            left = kernels.down_splits, down.bias


def chained_layers(
    model: GPT2, cache: KVCache, layers: list[Layer], kernels: Mapping[int, ChainKernels], buffers: Buffers
) -> dict[int, ChainedLayers]:
    """By how many tokens they are for: they share biases, and those of more than one weights that are packed here."""
    plain = [tuple(matrix.weight for matrix in layer) for layer in layers]
    tiles = [tuple(map(packed, layer)) for layer in plain] if any(num > 1 for num in kernels) else plain
    biases = [tuple(matrix.bias.float() for matrix in layer) for layer in layers if kernels]
    return {
        num: ChainedLayers(model, cache, layers, plain if num == 1 else tiles, biases, each, buffers, num)
        for num, each in kernels.items()
    }


def _grid(kernels: ChainKernels, splits: int) -> tuple[int, int, int]:
    """Of a product of which so many blocks share a row; 0: as 1."""
    return kernels.blocks // max(splits, 1), max(splits, 1), kernels.token_blocks


def _norm(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    assert matrix.norm is not None
    return matrix.folded_bias, matrix.scaled, matrix.norm.weight


def _epsilon(matrix: Matrix) -> float:
    assert matrix.norm is not None
    return float(matrix.norm.epsilon)
