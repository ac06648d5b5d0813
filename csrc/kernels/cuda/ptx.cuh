// Instructions that CUDA C++ has no function for: matrix products of a warp, the loads that feed
// them, and asynchronous copies to shared memory. For nvcc they are PTX; the emulator of the tests
// has functions of the same names. All are for sm_80 and later. Reference: PTX ISA, "Warp-level
// Matrix Instructions" and "Data Movement and Conversion Instructions: cp.async".
//
// Lane l of a warp is lane l % 4 of its group l / 4. The fragments of a product D += A B:
//   m16n8k16  A: a[0] row g, columns 2t and 2t+1; a[1] row g+8; a[2], a[3] eight columns on
//             B: b[0] rows 2t and 2t+1, column g; b[1] eight rows on
//   m16n8k8   A: a[0] row g, column t; a[1] row g+8; a[2], a[3] four columns on
//             B: b[0] row t, column g; b[1] four rows on
//   D         d[0], d[1] row g, columns 2t and 2t+1; d[2], d[3] row g+8
// with g the group and t the lane in it.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/types.h"

namespace cnnkernels::cuda {

// Whether the code that is compiled may use them. Kernels for older devices are empty: no plan
// names them there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAmpere = false;
#else
constexpr bool kAmpere = true;
#endif

}  // namespace cnnkernels::cuda

#ifdef __CUDACC__

namespace cnnkernels::cuda {

// The address that shared memory has in its own space.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// d += a b, of 16x16 and 16x8 elements of T in pairs, with sums in float.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, bfloat16>, "elements of 16 bits");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d += a b, of 16x8 and 8x8 floats, of which the products take the 10 leading bits of the mantissa.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A float as bits, rounded to the nearest that a product takes whole, away from zero in ties.
__device__ inline uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// Four 8x8 matrices of 16-bit elements: lane 8 i + j brings the address of row j of matrix i, of 16
// bytes in shared memory; r[i] is row l / 4, columns 2 (l % 4) and the next, of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices.
__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Begins to copy valid_bytes from global to shared memory and to fill up kBytes with zeros; both
// addresses are multiples of kBytes. What is read before a wait is undefined.
template <int kBytes>
__device__ inline void cp_async(void* target, const void* source, int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(target)), "l"(source), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(target)), "l"(source), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
  }
}
// The copies since the last commit are a group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the kLeft last ones.
template <int kLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace cnnkernels::cuda

#endif
