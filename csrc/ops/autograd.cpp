// The operators' derivatives, any number of times over. Each autograd kernel
// records what its backward needs and calls the operator below autograd; the
// backwards are operators themselves. max_pool2d_backward and max_pool2d_gather
// are each other's derivative.
#include <ATen/ops/_convolution_double_backward.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/dispatch.h"
#include "ops/operators.h"

namespace cnnkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// These derivatives are backward ones. A tangent must not be lost in silence.
template <class... Tensors>
void refuse_tangents(const char* op, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(tensors._fw_grad(0).defined() || ...), op,
                              ": forward-mode derivatives go through cnnkernels.functional");
}

// The convolution's integers, saved for its derivatives.
void save_conv(AutogradContext* ctx, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation, int64_t groups) {
  ctx->saved_data["stride"] = stride.vec();
  ctx->saved_data["padding"] = padding.vec();
  ctx->saved_data["dilation"] = dilation.vec();
  ctx->saved_data["groups"] = groups;
}

struct SavedConv {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;

  explicit SavedConv(AutogradContext* ctx)
      : stride(ctx->saved_data["stride"].toIntVector()),
        padding(ctx->saved_data["padding"].toIntVector()),
        dilation(ctx->saved_data["dilation"].toIntVector()),
        groups(ctx->saved_data["groups"].toInt()) {}
};

class Conv2dFunction : public torch::autograd::Function<Conv2dFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({input, weight});
    save_conv(ctx, stride, padding, dilation, groups);
    ctx->saved_data["bias"] = has_value(bias);
    return ops::conv2d(input, weight, bias, stride, padding, dilation, groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(7);
    const variable_list saved = ctx->get_saved_variables();
    const SavedConv arguments(ctx);
    const bool bias_gradient = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
    auto [grad_input, grad_weight, grad_bias] = ops::conv2d_backward(
        gradients[0], saved[0], saved[1], arguments.stride, arguments.padding, arguments.dilation,
        arguments.groups, {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias_gradient});
    return {grad_input, grad_weight, grad_bias, {}, {}, {}, {}};
  }
};

// Puts the wanted ones of three tensors in their places.
template <class Mask>
variable_list spread(const variable_list& wanted, const Mask& mask) {
  variable_list all(3);
  size_t next = 0;
  for (size_t i = 0; i < 3; ++i) {
    if (mask[i]) all[i] = wanted[next++];
  }
  return all;
}

class Conv2dBackwardFunction : public torch::autograd::Function<Conv2dBackwardFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output,
                               const at::Tensor& input, const at::Tensor& weight,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, int64_t groups,
                               std::array<bool, 3> output_mask) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad_output, input, weight});
    save_conv(ctx, stride, padding, dilation, groups);
    ctx->set_materialize_grads(false);
    ctx->saved_data["wanted"] = c10::List<bool>({output_mask[0], output_mask[1], output_mask[2]});
    auto [grad_input, grad_weight, grad_bias] = ops::conv2d_backward(
        grad_output, input, weight, stride, padding, dilation, groups, output_mask);
    // Autograd takes no undefined outputs: only the wanted ones are returned.
    variable_list results;
    for (const at::Tensor& gradient : {grad_input, grad_weight, grad_bias}) {
      if (gradient.defined()) results.push_back(gradient);
    }
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& wanted_gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const SavedConv arguments(ctx);
    const variable_list gradients =
        spread(wanted_gradients, ctx->saved_data["wanted"].toBoolList());
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
    };
    const bool one_image = saved[1].dim() == 3;
    const auto image = [&](const at::Tensor& tensor) {
      return one_image && tensor.defined() ? tensor.unsqueeze(0) : tensor;
    };
    const auto unbatched = [&](const at::Tensor& tensor) {
      return one_image && tensor.defined() ? tensor.squeeze(0) : tensor;
    };
    auto [grad_grad_output, grad_input, grad_weight] = at::_convolution_double_backward(
        optional(image(gradients[0])), optional(gradients[1]), optional(gradients[2]),
        image(saved[0]), saved[2], image(saved[1]), arguments.stride, arguments.padding,
        arguments.dilation, false, {0, 0}, arguments.groups,
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)});
    return {unbatched(grad_grad_output), unbatched(grad_input), grad_weight, {}, {}, {}, {}, {}};
  }
};

