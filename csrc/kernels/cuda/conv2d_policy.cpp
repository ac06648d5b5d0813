// Which policy plans follow: from the environment, or as a test says.
#include <atomic>
#include <cctype>
#include <cstdlib>

#include "kernels/cuda/conv2d.h"

namespace cnnkernels::cuda {
namespace {

constexpr const char* kVariable = "CNNKERNELS_CUDA_CONV2D";
constexpr Conv2dPolicy kPolicies[] = {Conv2dPolicy::automatic, Conv2dPolicy::native,
                                      Conv2dPolicy::direct,    Conv2dPolicy::implicit_gemm,
                                      Conv2dPolicy::depthwise, Conv2dPolicy::wgmma};

const Conv2dPolicyChoice& first_choice() {
  static const Conv2dPolicyChoice choice = choose_conv2d_policy(std::getenv(kVariable));
  return choice;
}

std::atomic<Conv2dPolicy>& current_policy() {
  static std::atomic<Conv2dPolicy> policy{first_choice().policy};
  return policy;
}

}  // namespace

const char* policy_name(Conv2dPolicy policy) {
  switch (policy) {
    case Conv2dPolicy::native:
      return "native";
    case Conv2dPolicy::direct:
      return "direct";
    case Conv2dPolicy::implicit_gemm:
      return "implicit_gemm";
    case Conv2dPolicy::depthwise:
      return "depthwise";
    case Conv2dPolicy::wgmma:
      return "wgmma";
    default:
      return "auto";
  }
}

Conv2dPolicyChoice choose_conv2d_policy(const char* forced) {
  if (forced == nullptr || *forced == '\0') return {Conv2dPolicy::automatic, ""};
  std::string name(forced);
  for (char& letter : name)
    letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  for (const Conv2dPolicy policy : kPolicies) {
    if (name == policy_name(policy)) return {policy, ""};
  }
  return {Conv2dPolicy::automatic, std::string(kVariable) + "=" + forced +
                                       " is not auto, native, direct, implicit_gemm, "
                                       "depthwise or wgmma; convolutions run by auto"};
}

Conv2dPolicy active_conv2d_policy() { return current_policy().load(std::memory_order_relaxed); }

const std::string& conv2d_policy_note() { return first_choice().note; }

void set_conv2d_policy(Conv2dPolicy policy) { current_policy().store(policy); }

}  // namespace cnnkernels::cuda
