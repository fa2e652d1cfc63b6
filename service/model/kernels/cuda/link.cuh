// What the kernels ask of a Hopper GPU that C++ has no words for. Put before each source when it is compiled.
// HALF: the served dtype is fp16, else bf16. BOUNDED: a wait for a copy gives up (a trap) where it would not end.

typedef unsigned short Number;  // the bits of the served dtype
typedef unsigned long long Barrier;  // an mbarrier

// --- A chain by programmatic dependent launch

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// What the kernels before wrote is there afterwards. Every block does it, also where it needs nothing.
__device__ __forceinline__ void wait_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- Copies into shared memory that one thread asks for

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char all_dynamic[];
    return all_dynamic;
}

__device__ __forceinline__ unsigned shared_address(const void* at) { return (unsigned)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void init_barrier(Barrier* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// After the barriers' init, by the same thread, before any copy.
__device__ __forceinline__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// `bytes`, a multiple of 16 as both addresses are, from global to shared memory.
__device__ __forceinline__ void ask(void* to, const void* from, unsigned bytes, Barrier* barrier) {
    const unsigned address = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address)
                 : "memory");
}

__device__ __forceinline__ void await(Barrier* barrier, unsigned parity) {
    const unsigned address = shared_address(barrier);
#ifdef BOUNDED
    unsigned tries = 0;
#endif
    unsigned done = 0;
    while (!done) {
        asm volatile(
            "{.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
#ifdef BOUNDED
        if (++tries > 1u << 20) asm volatile("trap;");
#endif
    }
}

// --- Copies into shared memory that each thread asks for, and waits for, itself

// 16 bytes, from global to shared memory.
__device__ __forceinline__ void ask_words(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from))
                 : "memory");
}

// What was asked for since the last of these is a group.
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All groups but the last LATER are there.
template <int LATER>
__device__ __forceinline__ void await_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// --- Loads of what a kernel of the chain wrote: from the L2 cache

__device__ __forceinline__ uint4 load_words(const void* at) {
    uint4 w;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(__cvta_generic_to_global(at))
                 : "memory");
    return w;
}

__device__ __forceinline__ uint2 load_two_words(const void* at) {
    uint2 w;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                 : "=r"(w.x), "=r"(w.y)
                 : "l"(__cvta_generic_to_global(at))
                 : "memory");
    return w;
}

// Zeros where not `there`, and then nothing is asked of the memory.
__device__ __forceinline__ uint4 load_words_if(const void* at, bool there) {
    uint4 w = make_uint4(0, 0, 0, 0);
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.s32 p, %5, 0;\n"
        "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w)
        : "l"(__cvta_generic_to_global(at)), "r"((int)there)
        : "memory");
    return w;
}

__device__ __forceinline__ uint2 load_two_words_if(const void* at, bool there) {
    uint2 w = make_uint2(0, 0);
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.s32 p, %3, 0;\n"
        "@p ld.global.cg.v2.u32 {%0, %1}, [%2];}"
        : "+r"(w.x), "+r"(w.y)
        : "l"(__cvta_generic_to_global(at)), "r"((int)there)
        : "memory");
    return w;
}

__device__ __forceinline__ float2 load_pair(const float2* at) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "l"(__cvta_generic_to_global(at))
                 : "memory");
    return v;
}

__device__ __forceinline__ float load_float(const float* at) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(__cvta_generic_to_global(at)) : "memory");
    return v;
}

// How many have arrived before. What this block wrote before its last barrier is there for who arrives later.
__device__ __forceinline__ int arrive(int* counter) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    return before;
}

// --- Numbers

__device__ __forceinline__ float bits_to_float(unsigned bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float low(unsigned word) {
#ifdef HALF
    float v;
    asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;}" : "=f"(v) : "r"(word));
    return v;
#else
    return bits_to_float(word << 16);
#endif
}

__device__ __forceinline__ float high(unsigned word) {
#ifdef HALF
    float v;
    asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;}" : "=f"(v) : "r"(word));
    return v;
#else
    return bits_to_float(word & 0xffff0000u);
#endif
}

__device__ __forceinline__ Number number(float v) {
    Number n;
#ifdef HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(n) : "f"(v));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(n) : "f"(v));
#endif
    return n;
}

// The first in the lower half.
__device__ __forceinline__ unsigned two_numbers(float first, float second) {
    unsigned word;
#ifdef HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
    return word;
}

// Two numbers in fp8 (e4m3); what is past the largest of those becomes that.
__device__ __forceinline__ float2 widen(unsigned short two) {
    float2 v;
    asm("{.reg .b32 w;\n"
        ".reg .b16 l, h;\n"
        "cvt.rn.f16x2.e4m3x2 w, %2;\n"
        "mov.b32 {l, h}, w;\n"
        "cvt.f32.f16 %0, l;\n"
        "cvt.f32.f16 %1, h;}"
        : "=f"(v.x), "=f"(v.y)
        : "h"(two));
    return v;
}

