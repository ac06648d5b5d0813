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

// The first or the second of two elements that lie in a word, in one instruction.
template <class T>
__device__ inline float to_accumulator(uint32_t word, bool second) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, float16>) {
    const __half2 pair = *reinterpret_cast<const __half2*>(&word);
    return second ? __high2float(pair) : __low2float(pair);
  } else {
    return __uint_as_float(second ? word & 0xffff0000u : word << 16);
  }
#else
  return to_accumulator(T{static_cast<uint16_t>(second ? word >> 16 : word)});
#endif
}

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

// Reads 2, 4, 8 or 16 bytes in one access, of global memory that is not written meanwhile, or sets
// zeros where a bound says so: a load under a predicate. Of an `if` the compiler makes branches,
// and computes the address anew in each.
constexpr int words_of(int bytes) { return bytes < 4 ? 1 : bytes / 4; }
template <int kBytes>
__device__ inline void load_or_zero(const void* from, uint32_t exists,
                                    uint32_t (&words)[words_of(kBytes)]) {
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  if constexpr (kBytes == 2) {
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.u16 %0, [%1];}"
        : "=r"(words[0])
        : "l"(from), "r"(exists));
  } else if constexpr (kBytes == 4) {
    asm("{.reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1];}"
        : "=r"(words[0])
        : "l"(from), "r"(exists));
  } else if constexpr (kBytes == 8) {
    asm("{.reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0;"
        " @p ld.global.nc.v2.b32 {%0, %1}, [%2];}"
        : "=r"(words[0]), "=r"(words[1])
        : "l"(from), "r"(exists));
  } else {
    asm("{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0;"
        " mov.b32 %3, 0; @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];}"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(from), "r"(exists));
  }
#else
  for (uint32_t& word : words) word = 0;
  if (exists == 0) return;
  CNNK_CHECK_ALIGNMENT(from, kBytes);
  memcpy(words, from, kBytes);
#endif
}

// Rounds as from_accumulator, two of 16 bits at a time.
template <class T, int kCount>
__device__ inline Vector<T, kCount> from_accumulators(const Accumulator<T> (&values)[kCount]) {
  Vector<T, kCount> vector;
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        memcpy(&words[i], &pair, sizeof pair);
      } else {
        const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        memcpy(&words[i], &pair, sizeof pair);
      }
    }
    memcpy(&vector, words, sizeof vector);
    return vector;
  }
#endif
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector[i] = from_accumulator<T>(values[i]);
  return vector;
}

// As store_vector to global memory, where a bound says so.
template <int kCount, class T>
__device__ inline void store_where(uint32_t exists, T* elements, const Vector<T, kCount>& vector) {
#ifdef __CUDACC__
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 2) {
    uint16_t bits;
    memcpy(&bits, &vector, kBytes);
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b16 [%0], %1;}" ::"l"(elements),
                 "h"(bits), "r"(exists));
  } else {
    uint32_t words[kBytes / 4];
    memcpy(words, &vector, kBytes);
    if constexpr (kBytes == 4) {
      asm volatile(
          "{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b32 [%0], %1;}" ::"l"(elements),
          "r"(words[0]), "r"(exists));
    } else if constexpr (kBytes == 8) {
      asm volatile(
          "{.reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2};}" ::"l"(
              elements),
          "r"(words[0]), "r"(words[1]), "r"(exists));
    } else {
      asm volatile(
          "{.reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(
              elements),
          "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(exists));
    }
  }
#else
  if (exists != 0) store_vector<kCount>(elements, vector);
#endif
}

}  // namespace cnnkernels::cuda
