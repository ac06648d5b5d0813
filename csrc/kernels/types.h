// The vocabulary shared by all kernels: element types, memory layouts, and the
// callback through which a kernel reaches its caller's thread pool.
// Nothing in csrc/kernels includes a torch header.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace cnnkernels {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    default:
      return 2;
  }
}

inline int64_t accumulator_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Storage-only 16-bit floats: kernels convert on load and on store and compute
// in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
// The type in which elements of T are multiplied and summed.
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }
inline float widen(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0x1f) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    return float_from_bits(sign | float_bits(magnitude));
  }
  return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even, as IEEE 754 and torch do.
template <class T>
inline T narrow(Accumulator<T> value) {
  return value;
}
template <>
inline bfloat16 narrow<bfloat16>(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline float16 narrow<float16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 aligns the units of 2^-24 with float's last
    // bit, so that the addition itself rounds to nearest even.
    const uint32_t aligned = float_bits(float_from_bits(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (aligned - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Calls body with a value of the element type that `dtype` names.
template <class Body>
void with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::float64:
      return body(double{});
    case DType::bfloat16:
      return body(bfloat16{});
    case DType::float16:
      return body(float16{});
  }
}

// Calls body with a value of the type in which `dtype` is multiplied and summed.
template <class Body>
void with_accumulator(DType dtype, Body&& body) {
  if (dtype == DType::float64) {
    body(double{});
  } else {
    body(float{});
  }
}

// How activations lie in memory: planes of pixels, or pixels of channels
// (torch's contiguous_format and channels_last).
enum class Layout : uint8_t { nchw, nhwc };

// The caller's thread pool. run(n, grain, body, context) calls
// body(context, begin, end) on disjoint ranges that cover [0, n).
struct ThreadPool {
  void (*run)(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  int threads;
};

template <class Body>
void parallel_for(const ThreadPool& pool, int64_t n, bool serial, Body&& body) {
  if (n <= 0) return;
  if (serial || n == 1 || pool.threads <= 1) {
    body(int64_t{0}, n);
    return;
  }
  auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
  };
  pool.run(n, 1, call, const_cast<void*>(static_cast<const void*>(&body)));
}

constexpr int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Work below this many multiply-adds or bytes runs on the calling thread:
// waking a thread pool costs more than about 30 microseconds of arithmetic.
constexpr int64_t kSerialMultiplyAdds = 500 * 1000;
constexpr int64_t kSerialBytes = 256 * 1024;

}  // namespace cnnkernels
