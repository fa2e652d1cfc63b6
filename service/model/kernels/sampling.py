"""One token a row from logits, as service.model.sampler: what is large in a row, then the draw. Called by tail.py.

Weights are exp((logit - the row's largest) / temperature), in fp32; the filters' threshold is found by bisection over
the bits of a weight, which are in the order of the weights.
"""

import triton
import triton.language as tl

from service.model.kernels.chain import begin, wait
from service.model.kernels.record import CHOICE, MIN_LENGTH, MIN_P, SEED, TEMPERATURE, TOP_K, TOP_P

_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.jit
def _logits(row, ids, V: tl.constexpr, banned):
    """Logits of a row at `ids`; minus infinity past the vocabulary and for the id `banned`."""
    x = tl.load(row + ids, mask=ids < V, other=float("-inf"))
    return tl.where(ids == banned, float("-inf"), x)


@triton.jit
def scan(raw, ids, banned, heat, V: tl.constexpr, ADJUSTED: tl.constexpr):
    """Of logits at `ids`: the largest, its first id, and the sum of exp((logit - largest) / heat), as scan_logits."""
    # Infinities and NaNs make the difference a NaN.
    if ADJUSTED:
        wrong = tl.sum(tl.where((ids >= V) | (raw == float("-inf")) | (raw - raw == 0.0), 0, 1))
    else:
        wrong = tl.sum(tl.where((ids >= V) | (raw - raw == 0.0), 0, 1))
    x = tl.where((ids < V) & (ids != banned), raw, float("-inf"))
    peak = tl.max(x)
    winner = tl.min(tl.where(x == peak, ids, 0x7FFFFFFF))
    heat = tl.where(heat > 0, heat, 1.0)
    mass = tl.sum(tl.where(x > float("-inf"), tl.exp((x - peak) / heat), 0.0))
    return peak, winner, tl.where(wrong > 0, float("nan"), mass)


@triton.jit
def banned_id(record, position, end_of_text_id):
    """The id that a row may not take at `position`, or -1."""
    return tl.where(position < tl.load(record + MIN_LENGTH), end_of_text_id, -1)


@triton.jit
def scan_logits(
    logits,  # [R, STRIDE] fp32
    records,  # [R, WORDS] int32: SAMPLING of model/batch.py
    positions,  # [R]
    peaks,  # [R, CHUNKS] fp32, out: the largest of each chunk
    winners,  # [R, CHUNKS] int32, out: its first id
    masses,  # [R, CHUNKS] fp32, out: the sum of exp((logit - peak) / temperature); NaN where a logit is not finite
    end_of_text_id,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    WORDS: tl.constexpr,
    ADJUSTED: tl.constexpr,  # logits may be minus infinity: masked ones
    PDL: tl.constexpr,
):
    """Program (chunk, row)."""
    begin(PDL)
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    record = records + row * WORDS
    heat = tl.load(record + TEMPERATURE).to(tl.float32, bitcast=True)
    banned = banned_id(record, tl.load(positions + row), end_of_text_id)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    wait(PDL)
    raw = tl.load(logits + row.to(tl.int64) * STRIDE + ids, mask=ids < V, other=0.0)
    peak, winner, mass = scan(raw, ids, banned, heat, V, ADJUSTED)
    at = row * CHUNKS + chunk
    tl.store(peaks + at, peak)
    tl.store(winners + at, winner)
    tl.store(masses + at, mass)


@triton.jit
def _weight(x, best, heat):
    return tl.where(x > float("-inf"), tl.exp((x - best) / heat), 0.0)


