// The three gradients for Hopper, where K = V: dk and dv share their loads.
//
// Legend: T tokens, D = 64 or 128 head dim; C = 64 tokens a chunk.
//
// dk = scan(v, do, q) and dv = scan(k, q, do) go backward in time over the same four tensors, so one block
// runs both: a producer warp copies a chunk of each, one warpgroup carries dk's state [D, D] in its
// registers and another dv's (hopper_consumer.cuh; with two halves where D = 128). dq = scan(do, v, k),
// forward in time, has blocks of its own: its warpgroups have 64 columns of k each, or take turns where
// that is all. Blocks of dk and dv take longer and come first in the grid, so that those of dq fill what
// they leave.
//
// Parameters are those of hopper_scan.cu with the scans of dq, dk, dv; c is as wide as b, and all scans
// give outputs.
#include "hopper_consumer.cuh"

constexpr int TENSORS = 4;
constexpr int NUM_THREADS = 2 * 128 + 128;  // of the last warpgroup one thread works

enum { DQ, DK, DV };  // scans
enum { A, B, C };     // of their maps

template <class E, int DIM, int STAGES>
struct HopperGrads {
    static constexpr int PANELS = DIM / 64, PAIR_PANELS = TENSORS * PANELS, LONE_PANELS = (TENSORS - 1) * PANELS;
    static constexpr bool WIDE = DIM == 128;
    static constexpr int BUFFERS = WIDE ? 1 : 2;  // of scores and outputs, that a consumer of a pair has
    static constexpr int RING = STAGES * PAIR_PANELS;
    // dq takes what a wide pair leaves of the ring as buffers, else as more stages.
    static constexpr int LONE_STAGES = WIDE ? STAGES : RING / LONE_PANELS, LONE_RING = LONE_STAGES * LONE_PANELS;
    static_assert(!WIDE || RING - LONE_RING >= 4, "scores of two consumers, twice");

    struct Shared {
        Panel ring[RING];
        Panel scores[2 * BUFFERS], out[2 * BUFFERS];
        Own own[2];
        Barrier full[LONE_STAGES], empty[LONE_STAGES];
    };

    const HopperScanParams& all;
    const bool pair;  // dk and dv, else dq
    Shared& shared;

    __device__ void run(const Unit& unit) {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < LONE_STAGES; ++stage) {
                shared.full[stage].init(1);
                shared.empty[stage].init(2 * 4);  // a lane of each warp
            }
            fence_barriers();
        }
        __syncthreads();  // protects the barriers: all are there
        const Walk walk(all.scan, unit, pair);
        const Course course(unit, walk.chunks);
        const int group = uniform(threadIdx.x / 128);
        if (group < 2) {
            registers_up<240>();
            shared.own[group].set(walk, walk.decay.all_writes(), group);
            consume(group, course);
        } else {
            registers_down<24>();
            if (threadIdx.x % 128 == 0) produce(walk);
        }
    }

    // In a stage those tensors come first that the state is made of: do, q, v, k or v, k, do.
    __device__ void consume(int group, const Course& course) {
        Panel* ring = shared.ring;
        Places at = {nullptr, ring, nullptr, ring, shared.scores + group * BUFFERS, shared.out + group * BUFFERS,
                     shared.own[group], shared.full, shared.empty, 2 * 128};
        if (pair) {
            at.a = ring + (2 + group) * PANELS;
            at.b = ring + group * PANELS;
            at.c = ring + (1 - group) * PANELS;
            Consumer<E, DIM, DIM, PANELS, STAGES, PAIR_PANELS, false, false>(
                all, course, at, DK + group, 0, group).run();
            return;
        }
        at.a = ring + 2 * PANELS;
        at.c = ring + PANELS + (WIDE ? group : 0);
        if constexpr (WIDE) {
            at.scores = ring + LONE_RING + group * 2;
            at.out = group == 0 ? shared.scores : shared.out;
        }
        Consumer<E, DIM, DIM, 1, LONE_STAGES, LONE_PANELS, false, !WIDE>(
            all, course, at, DQ, WIDE ? group * 64 : 0, group).run();
    }

    __device__ void produce(const Walk& walk) const {
        const auto& maps = all.maps;
        if (pair) {
            const TensorMap* tensors[] = {&maps[DK][B], &maps[DK][C], &maps[DK][A], &maps[DV][A]};
            fill<STAGES>(walk, tensors);
        } else {
            const TensorMap* tensors[] = {&maps[DQ][B], &maps[DQ][C], &maps[DQ][A]};
            fill<LONE_STAGES>(walk, tensors);
        }
    }

    // Keep the ring filled. Chunks that only update the state want the first two tensors alone.
    template <int LENGTH, int COUNT>
    __device__ void fill(const Walk& walk, const TensorMap* const (&tensors)[COUNT]) const {
        for (int n = 0; n < walk.chunks.count; ++n) {
            const int stage = n % LENGTH, round = n / LENGTH, token = walk.chunks.token(n, CHUNK);
            const int count = n >= walk.unit.num_warm ? COUNT : 2;
            if (round > 0) shared.empty[stage].wait((round - 1) % 2);  // protects the stage
            Barrier& full = shared.full[stage];
            full.arrive_and_expect(count * PANELS * PANEL_BYTES);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (i >= count) break;
                for (int p = 0; p < PANELS; ++p)
                    copy_box(shared.ring[(stage * COUNT + i) * PANELS + p], *tensors[i], full, p * 64,
                             token, walk.unit.head, walk.unit.batch);
            }
        }
    }
};

using Instance = HopperGrads<TEMPLATE_ARGUMENTS>;
static_assert(sizeof(Instance::Shared) == SHARED_BYTES, "tiles.py counts them too");

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
hopper_grads(const __grid_constant__ HopperScanParams params) {
    const int num_rows = gridDim.x / 2, block = blockIdx.x;
    const bool pair = block < num_rows;
    const Unit unit = Task::unit_of(params.scan, pair ? block : block - num_rows);
    Instance{params, pair, *(Instance::Shared*)dynamic_shared()}.run(unit);
}