at::Tensor autograd_conv2d(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  refuse_tangents("conv2d", input, weight);
  if (needs_gradient(input, weight) || (has_value(bias) && needs_gradient(*bias))) {
    if (!conv2d_not_native(input, weight, bias).empty()) {
      return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
    }
    const char* const op = "conv2d";
    const ConvArguments a = conv_arguments(op, stride, padding, dilation, groups);
    return Conv2dFunction::apply(input, weight, bias, at::IntArrayRef(a.stride),
                                 at::IntArrayRef(a.padding), at::IntArrayRef(a.dilation), groups);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d(input, weight, bias, stride, padding, dilation, groups);
}

ops::TensorTriple autograd_conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                           const at::Tensor& weight, at::IntArrayRef stride,
                                           at::IntArrayRef padding, at::IntArrayRef dilation,
                                           int64_t groups, std::array<bool, 3> output_mask) {
  refuse_tangents("conv2d_backward", grad_output, input, weight);
  if (needs_gradient(grad_output, input, weight)) {
    const ConvArguments a = conv_arguments("conv2d_backward", stride, padding, dilation, groups);
    const variable_list gradients = Conv2dBackwardFunction::apply(
        grad_output, input, weight, at::IntArrayRef(a.stride), at::IntArrayRef(a.padding),
        at::IntArrayRef(a.dilation), groups, output_mask);
    const variable_list all = spread(gradients, output_mask);
    return {all[0], all[1], all[2]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d_backward(grad_output, input, weight, stride, padding, dilation, groups,
                              output_mask);
}

void save_pool(AutogradContext* ctx, const PoolArguments& arguments,
               c10::SymIntArrayRef input_size) {
  ctx->saved_data["kernel_size"] = at::IntArrayRef(arguments.kernel_size).vec();
  ctx->saved_data["stride"] = at::IntArrayRef(arguments.stride).vec();
  ctx->saved_data["padding"] = at::IntArrayRef(arguments.padding).vec();
  ctx->saved_data["dilation"] = at::IntArrayRef(arguments.dilation).vec();
  ctx->saved_data["ceil_mode"] = arguments.ceil_mode;
  ctx->saved_data["input_size"] = input_size.vec();
}

struct SavedPool {
  std::vector<int64_t> kernel_size, stride, padding, dilation;
  bool ceil_mode;
  std::vector<c10::SymInt> input_size;

  explicit SavedPool(AutogradContext* ctx)
      : kernel_size(ctx->saved_data["kernel_size"].toIntVector()),
        stride(ctx->saved_data["stride"].toIntVector()),
        padding(ctx->saved_data["padding"].toIntVector()),
        dilation(ctx->saved_data["dilation"].toIntVector()),
        ceil_mode(ctx->saved_data["ceil_mode"].toBool()),
        input_size(ctx->saved_data["input_size"].toSymIntVector()) {}
};

class MaxPool2dFunction : public torch::autograd::Function<MaxPool2dFunction> {
 public:
  // Returns the output, and torch's indices if they are asked for.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& input,
                               const PoolArguments& arguments, bool with_indices) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save_pool(ctx, arguments, input.sym_sizes());
    const auto [output, argmax] =
        ops::max_pool2d_argmax(input, arguments.kernel_size, arguments.stride, arguments.padding,
                               arguments.dilation, arguments.ceil_mode);
    ctx->save_for_backward({argmax});
    if (!with_indices) return {output};
    const at::Tensor indices = std::get<1>(
        ops::max_pool2d_with_indices(input, arguments.kernel_size, arguments.stride,
                                     arguments.padding, arguments.dilation, arguments.ceil_mode));
    ctx->mark_non_differentiable({indices});
    return {output, indices};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(3);
    const SavedPool a(ctx);
    return {ops::max_pool2d_backward(gradients[0], ctx->get_saved_variables()[0], a.input_size,
                                     a.kernel_size, a.stride, a.padding, a.dilation, a.ceil_mode),
            {},
            {}};
  }
};

