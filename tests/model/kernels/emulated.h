// service/model/kernels/cuda/link.cuh for a processor, in its place: blocks run one after the other, the threads of one
// as coroutines that change over where they would wait. bf16 only. Read by emulating.py.

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
static struct { int x, y, z; } threadIdx, blockIdx;

// --- Coroutines

// A context is only where a thread begins: to change over by one costs system calls.
struct Thread {
    ucontext_t context;
    jmp_buf place;
    bool begun, done;
};

static jmp_buf scheduler;
static std::vector<Thread> threads;
static std::function<void()> kernel;
static int current, idle;  // turns since something changed
static bool stuck;

static void change_over() {
    ++idle;
    if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

static void run_thread() {
    kernel();
    threads[current].done = true;
    idle = 0;
    _longjmp(scheduler, 1);
}

// Until it changes over or is done.
static __attribute__((noinline)) void go_on(Thread& thread) {
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.context);
}

// --- link.cuh

typedef unsigned short Number;
typedef unsigned long long Barrier;  // counts the copies that have arrived

struct Copy {
    std::function<void()> make;
    Barrier* barrier;
};

struct Late {  // memory that the kernel before writes
    unsigned char *seen, *written;
    size_t bytes;
};

static std::vector<Copy> copies;
static std::vector<Late> late;
static std::vector<unsigned char> tile;
static bool waited;

static void launch_dependents() {}
static void wait_predecessor() {
    if (!waited)
        for (auto& each : late) memcpy(each.seen, each.written, each.bytes);
    waited = true;
}
static unsigned char* dynamic_shared() { return (unsigned char*)(((uintptr_t)tile.data() + 1023) / 1024 * 1024); }
static void init_barrier(Barrier* barrier) { *barrier = 0; }
static void fence_barriers() {}
static void ask(void* to, const void* from, unsigned bytes, Barrier* barrier) {
    if (bytes % 16 || (uintptr_t)from % 16) stuck = true;
    copies.push_back({[=] { memcpy(to, from, bytes); }, barrier});
}
static void await(Barrier* barrier, unsigned parity) {
    while (*barrier % 2 == parity) change_over();
    idle = 0;
}
// The last first: nothing says that they come in their order.
static void arrive_one() {
    const Copy copy = copies.back();
    copies.pop_back();
    copy.make();
    ++*copy.barrier;
    idle = 0;
}

// A thread's own copies, which are made when it waits for them.
struct Asked {
    void* to;
    uint4 words;
};
static std::vector<std::vector<std::vector<Asked>>> asked;  // by thread, groups of which the last is open

static void ask_words(void* to, const void* from) { asked[current].back().push_back({to, *(const uint4*)from}); }
static void close_group() { asked[current].emplace_back(); }
template <int LATER>
static void await_groups() {
    auto& groups = asked[current];
    for (; groups.size() > LATER + 1; groups.erase(groups.begin()))
        for (const auto& each : groups.front()) *(uint4*)each.to = each.words;
}

static uint4 load_words(const void* at) { return *(const uint4*)at; }
static uint2 load_two_words(const void* at) { return *(const uint2*)at; }
static uint4 load_words_if(const void* at, bool there) { return there ? *(const uint4*)at : uint4{}; }
static uint2 load_two_words_if(const void* at, bool there) { return there ? *(const uint2*)at : uint2{}; }
static float2 load_pair(const float2* at) { return *at; }
static float load_float(const float* at) { return *at; }

static int arrive(int* counter) { return (*counter)++; }

