"""What a step gets from the host, read by the GPU out of pinned memory: no copy to queue. Called by model/inputs.py."""

import triton
import triton.language as tl


@triton.jit
def fetch(
    staged,  # [SLOTS, STRIDE] words in pinned memory
    turn,  # [1]: the slot that the host has filled for this step
    words,  # [STRIDE] on the device, out
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,  # words wanted
    BLOCK: tl.constexpr,
):
    """Copy a slot's first words; program i its i-th block. Nothing may run beside it that reads `words`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(turn)
    tl.store(words + at, tl.load(staged + slot * STRIDE + at, mask=at < COUNT, other=0), mask=at < COUNT)
