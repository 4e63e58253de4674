// The instructions of kernels_cuda/src/hopper.cuh on a CPU, for tests without a GPU.
//
// Copies of boxes happen at once. Products are worked out when they start, from what shared memory holds
// then, but reach the registers when they are waited for: until then a sum is not a number.
#pragma once

#include "ptx.cuh"

struct alignas(8) Barrier {
    unsigned char num_arrivals, arrived;
    unsigned short phase;
    int bytes;  // that have not landed

    void init(int arrivals) { *this = Barrier{(unsigned char)arrivals, 0, 0, 0}; }
    void arrive() { ++arrived; turn(); }
    void arrive_in(int rank);
    void arrive_and_expect(int num_bytes) { bytes += num_bytes; arrive(); }
    void landed(int num_bytes) { bytes -= num_bytes; turn(); }
    void wait(int parity) { while (phase % 2 == parity) host::pass_on(); }
    void wait_together(int parity) { wait(parity); }

  private:
    void turn() {
        if (arrived > num_arrivals) host::fail("more arrivals than a barrier expects");
        if (arrived < num_arrivals || bytes != 0) return;
        arrived = 0;
        ++phase;
        host::cluster->waits = 0;
    }
};

namespace host {

// What lies in a block of the cluster where `mine` lies in this one.
template <class T>
T* of_block(T* mine, int rank) {
    return (T*)((unsigned char*)mine - block().shared + cluster->blocks[rank].shared);
}

}  // namespace host

inline void Barrier::arrive_in(int rank) { host::of_block(this, rank)->arrive(); }
inline int cluster_rank() { return host::rank(); }
inline void cluster_sync() { host::meet(host::cluster->gate, host::cluster->fibres.size()); }

inline void fence_barriers() {}
inline void fence_shared() {}
inline int uniform(int value) { return value; }
template <int> void registers_up() {}
template <int> void registers_down() {}
inline void consumers_sync(int num_threads) { host::meet(host::block().consumers_gate, num_threads); }

// ---- Boxes ----

struct alignas(64) TensorMap {
    unsigned char* data;
    int64 strides[3];  // bytes: tokens, heads, batch
    int sizes[4];      // columns, tokens, heads, batch
    unsigned char rest[80];
};
static_assert(sizeof(TensorMap) == 128, "as the driver's");

inline unsigned char* swizzled(const unsigned char* address) {
    const uintptr_t x = (uintptr_t)address;
    return (unsigned char*)(x ^ (x >> 7 & 7) << 4);
}

// Call `move` with each 16 bytes of a box: in shared memory, and in the tensor or null outside of it.
template <class Move>
void for_box(const void* shared, const TensorMap& map, int column, int token, int head, int batch, Move move) {
    if ((uintptr_t)shared % 1024) host::fail("a box is not aligned to 1024 bytes");
    unsigned char* base = map.data + head * map.strides[1] + batch * map.strides[2];
    for (int r = 0; r < 64; ++r)
        for (int g = 0; g < 8; ++g) {
            const bool inside = token + r >= 0 && token + r < map.sizes[1] && column + g * 8 < map.sizes[0];
            unsigned char* global = base + (token + r) * map.strides[0] + (column + g * 8) * 2;
            move(swizzled((const unsigned char*)shared + r * 128 + g * 16), inside ? global : nullptr);
        }
}

inline void copy_box(
    void* shared, const TensorMap& map, Barrier& barrier, int column, int token, int head, int batch) {
    for_box(shared, map, column, token, head, batch, [](unsigned char* to, unsigned char* from) {
        host::Copy{to, from}.happen();
    });
    barrier.landed(64 * 128);
}

inline void copy_box_to_both(
    void* shared, const TensorMap& map, Barrier& barrier, int column, int token, int head, int batch) {
    for (int rank = 0; rank < 2; ++rank)
        copy_box(host::of_block((unsigned char*)shared, rank), map, *host::of_block(&barrier, rank), column,
                 token, head, batch);
}

inline void store_box(
    const TensorMap& map, const void* shared, int column, int token, int head, int batch) {
    for_box(shared, map, column, token, head, batch, [](unsigned char* from, unsigned char* to) {
        if (to) std::memcpy(to, from, 16);
    });
}

inline void store_wait() {}

// ---- Fragments of a warp, to shared memory ----

template <bool TRANSPOSED>
void store_blocks(void* row, const uint32 (&blocks)[4]) {
    struct Lane { unsigned short* row; const uint32* blocks; } own = {(unsigned short*)row, blocks};
    host::together(own, [](Lane* const (&lanes)[32]) {
        for (int l = 0; l < 32; ++l)
            for (int m = 0; m < 4; ++m)
                for (int n = 0; n < 2; ++n) {
                    const int r = l / 4, c = l % 4 * 2 + n;
                    const unsigned short x = lanes[l]->blocks[m] >> 16 * n;
                    (TRANSPOSED ? lanes[m * 8 + c]->row[r] : lanes[m * 8 + r]->row[c]) = x;
                }
    });
}

