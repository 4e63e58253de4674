// The scan of scan.cu for Hopper: copies, products and stores run apart from each other.
//
// Legend: T tokens, D head dim; C = 64 tokens a chunk. Equation, work units and parameters are those of
// scan.cu, which is this kernel's plain twin: it runs what this one can't.
//
// A producer warp keeps a ring of chunks filled by the copy engine (TMA). One or two warpgroups consume
// it together (hopper_consumer.cuh), each with its own 64 columns of c. Each stage has a barrier `full`
// (the copies have landed) and a barrier `empty` (every consumer is done). Two blocks with one consumer
// each, and all columns of c between them, may be a cluster: each copies half of a and of b to both, so
// that these leave L2 once.
#include "hopper_consumer.cuh"

template <class E, int B_DIM, int CONSUMERS, int STAGES, bool SPLIT>
struct HopperScan {
    using Shared = HopperShared<B_DIM, CONSUMERS, STAGES, SPLIT>;
    static constexpr int PANELS = Shared::PANELS, STAGE_PANELS = Shared::STAGE_PANELS, WIDTH = CONSUMERS * 64;
    // One more warp, or a warpgroup where groups share registers unequally, of which one thread works.
    static constexpr int NUM_THREADS = CONSUMERS == 1 ? 128 + 32 : 2 * 128 + 128;
    static constexpr int RESERVED_BYTES = 1024, SM_BYTES = 228 << 10;  // a block, a multiprocessor
    static constexpr int BLOCKS_PER_SM = 2 * (SHARED_BYTES + RESERVED_BYTES) <= SM_BYTES ? 2 : 1;

    const HopperScanParams& all;
    const int index;   // of the scan
    const int column;  // of c, this block's first
    Shared& shared;

    __device__ void run(const Unit& unit) {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                shared.full[stage].init(1);
                shared.empty[stage].init(CLUSTER_SIZE * CONSUMERS * 4);  // a lane of each warp
            }
            fence_barriers();
        }
        if constexpr (CLUSTER_SIZE == 1)
            __syncthreads();  // protects the barriers: all are there
        else
            cluster_sync();  // protects the barriers of both blocks
        const Walk walk(all.scan, unit, index >= all.scan.first_back);
        const Course course(unit, walk.chunks);
        const int group = uniform(threadIdx.x / 128);
        if (group < CONSUMERS) {
            if constexpr (CONSUMERS == 2) registers_up<240>();
            shared.common.set(walk, SPLIT ? 1.0f : walk.decay.all_writes(), CONSUMERS * 128);
            Consumer<E, B_DIM, CONSUMERS, STAGES, SPLIT>(
                all, course, shared, index, column + group * 64, group).run();
        } else {
            if constexpr (CONSUMERS == 2) registers_down<24>();
            if (threadIdx.x % 128 == 0) produce(walk);
        }
        if constexpr (CLUSTER_SIZE > 1) cluster_sync();  // barriers outlive the other block's arrivals
    }

    __device__ void produce(const Walk& walk) const {
        const TensorMap(&maps)[4] = all.maps[index];
        const int head = walk.unit.head, batch = walk.unit.batch;
        for (int n = 0; n < walk.chunks.count; ++n) {
            const int stage = n % STAGES, round = n / STAGES, token = walk.chunks.token(n, CHUNK);
            if (round > 0) shared.empty[stage].wait((round - 1) % 2);  // protects the stage
            Barrier& full = shared.full[stage];
            Panel* to = shared.ring + stage * STAGE_PANELS;
            const bool reads = all.scan.with_output && n >= walk.unit.num_warm;
            full.arrive_and_expect((STAGE_PANELS - (reads ? 0 : PANELS)) * PANEL_BYTES);
            for (int p = 0; p < PANELS; ++p) copy_common(*to++, maps[1], full, p, token, head, batch);
            for (int p = 0; p < CONSUMERS; ++p)
                copy_box(*to++, maps[2], full, column + p * 64, token, head, batch);
            if (!reads) continue;
            for (int p = 0; p < PANELS; ++p) copy_common(*to++, maps[0], full, p, token, head, batch);
        }
    }

    // A panel that both blocks of a cluster want: one of them copies it to both.
    __device__ void copy_common(Panel& to, const TensorMap& map, Barrier& full, int panel, int token, int head,
                                int batch) const {
        if constexpr (CLUSTER_SIZE == 1)
            copy_box(to, map, full, panel * 64, token, head, batch);
        else if (panel % 2 == cluster_rank())
            copy_box_to_both(to, map, full, panel * 64, token, head, batch);
    }
};

using Instance = HopperScan<TEMPLATE_ARGUMENTS>;
static_assert(sizeof(Instance::Shared) == SHARED_BYTES, "tiles.py counts them too");

extern "C" __global__ void __launch_bounds__(Instance::NUM_THREADS, Instance::BLOCKS_PER_SM)
#if CLUSTER_SIZE > 1
__cluster_dims__(CLUSTER_SIZE)
#endif
hopper_scan(const __grid_constant__ HopperScanParams params) {
    const Task task = Task::of(params.scan, blockIdx.x, Instance::WIDTH);
    Instance{params, task.index, task.column, *(Instance::Shared*)dynamic_shared()}.run(task.unit);
}
