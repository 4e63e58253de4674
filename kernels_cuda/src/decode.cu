// One decoding step of lightning attention for a batch of sequences, their states updated in place.
//
//     S <- exp(g) S + k v^T        o = scale q^T S
//
// The state [K, V] float32 of each head is read and written once: 8 K V bytes are all that counts. A
// block takes up to MAX_WIDTH values of one head of one sequence; a thread follows VECTOR neighbouring
// ones of every ROWS-th key, and asks for its first batch of keys before it waits for anything. States
// are rows of a pool, of which `slots` names each sequence's own. Offsets are 64-bit. All arithmetic is
// float32.
//
// Legend: B sequences, H heads, P rows of the state pool, K key dim, V value dim.
#include "ptx.cuh"

struct DecodeParams {
    const unsigned short *q, *k, *v;  // [B, H, D], contiguous D
    unsigned short* out;              // [B, H, V], contiguous
    const float* log_decay;           // [H]
    float* state;                     // [P, H, K, V], contiguous V
    const int* slots_32;              // [B], or null
    const int64* slots_64;            // [B], or null; both null: sequence b owns row b
    int64 q_strides[2], k_strides[2], v_strides[2], state_strides[3];  // in elements
    float scale;
    int num_heads;
};

constexpr int NUM_THREADS = 512;
constexpr int MAX_WIDTH = 64;  // values that a block takes
constexpr int BATCH = 4;       // keys whose loads a thread has in flight at once

template <int N>
struct alignas(4 * N) Vector {
    float x[N];
};

template <class E>
__device__ float widened(const unsigned short* x) { return E::first(*x); }

template <class E, int K, int V, int VECTOR>
struct Decode {
    static constexpr int WIDTH = V < MAX_WIDTH ? V : MAX_WIDTH, TILES = V / WIDTH;
    static constexpr int COLUMNS = WIDTH / VECTOR;        // threads that share a key
    static constexpr int ROWS = NUM_THREADS / COLUMNS;    // keys that are worked on at once
    static constexpr int ROUNDS = K / ROWS, TOGETHER = ROUNDS < BATCH ? ROUNDS : BATCH;
    static_assert(K % ROWS == 0 && ROUNDS % TOGETHER == 0, "whole rounds of keys");
    using Loads = Vector<VECTOR>[TOGETHER];

    struct Shared {
        float q[K], k[K];
        float sums[ROWS][WIDTH];  // each row's share of the output
    };

    static __device__ void run(const DecodeParams& params, Shared& shared) {
        const int task = blockIdx.x / TILES, head = task % params.num_heads, t = threadIdx.x;
        const int64 sequence = task / params.num_heads;
        const int row = t / COLUMNS, column = blockIdx.x % TILES * WIDTH + t % COLUMNS * VECTOR;
        const int64 stride = params.state_strides[2];
        float* state = params.state + slot(params, sequence) * params.state_strides[0]
                     + head * params.state_strides[1] + row * stride + column;
        Loads loads;
        load(loads, state, stride);  // before anything waits
        const unsigned short* q = params.q + sequence * params.q_strides[0] + head * params.q_strides[1];
        const unsigned short* k = params.k + sequence * params.k_strides[0] + head * params.k_strides[1];
        const unsigned short* v = params.v + sequence * params.v_strides[0] + head * params.v_strides[1];
        for (int i = t; i < K; i += NUM_THREADS) {
            shared.q[i] = widened<E>(q + i) * params.scale;
            shared.k[i] = widened<E>(k + i);
        }
        float values[VECTOR], sums[VECTOR] = {};
#pragma unroll
        for (int n = 0; n < VECTOR; ++n) values[n] = widened<E>(v + column + n);
        const float decay = expf(params.log_decay[head]);
        __syncthreads();  // protects q and k: all are there
        for (int first = 0; first < ROUNDS; first += TOGETHER) {
            if (first > 0) load(loads, state + first * ROWS * stride, stride);
            step(loads, state + first * ROWS * stride, stride, first * ROWS + row, decay, shared, values, sums);
        }
#pragma unroll
        for (int n = 0; n < VECTOR; ++n) shared.sums[row][t % COLUMNS * VECTOR + n] = sums[n];
        __syncthreads();  // protects the sums: all rows are there
        if (t < WIDTH / 2) {
            float first = 0.0f, second = 0.0f;
            for (int r = 0; r < ROWS; ++r) {
                first += shared.sums[r][2 * t];
                second += shared.sums[r][2 * t + 1];
            }
            *(uint32*)(params.out + (int64)blockIdx.x * WIDTH + 2 * t) = E::pack(first, second);
        }
    }

  private:
    static __device__ int64 slot(const DecodeParams& params, int64 sequence) {
        if (params.slots_32) return params.slots_32[sequence];
        return params.slots_64 ? params.slots_64[sequence] : sequence;
    }

    // Every ROWS-th key of this thread's columns.
    static __device__ void load(Loads& loads, const float* state, int64 stride) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) loads[i] = *(const Vector<VECTOR>*)(state + i * ROWS * stride);
    }

    // Update them, and add up what they give.
    static __device__ void step(
        Loads& loads, float* state, int64 stride, int key, float decay, const Shared& shared,
        const float (&values)[VECTOR], float (&sums)[VECTOR]) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
#pragma unroll
            for (int n = 0; n < VECTOR; ++n) {
                loads[i].x[n] = loads[i].x[n] * decay + shared.k[key + i * ROWS] * values[n];
                sums[n] += shared.q[key + i * ROWS] * loads[i].x[n];
            }
            *(Vector<VECTOR>*)(state + i * ROWS * stride) = loads[i];
        }
    }
};

using Instance = Decode<TEMPLATE_ARGUMENTS>;
static_assert(sizeof(Instance::Shared) == SHARED_BYTES, "lightning_decode.py counts them too");

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
decode(const __grid_constant__ DecodeParams params) {
    Instance::run(params, *(Instance::Shared*)dynamic_shared());
}
