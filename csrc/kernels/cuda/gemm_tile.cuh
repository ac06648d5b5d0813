// The tile of a matrix product on tensor cores that the convolution's kernels share.
//
// A block of 2 * kTile threads has kTile rows and columns, a warp kTile / 2 rows and 32 columns of
// them. Slices of both matrices, 64 bytes deep, lie in shared memory with their depth contiguous,
// as rows of four chunks of 16 bytes. Chunk j of row r lies in place j ^ (r / 2 % 4): the eight
// rows that an ldmatrix reads are then in different banks.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/source_patch.cuh"

namespace cnnkernels::cuda {

constexpr int kSliceChunks = 4;
constexpr int kSliceRowBytes = kSliceChunks * kChunkBytes;
constexpr int kWarpColumns = 32;

// Of 32 bytes of depth: sums += a b.
template <class T>
struct Products16 {
  using Element = T;
  __device__ static void add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(sums, a, b);
  }
};

struct ProductsTf32 {
  using Element = float;
  __device__ static void add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t rounded_a[4] = {to_tf32(a[0]), to_tf32(a[1]), to_tf32(a[2]), to_tf32(a[3])};
    const uint32_t rounded_b[2] = {to_tf32(b[0]), to_tf32(b[1])};
    mma_m16n8k8_tf32(sums, rounded_a, rounded_b);
  }
};

struct ProductsOfParts {
  using Element = float;
  __device__ static void add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    split<false>(a, high_a, low_a);
    split<false>(b, high_b, low_b);
    // The small ones first. Tensor cores cut off what they add to a sum, which a long chain would
    // gather up; an addition rounds.
    float short_sums[4] = {};
    mma_m16n8k8_tf32(short_sums, low_a, high_b);
    mma_m16n8k8_tf32(short_sums, high_a, low_b);
    mma_m16n8k8_tf32(short_sums, high_a, high_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += short_sums[i];
  }

  // The same where operands may be infinite. Then add() gives NaN, of infinity less infinity in a
  // low part, or times a low part of zero; the high parts alone give what floats do.
  __device__ static void add_infinite(float (&sums)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    split<true>(a, high_a, low_a);
    split<true>(b, high_b, low_b);
    float large[4] = {};
    mma_m16n8k8_tf32(large, high_a, high_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += large[i];
    float small[4] = {};
    mma_m16n8k8_tf32(small, low_a, high_b);
    mma_m16n8k8_tf32(small, high_a, low_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += small[i] == small[i] ? small[i] : 0;
  }

  // x = high + low, of 11 and 12 bits, of which a product takes 11. Unless it is exact about NaN,
  // its high part may be a number; its low part is NaN, as are the sums then.
  template <bool kExactNan, int kCount>
  __device__ static void split(const uint32_t (&bits)[kCount], uint32_t (&high)[kCount],
                               uint32_t (&low)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = kExactNan ? to_tf32(bits[i]) : (bits[i] + 0x1000u) & 0xffffe000u;
      low[i] = __float_as_uint(__uint_as_float(bits[i]) - __uint_as_float(high[i]));
    }
  }
};

// Where chunk `chunk` of row `row` lies in a slice.
__device__ inline int chunk_place(int row, int chunk) {
  return row * kSliceRowBytes + (chunk ^ (row / 2 % kSliceChunks)) * kChunkBytes;
}

template <int kTile, int kStages>
struct alignas(kChunkBytes) Slices {
  unsigned char rows[kStages][kTile * kSliceRowBytes];
  unsigned char columns[kStages][kTile * kSliceRowBytes];
};

// Of tiles of 16 rows by 8 columns, as the products have them.
template <int kTile>
using WarpSums = float[kTile / 32][kWarpColumns / 8][4];

// Adds the products of a stage to a warp's sums.
template <class Products, int kTile, int kStages>
__device__ inline void multiply_slice(const Slices<kTile, kStages>& slices, int stage, int warp_row,
                                      int warp_column, int lane, WarpSums<kTile>& sums) {
  constexpr int kRowTiles = kTile / 32;
  constexpr int kColumnTiles = kWarpColumns / 8;
#pragma unroll
  for (int half = 0; half < kSliceChunks / 2; ++half) {
    uint32_t a[kRowTiles][4], b[kColumnTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int row = warp_row + i * 16 + lane % 16;
      ldmatrix_x4(a[i], &slices.rows[stage][chunk_place(row, 2 * half + lane / 16)]);
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t two[4];
      const int row = warp_column + j * 8 + lane / 16 * 8 + lane % 8;
      ldmatrix_x4(two, &slices.columns[stage][chunk_place(row, 2 * half + lane / 8 % 2)]);
      b[j][0] = two[0];
      b[j][1] = two[1];
      b[j + 1][0] = two[2];
      b[j + 1][1] = two[3];
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) Products::add(sums[i][j], a[i], b[j]);
    }
  }
}

}  // namespace cnnkernels::cuda
