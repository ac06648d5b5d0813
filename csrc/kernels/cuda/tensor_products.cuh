// How tensor cores multiply elements of a type: of 16 bits as they are, float32 in TF32 or in
// parts.
#pragma once

#include "kernels/cuda/source_patch.cuh"

namespace cnnkernels::cuda {

// Of 32 bytes of depth: sums += a b.
template <class T>
struct Products16 {
  using Element = T;
  static constexpr int kParts = 1;  // of an operand
  __device__ static void add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(sums, a, b);
  }
};

struct ProductsTf32 {
  using Element = float;
  static constexpr int kParts = 1;
  __device__ static void add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t rounded_a[4] = {to_tf32(a[0]), to_tf32(a[1]), to_tf32(a[2]), to_tf32(a[3])};
    const uint32_t rounded_b[2] = {to_tf32(b[0]), to_tf32(b[1])};
    mma_m16n8k8_tf32(sums, rounded_a, rounded_b);
  }
};

// Of an infinite operand the low part is NaN, and so is the sum: who asks for it has to look.
struct ProductsOfParts {
  using Element = float;
  static constexpr int kParts = 2;
  __device__ static void add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    split<false>(a, high_a, low_a);
    split<false>(b, high_b, low_b);
    // Tensor cores cut off what a sum has beyond 24 bits, which adds up over a long chain. So they
    // sum the products of one step alone, the small ones first, and an addition that rounds does
    // the rest (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
    // surpassing the FP32 theoretical peak performance", 2022).
    float short_sums[4] = {};
    mma_m16n8k8_tf32(short_sums, low_a, high_b);
    mma_m16n8k8_tf32(short_sums, high_a, low_b);
    mma_m16n8k8_tf32(short_sums, high_a, high_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += short_sums[i];
  }

  // The same where operands may be infinite. Then add() gives NaN, of infinity less infinity in a
  // low part, or times a low part of zero; the high parts alone give what floats do. (The high part
  // of what is within 2^-12 of the largest float is infinite as well.)
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

}  // namespace cnnkernels::cuda
