// gd_step_ and sgd_step_ on CUDA.
#include "kernels/cuda/gradient_step.h"

#include "ops/cuda/device.h"
#include "ops/step_operators.h"

namespace cnnkernels {
namespace {

// All that the step kernels take, by device and dtype. Numbers that are tensors on the device stay
// there: nothing waits for them.
class CudaLists {
 public:
  explicit CudaLists(const StepCall& call) : call_(call) {}

  static bool takes(const at::Tensor& number) {
    return number.device().type() == cuda::kDeviceType;
  }

  bool add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* buffer) {
    const auto native = [&](const at::Tensor& other) {
      return other.device().type() == cuda::kDeviceType &&
             not_native(other, Devices::cpu_and_cuda).empty() &&
             other.scalar_type() == param.scalar_type() && same_order(param, other);
    };
    if (!native(param) || !native(grad) || (buffer != nullptr && !native(*buffer))) return false;
    List& list = list_of(param);
    const auto written = [&](const at::Tensor& tensor) {
      list.written.push_back(tensor.unsafeGetTensorImpl());
      return written_data(tensor);
    };
    list.tensors.push_back(
        {written(param), call_.options.unscale ? written(grad) : const_cast<void*>(read_data(grad)),
         buffer != nullptr ? written(*buffer) : nullptr, param.numel()});
    list.counts.push_back(param.numel());
    list.elements += param.numel();
    return true;
  }

  void step(std::atomic<int64_t>& calls) {
    for (const List& list : lists_) {
      for (c10::TensorImpl* const tensor : list.written) bump_version(tensor);
      if (list.elements == 0) continue;
      count(calls);
      const cuda::DeviceScope scope(list.first);
      const DType dtype = dtype_of(list.first);
      // These live until the launch is on its way; what uses their memory next comes behind it.
      const at::Tensor lr = number_on(list.first, call_.lr, accumulator_dtype(list.first));
      const at::Tensor grad_scale = number_on(list.first, call_.grad_scale, at::kFloat);
      const at::Tensor found_inf = number_on(list.first, call_.found_inf, at::kFloat);
      cuda::StepScalars scalars;
      if (lr.defined()) scalars.lr = read_data(lr);
      if (grad_scale.defined()) scalars.grad_scale = grad_scale.const_data_ptr<float>();
      if (found_inf.defined()) scalars.found_inf = found_inf.const_data_ptr<float>();
      const auto plan = cuda::plan_gradient_step(list.counts, dtype, cuda::limits_of(list.first));
      cuda::check_launch(call_.op, cuda::gradient_step(dtype, plan, list.tensors, call_.options,
                                                       scalars, scope.stream()));
    }
  }

 private:
  struct List {
    at::Tensor first;
    std::vector<StepTensor> tensors;
    std::vector<int64_t> counts;
    std::vector<c10::TensorImpl*> written;
    int64_t elements = 0;
  };

  List& list_of(const at::Tensor& param) {
    for (List& list : lists_) {
      if (list.first.device() == param.device() &&
          list.first.scalar_type() == param.scalar_type()) {
        return list;
      }
    }
    lists_.push_back({});
    lists_.back().first = param;
    return lists_.back();
  }

  static at::ScalarType accumulator_dtype(const at::Tensor& param) {
    return param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }

  static at::Tensor number_on(const at::Tensor& like, const std::optional<at::Tensor>& number,
                              at::ScalarType dtype) {
    return has_value(number) ? number->to(like.device(), dtype) : at::Tensor();
  }

  const StepCall call_;
  std::vector<List> lists_;
};

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, CNNK_CUDA_DISPATCH_KEY, m) { StepOperators<CudaLists>::add_to(m); }

}  // namespace cnnkernels
