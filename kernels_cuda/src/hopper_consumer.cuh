// A warpgroup that carries a state over the chunks of a unit, which a producer's copies bring.
//
// It owns 64 columns of c and, in registers, as many rows of the state [dim of c, dim of b]. In a chunk it
// starts the products that the state waits for, then the next chunk's scores, which wait for copies alone: the
// tensor cores work while scores are weighted and outputs are stored.
//     scores [from, to] = B A^T (of the chunk before)
//     O^T = S A^T,   S += (C weighted)^T B,   O^T += C^T scores
// The state and weighted c are left operands from registers; a, b, c are read as the copy engine put them.
// Two consumers want the same scores, so each works out those of half of the tokens that read.
//
// 16-bit inputs. Scores, state and weighted c are rounded once; with SPLIT each enters as a high and a low
// half, and a chunk's share is summed up apart before it joins the state: products truncate their sums.
#pragma once

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
using Panel = unsigned char[PANEL_BYTES];

// A block's way over the chunks of a unit.
struct Walk {
    Unit unit;
    bool back;  // in time
    Chunks chunks;
    Decay decay;

    __device__ Walk(const ScanParams& params, const Unit& unit, bool back)
        : unit(unit), back(back), chunks(unit, back, CHUNK),
          decay{params.log_decay[unit.head], params.scale, back} {}
};

// What of a walk a consumer needs in each turn. A lane can't tell that all have the same, unless it is read
// where none has branched off.
struct Course {
    int num_warm, num_whole;  // chunks that only update the state, and whole ones after those
    int first;                // token with which the first begins
    int head, batch;

    __device__ Course(const Unit& unit, const Chunks& chunks)
        : num_warm(uniform(unit.num_warm)), num_whole(uniform(unit.num_tokens / CHUNK)),
          first(uniform(chunks.first)), head(uniform(unit.head)), batch(uniform(unit.batch)) {}
};

// What all consumers of a block look up.
struct Common {
    Mask mask;
    EdgeWeights edge;  // with the factor of all writes in it
    Walk walk;

    __device__ void set(const Walk& walk, float write_factor, int num_threads) {
        mask.set(walk.decay, threadIdx.x, num_threads);
        edge.set(walk.decay, CHUNK, write_factor, threadIdx.x, num_threads);
        if (threadIdx.x == 0) this->walk = walk;
        consumers_sync(num_threads);  // protects all of this: it is there
    }
};

template <int B_DIM, int CONSUMERS, int STAGES, bool SPLIT>
struct HopperShared {
    static constexpr int PANELS = B_DIM / 64, STAGE_PANELS = 2 * PANELS + CONSUMERS;
    static constexpr int B = 0, C = PANELS, A = PANELS + CONSUMERS;  // their first panels in a stage

    Panel ring[STAGES * STAGE_PANELS];
    Panel scores[2], out[CONSUMERS][2 - SPLIT];  // of scores high and low, or of two turns
    Common common;
    Barrier full[STAGES], empty[STAGES];
};

template <class E, int B_DIM, int CONSUMERS, int STAGES, bool SPLIT>
struct Consumer {
    using Shared = HopperShared<B_DIM, CONSUMERS, STAGES, SPLIT>;
    using Left = uint32[1 + SPLIT][CHUNK / 16][4];  // operand of 64 rows, in registers
    static constexpr int NUM_THREADS = CONSUMERS * 128;
    static constexpr int TO = CHUNK / CONSUMERS;  // tokens that read, of the scores that it works out

    // A stage of the ring, and the parity of the phase in which it is filled.
    struct Slot {
        int stage = 0, parity = 0;

        // By shifts of constants, which the compiler does once for a warp; selecting it does in each lane.
        __device__ Slot next() const {
            static_assert(STAGES <= 8, "a constant holds the successors of eight stages");
            constexpr uint32 SUCCESSORS = 0x76543210u >> 4 & ~(0xfu << 4 * (STAGES - 1));
            return {(int)(SUCCESSORS >> 4 * stage & 7), parity ^ (1 << (STAGES - 1)) >> stage & 1};
        }
    };

