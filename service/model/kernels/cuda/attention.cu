// A token's attention over a paged cache [slots, HEADS, 64], its own key and value among them: a block for each of
// HEADS heads, SPLITS splits of the context and, with MANY, tokens: of `num_rows` sequences, with tables of `width`.
// Eight lanes share a token's key, and each such group keeps a softmax of its own until the end; the first passes of
// keys and values (AT_ONCE tokens each), four or RING, are asked for before the wait. Scores are in powers of two. What
// a split attends to is divided by its mass: of one split that is all, else who reads it merges them by `stats`.

constexpr int BLOCK = 2 * AT_ONCE;  // tokens of one pair of passes

struct Pair {
    uint4 keys[2], values[2];
};

// Tokens `start` + group and AT_ONCE further on; past `end` any that there are.
__device__ __forceinline__ Pair load(
    const Number* keys, const Number* values, const int* table, int start, int end, int group, int column) {
    Pair pair;
    int slot[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = start + i * AT_ONCE + group;
        const int valid = token < end ? token : 0;
        slot[i] = table[valid / BLOCK_SIZE] * BLOCK_SIZE + valid % BLOCK_SIZE;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const size_t at = (size_t)slot[i] * (HEADS * HEAD) + column;
        pair.keys[i] = load_words(keys + at);
        pair.values[i] = load_words(values + at);
    }
    return pair;
}

__device__ __forceinline__ void attend(
    Softmax& softmax, Pair& pair, const float* query, int start, int end, int group) {
    float scores[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scores[i] = score(pair.keys[i], query);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (start + i * AT_ONCE + group >= end) {
            scores[i] = minus_infinity();
            pair.values[i] = make_uint4(0, 0, 0, 0);  // another sequence's may be no numbers
        }
    }
    rescale(softmax, fmaxf(softmax.best, fmaxf(scores[0], scores[1])));
#pragma unroll
    for (int i = 0; i < 2; ++i) add(softmax, power_of_two(scores[i] - softmax.best), pair.values[i]);
}

extern "C" __global__ void __launch_bounds__(THREADS) attention(
    const Number* q, const Number* keys, const Number* values, const int* table, const int* length, Number* parts,
    float2* stats, float scale, const int* num_rows, int width) {
    __shared__ float sums[WARPS][HEAD];
    __shared__ float best[WARPS], mass[WARPS];
    const int head = blockIdx.x, split = blockIdx.y;
    const int thread = threadIdx.x, warp = thread / 32, group = thread / 8, eighth = thread % 8;
    const int column = head * HEAD + eighth * 8;
    launch_dependents();
    // Lengths and tables are of before this step, and so are the keys and values of all tokens but the last.
#ifdef MANY
    const int row = blockIdx.z;
    if (row >= *num_rows) {  // past them stands anything
        wait_predecessor();
        return;
    }
    q += row * (HEADS * HEAD), parts += row * (SPLITS * HEADS * HEAD), stats += row * (SPLITS * HEADS);
    table += row * width, length += row;
#endif
    const int cached = max(*length - 1, 0);
    const int share = (cached + SPLITS * AT_ONCE - 1) / (SPLITS * AT_ONCE) * AT_ONCE;
    int start = split * share;
    const int end = min(start + share, cached);
#ifdef RING
    uint4* ring = (uint4*)dynamic_shared() + thread;  // [RING / 2 pairs][keys, values of two passes][THREADS]
    const auto ask_pair = [&](int number) {
        uint4* to = ring + number % (RING / 2) * (4 * THREADS);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = start + number * BLOCK + i * AT_ONCE + group;
            if (token < end) {
                const int slot = table[token / BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE;
                const size_t at = (size_t)slot * (HEADS * HEAD);
                ask_words(to + 2 * i * THREADS, keys + at + column);
                ask_words(to + (2 * i + 1) * THREADS, values + at + column);
            }
        }
        close_group();
    };
#pragma unroll
    for (int i = 0; i < RING / 2; ++i) ask_pair(i);
#else
    Pair even = load(keys, values, table, start, end, group, column);
    Pair odd = {};
    if (start + BLOCK < end) odd = load(keys, values, table, start + BLOCK, end, group, column);
#endif
    const bool newest = split == 0 && warp == 0;
    const size_t own_slot = (size_t)table[cached / BLOCK_SIZE] * BLOCK_SIZE + cached % BLOCK_SIZE;
    const size_t own = own_slot * (HEADS * HEAD) + column;
    wait_predecessor();

    const uint4 asked = load_words(q + column);
    uint4 own_key = make_uint4(0, 0, 0, 0), own_value = own_key;
    if (newest) own_key = load_words(keys + own), own_value = load_words(values + own);
    float query[8];
    unpack(asked, query);
#pragma unroll
    for (int i = 0; i < 8; ++i) query[i] *= scale * 1.4426950408889634f;
    Softmax softmax = {LARGEST_NEGATIVE, 0.0f, {}};
#ifdef RING
    for (int number = 0; start + number * BLOCK < end; ++number) {
        await_groups<RING / 2 - 1>();
        const uint4* from = ring + number % (RING / 2) * (4 * THREADS);
        Pair pair;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            pair.keys[i] = from[2 * i * THREADS], pair.values[i] = from[(2 * i + 1) * THREADS];
        attend(softmax, pair, query, start + number * BLOCK, end, group);
        ask_pair(number + RING / 2);
    }
#else
    for (;;) {
        attend(softmax, even, query, start, end, group);
        if (start + 2 * BLOCK < end) even = load(keys, values, table, start + 2 * BLOCK, end, group, column);
        start += BLOCK;
        if (start >= end) break;
        attend(softmax, odd, query, start, end, group);
        if (start + 2 * BLOCK < end) odd = load(keys, values, table, start + 2 * BLOCK, end, group, column);
        start += BLOCK;
        if (start >= end) break;
    }
#endif
    if (newest) {
        const float own_score = score(own_key, query);
        if (group == 0) {
            rescale(softmax, fmaxf(softmax.best, own_score));
            add(softmax, power_of_two(own_score - softmax.best), own_value);
        }
    }

    gather(softmax, sums, best, mass);
    __syncthreads();
    if (thread < HEAD) {
        const Part part = merge(sums, best, mass, thread);
        // A split without tokens has no mass, and so no say.
        const float mixed = part.mass == 0.0f ? 0.0f : divide(part.sum, part.mass);
        parts[split * (HEADS * HEAD) + head * HEAD + thread] = number(mixed);
        if (thread == 0) stats[split * HEADS + head] = make_float2(part.best, part.mass);
    }
}
