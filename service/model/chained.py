"""The layers of one token as a chain of CUDA kernels, five a layer, over the buffers of model/fused.py, its caller."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from service.model.attention import KVCache
from service.model.gpt2 import GPT2
from service.model.kernels.cuda.chain import BLOCKS, ChainKernels
from service.model.matrix import Matrix


class ChainedLayers:
    """The layers of `model`, whose matrices are (qkv, out, up, down) a layer, for the one token in `x` [H]."""

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        matrices: list[tuple[Matrix, Matrix, Matrix, Matrix]],
        kernels: ChainKernels,
        x: Tensor,
    ) -> None:
        """The residual stream comes and stays in `x`."""
        config, device = model.config, model.device
        hidden = config.hidden_size
        self._model, self._cache, self._kernels, self.x = model, cache, kernels, x
        self._matrices = matrices
        self._biases = [(out.bias.float(), down.bias.float()) for _, out, _, down in matrices]
        self.q = torch.zeros(hidden, dtype=model.dtype, device=device)
        self.inner = torch.zeros(config.intermediate_size, dtype=model.dtype, device=device)
        # Of each split of the context: what it attends to, and of each head's scores the largest and the mass.
        self.parts = torch.zeros(kernels.splits, hidden, dtype=model.dtype, device=device)
        self.stats = torch.zeros(kernels.splits, config.num_heads, 2, dtype=torch.float32, device=device)

    def run(self, *, slot: Tensor, table: Tensor, length: Tensor, pdl: bool) -> None:
        """Of a token whose key and value go to `slot` [1], of a sequence of `length` [1], it included, in `table`."""
        for _, launch in self.launches(slot=slot, table=table, length=length, pdl=pdl):
            launch()

    def launches(
        self, *, slot: Tensor, table: Tensor, length: Tensor, pdl: bool
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """The same, one kernel at a time, by the names of ChainKernels' fields."""
        kernels, x, q, inner = self._kernels, self.x, self.q, self.inner
        grid, heads = (BLOCKS, 1), (self._model.config.num_heads, kernels.splits)
        merged = (self.parts, self.stats)
        for number, (matrices, biases) in enumerate(zip(self._matrices, self._biases, strict=True)):
            (qkv, out, up, down), (out_bias, down_bias) = matrices, biases
            keys, values = self._cache.layer(number)
            scale = float(self._model.attention_scale(number))
            places = (q, keys, values, slot)
            # x, its statistics, weights, bias, those of a norm; y, where keys and values go; the norm's epsilon.
            yield "qkv", partial(kernels.qkv, grid, x, None, *_normed(qkv), *places, _epsilon(qkv), pdl=pdl)
            reads = (q, keys, values, table, length)
            yield "attention", partial(kernels.attention, heads, *reads, *merged, scale, pdl=pdl)
            weights = (out.weight, out_bias, None, None)
            yield "out", partial(kernels.out, grid, *merged, *weights, x, None, None, None, 0.0, pdl=pdl)
            yield "up", partial(kernels.up, grid, x, None, *_normed(up), inner, None, None, None, _epsilon(up), pdl=pdl)
            weights = (down.weight, down_bias, None, None)
            yield "down", partial(kernels.down, grid, inner, None, *weights, x, None, None, None, 0.0, pdl=pdl)


def _normed(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert matrix.norm is not None
    return matrix.weight, matrix.folded_bias, matrix.scaled, matrix.norm.weight


def _epsilon(matrix: Matrix) -> float:
    assert matrix.norm is not None
    return float(matrix.norm.epsilon)