    const HopperScanParams& all;
    const Course course;
    Shared& shared;
    const int index;   // of the scan
    const int column;  // of c, the first
    const int group;
    const int first_to = group * TO;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int row = warp * 16 + lane / 4, pair = lane % 4 * 2;  // of a sum's first element
    float state[B_DIM / 2];  // [64, B_DIM]: row c, column b
    float scores[TO / 2];    // [64, TO]: row from, column to
    float sums[32];          // [64, 64]: row c, column token
    float masks[TO / 8 + 1][2];  // of this thread's scores, by columns less rows in steps of 8
    float reads[8][2], writes[8][2];  // of its columns: weights from and to the chunk's edge

    __device__ Consumer(const HopperScanParams& all, const Course& course, Shared& shared, int index,
                        int column, int group)
        : all(all), course(course), shared(shared), index(index), column(column), group(group) {}

    __device__ void run() {
        const int num_silent = course.num_warm + (all.scan.with_output ? 0 : course.num_whole);
        const int num_heard = all.scan.with_output ? course.num_whole : 0;
        const float past = expf(shared.common.walk.decay.g * CHUNK);
        const int token = course.first + num_silent * step();
        Left added;  // columns of c, weighted, that join the state
        Slot slot;
        enter();
        if constexpr (!SPLIT) {
            load_masks();
            load_edge_weights();
        }
        for (int n = 0; n < num_silent; ++n, slot = slot.next()) pass(added, slot, past);
        if (num_heard > 0) every(added, slot, num_heard, token, past);
        if (uniform(shared.common.walk.chunks.rest) > 0) finish(added, slot, shared.common.walk.chunks.rest);
        leave();
        if (threadIdx.x % 128 == 0) store_wait();  // shared memory must outlive the last store
    }

    // A chunk that only updates the state.
    __device__ void pass(Left& added, const Slot& slot, float past) {
        wait_full(slot);
        if constexpr (SPLIT) {
            write_apart(added, slot, past);
        } else {
            prepare(added, slot, past);
            write(added, slot);
            products_wait<0>();
            keep(state);
        }
        release(slot);
    }

    // Outputs of `left` chunks, the first of them in `slot`. A turn begins with the chunk's weighted scores in
    // shared memory, what its tokens read of the state and what they will add to it (SPLIT, which has no
    // registers for so much at once, does one after the other):
    //     products started                        meanwhile
    //     the chunk joins the state               what its tokens read of the state is weighted
    //     what they read of its scores            waits for the next chunk's copies
    //     the next chunk's scores                 when the first two are done: outputs to shared memory
    //     what its tokens read of the state       when its scores are done: hands both over, prepares
    // When all is done the stage is released, and the next chunk's turn begins. After the last chunk the next
    // one is the last again, so as not to branch.
    __device__ void every(Left& added, Slot& slot, int left, int token, float past) {
        wait_full(slot);
        score(slot);
        products_wait<0>();
        keep(scores);
        store_scores();
        read_state(slot);
        if constexpr (!SPLIT) prepare(added, slot, past);
        products_wait<0>();
        keep(sums);
        for (int buffer = 0; left > 0; --left, token += step(), slot = slot.next()) {
            const bool more = left > 1;
            const Slot next = more ? slot.next() : slot;
            if constexpr (!SPLIT) write(added, slot);
            weigh();
            read_scores(slot, buffer);
            wait_full(next);
            score(next);
            products_wait<1>();
            keep(sums);
            if constexpr (!SPLIT) {
                keep(state);
                put_outputs(buffer);
                read_state(next);
                products_wait<1>();
                keep(scores);
                buffer ^= 1;
                hand_over(buffer, token);
                prepare(added, next, more ? past : 1.0f);
            } else {
                store(token, CHUNK);
                write_apart(added, slot, past);
                products_wait<0>();
                keep(scores);
                store_scores();
                read_state(next);
            }
            products_wait<0>();
            keep(sums);
            release(slot);
        }
    }

