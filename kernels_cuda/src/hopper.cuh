// Instructions of Hopper (sm_90a) alone: barriers in shared memory, the copy engine, warpgroup products.
//
// The build for the host (tests/cuda_on_host) has a file of the same name with the same functions.
#pragma once

#include "ptx.cuh"

// ---- Barriers in shared memory, with phases that alternate in parity ----

struct Barrier {
    unsigned long long bits;

    __device__ void init(int num_arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                     :: "r"(shared_address(this)), "r"(num_arrivals) : "memory");
    }

    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                     :: "r"(shared_address(this)) : "memory");
    }

    // Arrive at the same barrier of a block of the cluster. By default that orders accesses of this block
    // alone; what is read of a stage has been used by then, and CUTLASS arrives so too. `.release.cluster`
    // would wait until all stores of the thread have reached the whole GPU.
    __device__ void arrive_in(int rank) {
        asm volatile("{\n.reg .b32 there;\n"
                     "mapa.shared::cluster.u32 there, %0, %1;\n"
                     "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
                     :: "r"(shared_address(this)), "r"(rank) : "memory");
    }

    // Arrive, and let the phase wait for so many bytes of copies too.
    __device__ void arrive_and_expect(int num_bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     :: "r"(shared_address(this)), "r"(num_bytes) : "memory");
    }

    // Until the phase of this parity is over; the first phase has parity 0.
    __device__ void wait(int parity) {
        while (!is_over(parity)) {}
    }

    // The same for all lanes of a warp: that they go on together lets them share operands' addresses.
    __device__ void wait_together(int parity) {
        while (!__all_sync(0xffffffffu, is_over(parity))) {}
    }

  private:
    __device__ bool is_over(int parity) {
        int over;
        asm volatile("{\n.reg .pred over;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, over;\n}"
                     : "=r"(over) : "r"(shared_address(this)), "r"(parity) : "memory");
        return over;
    }
};

// Shows initialised barriers to the copy engine.
__device__ inline void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A block's number in its cluster, and a barrier of all threads of the cluster.
__device__ inline int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Shows what this thread wrote to shared memory to the copy engine and to warpgroup products.
__device__ inline void fence_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of a block's first `num_threads` threads, those of its consumers.
__device__ inline void consumers_sync(int num_threads) {
    asm volatile("bar.sync 1, %0;" :: "r"(num_threads) : "memory");
}

// The same value, which all lanes of the warp have: the compiler may keep it in a register that they share.
__device__ inline int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Registers a thread of this warpgroup, where the block's groups share them unequally.
template <int COUNT>
__device__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }

template <int COUNT>
__device__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }

// ---- The copy engine: boxes [64 tokens, 64 columns] of a [B, H, T, D] tensor ----

// What the driver makes of a tensor; rows of a box are swizzled as those of Tile<64> are.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

__device__ inline void copy_box(
    void* shared, const TensorMap& map, Barrier& barrier, int column, int token, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];"
        :: "r"(shared_address(shared)), "l"(&map), "r"(shared_address(&barrier)),
           "r"(column), "r"(token), "r"(head), "r"(batch) : "memory");
}

// The same into both blocks of a cluster: to the same place of each, and to the same barrier.
__device__ inline void copy_box_to_both(
    void* shared, const TensorMap& map, Barrier& barrier, int column, int token, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
        :: "r"(shared_address(shared)), "l"(&map), "r"(shared_address(&barrier)),
           "r"(column), "r"(token), "r"(head), "r"(batch), "h"((unsigned short)3) : "memory");
}

__device__ inline void store_box(
    const TensorMap& map, const void* shared, int column, int token, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 :: "l"(&map), "r"(shared_address(shared)),
                    "r"(column), "r"(token), "r"(head), "r"(batch) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the boxes that this thread stored have left shared memory.
__device__ inline void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// ---- Fragments of a warp, to shared memory ----

// The reverse of load_blocks.
template <bool TRANSPOSED>
__device__ void store_blocks(void* row, const uint32 (&blocks)[4]) {
    if constexpr (TRANSPOSED)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     :: "r"(shared_address(row)), "r"(blocks[0]), "r"(blocks[1]), "r"(blocks[2]),
                        "r"(blocks[3]) : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     :: "r"(shared_address(row)), "r"(blocks[0]), "r"(blocks[1]), "r"(blocks[2]),
                        "r"(blocks[3]) : "memory");
}

// ---- Products of a warpgroup: sum [64, N] (+)= left [64, 16] @ right [16, N], in float32 ----

// An operand in shared memory, in panels of 64 rows of 64 elements, swizzled as Tile<64> is. ROWS:
// the operand's rows (right: columns) are the panel's rows; else they run along the panel's rows, and
// the next 64 of them lie in the next panel.
template <bool ROWS>
struct Matrix {
    unsigned long long bits;

