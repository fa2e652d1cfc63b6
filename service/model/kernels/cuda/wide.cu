// The product of TOKENS tokens, 33 and more, with a matrix (N, PARTS * K): a block computes ROWS of the N for GROUPS
// times 64 tokens over one of the PARTS, a warpgroup for each 64. Its rows of the matrix are all in shared memory,
// asked for before the wait; activations pass through a ring of STAGES stages of STEP columns, each warpgroup's its
// own.
//
// The matrix is packed as few.cu reads it, which is what a warpgroup's product can read, too; x [TOKENS, PARTS * K].
// PUT as in few.cu: 1 activates, y [TOKENS, N]; 2 gives queries to y and keys and values to their slots; 3 sums,
// y [PARTS, TOKENS, N] fp32 without a bias. AHEAD: copies of a block's rows, of 8 each, that are under way at once.

constexpr int EIGHTHS = ROWS / 8;
constexpr int STEPS = K / STEP;
constexpr unsigned TILE = 512;  // bytes: 8 rows of 32 columns; of activations twice as many
constexpr unsigned PITCH = K / 32 * TILE;  // of 8 rows of the matrix
constexpr unsigned STAGE = 64 * STEP * 2;

static_assert(WARPS == 4 * GROUPS && ROWS % 8 == 0 && N % ROWS == 0 && K % STEP == 0 && STEP % 64 == 0, "whole tiles");
static_assert(STAGES >= 2 && AHEAD <= EIGHTHS, "one is read while one is under way; no more copies than there are");
static_assert(EIGHTHS <= 4 || EIGHTHS == 6 || EIGHTHS == 8, "link.cuh has products of so many");
static_assert(PARTS == 1 || PUT == 3, "parts are summed up by another kernel");

extern "C" __global__ void __launch_bounds__(THREADS) wide(
    const __grid_constant__ Tiled x, const float2*, const Number* w, const float* bias, const float*, const float*,
    void* y, Number* keys, Number* values, const int* slots, float) {
    unsigned char* matrix = dynamic_shared();  // [EIGHTHS][K / 32] tiles
    __shared__ Barrier arrived[EIGHTHS], filled[GROUPS][STAGES];
    const int thread = threadIdx.x, warp = thread / 32 % 4, lane = thread % 32, group = thread / 128;
    const int first = (blockIdx.z * GROUPS + group) * 64;  // token
    unsigned char* ring = matrix + EIGHTHS * PITCH + group * (STAGES * STAGE);  // stages of [STEP / 64][8] tiles
    const unsigned char* rows = (const unsigned char*)w + (size_t)(blockIdx.x * EIGHTHS * PARTS + blockIdx.y) * PITCH;
    if (thread == 0) {
        expect_tiled(&x);
#pragma unroll
        for (int i = 0; i < EIGHTHS; ++i) init_barrier(&arrived[i]);
#pragma unroll
        for (int i = 0; i < GROUPS * STAGES; ++i) init_barrier(&filled[0][0] + i);
        fence_barriers();
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) ask(matrix + i * PITCH, rows + (size_t)i * PARTS * PITCH, PITCH, &arrived[i]);
    }
    // A lane has two rows of a product, 8 apart, and two neighbouring columns of each eighth.
    const int token = first + warp * 16 + lane / 4, n = blockIdx.x * ROWS + lane % 4 * 2;
    float2 offsets[EIGHTHS];
    if constexpr (PUT != 3) {
#pragma unroll
        for (int i = 0; i < EIGHTHS; ++i) offsets[i] = *(const float2*)(bias + n + i * 8);
    }
    size_t places[2] = {};
    if constexpr (PUT == 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) places[i] = (size_t)slots[min(token + i * 8, TOKENS - 1)] * (N / 3);
    }
    if (thread == 0) {
#pragma unroll
        for (int i = AHEAD; i < EIGHTHS; ++i) {
            await(&arrived[i - AHEAD], 0);
            ask(matrix + i * PITCH, rows + (size_t)i * PARTS * PITCH, PITCH, &arrived[i]);
        }
    }
    __syncthreads();
    wait_predecessor();

    const bool asks = thread % 128 == 0;
    const auto ask_stage = [&](int step) {
        const int stage = step % STAGES;
        ask_tiles(ring + stage * STAGE, &x, first, (blockIdx.y * K + step * STEP) / 64, STAGE, &filled[group][stage]);
    };
    if (asks) {
#pragma unroll
        for (int i = 0; i < STAGES && i < STEPS; ++i) ask_stage(i);
    }
    launch_dependents();  // not before: what they ask for early would be in the way of these
    float sums[EIGHTHS][4] = {};
#pragma unroll
    for (int i = 0; i < EIGHTHS; ++i) await(&arrived[i], 0);
    const Tiles of_matrix = tiles_at<64>(matrix, PITCH), of_ring = tiles_at<128>(ring, 2 * TILE);
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const int stage = step % STAGES;
        await(&filled[group][stage], step / STAGES % 2);
        begin_products();
#pragma unroll
        for (int i = 0; i < STEP / 16; ++i) {
            multiply_tiles(
                sums, further(of_ring, stage * STAGE + i / 4 * (16 * TILE) + i % 4 * 32),
                further(of_matrix, (step * (STEP / 32) + i / 2) * TILE + i % 2 * 32));
        }
        close_products();
        if (step > 0 && step - 1 + STAGES < STEPS) {
            await_products<1>(sums);
            meet_warpgroup(group);  // all four warps have read the stage before
            if (asks) ask_stage(step - 1 + STAGES);
        }
    }
    await_products<0>(sums);

#pragma unroll
    for (int i = 0; i < EIGHTHS; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int at = token + j * 8, column = n + i * 8;
            if (at >= TOKENS) continue;
            const float a = sums[i][2 * j], b = sums[i][2 * j + 1];
            if constexpr (PUT == 3) {
                *(float2*)((float*)y + ((size_t)blockIdx.y * TOKENS + at) * N + column) = make_float2(a, b);
            } else if constexpr (PUT == 1) {
                *(unsigned*)((Number*)y + (size_t)at * N + column) =
                    two_numbers(activate(a + offsets[i].x), activate(b + offsets[i].y));
            } else {
                constexpr int WIDTH = N / 3;
                const int third = column / WIDTH, within = column % WIDTH;
                Number* side = third == 0 ? (Number*)y + (size_t)at * WIDTH : (third == 1 ? keys : values) + places[j];
                *(unsigned*)(side + within) = two_numbers(a + offsets[i].x, b + offsets[i].y);
            }
        }
    }
}
