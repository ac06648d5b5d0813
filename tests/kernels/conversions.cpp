#include "conversions.h"

#include <cmath>
#include <limits>

#include "support.h"

namespace kernel_tests {
namespace {

using cnnkernels::narrow;
using cnnkernels::widen;

// What IEEE 754 says that `bits` of a format with these fields is worth.
double value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  const double sign = bits >> (exponent_bits + mantissa_bits) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  const int hidden = exponent == 0 ? 0 : 1 << mantissa_bits;
  return sign * std::ldexp(hidden + mantissa, std::max(exponent, 1) - bias - mantissa_bits);
}

template <class T>
void check_format(const char* name, int exponent_bits, int mantissa_bits) {
  set_context(std::string("conversions of ") + name);
  int64_t wide_wrong = 0, narrow_wrong = 0, tie_wrong = 0;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const T value = {static_cast<uint16_t>(bits)};
    const float wide = widen(value);
    const double truth = value_of(bits, exponent_bits, mantissa_bits);
    if (std::isnan(truth)) {
      wide_wrong += !std::isnan(wide);
      narrow_wrong += !std::isnan(widen(narrow<T>(wide)));
      continue;
    }
    wide_wrong += wide != truth || std::signbit(wide) != std::signbit(truth);
    narrow_wrong += narrow<T>(wide).bits != bits;
    if ((bits & 0x7fffu) == infinity) continue;
    // Half way to the next value away from zero, which for the largest is where
    // infinity begins; and the floats next to the middle.
    const double unit = std::fabs(truth - value_of(bits ^ 1u, exponent_bits, mantissa_bits));
    const bool largest = (bits & 0x7fffu) == infinity - 1;
    const double next = largest ? truth + std::copysign(unit, truth)
                                : value_of(bits + 1, exponent_bits, mantissa_bits);
    const float middle = static_cast<float>((truth + next) / 2);
    if (middle != (truth + next) / 2) continue;  // below the smallest float
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    tie_wrong += narrow<T>(middle).bits != even;
    tie_wrong += narrow<T>(std::nextafter(middle, 0.0f)).bits != bits;
    tie_wrong +=
        narrow<T>(std::nextafter(middle, std::copysign(INFINITY, middle))).bits != bits + 1;
  }
  expect(wide_wrong == 0, std::to_string(wide_wrong) + " values widen wrongly");
  expect(narrow_wrong == 0, std::to_string(narrow_wrong) + " values do not come back");
  expect(tie_wrong == 0, std::to_string(tie_wrong) + " floats round wrongly");
}

}  // namespace

void check_conversions() {
  check_format<cnnkernels::float16>("float16", 5, 10);
  check_format<cnnkernels::bfloat16>("bfloat16", 8, 7);
}

}  // namespace kernel_tests