__device__ __forceinline__ unsigned short narrow(float low, float high) {
    unsigned short two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
    return two;
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float divide(float x, float y) { return __fdividef(x, y); }

__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }

__device__ __forceinline__ float from_lane(float v, int offset) { return __shfl_xor_sync(0xffffffffu, v, offset); }

// A warp's 16x8 sums += 16x16 numbers (a) times 16x8 (b), laid out over its lanes as PTX says of mma.m16n8k16.
__device__ __forceinline__ void multiply(
    float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#ifdef HALF
#define NUMBERS "f16"
#else
#define NUMBERS "bf16"
#endif
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBERS "." NUMBERS
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#undef NUMBERS
}

// --- Products of a warpgroup (128 threads), both operands in shared memory

// Rows of numbers there: tiles of 8 rows of ACROSS bytes, 64 or 128, those further down `pitch` bytes apart. Of a tile,
// which begins at a multiple of its size, the 16 bytes that would be number i of it are at i ^ i / 8 % (ACROSS / 16): a
// matrix descriptor by PTX, with a swizzle.
typedef unsigned long long Tiles;

template <int ACROSS>
__device__ __forceinline__ Tiles tiles_at(const void* at, unsigned pitch) {
    const Tiles swizzle = ACROSS == 64 ? 2 : 1;
    return (Tiles)(shared_address(at) >> 4) | 1ull << 16 | (Tiles)(pitch >> 4) << 32 | swizzle << 62;
}

__device__ __forceinline__ Tiles further(Tiles tiles, unsigned bytes) { return tiles + (bytes >> 4); }

// A matrix that tiles of 128 bytes across are copied from, 64 rows of some of them at once: CUtensorMap, by launch.py.
struct __align__(64) Tiled {
    unsigned long long words[16];
};

__device__ __forceinline__ void expect_tiled(const Tiled* matrix) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(matrix) : "memory");
}

// 64 rows from `row` on, of columns from 64 times `tile` on; `bytes` of them. What is past the last row is 0.
__device__ __forceinline__ void ask_tiles(
    void* to, const Tiled* matrix, int row, int tile, unsigned bytes, Barrier* barrier) {
    const unsigned address = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
        "l"(matrix), "r"(0), "r"(row), "r"(tile), "r"(address)
        : "memory");
}

__device__ __forceinline__ void meet_warpgroup(int number) {
    asm volatile("bar.sync %0, 128;" ::"r"(number + 1) : "memory");
}

// Before the first product, and where sums were written otherwise.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// What was begun since the last of these is a group.
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All groups but the last LATER are done.
template <int LATER, int EIGHTHS>
__device__ __forceinline__ void await_products(float (&sums)[EIGHTHS][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
#pragma unroll
    for (int i = 0; i < EIGHTHS; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(sums[i][j])::"memory");
    }
}

// Begins: sums += 64 x 16 numbers (a) times 16 x 8 EIGHTHS (b), of rows of 16. A warp has 16 of the 64 rows, and a lane
// of each eighth what mma.m16n8k16 would give it.
#ifdef HALF
#define NUMBERS "f16.f16"
#else
#define NUMBERS "bf16.bf16"
#endif
#define SUMS(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
__device__ __forceinline__ void multiply_tiles(float (&sums)[1][4], Tiles a, Tiles b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." NUMBERS " {"
        "%0, %1, %2, %3"
        "}, %4, %5, 1, 1, 1, 0, 0;"
        : SUMS(0)
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_tiles(float (&sums)[2][4], Tiles a, Tiles b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." NUMBERS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, %8, %9, 1, 1, 1, 0, 0;"
        : SUMS(0), SUMS(1)
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_tiles(float (&sums)[3][4], Tiles a, Tiles b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n24k16.f32." NUMBERS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11"
        "}, %12, %13, 1, 1, 1, 0, 0;"
        : SUMS(0), SUMS(1), SUMS(2)
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_tiles(float (&sums)[4][4], Tiles a, Tiles b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." NUMBERS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, 1, 1, 1, 0, 0;"
        : SUMS(0), SUMS(1), SUMS(2), SUMS(3)
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_tiles(float (&sums)[6][4], Tiles a, Tiles b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n48k16.f32." NUMBERS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23"
        "}, %24, %25, 1, 1, 1, 0, 0;"
        : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5)
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_tiles(float (&sums)[8][4], Tiles a, Tiles b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NUMBERS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, 1, 1, 1, 0, 0;"
        : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7)
        : "l"(a), "l"(b));
}
#undef SUMS
#undef NUMBERS
