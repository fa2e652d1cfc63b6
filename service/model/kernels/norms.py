"""The residual stream: embeddings, sums of partial products, layer norm. Called by model/fused.py."""

import triton
import triton.language as tl

from service.model.kernels.chain import begin, wait


@triton.jit
def embed(
    token_ids,  # [T]
    sources,  # [T] row of `sampled` that a token is, or -1
    sampled,  # [R]
    positions,  # [T]
    token_table,  # [ROWS, H] of the ids from `first_id` on
    position_table,  # [context, H]
    first_id,
    turn,  # [1] counts steps, modulo TURNS
    resolved,  # [T], out: the token ids
    x,  # [T, H] fp32, out
    ROWS: tl.constexpr,
    PLACED: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    TURNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x = token embedding + position embedding, in fp32; program t. A token that could not be sampled is 0.

    Of an id that the table has not, x is the position embedding alone; unless PLACED, without that.
    """
    begin(PDL)
    t = tl.program_id(0)
    h = tl.arange(0, WIDTH)
    inside = h < H
    place = tl.load(position_table + tl.load(positions + t).to(tl.int64) * H + h, mask=inside & PLACED, other=0.0)
    source = tl.load(sources + t)
    token = tl.load(token_ids + t)
    wait(PDL)
    if source >= 0:
        token = tl.maximum(tl.load(sampled + source), 0)
    tl.store(resolved + t, token)
    if t == 0:
        tl.store(turn, (tl.load(turn) + 1) % TURNS)
    row = token - first_id
    value = tl.load(token_table + row.to(tl.int64) * H + h, mask=inside & (row >= 0) & (row < ROWS), other=0.0)
    tl.store(x + t * H + h, value.to(tl.float32) + place.to(tl.float32), mask=inside)


@triton.jit
def put_normed(at, value, inside, weight, added, epsilon, H: tl.constexpr):
    """The layer norm of a row of the stream."""
    mean = tl.sum(value) / H
    centred = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / H + epsilon)
    tl.store(at, (centred * scale * weight + added).to(at.dtype.element_ty), mask=inside)


@triton.jit
def add_and_norm(
    x,  # [T, H] fp32, changed
    partials,  # [SPLITS, T, H] fp32, added to x
    bias,  # [H], likewise
    gain,  # [H] fp32
    shift,
    normed,  # [T, H], out
    num_tokens,
    epsilon,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,  # 0: x as it is
    PDL: tl.constexpr,
):
    """normed = layer norm of x + bias + the sum of the partial products, in their order; program t."""
    begin(PDL)
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, WIDTH)
    inside = h < H
    weight = tl.load(gain + h, mask=inside, other=0.0)
    added = tl.load(shift + h, mask=inside, other=0.0)
    if SPLITS > 0:
        offset = tl.load(bias + h, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    value = tl.load(x + t * H + h, mask=inside, other=0.0)
    if SPLITS > 0:
        value += offset
        for split in tl.static_range(SPLITS):
            value += tl.load(partials + (split * num_tokens + t) * H + h, mask=inside, other=0.0)
        tl.store(x + t * H + h, value, mask=inside)
    put_normed(normed + t * H + h, value, inside, weight, added, epsilon, H)


@triton.jit
def gather_and_norm(
    x,  # [T, H] fp32
    indices,  # [R]
    gain,
    shift,
    normed,  # [R, H], out
    epsilon,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """normed[r] = layer norm of x[indices[r]]; program r."""
    begin(PDL)
    r = tl.program_id(0)
    h = tl.arange(0, WIDTH)
    inside = h < H
    weight = tl.load(gain + h, mask=inside, other=0.0)
    added = tl.load(shift + h, mask=inside, other=0.0)
    index = tl.load(indices + r).to(tl.int64)
    wait(PDL)
    value = tl.load(x + index * H + h, mask=inside, other=0.0)
    put_normed(normed + r * H + h, value, inside, weight, added, epsilon, H)


@triton.jit
def write_kv(
    qkv,  # [T, 3 H]
    q,  # [T, H], out
    keys,
    values,
    slots,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries, keys and values of a product that could not put them in their places itself; program t."""
    begin(PDL)
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, WIDTH)
    inside = h < H
    slot = tl.load(slots + t).to(tl.int64)
    wait(PDL)
    tl.store(q + t * H + h, tl.load(qkv + t * 3 * H + h, mask=inside), mask=inside)
    k = tl.load(qkv + t * 3 * H + H + h, mask=inside)
    v = tl.load(qkv + t * 3 * H + 2 * H + h, mask=inside)
    tl.store(keys + slot * H + h, k.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + slot * H + h, v.to(values.dtype.element_ty), mask=inside)
