"""A weight matrix (out, in) and the products with it, in one of several kernels. Called by fused.py and tail.py."""

import torch
from torch import Tensor

from service.model.attention import LayerCache
from service.model.formats import Narrow
from service.model.gpt2 import ACTIVATIONS, LayerNorm
from service.model.kernels import products
from service.model.kernels.plan import Library, Product, Tiled, Vector, whole_tile
from service.model.kernels.products import ACTIVATE, NORM, PARTIAL, PLAIN, SCATTER, STORE


class Matrix:
    """A matrix [N, K], its bias [N], and the layer norm that stands before it, if one does.

    `narrow` is the matrix in 8 bits: kernels then read that unless they are shaped for `weight`, the library's.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        activation: str,
        norm: LayerNorm | None = None,
        narrow: Narrow | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self._wide = (weight, bias)  # without scales anything
        self.rows = self._wide if narrow is None else (narrow.rows, narrow.scales)
        assert all(rows.is_contiguous() for rows in (*self._wide, *self.rows)), "kernels read rows, not strides"
        self._activation = activation
        self.norm = norm
        if norm is not None:  # folded: W LN(x) + bias = (W (gain x) - mean W gain) / deviation + W shift + bias
            single = weight.float() if narrow is None else narrow.wide()
            self.scaled = single @ norm.weight  # fp32 [N]
            self.folded_bias = single @ norm.bias + bias.float()

    def product(
        self,
        settings: Product,
        x: Tensor,
        y: Tensor,
        *,
        num_tokens: int,
        pdl: bool,
        read: int = PLAIN.value,
        put: int = STORE.value,
        splits: int = 1,
        stats: Tensor | None = None,
        cache: LayerCache | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """y from x as products.py says of `read` and `put`; `splits` and `stats` belong to MERGE."""
        if isinstance(settings, Library):
            self._by_library(x[:num_tokens], y, put=put)
            return
        nothing = self.bias
        keys, values = (nothing, nothing) if cache is None else cache
        places = (y, keys, values, nothing if slots is None else slots)
        size, depth = self.weight.shape
        shape = {"K": depth, "N": size, "OUT": put, "KIND": products.ACTIVATIONS[self._activation]}
        shape |= {"PDL": pdl, "launch_pdl": pdl}
        whole = whole_tile(depth)
        shape |= {"BLOCK_N": settings.block_n, "BLOCK_K": whole if read == NORM.value else min(settings.block_k, whole)}
        shape |= {"PREFETCH": settings.prefetch, "num_warps": settings.warps}
        if isinstance(settings, Tiled):
            grid = (-(-size // settings.block_n), -(-num_tokens // settings.block_t), settings.splits)
            products.tiled_product[grid](
                x,
                *(self._wide if settings.wide else self.rows),
                self.bias,
                *places,
                num_tokens,
                **shape,
                BLOCK_T=settings.block_t,
                SPLITS=settings.splits,
                STAGES=settings.stages,
            )
            return
        assert isinstance(settings, Vector)
        assert num_tokens == 1
        folded = read == NORM.value
        bias, scaled = (self.folded_bias, self.scaled) if folded else (self.bias, nothing)
        gain, epsilon = (nothing, 0.0) if self.norm is None else (self.norm.weight, self.norm.epsilon)
        products.vector_product[(-(-size // settings.block_n),)](
            x,
            nothing if stats is None else stats,
            *self.rows,
            bias,
            scaled,
            gain,
            *places,
            epsilon,
            **shape,
            SPLITS=splits,
            IN=read,
        )

    def _by_library(self, x: Tensor, y: Tensor, *, put: int) -> None:
        """STORE and ACTIVATE into the served dtype; PARTIAL, and STORE without bias into fp32."""
        assert put != SCATTER.value
        weight = self.weight.t()
        if put == PARTIAL.value or y.dtype != x.dtype:
            y = y.view(-1)[: len(x) * weight.shape[1]].view(len(x), -1)
            if x.dtype == torch.float32:
                torch.mm(x, weight, out=y)
            elif x.is_cuda:
                torch.mm(x, weight, out_dtype=torch.float32, out=y)
            else:
                torch.mm(x.float(), weight.float(), out=y)
            return
        y = y[: len(x)]
        if put != ACTIVATE.value:
            torch.addmm(self.bias, x, weight, out=y)
        elif self._activation == "gelu_tanh" and x.is_cuda and x.dtype != torch.float32:  # it is coarser than fp32
            torch.ops.aten._addmm_activation.out(self.bias, x, weight, use_gelu=True, out=y)
        else:
            torch.addmm(self.bias, x, weight, out=y)
            y.copy_(ACTIVATIONS[self._activation](y))
