"""Links of a chain of kernels by programmatic dependent launch (sm_90 and later). Called by the other kernels."""

import triton
import triton.language as tl


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel be launched as soon as all of this one's programs have come so far."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before. Every program does, also where it needs nothing: the next relies on it."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(start, COUNT: tl.constexpr, DO: tl.constexpr):
    """Ask for `COUNT` elements from `start` into the L2 cache; one thread does, by one instruction."""
    if DO:
        BYTES: tl.constexpr = COUNT * start.dtype.element_ty.primitive_bitwidth // 8
        tl.inline_asm_elementwise(
            """{
            .reg .pred %first;
            .reg .b32 %thread;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %first, %thread, 0;
            @%first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [start.to(tl.int64), BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