    __device__ explicit Matrix(const unsigned char* panel) {
        constexpr unsigned long long SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024 / 16, PANEL = 8192 / 16;
        bits = SWIZZLE_128 | EIGHT_ROWS << 32 | PANEL << 16 | (shared_address(panel) & 0x3ffff) >> 4;
    }

    // The operand whose 16 elements of the inner dimension begin at `inner`.
    __device__ Matrix at(int inner) const {
        Matrix there = *this;
        there.bits += (ROWS ? inner / 64 * 8192 + inner % 64 * 2 : inner * 128) / 16;
        return there;
    }
};

// Orders this thread's earlier accesses to registers before the products that use them.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses to a sum across the place.
template <int N>
__device__ void keep(float (&sum)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+f"(sum[n]) :: "memory");
}

template <class E>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

// Registers of a sum of N = 32, N = 64 and N = 128, as text and as operands.
#define TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TEXT_32 TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT_64 TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
                "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUM_8(x, i) \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), \
    "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define SUM_16(x, i) SUM_8(x, i), SUM_8(x, i + 8)
#define SUM_32(x, i) SUM_16(x, i), SUM_16(x, i + 16)

// A product that adds to the sum unless the operand `add_operand` is 0.
#define PRODUCT(shape_and_types, sum_text, operands, add_operand) \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " add_operand ", 0;\n" \
    "wgmma.mma_async.sync.aligned." shape_and_types " {" sum_text "}, " operands ";\n}"

// The left operand from registers, as fragments of the warps that have 16 rows each; without `add` the
// sum starts at zero.
template <class E, int N, bool RIGHT_ROWS>
__device__ void product(float (&sum)[N / 2], const uint32 (&left)[4], Matrix<RIGHT_ROWS> right, bool add) {
    static_assert(N == 64 || N == 128, "a state's columns");
#define OPERANDS "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right.bits), \
                 "r"((int)add), "n"(!RIGHT_ROWS)
#define NARROW(type) PRODUCT("m64n64k16.f32." type "." type, TEXT_32, \
                             "{%32, %33, %34, %35}, %36, add, 1, 1, %38", "%37")
#define WIDE(type) PRODUCT("m64n128k16.f32." type "." type, TEXT_64, \
                           "{%64, %65, %66, %67}, %68, add, 1, 1, %70", "%69")
    if constexpr (N == 64 && is_bfloat16<E>)
        asm volatile(NARROW("bf16") : SUM_32(sum, 0) : OPERANDS);
    else if constexpr (N == 64)
        asm volatile(NARROW("f16") : SUM_32(sum, 0) : OPERANDS);
    else if constexpr (is_bfloat16<E>)
        asm volatile(WIDE("bf16") : SUM_32(sum, 0), SUM_32(sum, 32) : OPERANDS);
    else
        asm volatile(WIDE("f16") : SUM_32(sum, 0), SUM_32(sum, 32) : OPERANDS);
#undef OPERANDS
#undef NARROW
#undef WIDE
}

// Both operands from shared memory, N = 32 or 64.
template <class E, bool LEFT_ROWS, bool RIGHT_ROWS, int COUNT>
__device__ void product(float (&sum)[COUNT], Matrix<LEFT_ROWS> left, Matrix<RIGHT_ROWS> right, bool add) {
    static_assert(COUNT == 16 || COUNT == 32, "a chunk's scores, or half of them");
#define OPERANDS "l"(left.bits), "l"(right.bits), "r"((int)add), "n"(!LEFT_ROWS), "n"(!RIGHT_ROWS)
#define HALF(type) PRODUCT("m64n32k16.f32." type "." type, TEXT_16, \
                           "%16, %17, add, 1, 1, %19, %20", "%18")
#define NARROW(type) PRODUCT("m64n64k16.f32." type "." type, TEXT_32, \
                             "%32, %33, add, 1, 1, %35, %36", "%34")
    if constexpr (COUNT == 16 && is_bfloat16<E>)
        asm volatile(HALF("bf16") : SUM_16(sum, 0) : OPERANDS);
    else if constexpr (COUNT == 16)
        asm volatile(HALF("f16") : SUM_16(sum, 0) : OPERANDS);
    else if constexpr (is_bfloat16<E>)
        asm volatile(NARROW("bf16") : SUM_32(sum, 0) : OPERANDS);
    else
        asm volatile(NARROW("f16") : SUM_32(sum, 0) : OPERANDS);
#undef OPERANDS
#undef HALF
#undef NARROW
}

#undef PRODUCT
#undef SUM_8
#undef SUM_16
#undef SUM_32
#undef TEXT_16
#undef TEXT_32
#undef TEXT_64