    // The next scores and this chunk's outputs are in shared memory: show them to products and copies.
    __device__ void hand_over(int next_buffer, int token) {
        put_scores(next_buffer);
        if (threadIdx.x % 128 == 0) store_wait();  // the box stored before has left its buffer
        fence_shared();
        sync();  // protects both: they are there, and what was read before may be overwritten
        if (threadIdx.x % 128 == 0)
            store_box(all.maps[index][3], shared.out[group][next_buffer ^ 1], column, token, course.head,
                      course.batch);
    }

    __device__ void sync() const { consumers_sync(NUM_THREADS); }

    // Tokens to the next chunk.
    __device__ int step() const { return index >= all.scan.first_back ? -CHUNK : CHUNK; }

    // The first of a stage's panels.
    __device__ Panel* panels(const Slot& slot) const { return shared.ring + slot.stage * Shared::STAGE_PANELS; }

    __device__ void wait_full(const Slot& slot) { shared.full[slot.stage].wait_together(slot.parity); }

    // To all blocks of the cluster, since each copies for all.
    __device__ void release(const Slot& slot) {
        if constexpr (CLUSTER_SIZE == 1) {
            if (lane == 0) shared.empty[slot.stage].arrive();
        } else {
            if (lane < CLUSTER_SIZE) shared.empty[slot.stage].arrive_in(lane);
        }
    }

    // scores [from, to] = B A^T
    __device__ void score(const Slot& slot) {
        const Matrix<true> b(panels(slot)[Shared::B]), a(panels(slot)[Shared::A] + first_to * 128);
        keep(scores);
        products_begin();
#pragma unroll
        for (int k = 0; k < B_DIM; k += 16) product<E>(scores, b.at(k), a.at(k), k > 0);
        products_commit();
    }

    // sums [c, token] = S A^T
    __device__ void read_state(const Slot& slot) {
        const Matrix<true> a(panels(slot)[Shared::A]);
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
        put_scores(0);
        fence_shared();
        sync();  // protects the scores: all of them are there, for the products too
    }

