// What a scan is given: operands, a table of work units, states. Mirrored in lightning.py.
//
// Legend: B batch, H heads, T tokens, D head dim; K key dim, V value dim; C tokens a chunk.
#pragma once

#include "ptx.cuh"

// [B, H, T, D] with contiguous D; strides in elements, rows aligned to 16 bytes.
template <class Element>
struct Operand {
    Element* data;
    int64 batch_stride, head_stride, token_stride;

    __device__ Element* row(int batch, int head, int token) const {
        return data + batch * batch_stride + head * head_stride + token * token_stride;
    }
};

struct ScanOperands {
    Operand<const unsigned short> a, b, c;
    Operand<unsigned short> out;  // [B, H, T, dim of c]
};

// States [rows, K, V] float32 that scans of one direction in time start from; null: zeros.
struct EnteringStates {
    const float* initial;
    const float* workspace;
};

struct ScanParams {
    ScanOperands scans[3];
    const int* units;              // [U, 9], see Unit
    const float* log_decay;        // [H]
    EnteringStates entering[2];    // of scans forward, of scans backward in time
    float* final_states;           // [rows, K, V] or null
    float scale;
    int num_scans;       // that share the grid
    int first_back;      // scans from here on run backward in time
    int num_key_scans;   // scans up to here have keys (or gradients of keys) as c
    int first_kept;      // scans from here on leave their last states in final_states
    int heads_per_row;   // heads that a row of units stands for
    int c_dim;
    int with_output;     // 0: states alone, a and out are not touched
};

// One program's stretch of work: a head of a sequence, or a segment of it. Positions are tokens.
struct Unit {
    int batch, head;
    int begin, end;      // a scan forward in time starts at begin, one backward in time at end
    int num_warm;        // whole chunks that only update the state
    int num_tokens;      // after those
    int initial_row, workspace_row, final_row;  // of states; -1: not from there, not kept

    static constexpr int COLUMNS = 9;

    __device__ static Unit read(const int* table, int row, int head_of_row) {
        const int* x = table + (int64)row * COLUMNS;
        Unit unit = {x[0], x[1] + head_of_row, x[2], x[3], x[4], x[5], x[6], x[7], x[8]};
        unit.initial_row += unit.initial_row < 0 ? 0 : head_of_row;
        unit.final_row += unit.final_row < 0 ? 0 : head_of_row;
        return unit;
    }
};

// The state [K, V] that a unit starts from, of `size` elements; null: zeros.
__device__ inline const float* entering_state(
    const EnteringStates& from, const Unit& unit, int64 size) {
    if (from.workspace && unit.workspace_row >= 0) return from.workspace + unit.workspace_row * size;
    return from.initial && unit.initial_row >= 0 ? from.initial + unit.initial_row * size : nullptr;
}

// Which chunk comes when: the last one may be shorter.
struct Chunks {
    int first, step, count, rest;
    bool back;

    __device__ Chunks(const Unit& unit, bool back_in_time, int chunk) : back(back_in_time) {
        first = back ? unit.end - chunk : unit.begin;
        step = back ? -chunk : chunk;
        count = unit.num_warm + (unit.num_tokens + chunk - 1) / chunk;
        rest = unit.num_tokens % chunk;
    }

    __device__ int num_rows(int n, int chunk) const {
        return n == count - 1 && rest > 0 ? rest : chunk;
    }

    // Token of the chunk's first row.
    __device__ int token(int n, int chunk) const {
        return first + n * step + (back ? chunk - num_rows(n, chunk) : 0);
    }
};

// What one block does: a scan of a unit, for `width` columns of c.
struct Task {
    Unit unit;
    int index;   // of the scan
    int column;  // of c, the first

    __device__ static Task of(const ScanParams& params, int block, int width) {
        const int num_tiles = params.c_dim / width, task = block / num_tiles;
        const int index = task % params.num_scans;
        return {unit_of(params, task / params.num_scans), index, block % num_tiles * width};
    }

    // The unit of a number, where a row of the table counts once for each head that it stands for.
    __device__ static Unit unit_of(const ScanParams& params, int number) {
        const int head = number % params.heads_per_row, row = number / params.heads_per_row;
        return Unit::read(params.units, row, head);
    }
};
