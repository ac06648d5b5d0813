// The operators' derivatives, any number of times over. Each autograd kernel
// records what its backward needs and calls the operator below autograd; the
// backwards are operators themselves. max_pool2d_backward and max_pool2d_gather
// are each other's derivative.
#include <ATen/ops/_convolution_double_backward.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/autograd_node.h"
#include "ops/dispatch.h"
#include "ops/operators.h"

namespace cnnkernels {
namespace {

using torch::autograd::set_history;

// These derivatives are backward ones. A tangent must not be lost in silence.
inline bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& tensor) {
  return has_value(tensor) && has_tangent(*tensor);
}

template <class... Tensors>
void refuse_tangents(const char* op, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(tensors) || ...), op,
                              ": forward-mode derivatives go through cnnkernels.functional");
}

template <class Visit, class... Pairs>
void each_integer(Visit&& visit, Pairs&... pairs) {
  const auto both = [&](auto& pair) {
    visit(pair[0]);
    visit(pair[1]);
  };
  (both(pairs), ...);
}

struct ConvNodeArguments {
  ConvArguments conv;

  template <class Self, class Visit>
  static void each_key(Self& self, Visit&& visit) {
    each_integer(visit, self.conv.stride, self.conv.padding, self.conv.dilation);
    visit(self.conv.groups);
  }
};

variable_list conv_gradients(const at::Tensor& grad_output, const at::Tensor& input,
                             const at::Tensor& weight, const ConvArguments& a,
                             std::array<bool, 3> wanted) {
  auto [grad_input, grad_weight, grad_bias] = ops::conv2d_backward(
      grad_output, input, weight, a.stride, a.padding, a.dilation, a.groups, wanted);
  return {grad_input, grad_weight, grad_bias};
}

class Conv2dBackward final : public SavingNode<Conv2dBackward, ConvNodeArguments, 3, 2> {
 public:
  using SavingNode::SavingNode;
  static constexpr const char* kName = "Conv2dBackward";
  enum Saved { kInput, kWeight };

  static variable_list backward(const Call& call, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(3);
    return conv_gradients(gradients[0], call.saved[kInput], call.saved[kWeight],
                          call.arguments.conv, call.wanted);
  }
};

// Its output tells what the ReLU clipped.
class Conv2dReLUBackward final : public SavingNode<Conv2dReLUBackward, ConvNodeArguments, 3, 3> {
 public:
  using SavingNode::SavingNode;
  static constexpr const char* kName = "Conv2dReLUBackward";
  enum Saved { kInput, kWeight, kOutput };

  static variable_list backward(const Call& call, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(3);
    return conv_gradients(at::threshold_backward(gradients[0], call.saved[kOutput], 0),
                          call.saved[kInput], call.saved[kWeight], call.arguments.conv,
                          call.wanted);
  }
};

class Conv2dDoubleBackward final
    : public SavingNode<Conv2dDoubleBackward, ConvNodeArguments, 3, 3> {
 public:
  using SavingNode::SavingNode;
  static constexpr const char* kName = "Conv2dDoubleBackward";
  enum Saved { kGradOutput, kInput, kWeight };

  static variable_list backward(const Call& call, const variable_list& gradients) {
    const at::Tensor grad_output = call.saved[kGradOutput], input = call.saved[kInput];
    const ConvArguments& a = call.arguments.conv;
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
    };
    const bool one_image = input.dim() == 3;
    const auto image = [&](const at::Tensor& tensor) {
      return one_image && tensor.defined() ? tensor.unsqueeze(0) : tensor;
    };
    const auto unbatched = [&](const at::Tensor& tensor) {
      return one_image && tensor.defined() ? tensor.squeeze(0) : tensor;
    };
    auto [grad_grad_output, grad_input, grad_weight] = at::_convolution_double_backward(
        optional(image(gradients[0])), optional(gradients[1]), optional(gradients[2]),
        image(grad_output), call.saved[kWeight], image(input), a.stride, a.padding, a.dilation,
        false, {0, 0}, a.groups, call.wanted);
    return {unbatched(grad_grad_output), unbatched(grad_input), grad_weight};
  }
};

