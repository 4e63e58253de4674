// The scan of scan.cu for Hopper: copies, products and stores run apart from each other.
//
// Legend: T tokens, D head dim; C = 64 tokens a chunk. Equation, work units and parameters are those of
// scan.cu, which is this kernel's plain twin: it runs what this one can't.
//
// A producer warp keeps a ring of chunks filled by the copy engine (TMA). One or two warpgroups consume
// it, each with its own 64 columns of c and, in registers, its own 64 rows of the state [dim of c, dim
// of b]. Each stage has a barrier `full` (the copies have landed) and a barrier `empty` (every consumer
// is done). In a chunk a consumer starts the products that the state waits for, then the next chunk's
// scores, which wait for copies alone: the tensor cores work while scores are weighted.
//     scores [from, to] = B A^T (of the chunk before)
//     O^T = S A^T,   O^T += C^T scores,   S += (C weighted)^T B
// The state and weighted c are left operands from registers; a, b, c are read as the copy engine put them.
//
// 16-bit inputs. Scores, state and weighted c are rounded once; with SPLIT each enters as a high and a low
// half, and a chunk's share is summed up apart before it joins the state: products truncate their sums.
#include "halves.cuh"
#include "hopper.cuh"
#include "tile.cuh"
#include "weights.cuh"
#include "work.cuh"

struct HopperScanParams {
    TensorMap maps[3][4];  // of a, b, c, out of each scan
    ScanParams scan;
};

constexpr int PANEL_BYTES = CHUNK * 64 * 2;  // 64 columns of a chunk: one box of the copy engine

template <class E, int B_DIM, int CONSUMERS, int STAGES, bool SPLIT>
struct HopperScan {
    static constexpr int PANELS = B_DIM / 64;
    static constexpr int WIDTH = CONSUMERS * 64;
    // One more warp, or a warpgroup where groups share registers unequally, of which one thread works.
    static constexpr int NUM_THREADS = CONSUMERS == 1 ? 128 + 32 : 2 * 128 + 128;
    static constexpr int BLOCKS_PER_SM = B_DIM == 64 && CONSUMERS == 1 ? 2 : 1;

    using Panel = unsigned char[PANEL_BYTES];
    struct Shared {
        Panel a[STAGES][PANELS], b[STAGES][PANELS], c[STAGES][CONSUMERS];
        Panel scores[CONSUMERS][1 + SPLIT], out[CONSUMERS];
        Mask mask;
        EdgeWeights edge[CONSUMERS];
        Barrier full[STAGES], empty[STAGES];
    };

    const HopperScanParams& all;
    const ScanParams& params;
    const Unit unit;
    const int index;   // of the scan
    const int column;  // of c, this block's first
    Shared& shared;
    const Chunks chunks;
    const bool back = index >= params.first_back;  // in time
    const Decay decay = {params.log_decay[unit.head], params.scale, back};
    const int num_warm = uniform(unit.num_warm), num_whole = uniform(unit.num_tokens / CHUNK);
    const int num_silent = num_warm + (params.with_output ? 0 : num_whole);

