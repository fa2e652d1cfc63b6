"""How the kernels of a step are shaped, by how many tokens it has: measured choices. Read by all that launch them."""

from dataclasses import dataclass


def power_of_two(number: int) -> int:
    """The least power of two that is `number` or more."""
    return 1 << (number - 1).bit_length()


def whole_tile(number: int) -> int:
    """The same, and as much as `tl.dot` wants of each side: 16."""
    return max(16, power_of_two(number))


@dataclass(frozen=True, slots=True)
class Vector:
    """One token: every program takes whole rows of the matrix."""

    block_n: int
    block_k: int
    warps: int
    prefetch: bool = False
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Tiled:
    """Many tokens in tiles."""

    block_t: int
    block_n: int
    block_k: int
    splits: int  # of K; more than one only where the sum is added to the residual stream
    warps: int
    stages: int
    prefetch: bool = False  # does nothing where K is split, nor in a plan without dependent launch
    wide: bool = False  # reads the matrix in 16 bits where it is there in 8, too


@dataclass(frozen=True, slots=True)
class Library:
    """The library's matrix product."""

    splits: int = 1


Product = Vector | Tiled | Library


@dataclass(frozen=True, slots=True)
class CudaDecode:
    """Attention of single tokens by the CUDA kernel (kernels/cuda/decode.py)."""

    warps: int
    passes: int  # of 4 tokens a warp, in registers at once; of keys in 8 bits twice as many
    splits: int = 1  # of the context, merged by the last to arrive


@dataclass(frozen=True, slots=True)
class Decode:
    """The same by Triton's."""

    block: int  # tokens of context at once
    splits: int  # of the context, a power of two
    warps: int
    merged: bool = True  # by the last to arrive; else by the next product, which must be a Vector
    cuda: CudaDecode | None = None  # in its place, where its kernel can be had


@dataclass(frozen=True, slots=True)
class Prefill:
    """Attention of prompts."""

    block_t: int
    block: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Chain:
    """The layers of one to 32 tokens by the CUDA kernels (kernels/cuda/chain.py)."""

    splits: int  # of the context; 0, of two tokens or more: attention is the plan's; of more than eight tokens 0 or 1
    warps: int = 8  # of a block of attention: a pass is of four tokens each
    ring: int = 0  # passes of keys and values that shared memory has room for; 0: they are in registers
    # Only of two tokens or more, but for `pdl`.
    pieces: int = 4  # that a block's rows of a matrix are copied in
    ahead: int = 1  # copies of a block under way at once
    resident: int = 4  # blocks on a multiprocessor that registers are to leave room for
    hand: int = 8  # tiles of activations (eight tokens) that a lane asks for at once, a power of two
    room: int = 0  # bytes of shared memory that a block asks for if it needs less
    pdl: bool = True
    # Of more than eight tokens: of K in `out` and `down`, whose sums a kernel of its own adds up and norms.
    out_splits: int = 1
    down_splits: int = 4


@dataclass(frozen=True, slots=True)
class Wide:
    """The products of a layer of 33 tokens or more by a CUDA kernel of warpgroups (kernels/cuda/wide.cu)."""

    blocks: int = 128  # that share the rows of a matrix
    groups: int = 1  # of 64 tokens in a block
    step: int = 128  # columns of activations in a stage
    stages: int = 5  # of a warpgroup's ring
    ahead: int = 2  # copies of a block's rows under way at once; no more than there are
    # Of K in `out` and `down`, whose sums a kernel of its own adds up and norms.
    out_splits: int = 4
    down_splits: int = 4
    pdl: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's layers. `qkv`, `out`, `up` and `down` are all Vector, or none is."""

    qkv: Product
    out: Product
    up: Product
    down: Product
    decode: Decode
    prefill: Prefill = Prefill(64, 64, 4, 2)
    pdl: bool = True
    split: bool = False  # over ranks, which sum between a product and the residual stream
    chain: Chain | Wide | None = None  # in place of the others, where its kernels can be had

    @property
    def fused(self) -> bool:
        """Layer norms, merging and residual sums are in the products."""
        return isinstance(self.qkv, Vector) and not self.split