class MaxPool2dBackwardFunction : public torch::autograd::Function<MaxPool2dBackwardFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad_output,
                            const at::Tensor& argmax, c10::SymIntArrayRef input_size,
                            const PoolArguments& arguments) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save_pool(ctx, arguments, input_size);
    ctx->save_for_backward({argmax});
    return ops::max_pool2d_backward(grad_output, argmax, input_size, arguments.kernel_size,
                                    arguments.stride, arguments.padding, arguments.dilation,
                                    arguments.ceil_mode);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(4);
    const SavedPool a(ctx);
    return {ops::max_pool2d_gather(gradients[0], ctx->get_saved_variables()[0], a.kernel_size,
                                   a.stride, a.padding, a.dilation, a.ceil_mode),
            {},
            {},
            {}};
  }
};

class MaxPool2dGatherFunction : public torch::autograd::Function<MaxPool2dGatherFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& argmax,
                            const PoolArguments& arguments) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save_pool(ctx, arguments, input.sym_sizes());
    ctx->save_for_backward({argmax});
    return ops::max_pool2d_gather(input, argmax, arguments.kernel_size, arguments.stride,
                                  arguments.padding, arguments.dilation, arguments.ceil_mode);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(3);
    const SavedPool a(ctx);
    return {ops::max_pool2d_backward(gradients[0], ctx->get_saved_variables()[0], a.input_size,
                                     a.kernel_size, a.stride, a.padding, a.dilation, a.ceil_mode),
            {},
            {}};
  }
};

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
    return MaxPool2dFunction::apply(input, arguments, false)[0];
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
    const variable_list results = MaxPool2dFunction::apply(input, arguments, true);
    return {results[0], results[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
}

// Saves its own argmax: differentiable as max_pool2d is.
ops::TensorPair autograd_max_pool2d_argmax(const at::Tensor& input, at::IntArrayRef kernel_size,
                                           at::IntArrayRef stride, at::IntArrayRef padding,
                                           at::IntArrayRef dilation, bool ceil_mode) {
  refuse_tangents("max_pool2d_argmax", input);
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ops::max_pool2d_argmax(input, kernel_size, stride, padding, dilation, ceil_mode);
  };
  if (!needs_gradient(input)) return below();
  const at::Tensor output =
      ops::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  return {output, std::get<1>(below())};
}

