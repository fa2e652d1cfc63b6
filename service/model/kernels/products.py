"""Products with a weight matrix (out, in): one row of activations, a few, or many. Called by model/fused.py.

Around the product each kernel does what stands before and after it in the layer: layer norm or the merging of
attention's splits before; bias and then activation, residual or the scattering of keys and values after. A matrix in 8
bits has a scale for each of its rows, by which sums are multiplied.
"""

import triton
import triton.language as tl

from service.model.kernels.chain import begin, prefetch, wait
from service.model.kernels.record import TEMPERATURE
from service.model.kernels.sampling import banned_id, scan

# What a kernel reads its activations from.
PLAIN = tl.constexpr(0)  # x [T, K] in the served dtype
NORM = tl.constexpr(1)  # layer norm of x [T, K] in fp32
MERGE = tl.constexpr(2)  # splits of attention [T, SPLITS, K] in fp32, and their maxima and sums [T, SPLITS, 2, K]

# Where it puts what comes out.
STORE = tl.constexpr(0)  # y [T, N] in y's dtype
ACTIVATE = tl.constexpr(1)  # the same, after the activation
RESIDUAL = tl.constexpr(2)  # added to y [T, N] in fp32
SCATTER = tl.constexpr(3)  # queries to y [T, N / 3], keys and values to their slots of the cache
PARTIAL = tl.constexpr(4)  # y [splits of K, T, N] in fp32, without bias

ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "relu": 2, "silu": 3, "tanh": 4}


