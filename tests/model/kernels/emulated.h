// service/model/kernels/cuda/link.cuh for a processor, in its place: blocks run one after the other, the threads of one
// as coroutines that change over where they would wait. bf16 only. Read by test_cuda.py.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
static struct { int x, y; } threadIdx, blockIdx;

// --- Coroutines

struct Thread {
    ucontext_t context;
    bool done;
};

static ucontext_t scheduler;
static std::vector<Thread> threads;
static std::function<void()> kernel;
static int current, idle;  // turns since something changed
static bool stuck;

static void change_over() {
    ++idle;
    swapcontext(&threads[current].context, &scheduler);
}

static void run_thread() {
    kernel();
    threads[current].done = true;
    idle = 0;
}

// --- link.cuh

typedef unsigned short Number;
typedef unsigned long long Barrier;  // counts the copies that have arrived

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned bytes;
    Barrier* barrier;
};

struct Late {  // memory that the kernel before writes
    unsigned char *seen, *written;
    size_t bytes;
};

static std::deque<Copy> copies;
static std::vector<Late> late;
static std::vector<unsigned char> tile;
static bool waited;

static void launch_dependents() {}
static void wait_predecessor() {
    if (!waited)
        for (auto& each : late) memcpy(each.seen, each.written, each.bytes);
    waited = true;
}
static unsigned char* dynamic_shared() { return tile.data(); }
static void init_barrier(Barrier* barrier) { *barrier = 0; }
static void fence_barriers() {}
static void ask(void* to, const void* from, unsigned bytes, Barrier* barrier) {
    if (bytes % 16 || (uintptr_t)from % 16) stuck = true;
    copies.push_back({(unsigned char*)to, (const unsigned char*)from, bytes, barrier});
}
static void await(Barrier* barrier, unsigned parity) {
    while (*barrier % 2 == parity) change_over();
    idle = 0;
}
static void arrive_one() {
    const Copy copy = copies.front();
    copies.pop_front();
    memcpy(copy.to, copy.from, copy.bytes);
    ++*copy.barrier;
    idle = 0;
}

static uint4 load_words(const void* at) { return *(const uint4*)at; }
static float2 load_pair(const float2* at) { return *at; }
static float load_float(const float* at) { return *at; }

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
static std::vector<float> given;
static float from_lane(float v, int offset) {
    Meeting& meeting = warp_meetings[threadIdx.x / 32];
    given[threadIdx.x] = v;
    meet(meeting, 32);
    const float found = given[threadIdx.x ^ offset];
    meet(meeting, 32);
    return found;
}

// --- A launch

// 0; or 1 where threads wait for what never comes, or a copy is not of whole 16 bytes.
static int launch(int grid_x, int grid_y, int count, int shared, std::function<void()> call) {
    constexpr size_t STACK = 1 << 16;
    std::unique_ptr<unsigned char[]> stacks(new unsigned char[count * STACK]);
    kernel = call;
    stuck = false;
    for (int block = 0; block < grid_x * grid_y && !stuck; ++block) {
        blockIdx = {block % grid_x, block / grid_x};
        threads = std::vector<Thread>(count);
        block_meeting = {};
        warp_meetings = std::vector<Meeting>(count / 32);
        given = std::vector<float>(count);
        tile = std::vector<unsigned char>(shared + 1, 0xff);  // no numbers
        for (auto& each : late) memset(each.seen, 0xff, each.bytes);
        waited = false;
        for (int i = 0; i < count; ++i) {
            getcontext(&threads[i].context);
            threads[i].context.uc_stack.ss_sp = stacks.get() + i * STACK;
            threads[i].context.uc_stack.ss_size = STACK;
            threads[i].context.uc_link = &scheduler;
            makecontext(&threads[i].context, run_thread, 0);
        }
        idle = 0;
        for (int open = count; open && !stuck;) {
            open = 0;
            for (current = 0; current < count; ++current) {
                if (threads[current].done) continue;
                ++open;
                threadIdx = {current, 0};
                swapcontext(&scheduler, &threads[current].context);
            }
            if (!copies.empty()) arrive_one();
            if (idle > 4 * count) stuck = true;
        }
        if (!waited) stuck = true;  // the next kernel relies on it
        copies.clear();
    }
    late.clear();
    return stuck;
}

template <typename... Types, size_t... Numbers>
static std::function<void()> call_with(void (*entry)(Types...), void** arguments, std::index_sequence<Numbers...>) {
    return [=] { entry(*(Types*)arguments[Numbers]...); };
}

template <typename... Types>
static int run(void (*entry)(Types...), int grid_x, int grid_y, int shared, void** arguments) {
    return launch(grid_x, grid_y, 256, shared, call_with(entry, arguments, std::index_sequence_for<Types...>()));
}

extern "C" void expect_late(void* seen, void* written, size_t bytes) {
    late.push_back({(unsigned char*)seen, (unsigned char*)written, bytes});
}
