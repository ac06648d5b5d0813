// Instructions of sm_90a: products of matrices that a warpgroup reads from shared memory, copies of
// tensor boxes to it, and the barriers there that both are waited for with. For nvcc they are PTX;
// the emulator of the tests has functions of the same names. Reference: PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Instructions", "Data Movement and Conversion
// Instructions: Tensor copy" and "Parallel Synchronization and Communication Instructions:
// mbarrier".
//
// Code for other architectures has none of them: kHopper says whether a kernel may use them.
#pragma once

#include "kernels/cuda/ptx.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace cnnkernels::cuda {

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

constexpr int kWarpgroup = 128;
// A copied box begins at a multiple of this, a swizzled one at a multiple of its pattern.
constexpr int kBoxAlignment = 128;
constexpr int kSwizzleBytes = 1024;

// Where a matrix lies in shared memory, as the products want to know it: rows of 16 bytes of depth
// a core matrix, of eight rows. `depth_bytes` lead to the next 16 bytes of depth, `row_bytes` to
// the next eight rows. Without a swizzle the eight rows of a core matrix follow one another; with
// it a row has 128 bytes, so that depth_bytes say nothing. All are multiples of 16.
__device__ inline uint64_t matrix_descriptor(uint32_t address, int depth_bytes, int row_bytes,
                                             bool swizzled) {
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return field(address) | field(static_cast<uint32_t>(depth_bytes)) << 16 |
         field(static_cast<uint32_t>(row_bytes)) << 32 | uint64_t{swizzled} << 62;
}
// The descriptor of the matrix that begins so many bytes on.
__device__ inline uint64_t advance_descriptor(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Waits of a phase at a time: one is over when as many have arrived as the barrier counts, and all
// bytes are there that arrivals said to expect. Phases are told apart by their parity, from 0.
struct Barrier {
  uint64_t bits;
};

// A tensor of 16-bit elements and the box of it that a copy takes, the fastest dimension first;
// strides, in bytes, are those of the dimensions behind it. What of a box lies outside of the
// tensor is zero.
struct TensorBoxes {
  int rank;
  const void* elements;
  uint64_t sizes[5];
  uint64_t strides[4];
  uint32_t box[5];
  bool swizzled;  // rows of 128 bytes, whose chunk j of row r lies in place j ^ r % 8
};

// Found at run time, so that nothing is linked to the driver.
inline Error encode_tensor_map(const TensorBoxes& boxes, CUtensorMap* map) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorInvalidValue;
  const cuuint32_t every_element[5] = {1, 1, 1, 1, 1};
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5];
  for (int i = 0; i < boxes.rank; ++i) {
    sizes[i] = boxes.sizes[i];
    box[i] = boxes.box[i];
    if (i > 0) strides[i - 1] = boxes.strides[i - 1];
  }
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, static_cast<cuuint32_t>(boxes.rank),
      const_cast<void*>(boxes.elements), sizes, strides, box, every_element,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      boxes.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#ifdef __CUDACC__

// By one thread, which then calls publish_barriers, before a barrier of the block.
__device__ inline void init_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
// Lets the asynchronous copies see them too.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
// Arrives, and has the phase wait for so many bytes.
__device__ inline void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
// Until a phase of this parity is over and the next has not ended.
__device__ inline void wait(Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Begins to copy the box at `at`, the fastest dimension first; the barrier gets its bytes.
__device__ inline void copy_box(void* target, const CUtensorMap& map, Barrier& barrier,
                                const int (&at)[4]) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(target)),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(&barrier))
      : "memory");
}
__device__ inline void copy_box(void* target, const CUtensorMap& map, Barrier& barrier,
                                const int (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(target)),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]),
      "r"(shared_address(&barrier))
      : "memory");
}

// Before the first product, and before one with sums that the thread has read or written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last commit are a group.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all groups but the kLeft last ones.
template <int kLeft>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Waits for all, and hands the sums back.
template <int kCount>
__device__ inline void wgmma_finish(float (&sums)[kCount]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define CNNK_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define CNNK_SUMS_16(i) CNNK_SUMS_4(i), CNNK_SUMS_4(i + 4), CNNK_SUMS_4(i + 8), CNNK_SUMS_4(i + 12)
#define CNNK_NAMES_32                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CNNK_NAMES_64                                                                       \
  CNNK_NAMES_32                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CNNK_WGMMA(shape, type, names, rows, columns, ...)                              \
  asm volatile(                                                                         \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, 1, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " rows \
      ", " columns ", adds, 1, 1, 0, 0;\n}"                                             \
      : __VA_ARGS__                                                                     \
      : "l"(a), "l"(b))

// sums += a b', of 64 rows of a and kCount * 2 rows of b, 16 elements of T deep, both with their
// depth contiguous; all four warps have the same descriptors. Of warp w, lane l has
// sums[4 j + e] of row 16 w + l / 4 + e / 2 * 8 and column 8 j + l % 4 * 2 + e % 2.
template <class T>
__device__ inline void wgmma_m64k16(float (&sums)[32], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, float16>) {
    CNNK_WGMMA("m64n64k16", "f16", CNNK_NAMES_32, "%32", "%33", CNNK_SUMS_16(0), CNNK_SUMS_16(16));
  } else {
    static_assert(std::is_same_v<T, bfloat16>, "elements of 16 bits");
    CNNK_WGMMA("m64n64k16", "bf16", CNNK_NAMES_32, "%32", "%33", CNNK_SUMS_16(0), CNNK_SUMS_16(16));
  }
}
template <class T>
__device__ inline void wgmma_m64k16(float (&sums)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, float16>) {
    CNNK_WGMMA("m64n128k16", "f16", CNNK_NAMES_64, "%64", "%65", CNNK_SUMS_16(0), CNNK_SUMS_16(16),
               CNNK_SUMS_16(32), CNNK_SUMS_16(48));
  } else {
    static_assert(std::is_same_v<T, bfloat16>, "elements of 16 bits");
    CNNK_WGMMA("m64n128k16", "bf16", CNNK_NAMES_64, "%64", "%65", CNNK_SUMS_16(0), CNNK_SUMS_16(16),
               CNNK_SUMS_16(32), CNNK_SUMS_16(48));
  }
}

#undef CNNK_SUMS_4
#undef CNNK_SUMS_16
#undef CNNK_NAMES_32
#undef CNNK_NAMES_64
#undef CNNK_WGMMA

#endif

}  // namespace cnnkernels::cuda
