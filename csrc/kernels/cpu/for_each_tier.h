// Compiles one kernel source for every instruction-set tier.
//
// A kernel's .cpp defines CNNK_TIER_SOURCE and includes this file after all
// headers of its own. The source is then compiled once a tier, in a namespace of
// the tier's name, under `#pragma GCC target`. The inner anonymous namespace
// keeps the linker from merging an AVX-512 function into the baseline; standard
// headers stay outside for the same reason. simd.inl gives each tier its
// vector width.
//
// The AVX-512 tier is compiled everywhere x86-64 is; it runs where CPUID allows.
// With CNNK_EMULATE_AVX512, for tests, its vector width and tiles are compiled to
// AVX2 instructions, so that a machine without AVX-512 runs them too.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/types.h"
#include "kernels/workspace.h"

#define CNNK_TIER_ID 0
#define CNNK_VECTOR_BYTES 16
#define CNNK_VECTOR_REGISTERS 16
namespace cnnkernels {
namespace baseline {
namespace {
#include "kernels/cpu/simd.inl"
#include CNNK_TIER_SOURCE
}  // namespace
}  // namespace baseline
}  // namespace cnnkernels
#undef CNNK_TIER_ID
#undef CNNK_VECTOR_BYTES
#undef CNNK_VECTOR_REGISTERS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define CNNK_TIER_ID 1
#define CNNK_VECTOR_BYTES 32
#define CNNK_VECTOR_REGISTERS 16
namespace cnnkernels {
namespace avx2 {
namespace {
#include "kernels/cpu/simd.inl"
#include CNNK_TIER_SOURCE
}  // namespace
}  // namespace avx2
}  // namespace cnnkernels
#undef CNNK_TIER_ID
#undef CNNK_VECTOR_BYTES
#undef CNNK_VECTOR_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(CNNK_EMULATE_AVX512) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(CNNK_EMULATE_AVX512)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define CNNK_TIER_ID 2
#define CNNK_VECTOR_BYTES 64
#define CNNK_VECTOR_REGISTERS 32
namespace cnnkernels {
namespace avx512 {
namespace {
#include "kernels/cpu/simd.inl"
#include CNNK_TIER_SOURCE
}  // namespace
}  // namespace avx512
}  // namespace cnnkernels
#undef CNNK_TIER_ID
#undef CNNK_VECTOR_BYTES
#undef CNNK_VECTOR_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// The function `name` of the tier for `isa`.
#define CNNK_TIER_FUNCTION(isa, ...)                         \
  ((isa) >= ::cnnkernels::Isa::avx512 ? &avx512::__VA_ARGS__ \
   : (isa) == ::cnnkernels::Isa::avx2 ? &avx2::__VA_ARGS__   \
                                      : &baseline::__VA_ARGS__)

#else

#define CNNK_TIER_FUNCTION(isa, ...) ((void)(isa), &baseline::__VA_ARGS__)

#endif
