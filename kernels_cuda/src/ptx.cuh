// The instructions that the kernels use beside plain C++, one function each.
//
// Nothing of the toolkit's headers is needed, so that NVRTC alone compiles the kernels. The build for
// the host (tests/cuda_on_host) has a file of the same name with the same functions.
#pragma once

using uint32 = unsigned int;
using int64 = long long;

// ---- 16-bit elements: two of them in a register, the first in the lower half ----

struct bfloat16 {
    unsigned short bits;

    // Both rounded to nearest even.
    static __device__ uint32 pack(float first, float second) {
        uint32 packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
        return packed;
    }
    static __device__ float first(uint32 packed) { return __uint_as_float(packed << 16); }
    static __device__ float second(uint32 packed) { return __uint_as_float(packed & 0xffff0000u); }
};

struct float16 {
    unsigned short bits;

    static __device__ uint32 pack(float first, float second) {
        uint32 packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
        return packed;
    }
    static __device__ float first(uint32 packed) { return widened(packed & 0xffffu); }
    static __device__ float second(uint32 packed) { return widened(packed >> 16); }

  private:
    static __device__ float widened(uint32 bits) {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"((unsigned short)bits));
        return wide;
    }
};

// The block's shared memory, of as many bytes as the launch says.
__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    return shared_bytes;
}

// ---- Copies from global to shared memory that run beside the threads ----

__device__ inline uint32 shared_address(const void* pointer) {
    return (uint32)__cvta_generic_to_shared(pointer);
}

// 16 bytes, or 16 zero bytes where nothing is there to be read.
__device__ inline void copy_async(void* shared, const void* global, bool is_there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(is_there ? 16 : 0) : "memory");
}

// Close a group of copies; a thread that waits for all but its last PENDING groups sees what its own
// copies of the others brought. A barrier shows it to the other threads.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// ---- Matrix fragments of a warp ----

// Four 8 x 8 blocks of 16-bit elements: lane l gives the address of row l % 8 of block l / 8, and gets
// of each block the two neighbours at row l / 4 and column 2 (l % 4); TRANSPOSED of each transposed.
template <bool TRANSPOSED>
__device__ void load_blocks(uint32 (&blocks)[4], const void* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                     : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                     : "r"(shared_address(row)) : "memory");
}

// sum [16, 8] += left [16, 16] @ right [16, 8], in float32. Lane l holds of
//   sum    rows l / 4 and l / 4 + 8, columns 2 (l % 4) and one on;
//   left   the blocks (0, 0), (8, 0), (0, 8), (8, 8), each as load_blocks gives it;
//   right  the blocks (0, 0), (8, 0), each as load_blocks gives it TRANSPOSED.
template <class E>
__device__ void multiply_add(float (&sum)[4], const uint32 (&left)[4], uint32 right_0, uint32 right_1);

template <>
__device__ inline void multiply_add<bfloat16>(
    float (&sum)[4], const uint32 (&left)[4], uint32 right_0, uint32 right_1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}

template <>
__device__ inline void multiply_add<float16>(
    float (&sum)[4], const uint32 (&left)[4], uint32 right_0, uint32 right_1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}
