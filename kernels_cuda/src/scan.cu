// Lightning attention, forward and backward, as scans over chunks of tokens (sm_80 and up).
//
// Legend: B batch, H heads, T tokens, K key dim, V value dim; C tokens a chunk.
//
// The recurrence S_t = exp(g) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t (MiniMax-01, arXiv 2501.08313)
// and its three gradients are one scan over tokens a, b, c. It carries S = sum of c b^T, [dim of c,
// dim of b]; in chunks (Lightning Attention-2, arXiv 2401.04658; g <= 0, i and j rows of a chunk):
//     o_i = scale (exp(g (i+1)) S a_i + sum over j <= i of exp(g (i-j)) (a_i . b_j) c_j)
//     S  <- exp(g C) S + sum over j of exp(g (C-1-j)) c_j b_j^T
// Forward in time, o = scan(q, k, v) and dq = scan(do, v, k), the latter from the initial state
// transposed. Backward in time, dk = scan(v, do, q) and dv = scan(k, q, do): rows count from the other
// end, and S is the gradient of the state, read as exp(g i) S a_i and written with
// scale exp(g (j+1)) c_j b_j^T: it starts as the gradient of the final state and ends as that of the
// initial one.
//
// A block of four warps runs one scan of one work unit for WIDTH columns of c. Each warp owns 16 of
// them, and 16 rows of the float32 state in registers. They lie there as sums of products do, which is
// also how a right operand lies: rounded to 16 bits, the state enters o = a S^T without a move. Copies
// of the next chunks run meanwhile (a ring of STAGES). Nothing but results is written.
//
// Scores, state and weighted c are rounded once, as operands; with SPLIT each enters as a high and a
// low half. A chunk's share is summed up apart before it joins the state. Offsets are 64-bit.
// Not supported: float32 inputs, a gradient of g, dims of b other than 64 and 128.
#include "halves.cuh"
#include "tile.cuh"
#include "weights.cuh"
#include "work.cuh"

constexpr int WIDTH = 64;
constexpr int NUM_WARPS = WIDTH / 16;
constexpr int NUM_THREADS = NUM_WARPS * 32;

// sum += left @ right for a left operand in halves.
template <class E, bool SPLIT>
__device__ void multiply_add_halves(
    float (&sum)[4], const uint32 (&left)[2][4], uint32 right_0, uint32 right_1) {
    if constexpr (SPLIT)
        multiply_add<E>(sum, left[1], right_0, right_1);
    multiply_add<E>(sum, left[0], right_0, right_1);
}

template <class E, int B_DIM, int STAGES, bool SPLIT>
struct Scan {
    struct Shared {
        unsigned char a[STAGES][Tile<B_DIM>::BYTES];
        unsigned char b[STAGES][Tile<B_DIM>::BYTES];
        unsigned char c[STAGES][Tile<WIDTH>::BYTES];
        unsigned char scores[1 + SPLIT][Tile<CHUNK>::BYTES];
        unsigned char strips[NUM_WARPS][CHUNK * 16 * 2];
        Mask mask;
        EdgeWeights edge;
    };

    const ScanParams& params;
    const ScanOperands& operands;
    const Unit unit;
    const int index;     // of the scan
    const int column;    // of c, this block's first
    Shared& shared;
    const bool back = index >= params.first_back;  // in time
    const Decay decay = {params.log_decay[unit.head], params.scale, back};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = lane / 4, pair = lane % 4 * 2;  // of a sum's first element
    float state[B_DIM / 8][4];  // [16, B_DIM]: row c, column b

    __device__ void run() {
        const Chunks chunks(unit, back, CHUNK);
        shared.mask.set(decay, threadIdx.x, NUM_THREADS);
        shared.edge.set(decay, CHUNK, 1.0f, threadIdx.x, NUM_THREADS);
        enter();
        for (int n = 0; n < STAGES - 1; ++n) fetch(chunks, n);
        for (int n = 0; n < chunks.count; ++n) {
            copy_wait<STAGES - 2>();
            __syncthreads();  // shows chunk n (and the weights) to all; protects chunk n - 1's stage
            fetch(chunks, n + STAGES - 1);
            const int num_rows = chunks.num_rows(n, CHUNK), stage = n % STAGES;
            if (num_rows < CHUNK) {
                shared.edge.set(decay, num_rows, 1.0f, threadIdx.x, NUM_THREADS);
                __syncthreads();  // protects the weights: all rows are there
            }
            if (params.with_output && n >= unit.num_warm) {
                score(stage);
                __syncthreads();  // protects the scores: all rows are there
                read(stage, chunks.token(n, CHUNK), num_rows);
            }
            write(stage, expf(decay.g * num_rows));
        }
        leave();
    }

