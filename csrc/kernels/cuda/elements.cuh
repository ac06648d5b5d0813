// Elements on the device: conversions to and from the type that is computed in, and vectors that
// are read and written in one access.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/types.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace cnnkernels::cuda {

__device__ inline float to_accumulator(float value) { return value; }
__device__ inline double to_accumulator(double value) { return value; }

#ifdef __CUDACC__
__device__ inline float to_accumulator(bfloat16 value) {
  return __bfloat162float(__ushort_as_bfloat16(value.bits));
}
__device__ inline float to_accumulator(float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
#else
inline float to_accumulator(bfloat16 value) { return widen(value); }
inline float to_accumulator(float16 value) { return widen(value); }
#endif

// Rounds to nearest, ties to even.
template <class T>
__device__ inline T from_accumulator(Accumulator<T> value) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<T, float16>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return value;
  }
#else
  return narrow<T>(value);
#endif
}

// kCount neighbours, read and written in as few accesses as their size allows: the alignment tells
// the compiler so, and is what memory must have.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < kVectorBytes ? sizeof(T) * kCount : kVectorBytes) Vector {
  T values[kCount];

  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

template <int kCount, class T>
__device__ inline Vector<T, kCount> load_vector(const T* elements) {
  CNNK_CHECK_ALIGNMENT(elements, alignof(Vector<T, kCount>));
  return *reinterpret_cast<const Vector<T, kCount>*>(elements);
}

template <int kCount, class T>
__device__ inline void store_vector(T* elements, const Vector<T, kCount>& vector) {
  CNNK_CHECK_ALIGNMENT(elements, alignof(Vector<T, kCount>));
  *reinterpret_cast<Vector<T, kCount>*>(elements) = vector;
}

}  // namespace cnnkernels::cuda
