"""The kernels of a layer in a chain: what each is compiled for, and how it is loaded. Called by hopper.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from service.model.config import ModelConfig
from service.model.kernels.cuda.compiler import Source, Target, compile_all
from service.model.kernels.plan import Chain, Wide
from service.model.kernels.products import ACTIVATIONS

BLOCKS = 128  # that share the rows of a matrix: no more than there are multiprocessors
_HEAD = 64
_THREADS = 256  # of a block of a product
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
    blocks: int = BLOCKS  # that share the rows of a matrix
    token_blocks: int = 1  # that share the tokens
    view: Callable[[torch.Tensor], Any] | None = None  # of activations, for products; None: themselves


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


def packed(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] as [N / 8, K / 32] tiles of [8 rows, 4 pieces of 8 columns], what few.cu, wide.cu and head.cu read.

    Piece p of row r stands where (p ^ r / 2) % 4 would: see Tiles in link.cuh.
    """
    size, depth = weight.shape
    tiles = weight.view(size // 8, 8, depth // 32, 4, 8).transpose(1, 2)
    rows, pieces = torch.arange(8, device=weight.device)[:, None], torch.arange(4, device=weight.device)
    return tiles[:, :, rows, pieces ^ rows // 2 % 4].contiguous()


def sources(
    config: ModelConfig, dtype: torch.dtype, chain: Chain | Wide, *, block_size: int, num_tokens: int = 1
) -> dict[str, Source]:
    """By the names of ChainKernels' fields."""
    if isinstance(chain, Wide):
        return _wide(config, dtype, chain, num_tokens=num_tokens)
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

    attention = {"HEADS": hidden // _HEAD, "SPLITS": chain.splits, "WARPS": chain.warps, "BLOCK_SIZE": block_size}
    attention |= half
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
    read = {"read": _MERGE, "SPLITS": chain.splits} if chain.splits > 1 else {"read": _PLAIN}
    return attends | {
        "qkv": product(3 * hidden, hidden, _NORM, _SCATTER),
        "out": product(hidden, hidden, put=_RESIDUAL, **read),
        "up": product(inner, hidden, _NORM, _ACTIVATE, **kind),
        "down": product(hidden, inner, _PLAIN, _RESIDUAL),
    }


def _wide(config: ModelConfig, dtype: torch.dtype, wide: Wide, *, num_tokens: int) -> dict[str, Source]:
    hidden, inner = config.hidden_size, config.intermediate_size
    fixed = {"TOKENS": num_tokens, "GROUPS": wide.groups, "WARPS": 4 * wide.groups}
    fixed |= {"STEP": wide.step, "STAGES": wide.stages} | ({"HALF": 1} if dtype == torch.float16 else {})

    def product(size: int, depth: int, put: int, parts: int = 1, **more: int) -> Source:
        rows = size // wide.blocks * parts
        shape = {"N": size, "K": depth // parts, "ROWS": rows, "PARTS": parts, "PUT": put}
        return Source("wide.cu", tuple((shape | {"AHEAD": min(wide.ahead, rows // 8)} | fixed | more).items()))

    return {
        "qkv": product(3 * hidden, hidden, _SCATTER),
        "out": product(hidden, hidden, _SUMS, wide.out_splits),
        "up": product(inner, hidden, _ACTIVATE, KIND=ACTIVATIONS[config.activation]),
        "down": product(hidden, inner, _SUMS, wide.down_splits),
    }


def load_chains(
    config: ModelConfig,
    dtype: torch.dtype,
    chains: Mapping[int, Chain | Wide],
    *,
    block_size: int,
    folder: Path | None,
    **defines: int,
) -> dict[int, ChainKernels]:
    """Of each number of tokens, on the current device. Raises CompilerError, ImportError, RuntimeError."""
    # cuda-bindings is only where CUDA is
    from service.model.kernels.cuda.launch import Kernel, driver_version, tiled_map

    wanted = {
        (num_tokens, name): replace(source, defines=(*source.defines, *defines.items()))
        for num_tokens, chain in chains.items()
        for name, source in sources(config, dtype, chain, block_size=block_size, num_tokens=num_tokens).items()
    }
    cubins = compile_all(list(wanted.values()), Target("sm_90a", driver_version()), folder=folder)
    kernels: dict[int, dict[str, Any]] = {num_tokens: {} for num_tokens in chains}
    for ((num_tokens, name), source), cubin in zip(wanted.items(), cubins, strict=True):
        shared, chain = shared_memory(source), chains[num_tokens]
        if name != "attention" and isinstance(chain, Chain):
            shared = max(shared, chain.room)
        kernels[num_tokens][name] = Kernel(cubin, Path(source.file).stem, threads=threads(source), shared=shared)
    return {num: loaded(named, chains[num], num_tokens=num, tiled=tiled_map) for num, named in kernels.items()}


def threads(source: Source) -> int:
    """Of a block."""
    shape = dict(source.defines)
    return 32 * shape["WARPS"] if "WARPS" in shape else _THREADS


def shared_memory(source: Source) -> int:
    """Bytes that a block needs at its launch: of its rows and of stages, or of keys and values in its ring."""
    shape = dict(source.defines)
    if "ROWS" not in shape:
        return 2 * 16 * threads(source) * shape.get("RING", 0)
    stages = 64 * shape["GROUPS"] * shape["STEP"] * shape["STAGES"] if "STEP" in shape else 0
    return 2 * (shape["ROWS"] * shape["K"] + stages)


def loaded(
    named: Mapping[str, Any], chain: Chain | Wide, *, num_tokens: int, tiled: Callable[[torch.Tensor, int], Any]
) -> ChainKernels:
    """Of kernels by the names of `sources`; `tiled` is launch.tiled_map."""
    rest: dict[str, Any] = {"attention": None, **named}
    if isinstance(chain, Wide):
        token_blocks = -(-num_tokens // (64 * chain.groups))
        rest |= {"blocks": chain.blocks, "token_blocks": token_blocks, "view": lambda matrix: tiled(matrix, chain.step)}
    if isinstance(chain, Wide) or normed_apart(num_tokens):
        rest |= {"out_splits": chain.out_splits, "down_splits": chain.down_splits}
    return ChainKernels(**rest, splits=0 if isinstance(chain, Wide) else chain.splits)