  private:
    // Order the copies of chunk n, an empty group where there is none.
    __device__ void fetch(const Chunks& chunks, int n) {
        if (n < chunks.count) {
            const int stage = n % STAGES, num_rows = chunks.num_rows(n, CHUNK);
            const int token = chunks.token(n, CHUNK);
            const auto &a = operands.a, &b = operands.b, &c = operands.c;
            b_tile(stage).template fetch<NUM_THREADS>(
                b.row(unit.batch, unit.head, token), b.token_stride, num_rows);
            c_tile(stage).template fetch<NUM_THREADS>(
                c.row(unit.batch, unit.head, token) + column, c.token_stride, num_rows);
            if (params.with_output && n >= unit.num_warm)
                a_tile(stage).template fetch<NUM_THREADS>(
                    a.row(unit.batch, unit.head, token), a.token_stride, num_rows);
        }
        copy_commit();
    }

    // Scores of 16 reading rows i and all written rows j: weight(i, j) a_i . b_j, to shared memory.
    __device__ void score(int stage) {
        float sums[CHUNK / 8][4] = {};
#pragma unroll
        for (int k = 0; k < B_DIM; k += 16) {
            uint32 left[4];
            a_tile(stage).left(left, warp * 16, k);
#pragma unroll
            for (int j = 0; j < CHUNK; j += 16) {
                if (back ? j < warp * 16 : j > warp * 16) continue;
                uint32 right[4];
                b_tile(stage).right_transposed(right, j, k);
                multiply_add<E>(sums[j / 8], left, right[0], right[1]);
                multiply_add<E>(sums[j / 8 + 1], left, right[2], right[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int to = warp * 16 + row + half * 8, from = j * 8 + pair;
                const Halves<E, SPLIT> scores(
                    sums[j][half * 2] * shared.mask.at(to, from),
                    sums[j][half * 2 + 1] * shared.mask.at(to, from + 1));
                score_tile(0).pair(to, from) = scores.high;
                if constexpr (SPLIT) score_tile(1).pair(to, from) = scores.low;
            }
    }

    // Outputs of a chunk for 16 columns of c: past the chunk's edge from the state, inside it from
    // the scores.
    __device__ void read(int stage, int token, int num_rows) {
        float sums[CHUNK / 16][2][4] = {};
#pragma unroll
        for (int k = 0; k < B_DIM; k += 16) {
            const float(&s)[4] = state[k / 8], (&t)[4] = state[k / 8 + 1];
            const Halves<E, SPLIT> right[2][2] = {
                {{s[0], s[1]}, {t[0], t[1]}}, {{s[2], s[3]}, {t[2], t[3]}}};
#pragma unroll
            for (int i = 0; i < CHUNK / 16; ++i) {
                uint32 left[4];
                a_tile(stage).left(left, i * 16, k);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    if constexpr (SPLIT)
                        multiply_add<E>(sums[i][c], left, right[c][0].low, right[c][1].low);
                    multiply_add<E>(sums[i][c], left, right[c][0].high, right[c][1].high);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNK / 16; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float factor = shared.edge.read[i * 16 + row + half * 8];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    sums[i][c][half * 2] *= factor;
                    sums[i][c][half * 2 + 1] *= factor;
                }
            }
#pragma unroll
        for (int j = 0; j < CHUNK / 16; ++j) {
            uint32 right[4];
            c_tile(stage).right(right, j * 16, warp * 16);
#pragma unroll
            for (int i = 0; i < CHUNK / 16; ++i) {
                if (back ? j < i : j > i) continue;
                uint32 left[2][4];
                score_tile(0).left(left[0], i * 16, j * 16);
                if constexpr (SPLIT) score_tile(1).left(left[1], i * 16, j * 16);
                multiply_add_halves<E, SPLIT>(sums[i][0], left, right[0], right[1]);
                multiply_add_halves<E, SPLIT>(sums[i][1], left, right[2], right[3]);
            }
        }
        store(sums, token, num_rows);
    }

    // Rows of 32 bytes go through shared memory, so that lanes write 16 bytes each. Granule g of row r
    // lies at place g ^ (r / 4 % 2), which keeps the banks of a store apart.
    __device__ void store(const float (&sums)[CHUNK / 16][2][4], int token, int num_rows) {
        unsigned char* strip = shared.strips[warp];
#pragma unroll
        for (int i = 0; i < CHUNK / 16; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int r = i * 16 + row + half * 8;
                    unsigned char* place = strip + r * 32 + (c ^ (r / 4 % 2)) * 16 + pair * 2;
                    *(uint32*)place = E::pack(sums[i][c][half * 2], sums[i][c][half * 2 + 1]);
                }
        __syncwarp();  // protects the strip: the warp has written all of it
        unsigned short* to = operands.out.row(unit.batch, unit.head, token) + column + warp * 16;
#pragma unroll
        for (int i = 0; i < CHUNK / 16; ++i) {
            const int r = i * 16 + lane / 2, c = lane % 2;
            const uint4 values = *(const uint4*)(strip + r * 32 + (c ^ (r / 4 % 2)) * 16);
            if (r < num_rows) *(uint4*)(to + r * operands.out.token_stride + c * 8) = values;
        }
    }

    // The state after a chunk: S <- past S + factor (weighted c)^T b. A factor of all weights is applied
    // after the product, so that a single token isn't rounded.
    __device__ void write(int stage, float past) {
        const float factor = decay.all_writes();
        uint32 left[CHUNK / 16][2][4];
#pragma unroll
        for (int j = 0; j < CHUNK / 16; ++j) {
            uint32 blocks[4];
            c_tile(stage).left_transposed(blocks, j * 16, warp * 16);
#pragma unroll
            for (int block = 0; block < 4; ++block) {
                const float* weights = shared.edge.write + j * 16 + block / 2 * 8 + pair;
                const Halves<E, SPLIT> weighted(
                    E::first(blocks[block]) * weights[0], E::second(blocks[block]) * weights[1]);
                left[j][0][block] = weighted.high;
                left[j][1][block] = weighted.low;
            }
        }
#pragma unroll
        for (int k = 0; k < B_DIM; k += 16) {
            float sums[2][4] = {};
#pragma unroll
            for (int j = 0; j < CHUNK / 16; ++j) {
                uint32 right[4];
                b_tile(stage).right(right, j * 16, k);
                multiply_add_halves<E, SPLIT>(sums[0], left[j], right[0], right[1]);
                multiply_add_halves<E, SPLIT>(sums[1], left[j], right[2], right[3]);
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                float& element = state[k / 8 + n / 4][n % 4];
                element = element * past + sums[n / 4][n % 4] * factor;
            }
        }
    }

    __device__ void enter() {
        const float* from = entering_state(params.entering[back], unit, (int64)B_DIM * params.c_dim);
#pragma unroll
        for (int n = 0; n < B_DIM / 2; ++n) state[n / 4][n % 4] = from ? from[state_offset(n)] : 0.0f;
    }

    __device__ void leave() {
        if (!params.final_states || unit.final_row < 0 || index < params.first_kept) return;
        float* to = params.final_states + unit.final_row * ((int64)B_DIM * params.c_dim);
#pragma unroll
        for (int n = 0; n < B_DIM / 2; ++n) to[state_offset(n)] = state[n / 4][n % 4];
    }

    // Where the lane's n-th element lies in a state [K, V]: some scans have keys as c, some as b.
    __device__ int state_offset(int n) const {
        const int c = column + warp * 16 + row + n % 4 / 2 * 8, b = n / 4 * 8 + pair + n % 2;
        return index < params.num_key_scans ? c * B_DIM + b : b * params.c_dim + c;
    }

    __device__ Tile<B_DIM> a_tile(int stage) const { return {shared.a[stage]}; }
    __device__ Tile<B_DIM> b_tile(int stage) const { return {shared.b[stage]}; }
    __device__ Tile<WIDTH> c_tile(int stage) const { return {shared.c[stage]}; }
    __device__ Tile<CHUNK> score_tile(int half) const { return {shared.scores[half]}; }
};

// The template arguments come as a macro, so that the kernel has a plain name.
using Instance = Scan<TEMPLATE_ARGUMENTS>;
static_assert(sizeof(Instance::Shared) == SHARED_BYTES, "tiles.py counts them too");

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
scan(const __grid_constant__ ScanParams params) {
    const Task task = Task::of(params, blockIdx.x, WIDTH);
    Instance instance{params, params.scans[task.index], task.unit, task.index, task.column,
                      *(Instance::Shared*)dynamic_shared()};
    instance.run();
}
