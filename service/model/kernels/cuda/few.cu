// The product of TOKENS tokens, two to 32, with a matrix (N, PARTS * K) by tensor cores: a block computes ROWS of the N
// for all of them over one of the PARTS, each of its warps over an eighth of that. The tensor cores multiply 16 rows of
// the matrix by 8 columns, which are tokens; or, of up to four, what the served dtype holds of their numbers and what
// that leaves of them.
//
// The matrix is packed, [N / 8][PARTS * K / 32] tiles of [8 rows][32 columns], as Tiles of link.cuh are: a lane's
// operand is one piece of a row, and of activations the same 8 columns. That their order in K is another than the
// tensor cores' does not show in a sum. READ and PUT are those of product.cu, each for TOKENS tokens:
// x [TOKENS, PARTS * K], y [TOKENS, N], of 2 in READ x [TOKENS, SPLITS, K] and stats [TOKENS, SPLITS, K / 64], and a
// slot each. Of more than eight tokens READ is 0, and PUT may be 3: y [PARTS, TOKENS, N] fp32, the sums of each part,
// without a bias.
// PIECES: copies that a block's rows come in. AHEAD: how many are under way at once. RESIDENT: blocks on a
// multiprocessor that registers are to leave room for. HAND: tiles of activations that a lane asks for at once.

constexpr int SLICE = K / WARPS;  // of K, a warp's
constexpr int TILES = SLICE / 32;
constexpr int GROUPS = ROWS / 8;
constexpr int PAIRS = (GROUPS + 1) / 2;  // of groups: 16 rows
constexpr bool NORM = READ == 1;
constexpr bool MADE = READ != 0;  // activations are made of what is there, put into shared memory, and read from there
constexpr bool HALVES = MADE && TOKENS <= 4;  // they are there in fp32, and columns to spare
constexpr int COLUMNS = HALVES ? 2 * TOKENS : TOKENS;
constexpr int EIGHTS = (COLUMNS + 7) / 8;  // of columns: a product each
constexpr int EACH = (ROWS * TOKENS + THREADS - 1) / THREADS;  // numbers that a thread puts
constexpr int PITCH = K + 32;  // of a column in shared memory: so that a warp reads from different banks
constexpr unsigned TILE = 512;  // bytes
constexpr unsigned BYTES = ROWS * K * 2 / PIECES;
#ifdef HALF
constexpr float SMALLER = NORM ? 1.0f / 16 : 1.0f;  // what is not normed yet may be more than fp16 holds
#else
constexpr float SMALLER = 1.0f;
#endif
static_assert(8 % TOKENS == 0 || TOKENS % 8 == 0 && !MADE, "tokens are the columns of a product, or of several");
static_assert(SLICE % 32 == 0 && TILES % HAND == 0 && ROWS % 8 == 0 && N % ROWS == 0, "a slice is whole tiles");
static_assert(ROWS * K * 2 % (16 * PIECES) == 0 && AHEAD <= PIECES, "pieces are whole copies");
static_assert(PUT != 0 || EACH == 1, "a thread adds to one number");
static_assert(PARTS == 1 || PUT == 3 && PIECES == GROUPS, "a part of 8 rows is one copy");
static_assert(!MADE || K == 4 * THREADS, "a thread makes four activations of a token");

// Four activations from `k` on of a token: what the served dtype holds of them, with HALVES the rest, too.
__device__ __forceinline__ void keep(Number* made, int token, int k, const float* v) {
    const unsigned first = two_numbers(v[0], v[1]), second = two_numbers(v[2], v[3]);
    *(uint2*)(made + token * PITCH + k) = make_uint2(first, second);
    if constexpr (HALVES) {
        const unsigned rest = two_numbers(v[0] - low(first), v[1] - high(first));
        *(uint2*)(made + (TOKENS + token) * PITCH + k) =
            make_uint2(rest, two_numbers(v[2] - low(second), v[3] - high(second)));
    }
}

// Products of a warp's 16 rows of each pair with the activations of its tile number `at`.
__device__ __forceinline__ void add_tile(
    float (*sums)[EIGHTS][4], const unsigned char* tile, int at, int lane, const uint4* x) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const unsigned char* first = tile + (2 * i * (K / 32) + at) * TILE + (lane ^ lane / 8) * 16;
        const uint4 a = *(const uint4*)first;
        uint4 b = make_uint4(0, 0, 0, 0);
        if (2 * i + 1 < GROUPS) b = *(const uint4*)(first + K / 32 * TILE);
