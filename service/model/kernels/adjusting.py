"""Penalties, biases and masks of rows that ask for them, as service.model.sampler.adjust. Called by model/tail.py."""

import triton
import triton.language as tl

from service.model.kernels.chain import begin, wait
from service.model.kernels.record import FREQUENCY_PENALTY, NUM_PROMPT, PRESENCE_PENALTY, REPETITION_PENALTY


@triton.jit
def adjust_logits(
    logits,  # [R, STRIDE] fp32
    adjusted,  # [R, STRIDE] fp32, out
    records,  # [R, WORDS] int32: SAMPLING of model/batch.py
    positions,  # [R] of the token to be sampled
    indices,  # [R] which of the step's tokens comes before
    resolved,  # [T] their ids
    mask_rows,  # [R] which of `masks` is the row's, or -1
    masks,  # [., ceil(V / 32)]
    history_starts,  # [R + 1] a row without penalties has no history
    history,  # a row's tokens before its last
    bias_starts,  # [R + 1]
    bias_ids,
    bias_values,  # fp32
    finite,  # [R], out: 1 where all logits are
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    HISTORY: tl.constexpr,  # power of two, the context's length or more
    COMPARED: tl.constexpr,  # tokens of a history that all are compared with at once
    BIASES: tl.constexpr,  # of a row at once
    PDL: tl.constexpr,
):
    """Program r: the row is copied, then changed where its history, its biases and its mask say so."""
    begin(PDL)
    r = tl.program_id(0)
    mask_row = tl.load(mask_rows + r)
    start = tl.load(history_starts + r)
    count = tl.load(history_starts + r + 1) - start
    first_bias = tl.load(bias_starts + r)
    end_bias = tl.load(bias_starts + r + 1)
    index = tl.load(indices + r)
    wait(PDL)
    row = logits + r.to(tl.int64) * STRIDE
    out = adjusted + r.to(tl.int64) * STRIDE
    wrong = tl.zeros([BLOCK], tl.int32)
    for begun in range(0, V, BLOCK):
        ids = begun + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < V, other=0.0)
        wrong += tl.where(x - x == 0.0, 0, 1)
        tl.store(out + ids, x, mask=ids < V)
    tl.store(finite + r, tl.where(tl.sum(wrong) > 0, 0, 1))
    tl.debug_barrier()
    position = tl.load(positions + r)
    if (count > 0) | (position == 1):
        last = tl.load(resolved + index)
        record = records + r * WORDS
        num_prompt = tl.load(record + NUM_PROMPT)
        presence = tl.load(record + PRESENCE_PENALTY).to(tl.float32, bitcast=True)
        frequency = tl.load(record + FREQUENCY_PENALTY).to(tl.float32, bitcast=True)
        repetition = tl.load(record + REPETITION_PENALTY).to(tl.float32, bitcast=True)
        places = tl.arange(0, HISTORY)
        said = tl.load(history + start + places, mask=places < count, other=0)
        said = tl.where(places == count, last, said)
        times = tl.zeros([HISTORY], tl.float32)  # that it was generated
        for begun in range(num_prompt // COMPARED * COMPARED, count + 1, COMPARED):
            others = begun + tl.arange(0, COMPARED)
            generated = (others >= num_prompt) & (others <= count)
            other = tl.load(history + start + others, mask=others < count, other=0)
            other = tl.where(others == count, last, other)
            times += tl.sum(tl.where((said[:, None] == other[None, :]) & generated[None, :], 1.0, 0.0), 1)
        scores = tl.load(row + said, mask=places <= count, other=0.0)
        scores = tl.where(scores > 0, scores / repetition, scores * repetition)
        scores = scores - frequency * times - presence * tl.where(times > 0, 1.0, 0.0)
        tl.store(out + said, scores, mask=places <= count)  # who is said twice gets the same twice
        tl.debug_barrier()
    for begun in range(first_bias, end_bias, BIASES):
        entries = begun + tl.arange(0, BIASES)
        ids = tl.load(bias_ids + entries, mask=entries < end_bias, other=0)
        value = tl.load(bias_values + entries, mask=entries < end_bias, other=0.0)
        x = tl.load(out + ids, mask=entries < end_bias, other=0.0)
        tl.store(out + ids, x + value, mask=entries < end_bias)
    if mask_row >= 0:
        tl.debug_barrier()
        mask = masks + mask_row.to(tl.int64) * ((V + 31) // 32)
        for begun in range(0, V, BLOCK):
            ids = begun + tl.arange(0, BLOCK)
            bits = tl.load(mask + ids // 32, mask=ids < V, other=0) >> (ids % 32)
            tl.store(out + ids, tl.full([BLOCK], float("-inf"), tl.float32), mask=(ids < V) & (bits & 1 == 0))


@triton.jit
def drop_wrong(
    tokens,
    results,
    turn,
    finite,
    num_rows,
    MOST_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """-1 for the tokens of rows whose logits were not all finite before they were adjusted."""
    begin(PDL)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    kept = tl.load(finite + r, mask=r < num_rows, other=1)
    wrong = (r < num_rows) & (kept == 0)
    tl.store(tokens + r, tl.full([BLOCK], -1, tl.int32), mask=wrong)
    tl.store(results + tl.load(turn) * MOST_ROWS + r, tl.full([BLOCK], -1, tl.int32), mask=wrong)
