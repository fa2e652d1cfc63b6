"""Which kernels a step takes, by its size: what was fastest on an H100 or an H200. Read by graphs.py, hopper.py."""

from dataclasses import replace

import torch

from service.model.kernels.plan import (
    Chain,
    CudaDecode,
    Decode,
    Library,
    Plan,
    Prefill,
    Product,
    Tiled,
    Vector,
    Wide,
    whole_tile,
)

# Of a body of so many single tokens (bench/chain.py; 24 is taken as 32). For more than one weights are packed, 0.6 GB
# more of the 345M's; for the head of up to 32 rows another 0.1.
_ROOM = 72 * 1024
CHAINS = {
    1: Chain(splits=4),
    2: Chain(splits=2, resident=3, hand=4, room=_ROOM),
    4: Chain(splits=1, warps=16, ring=6, resident=3, hand=4, room=_ROOM),
    8: Chain(splits=1, warps=16, ring=6, resident=3, hand=4, room=_ROOM),
    16: Chain(splits=1, ring=8, resident=3, hand=4, out_splits=4),
    24: Chain(splits=1, ring=4, resident=3, hand=4, out_splits=4),
    32: Chain(splits=1, ring=4, resident=3, hand=4, out_splits=4),
}
# The same of more (bench/wide.py; 48 is taken as 64).
WIDES = {48: Wide(), 64: Wide(), 96: Wide(blocks=64), 128: Wide(groups=2, step=256, stages=2)}
# Attention of up to so many single tokens (bench/attention.py); a step that has prompts, too, counts as a third of its
# tokens, as under a steady load. The kernels are compiled as the engine starts, one for each pair of warps and passes.
CUDA_DECODES = (
    (8, CudaDecode(8, 2, splits=4)),
    (16, CudaDecode(8, 2, splits=2)),
    (32, CudaDecode(8, 2)),
    (64, CudaDecode(4, 2)),
    (2**31, CudaDecode(2, 2)),
)
_ONE = Plan(
    qkv=Vector(8, 1024, 4, prefetch=True),
    out=Vector(32, 1024, 8, prefetch=True),
    up=Vector(16, 1024, 8),
    down=Vector(8, 4096, 16),
    decode=Decode(64, 4, 4, merged=False),
)
_UP_TO_16 = Plan(
    qkv=Tiled(16, 32, 128, 1, 4, 4),
    out=Tiled(16, 32, 128, 2, 4, 4),
    up=Tiled(16, 32, 128, 1, 4, 4),
    down=Tiled(16, 32, 128, 4, 4, 4),
    decode=Decode(32, 4, 1),
    pdl=False,
)
_UP_TO_32 = Plan(
    qkv=Tiled(32, 32, 128, 1, 4, 4, prefetch=True),
    out=Tiled(32, 16, 256, 2, 4, 3),
    up=Tiled(32, 16, 256, 1, 4, 3, prefetch=True),
    down=Tiled(32, 32, 128, 4, 4, 4),
    decode=Decode(32, 1, 2),
)
_UP_TO_64 = Plan(
    qkv=Tiled(64, 16, 128, 1, 4, 4, prefetch=True),
    out=Tiled(64, 16, 256, 2, 4, 3),
    up=Tiled(64, 32, 128, 1, 4, 4),
    down=Tiled(64, 32, 128, 4, 4, 4),
    decode=Decode(32, 1, 1),
)
_UP_TO_128 = Plan(
    qkv=Tiled(64, 32, 128, 1, 4, 4),
    out=Tiled(64, 32, 128, 2, 4, 4),
    up=Tiled(128, 32, 128, 1, 4, 4, prefetch=True),
    down=Tiled(128, 32, 128, 4, 4, 4),
    decode=Decode(32, 1, 1),
)
_UP_TO_256 = Plan(
    qkv=Library(),
    out=Tiled(128, 32, 128, 2, 4, 4),
    up=Library(),
    down=Tiled(128, 64, 64, 4, 4, 4),
    decode=Decode(32, 1, 1),
)
_UP_TO_192 = replace(_UP_TO_256, down=Tiled(64, 64, 64, 4, 4, 4))  # three tiles, where two of 128 would be 256
_UP_TO_1024 = Plan(qkv=Library(), out=Library(), up=Library(), down=Library(), decode=Decode(32, 1, 1))
_MORE = Plan(
    qkv=Library(),
    out=Library(),
    up=Library(),
    down=Library(),
    decode=Decode(32, 1, 1),
    prefill=Prefill(64, 128, 4, 2),
)
_SINGLE = Plan(Library(), Library(), Library(), Library(), Decode(32, 1, 2), Prefill(16, 32, 4, 1))  # fp32
# Of weights in 8 bits; the same ones are there in 16 for the library, and for more tokens than these (on an H200):
# to convert them takes longer then than half the bytes save.
_MOST_NARROW = 16
_NARROW_ONE = replace(_ONE, qkv=Vector(16, 1024, 8, prefetch=True))
_BY_SIZE = (
    (16, _UP_TO_16),
    (32, _UP_TO_32),
    (64, _UP_TO_64),
    (128, _UP_TO_128),
    (192, _UP_TO_192),
    (256, _UP_TO_256),
    (1024, _UP_TO_1024),
)