#pragma unroll
        for (int j = 0; j < EIGHTS; ++j) {
            multiply(sums[i][j], a.x, b.x, a.y, b.y, x[j].x, x[j].y);
            multiply(sums[i][j], a.z, b.z, a.w, b.w, x[j].z, x[j].w);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) few(
    const void* x, const float2* stats, const Number* w, const float* bias, const float* scaled, const float* gain,
    void* y, Number* keys, Number* values, const int* slots, float epsilon) {
    unsigned char* tile = dynamic_shared();  // [GROUPS][K / 32] tiles
    __shared__ Barrier arrived[PIECES];
    __shared__ float partial[WARPS][8 * EIGHTS][ROWS + 4];  // 4: so that a warp's stores are to different banks
    __shared__ float statistics[WARPS][2 * TOKENS];  // of a warp's part: each token's sum, then those of its squares
    __shared__ __align__(16) Number made[MADE ? COLUMNS * PITCH : 1];
    __shared__ float2 offsets[ROWS];
    __shared__ int places[TOKENS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, column = lane / 4;
    const unsigned char* rows = (const unsigned char*)w + (size_t)(blockIdx.x * PIECES * PARTS + blockIdx.y) * BYTES;
    if (thread == 0) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) init_barrier(&arrived[i]);
        fence_barriers();
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) ask(tile + i * BYTES, rows + i * (PARTS * BYTES), BYTES, &arrived[i]);
    }
    launch_dependents();
    if (PUT != 3 && thread < ROWS) {
        const int n = blockIdx.x * ROWS + thread;
        offsets[thread] = make_float2(bias[n], NORM ? scaled[n] : 0.0f);
    }
    if (PUT == 2 && thread < TOKENS) places[thread] = slots[thread];
#if READ == 1
    const float4 factor = ((const float4*)gain)[thread];
#endif
    if (thread == 0) {
#pragma unroll
        for (int i = AHEAD; i < PIECES; ++i) {
            await(&arrived[i - AHEAD], 0);
            ask(tile + i * BYTES, rows + i * (PARTS * BYTES), BYTES, &arrived[i]);
        }
    }
    __syncthreads();
    wait_predecessor();

    // What a thread puts, in the end.
    const bool puts = thread < ROWS * TOKENS;
    float before = 0.0f;
    if constexpr (PUT == 0) {
        if (puts) before = load_float((const float*)y + thread / ROWS * N + blockIdx.x * ROWS + thread % ROWS);
    }
#if READ == 1
    {
        uint4 raw[TOKENS];
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) raw[i] = load_words((const float*)x + i * K + thread * 4);
        float found[2 * TOKENS];
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            const float a = bits_to_float(raw[i].x), b = bits_to_float(raw[i].y);
            const float c = bits_to_float(raw[i].z), d = bits_to_float(raw[i].w);
            found[i] = (a + b) + (c + d);
            found[TOKENS + i] = fmaf(a, a, b * b) + fmaf(c, c, d * d);
            const float v[4] = {a * (factor.x * SMALLER), b * (factor.y * SMALLER), c * (factor.z * SMALLER),
                                d * (factor.w * SMALLER)};
            keep(made, i, thread * 4, v);
        }
        int first = 0;
        fold<2 * TOKENS, 16, 1>(found, lane, first);
        statistics[warp][first] = found[0];
    }
    __syncthreads();
#elif READ == 2
    constexpr int ONCE = 8 / SPLITS < TOKENS ? 8 / SPLITS : TOKENS;  // tokens
