// A grid of blocks of CUDA threads on a CPU: each thread is a fibre with a stack of its own.
//
// A fibre runs until it has to wait, then another goes on: in a warp's collective the next lane, at a
// barrier of the block the next thread. So warps run as far apart as barriers let them, which shows
// where one is missing. Clusters are dealt out to as many system threads as there are cores; the blocks of
// one run together.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
using std::max;
using std::min;

inline thread_local uint3 threadIdx, blockIdx, gridDim;
constexpr int MAX_SHARED_BYTES = 227 << 10, MAX_CLUSTER_SIZE = 2;

namespace host {

inline bool copies_are_eager = false;

struct Gate {  // opens when all members have come, and is then shut again
    unsigned arrived = 0, times_open = 0;
};

struct Copy {  // of 16 bytes, or of zeros
    void* to;
    const void* from;

    void happen() const {
        if (from) std::memcpy(to, from, 16);
        else std::memset(to, 0, 16);
    }
};

struct Fibre {
    ucontext_t start;
    jmp_buf here;
    bool started, done;
    std::vector<Copy> copies;        // asynchronous ones that have not happened
    std::vector<size_t> group_ends;  // where the groups of copies end
};

struct Warp {
    Gate gate;
    void* offered[32];  // what each lane brings to a collective
    const void* kind;   // of the collective
};

struct Block {
    Gate gate;
    Gate consumers_gate;
    alignas(1024) unsigned char shared[MAX_SHARED_BYTES];
};

struct Cluster {
    std::unique_ptr<Block[]> blocks{new Block[MAX_CLUSTER_SIZE]};
    unsigned first = 0, num_threads;  // of its blocks, of a block
    Gate gate;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    std::vector<std::unique_ptr<char[]>> stacks;
    unsigned current = 0, num_done = 0;
    unsigned long waits = 0;  // since something last happened
    jmp_buf finished;
    std::function<void()> body;
};

inline thread_local Cluster* cluster;
inline Fibre& current() { return cluster->fibres[cluster->current]; }
inline Warp& current_warp() { return cluster->warps[cluster->current / 32]; }
inline unsigned rank() { return cluster->current / cluster->num_threads; }
inline Block& block() { return cluster->blocks[rank()]; }

inline char failure[200];  // of the last launch, empty if there is none

// End the cluster, and have the launch say why.
[[noreturn]] inline void fail(const char* what) {
    std::snprintf(failure, sizeof failure, "block %u, thread %u: %s", blockIdx.x, threadIdx.x, what);
    _longjmp(cluster->finished, 1);
}

[[noreturn]] inline void resume(unsigned next) {
    Fibre& fibre = cluster->fibres[next];
    cluster->current = next;
    threadIdx.x = next % cluster->num_threads;
    blockIdx.x = cluster->first + next / cluster->num_threads;
    if (fibre.started) _longjmp(fibre.here, 1);
    fibre.started = true;
    setcontext(&fibre.start);
    std::abort();
}

inline void pass_on_to(unsigned next) {
    while (cluster->fibres[next].done) next = (next + 1) % cluster->fibres.size();
    if (++cluster->waits > 1000 * cluster->fibres.size()) fail("all threads wait");
    if (_setjmp(current().here) == 0) resume(next);
}

inline void pass_on() { pass_on_to((cluster->current + 1) % cluster->fibres.size()); }

inline void open(Gate& gate) {
    gate.arrived = 0;
    ++gate.times_open;
    cluster->waits = 0;
}

inline void meet(Gate& gate, unsigned members) {
    const unsigned times = gate.times_open;
    if (++gate.arrived == members) return open(gate);
    while (gate.times_open == times) pass_on();
}

// Let `work` see what all lanes of the warp offer, once all are there.
template <class Offer, class Work>
void together(Offer& own, Work work) {
    static const char kind = 0;
    Warp& warp = current_warp();
    const unsigned lane = threadIdx.x % 32, times = warp.gate.times_open;
    if (warp.gate.arrived > 0 && warp.kind != &kind) fail("lanes of a warp do different things");
    warp.kind = &kind;
    warp.offered[lane] = &own;
    if (++warp.gate.arrived < 32) {
        while (warp.gate.times_open == times) pass_on_to(cluster->current / 32 * 32 + (lane + 1) % 32);
        return;
    }
    Offer* lanes[32];
    for (int l = 0; l < 32; ++l) lanes[l] = (Offer*)warp.offered[l];
    work(lanes);
    open(warp.gate);
}

inline void run_fibre() {
    cluster->body();
    Fibre& fibre = current();
    fibre.done = true;
    if (!fibre.copies.empty()) fail("ends before its copies");
    if (++cluster->num_done == cluster->fibres.size()) _longjmp(cluster->finished, 1);
    unsigned next = cluster->current;
    while (cluster->fibres[next].done) next = (next + 1) % cluster->fibres.size();
    resume(next);
}

inline void run_cluster(unsigned first) {
    constexpr size_t STACK_BYTES = 128 << 10;
    cluster->first = first;
    cluster->gate = {};
    for (unsigned n = 0; n < cluster->fibres.size() / cluster->num_threads; ++n)
        std::memset((void*)&cluster->blocks[n], 0, offsetof(Block, shared)),
            std::memset(cluster->blocks[n].shared, 0xff, MAX_SHARED_BYTES);  // not numbers
    cluster->num_done = 0;
    cluster->waits = 0;
    std::fill(cluster->warps.begin(), cluster->warps.end(), Warp{});
    for (size_t n = 0; n < cluster->fibres.size(); ++n) {
        Fibre& fibre = cluster->fibres[n];
        fibre.started = fibre.done = false;
        fibre.copies.clear();
        fibre.group_ends.clear();
        if (cluster->stacks.size() <= n) cluster->stacks.emplace_back(new char[STACK_BYTES]);
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = cluster->stacks[n].get();
        fibre.start.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fibre.start, run_fibre, 0);
    }
    if (_setjmp(cluster->finished) == 0) resume(0);
}

// Empty, or what went wrong.
template <class Params>
const char* run_grid(
    void (*kernel)(Params), const void* params, unsigned grid, unsigned threads, unsigned cluster_size) {
    failure[0] = 0;
    std::atomic<unsigned> next{0};
    auto work = [&] {
        Cluster own;
        own.num_threads = threads;
        own.fibres.resize(threads * cluster_size);
        own.warps.resize(threads * cluster_size / 32);
        Params aligned;
        std::memcpy((void*)&aligned, params, sizeof aligned);
        own.body = [&] { kernel(aligned); };
        cluster = &own;
        gridDim = {grid, 1, 1};
        for (unsigned n; (n = next++) < grid / cluster_size;) run_cluster(n * cluster_size);
    };
    std::vector<std::thread> workers;
    for (unsigned n = 0; n < std::min(grid, std::thread::hardware_concurrency()); ++n)
        workers.emplace_back(work);
    for (auto& worker : workers) worker.join();
    return failure;
}

}  // namespace host

inline unsigned char* dynamic_shared() { return host::block().shared; }

inline void __syncthreads() { host::meet(host::block().gate, host::cluster->num_threads); }

inline void __syncwarp() {
    int nothing = 0;
    host::together(nothing, [](int* const (&)[32]) {});
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    struct Lane { float value, result; int mask; } own = {value, 0.0f, mask};
    host::together(own, [](Lane* const (&lanes)[32]) {
        for (int l = 0; l < 32; ++l) lanes[l]->result = lanes[l ^ lanes[l]->mask]->value;
    });
    return own.result;
}
