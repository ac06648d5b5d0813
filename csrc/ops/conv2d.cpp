// conv2d, conv2d_relu and their backward: native where the kernels cover the call,
// ATen where they do not. Their derivatives: autograd.cpp.
#include "ops/conv2d.h"

#include <ATen/ops/constant_pad_nd.h>

#include <limits>

#include "ops/autocast.h"
#include "ops/result_memory.h"

namespace cnnkernels {

PaddedInput pad_input(const char* op, const at::Tensor& input, const at::Tensor& weight,
                      at::IntArrayRef stride, std::string_view padding, at::IntArrayRef dilation) {
  TORCH_CHECK(padding == "same" || padding == "valid", op,
              ": padding must be an integer, a pair, 'same' or 'valid', but got padding='",
              std::string(padding), "'");
  if (padding == "valid") return {input, {0, 0}};
  const Pair strides = expand_pair(op, "stride", stride);
  const Pair dilations = expand_pair(op, "dilation", dilation);
  TORCH_CHECK(strides[0] == 1 && strides[1] == 1, op,
              ": padding='same' needs stride=1, but got stride=(", strides[0], ", ", strides[1],
              ")");
  TORCH_CHECK(weight.dim() == 4, op, ": weight must be 4-D, but got weight of size ",
              weight.sizes());
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(dilations[axis] > 0 && dilations[axis] <= std::numeric_limits<int32_t>::max(), op,
                ": dilation must be positive and fit in 32 bits for padding='same', but got ",
                dilations[axis]);
  }
  // As torch: an odd total goes below and to the right.
  const int64_t total_h = dilations[0] * (weight.size(2) - 1);
  const int64_t total_w = dilations[1] * (weight.size(3) - 1);
  const Pair both = {total_h / 2, total_w / 2};
  if (total_h % 2 == 0 && total_w % 2 == 0) return {input, both};
  return {at::constant_pad_nd(input, {0, total_w % 2, 0, total_h % 2}, 0), both};
}

namespace {

struct Cpu {
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype, at::MemoryFormat format,
                          const at::Tensor&) {
    return empty_cpu(size, dtype, format);
  }
  static std::string not_native(const Conv2dProblem&) { return ""; }
  static bool through_aten(const Conv2dProblem& problem, const at::Tensor&) {
    return mostly_border(problem);
  }
  static std::array<bool, 3> gradients_through_aten(const Conv2dProblem& problem, const at::Tensor&,
                                                    std::array<bool, 3> wanted) {
    return mostly_border(problem) ? wanted : std::array<bool, 3>{};
  }
  static void forward(const Conv2dProblem& problem, const at::Tensor& input,
                      const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& output) {
    conv2d_forward(problem, active_isa(), torch_thread_pool(), read_data(input), read_data(weight),
                   bias.defined() ? read_data(bias) : nullptr, output.mutable_data_ptr());
  }
  static void backward(const Conv2dProblem& problem, const at::Tensor& grad_output,
                       const at::Tensor& input, const at::Tensor& weight,
                       const at::Tensor& grad_input, const at::Tensor& grad_weight,
                       const at::Tensor& grad_bias) {
    const auto data = [](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
    };
    conv2d_backward(problem, active_isa(), torch_thread_pool(), read_data(grad_output),
                    read_data(input), read_data(weight), data(grad_input), data(grad_weight),
                    data(grad_bias));
  }
};

template <bool Relu>
at::Tensor same_or_valid(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                         std::string_view padding, at::IntArrayRef dilation, int64_t groups) {
  using Operator = ops::Convolution<Relu>;
  const PaddedInput padded = pad_input(Operator::kName, input, weight, stride, padding, dilation);
  return Operator::kCall(padded.input, weight, bias, stride, padded.padding, dilation, groups);
}

template <bool Relu>
at::Tensor autocast(const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const AutocastToLower lower(input.device().type());
  return ops::Convolution<Relu>::kCall(lower(input), lower(weight), lower(bias), stride, padding,
                                       dilation, groups);
}

}  // namespace

// For all devices: tensors on another one go to ATen.
TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) { Conv2dOperators<Cpu>::add_to(m); }
TORCH_LIBRARY_IMPL(cnnkernels, CompositeImplicitAutograd, m) {
  m.impl("conv2d.padding", same_or_valid<false>);
  m.impl("conv2d_relu.padding", same_or_valid<true>);
}
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCPU, m) {
  m.impl("conv2d", autocast<false>);
  m.impl("conv2d_relu", autocast<true>);
}
TORCH_LIBRARY_IMPL(cnnkernels, AutocastCUDA, m) {
  m.impl("conv2d", autocast<false>);
  m.impl("conv2d_relu", autocast<true>);
}

}  // namespace cnnkernels
