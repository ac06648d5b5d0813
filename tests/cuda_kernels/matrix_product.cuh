// Matrix products on tensor cores: kernels for the emulator's own tests, which break them.
//
// A block of four warps has a tile of 64x64 of C, a warp 32x32 of it. Slices of A and B, 32 deep,
// go through kStages buffers of shared memory by asynchronous copies: while one is multiplied the
// next are under way. Rows have eight elements more, so that the eight rows of an ldmatrix lie in
// different banks. What lies past the ends of the matrices is copied as zeros.
#pragma once

#include "kernels/cuda/ptx.cuh"

namespace cuda_kernel_tests {

using namespace cnnkernels;
using namespace cnnkernels::cuda;

constexpr int kTile = 64;
constexpr int kDepth = 32;
constexpr int kStages = 3;
constexpr int kProductThreads = 128;
constexpr int kWarpTile = 32;
constexpr int kChunk = 8;  // elements of 16 bits in one copy

template <class T>
struct alignas(16) ProductBuffers {
  static constexpr int kARow = kDepth + kChunk, kBRow = kTile + kChunk;
  T a[kStages][kTile * kARow];   // [row][depth]
  T b[kStages][kDepth * kBRow];  // [depth][column]
};

// Begins to copy the slice of A and B at `depth` to the buffer of a stage.
template <class T>
__device__ void copy_slice(ProductBuffers<T>& buffers, int stage, const T* a, const T* b, int m,
                           int n, int k, int row0, int column0, int depth) {
  using Buffers = ProductBuffers<T>;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kTile * (kDepth / kChunk); i += kProductThreads) {
    const int row = i / (kDepth / kChunk), d = i % (kDepth / kChunk) * kChunk;
    const bool inside = row0 + row < m && depth + d < k;
    cp_async<16>(&buffers.a[stage][row * Buffers::kARow + d],
                 inside ? a + int64_t{row0 + row} * k + depth + d : a, inside ? 16 : 0);
  }
  for (int i = thread; i < kDepth * (kTile / kChunk); i += kProductThreads) {
    const int d = i / (kTile / kChunk), column = i % (kTile / kChunk) * kChunk;
    const bool inside = depth + d < k && column0 + column < n;
    cp_async<16>(&buffers.b[stage][d * Buffers::kBRow + column],
                 inside ? b + int64_t{depth + d} * n + column0 + column : b, inside ? 16 : 0);
  }
}

// C = A B for row-major m x k and k x n elements of 16 bits, n and k multiples of 8, and C in
// float.
template <class T>
__global__ void __launch_bounds__(kProductThreads)
    matrix_product_kernel(const T* a, const T* b, float* c, int m, int n, int k) {
  using Buffers = ProductBuffers<T>;
  CNNK_SHARED(Buffers, shared, 1);
  Buffers& buffers = shared[0];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row0 = static_cast<int>(blockIdx.x) * kTile,
            column0 = static_cast<int>(blockIdx.y) * kTile;
  const int warp_row = warp / 2 * kWarpTile, warp_column = warp % 2 * kWarpTile;
  float sums[2][4][4] = {};
  const int slices = (k + kDepth - 1) / kDepth;
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < slices) copy_slice(buffers, stage, a, b, m, n, k, row0, column0, stage * kDepth);
    cp_async_commit();
  }
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // all copies of the slice are done, and the slice before is multiplied
    const int next = slice + kStages - 1;
    if (next < slices) {
      copy_slice(buffers, next % kStages, a, b, m, n, k, row0, column0, next * kDepth);
    }
    cp_async_commit();
    const int stage = slice % kStages;
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t of_a[2][4], of_b[4][2];
      for (int i = 0; i < 2; ++i) {
        const int row = warp_row + i * 16 + lane % 16;
        ldmatrix_x4(of_a[i], &buffers.a[stage][row * Buffers::kARow + depth + lane / 16 * 8]);
      }
      for (int j = 0; j < 2; ++j) {
        uint32_t r[4];
        const int column = warp_column + j * 16 + lane / 16 * 8;
        ldmatrix_x4_transposed(r, &buffers.b[stage][(depth + lane % 16) * Buffers::kBRow + column]);
        for (int half = 0; half < 4; ++half) of_b[2 * j + half / 2][half % 2] = r[half];
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[i][j], of_a[i], of_b[j]);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + warp_row + i * 16 + lane / 4 + e / 2 * 8;
        const int column = column0 + warp_column + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m && column < n) c[int64_t{row} * n + column] = sums[i][j][e];
      }
    }
  }
}

// The same of floats, with products in TF32: one warp, a tile of 16x8, fragments read where they
// lie.
__global__ void __launch_bounds__(32)
    matrix_product_tf32_kernel(const float* a, const float* b, float* c, int m, int n, int k) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, t = lane % 4;
  const int row0 = static_cast<int>(blockIdx.x) * 16, column0 = static_cast<int>(blockIdx.y) * 8;
  const auto a_at = [&](int row, int depth) {
    return row < m && depth < k ? __float_as_uint(a[row * k + depth]) : 0u;
  };
  const auto b_at = [&](int depth, int column) {
    return depth < k && column < n ? __float_as_uint(b[depth * n + column]) : 0u;
  };
  float sums[4] = {};
  for (int depth = 0; depth < k; depth += 8) {
    const uint32_t of_a[4] = {a_at(row0 + group, depth + t), a_at(row0 + group + 8, depth + t),
                              a_at(row0 + group, depth + t + 4),
                              a_at(row0 + group + 8, depth + t + 4)};
    const uint32_t of_b[2] = {b_at(depth + t, column0 + group),
                              b_at(depth + t + 4, column0 + group)};
    mma_m16n8k8_tf32(sums, of_a, of_b);
  }
  for (int e = 0; e < 4; ++e) {
    const int row = row0 + group + e / 2 * 8, column = column0 + t * 2 + e % 2;
    if (row < m && column < n) c[row * n + column] = sums[e];
  }
}

}  // namespace cuda_kernel_tests
