"""Attention over the paged KV cache: one new token a sequence, or tiles of several. Called by model/fused.py.

A layer's keys and values are [slots, heads * head], at most 2^31 numbers; slot = block * BLOCK_SIZE + offset. They are
in q's dtype, or in fp8.
"""

import triton
import triton.language as tl

from service.model.kernels.chain import begin, wait
from service.model.kernels.products import widened


@triton.jit
def _slots(table, positions, mask, BLOCK_SIZE: tl.constexpr):
    block = tl.load(table + positions // BLOCK_SIZE, mask=mask, other=0)
    return block * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def _load(keys, values, table, positions, seen, columns, offset, H: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Keys and values [BLOCK, DIM] of a head at `positions`; zeros where not `seen`."""
    at = _slots(table, positions, seen, BLOCK_SIZE)[:, None] * H + offset[None, :]
    mask = seen[:, None] & columns[None, :]
    k = tl.load(keys + at, mask=mask, other=0.0, cache_modifier=".cg")
    v = tl.load(values + at, mask=mask, other=0.0, cache_modifier=".cg")
    return k, v


@triton.jit
def decode_attention(
    q,  # [T, STRIDE]
    keys,
    values,
    tables,  # [S, TABLE]
    lengths,  # [S], the new token included
    num_rows,  # [1]: how many of the sequences decode
    out,  # [T, H] in q's dtype
    parts,  # with SPLITS > 1, fp32 [T, SPLITS, H]: of each split, not divided by the sum
    stats,  # with SPLITS > 1, fp32 [T, SPLITS, 2, H]: of its head's scores the maximum and the sum of exponentials
    arrived,  # with SPLITS > 1 and MERGED, [T, heads] of 0, which it is again afterwards
    scale,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,  # power of two, HEAD or more
    TABLE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,  # 3 H: the new keys and values stand behind the queries, and are put into the cache here
    BLOCK: tl.constexpr,  # tokens of context at once
    SPLITS: tl.constexpr,
    MERGED: tl.constexpr,  # whether `out` is wanted of several splits: the last to arrive makes it
    BESIDE: tl.constexpr,  # prefill_attention comes before it, both run at once, and a row may read what others write
    PDL: tl.constexpr,
):
    """Token s attends to its sequence's context; program (head, s, split).

    Each of BLOCK lanes keeps a softmax of its own over every BLOCK-th token, so that nothing is exchanged before the
    end; the next keys and values are asked for before the present ones are used.
    """
    begin(PDL)
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    num = tl.load(num_rows)
    d = tl.arange(0, DIM)
    columns = d < HEAD
    offset = head * HEAD + d
    cached = tl.load(lengths + row, mask=row < num, other=1) - 1  # past the rows stands anything
    share = (cached + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    start = split * share
    end = tl.minimum(start + share, cached)
    table = tables + row * TABLE
    positions = start + tl.arange(0, BLOCK)
    seen = positions < end
    if not BESIDE:
        k, v = _load(keys, values, table, positions, seen, columns, offset, H, BLOCK_SIZE)
    newest = tl.load(table + cached // BLOCK_SIZE, mask=row < num, other=0) * BLOCK_SIZE + cached % BLOCK_SIZE
    if not BESIDE:
        wait(PDL)
    if row < num:
        # Not from the L1 cache, which only a wait makes sure of.
        query = tl.load(q + row * STRIDE + offset, mask=columns, other=0.0, cache_modifier=".cg")
        query = query.to(tl.float32) * scale
        new_k = keys + newest * H + offset
        new_v = values + newest * H + offset
        if STRIDE == H:
            own_k = tl.load(new_k, mask=columns, other=0.0, cache_modifier=".cg")
            own_v = tl.load(new_v, mask=columns, other=0.0, cache_modifier=".cg")
        else:
            own_k = tl.load(q + row * STRIDE + H + offset, mask=columns, other=0.0).to(keys.dtype.element_ty)
            own_v = tl.load(q + row * STRIDE + 2 * H + offset, mask=columns, other=0.0).to(keys.dtype.element_ty)
            tl.store(new_k, own_k, mask=columns & (split == 0))
            tl.store(new_v, own_v, mask=columns & (split == 0))
        own_k = own_k.to(tl.float32)
        own_v = own_v.to(tl.float32)
        if BESIDE:
            k, v = _load(keys, values, table, positions, seen, columns, offset, H, BLOCK_SIZE)
        best = tl.full([BLOCK], -1e30, tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, DIM], tl.float32)
        while start < end:
            start += BLOCK
            positions = start + tl.arange(0, BLOCK)
            following = positions < end
            next_k, next_v = _load(keys, values, table, positions, following, columns, offset, H, BLOCK_SIZE)
            scores = tl.where(seen, tl.sum(k.to(tl.float32) * query[None, :], 1), float("-inf"))
            better = tl.maximum(best, scores)
            weights = tl.exp(scores - better)
            kept = tl.exp(best - better)
            mass = mass * kept + weights
            acc = acc * kept[:, None] + weights[:, None] * v.to(tl.float32)
            best, k, v, seen = better, next_k, next_v, following
        # The first split has the newest token; another may have none at all.
        own = tl.where(split == 0, tl.sum(query * own_k), -1e30)
        peak = tl.maximum(tl.max(best), own)
        kept = tl.exp(best - peak)
        own_weight = tl.where(split == 0, tl.exp(own - peak), 0.0)
        total = tl.sum(mass * kept) + own_weight
        mixed = tl.sum(acc * kept[:, None], 0) + own_weight * own_v
        if SPLITS == 1:
            tl.store(out + row * H + offset, (mixed / total).to(out.dtype.element_ty), mask=columns)
        else:
            tl.store(parts + (row * SPLITS + split) * H + offset, mixed, mask=columns)
            at_stats = stats + row * (SPLITS * 2 * H) + offset
            # A number for each column, not for each head: whoever merges reads them as vectors.
            tl.store(at_stats + split * (2 * H), tl.full([DIM], 0.0, tl.float32) + peak, mask=columns)
            tl.store(at_stats + split * (2 * H) + H, tl.full([DIM], 0.0, tl.float32) + total, mask=columns)
            if MERGED:
                counter = arrived + row * (H // HEAD) + head
                tl.debug_barrier()
                if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
                    tl.debug_barrier()
                    splits = tl.arange(0, SPLITS)
                    inside = columns[None, :]
                    at = at_stats[None, :] + (splits * (2 * H))[:, None]
                    peaks = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                    masses = tl.load(at + H, mask=inside, other=1.0, cache_modifier=".cg")
                    at = parts + (row * SPLITS + splits)[:, None] * H + offset[None, :]
                    found = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                    shares = tl.exp(peaks - tl.max(peaks, 0)[None, :])
                    whole = tl.sum(found * shares, 0) / tl.sum(masses * shares, 0)
                    tl.store(out + row * H + offset, whole.to(out.dtype.element_ty), mask=columns)
                    tl.store(counter, 0)
    if BESIDE:
        wait(PDL)


@triton.jit
def prefill_attention(
    q,  # [T, H]
    keys,
    values,
    tables,
    lengths,
    query_starts,  # [S + 1]: whose tokens are whose
    tile_sequences,  # [tiles] the sequence of each tile of BLOCK_T new tokens
    tile_starts,  # [tiles] the first of its tokens, counted from the sequence's first new one
    num_tiles,  # [1]
    out,  # [T, H] in q's dtype
    scale,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    DIM: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Causal attention of the new tokens, whose keys and values are in the cache; programs share (tile, head)s out.

    What follows may begin when what both read is there, and is to wait for this at its end: decode_attention. That
    it, too, sees what was complete before this, past the L1 cache, is what GPUs do; PTX does not say it.
    """
    HEADS: tl.constexpr = H // HEAD
    d = tl.arange(0, DIM)
    columns = d < HEAD
    work = tl.load(num_tiles) * HEADS
    wait(PDL)
    begin(PDL)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        tile = item // HEADS
        head = item % HEADS
        sequence = tl.load(tile_sequences + tile)
        start = tl.load(tile_starts + tile)
        first = tl.load(query_starts + sequence)
        count = tl.load(query_starts + sequence + 1) - first
        length = tl.load(lengths + sequence)
        place = start + tl.arange(0, BLOCK_T)
        rows = place < count
        own = length - count + place  # positions
        at_q = (first + place)[:, None].to(tl.int64) * H + head * HEAD + d[None, :]
        inside = rows[:, None] & columns[None, :]
        query = tl.load(q + at_q, mask=inside, other=0.0)
        best = tl.full([BLOCK_T], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_T], tl.float32)
        acc = tl.zeros([BLOCK_T, DIM], tl.float32)
        for begin_ in range(0, tl.minimum(length - count + start + BLOCK_T, length), BLOCK):
            positions = begin_ + tl.arange(0, BLOCK)
            known = positions < length
            slot = _slots(tables + sequence * TABLE, positions, known, BLOCK_SIZE)
            k = tl.load(
                keys + slot[None, :] * H + head * HEAD + d[:, None], mask=known[None, :] & columns[:, None], other=0.0
            )
            v = tl.load(
                values + slot[:, None] * H + head * HEAD + d[None, :], mask=known[:, None] & columns[None, :], other=0.0
            )
            k, v = widened(k, query.dtype), widened(v, query.dtype)
            scores = tl.dot(query, k, input_precision="ieee") * scale
            scores = tl.where(positions[None, :] <= own[:, None], scores, float("-inf"))
            better = tl.maximum(best, tl.max(scores, 1))  # finite: the first block has position 0, which all see
            weights = tl.exp(scores - better[:, None])
            kept = tl.exp(best - better)
            mass = mass * kept + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
            best = better
        tl.store(out + at_q, (acc / mass[:, None]).to(out.dtype.element_ty), mask=inside)
