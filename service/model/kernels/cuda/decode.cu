// Attention of single tokens over a paged cache [slots, HEADS, 64], their own keys and values among them: a block for
// each of HEADS heads and `splits` splits of the context, and for each row. PASSES passes of keys and values (AT_ONCE
// tokens each) are asked for before the wait, and as many are on their way until the end. NARROW: keys and values are
// in fp8.

constexpr int H = HEADS * HEAD;
constexpr int PAIR = 2 * AT_ONCE;  // tokens of two passes
constexpr int AHEAD = PASSES * AT_ONCE;
constexpr int MOST_SPLITS = 8;
constexpr int RESIDENT = (PASSES <= 2 ? 32 : PASSES <= 4 ? 24 : 16) / WARPS;  // blocks, for as few registers

static_assert(PASSES % 2 == 0 && WARPS >= 2, "passes go in pairs, and a thread puts one of a head's columns");

#ifdef NARROW
typedef unsigned char Kept;
typedef uint2 Eight;  // eight of a head's columns

__device__ __forceinline__ Eight load_kept_if(const Kept* at, bool there) { return load_two_words_if(at, there); }

// From the cache, or from what stands `beside` the queries.
__device__ __forceinline__ Eight load_own(const Kept* cached, const Number* beside, bool from_beside, bool wanted) {
    if (!from_beside) return load_two_words_if(cached, wanted);
    float v[8];
    unpack(load_words_if(beside, wanted), v);
    unsigned two[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) two[i] = narrow(v[2 * i], v[2 * i + 1]);
    return make_uint2(two[0] | two[1] << 16, two[2] | two[3] << 16);
}
#else
typedef Number Kept;
typedef uint4 Eight;

__device__ __forceinline__ Eight load_kept_if(const Kept* at, bool there) { return load_words_if(at, there); }

__device__ __forceinline__ Eight load_own(const Kept* cached, const Number* beside, bool from_beside, bool wanted) {
    return load_words_if(from_beside ? beside : cached, wanted);
}
#endif

struct Pair {
    Eight keys[2], values[2];
};

__device__ __forceinline__ int slot_of(const int* table, int token) {
    return table[(unsigned)token / BLOCK_SIZE] * BLOCK_SIZE + (unsigned)token % BLOCK_SIZE;
}

// Tokens `start` + group and AT_ONCE further on; zeros past `end`. All slots first: what asks for memory is in order.
template <int COUNT>
__device__ __forceinline__ void load(
    Pair* pairs, const Kept* keys, const Kept* values, const int* table, int start, int end, int column) {
    const int first = start + threadIdx.x / 8;
    int slots[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) slots[i] = slot_of(table, first + i * AT_ONCE < end ? first + i * AT_ONCE : 0);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const size_t at = (size_t)slots[i] * H + column;
        pairs[i / 2].keys[i % 2] = load_kept_if(keys + at, first + i * AT_ONCE < end);
        pairs[i / 2].values[i % 2] = load_kept_if(values + at, first + i * AT_ONCE < end);
    }
}