template <bool Relu>
at::Tensor autograd_conv2d(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  using Node = std::conditional_t<Relu, Conv2dReLUBackward, Conv2dBackward>;
  constexpr const char* op = ops::Convolution<Relu>::kName;
  constexpr auto call = ops::Convolution<Relu>::kCall;
  refuse_tangents(op, input, weight, bias);
  if (needs_gradient(input, weight) || (has_value(bias) && needs_gradient(*bias))) {
    if (!conv2d_not_native(op, input, weight, bias, stride, padding, dilation, groups).empty()) {
      return composed_conv2d(Relu, input, weight, bias, stride, padding, dilation, groups);
    }
    const ConvArguments a = conv_arguments(op, stride, padding, dilation, groups);
    const auto node = make_node<Node>(ConvNodeArguments{a}, input, weight, bias);
    node->save(Node::kInput, input);
    node->save(Node::kWeight, weight);
    const at::Tensor output = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return call(input, weight, bias, a.stride, a.padding, a.dilation, groups);
    }();
    set_history(output, node);
    if constexpr (Relu) node->save_output(Node::kOutput, output);
    return output;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call(input, weight, bias, stride, padding, dilation, groups);
}

ops::TensorTriple autograd_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                           const at::Tensor& weight, at::IntArrayRef stride,
                                           at::IntArrayRef padding, at::IntArrayRef dilation,
                                           int64_t groups, std::array<bool, 3> output_mask) {
  refuse_tangents("conv2d_backward", grad_output, input, weight);
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ops::conv2d_backward(grad_output, input, weight, stride, padding, dilation, groups,
                                output_mask);
  };
  if (!needs_gradient(grad_output, input, weight)) return below();
  const ConvArguments a = conv_arguments("conv2d_backward", stride, padding, dilation, groups);
  const auto node =
      make_node<Conv2dDoubleBackward>(ConvNodeArguments{a}, grad_output, input, weight);
  node->save(Conv2dDoubleBackward::kGradOutput, grad_output);
  node->save(Conv2dDoubleBackward::kInput, input);
  node->save(Conv2dDoubleBackward::kWeight, weight);
  const ops::TensorTriple gradients = below();
  set_history({std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)}, node);
  return gradients;
}

struct PoolNodeArguments {
  PoolArguments pool;
  std::vector<c10::SymInt> input_size;

  template <class Self, class Visit>
  static void each_key(Self& self, Visit&& visit) {
    each_integer(visit, self.pool.kernel_size, self.pool.stride, self.pool.padding,
                 self.pool.dilation);
    visit(self.pool.ceil_mode);
    visit(self.input_size);
  }
};

// Spreads the output's gradient over the winners. Also the derivative of
// max_pool2d_gather, which reads the winners.
class MaxPool2dBackward final : public SavingNode<MaxPool2dBackward, PoolNodeArguments, 1, 1> {
 public:
  using SavingNode::SavingNode;
  static constexpr const char* kName = "MaxPool2dBackward";

  static variable_list backward(const Call& call, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(1);
    const PoolArguments& a = call.arguments.pool;
    return {ops::max_pool2d_backward(gradients[0], call.saved[0], call.arguments.input_size,
                                     a.kernel_size, a.stride, a.padding, a.dilation, a.ceil_mode)};
  }
};

class MaxPool2dDoubleBackward final
    : public SavingNode<MaxPool2dDoubleBackward, PoolNodeArguments, 1, 1> {
 public:
  using SavingNode::SavingNode;
  static constexpr const char* kName = "MaxPool2dDoubleBackward";

  static variable_list backward(const Call& call, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(1);
    const PoolArguments& a = call.arguments.pool;
    return {ops::max_pool2d_gather(gradients[0], call.saved[0], a.kernel_size, a.stride, a.padding,
                                   a.dilation, a.ceil_mode)};
  }
};

ops::TensorPair argmax_with_history(const at::Tensor& input, const PoolArguments& a) {
  const auto node =
      make_node<MaxPool2dBackward>(PoolNodeArguments{a, input.sym_sizes().vec()}, input);
  ops::TensorPair result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ops::max_pool2d_argmax(input, a.kernel_size, a.stride, a.padding, a.dilation,
                                  a.ceil_mode);
  }();
  set_history(std::get<0>(result), node);
  node->save(0, std::get<1>(result));
  return result;
}

