// Which instruction set the kernels run on: chosen once from CPUID, or forced
// by CNNKERNELS_CPU_ISA=baseline|avx2|avx512.
#pragma once

#include <string>
#include <vector>

namespace cnnkernels {

enum class Isa { baseline, avx2, avx512 };

const char* isa_name(Isa isa);

inline int vector_bytes(Isa isa) { return isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

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