__device__ __forceinline__ void attend(Softmax& softmax, const Pair& pair, const float* query, int start, int end) {
    const int first = start + threadIdx.x / 8;
    float scores[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scores[i] = score(pair.keys[i], query);
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (first + i * AT_ONCE >= end) scores[i] = minus_infinity();
    rescale(softmax, fmaxf(softmax.best, fmaxf(scores[0], scores[1])));
#pragma unroll
    for (int i = 0; i < 2; ++i) add(softmax, power_of_two(scores[i] - softmax.best), pair.values[i]);
}

// q [rows, stride]; with a stride of 3 H the new keys and values stand behind the queries, and are put into the cache
// here. tables [rows, table_width]; lengths [rows], the new token included, of which *num_rows say something; out
// [rows, H]. With several splits: parts [rows, splits, H], of each split not divided by its mass; stats
// [rows, splits, HEADS], its largest score and its mass; arrived [rows, HEADS] of 0, which it is again afterwards.
// `together`: the kernel before is prefill_attention, both run at once, and a row may read what others write in this
// step: all that is there before this begins, and the wait is for the sake of what follows.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) decode(
    const Number* q, Kept* keys, Kept* values, const int* tables, const int* lengths, const int* num_rows,
    Number* out, float* parts, float2* stats, int* arrived, float scale, int stride, int table_width, int splits,
    int together) {
    __shared__ float sums[WARPS][HEAD];
    __shared__ float best[WARPS], mass[WARPS];
    __shared__ bool last;
    const int head = blockIdx.x % HEADS, split = blockIdx.x / HEADS, row = blockIdx.y;
    const int thread = threadIdx.x, column = head * HEAD + thread % 8 * 8;
    launch_dependents();
    // Lengths and tables are of before this step, and so are the keys and values of all tokens but the last.
    int length = lengths[row];  // past the rows anything
    asm volatile("" : "+r"(length));  // else it is asked for only when *num_rows is here
    const bool decodes = row < *num_rows;
    const int cached = decodes ? max(length - 1, 0) : 0;
    const int* table = tables + row * table_width;
    const int share = (cached + splits * AT_ONCE - 1) / (splits * AT_ONCE) * AT_ONCE;
    int start = split * share;
    const int end = min(start + share, cached);
    Pair ring[PASSES / 2];
    load<PASSES>(ring, keys, values, table, start, end, column);
    const size_t own = (size_t)slot_of(table, cached) * H + column;
    if (!together || (!decodes && row == 0)) wait_predecessor();  // of idle rows one is enough, and others make room
    if (!decodes) return;

    const bool newest = split == 0 && thread < 32;
    const Number* asked = q + (size_t)row * stride + column;
    const bool beside = stride != H;
    const uint4 words = load_words(asked);
    const Eight own_key = load_own(keys + own, asked + H, beside, newest);
    const Eight own_value = load_own(values + own, asked + 2 * H, beside, newest);
    float query[8];
    unpack(words, query);
#pragma unroll
    for (int i = 0; i < 8; ++i) query[i] *= scale * 1.4426950408889634f;
    Softmax softmax = {LARGEST_NEGATIVE, 0.0f, {}};
    if (newest) {
        const float own_score = score(own_key, query);
        if (thread < 8) {
            softmax.best = own_score;
            add(softmax, 1.0f, own_value);
            if (beside) {
                *(Eight*)(keys + own) = own_key;
                *(Eight*)(values + own) = own_value;
            }
        }
    }
    while (start < end) {
#pragma unroll
        for (int i = 0; i < PASSES / 2; ++i) {
            if (start < end) {
                attend(softmax, ring[i], query, start, end);
                if (start + AHEAD < end) load<2>(ring + i, keys, values, table, start + AHEAD, end, column);
                start += PAIR;
            }
        }
    }

    if (together) wait_predecessor();
    gather(softmax, sums, best, mass);
    __syncthreads();
    Number* to = out + (size_t)row * H + head * HEAD + thread;
    const size_t place = (size_t)row * splits;
    if (thread < HEAD) {
        const Part part = merge(sums, best, mass, thread);
        if (splits == 1) {
            *to = number(divide(part.sum, part.mass));
        } else {
            parts[(place + split) * H + head * HEAD + thread] = part.sum;
            if (thread == 0) stats[(place + split) * HEADS + head] = make_float2(part.best, part.mass);
        }
    }
    if (splits == 1) return;
    __syncthreads();
    int* counter = arrived + row * HEADS + head;
    if (thread == 0) last = arrive(counter) == splits - 1;
    __syncthreads();
    if (!last || thread >= HEAD) return;
    float2 found[MOST_SPLITS];  // the largest score and the mass
    float of[MOST_SPLITS];
#pragma unroll
    for (int i = 0; i < MOST_SPLITS; ++i) {
        const size_t from = place + min(i, splits - 1);
        found[i] = load_pair(stats + from * HEADS + head);
        of[i] = load_float(parts + from * H + head * HEAD + thread);
    }
    float peak = found[0].x, total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 1; i < MOST_SPLITS; ++i) peak = fmaxf(peak, found[i].x);
#pragma unroll
    for (int i = 0; i < MOST_SPLITS; ++i) {
        const float kept = i < splits ? power_of_two(found[i].x - peak) : 0.0f;
        total = fmaf(found[i].y, kept, total);
        sum = fmaf(of[i], kept, sum);
    }
    *to = number(divide(sum, total));
    if (thread == 0) *counter = 0;
}