static float bits_to_float(unsigned bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
static float low(unsigned word) { return bits_to_float(word << 16); }
static float high(unsigned word) { return bits_to_float(word & 0xffff0000u); }
static Number number(float v) {
    unsigned bits;
    memcpy(&bits, &v, 4);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned two_numbers(float first, float second) { return number(first) | (unsigned)number(second) << 16; }
static float from_e4m3(unsigned code) {
    const int exponent = code >> 3 & 15, rest = code & 7;
    if (exponent == 15 && rest == 7) return NAN;
    const float v = exponent ? ldexpf(8 + rest, exponent - 10) : ldexpf(rest, -9);
    return code & 0x80 ? -v : v;
}
static unsigned to_e4m3(float v) {
    const unsigned sign = signbit(v) ? 0x80 : 0;
    const float size = fminf(fabsf(v), 448.0f);
    if (v != v) return 0x7f;
    const int exponent = size < 0x1p-6f ? -6 : ilogbf(size);
    // What rounds up to the next power of two carries over into the exponent.
    const int eighths = (int)nearbyintf(ldexpf(size, 3 - exponent));
    return sign | (eighths + (exponent + 6) * 8);
}
static float2 widen(unsigned short two) { return {from_e4m3(two & 0xff), from_e4m3(two >> 8)}; }
static unsigned short narrow(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
static float power_of_two(float x) { return exp2f(x); }
static float divide(float x, float y) { return x / y; }
static float inverse_root(float x) { return 1.0f / sqrtf(x); }

// All `size` threads from `first` on come here before one goes on. In two halves, so that none is a round ahead.
struct Meeting {
    int come[2] = {0, 0};
    unsigned round = 0;
};
static Meeting block_meeting;
static std::vector<Meeting> warp_meetings;
static void meet(Meeting& meeting, int size) {
    const unsigned round = meeting.round;
    if (++meeting.come[round % 2] == size) {
        meeting.come[round % 2] = 0;
        ++meeting.round;
        idle = 0;
    }
    while (meeting.round == round) change_over();
}
static void __syncthreads() { meet(block_meeting, threads.size()); }
static void __syncwarp() { meet(warp_meetings[threadIdx.x / 32], 32); }

// What each thread gives its warp, and of its warp what all gave. In two halves: none is two rounds ahead.
struct Words {
    unsigned of[6];
};
static std::vector<Words> given[2];
static const Words* exchange(const Words& words) {
    Meeting& meeting = warp_meetings[threadIdx.x / 32];
    std::vector<Words>& half = given[meeting.round % 2];
    half[threadIdx.x] = words;
    meet(meeting, 32);
    return &half[threadIdx.x / 32 * 32];
}
static float from_lane(float v, int offset) {
    Words words;
    memcpy(words.of, &v, 4);
    return bits_to_float(exchange(words)[threadIdx.x % 32 ^ offset].of[0]);
}
static void multiply(
    float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const Words* lanes = exchange({a0, a1, a2, a3, b0, b1});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int below = i / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;  // 8 rows further down
        for (int k = 0; k < 16; k += 2) {
            const unsigned a = lanes[row * 4 + k % 8 / 2].of[k / 8 * 2 + below];
            const unsigned b = lanes[column * 4 + k % 8 / 2].of[4 + k / 8];
            sums[i] += low(a) * low(b) + high(a) * high(b);
        }
    }
}

// What is read there is read when the product begins, and again when it is waited for: it must not have changed.
struct Tiles {
    const unsigned char* at;
    unsigned pitch, across;
};
struct Product {
    std::function<void(float (*)[4])> add;
    float (*sums)[4];
    std::vector<float> first;
};
static std::vector<std::vector<std::vector<Product>>> begun;  // by thread, groups of which the last is open
static std::vector<Meeting> warpgroup_meetings;
template <int ACROSS>
static Tiles tiles_at(const void* at, unsigned pitch) {
    return {(const unsigned char*)at, pitch, ACROSS};
}
static Tiles further(Tiles tiles, unsigned bytes) { return {tiles.at + bytes, tiles.pitch, tiles.across}; }
static unsigned two_of(Tiles tiles, int row, int k) {
    const uintptr_t at = (uintptr_t)tiles.at + row / 8 * tiles.pitch + row % 8 * tiles.across + k * 2;
    return *(const unsigned*)(at ^ (at >> 7) % (tiles.across / 16) << 4);
}
// Made by emulating.py.
struct Tiled {
    const Number* at;
    int rows, columns, beside;
};
static void expect_tiled(const Tiled*) {}
static void ask_tiles(void* to, const Tiled* matrix, int row, int tile, unsigned bytes, Barrier* barrier) {
    const Tiled from = *matrix;
    if (bytes != 64 * 128 * from.beside || (uintptr_t)to % 1024) stuck = true;
    std::vector<uint4> pieces;  // as they are now: whoever asks must have waited for them
    for (int i = 0; i < 64 * 8 * from.beside; ++i) {
        const int at = row + i / 8 % 64, column = (tile + i / 512) * 64 + i % 8 * 8;
        pieces.push_back(at < from.rows ? *(const uint4*)(from.at + (size_t)at * from.columns + column) : uint4{});
    }
    const auto make = [=] {
        for (size_t i = 0; i < pieces.size(); ++i)
            memcpy((unsigned char*)to + (i ^ i / 8 % 8) * 16, &pieces[i], 16);
    };
    copies.push_back({make, barrier});
}
static void meet_warpgroup(int number) { meet(warpgroup_meetings[number], 128); }
static void begin_products() {}
static void close_products() { begun[current].emplace_back(); }
template <int LATER, int EIGHTHS>
static void await_products(float (&)[EIGHTHS][4]) {
    auto& groups = begun[current];
    for (; groups.size() > LATER + 1; groups.erase(groups.begin())) {
        for (const auto& each : groups.front()) {
            std::vector<float> again(each.first.size());
            each.add((float (*)[4])again.data());
            if (memcmp(again.data(), each.first.data(), 4 * again.size())) stuck = true;
            for (size_t i = 0; i < again.size(); ++i) each.sums[i / 4][i % 4] += again[i];
        }
    }
}
template <int EIGHTHS>
static void multiply_tiles(float (&sums)[EIGHTHS][4], Tiles a, Tiles b) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Product product = {
        [=](float (*to)[4]) {
            float left[2][16];
            for (int i = 0; i < 32; i += 2) {
                const unsigned two = two_of(a, warp * 16 + i / 16 * 8 + lane / 4, i % 16);
                left[i / 16][i % 16] = low(two), left[i / 16][i % 16 + 1] = high(two);
            }
            for (int j = 0; j < 2 * EIGHTHS; ++j) {
                for (int k = 0; k < 16; k += 2) {
                    const unsigned two = two_of(b, j / 2 * 8 + lane % 4 * 2 + j % 2, k);
                    for (int half = 0; half < 2; ++half)
                        to[j / 2][half * 2 + j % 2] += left[half][k] * low(two) + left[half][k + 1] * high(two);
                }
            }
        },
        sums, std::vector<float>(4 * EIGHTHS)};
    product.add((float (*)[4])product.first.data());
    begun[current].back().push_back(std::move(product));
}

// --- A launch

// 0; or 1 where threads wait for what never comes, or a copy is not of whole 16 bytes.
static int launch(int grid_x, int grid_y, int grid_z, int count, int shared, std::function<void()> call) {
    constexpr size_t STACK = 1 << 16;
    std::unique_ptr<unsigned char[]> stacks(new unsigned char[count * STACK]);
    kernel = call;
    stuck = false;
    bool some_waited = false;
    for (int block = 0; block < grid_x * grid_y * grid_z && !stuck; ++block) {
        blockIdx = {block % grid_x, block / grid_x % grid_y, block / (grid_x * grid_y)};
        threads = std::vector<Thread>(count);
        block_meeting = {};
        warp_meetings = std::vector<Meeting>(count / 32);
        given[0] = given[1] = std::vector<Words>(count);
        asked.assign(count, {{}});
        begun.assign(count, {{}});
        warpgroup_meetings = std::vector<Meeting>((count + 127) / 128);
        tile = std::vector<unsigned char>(shared + 1024, 0xff);  // no numbers
        for (auto& each : late) memset(each.seen, 0xff, each.bytes);
        waited = false;
        for (int i = 0; i < count; ++i) {
            getcontext(&threads[i].context);
            threads[i].context.uc_stack.ss_sp = stacks.get() + i * STACK;
            threads[i].context.uc_stack.ss_size = STACK;
            makecontext(&threads[i].context, run_thread, 0);
        }
        idle = 0;
        for (int open = count; open && !stuck;) {
            open = 0;
            for (current = 0; current < count; ++current) {
                if (threads[current].done) continue;
                ++open;
                threadIdx = {current, 0, 0};
                go_on(threads[current]);
            }
            if (!copies.empty()) arrive_one();
            if (idle > 4 * count) stuck = true;
        }
        if (!waited && !late.empty()) stuck = true;
        some_waited |= waited;
        copies.clear();
    }
    late.clear();
    return stuck || !some_waited;  // the next kernel relies on it
}

template <typename... Types, size_t... Numbers>
static std::function<void()> call_with(void (*entry)(Types...), void** arguments, std::index_sequence<Numbers...>) {
    return [=] { entry(*(Types*)arguments[Numbers]...); };
}

template <typename... Types>
static int run(
    void (*entry)(Types...), int grid_x, int grid_y, int grid_z, int count, int shared, void** arguments) {
    const auto call = call_with(entry, arguments, std::index_sequence_for<Types...>());
    return launch(grid_x, grid_y, grid_z, count, shared, call);
}

extern "C" void expect_late(void* seen, void* written, size_t bytes) {
    late.push_back({(unsigned char*)seen, (unsigned char*)written, bytes});
}