@triton.jit
def _tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -y, y)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of fp32 x."""
    if KIND == 0:
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == 2:
        y = tl.maximum(x, 0.0)
    elif KIND == 3:
        y = x / (1.0 + tl.exp(-tl.maximum(x, -80.0)))
    else:
        y = _tanh(x)
    return y


@triton.jit
def _put(
    acc, before, slot, t, n, rows, columns, y, keys, values, N: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr
):
    """The epilogue: fp32 acc, bias in it, of tokens t and columns n, which broadcast against each other.

    `before` is what RESIDUAL adds to, `slot` where SCATTER puts: loaded by the caller, so that they come
    while the product is computed.
    """
    inside = rows & columns
    if OUT == RESIDUAL:
        tl.store(y + t * N + n, before + acc, mask=inside)
    elif OUT == SCATTER:
        H: tl.constexpr = N // 3
        value = acc.to(y.dtype.element_ty)
        at = slot.to(tl.int64) * H
        tl.store(y + t * H + n, value, mask=inside & (n < H))
        kept = value.to(keys.dtype.element_ty)
        tl.store(keys + at + (n - H), kept, mask=inside & (n >= H) & (n < 2 * H))
        tl.store(values + at + (n - 2 * H), kept, mask=inside & (n >= 2 * H))
    else:
        if OUT == ACTIVATE:
            acc = activate(acc, KIND)
        tl.store(y + t.to(tl.int64) * N + n, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _after_norm(x, tile, scale, factor, slope, epsilon, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """W LN(x) but for what the norm's shift adds: (W (g x) - mean W g) / deviation, all sums in one reduction.

    W is `tile`, its rows times `scale`.
    """
    k = tl.arange(0, BLOCK_K)
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    spread = tl.broadcast_to(value[None, :], [BLOCK_N, BLOCK_K])
    # What costs is a reduction's barriers.
    parts = (widened(tile, tl.float32) * (value * factor)[None, :], spread, spread * spread)
    acc, total, squares = tl.reduce(parts, 1, _add_three)
    mean = total / K
    variance = tl.maximum(squares / K - mean * mean, 0.0)  # rounding may leave less
    return (acc * scale - mean * slope) * tl.rsqrt(variance + epsilon)


@triton.jit
def widened(tile, DTYPE: tl.constexpr):
    """In 16 or 32 bits; of 8 exactly."""
    if tile.dtype == tl.float8e4nv and tl.bfloat16 == DTYPE:
        return tile.to(tl.float32).to(DTYPE)  # no instruction converts one into the other
    if tile.dtype == tl.int8 and tl.float32 == DTYPE:
        # The bits of 1.5 * 2^23 + x: an addition, of which a processor does four while it converts one number.
        return (tile.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return tile.to(DTYPE)


@triton.jit
def _scale(w, scales, n, rows):
    """Of the rows n of a matrix in 8 bits."""
    return tl.load(scales + n, mask=rows, other=0.0) if w.dtype.element_ty.primitive_bitwidth == 8 else 1.0


@triton.jit
def vector_product(
    x,
    stats,
    w,
    scales,  # [N] fp32, read where w is in 8 bits
    bias,  # [N] fp32; with NORM it has W b in it
    scaled,  # [N] fp32: W g, read with NORM
    gain,  # [K] fp32, read with NORM
    y,
    keys,
    values,
    slots,
    epsilon,
    K: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token, whose layer norm is folded into the weights."""
    begin(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n < N
    k = tl.arange(0, BLOCK_K)
    at = w + n[:, None].to(tl.int64) * K + k[None, :]
    if PREFETCH:
        prefetch(w + tl.program_id(0).to(tl.int64) * (BLOCK_N * K), BLOCK_N * K, PDL and N % BLOCK_N == 0)
    tile = tl.load(at, mask=rows[:, None] & (k < K)[None, :], other=0.0)
    scale = _scale(w, scales, n, rows)
    offset = tl.load(bias + n, mask=rows, other=0.0).to(tl.float32) if OUT != PARTIAL else 0.0
    slot = tl.load(slots) if OUT == SCATTER else 0
    if IN == NORM:
        slope = tl.load(scaled + n, mask=rows, other=0.0)
        factor = tl.load(gain + k, mask=k < K, other=0.0)
        tl.static_assert(BLOCK_K >= K, "layer norm needs all of K at once")
    wait(PDL)
    before = tl.load(y + n, mask=rows, other=0.0) if OUT == RESIDUAL else 0.0
    if IN == NORM:
        acc = _after_norm(x, tile, scale, factor, slope, epsilon, K, BLOCK_N, BLOCK_K)
    else:
        acc = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            inside = k + start < K
            if start > 0:
                tile = tl.load(at + start, mask=rows[:, None] & inside[None, :], other=0.0)
            if IN == MERGE:
                peaks = stats + k + start
                best = tl.load(peaks, mask=inside, other=0.0)
                for split in tl.static_range(1, SPLITS):
                    best = tl.maximum(best, tl.load(peaks + split * 2 * K, mask=inside, other=0.0))
                mass = tl.zeros([BLOCK_K], tl.float32)
                value = tl.zeros([BLOCK_K], tl.float32)
                for split in tl.static_range(SPLITS):
                    share = tl.exp(tl.load(peaks + split * 2 * K, mask=inside, other=0.0) - best)
                    mass += share * tl.load(peaks + (split * 2 + 1) * K, mask=inside, other=1.0)
                    value += share * tl.load(x + split * K + k + start, mask=inside, other=0.0)
                value = value / mass
            else:
                value = tl.load(x + k + start, mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(widened(tile, tl.float32) * value[None, :], 1)
        acc *= scale
    zero = tl.zeros([BLOCK_N], tl.int32)
    _put(acc + offset, before, slot + zero, zero, n, zero == 0, rows, y, keys, values, N, KIND, OUT)


@triton.jit
def tiled_product(
    x,  # [T, K] in w's dtype, if that has not 8 bits
    w,
    scales,
    bias,
    y,
    keys,
    values,
    slots,
    num_tokens,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,  # of K, one a program
    STAGES: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Many tokens in tiles; program (column tile, token tile, split of K)."""
    begin(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    split = tl.program_id(2)
    SHARE: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    first = split * SHARE
    k = first + tl.arange(0, BLOCK_K)
    k_x = k[None, :]
    k_w = k[:, None]
    rows = t < num_tokens
    columns = n < N
    if PREFETCH and SPLITS == 1:
        prefetch(w + tl.program_id(0).to(tl.int64) * (BLOCK_N * K), BLOCK_N * K, PDL and N % BLOCK_N == 0)
    at_x = x + t.to(tl.int64) * K + k_x
    at_w = w + n.to(tl.int64) * K + k_w
    scale = _scale(w, scales, n, columns)
    if OUT != PARTIAL:
        offset = tl.load(bias + n, mask=columns, other=0.0).to(tl.float32)
    slot = tl.load(slots + t, mask=rows, other=0) if OUT == SCATTER else t
    tl.static_assert(OUT != RESIDUAL, "partial sums are added by add_and_norm")
    wait(PDL)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in tl.range(0, SHARE, BLOCK_K, num_stages=STAGES):
        if K % (SPLITS * BLOCK_K) == 0:
            value = tl.load(at_x + start, mask=rows, other=0.0)
            tile = tl.load(at_w + start, mask=columns, other=0.0)
        else:
            value = tl.load(at_x + start, mask=rows & (k_x + start < K), other=0.0)
            tile = tl.load(at_w + start, mask=columns & (k_w + start < K), other=0.0)
        tile = widened(tile, value.dtype)
        acc = tl.dot(value, tile, acc, input_precision="ieee")
    acc *= scale
    if OUT == PARTIAL:
        at = y + split.to(tl.int64) * num_tokens * N + t * N + n
        tl.store(at, acc, mask=rows & columns)
    else:
        _put(acc + offset, 0.0, slot, t, n, rows, columns, y, keys, values, N, KIND, OUT)


@triton.jit
def vector_logits(
    x,  # [T, K] fp32
    index,  # [1]: which of the tokens
    w,
    scales,
    bias,  # [N] fp32: W b
    scaled,  # [N] fp32: W g
    gain,  # [K] fp32
    logits,  # [N] fp32, out
    records,
    positions,
    peaks,  # [programs], these three are what scan_logits finds, out
    winners,
    masses,
    end_of_text_id,
    epsilon,
    K: tl.constexpr,
    N: tl.constexpr,  # a multiple of BLOCK_N
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two, K or more
    PDL: tl.constexpr,
):
    """The head of one token, its norm folded, and the first look at the logits."""
    begin(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, WIDTH)
    tile = tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    scale = _scale(w, scales, n, n < N)
    offset = tl.load(bias + n)
    slope = tl.load(scaled + n)
    factor = tl.load(gain + k, mask=k < K, other=0.0)
    heat = tl.load(records + TEMPERATURE).to(tl.float32, bitcast=True)
    banned = banned_id(records, tl.load(positions), end_of_text_id)
    row = tl.load(index).to(tl.int64)
    wait(PDL)
    found = _after_norm(x + row * K, tile, scale, factor, slope, epsilon, K, BLOCK_N, WIDTH) + offset
    tl.store(logits + n, found)
    peak, winner, mass = scan(found, n, banned, heat, V, False)
    tl.store(peaks + tl.program_id(0), peak)
    tl.store(winners + tl.program_id(0), winner)
    tl.store(masses + tl.program_id(0), mass)