    __device__ void load_masks() {
#pragma unroll
        for (int k = 0; k < TO / 8 + 1; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                masks[k][i] = shared.common.mask.at(first_to + k * 8 - 8 + pair + i, row);
    }

    __device__ void load_edge_weights() {
#pragma unroll
        for (int k = 0; k < 8; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                reads[k][i] = shared.common.edge.read[k * 8 + pair + i];
                writes[k][i] = shared.common.edge.write[k * 8 + pair + i];
            }
    }

    __device__ void put_scores(int buffer) {
        if constexpr (SPLIT) load_masks();
#pragma unroll
        for (int to = 0; to < TO; to += 16) {
            uint32 blocks[1 + SPLIT][4];
#pragma unroll
            for (int block = 0; block < 4; ++block) {
                const float* x = scores + to / 2 + block / 2 * 4 + block % 2 * 2;
                const float* mask = masks[to / 8 + block / 2 - block % 2 + 1];
                const Halves<E, SPLIT> halves(x[0] * mask[0], x[1] * mask[1]);
                blocks[0][block] = halves.high;
                if constexpr (SPLIT) blocks[1][block] = halves.low;
            }
#pragma unroll
            for (int part = 0; part <= SPLIT; ++part) {
                const Tile<64> tile = {shared.scores[buffer + part]};
                const int r = warp * 16 + lane % 16, granule = (first_to + to) / GRANULE + lane / 16;
                store_blocks<false>(tile.granule(r, granule), blocks[part]);
            }
        }
    }

    // sums *= factor from the chunk's edge to the token that reads
    __device__ void weigh() {
#pragma unroll
        for (int n = 0; n < 32; ++n)
            sums[n] *= SPLIT ? shared.common.edge.read[n / 4 * 8 + pair + n % 2] : reads[n / 4][n % 2];
    }

    // sums += C^T scores
    __device__ void read_scores(const Slot& slot, int buffer) {
        const Matrix<false> c(panels(slot)[Shared::C + group]);
        keep(sums);
        products_begin();
#pragma unroll
        for (int part = 0; part <= SPLIT; ++part)
#pragma unroll
            for (int from = 0; from < CHUNK; from += 16) {
                const Matrix<false> weighted(shared.scores[buffer + part]);
                product<E>(sums, c.at(from), weighted.at(from), true);
            }
        products_commit();
    }

    // Columns of c as rows of a left operand, weighted and rounded.
    __device__ void weighted(Left& left, const Slot& slot) {
        const Tile<64> c = {panels(slot)[Shared::C + group]};
#pragma unroll
        for (int j = 0; j < CHUNK / 16; ++j) {
            uint32 blocks[4];
            c.left_transposed(blocks, j * 16, warp * 16);
#pragma unroll
            for (int block = 0; block < 4; ++block) {
                const float* w = SPLIT ? shared.common.edge.write + j * 16 + block / 2 * 8 + pair
                                       : writes[j * 2 + block / 2];
                const Halves<E, SPLIT> halves(E::first(blocks[block]) * w[0],
                                              E::second(blocks[block]) * w[1]);
                left[0][j][block] = halves.high;
                if constexpr (SPLIT) left[1][j][block] = halves.low;
            }
        }
    }

    // What `write` needs beside b: weighted c, and a state that has decayed by a chunk.
    __device__ void prepare(Left& added, const Slot& slot, float past) {
        weighted(added, slot);
#pragma unroll
        for (int i = 0; i < B_DIM / 2; ++i) state[i] *= past;
    }

    // state += (C weighted)^T B
    __device__ void write(const Left& added, const Slot& slot) {
        const Matrix<false> b(panels(slot)[Shared::B]);
        keep(state);
        products_begin();
#pragma unroll
        for (int j = 0; j < CHUNK / 16; ++j) product<E, B_DIM>(state, added[0][j], b.at(j * 16), true);
        products_commit();
    }

    // Both, with the chunk's share summed up apart. Its common factor comes after the product, so that
    // a single token isn't rounded.
    __device__ void write_apart(Left& added, const Slot& slot, float past) {
        const float factor = shared.common.walk.decay.all_writes();
        weighted(added, slot);
#pragma unroll
        for (int p = 0; p < B_DIM / 64; ++p) {
            const Matrix<false> b(panels(slot)[Shared::B + p]);
            keep(sums);
            products_begin();
#pragma unroll
            for (int part = 0; part <= SPLIT; ++part)
#pragma unroll
                for (int j = 0; j < CHUNK / 16; ++j)
                    product<E, 64>(sums, added[part][j], b.at(j * 16), part + j > 0);
            products_commit();
            products_wait<0>();
            keep(sums);
#pragma unroll
            for (int i = 0; i < 32; ++i) state[p * 32 + i] = state[p * 32 + i] * past + sums[i] * factor;
        }
    }

    // The last chunk in the scan's order, of fewer tokens.
    __device__ void finish(Left& added, const Slot& slot, int num_rows) {
        const Decay& decay = shared.common.walk.decay;
        wait_full(slot);
        sync();  // protects the weights of whole chunks: all warps are done with them
        clear(panels(slot), num_rows);
        shared.common.edge.set(decay, num_rows, 1.0f, threadIdx.x, NUM_THREADS);
        fence_shared();
        sync();  // protects cleared rows and weights
        if constexpr (!SPLIT) load_edge_weights();
        if (all.scan.with_output) {
            score(slot);
            products_wait<0>();
            keep(scores);
            store_scores();
            read_state(slot);
            products_wait<0>();
            keep(sums);
            weigh();
            read_scores(slot, 0);
            products_wait<0>();
            keep(sums);
            store(shared.common.walk.chunks.token(shared.common.walk.chunks.count - 1, CHUNK), num_rows);
        }
        write_apart(added, slot, expf(decay.g * num_rows));
    }

    // Rows from num_rows on are another document's, or those of chunks that came before.
    __device__ void clear(Panel* stage, int num_rows) {
        const int granules = (CHUNK - num_rows) * 8;
        for (int i = threadIdx.x; i < Shared::STAGE_PANELS * granules; i += NUM_THREADS)
            *(uint4*)(stage[i / granules] + num_rows * 128 + i % granules * 16) = uint4{0, 0, 0, 0};
    }

    // Outputs to shared memory, and from there to where they belong.
    __device__ void store(int token, int num_rows) {
        if (threadIdx.x % 128 == 0) store_wait();
        sync();  // protects `out`: the box stored before has left it
        put_outputs(0);
        fence_shared();
        sync();  // protects `out`: all of it is written
        Panel& written = *shared.out[group];
        if (num_rows == CHUNK) {
            if (threadIdx.x % 128 == 0)
                store_box(all.maps[index][3], written, column, token, course.head, course.batch);
            return;
        }
        const Tile<64> rows = {written};
        const Operand<unsigned short>& out = all.scan.scans[index].out;
        unsigned short* to = out.row(course.batch, course.head, token) + column;
        for (int i = threadIdx.x % 128; i < num_rows * 8; i += 128)
            *(uint4*)(to + i / 8 * out.token_stride + i % 8 * 8) =
                *(const uint4*)rows.granule(i / 8, i % 8);
    }

    // Outputs [c, token] as rows of tokens.
    __device__ void put_outputs(int buffer) {
        const Tile<64> rows = {shared.out[group][buffer]};
#pragma unroll
        for (int t = 0; t < 64; t += 16) {
            const float* x = sums + t / 2;
            const uint32 blocks[4] = {E::pack(x[0], x[1]), E::pack(x[2], x[3]),
                                      E::pack(x[4], x[5]), E::pack(x[6], x[7])};
            // Blocks (c, t), (c + 8, t), (c, t + 8), (c + 8, t + 8), each transposed.
            const int r = t + lane / 16 * 8 + lane % 8, granule = warp * 2 + lane / 8 % 2;
            store_blocks<true>(rows.granule(r, granule), blocks);
        }
    }

    __device__ void enter() {
        const int64 size = (int64)B_DIM * all.scan.c_dim;
        const Walk& walk = shared.common.walk;
        const float* from = entering_state(all.scan.entering[walk.back], walk.unit, size);
        if (!uniform(from != nullptr)) {
#pragma unroll
            for (int n = 0; n < B_DIM / 2; ++n) state[n] = 0.0f;
        } else if (has_keys()) {
            for_each<true>(from, [](float& mine, const float& there) { mine = there; });
        } else {
            for_each<false>(from, [](float& mine, const float& there) { mine = there; });
        }
    }

    __device__ void leave() {
        const ScanParams& params = all.scan;
        const int kept = uniform(shared.common.walk.unit.final_row);
        if (!params.final_states || kept < 0 || index < params.first_kept) return;
        float* to = params.final_states + kept * ((int64)B_DIM * all.scan.c_dim);
        if (has_keys())
            for_each<true>(to, [](const float& mine, float& there) { there = mine; });
        else
            for_each<false>(to, [](const float& mine, float& there) { there = mine; });
    }

    // Some scans have keys as c, some as b.
    __device__ bool has_keys() const { return index < all.scan.num_key_scans; }

    // Visit this thread's elements of the state, with their places in a state [K, V].
    template <bool KEYS, class Float, class Visit>
    __device__ void for_each(Float* states, Visit visit) {
        const int c = column + row, b = pair, c_dim = all.scan.c_dim;
        states += KEYS ? c * B_DIM + b : b * c_dim + c;
#pragma unroll
        for (int n = 0; n < B_DIM / 2; ++n) {
            const int more_c = n % 4 / 2 * 8, more_b = n / 4 * 8 + n % 2;
            visit(state[n], states[KEYS ? more_c * B_DIM + more_b : more_b * c_dim + more_c]);
        }
    }
};