at::Tensor autograd_max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool ceil_mode) {
  refuse_tangents("max_pool2d", input);
  if (needs_gradient(input)) {
    const PoolArguments arguments =
        pool_arguments("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode);
    if (!not_native(input, arguments).empty()) {
      return at::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
    }
    return std::get<0>(argmax_with_history(input, arguments));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
}

ops::TensorPair autograd_max_pool2d_with_indices(const at::Tensor& input,
                                                 at::IntArrayRef kernel_size,
                                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                                 at::IntArrayRef dilation, bool ceil_mode) {
  refuse_tangents("max_pool2d_with_indices", input);
  if (needs_gradient(input)) {
    const PoolArguments arguments =
        pool_arguments("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode);
    if (!not_native(input, arguments).empty()) {
      return at::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
    }
    const at::Tensor indices = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return std::get<1>(
          ops::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode));
    }();
    return {std::get<0>(argmax_with_history(input, arguments)), indices};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
}

ops::TensorPair autograd_max_pool2d_argmax(const at::Tensor& input, at::IntArrayRef kernel_size,
                                           at::IntArrayRef stride, at::IntArrayRef padding,
                                           at::IntArrayRef dilation, bool ceil_mode) {
  refuse_tangents("max_pool2d_argmax", input);
  if (needs_gradient(input)) {
    return argmax_with_history(input, pool_arguments("max_pool2d_argmax", kernel_size, stride,
                                                     padding, dilation, ceil_mode));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::max_pool2d_argmax(input, kernel_size, stride, padding, dilation, ceil_mode);
}

at::Tensor autograd_max_pool2d_backward(const at::Tensor& grad_output, const at::Tensor& argmax,
                                        c10::SymIntArrayRef input_size, at::IntArrayRef kernel_size,
                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                        at::IntArrayRef dilation, bool ceil_mode) {
  refuse_tangents("max_pool2d_backward", grad_output);
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ops::max_pool2d_backward(grad_output, argmax, input_size, kernel_size, stride, padding,
                                    dilation, ceil_mode);
  };
  if (!needs_gradient(grad_output)) return below();
  const PoolArguments a =
      pool_arguments("max_pool2d_backward", kernel_size, stride, padding, dilation, ceil_mode);
  const auto node =
      make_node<MaxPool2dDoubleBackward>(PoolNodeArguments{a, input_size.vec()}, grad_output);
  node->save(0, argmax);
  const at::Tensor grad_input = below();
  set_history(grad_input, node);
  return grad_input;
}

at::Tensor autograd_max_pool2d_gather(const at::Tensor& input, const at::Tensor& argmax,
                                      at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation,
                                      bool ceil_mode) {
  refuse_tangents("max_pool2d_gather", input);
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ops::max_pool2d_gather(input, argmax, kernel_size, stride, padding, dilation, ceil_mode);
  };
  if (!needs_gradient(input)) return below();
  const PoolArguments a =
      pool_arguments("max_pool2d_gather", kernel_size, stride, padding, dilation, ceil_mode);
  const auto node =
      make_node<MaxPool2dBackward>(PoolNodeArguments{a, input.sym_sizes().vec()}, input);
  node->save(0, argmax);
  const at::Tensor values = below();
  set_history(values, node);
  return values;
}

struct BlockNodeArguments {
  BlockArguments block;

  template <class Self, class Visit>
  static void each_key(Self& self, Visit&& visit) {
    auto& conv = self.block.conv;
    auto& pool = self.block.pool;
    each_integer(visit, conv.stride, conv.padding, conv.dilation, pool.kernel_size, pool.stride,
                 pool.padding, pool.dilation);
    visit(conv.groups);
    visit(pool.ceil_mode);
  }
};

class Conv2dReLUMaxPool2dBackward final
    : public SavingNode<Conv2dReLUMaxPool2dBackward, BlockNodeArguments, 3, 3> {
 public:
  using SavingNode::SavingNode;
  static constexpr const char* kName = "Conv2dReLUMaxPool2dBackward";
  enum Saved { kInput, kWeight, kArgmax };

  static variable_list backward(const Call& call, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(3);
    const ConvArguments& conv = call.arguments.block.conv;
    const PoolArguments& pool = call.arguments.block.pool;
    auto [grad_input, grad_weight, grad_bias] = ops::conv2d_relu_max_pool2d_backward(
        gradients[0], call.saved[kInput], call.saved[kWeight], call.saved[kArgmax], conv.stride,
        conv.padding, conv.dilation, conv.groups, pool.kernel_size, pool.stride, pool.padding,
        pool.dilation, pool.ceil_mode, call.wanted);
    return {grad_input, grad_weight, grad_bias};
  }
};

ops::TensorPair argmax_with_history(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias,
                                    const BlockArguments& arguments) {
  using Node = Conv2dReLUMaxPool2dBackward;
  const ConvArguments& conv = arguments.conv;
  const PoolArguments& pool = arguments.pool;
  const auto node = make_node<Node>(BlockNodeArguments{arguments}, input, weight, bias);
  node->save(Node::kInput, input);
  node->save(Node::kWeight, weight);
  ops::TensorPair result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ops::conv2d_relu_max_pool2d_argmax(
        input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode);
  }();
  set_history(std::get<0>(result), node);
  node->save(Node::kArgmax, std::get<1>(result));
  return result;
}

