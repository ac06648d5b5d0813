#include "kernels/cpu/isa.h"

#include <atomic>
#include <cctype>
#include <cstdlib>
#include <string>

#if CNNK_HAS_AMX && !defined(CNNK_EMULATE_AVX512)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cnnkernels {
namespace {

#if CNNK_HAS_AMX && !defined(CNNK_EMULATE_AVX512)
// The processor's word, and then the system's: Linux keeps the tiles' state for a
// process only once it has asked (Documentation/arch/x86/xstate.rst).
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0 || (eax & kAvx512Bf16) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_amx() { return CNNK_HAS_AMX != 0; }
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
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
  static const bool amx = has_amx();
  if (avx2 && avx512 && amx) isas.push_back(Isa::amx);
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
  const bool known =
      name == isa_name(Isa::avx2) || name == isa_name(Isa::avx512) || name == isa_name(Isa::amx);
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
