// Factors by which tokens of a chunk reach each other and the chunk's edge. Only exponents that are not
// positive are taken, so that no slope and no distance overflows.
#pragma once

#include "tile.cuh"

struct Decay {
    float g;      // natural log, <= 0
    float scale;  // of the output
    bool back;    // in time: rows count from the other end

    // Backward in time a read costs one step less, and a write one more, which all writes share.
    __device__ float read(int row, int num_rows) const {
        return back ? expf(g * max(num_rows - 1 - row, 0)) : expf(g * (row + 1)) * scale;
    }
    __device__ float write(int row, int num_rows) const {
        return expf(g * (back ? row : max(num_rows - 1 - row, 0)));
    }
    __device__ float all_writes() const { return back ? expf(g) * scale : 1.0f; }
};

// From a written row to a row that reads it, 0 where that comes before.
struct Mask {
    float factors[2 * CHUNK];

    __device__ void set(const Decay& decay, int thread, int num_threads) {
        for (int n = thread; n < 2 * CHUNK; n += num_threads) {
            const int distance = decay.back ? CHUNK - n : n - CHUNK;
            factors[n] = distance < 0 ? 0.0f : expf(decay.g * distance) * decay.scale;
        }
    }

    __device__ float at(int to, int from) const { return factors[CHUNK + to - from]; }
};

// Between the chunk's edge and its rows.
struct EdgeWeights {
    float read[CHUNK];   // from the edge to a row
    float write[CHUNK];  // from a row to the edge

    __device__ void set(
        const Decay& decay, int num_rows, float write_factor, int thread, int num_threads) {
        for (int i = thread; i < CHUNK; i += num_threads) {
            read[i] = decay.read(i, num_rows);
            write[i] = decay.write(i, num_rows) * write_factor;
        }
    }
};
