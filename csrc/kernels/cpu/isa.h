// Which instruction set the kernels run on: chosen once from CPUID, or forced
// by CNNKERNELS_CPU_ISA=baseline|avx2|avx512|amx.
#pragma once

#include <string>
#include <vector>

// Whether the compiler knows the matrix tiles, and how a program asks the system for
// them. CNNK_EMULATE_AVX512 emulates them too (cpu/amx_tile.inl).
#if defined(__x86_64__) &&                                                    \
    (defined(CNNK_EMULATE_AVX512) ||                                          \
     (defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || \
                             (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))))
#define CNNK_HAS_AMX 1
#else
#define CNNK_HAS_AMX 0
#endif

namespace cnnkernels {

// Each contains those before it: amx is AVX-512 with the matrix tiles of bfloat16.
enum class Isa { baseline, avx2, avx512, amx };

const char* isa_name(Isa isa);

inline int vector_bytes(Isa isa) { return isa >= Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

// What this machine can run, weakest first.
std::vector<Isa> supported_isas();

struct IsaChoice {
  Isa isa;
  std::string note;  // why a forced choice could not be honoured; empty if it was
};

// The best supported instruction set, or the one that `forced` names.
IsaChoice choose_isa(const char* forced);

// The process's choice: made at the first call, or by set_active_isa.
Isa active_isa();

// The note of the first choice.
const std::string& active_isa_note();

// For tests: runs everything that follows on `isa`, which must be supported.
void set_active_isa(Isa isa);

}  // namespace cnnkernels
