#include "kernels/cpu/isa.h"

#include <atomic>
#include <cctype>
#include <cstdlib>
#include <string>

namespace cnnkernels {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas = {Isa::baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports also asks the operating system for the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2) isas.push_back(Isa::avx2);
#if defined(CNNK_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  if (avx2 && avx512) isas.push_back(Isa::avx512);
#endif
  return isas;
}

IsaChoice choose_isa(const char* forced) {
  const std::vector<Isa> isas = supported_isas();
  const Isa best = isas.back();
  if (forced == nullptr || *forced == '\0') return {best, ""};
  std::string name(forced);
  for (char& letter : name)
    letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  for (const Isa isa : isas) {
    if (name == isa_name(isa)) return {isa, ""};
  }
  const bool known = name == isa_name(Isa::avx2) || name == isa_name(Isa::avx512);
  return {best, "CNNKERNELS_CPU_ISA=" + std::string(forced) +
                    (known ? " is not supported by this machine" : " is not an instruction set") +
                    "; running on " + isa_name(best)};
}

namespace {

const IsaChoice& first_choice() {
  static const IsaChoice choice = choose_isa(std::getenv("CNNKERNELS_CPU_ISA"));
  return choice;
}

std::atomic<int>& current_isa() {
  static std::atomic<int> isa{static_cast<int>(first_choice().isa)};
  return isa;
}

}  // namespace

Isa active_isa() { return static_cast<Isa>(current_isa().load(std::memory_order_relaxed)); }

const std::string& active_isa_note() { return first_choice().note; }

void set_active_isa(Isa isa) { current_isa().store(static_cast<int>(isa)); }

}  // namespace cnnkernels
