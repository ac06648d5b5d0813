// gd_step_ and sgd_step_: whole parameter lists in one call.
#include "ops/gradient_step.h"

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "ops/step_operators.h"

namespace cnnkernels {
namespace {

// As torch's in-place operations on leaves.
void check_mutable(const char* op, at::TensorList params) {
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && params[i].requires_grad()), op, ": params[", i,
                "] requires grad: a step changes it in place, so call it under torch.no_grad()");
  }
}

// All that the step kernels of the CPU take, by dtype.
class CpuLists {
 public:
  explicit CpuLists(const StepCall& call) : options_(call.options) {
    for (int dtype = 0; dtype < kDTypes; ++dtype) lists_[dtype].restart(static_cast<DType>(dtype));
  }

  static bool takes(const at::Tensor&) { return false; }

  bool add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer) {
    const auto native = [&](const at::Tensor& other) {
      return not_native(other).empty() && other.scalar_type() == param.scalar_type() &&
             same_order(param, other);
    };
    if (!native(param) || !native(grad) || (buffer != nullptr && !native(*buffer))) return false;
    lists_[static_cast<int>(dtype_of(param))].add(param, grad, buffer, options_.unscale);
    return true;
  }

  void step(std::atomic<int64_t>& calls) {
    for (StepList& list : lists_) list.step(options_, calls);
  }

 private:
  static constexpr int kDTypes = 4;
  const StepOptions options_;
  StepList lists_[kDTypes];
};

void autograd_gd_step(at::TensorList params, at::TensorList grads, double lr) {
  check_mutable("gd_step_", params);
  const at::AutoDispatchBelowADInplaceOrView guard;
  ops::gd_step_(params, grads, lr);
}

void autograd_gd_step_tensor_lr(at::TensorList params, at::TensorList grads, const at::Tensor& lr) {
  check_mutable("gd_step_", params);
  const at::AutoDispatchBelowADInplaceOrView guard;
  ops::gd_step_(params, grads, lr);
}

void autograd_sgd_step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                       double weight_decay, double momentum, double lr, double dampening,
                       bool nesterov, bool maximize, bool is_first_step,
                       const std::optional<at::Tensor>& grad_scale,
                       const std::optional<at::Tensor>& found_inf) {
  check_mutable("sgd_step_", params);
  const at::AutoDispatchBelowADInplaceOrView guard;
  ops::sgd_step_(params, grads, momentum_buffers, weight_decay, momentum, lr, dampening, nesterov,
                 maximize, is_first_step, grad_scale, found_inf);
}

void autograd_sgd_step_tensor_lr(at::TensorList params, at::TensorList grads,
                                 at::TensorList momentum_buffers, double weight_decay,
                                 double momentum, const at::Tensor& lr, double dampening,
                                 bool nesterov, bool maximize, bool is_first_step,
                                 const std::optional<at::Tensor>& grad_scale,
                                 const std::optional<at::Tensor>& found_inf) {
  check_mutable("sgd_step_", params);
  const at::AutoDispatchBelowADInplaceOrView guard;
  ops::sgd_step_(params, grads, momentum_buffers, weight_decay, momentum, lr, dampening, nesterov,
                 maximize, is_first_step, grad_scale, found_inf);
}

}  // namespace

void StepList::restart(DType dtype) {
  planned_ = planned_ && dtype == dtype_;
  dtype_ = dtype;
  elements_ = 0;
  size_ = 0;
  read_.clear();
  written_.clear();
}

void* StepList::data_of(const at::Tensor& tensor, bool written) {
  (written ? written_ : read_).push_back(tensor.unsafeGetTensorImpl());
  return written ? written_data(tensor) : const_cast<void*>(read_data(tensor));
}

void StepList::add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer,
                   bool unscale) {
  const StepTensor tensor = {data_of(param, true), data_of(grad, unscale),
                             buffer != nullptr ? data_of(*buffer, true) : nullptr, param.numel()};
  elements_ += tensor.count;
  if (size_ == tensors_.size()) {
    planned_ = false;
    tensors_.push_back(tensor);
  } else {
    const StepTensor& before = tensors_[size_];
    planned_ = planned_ && tensor.param == before.param && tensor.count == before.count;
    tensors_[size_] = tensor;
  }
  ++size_;
}

std::vector<at::Tensor> StepList::references() const {
  std::vector<at::Tensor> result;
  result.reserve(read_.size() + written_.size());
  for (const auto* const tensors : {&read_, &written_}) {
    for (c10::TensorImpl* const tensor : *tensors) {
      result.emplace_back(
          c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(tensor));
    }
  }
  return result;
}

void StepList::step(const StepOptions& options, std::atomic<int64_t>& calls) {
  for (c10::TensorImpl* const tensor : written_) bump_version(tensor);
  if (elements_ == 0) return;
  const ThreadPool pool = torch_thread_pool();
  const Isa isa = active_isa();
  if (!planned_ || size_ != tensors_.size() || plan_.isa != isa || plan_.threads != pool.threads) {
    tensors_.resize(size_);
    plan_ = plan_gradient_step(tensors_, isa, pool.threads);
    planned_ = true;
  }
  count(calls);
  gradient_step(dtype_, plan_, pool, tensors_, options);
}

bool is_ordinary_step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer) {
  static const c10::DispatchKeySet ordinary = at::empty({0}, at::kCPU).key_set();
  const auto like_param = [&](const at::Tensor& other) {
    return other.key_set() == ordinary && other.scalar_type() == param.scalar_type() &&
           other.sizes() == param.sizes() && same_order(param, other);
  };
  return param.key_set() == ordinary && like_param(grad) &&
         (buffer == nullptr || like_param(*buffer));
}

bool operators_are_observed() {
  return c10::impl::tls_local_dispatch_key_set().included_ != c10::default_included_set ||
         at::hasCallbacks();
}

TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) { StepOperators<CpuLists>::add_to(m); }
TORCH_LIBRARY_IMPL(cnnkernels, Autograd, m) {
  m.impl("gd_step_", autograd_gd_step);
  m.impl("gd_step_.tensor_lr", autograd_gd_step_tensor_lr);
  m.impl("sgd_step_", autograd_sgd_step);
  m.impl("sgd_step_.tensor_lr", autograd_sgd_step_tensor_lr);
}

}  // namespace cnnkernels