at::Tensor autograd_conv2d_relu_max_pool2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
    at::IntArrayRef pool_dilation, bool pool_ceil_mode) {
  refuse_tangents("conv2d_relu_max_pool2d", input, weight, bias);
  if (needs_gradient(input, weight) || (has_value(bias) && needs_gradient(*bias))) {
    const BlockArguments arguments =
        block_arguments("conv2d_relu_max_pool2d", stride, padding, dilation, groups,
                        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
    if (!block_not_native(input, weight, bias, arguments).empty()) {
      return composed_block(input, weight, bias, arguments);
    }
    return std::get<0>(argmax_with_history(input, weight, bias, arguments));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d_relu_max_pool2d(input, weight, bias, stride, padding, dilation, groups,
                                     pool_kernel_size, pool_stride, pool_padding, pool_dilation,
                                     pool_ceil_mode);
}

ops::TensorPair autograd_conv2d_relu_max_pool2d_argmax(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
    at::IntArrayRef pool_dilation, bool pool_ceil_mode) {
  refuse_tangents("conv2d_relu_max_pool2d_argmax", input, weight, bias);
  if (needs_gradient(input, weight) || (has_value(bias) && needs_gradient(*bias))) {
    return argmax_with_history(input, weight, bias,
                               block_arguments("conv2d_relu_max_pool2d_argmax", stride, padding,
                                               dilation, groups, pool_kernel_size, pool_stride,
                                               pool_padding, pool_dilation, pool_ceil_mode));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d_relu_max_pool2d_argmax(input, weight, bias, stride, padding, dilation, groups,
                                            pool_kernel_size, pool_stride, pool_padding,
                                            pool_dilation, pool_ceil_mode);
}

// A backward that is to be differentiated goes through the dense gradient of
// the convolution, whose own derivatives are known.
ops::TensorTriple autograd_conv2d_relu_max_pool2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& argmax, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, at::IntArrayRef pool_kernel_size,
    at::IntArrayRef pool_stride, at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
    bool pool_ceil_mode, std::array<bool, 3> output_mask) {
  refuse_tangents("conv2d_relu_max_pool2d_backward", grad_output, input, weight);
  if (needs_gradient(grad_output, input, weight)) {
    const BlockArguments arguments =
        block_arguments("conv2d_relu_max_pool2d_backward", stride, padding, dilation, groups,
                        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
    const int64_t dimensions = input.dim();
    const Conv2dProblem conv = conv_problem("conv2d_relu_max_pool2d_backward",
                                            dimensions == 3 ? input.unsqueeze(0) : input, weight,
                                            std::nullopt, arguments.conv);
    std::vector<c10::SymInt> conv_size = {conv.batch, conv.out_channels, conv.out_height,
                                          conv.out_width};
    if (dimensions == 3) conv_size.erase(conv_size.begin());
    const at::Tensor dense =
        ops::max_pool2d_backward(grad_output, argmax, conv_size, pool_kernel_size, pool_stride,
                                 pool_padding, pool_dilation, pool_ceil_mode);
    return ops::conv2d_backward(dense, input, weight, stride, padding, dilation, groups,
                                output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d_relu_max_pool2d_backward(
      grad_output, input, weight, argmax, stride, padding, dilation, groups, pool_kernel_size,
      pool_stride, pool_padding, pool_dilation, pool_ceil_mode, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, Autograd, m) {
  m.impl("conv2d", autograd_conv2d<false>);
  m.impl("conv2d_relu", autograd_conv2d<true>);
  m.impl("conv2d_backward", autograd_conv2d_backward);
  m.impl("max_pool2d", autograd_max_pool2d);
  m.impl("max_pool2d_with_indices", autograd_max_pool2d_with_indices);
  m.impl("max_pool2d_argmax", autograd_max_pool2d_argmax);
  m.impl("max_pool2d_backward", autograd_max_pool2d_backward);
  m.impl("max_pool2d_gather", autograd_max_pool2d_gather);
  m.impl("conv2d_relu_max_pool2d", autograd_conv2d_relu_max_pool2d);
  m.impl("conv2d_relu_max_pool2d_argmax", autograd_conv2d_relu_max_pool2d_argmax);
  m.impl("conv2d_relu_max_pool2d_backward", autograd_conv2d_relu_max_pool2d_backward);
}

}  // namespace cnnkernels
