// Compiles one kernel source for the AMX tier alone: AVX-512 vectors and matrix tiles.
//
// As for_each_tier.h, for what needs tiles. With CNNK_EMULATE_AVX512, for tests, the
// vectors are compiled to AVX2 instructions and the tiles are emulated
// (amx_tile.inl). Where CNNK_HAS_AMX is 0 nothing is compiled, and no machine is of
// that tier.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/types.h"
#include "kernels/workspace.h"

#if CNNK_HAS_AMX
#include <immintrin.h>

#if defined(CNNK_EMULATE_AVX512) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(CNNK_EMULATE_AVX512)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#define CNNK_TIER_ID 2
#define CNNK_VECTOR_BYTES 64
#define CNNK_VECTOR_REGISTERS 32
namespace cnnkernels {
namespace amx {
namespace {
#include "kernels/cpu/simd.inl"
#include CNNK_TIER_SOURCE
}  // namespace
}  // namespace amx
}  // namespace cnnkernels
#undef CNNK_TIER_ID
#undef CNNK_VECTOR_BYTES
#undef CNNK_VECTOR_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // CNNK_HAS_AMX