#pragma unroll
    for (int start = 0; start < TOKENS; start += ONCE) {
        float2 stat[ONCE][SPLITS];
        uint2 part[ONCE][SPLITS];
#pragma unroll
        for (int i = 0; i < ONCE; ++i) {
#pragma unroll
            for (int j = 0; j < SPLITS; ++j) {
                const int split = (start + i) * SPLITS + j;
                stat[i][j] = load_pair(stats + split * (K / 64) + thread / 16);
                part[i][j] = load_two_words((const Number*)x + split * K + thread * 4);
            }
        }
#pragma unroll
        for (int i = 0; i < ONCE; ++i) {
            float best = stat[i][0].x, mass = 0.0f, v[4] = {};
#pragma unroll
            for (int j = 1; j < SPLITS; ++j) best = fmaxf(best, stat[i][j].x);
#pragma unroll
            for (int j = 0; j < SPLITS; ++j) {
                const float share = stat[i][j].y * power_of_two(stat[i][j].x - best);
                mass += share;
                v[0] = fmaf(share, low(part[i][j].x), v[0]), v[1] = fmaf(share, high(part[i][j].x), v[1]);
                v[2] = fmaf(share, low(part[i][j].y), v[2]), v[3] = fmaf(share, high(part[i][j].y), v[3]);
            }
            const float scale = mass == 0.0f ? 0.0f : divide(1.0f, mass);  // none: a row that fills the step up
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] *= scale;
            keep(made, start + i, thread * 4, v);
        }
    }
    __syncthreads();
#endif
    constexpr int STRIDE = MADE ? PITCH : PARTS * K;
    const int k = column % COLUMNS * STRIDE + (MADE ? 0 : blockIdx.y * K) + warp * SLICE + lane % 4 * 8;
    float sums[PAIRS][EIGHTS][4] = {};
#pragma unroll
    for (int hand = 0; hand < TILES; hand += HAND) {
        uint4 in[HAND][EIGHTS];
#pragma unroll
        for (int i = 0; i < HAND; ++i) {
#pragma unroll
            for (int j = 0; j < EIGHTS; ++j) {
                const int at = k + j * 8 * STRIDE + (hand + i) * 32;
                in[i][j] = MADE ? *(const uint4*)(made + at) : load_words((const Number*)x + at);
            }
        }
        if (hand == 0) {
            // The others have arrived: thread 0 waited for them.
#pragma unroll
            for (int i = PIECES - AHEAD; i < PIECES; ++i) await(&arrived[i], 0);
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < HAND; ++i) add_tile(sums, tile, warp * TILES + hand + i, lane, in[i]);
    }
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
#pragma unroll
        for (int j = 0; j < 4 * EIGHTS; ++j) {  // rows of the first group, then of the second; of each two columns
            const int group = 2 * i + j % 4 / 2;
            if (group >= GROUPS) continue;
            partial[warp][j / 4 * 8 + lane % 4 * 2 + j % 2][group * 8 + column] = sums[i][j / 4][j % 4];
        }
    }
    __syncthreads();

#pragma unroll
    for (int each = 0; each < EACH; ++each) {
        const int at = each * THREADS + thread, row = at % ROWS, token = at / ROWS, n = blockIdx.x * ROWS + row;
        if (each == 0 ? !puts : at >= ROWS * TOKENS) break;
        const float2 offset = PUT == 3 ? make_float2(0.0f, 0.0f) : offsets[row];
        float sum = 0.0f, total = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            sum += partial[i][token][row];
            if constexpr (HALVES) sum += partial[i][TOKENS + token][row];
            if constexpr (NORM) total += statistics[i][token], squares += statistics[i][TOKENS + token];
        }
        if constexpr (NORM) {
            const float mean = total * (1.0f / K);
            const float variance = fmaf(-mean, mean, squares * (1.0f / K));
            // Rounding may leave less than nothing; what is not a number stays so.
            sum = sum * (1.0f / SMALLER) - mean * offset.y;
            sum *= inverse_root((variance < 0.0f ? 0.0f : variance) + epsilon);
        }
        sum += offset.x;
        if constexpr (PUT == 0) {
            ((float*)y)[token * N + n] = before + sum;
        } else if constexpr (PUT == 1) {
            ((Number*)y)[token * N + n] = number(activate(sum));
        } else if constexpr (PUT == 3) {
            ((float*)y)[(blockIdx.y * TOKENS + token) * N + n] = sum;
        } else {
            constexpr int WIDTH = N / 3;
            const Number value = number(sum);
            const size_t slot = (size_t)places[token] * WIDTH;
            if (n < WIDTH) {
                ((Number*)y)[token * WIDTH + n] = value;
            } else if (n < 2 * WIDTH) {
                keys[slot + n - WIDTH] = value;
            } else {
                values[slot + n - 2 * WIDTH] = value;
            }
        }
    }
}
