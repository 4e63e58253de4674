// The three gradients for Hopper, where K = V = 128: dk and dv share their loads.
//
// Legend: T tokens; C = 64 tokens a chunk.
//
// dk = scan(v, do, q) and dv = scan(k, q, do) go backward in time over the same four tensors, so one block
// runs both: a producer warp copies a chunk of each, one warpgroup carries dk's state [V, K] in its
// registers, in two halves, and another dv's (hopper_consumer.cuh). dq = scan(do, v, k), forward in time,
// has blocks of its own, whose warpgroups have 64 columns of k each. Blocks of dk and dv take longer and
// come first in the grid, so that those of dq fill what they leave; mixed, they take a seventh more time.
//
// Parameters are those of hopper_scan.cu with the scans of dq, dk, dv; c is as wide as b, and all scans
// give outputs.
#include "hopper_consumer.cuh"

constexpr int TENSORS = 4, DIM = 128;
constexpr int NUM_THREADS = 2 * 128 + 128;  // of the last warpgroup one thread works

enum { DQ, DK, DV };  // scans
enum { A, B, C };     // of their maps

template <class E, int STAGES>
struct HopperGrads {
    static constexpr int PANELS = DIM / 64, PAIR_PANELS = TENSORS * PANELS, LONE_PANELS = (TENSORS - 1) * PANELS;
    static constexpr int RING = STAGES * PAIR_PANELS, LONE_RING = STAGES * LONE_PANELS;
    static_assert(RING - LONE_RING >= 4, "what dq leaves of the ring holds scores of two consumers, twice");

    struct Shared {
        Panel ring[RING];
        Panel scores[2], out[2];  // one of each for a consumer of a pair, whose registers are the state's
        Own own[2];
        Barrier full[STAGES], empty[STAGES];
    };

    const HopperScanParams& all;
    const bool pair;  // dk and dv, else dq
    Shared& shared;

    __device__ void run(const Unit& unit) {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
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
        Places at = {nullptr, ring, nullptr, ring, shared.scores + group, shared.out + group,
                     shared.own[group], shared.full, shared.empty, 2 * 128};
        if (pair) {
            at.a = ring + (2 + group) * PANELS;
            at.b = ring + group * PANELS;
            at.c = ring + (1 - group) * PANELS;
            Consumer<E, DIM, DIM, PANELS, STAGES, PAIR_PANELS, false>(
                all, course, at, DK + group, 0, group).run();
            return;
        }
        at.a = ring + 2 * PANELS;
        at.c = ring + PANELS + group;
        at.scores = ring + LONE_RING + group * 2;
        at.out = group == 0 ? shared.scores : shared.out;
        Consumer<E, DIM, DIM, 1, STAGES, LONE_PANELS, false>(
            all, course, at, DQ, group * 64, group).run();
    }

    __device__ void produce(const Walk& walk) const {
        const auto& maps = all.maps;
        if (pair) {
            const TensorMap* tensors[] = {&maps[DK][B], &maps[DK][C], &maps[DK][A], &maps[DV][A]};
            fill(walk, tensors);
        } else {
            const TensorMap* tensors[] = {&maps[DQ][B], &maps[DQ][C], &maps[DQ][A]};
            fill(walk, tensors);
        }
    }

    // Keep the ring filled. Chunks that only update the state want the first two tensors alone.
    template <int COUNT>
    __device__ void fill(const Walk& walk, const TensorMap* const (&tensors)[COUNT]) const {
        for (int n = 0; n < walk.chunks.count; ++n) {
            const int stage = n % STAGES, round = n / STAGES, token = walk.chunks.token(n, CHUNK);
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
