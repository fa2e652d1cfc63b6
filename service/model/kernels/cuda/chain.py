"""The kernels of few tokens' layers: what each is compiled for, and how it is loaded. Called by hopper.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from service.model.config import ModelConfig
from service.model.kernels.cuda.compiler import Source, Target, compile_all
from service.model.kernels.plan import Chain
from service.model.kernels.products import ACTIVATIONS

BLOCKS = 128  # that share the rows of a matrix: no more than there are multiprocessors
_HEAD = 64
_THREADS = 256
_NORM, _MERGE, _PLAIN = 1, 2, 0  # READ of product.cu
_RESIDUAL, _ACTIVATE, _SCATTER = 0, 1, 2  # PUT
_HIDDEN = 1024  # an eighth of it is what half a warp reads at once, and each half makes one of a norm's statistics
_TILES = 8 * 32  # of few.cu: columns that the warps of a block take at once
_TILE = 64 * 1024  # bytes of weights that a block holds: more leave no room for the kernels that follow


@dataclass(frozen=True, slots=True)
class ChainKernels:
    """Loaded; to be launched in this order, each `grid` of which fits the model that they were compiled for."""

    qkv: Any  # all are launch.Kernel
    attention: Any  # None: the plan's
    out: Any
    up: Any
    down: Any
    splits: int  # of the context


def suits(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels can do that shape."""
    inner = config.intermediate_size
    return (
        dtype in (torch.bfloat16, torch.float16)
        and config.hidden_size == _HIDDEN
        and config.head_size == _HEAD
        and inner in (_HIDDEN, 2 * _HIDDEN, 4 * _HIDDEN)  # whole turns of a slice, and no more than a block's tile
    )


def sources(
    config: ModelConfig, dtype: torch.dtype, chain: Chain, *, block_size: int, num_tokens: int = 1
) -> dict[str, Source]:
    """By the names of ChainKernels' fields."""
    hidden, inner = config.hidden_size, config.intermediate_size
    half = {"HALF": 1} if dtype == torch.float16 else {}

    def product(size: int, depth: int, read: int, put: int, **more: int) -> Source:
        shape = {"N": size, "K": depth, "ROWS": size // BLOCKS, "READ": read, "PUT": put} | more | half
        if num_tokens == 1:
            return Source("product.cu", tuple(shape.items()))
        shape |= {"TOKENS": num_tokens, "PIECES": chain.pieces, "AHEAD": chain.ahead, "RESIDENT": chain.resident}
        shape |= {"HAND": min(chain.hand, depth // _TILES)}
        return Source("few.cu", tuple(shape.items()))

    attention = {"HEADS": hidden // _HEAD, "SPLITS": chain.splits, "BLOCK_SIZE": block_size} | half
    attention |= {} if num_tokens == 1 else {"MANY": 1}
    read = {"read": _MERGE, "SPLITS": chain.splits} if chain.splits else {"read": _PLAIN}
    return {
        "qkv": product(3 * hidden, hidden, _NORM, _SCATTER),
        **({"attention": Source("attention.cu", tuple(attention.items()))} if chain.splits else {}),
        "out": product(hidden, hidden, put=_RESIDUAL, **read),
        "up": product(inner, hidden, _NORM, _ACTIVATE, KIND=ACTIVATIONS[config.activation]),
        "down": product(hidden, inner, _PLAIN, _RESIDUAL),
    }


def load_chains(
    config: ModelConfig,
    dtype: torch.dtype,
    chains: Mapping[int, Chain],
    *,
    block_size: int,
    folder: Path | None,
    **defines: int,
) -> dict[int, ChainKernels]:
    """Of each number of tokens, on the current device. Raises CompilerError, ImportError, RuntimeError."""
    from service.model.kernels.cuda.launch import Kernel, driver_version  # cuda-bindings is only where CUDA is

    wanted = {
        (num_tokens, name): replace(source, defines=(*source.defines, *defines.items()))
        for num_tokens, chain in chains.items()
        for name, source in sources(config, dtype, chain, block_size=block_size, num_tokens=num_tokens).items()
    }
    cubins = compile_all(list(wanted.values()), Target("sm_90a", driver_version()), folder=folder)
    kernels: dict[int, dict[str, Any]] = {num_tokens: {"attention": None} for num_tokens in chains}
    for ((num_tokens, name), source), cubin in zip(wanted.items(), cubins, strict=True):
        shape = dict(source.defines)
        shared = max(2 * shape["ROWS"] * shape["K"], chains[num_tokens].room) if "ROWS" in shape else 0
        kernels[num_tokens][name] = Kernel(cubin, Path(source.file).stem, threads=_THREADS, shared=shared)
    return {num: ChainKernels(**named, splits=chains[num].splits) for num, named in kernels.items()}
