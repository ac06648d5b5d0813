// What convolution and block share on CUDA.
#pragma once

#include "kernels/cuda/conv2d.h"
#include "ops/cuda/device.h"

namespace cnnkernels::cuda {

// Of what is not torch's.
inline Conv2dPolicy native_policy() {
  const Conv2dPolicy policy = active_conv2d_policy();
  return policy == Conv2dPolicy::automatic ? Conv2dPolicy::native : policy;
}

// A plan's memory. torch's allocator gives it to nobody on another stream, and on this one only to
// what runs behind.
class PlannedWorkspace {
 public:
  PlannedWorkspace(const Conv2dPlan& plan, const at::Tensor& like) {
    if (plan.workspace_bytes > 0) {
      memory_ = at::empty({plan.workspace_bytes}, like.options().dtype(at::kByte));
    }
  }
  void* data() const { return memory_.defined() ? memory_.mutable_data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

}  // namespace cnnkernels::cuda
