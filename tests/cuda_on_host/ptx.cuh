// The instructions of kernels_cuda/src/ptx.cuh on a CPU, for tests without a GPU.
//
// What a warp does together is worked out by the last of its lanes to come, from the fragments that
// all 32 hold, laid out as PTX says. Copies happen as late as they may (at the wait for them) or, with
// `copies_are_eager`, at once: what a kernel may not rely on goes wrong in one way or the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

using uint32 = unsigned int;
using int64 = long long;

inline float float_of(uint32 bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32 bits_of(float x) { uint32 bits; std::memcpy(&bits, &x, 4); return bits; }

struct bfloat16 {
    unsigned short bits;

    static uint32 rounded(float x) {
        if (std::isnan(x)) return 0x7fff;
        const uint32 b = bits_of(x);
        return (b + 0x7fff + (b >> 16 & 1)) >> 16;
    }
    static uint32 pack(float a, float b) { return rounded(a) | rounded(b) << 16; }
    static float first(uint32 packed) { return float_of(packed << 16); }
    static float second(uint32 packed) { return float_of(packed & 0xffff0000u); }
};

struct float16 {
    unsigned short bits;

    static uint32 rounded(float x) {
        const _Float16 half = (_Float16)x;
        unsigned short b;
        std::memcpy(&b, &half, 2);
        return b;
    }
    static float widened(unsigned short b) { _Float16 half; std::memcpy(&half, &b, 2); return half; }
    static uint32 pack(float a, float b) { return rounded(a) | rounded(b) << 16; }
    static float first(uint32 packed) { return widened(packed & 0xffff); }
    static float second(uint32 packed) { return widened(packed >> 16); }
};

// ---- Copies: groups of a thread, done when it waits for them ----

inline void copy_async(void* shared, const void* global, bool is_there) {
    const host::Copy copy = {shared, is_there ? global : nullptr};
    if (host::copies_are_eager) copy.happen();
    else host::current().copies.push_back(copy);
}

inline void copy_commit() {
    host::Fibre& thread = host::current();
    thread.group_ends.push_back(thread.copies.size());
}

template <int PENDING>
void copy_wait() {
    host::Fibre& thread = host::current();
    auto& ends = thread.group_ends;
    if (ends.size() <= PENDING) return;
    const size_t num_groups = ends.size() - PENDING, num_copies = ends[num_groups - 1];
    for (size_t n = 0; n < num_copies; ++n) thread.copies[n].happen();
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + num_copies);
    ends.erase(ends.begin(), ends.begin() + num_groups);
    for (size_t& end : ends) end -= num_copies;
}

// ---- Matrix fragments of a warp ----

template <bool TRANSPOSED>
void load_blocks(uint32 (&blocks)[4], const void* row) {
    struct Lane { const unsigned short* row; uint32 blocks[4]; } own = {(const unsigned short*)row};
    host::together(own, [](Lane* const (&lanes)[32]) {
        for (int l = 0; l < 32; ++l)
            for (int m = 0; m < 4; ++m) {
                uint32 pair[2];
                for (int n = 0; n < 2; ++n) {
                    const int r = l / 4, c = l % 4 * 2 + n;
                    pair[n] = TRANSPOSED ? lanes[m * 8 + c]->row[r] : lanes[m * 8 + r]->row[c];
                }
                lanes[l]->blocks[m] = pair[0] | pair[1] << 16;
            }
    });
    std::memcpy(blocks, own.blocks, sizeof blocks);
}

template <class E>
void multiply_add(float (&sum)[4], const uint32 (&left)[4], uint32 right_0, uint32 right_1) {
    struct Lane { float* sum; const uint32* left; uint32 right[2]; } own = {sum, left, {right_0, right_1}};
    host::together(own, [](Lane* const (&lanes)[32]) {
        float a[16][16], b[16][8], d[16][8];
        for (int l = 0; l < 32; ++l) {
            const int r = l / 4, c = l % 4 * 2;
            for (int n = 0; n < 4; ++n) {
                const int row = r + n % 2 * 8, col = c + n / 2 * 8;
                a[row][col] = E::first(lanes[l]->left[n]);
                a[row][col + 1] = E::second(lanes[l]->left[n]);
            }
            for (int n = 0; n < 2; ++n) {
                b[c + n * 8][r] = E::first(lanes[l]->right[n]);
                b[c + 1 + n * 8][r] = E::second(lanes[l]->right[n]);
            }
            for (int n = 0; n < 4; ++n) d[r + n / 2 * 8][c + n % 2] = lanes[l]->sum[n];
        }
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
        for (int l = 0; l < 32; ++l)
            for (int n = 0; n < 4; ++n) lanes[l]->sum[n] = d[l / 4 + n / 2 * 8][l % 4 * 2 + n % 2];
    });
}
