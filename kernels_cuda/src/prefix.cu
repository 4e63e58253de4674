// What each segment adds to a state becomes the state that enters it, in place:
//     entering_0 = initial,  entering_{n+1} = exp(g tokens) entering_n + added_n
// A thread follows one element of the states of one chain of segments; the float32 state is
// contiguous, so that neighbours read neighbours.
#include "ptx.cuh"

struct PrefixParams {
    float* states;           // [rows, size]
    const int* chains;       // [N, 5]: head, row of the initial states or -1, first row, rows, chunks a row
    const float* log_decay;  // [H]
    const float* initial;    // [rows, size] or null
    int size, chunk;
};

constexpr int NUM_THREADS = TEMPLATE_ARGUMENTS;
constexpr int AHEAD = 4;  // rows loaded before the first of them is needed
static_assert(SHARED_BYTES == 0, "");

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
prefix(const __grid_constant__ PrefixParams params) {
    const int blocks_per_chain = params.size / NUM_THREADS;
    const int* chain = params.chains + (int64)(blockIdx.x / blocks_per_chain) * 5;
    const int element = blockIdx.x % blocks_per_chain * NUM_THREADS + threadIdx.x;
    const int initial_row = chain[1], num_rows = chain[3];
    const float decay = expf(params.log_decay[chain[0]] * params.chunk * chain[4]);
    const int64 size = params.size;
    float* row = params.states + chain[2] * size + element;

    float state = 0.0f;
    if (params.initial && initial_row >= 0) state = params.initial[initial_row * size + element];
    for (int n = 0; n < num_rows; n += AHEAD, row += AHEAD * size) {
        // The last row holds nothing: no segment comes after it.
        float added[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) added[i] = n + i < num_rows - 1 ? row[i * size] : 0.0f;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (n + i < num_rows) row[i * size] = state;
            state = state * decay + added[i];
        }
    }
}
