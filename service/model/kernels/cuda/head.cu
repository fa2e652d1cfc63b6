// The logits of TOKENS tokens, one to 32, by tensor cores as in few.cu, and a first look at them, as `scan` of
// sampling.py takes it: the head [SIZE and more, K] is read once, in blocks that each stream TILES tiles of 16 rows.
//
// The head is packed as matrices of few.cu are, so that a tile is one copy. Shared memory holds a ring of them, of ROWS
// rows in all; EARLY tiles are asked for before the wait. Each warp takes an eighth of K of every tile: its part of
// the activations stays in its registers.
// Of one token x [., K] is the residual stream, whose row `indices` [1] a block norms: two columns, what the served
// dtype holds of its numbers and what that leaves of them. Of more x [TOKENS, K] is normed already.
// Chunks are of CHUNK ids, each one block's; ids that have no logits to be looked at are in the last.

constexpr int TILE_ROWS = 16;
constexpr int STAGES = ROWS / TILE_ROWS;
constexpr int ALL = (SIZE + TILE_ROWS - 1) / TILE_ROWS;  // tiles
constexpr int CHUNKS = (SIZE + CHUNK - 1) / CHUNK;
constexpr bool NORM = TOKENS == 1;
constexpr int COLUMNS = NORM ? 2 : TOKENS;
constexpr int EIGHTHS = (COLUMNS + 7) / 8;  // of columns: a product each
constexpr int HAND = K / WARPS / 32;  // tiles of [8 rows][32 columns] that a warp has of 8 rows
constexpr int EACH = (TILE_ROWS * TOKENS + THREADS - 1) / THREADS;  // logits of a tile that a thread puts
constexpr int PITCH = TILE_ROWS + 4;  // so that a warp's stores are to different banks
constexpr unsigned GROUP = 8 * K * 2, BYTES = 2 * GROUP;  // of 8 rows, and of a tile
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(8 % TOKENS == 0 || TOKENS % 8 == 0, "tokens are the columns of a product, or of several");
static_assert(K % (32 * WARPS) == 0 && (!NORM || K == 4 * THREADS), "a warp has whole tiles, a thread norms four");
static_assert(EARLY <= STAGES, "a ring has room for what is asked for");
static_assert(ROWS % TILE_ROWS == 0 && CHUNK % TILE_ROWS == 0, "copies are of whole tiles, chunks too");
static_assert(TILES % (CHUNK / TILE_ROWS) == 0, "a block's chunks are its own");
static_assert(SIZE <= 1 << 24, "ids change lanes as floats");

// Of the logits that a thread has seen of a chunk, or several threads. NaN is the mass where one was not finite.
struct Seen {
    float peak, winner, mass;  // the largest, its first id, the sum of exp((logit - peak) / temperature)
};

__device__ __forceinline__ void look(Seen& seen, float logit, float id, float heat) {
    if (logit > seen.peak) seen.winner = id;
    const float apart = logit - seen.peak;  // infinite at first
    const float share = power_of_two(-fabsf(apart) * heat);
    seen.mass = apart > 0.0f ? fmaf(seen.mass, share, 1.0f) : seen.mass + share;
    seen.peak = fmaxf(seen.peak, logit);
}

__device__ __forceinline__ float kept(float mass, float peak, float best, float heat) {
    return mass * (peak > minus_infinity() ? power_of_two((peak - best) * heat) : 0.0f);
}

// Of 16 lanes.
__device__ __forceinline__ void merge_lanes(Seen& seen, float heat) {
#pragma unroll
    for (int bit = 8; bit > 0; bit /= 2) {
        const float peak = from_lane(seen.peak, bit), winner = from_lane(seen.winner, bit);
        const float mass = from_lane(seen.mass, bit), best = fmaxf(seen.peak, peak);
        seen.mass = kept(seen.mass, seen.peak, best, heat) + kept(mass, peak, best, heat);
        if (peak > seen.peak || peak == seen.peak && winner < seen.winner) seen.winner = winner;
        seen.peak = best;
    }
}