// ---- Products of a warpgroup ----

template <bool ROWS>
struct Matrix {
    const unsigned char* start;

    explicit Matrix(const unsigned char* panel) : start(panel) {}

    Matrix at(int inner) const {
        return Matrix(start + (ROWS ? inner / 64 * 8192 + inner % 64 * 2 : inner * 128));
    }

    // Element of a row (right: a column) and of the inner dimension.
    template <class E>
    float element(int row, int inner) const {
        const int byte = ROWS ? row / 8 * 1024 + row % 8 * 128 + inner * 2
                              : row / 64 * 8192 + row % 64 * 2 + inner / 8 * 1024 + inner % 8 * 128;
        return E::first(*(const unsigned short*)swizzled(start + byte));
    }
};

namespace host {

struct Pending {  // a sum that its thread has not waited for
    float* sum;
    std::vector<float> values;
};

inline thread_local std::vector<std::vector<Pending>> pending[1024];  // groups, by thread of the cluster; the last is open

inline std::vector<std::vector<Pending>>& groups() {
    auto& own = pending[cluster->current];
    if (own.empty()) own.emplace_back();
    return own;
}

inline float* pending_values(float* sum) {
    float* found = nullptr;
    for (auto& group : groups())
        for (auto& one : group)
            if (one.sum == sum) found = one.values.data();
    return found;
}

// One warp's rows of a product: `left(lane, row, inner)` gives the left operand.
template <class E, int N, class Left, class Lane>
void multiply(Lane* const (&lanes)[32], bool add, Left left) {
    static thread_local float a[16][16], b[16][N], d[16][N];
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k) a[i][k] = left(i, k);
    for (int k = 0; k < 16; ++k)
        for (int j = 0; j < N; ++j) b[k][j] = lanes[0]->right.template element<E>(j, k);
    auto each = [&](auto visit) {
        for (int l = 0; l < 32; ++l)
            for (int n = 0; n < N / 2; ++n)
                visit(lanes[l]->values[n], d[l / 4 + n % 4 / 2 * 8][n / 4 * 8 + l % 4 * 2 + n % 2]);
    };
    each([&](float& value, float& x) { x = add ? value : 0.0f; });
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < N; ++j) d[i][j] += a[i][k] * b[k][j];
    each([&](float& value, float& x) { value = x; });
}

// Values that a product starts from, kept apart from the sum until it is waited for.
template <int N>
float* begin(float (&sum)[N]) {
    const float* before = pending_values(sum);
    std::vector<float> values(before ? before : sum, (before ? before : sum) + N);
    groups().back().push_back({sum, std::move(values)});
    for (float& x : sum) x = NAN;
    return groups().back().back().values.data();
}

}  // namespace host

template <class E, int N, bool RIGHT_ROWS>
void product(float (&sum)[N / 2], const uint32 (&left)[4], Matrix<RIGHT_ROWS> right, bool add) {
    struct Lane { float* values; const uint32* left; Matrix<RIGHT_ROWS> right; bool add; };
    Lane own = {host::begin(sum), left, right, add};
    host::together(own, [](Lane* const (&lanes)[32]) {
        host::multiply<E, N>(lanes, lanes[0]->add, [&](int i, int k) {
            const uint32 x = lanes[i % 8 * 4 + k % 8 / 2]->left[i / 8 + k / 8 * 2];
            return k % 2 ? E::second(x) : E::first(x);
        });
    });
}

template <class E, bool LEFT_ROWS, bool RIGHT_ROWS, int COUNT>
void product(float (&sum)[COUNT], Matrix<LEFT_ROWS> left, Matrix<RIGHT_ROWS> right, bool add) {
    struct Lane { float* values; Matrix<LEFT_ROWS> left; Matrix<RIGHT_ROWS> right; bool add; int warp; };
    Lane own = {host::begin(sum), left, right, add, (int)threadIdx.x / 32 % 4};
    host::together(own, [](Lane* const (&lanes)[32]) {
        host::multiply<E, 2 * COUNT>(lanes, lanes[0]->add, [&](int i, int k) {
            return lanes[0]->left.template element<E>(lanes[0]->warp * 16 + i, k);
        });
    });
}

inline void products_begin() {}
inline void products_commit() { host::groups().emplace_back(); }

template <int PENDING>
void products_wait() {
    auto& groups = host::groups();
    while (groups.size() > PENDING + 1) {
        for (auto& one : groups.front()) {
            // A later product goes on with the sum: its own wait will bring it.
            bool is_last = true;
            for (size_t n = 1; n < groups.size(); ++n)
                for (auto& other : groups[n]) is_last = is_last && other.sum != one.sum;
            if (is_last) std::copy(one.values.begin(), one.values.end(), one.sum);
        }
        groups.erase(groups.begin());
    }
}

template <int N>
void keep(float (&)[N]) {}
