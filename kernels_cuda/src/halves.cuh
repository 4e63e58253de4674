// Float32 values as 16-bit operands of products.
#pragma once

#include "ptx.cuh"

// Two values rounded to 16 bits and, with SPLIT, what rounding took from them.
template <class E, bool SPLIT>
struct Halves {
    uint32 high, low;

    __device__ Halves(float first, float second) : high(E::pack(first, second)), low(0) {
        if constexpr (SPLIT)
            low = E::pack(first - E::first(high), second - E::second(high));
    }
};