// Of all threads' numbers.
__device__ __forceinline__ float block_sum(float v, float* shared) {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) v += from_lane(v, bit);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += shared[i];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) head(
    const void* x, const int* indices, const float* gain, const float* shift, const Number* w, float* logits,
    const int* records, const int* positions, float* peaks, int* winners, float* masses, int stride, int end_of_text,
    float epsilon) {
    unsigned char* ring = dynamic_shared();  // [STAGES] tiles
    __shared__ Barrier arrived[STAGES];
    __shared__ float partial[WARPS][8 * EIGHTHS][PITCH];
    __shared__ __align__(16) Number made[NORM ? 2 * K : 1];
    __shared__ float totals[2][WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = thread % TILE_ROWS;
    const int first = blockIdx.x * TILES, count = min(TILES, ALL - first);
    const unsigned char* tiles = (const unsigned char*)w + (size_t)first * BYTES;
    if (thread == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; ++i) init_barrier(&arrived[i]);
        fence_barriers();
#pragma unroll
        for (int i = 0; i < EARLY; ++i) {
            if (i < count) ask(ring + i * BYTES, tiles + i * BYTES, BYTES, &arrived[i]);
        }
    }
    launch_dependents();
    // What a step is asked for is there before its first kernel is.
    float heat[EACH];  // what differences of logits are multiplied by, for powers of two
    int banned[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int token = min((i * THREADS + thread) / TILE_ROWS, TOKENS - 1);
        const int* record = records + token * WORDS;
        const float temperature = bits_to_float(record[TEMPERATURE]);
        heat[i] = fminf(LOG2_E / (temperature > 0.0f ? temperature : 1.0f), 3e38f);
        banned[i] = positions[token] < record[MIN_LENGTH] ? end_of_text : -1;
    }
#if TOKENS == 1
    const float4 factor = ((const float4*)gain)[thread], added = ((const float4*)shift)[thread];
    const size_t from = (size_t)indices[0] * K;
    wait_predecessor();
    {
        const uint4 raw = load_words((const float*)x + from + thread * 4);
        float v[4] = {bits_to_float(raw.x), bits_to_float(raw.y), bits_to_float(raw.z), bits_to_float(raw.w)};
        const float mean = block_sum((v[0] + v[1]) + (v[2] + v[3]), totals[0]) * (1.0f / K);
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] -= mean, squares = fmaf(v[i], v[i], squares);
        const float scale = inverse_root(block_sum(squares, totals[1]) * (1.0f / K) + epsilon);
        v[0] = v[0] * scale * factor.x + added.x, v[1] = v[1] * scale * factor.y + added.y;
        v[2] = v[2] * scale * factor.z + added.z, v[3] = v[3] * scale * factor.w + added.w;
        const unsigned one = two_numbers(v[0], v[1]), other = two_numbers(v[2], v[3]);
        *(uint2*)(made + thread * 4) = make_uint2(one, other);
        *(uint2*)(made + K + thread * 4) =
            make_uint2(two_numbers(v[0] - low(one), v[1] - high(one)),
                       two_numbers(v[2] - low(other), v[3] - high(other)));
    }
#else
    wait_predecessor();
#endif
    __syncthreads();
    uint4 in[HAND][EIGHTHS];
#pragma unroll
    for (int i = 0; i < HAND; ++i) {
#pragma unroll
        for (int j = 0; j < EIGHTHS; ++j) {
            const int at = (lane / 4 % COLUMNS + j * 8) * K + (warp * HAND + i) * 32 + lane % 4 * 8;
            in[i][j] = NORM ? *(const uint4*)(made + at) : load_words((const Number*)x + at);
        }
    }
    if (thread == 0) {
#pragma unroll
        for (int i = EARLY; i < STAGES; ++i) {
            if (i < count) ask(ring + i * BYTES, tiles + i * BYTES, BYTES, &arrived[i]);
        }
    }

    Seen seen[EACH];
    int stage = 0, parity = 0;
    for (int number = 0; number < count; ++number) {
        await(&arrived[stage], parity);
        const unsigned char* tile = ring + stage * BYTES + warp * HAND * 512 + (lane ^ lane / 8) * 16;
        float sums[EIGHTHS][4] = {};
#pragma unroll
        for (int i = 0; i < HAND; ++i) {
            const uint4 a = *(const uint4*)(tile + i * 512), b = *(const uint4*)(tile + GROUP + i * 512);
#pragma unroll
            for (int j = 0; j < EIGHTHS; ++j) {
                multiply(sums[j], a.x, b.x, a.y, b.y, in[i][j].x, in[i][j].y);
                multiply(sums[j], a.z, b.z, a.w, b.w, in[i][j].z, in[i][j].w);
            }
        }
        __syncthreads();  // the parts of the tile before are read
#pragma unroll
        for (int j = 0; j < 4 * EIGHTHS; ++j) {
            partial[warp][j / 4 * 8 + lane % 4 * 2 + j % 2][j % 4 / 2 * 8 + lane / 4] = sums[j / 4][j % 4];
        }
        __syncthreads();  // and so is this tile
        if (thread == 0 && number + STAGES < count) {
            ask(ring + stage * BYTES, tiles + (number + STAGES) * BYTES, BYTES, &arrived[stage]);
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;

        const int id = (first + number) * TILE_ROWS + row, chunk = id / CHUNK;
        const bool begins = number % (CHUNK / TILE_ROWS) == 0;
        const bool ends = number % (CHUNK / TILE_ROWS) == CHUNK / TILE_ROWS - 1 || number == count - 1;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (i * THREADS + warp * 32 >= TILE_ROWS * TOKENS) break;
            const int token = (i * THREADS + thread) / TILE_ROWS;
            float logit = 0.0f;
#pragma unroll
            for (int j = 0; j < WARPS; ++j) {
                logit += partial[j][token][row];
                if constexpr (NORM) logit += partial[j][token + 1][row];
            }
            if (token < TOKENS) logits[token * stride + id] = logit;
            if (begins) seen[i] = {minus_infinity(), (float)id, 0.0f};
            if (id < SIZE) {
                if (!(logit - logit == 0.0f)) {
                    seen[i].mass = bits_to_float(0x7fffffffu);
                } else if (id != banned[i]) {
                    look(seen[i], logit, (float)id, heat[i]);
                }
            }
            if (ends) {
                merge_lanes(seen[i], heat[i]);
                if (row == 0 && token < TOKENS) {
                    const int at = token * CHUNKS + chunk;
                    peaks[at] = seen[i].peak, winners[at] = (int)seen[i].winner, masses[at] = seen[i].mass;
                }
            }
        }
    }
}
