// Attention of one query over heads of 64: eight lanes share a token's key, and each such group keeps a softmax of its
// own until the end. Scores are in powers of two. Put behind sums.cuh.

constexpr int HEAD = 64;
constexpr int AT_ONCE = THREADS / 8;  // tokens at once
constexpr float LARGEST_NEGATIVE = -1e30f;  // the maximum of no scores: finite, so that differences are

struct Softmax {
    float best, mass, sums[8];
};

template <typename Words>
__device__ __forceinline__ float score(const Words& key, const float* query) {
    float sum = dot(key, query, 0.0f);
#pragma unroll
    for (int bit = 4; bit > 0; bit /= 2) sum += from_lane(sum, bit);
    return sum;
}

template <typename Words>
__device__ __forceinline__ void add(Softmax& softmax, float weight, const Words& value) {
    float v[8];
    unpack(value, v);
    softmax.mass += weight;
#pragma unroll
    for (int i = 0; i < 8; ++i) softmax.sums[i] = fmaf(weight, v[i], softmax.sums[i]);
}

__device__ __forceinline__ void rescale(Softmax& softmax, float best) {
    const float kept = power_of_two(softmax.best - best);
    softmax.best = best;
    softmax.mass *= kept;
#pragma unroll
    for (int i = 0; i < 8; ++i) softmax.sums[i] *= kept;
}

// The softmaxes of a warp's four groups become one, and wait for the other warps'.
__device__ __forceinline__ void gather(Softmax& softmax, float (*sums)[HEAD], float* best, float* mass) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float common = fmaxf(softmax.best, from_lane(softmax.best, 16));
    common = fmaxf(common, from_lane(common, 8));
    rescale(softmax, common);
    softmax.mass += from_lane(softmax.mass, 16);
    softmax.mass += from_lane(softmax.mass, 8);
    int first = 0;
    fold<8, 16, 8>(softmax.sums, lane, first);
    sums[warp][lane % 8 * 8 + first] = softmax.sums[0];
    sums[warp][lane % 8 * 8 + first + 1] = softmax.sums[1];
    if (lane == 0) best[warp] = common, mass[warp] = softmax.mass;
}

// Of all warps: the largest score, and of one column the sum, as of that score.
struct Part {
    float best, mass, sum;
};

__device__ __forceinline__ Part merge(const float (*sums)[HEAD], const float* best, const float* mass, int column) {
    Part part = {best[0], 0.0f, 0.0f};
#pragma unroll
    for (int i = 1; i < WARPS; ++i) part.best = fmaxf(part.best, best[i]);
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        const float kept = power_of_two(best[i] - part.best);
        part.mass = fmaf(mass[i], kept, part.mass);
        part.sum = fmaf(sums[i][column], kept, part.sum);
    }
    return part;
}