@triton.jit
def _bisect(row, best, heat, banned, low, wanted, COUNT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bits t, `low` or more, such that weights of t or more count, or weigh, `wanted` in all.

    `low` is such a number. Three thresholds a pass: a quarter of the interval is left.
    """
    high = _ONE + 1  # no weight has these bits
    while high - low > 1:
        step = (high - low + 3) // 4
        a = low + step
        b = tl.minimum(a + step, high)
        c = tl.minimum(b + step, high)
        over_a = tl.zeros([BLOCK], tl.float32)
        over_b = tl.zeros([BLOCK], tl.float32)
        over_c = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            w = _weight(_logits(row, start + tl.arange(0, BLOCK), V, banned), best, heat)
            bits = w.to(tl.int32, bitcast=True)
            part = tl.where(w > 0, 1.0, 0.0) if COUNT else w
            over_a += tl.where(bits >= a, part, 0.0)
            over_b += tl.where(bits >= b, part, 0.0)
            over_c += tl.where(bits >= c, part, 0.0)
        enough_a = tl.sum(over_a) >= wanted
        enough_b = tl.sum(over_b) >= wanted
        enough_c = tl.sum(over_c) >= wanted
        high = tl.where(enough_c, high, tl.where(enough_b, c, tl.where(enough_a, b, a)))
        low = tl.where(enough_c, c, tl.where(enough_b, b, tl.where(enough_a, a, low)))
    return low


@triton.jit
def _mass(row, best, heat, banned, least, V: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        w = _weight(_logits(row, start + tl.arange(0, BLOCK), V, banned), best, heat)
        total += tl.where(w.to(tl.int32, bitcast=True) >= least, w, 0.0)
    return tl.sum(total)


@triton.jit
def _uniform(seed_low, seed_high, choice, position):
    """service.model.sampler.uniform: Philox4x32-10 of counter (position, choice, 0, 0) and the seed's words."""
    c0 = position.to(tl.uint32)
    c1 = choice.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return (c0 >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _search(
    row,
    best,
    heat,
    banned,
    least,  # bits of the least weight that is kept
    share,  # [WIDTH] what is kept weighs, by chunk
    chance,
    V: tl.constexpr,
    SIZE: tl.constexpr,  # ids in a chunk
    WIDTH: tl.constexpr,
):
    """The id at which the cumulative weight of what is kept passes `chance` of the whole."""
    chunks = tl.arange(0, WIDTH)
    before = tl.cumsum(share, 0)
    target = chance * tl.sum(tl.where(chunks == WIDTH - 1, before, 0.0))
    # The first chunk that ends past the target; rounding may leave none: then the last that weighs something.
    passed = (before > target) & (share > 0)
    last = tl.max(tl.where(share > 0, chunks, 0))
    chunk = tl.minimum(tl.min(tl.where(passed, chunks, WIDTH)), last)
    begun = tl.sum(tl.where(chunks == chunk, before - share, 0.0))
    ids = chunk * SIZE + tl.arange(0, SIZE)
    w = _weight(_logits(row, ids, V, banned), best, heat)
    w = tl.where(w.to(tl.int32, bitcast=True) >= least, w, 0.0)
    passed = (begun + tl.cumsum(w, 0) > target) & (w > 0)
    last = tl.max(tl.where(w > 0, ids, 0))
    return tl.minimum(tl.min(tl.where(passed, ids, V)), last)


@triton.jit
def pick_tokens(
    logits,
    records,
    positions,
    peaks,
    winners,
    masses,
    tokens,  # [R] int32, out; -1 for a row that holds a number that is not finite
    results,  # [TURNS, MOST_ROWS], out: the same in pinned memory, in the slot of the turn
    turn,
    end_of_text_id,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_WIDTH: tl.constexpr,  # power of two, CHUNKS or more
    PIECE: tl.constexpr,  # ids that a row with filters is drawn from at once
    PIECES: tl.constexpr,  # power of two, of which there are so many at most
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program r: greedy where the temperature is 0, else one uniform number put through the cumulative weights."""
    begin(PDL)
    r = tl.program_id(0)
    record = records + r * WORDS
    temperature = tl.load(record + TEMPERATURE).to(tl.float32, bitcast=True)
    top_k = tl.load(record + TOP_K)
    top_p = tl.load(record + TOP_P).to(tl.float32, bitcast=True)
    min_p = tl.load(record + MIN_P).to(tl.float32, bitcast=True)
    position = tl.load(positions + r)
    banned = banned_id(record, position, end_of_text_id)
    chance = _uniform(tl.load(record + SEED), tl.load(record + SEED + 1), tl.load(record + CHOICE), position)
    chunks = tl.arange(0, CHUNKS_WIDTH)
    there = chunks < CHUNKS
    wait(PDL)
    peak = tl.load(peaks + r * CHUNKS + chunks, mask=there, other=float("-inf"))
    mass = tl.load(masses + r * CHUNKS + chunks, mask=there, other=0.0)
    best = tl.max(peak)
    token = tl.min(
        tl.where(peak == best, tl.load(winners + r * CHUNKS + chunks, mask=there, other=0x7FFFFFFF), 0x7FFFFFFF)
    )
    wrong = tl.sum(tl.where(mass == mass, 0, 1))
    if (temperature > 0) & (wrong == 0):
        row = logits + r.to(tl.int64) * STRIDE
        least = 1  # bits: every weight but 0
        if ((top_k > 0) & (top_k < V)) | (top_p < 1) | (min_p > 0):
            if (top_k > 0) & (top_k < V):
                least = _bisect(row, best, temperature, banned, least, top_k.to(tl.float32), True, V, BLOCK)
            if top_p < 1:
                # The best stays whatever top_p is: its weight is 1.
                wanted = tl.maximum(top_p * _mass(row, best, temperature, banned, least, V, BLOCK), 1e-30)
                least = _bisect(row, best, temperature, banned, least, wanted, False, V, BLOCK)
            least = tl.maximum(least, min_p.to(tl.int32, bitcast=True))
            pieces = tl.arange(0, PIECES)
            kept_share = tl.zeros([PIECES], tl.float32)
            for piece in range((V + PIECE - 1) // PIECE):
                w = _weight(_logits(row, piece * PIECE + tl.arange(0, PIECE), V, banned), best, temperature)
                kept = tl.sum(tl.where(w.to(tl.int32, bitcast=True) >= least, w, 0.0))
                kept_share += tl.where(pieces == piece, kept, 0.0)
            token = _search(row, best, temperature, banned, least, kept_share, chance, V, PIECE, PIECES)
        else:
            share = tl.where(mass > 0, mass * tl.exp((peak - best) / temperature), 0.0)
            token = _search(row, best, temperature, banned, 1, share, chance, V, CHUNK, CHUNKS_WIDTH)
    token = tl.where(wrong > 0, -1, token)
    tl.store(tokens + r, token)
    tl.store(results + tl.load(turn) * MOST_ROWS + r, token)