    __device__ void run() {
        shared.mask.set(decay, threadIdx.x, NUM_THREADS);
        for (EdgeWeights& edge : shared.edge)
            edge.set(decay, CHUNK, SPLIT ? 1.0f : decay.all_writes(), threadIdx.x, NUM_THREADS);
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                shared.full[stage].init(1);
                shared.empty[stage].init(CONSUMERS * 4);  // a lane of each warp
            }
            fence_barriers();
        }
        __syncthreads();  // protects weights and barriers: all are there
        const int group = uniform(threadIdx.x / 128);
        if (group < CONSUMERS) {
            if constexpr (CONSUMERS == 2) registers_up<240>();
            Consumer(*this, group).run();
        } else {
            if constexpr (CONSUMERS == 2) registers_down<24>();
            if (threadIdx.x % 128 == 0) produce();
        }
    }

    __device__ bool reads(int n) const { return params.with_output && n >= unit.num_warm; }

    __device__ void produce() const {
        const TensorMap(&maps)[4] = all.maps[index];
        for (int n = 0; n < chunks.count; ++n) {
            const int stage = n % STAGES, round = n / STAGES, token = chunks.token(n, CHUNK);
            if (round > 0) shared.empty[stage].wait((round - 1) % 2);  // protects the stage
            Barrier& full = shared.full[stage];
            full.arrive_and_expect((PANELS * (1 + reads(n)) + CONSUMERS) * PANEL_BYTES);
            for (int p = 0; p < PANELS; ++p) {
                copy_box(shared.b[stage][p], maps[1], full, p * 64, token, unit.head, unit.batch);
                if (reads(n))
                    copy_box(shared.a[stage][p], maps[0], full, p * 64, token, unit.head, unit.batch);
            }
            for (int p = 0; p < CONSUMERS; ++p)
                copy_box(shared.c[stage][p], maps[2], full, column + p * 64, token, unit.head, unit.batch);
        }
    }

    struct Consumer {
        HopperScan& scan;
        const ScanParams& params;
        Shared& shared;
        const Unit& unit;
        const Decay& decay;
        const int group;
        const int column;  // of c, this group's first
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int row = warp * 16 + lane / 4, pair = lane % 4 * 2;  // of a sum's first element
        float state[B_DIM / 2];  // [64, B_DIM]: row c, column b
        float scores[32];        // [64, 64]: row from, column to
        float sums[32];          // [64, 64]: row c, column token

        __device__ Consumer(HopperScan& scan, int group)
            : scan(scan), params(scan.params), shared(scan.shared), unit(scan.unit),
              decay(scan.decay), group(group), column(scan.column + group * 64) {}

        __device__ void run() {
            const int last = scan.num_warm + scan.num_whole;
            const float past = expf(decay.g * CHUNK);
            enter();
            int n = 0;
            for (; n < scan.num_silent; ++n) {
                wait_full(n);
                if constexpr (SPLIT) {
                    write_apart(n, past);
                } else {
                    write(n, past);
                    products_wait<0>();
                    keep(state);
                }
                release(n);
            }
            if (n < last) {
                wait_full(n);
                score(n);
                products_wait<0>();
                keep(scores);
            }
            for (; n < last; ++n) {
                read_state(n);
                store_scores();
                products_wait<0>();
                keep(sums);
                weigh();
                read_scores(n);
                if constexpr (!SPLIT) write(n, past);
                // The next chunk's scores; after the last chunk its own again, so as not to branch.
                const int next = n + 1 < last ? n + 1 : n;
                wait_full(next);
                score(next);
                products_wait<SPLIT ? 1 : 2>();
                keep(sums);
                store(scan.chunks.token(n, CHUNK), CHUNK);
                if constexpr (SPLIT) {
                    write_apart(n, past);
                } else {
                    products_wait<1>();
                    keep(state);
                }
                release(n);
                products_wait<0>();
                keep(scores);
            }
            if (scan.chunks.rest > 0) finish(n, scan.chunks.rest);
            leave();
            if (threadIdx.x % 128 == 0) store_wait();  // shared memory must outlive the last store
        }

        __device__ void wait_full(int n) { shared.full[n % STAGES].wait(n / STAGES % 2); }

        __device__ void release(int n) {
            if (lane == 0) shared.empty[n % STAGES].arrive();
        }

        // scores [from, to] = B A^T
        __device__ void score(int n) {
            const Matrix<true> b(shared.b[n % STAGES][0]), a(shared.a[n % STAGES][0]);
            keep(scores);
            products_begin();
#pragma unroll
            for (int k = 0; k < B_DIM; k += 16) product<E>(scores, b.at(k), a.at(k), k > 0);
            products_commit();
        }

        // sums [c, token] = S A^T
        __device__ void read_state(int n) {
            const Matrix<true> a(shared.a[n % STAGES][0]);
            uint32 left[1 + SPLIT][B_DIM / 16][4];
#pragma unroll
            for (int i = 0; i < B_DIM / 4; ++i) {
                const Halves<E, SPLIT> halves(state[2 * i], state[2 * i + 1]);
                left[0][i / 4][i % 4] = halves.high;
                if constexpr (SPLIT) left[1][i / 4][i % 4] = halves.low;
            }
            keep(sums);
            products_begin();
#pragma unroll
            for (int k = 0; k < B_DIM; k += 16) {
                product<E, 64>(sums, left[0][k / 16], a.at(k), k > 0);
                if constexpr (SPLIT) product<E, 64>(sums, left[1][k / 16], a.at(k), true);
            }
            products_commit();
        }

        // Weighted and rounded, to shared memory.
        __device__ void store_scores() {
#pragma unroll
            for (int to = 0; to < 64; to += 16) {
                uint32 blocks[1 + SPLIT][4];
#pragma unroll
                for (int block = 0; block < 4; ++block) {
                    const int from = row + block % 2 * 8, first = to + block / 2 * 8 + pair;
                    const float* x = scores + to / 2 + block / 2 * 4 + block % 2 * 2;
                    const Halves<E, SPLIT> halves(x[0] * shared.mask.at(first, from),
                                                  x[1] * shared.mask.at(first + 1, from));
                    blocks[0][block] = halves.high;
                    if constexpr (SPLIT) blocks[1][block] = halves.low;
                }
#pragma unroll
                for (int half = 0; half <= SPLIT; ++half) {
                    const Tile<64> tile = {shared.scores[group][half]};
                    const int r = warp * 16 + lane % 16, granule = to / GRANULE + lane / 16;
                    store_blocks<false>(tile.granule(r, granule), blocks[half]);
                }
            }
            fence_shared();
            group_sync(group);  // protects the scores: all rows are there, for the products too
        }

        // sums *= factor from the chunk's edge to the token that reads
        __device__ void weigh() {
#pragma unroll
            for (int n = 0; n < 32; ++n)
                sums[n] *= shared.edge[group].read[n / 4 * 8 + pair + n % 2];
        }

        // sums += C^T scores
        __device__ void read_scores(int n) {
            const Matrix<false> c(shared.c[n % STAGES][group]);
            keep(sums);
            products_begin();
#pragma unroll
            for (int half = 0; half <= SPLIT; ++half)
#pragma unroll
                for (int from = 0; from < CHUNK; from += 16) {
                    const Matrix<false> weighted(shared.scores[group][half]);
                    product<E>(sums, c.at(from), weighted.at(from), true);
                }
            products_commit();
        }

        // Columns of c as rows of a left operand, weighted and rounded.
        __device__ void weighted(uint32 (&left)[1 + SPLIT][CHUNK / 16][4], int n) {
#pragma unroll
            for (int j = 0; j < CHUNK / 16; ++j) {
                uint32 blocks[4];
                tile(shared.c[n % STAGES]).left_transposed(blocks, j * 16, warp * 16);
#pragma unroll
                for (int block = 0; block < 4; ++block) {
                    const float* w = shared.edge[group].write + j * 16 + block / 2 * 8 + pair;
                    const Halves<E, SPLIT> halves(E::first(blocks[block]) * w[0],
                                                  E::second(blocks[block]) * w[1]);
                    left[0][j][block] = halves.high;
                    if constexpr (SPLIT) left[1][j][block] = halves.low;
                }
            }
        }

        // state = past state + (C weighted)^T B
        __device__ void write(int n, float past) {
            const Matrix<false> b(shared.b[n % STAGES][0]);
            uint32 left[1 + SPLIT][CHUNK / 16][4];
            weighted(left, n);
#pragma unroll
            for (int i = 0; i < B_DIM / 2; ++i) state[i] *= past;
            keep(state);
            products_begin();
#pragma unroll
            for (int j = 0; j < CHUNK / 16; ++j)
                product<E, B_DIM>(state, left[0][j], b.at(j * 16), true);
            products_commit();
        }

        // The same, with the chunk's share summed up apart. Its common factor comes after the product,
        // so that a single token isn't rounded.
        __device__ void write_apart(int n, float past) {
            const float factor = decay.all_writes();
            uint32 left[1 + SPLIT][CHUNK / 16][4];
            weighted(left, n);
#pragma unroll
            for (int p = 0; p < PANELS; ++p) {
                const Matrix<false> b(shared.b[n % STAGES][p]);
                keep(sums);
                products_begin();
#pragma unroll
                for (int half = 0; half <= SPLIT; ++half)
#pragma unroll
                    for (int j = 0; j < CHUNK / 16; ++j)
                        product<E, 64>(sums, left[half][j], b.at(j * 16), half + j > 0);
                products_commit();
                products_wait<0>();
                keep(sums);
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    state[p * 32 + i] = state[p * 32 + i] * past + sums[i] * factor;
            }
        }

        // The last chunk in the scan's order, of fewer tokens.
        __device__ void finish(int n, int num_rows) {
            const int stage = n % STAGES;
            wait_full(n);
            group_sync(group);  // protects the weights of whole chunks: all warps are done with them
            for (int p = 0; p < PANELS; ++p) clear(shared.b[stage][p], num_rows);
            clear(shared.c[stage][group], num_rows);
            shared.edge[group].set(decay, num_rows, 1.0f, threadIdx.x % 128, 128);
            fence_shared();
            group_sync(group);  // protects cleared rows and weights (two groups clear the same rows of b)
            if (params.with_output) {
                score(n);
                products_wait<0>();
                keep(scores);
                read_state(n);
                store_scores();
                products_wait<0>();
                keep(sums);
                weigh();
                read_scores(n);
                products_wait<0>();
                keep(sums);
                store(scan.chunks.token(n, CHUNK), num_rows);
            }
            write_apart(n, expf(decay.g * num_rows));
        }

        // Rows from num_rows on are another document's, or those of chunks that came before.
        __device__ void clear(unsigned char* panel, int num_rows) {
            for (int i = threadIdx.x % 128; i < (CHUNK - num_rows) * 8; i += 128)
                *(uint4*)(panel + num_rows * 128 + i * 16) = uint4{0, 0, 0, 0};
        }

        // Outputs [c, token] to shared memory as rows of tokens, and from there to where they belong.
        __device__ void store(int token, int num_rows) {
            if (threadIdx.x % 128 == 0) store_wait();
            group_sync(group);  // protects `out`: the stores of the chunk before have left it
#pragma unroll
            for (int t = 0; t < 64; t += 16) {
                const float* x = sums + t / 2;
                const uint32 blocks[4] = {E::pack(x[0], x[1]), E::pack(x[2], x[3]),
                                          E::pack(x[4], x[5]), E::pack(x[6], x[7])};
                // Blocks (c, t), (c + 8, t), (c, t + 8), (c + 8, t + 8), each transposed.
                const int r = t + lane / 16 * 8 + lane % 8, granule = warp * 2 + lane / 8 % 2;
                store_blocks<true>(tile(shared.out).granule(r, granule), blocks);
            }
            fence_shared();
            group_sync(group);  // protects `out`: all of it is written
            if (num_rows == CHUNK) {
                if (threadIdx.x % 128 == 0)
                    store_box(scan.all.maps[scan.index][3], shared.out[group], column, token,
                              unit.head, unit.batch);
                return;
            }
            const Operand<unsigned short>& out = params.scans[scan.index].out;
            unsigned short* to = out.row(unit.batch, unit.head, token) + column;
            for (int i = threadIdx.x % 128; i < num_rows * 8; i += 128)
                *(uint4*)(to + i / 8 * out.token_stride + i % 8 * 8) =
                    *(const uint4*)tile(shared.out).granule(i / 8, i % 8);
        }

        __device__ void enter() {
            const float* from =
                entering_state(params.entering[scan.back], unit, (int64)B_DIM * params.c_dim);
#pragma unroll
            for (int n = 0; n < B_DIM / 2; ++n) state[n] = from ? from[state_offset(n)] : 0.0f;
        }

        __device__ void leave() {
            if (!params.final_states || unit.final_row < 0 || scan.index < params.first_kept) return;
            float* to = params.final_states + unit.final_row * ((int64)B_DIM * params.c_dim);
#pragma unroll
            for (int n = 0; n < B_DIM / 2; ++n) to[state_offset(n)] = state[n];
        }

        // Where this thread's n-th element lies in a state [K, V]: some scans have keys as c, some as b.
        __device__ int state_offset(int n) const {
            const int c = column + row + n % 4 / 2 * 8, b = n / 4 * 8 + pair + n % 2;
            return scan.index < params.num_key_scans ? c * B_DIM + b : b * params.c_dim + c;
        }

        __device__ Tile<64> tile(Panel* panels) const { return {panels[group]}; }
    };
};

using Instance = HopperScan<TEMPLATE_ARGUMENTS>;
static_assert(sizeof(Instance::Shared) == SHARED_BYTES, "tiles.py counts them too");

extern "C" __global__ void __launch_bounds__(Instance::NUM_THREADS, Instance::BLOCKS_PER_SM)
hopper_scan(const __grid_constant__ HopperScanParams params) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const ScanParams& scan = params.scan;
    const Task task = Task::of(scan, blockIdx.x, Instance::WIDTH);
    Instance{params, scan, task.unit, task.index, task.column, *(Instance::Shared*)shared_bytes,
             Chunks(task.unit, task.index >= scan.first_back, CHUNK)}.run();
}
