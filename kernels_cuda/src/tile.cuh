// A tile of a chunk in shared memory: CHUNK rows (tokens) of COLS 16-bit elements.
//
// Rows are cut into granules of 16 bytes, and granule g of row r lies at place g ^ (r % 8). Eight rows
// at one granule, which is what load_blocks reads at once, then lie in different banks.
#pragma once

#include "ptx.cuh"

constexpr int CHUNK = 64;    // tokens
constexpr int GRANULE = 8;   // elements of 16 bytes

template <int COLS>
struct Tile {
    static_assert(COLS % 64 == 0, "the swizzle stays inside 8 granules");
    static constexpr int BYTES = CHUNK * COLS * 2;

    unsigned char* data;

    __device__ unsigned char* granule(int row, int index) const {
        return data + row * (COLS * 2) + ((index ^ (row % 8)) * 16);
    }

    // Copy rows from global memory; those from num_rows on become zeros.
    template <int NUM_THREADS>
    __device__ void fetch(const unsigned short* rows, int64 stride, int num_rows) const {
        constexpr int GRANULES = COLS / GRANULE;
#pragma unroll
        for (int i = 0; i < CHUNK * GRANULES / NUM_THREADS; ++i) {
            int place = i * NUM_THREADS + threadIdx.x;
            int row = place / GRANULES, index = place % GRANULES;
            bool is_there = row < num_rows;
            const unsigned short* source = rows + (is_there ? row * stride : 0) + index * GRANULE;
            copy_async(granule(row, index), source, is_there);
        }
    }

    // The blocks of a left operand [16, 16] whose rows are the tile's rows from `row` on.
    __device__ void left(uint32 (&blocks)[4], int row, int col) const {
        load_blocks<false>(blocks, granule(row + lane() % 16, col / GRANULE + lane() / 16));
    }

    // The same of the transposed tile: the operand's rows are the tile's columns from `col` on.
    __device__ void left_transposed(uint32 (&blocks)[4], int row, int col) const {
        load_blocks<true>(blocks, granule(row + across_row(), col / GRANULE + lane() / 8 % 2));
    }

    // Two right operands [16, 8], side by side: rows from `row`, columns from `col` on.
    __device__ void right(uint32 (&blocks)[4], int row, int col) const {
        load_blocks<true>(blocks, granule(row + lane() % 16, col / GRANULE + lane() / 16));
    }

    // The same of the transposed tile: the operands' columns are the tile's rows.
    __device__ void right_transposed(uint32 (&blocks)[4], int row, int col) const {
        load_blocks<false>(blocks, granule(row + across_row(), col / GRANULE + lane() / 8 % 2));
    }

    // Two neighbours of a row, the first at an even column.
    __device__ uint32& pair(int row, int col) const {
        return *(uint32*)(granule(row, col / GRANULE) + col % GRANULE * 2);
    }

  private:
    static __device__ int lane() { return threadIdx.x % 32; }

    // Row of this lane's address where blocks are taken across first, then down.
    static __device__ int across_row() { return lane() / 16 * 8 + lane() % 8; }
};
