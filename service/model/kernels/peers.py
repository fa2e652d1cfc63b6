"""Sums over the ranks of a split model and the gathering of its logits, by stores into the other ranks' memory.

A sum is one kernel: every rank puts its rows into a buffer of every rank, its own too, and each adds up what has come
to it. No flag says that a number is there: buffers hold -0.0 (EMPTY), which nobody sends, and whoever has read a row
puts EMPTY back (as in TensorRT-LLM's one-shot all-reduce, which calls that Lamport's protocol).

A buffer may be used again by the second sum after. A row of sum c + 2 is sent when its sender's kernel c + 1 is done,
and that has got rows of sum c + 1 from every rank, each of which sent them when its own kernel c was done, EMPTY put
back: a kernel sends nothing before the one before it in its stream is done, also where it was launched early. fused.py
has the sum of embeddings in buffer 2 and those of the layers in 0 and 1 in turn, an even number of them a step, so the
next two sums are in other buffers, also across steps.

Nobody waits for what cannot come. A program sends its row before it waits, takes its rows in the same order on every
rank, and all programs of a sum fit on a device at once: they are at most MOST_PROGRAMS, of four warps. What is launched
early behind them takes no room from them, for it is launched when all of them have begun.

Called by fused.py and tail.py.
"""

import triton
import triton.language as tl

from service.model.kernels.chain import begin, wait
from service.model.kernels.norms import put_normed

EMPTY = tl.constexpr(-(2**31))
MOST_PROGRAMS = 256


@triton.jit
def _look(row, inside, RANKS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of the ranks' rows, in their order, and the least of their bits, which is EMPTY while one is missing."""
    total = tl.zeros([WIDTH], tl.float32)
    least = tl.zeros([WIDTH], tl.int32)
    for rank in tl.static_range(RANKS):
        bits = tl.load(row + rank * STRIDE, mask=inside, other=0, volatile=True)
        least = tl.minimum(least, bits)
        total += bits.to(tl.float32, bitcast=True)
    return total, tl.min(least)


@triton.jit
def sum_and_norm(
    x,  # [T, H] fp32, changed
    partials,  # [SPLITS, T, H] fp32: this rank's
    places,  # of each rank, int32 [MOST_ROWS, H] in its memory: EMPTY; there go this rank's rows
    received,  # int32 [RANKS, MOST_ROWS, H]: EMPTY; there come the ranks' rows
    bias,  # [H], added to x once
    gain,  # [H] fp32
    shift,
    normed,  # [T, H], out
    num_tokens,
    epsilon,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,  # 0: what is summed is x itself, without bias
    RANKS: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """normed = layer norm of x + bias + the sum over ranks of the partial products; programs share rows t.

    The sums are in the same order on every rank, and so are the same to the bit. A NaN arrives as that.
    """
    begin(PDL)
    h = tl.arange(0, WIDTH)
    inside = h < H
    weight = tl.load(gain + h, mask=inside, other=0.0)
    added = tl.load(shift + h, mask=inside, other=0.0)
    if SPLITS > 0:
        offset = tl.load(bias + h, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    for t in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        at = t * H + h
        own = tl.load(x + at, mask=inside, other=0.0)
        value = tl.zeros([WIDTH], tl.float32)
        if SPLITS > 0:
            value = own + offset
            own = tl.zeros([WIDTH], tl.float32)
            for split in tl.static_range(SPLITS):
                own += tl.load(partials + (split * num_tokens + t) * H + h, mask=inside, other=0.0)
        bits = (own + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
        for rank in tl.static_range(RANKS):
            tl.store(places[rank] + at, bits, mask=inside)
        total, least = _look(received + at, inside, RANKS, MOST_ROWS * H, WIDTH)
        while least == EMPTY:  # the least of int32
            total, least = _look(received + at, inside, RANKS, MOST_ROWS * H, WIDTH)
        value += total
        tl.store(x + at, value, mask=inside)
        put_normed(normed + at, value, inside, weight, added, epsilon, H)
        for rank in tl.static_range(RANKS):
            tl.store(received + rank * MOST_ROWS * H + at, EMPTY, mask=inside)


@triton.jit
def put_logits(
    logits,  # [R, N] fp32: this rank's
    columns,  # of each rank, fp32 [., RANKS * N] in its memory, from this rank's columns on
    N: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Put them into every rank's memory; program (block of columns, row). A barrier has to follow."""
    begin(PDL)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.program_id(1).to(tl.int64)
    wait(PDL)
    value = tl.load(logits + r * N + n, mask=n < N)
    for rank in tl.static_range(RANKS):
        tl.store(columns[rank] + r * (RANKS * N) + n, value, mask=n < N)


@triton.jit
def barrier(
    arrivals,  # of each rank, int32 [1] in its memory, where this rank says that it is here
    arrived,  # int32 [RANKS, STRIDE], where the ranks say it
    count,  # int32 [1]: of barriers, changed
    RANKS: tl.constexpr,
    STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Ends when all ranks have begun it; what they stored before can be read then. One program.

    Counts may overflow: ranks are never more than one barrier apart.
    """
    begin(PDL)
    wait(PDL)
    turn = tl.load(count) + 1
    for rank in tl.static_range(RANKS):
        tl.atomic_xchg(arrivals[rank], turn, sem="release", scope="sys")
    for rank in tl.static_range(RANKS):
        behind = turn - tl.atomic_add(arrived + rank * STRIDE, 0, sem="acquire", scope="sys")
        while behind > 0:
            behind = turn - tl.atomic_add(arrived + rank * STRIDE, 0, sem="acquire", scope="sys")
    tl.store(count, turn)
