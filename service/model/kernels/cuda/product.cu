// One token's product with a matrix (N, K): a block computes ROWS of the N, each of its warps over an eighth of K.
// Around it what stands before and after it in a layer:
//   READ  0: x [K] in the served dtype.
//         1: x [K] in fp32 and its layer norm, folded: W LN(x) = (W (gain x) - mean W gain) / deviation + W shift; the
//            last is in `bias`, `scaled` is W gain.
//         2: x [SPLITS, K] and their (maximum, sum) [SPLITS, K / 64], what attention.cu leaves of each split.
//   PUT   0: added to y [N] in fp32.  1: its activation KIND to y in the served dtype.
//         2: queries to y [N / 3], keys and values to their slot of the cache.

constexpr int SLICE = K / WARPS;  // of a row, a warp's
constexpr int LANES = SLICE / 8 < 32 ? SLICE / 8 : 32;  // that share a row
constexpr int TURNS = SLICE / (8 * LANES);  // eight numbers of a row each
constexpr int SETS = 32 / LANES;  // rows that a warp has in hand at once
constexpr int QUARTER = ROWS / 4;
constexpr int HELD = ROWS / SETS;  // sums of a lane
constexpr int LEFT = folded(HELD, LANES / 2, 1);
constexpr bool NORM = READ == 1;
static_assert(SLICE % (8 * LANES) == 0 && (LANES & (LANES - 1)) == 0, "a slice is whole turns");
static_assert(ROWS % 4 == 0 && QUARTER % SETS == 0 && N % ROWS == 0 && ROWS <= THREADS, "rows are whole quarters");
static_assert(!NORM || SETS == 2, "each half of a warp makes one of the two statistics");

extern "C" __global__ void __launch_bounds__(THREADS, READ == 0 ? 4 : 5) product(
    const void* x, const float2* stats, const Number* w, const float* bias, const float* scaled, const float* gain,
    void* y, Number* keys, Number* values, const int* slot, float epsilon) {
    unsigned char* tile = dynamic_shared();  // [ROWS, K]
    __shared__ Barrier arrived[4];
    __shared__ float partial[WARPS][ROWS + 2];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, set = lane / LANES;
    const int n = blockIdx.x * ROWS + thread;
    const int k = warp * SLICE + lane % LANES * 8;
    constexpr unsigned BYTES = QUARTER * K * 2;
    const unsigned char* rows = (const unsigned char*)w + (size_t)blockIdx.x * (4 * BYTES);
    if (thread == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) init_barrier(&arrived[i]);
        fence_barriers();
        ask(tile, rows, BYTES, &arrived[0]);
    }
    launch_dependents();
    float offset = 0.0f, slope = 0.0f;
    int place = 0;
    if (thread < ROWS) {
        offset = bias[n];
        if constexpr (NORM) slope = scaled[n];
        if constexpr (PUT == 2) place = *slot;
    }
#if READ == 1
    float factor[8];
    {
        const float4 a = *(const float4*)(gain + k), b = *(const float4*)(gain + k + 4);
        factor[0] = a.x, factor[1] = a.y, factor[2] = a.z, factor[3] = a.w;
        factor[4] = b.x, factor[5] = b.y, factor[6] = b.z, factor[7] = b.w;
    }
#endif
    if (thread == 0) {
        // One copy in flight: more stand in the queues before what the chain waits for.
#pragma unroll
        for (int i = 1; i < 4; ++i) {
            await(&arrived[i - 1], 0);
            ask(tile + i * BYTES, rows + i * BYTES, BYTES, &arrived[i]);
        }
    }
    __syncthreads();
    wait_predecessor();

    float before = 0.0f;
    if constexpr (PUT == 0) {
        if (thread < ROWS) before = load_float((const float*)y + n);
    }
    float in[TURNS * 8];
#if READ == 1
    {
        float statistic = 0.0f;  // of a slice: its sum in one half of a warp, the sum of its squares in the other
        const uint4 a = load_words((const float*)x + k), b = load_words((const float*)x + k + 4);
        const unsigned bits[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float v = bits_to_float(bits[i]);
            statistic = fmaf(v, set ? v : 1.0f, statistic);
            in[i] = v * factor[i];
        }
#pragma unroll
        for (int bit = LANES / 2; bit > 0; bit /= 2) statistic += from_lane(statistic, bit);
        if (lane % LANES == 0) partial[warp][ROWS + set] = statistic;
    }
#elif READ == 2
    static_assert(TURNS == 1, "one head a lane");
    {
        float2 stat[SPLITS];
        uint4 part[SPLITS];
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            stat[i] = load_pair(stats + i * (K / 64) + k / 64);
            part[i] = load_words((const Number*)x + i * K + k);
        }
        float best = stat[0].x, total = 0.0f;
#pragma unroll
        for (int i = 1; i < SPLITS; ++i) best = fmaxf(best, stat[i].x);
#pragma unroll
        for (int i = 0; i < 8; ++i) in[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < SPLITS; ++i) {
            const float share = stat[i].y * power_of_two(stat[i].x - best);
            total += share;
            float v[8];
            unpack(part[i], v);
#pragma unroll
            for (int j = 0; j < 8; ++j) in[j] = fmaf(share, v[j], in[j]);
        }
        const float scale = divide(1.0f, total);
#pragma unroll
        for (int i = 0; i < 8; ++i) in[i] *= scale;
    }
#else
#pragma unroll
    for (int i = 0; i < TURNS; ++i) unpack(load_words((const Number*)x + k + i * (LANES * 8)), in + i * 8);
#endif

    float sums[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (i == 3 * QUARTER / SETS) await(&arrived[3], 0);  // the others have arrived: thread 0 waited for them
        const Number* row = (const Number*)tile + (i * SETS + set) * K + k;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < TURNS; ++j) sum = dot(*(const uint4*)(row + j * (LANES * 8)), in + j * 8, sum);
        sums[i] = sum;
    }
    int first = 0;
    fold<HELD, LANES / 2, 1>(sums, lane, first);
#pragma unroll
    for (int i = 0; i < LEFT; ++i) partial[warp][(first + i) * SETS + set] = sums[i];
    __syncthreads();

    if (thread < ROWS) {
        float sum = 0.0f, total = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            sum += partial[i][thread];
            if constexpr (NORM) total += partial[i][ROWS], squares += partial[i][ROWS + 1];
        }
        if constexpr (NORM) {
            const float mean = total * (1.0f / K);
            const float variance = fmaf(-mean, mean, squares * (1.0f / K));
            // Rounding may leave less than nothing; what is not a number stays so.
            sum = (sum - mean * slope) * inverse_root((variance < 0.0f ? 0.0f : variance) + epsilon);
        }
        sum += offset;
        if constexpr (PUT == 0) {
            ((float*)y)[n] = before + sum;
        } else if constexpr (PUT == 1) {
            ((Number*)y)[n] = number(activate(sum));
        } else {
            constexpr int WIDTH = N / 3;
            const Number value = number(sum);
            const size_t at = (size_t)place * WIDTH;
            if (n < WIDTH) {
                ((Number*)y)[n] = value;
            } else if (n < 2 * WIDTH) {
                keys[at + n - WIDTH] = value;
            } else {
                values[at + n - 2 * WIDTH] = value;
            }
        }
    }
}
