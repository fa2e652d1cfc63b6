"""Attention of single tokens by a CUDA kernel: what it is compiled for, and how it is launched. Made by hopper.py."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.model.attention import LayerCache
from service.model.gpt2 import GPT2
from service.model.kernels.cuda.compiler import Source, Target, compile_all
from service.model.kernels.plan import CudaDecode

_HEAD = 64
_MOST_SPLITS = 8  # as in decode.cu

Shape = tuple[int, int]  # warps and passes


class DecodeKernels:
    """One for each pair of warps and passes; made for a number of heads and a block size."""

    def __init__(self, kernels: Mapping[Shape, Any], *, num_heads: int) -> None:
        """The kernels are launch.Kernel."""
        self.kernels = kernels
        self._num_heads = num_heads

    def __call__(
        self,
        plan: CudaDecode,
        q: Tensor,
        cache: LayerCache,
        tables: Tensor,
        lengths: Tensor,
        num_rows: Tensor,
        out: Tensor,
        split: tuple[Tensor, Tensor, Tensor],
        *,
        scale: float,
        stride: int,
        together: bool,
        pdl: bool,
    ) -> None:
        """Into `out` what the first `num_rows` [1] of `q` [rows, stride] attend to, as `decode_attention` does.

        `together`: launched behind `prefill_attention`, in one step with it (BESIDE there).
        `split` are its parts and stats, fp32 with room for [rows, splits, heads * 64] and [rows, splits, heads, 2], and
        the counters of who has arrived.
        """
        assert 1 <= plan.splits <= _MOST_SPLITS
        self.kernels[plan.warps, plan.passes](
            (self._num_heads * plan.splits, len(q), 1),
            *(q, cache.keys, cache.values, tables, lengths, num_rows, out, *split),
            *(float(scale), stride, tables.shape[1], plan.splits, int(together)),
            pdl=pdl,
        )


def suits(model: GPT2) -> bool:
    """Whether the kernels can do that shape."""
    return (
        model.dtype in (torch.bfloat16, torch.float16)
        and model.cache_dtype in (model.dtype, torch.float8_e4m3fn)
        and model.config.head_size == _HEAD
    )


def sources(model: GPT2, shapes: Iterable[CudaDecode], *, block_size: int) -> dict[Shape, Source]:
    """By warps and passes."""
    fixed = {"HEADS": model.attention_width // _HEAD, "BLOCK_SIZE": block_size}
    fixed |= {"HALF": 1} if model.dtype == torch.float16 else {}
    narrow = model.cache_dtype == torch.float8_e4m3fn
    fixed |= {"NARROW": 1} if narrow else {}
    more = 2 if narrow else 1  # passes, of half the bytes
    pairs = dict.fromkeys((shape.warps, shape.passes) for shape in shapes)
    return {
        (warps, passes): Source("decode.cu", (*fixed.items(), ("WARPS", warps), ("PASSES", more * passes)))
        for warps, passes in pairs
    }


def load_decode(model: GPT2, shapes: Iterable[CudaDecode], *, block_size: int, folder: Path | None) -> DecodeKernels:
    """Those of `shapes`, on the current device. Raises CompilerError, ImportError, OSError, RuntimeError."""
    from service.model.kernels.cuda.launch import Kernel, driver_version  # cuda-bindings is only where CUDA is

    named = sources(model, shapes, block_size=block_size)
    cubins = compile_all(list(named.values()), Target("sm_90a", driver_version()), folder=folder)
    kernels = {
        (warps, passes): Kernel(cubin, "decode", threads=32 * warps, shared=0)
        for (warps, passes), cubin in zip(named, cubins, strict=True)
    }
    return DecodeKernels(kernels, num_heads=model.attention_width // _HEAD)