def plan_for(
    num_tokens: int,
    *,
    dtype: torch.dtype,
    narrow: bool,
    decodes_only: bool,
    split: bool,
    head_size: int,
    shared_memory: int,
) -> Plan:
    """The plan of a body of `num_tokens`, whose programs may take `shared_memory` bytes each.

    `dtype` is of activations, `narrow` says that weights have 8 bits. `split` over ranks, which sum between a product
    and the residual stream: so that is done by kernels of their own.
    """
    if dtype == torch.float32:
        plan = _SINGLE
    elif num_tokens == 1 and decodes_only:
        plan = _NARROW_ONE if narrow else _ONE
    else:
        plan = next((plan for most, plan in _BY_SIZE if num_tokens <= most), _MORE)
    if decodes_only and dtype != torch.float32:
        plan = replace(plan, chain=CHAINS.get(num_tokens) or WIDES.get(num_tokens))
    if split:
        plan = replace(plan, split=True, decode=replace(plan.decode, merged=True))
    if not plan.fused and dtype != torch.float32:
        rows = num_tokens if decodes_only else num_tokens // 3
        cuda = next((cuda for most, cuda in CUDA_DECODES if rows <= most), None)
        plan = replace(plan, decode=replace(plan.decode, cuda=cuda))
    if num_tokens > _MOST_NARROW:
        plan = replace(plan, qkv=_wide(plan.qkv), out=_wide(plan.out), up=_wide(plan.up), down=_wide(plan.down))
    return replace(
        plan,
        qkv=_fit(plan.qkv, shared_memory),
        out=_fit(plan.out, shared_memory),
        up=_fit(plan.up, shared_memory),
        down=_fit(plan.down, shared_memory),
        decode=_fit_decode(plan.decode, head_size),
        prefill=_fit_prefill(plan.prefill, head_size, shared_memory, itemsize=dtype.itemsize),
    )


def _wide(product: Product) -> Product:
    return replace(product, wide=True) if isinstance(product, Tiled) else product


def _fit(product: Product, shared_memory: int) -> Product:
    """With as many stages as there is room for; a tile of 16 bits an element is there once a stage."""
    if not isinstance(product, Tiled):
        return product
    stage = 2 * (product.block_t + product.block_n) * product.block_k
    return replace(product, stages=max(1, min(product.stages, shared_memory // stage)))


def _fit_decode(decode: Decode, head_size: int) -> Decode:
    """Measured with heads of 64: larger ones go to more warps, so that a thread has no more in its registers."""
    return replace(decode, warps=min(16, decode.warps * max(1, whole_tile(head_size) // 64)))


def _fit_prefill(prefill: Prefill, head_size: int, shared_memory: int, *, itemsize: int) -> Prefill:
    """Smaller tiles for heads above 128, for the registers; then as many stages of keys and values as there is room."""
    width = whole_tile(head_size)
    rows, columns = (max(16, size * 128 // max(width, 128)) for size in (prefill.block_t, prefill.block))
    while columns > 16 and (rows + 2 * columns) * width * itemsize > shared_memory:
        columns //= 2
    stages = (shared_memory // (width * itemsize) - rows) // (2 * columns)
    return replace(prefill, block_t=rows, block=columns, stages=max(1, min(prefill.stages, stages)))


def head_for(num_rows: int, *, dtype: torch.dtype, narrow: bool, shared_memory: int) -> Product:
    """The product that gives the logits of `num_rows` rows; the rest as in `plan_for`."""
    if dtype == torch.float32:
        return Library()
    if num_rows == 1:
        return Vector(16, 1024, 4)
    if num_rows <= _MOST_NARROW and narrow:
        return _fit(Tiled(16, 64, 128, 1, 4, 4), shared_memory)
    if 16 < num_rows <= 64:
        return _fit(Tiled(64, 64, 128, 1, 4, 3, wide=True), shared_memory)
    return Library()