at::Tensor autograd_max_pool2d_backward(const at::Tensor& grad_output, const at::Tensor& argmax,
                                        c10::SymIntArrayRef input_size, at::IntArrayRef kernel_size,
                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                        at::IntArrayRef dilation, bool ceil_mode) {
  refuse_tangents("max_pool2d_backward", grad_output);
  if (needs_gradient(grad_output)) {
    return MaxPool2dBackwardFunction::apply(
        grad_output, argmax, input_size,
        pool_arguments("max_pool2d_backward", kernel_size, stride, padding, dilation, ceil_mode));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::max_pool2d_backward(grad_output, argmax, input_size, kernel_size, stride, padding,
                                  dilation, ceil_mode);
}

at::Tensor autograd_max_pool2d_gather(const at::Tensor& input, const at::Tensor& argmax,
                                      at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation,
                                      bool ceil_mode) {
  refuse_tangents("max_pool2d_gather", input);
  if (needs_gradient(input)) {
    return MaxPool2dGatherFunction::apply(
        input, argmax,
        pool_arguments("max_pool2d_gather", kernel_size, stride, padding, dilation, ceil_mode));
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::max_pool2d_gather(input, argmax, kernel_size, stride, padding, dilation, ceil_mode);
}

class BlockFunction : public torch::autograd::Function<BlockFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const BlockArguments& arguments) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const ConvArguments& conv = arguments.conv;
    const PoolArguments& pool = arguments.pool;
    const auto save = [&](const char* name, const Pair& pair) {
      ctx->saved_data[name] = at::IntArrayRef(pair).vec();
    };
    save("stride", conv.stride);
    save("padding", conv.padding);
    save("dilation", conv.dilation);
    ctx->saved_data["groups"] = conv.groups;
    save("pool_kernel_size", pool.kernel_size);
    save("pool_stride", pool.stride);
    save("pool_padding", pool.padding);
    save("pool_dilation", pool.dilation);
    ctx->saved_data["pool_ceil_mode"] = pool.ceil_mode;
    ctx->saved_data["bias"] = has_value(bias);
    const auto [output, argmax] = ops::conv2d_relu_max_pool2d_argmax(
        input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode);
    ctx->save_for_backward({input, weight, output, argmax});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    if (!gradients[0].defined()) return variable_list(4);
    const variable_list saved = ctx->get_saved_variables();
    const auto pair = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    const bool bias_gradient = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2);
    auto [grad_input, grad_weight, grad_bias] = ops::conv2d_relu_max_pool2d_backward(
        gradients[0], saved[0], saved[1], saved[2], saved[3], pair("stride"), pair("padding"),
        pair("dilation"), ctx->saved_data["groups"].toInt(), pair("pool_kernel_size"),
        pair("pool_stride"), pair("pool_padding"), pair("pool_dilation"),
        ctx->saved_data["pool_ceil_mode"].toBool(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias_gradient});
    return {grad_input, grad_weight, grad_bias, {}};
  }
};

at::Tensor autograd_conv2d_relu_max_pool2d(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
    at::IntArrayRef pool_dilation, bool pool_ceil_mode) {
  refuse_tangents("conv2d_relu_max_pool2d", input, weight);
  if (needs_gradient(input, weight) || (has_value(bias) && needs_gradient(*bias))) {
    const BlockArguments arguments =
        block_arguments("conv2d_relu_max_pool2d", stride, padding, dilation, groups,
                        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode);
    if (!block_not_native(input, weight, bias, arguments).empty()) {
      return composed_block(input, weight, bias, arguments);
    }
    return BlockFunction::apply(input, weight, bias, arguments);
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
  refuse_tangents("conv2d_relu_max_pool2d_argmax", input, weight);
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ops::conv2d_relu_max_pool2d_argmax(input, weight, bias, stride, padding, dilation,
                                              groups, pool_kernel_size, pool_stride, pool_padding,
                                              pool_dilation, pool_ceil_mode);
  };
  if (!needs_gradient(input, weight) && !(has_value(bias) && needs_gradient(*bias))) return below();
  const at::Tensor output = ops::conv2d_relu_max_pool2d(
      input, weight, bias, stride, padding, dilation, groups, pool_kernel_size, pool_stride,
      pool_padding, pool_dilation, pool_ceil_mode);
  return {output, std::get<1>(below())};
}

// A backward that is to be differentiated goes through the dense gradient of
// the convolution, whose own derivatives are known.
ops::TensorTriple autograd_conv2d_relu_max_pool2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& output, const at::Tensor& argmax, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride, at::IntArrayRef pool_padding,
    at::IntArrayRef pool_dilation, bool pool_ceil_mode, std::array<bool, 3> output_mask) {
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
    const at::Tensor passing =
        at::where(output.detach().le(0), at::zeros_like(grad_output), grad_output);
    const at::Tensor dense =
        ops::max_pool2d_backward(passing, argmax, conv_size, pool_kernel_size, pool_stride,
                                 pool_padding, pool_dilation, pool_ceil_mode);
    return ops::conv2d_backward(dense, input, weight, stride, padding, dilation, groups,
                                output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return ops::conv2d_relu_max_pool2d_backward(
      grad_output, input, weight, output, argmax, stride, padding, dilation, groups,
      pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(cnnkernels, Autograd, m) {
  m.impl("conv2d", autograd_conv2d);
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
