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
_RESIDUAL, _ACTIVATE, _SCATTER, _SUMS = 0, 1, 2, 3  # PUT
_HIDDEN = 1024  # an eighth of it is what half a warp reads at once, and each half makes one of a norm's statistics
_TILES = 8 * 32  # of few.cu: columns that the warps of a block take at once


@dataclass(frozen=True, slots=True)
class ChainKernels:
    """Loaded; to be launched in this order, each `grid` of which fits the model that they were compiled for."""

    qkv: Any  # all are launch.Kernel
    attention: Any  # None: the plan's
    out: Any
    up: Any
    down: Any
    splits: int  # of the context
    # Of K, whose sums a kernel that is not of these adds up and norms; 0: products add to x, and norm what they read.
    out_splits: int = 0
    down_splits: int = 0


def normed_apart(num_tokens: int) -> bool:
    """Whether layer norms are kernels of their own: every block reads all tokens, so many better in 16 bits."""
    return num_tokens > 8


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

    def product(size: int, depth: int, read: int, put: int, parts: int = 1, **more: int) -> Source:
        rows, depth = size // BLOCKS * parts, depth // parts
        shape = {"N": size, "K": depth, "ROWS": rows, "READ": read, "PUT": put} | more | half
        if num_tokens == 1:
            return Source("product.cu", tuple(shape.items()))
        pieces = chain.pieces if parts == 1 else rows // 8
        shape |= {"TOKENS": num_tokens, "PIECES": pieces, "AHEAD": min(chain.ahead, pieces)}
        most = max(1, chain.hand // -(-num_tokens // 8)).bit_length() - 1
        shape |= {"PARTS": parts, "RESIDENT": chain.resident, "HAND": min(1 << most, depth // _TILES)}
        return Source("few.cu", tuple(shape.items()))

    attention = {"HEADS": hidden // _HEAD, "SPLITS": chain.splits, "BLOCK_SIZE": block_size} | half
    attention |= {} if num_tokens == 1 else {"MANY": 1}
    attention |= {"RING": chain.ring} if chain.ring else {}
    kind = {"KIND": ACTIVATIONS[config.activation]}
    attends = {"attention": Source("attention.cu", tuple(attention.items()))} if chain.splits else {}
    if normed_apart(num_tokens):
        assert chain.splits <= 1, "nothing merges the splits of a context"
        return attends | {
            "qkv": product(3 * hidden, hidden, _PLAIN, _SCATTER),
            "out": product(hidden, hidden, _PLAIN, _SUMS, chain.out_splits),
            "up": product(inner, hidden, _PLAIN, _ACTIVATE, **kind),
            "down": product(hidden, inner, _PLAIN, _SUMS, chain.down_splits),
        }
    read = {"read": _MERGE, "SPLITS": chain.splits} if chain.splits else {"read": _PLAIN}
    return attends | {
        "qkv": product(3 * hidden, hidden, _NORM, _SCATTER),
        "out": product(hidden, hidden, put=_RESIDUAL, **read),
        "up": product(inner, hidden, _NORM, _ACTIVATE, **kind),
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
    kernels: dict[int, dict[str, Any]] = {num_tokens: {} for num_tokens in chains}
    for ((num_tokens, name), source), cubin in zip(wanted.items(), cubins, strict=True):
        shared = shared_memory(source)
        if name != "attention":
            shared = max(shared, chains[num_tokens].room)
        kernels[num_tokens][name] = Kernel(cubin, Path(source.file).stem, threads=_THREADS, shared=shared)
    return {num: loaded(named, chains[num], num_tokens=num) for num, named in kernels.items()}


def shared_memory(source: Source) -> int:
    """Bytes that a block needs at its launch: of its rows, or of keys and values of the passes in its ring."""
    shape = dict(source.defines)
    return 2 * shape["ROWS"] * shape["K"] if "ROWS" in shape else 2 * 16 * _THREADS * shape.get("RING", 0)


def loaded(named: Mapping[str, Any], chain: Chain, *, num_tokens: int) -> ChainKernels:
    """Of kernels by the names of `sources`."""
    rest = {"out_splits": chain.out_splits, "down_splits": chain.down_splits} if normed_apart(num_tokens) else {}
    return ChainKernels(**{"attention": None} | dict(named), splits=chain.splits, **rest)
