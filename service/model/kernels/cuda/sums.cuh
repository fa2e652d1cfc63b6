// Sums over lanes, numbers out of words, and activations: what several kernels share. Put behind link.cuh.

#ifndef WARPS  // of a block
#define WARPS 8
#endif
constexpr int THREADS = 32 * WARPS;

__device__ __forceinline__ float minus_infinity() { return bits_to_float(0xff800000u); }

// Eight numbers of the served dtype.
__device__ __forceinline__ void unpack(const uint4& w, float* v) {
    v[0] = low(w.x), v[1] = high(w.x), v[2] = low(w.y), v[3] = high(w.y);
    v[4] = low(w.z), v[5] = high(w.z), v[6] = low(w.w), v[7] = high(w.w);
}

// Of eight in fp8.
__device__ __forceinline__ void unpack(const uint2& w, float* v) {
    const unsigned words[2] = {w.x, w.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = widen((unsigned short)(words[i / 2] >> 16 * (i % 2)));
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
}

template <typename Words>
__device__ __forceinline__ float dot(const Words& w, const float* x, float sum) {
    float v[8];
    unpack(w, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(v[i], x[i], sum);
    return sum;
}

// How many numbers a lane has after `fold`.
__device__ constexpr int folded(int count, int offset, int last) {
    return offset < last ? count : folded(count % 2 == 0 ? count / 2 : count, offset / 2, last);
}

// Sums v[0 .. COUNT) over the lanes that differ in the bits OFFSET, OFFSET / 2 .. LAST of their number. Instead of all
// sums a lane then has those from `first` on: while their count is even, lanes share them out, half to each.
template <int COUNT, int OFFSET, int LAST>
__device__ __forceinline__ void fold(float* v, int lane, int& first) {
    if constexpr (OFFSET >= LAST) {
        if constexpr (COUNT % 2 == 0) {
            const bool upper = lane & OFFSET;
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) {
                const float given = upper ? v[i] : v[i + COUNT / 2];
                const float kept = upper ? v[i + COUNT / 2] : v[i];
                v[i] = kept + from_lane(given, OFFSET);
            }
            first += upper ? COUNT / 2 : 0;
            fold<COUNT / 2, OFFSET / 2, LAST>(v, lane, first);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) v[i] += from_lane(v[i], OFFSET);
            fold<COUNT, OFFSET / 2, LAST>(v, lane, first);
        }
    }
}

// The activation KIND, by products.py.
__device__ __forceinline__ float activate(float x) {
#if KIND == 0  // GELU by tanh: (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
    const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return divide(x, 1.0f + power_of_two(-2.8853900817779268f * u));
#elif KIND == 1
    return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#elif KIND == 2
    return x < 0.0f ? 0.0f : x;
#elif KIND == 3
    return divide(x, 1.0f + power_of_two(-1.4426950408889634f * x));
#else
    return tanhf(x);
#endif
}
