#include "ops/arguments.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/DimVector.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/relu.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

#include "kernels/cuda/max_pool2d.h"
#include "ops/dispatch.h"
#include "ops/operators.h"

namespace cnnkernels {
namespace {

int64_t checked_add(const char* op, int64_t a, int64_t b) {
  int64_t sum;
  TORCH_CHECK(!__builtin_add_overflow(a, b, &sum), op, ": sizes overflow 64 bits: ", a, " + ", b);
  return sum;
}

int64_t checked_multiply(const char* op, int64_t a, int64_t b) {
  int64_t product;
  TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), op, ": sizes overflow 64 bits: ", a, " * ",
              b);
  return product;
}

// dilation * (kernel - 1) + 1
int64_t kernel_extent(const char* op, int64_t kernel, int64_t dilation) {
  return checked_add(op, checked_multiply(op, dilation, kernel - 1), 1);
}

void check_pair(const char* op, const char* name, const Pair& pair, int64_t least) {
  TORCH_CHECK(pair[0] >= least && pair[1] >= least, op, ": ", name, " must be ",
              least == 0 ? "non-negative" : "positive", ", but got ", name, "=(", pair[0], ", ",
              pair[1], ")");
}

int64_t pool_output_size(const char* op, const char* axis, int64_t size, int64_t kernel,
                         int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t bordered = checked_add(op, size, checked_multiply(op, 2, padding));
  const int64_t extent = kernel_extent(op, kernel, dilation);
  const int64_t room = bordered - extent;
  const int64_t rounding = ceil_mode ? stride - 1 : 0;
  const int64_t numerator = checked_add(op, room, rounding);
  int64_t out = (numerator < 0 ? -1 : numerator / stride) + 1;
  // The last window must start inside of the image or its left border.
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;
  TORCH_CHECK(out >= 1, op, ": the window does not fit: input ", axis, " ", size, " with padding ",
              padding, " is smaller than kernel_size ", kernel, " with dilation ", dilation);
  return out;
}

void check_32_bits(const char* op, const char* name, const Pair& pair) {
  TORCH_CHECK(std::max(pair[0], pair[1]) <= std::numeric_limits<int32_t>::max(), op, ": ", name,
              " must fit in 32 bits, but got ", name, "=(", pair[0], ", ", pair[1], ")");
}

// A single output position never takes a stride, however large.
template <class Problem>
void drop_unused_strides(Problem& problem) {
  if (problem.out_height == 1) problem.stride_h = 1;
  if (problem.out_width == 1) problem.stride_w = 1;
}

// Whether some window along this axis lies in the border alone, which dilation
// makes possible.
bool has_empty_window(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                      int64_t dilation) {
  if (dilation == 1) return false;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t start = i * stride - padding;
    const int64_t first = start < 0 ? start + ceil_div(-start, dilation) * dilation : start;
    if (first >= size || first > start + (kernel - 1) * dilation) return true;
  }
  return false;
}

}  // namespace

Pair expand_pair(const char* op, const char* name, at::IntArrayRef values) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, op, ": ", name,
              " must be one integer or two, but got ", values.size(), " values");
  return {values[0], values[values.size() - 1]};
}

ConvArguments conv_arguments(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, int64_t groups) {
  const ConvArguments arguments = {expand_pair(op, "stride", stride),
                                   expand_pair(op, "padding", padding),
                                   expand_pair(op, "dilation", dilation), groups};
  check_pair(op, "stride", arguments.stride, 1);
  check_pair(op, "padding", arguments.padding, 0);
  check_pair(op, "dilation", arguments.dilation, 1);
  check_32_bits(op, "padding", arguments.padding);
  check_32_bits(op, "dilation", arguments.dilation);
  TORCH_CHECK(groups > 0, op, ": groups must be positive, but got groups=", groups);
  return arguments;
}

PoolArguments pool_arguments(const char* op, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode,
                             const PoolNames& names) {
  PoolArguments arguments;
  arguments.kernel_size = expand_pair(op, names.kernel_size, kernel_size);
  arguments.stride = stride.empty() ? arguments.kernel_size : expand_pair(op, names.stride, stride);
  arguments.padding = expand_pair(op, names.padding, padding);
  arguments.dilation = expand_pair(op, names.dilation, dilation);
  arguments.ceil_mode = ceil_mode;
  check_pair(op, names.kernel_size, arguments.kernel_size, 1);
  check_pair(op, names.stride, arguments.stride, 1);
  check_pair(op, names.padding, arguments.padding, 0);
  check_pair(op, names.dilation, arguments.dilation, 1);
  check_32_bits(op, names.kernel_size, arguments.kernel_size);
  check_32_bits(op, names.stride, arguments.stride);
  check_32_bits(op, names.dilation, arguments.dilation);
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(arguments.padding[axis] <= arguments.kernel_size[axis] / 2, op, ": ", names.padding,
                " must be at most half of ", names.kernel_size, ", but got ", names.padding, "=",
                arguments.padding[axis], " for ", names.kernel_size, "=",
                arguments.kernel_size[axis]);
  }
  return arguments;
}

CudaDeviceOf& cuda_device_of() {
  static CudaDeviceOf device_of = nullptr;
  return device_of;
}

CudaConv2dPlanner& cuda_conv2d_planner() {
  static CudaConv2dPlanner planner;
  return planner;
}

std::string not_native(const at::Tensor& tensor, Devices devices) {
  const at::Device device = tensor.device();
  if (devices == Devices::cpu_and_cuda && device.is_cuda() && cuda_device_of() != nullptr) {
    const std::string& reason = cuda_device_of()(device).reason;
    if (!reason.empty()) return reason;
  } else if (!device.is_cpu()) {
    return "device " + device.str();
  }
  if (tensor.layout() != at::kStrided) return "layout is not strided";
  if (tensor.is_conj() || tensor.is_neg()) return "conjugated or negated view";
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      return "";
    default:
      return std::string("dtype ") + c10::toString(tensor.scalar_type());
  }
}

std::string conv2d_not_native(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, Devices devices) {
  TORCH_CHECK(weight.device() == input.device(),
              "conv2d: input and weight must be on the same device, but got input on ",
              input.device(), " and weight on ", weight.device());
  TORCH_CHECK(!has_value(bias) || bias->device() == input.device(),
              "conv2d: input and bias must be on the same device, but got input on ",
              input.device(), " and bias on ", has_value(bias) ? bias->device() : input.device());
  std::string reason = not_native(input, devices);
  if (reason.empty() && has_value(bias)) reason = not_native(*bias, devices);
  if (reason.empty()) reason = not_native(weight, devices);
  if (!reason.empty() || input.dim() < 3) return reason;
  for (int64_t axis = input.dim() - 3; axis < input.dim(); ++axis) {
    // Symbolic sizes stay symbolic, or an export would fix a dynamic one.
    if (TORCH_GUARD_OR_FALSE(input.sym_size(axis).sym_eq(0))) return "input has no elements";
  }
  return "";
}

std::string conv2d_not_native(const char* op, const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const std::string reason = conv2d_not_native(input, weight, bias, Devices::cpu_and_cuda);
  const auto is_symbolic = [](const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (!reason.empty() || input.is_cpu() || is_symbolic(input) || is_symbolic(weight)) return reason;
  check_input_dimensions(op, input);
  return cuda::conv2d_not_native(
      conv_problem(op, input.dim() == 3 ? input.unsqueeze(0) : input, weight, bias,
                   conv_arguments(op, stride, padding, dilation, groups)));
}

at::Tensor composed_conv2d(bool relu, const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const at::Tensor convolved = at::conv2d(input, weight, bias, stride, padding, dilation, groups);
  return relu ? at::relu(convolved) : convolved;
}

// The tables of taps, and borders of half a window, would outgrow the image.
bool window_is_too_large(const PoolArguments& pool) {
  return pool.kernel_size[0] * pool.kernel_size[1] > (int64_t{1} << 16);
}

std::string not_native(const at::Tensor& input, const PoolArguments& pool) {
  const std::string reason = not_native(input, Devices::cpu_and_cuda);
  if (!reason.empty() || input.dim() < 3) return reason;
  if (window_is_too_large(pool)) return "a window of more than 65536 elements";
  for (int axis = 0; axis < 2; ++axis) {
    if (pool.dilation[axis] == 1) continue;
    // To ask a dynamic size of an export would fix it.
    if (input.sym_size(input.dim() - 2 + axis).is_symbolic()) {
      return "a dilated window over a dynamic size";
    }
    const int64_t size = input.size(input.dim() - 2 + axis);
    const int64_t out = pool_output_size("max_pool2d", axis == 0 ? "height" : "width", size,
                                         pool.kernel_size[axis], pool.stride[axis],
                                         pool.padding[axis], pool.dilation[axis], pool.ceil_mode);
    if (has_empty_window(size, out, pool.kernel_size[axis], pool.stride[axis], pool.padding[axis],
                         pool.dilation[axis])) {
      return "a dilated window lies in the padding alone";
    }
  }
  if (!input.is_cpu() && !input.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    at::DimVector size(input.sizes());
    if (size.size() == 3) size.insert(size.begin(), 1);
    return cuda::max_pool2d_not_native(
        pool_problem("max_pool2d", size, dtype_of(input), pool_layout(input), pool));
  }
  return "";
}

Layout conv_layout(const at::Tensor& input, const at::Tensor& weight) {
  // As torch: channels_last if either asks for it.
  const bool channels_last =
      input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
      (weight.dim() == 4 && weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
  return channels_last ? Layout::nhwc : Layout::nchw;
}

Layout pool_layout(const at::Tensor& input) {
  return input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? Layout::nhwc
                                                                         : Layout::nchw;
}

at::MemoryFormat memory_format(Layout layout) {
  return layout == Layout::nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return DType::float32;
  }
}

void check_input_dimensions(const char* op, const at::Tensor& input) {
  TORCH_CHECK(input.dim() == 3 || input.dim() == 4, op,
              ": input must be 3-D (C, H, W) or 4-D (N, C, H, W), but got input of size ",
              input.sizes());
}

namespace {

// On CUDA as torch asks for its own convolutions: torch.backends.cudnn.conv.fp32_precision, or
// what it inherits, and the older allow_tf32. On the CPU torch.backends.mkldnn.conv.fp32_precision,
// or what it inherits; where that is not set, the precision of matrix products, which
// torch.set_float32_matmul_precision sets.
Float32Precision float32_precision(const at::Device& device) {
  const at::Context& context = at::globalContext();
  if (device.is_cuda()) {
    return context.allowTF32CuDNN(at::Float32Op::CONV) ? Float32Precision::high
                                                       : Float32Precision::highest;
  }
  at::Float32Precision precision =
      context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::CONV);
  if (precision == at::Float32Precision::NONE) {
    precision = context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  }
  switch (precision) {
    case at::Float32Precision::TF32:
      return Float32Precision::high;
    case at::Float32Precision::BF16:
      return Float32Precision::medium;
    default:
      return Float32Precision::highest;
  }
}

}  // namespace

Conv2dProblem conv_problem(const char* op, const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const ConvArguments& arguments) {
  TORCH_CHECK(weight.dim() == 4, op,
              ": weight must be 4-D (out_channels, in_channels / groups, height, width), but got "
              "weight of size ",
              weight.sizes());
  TORCH_CHECK(weight.scalar_type() == input.scalar_type(), op,
              ": input and weight must have the same dtype, but got input of ", input.scalar_type(),
              " and weight of ", weight.scalar_type());
  TORCH_CHECK(weight.device() == input.device(), op,
              ": input and weight must be on the same device, but got input on ", input.device(),
              " and weight on ", weight.device());
  const int64_t groups = arguments.groups;
  TORCH_CHECK(weight.size(0) > 0, op, ": weight must have output channels, but got weight of size ",
              weight.sizes());
  TORCH_CHECK(weight.size(0) % groups == 0, op, ": weight's output channels (", weight.size(0),
              ") must be divisible by groups=", groups);
  TORCH_CHECK(input.size(1) == checked_multiply(op, weight.size(1), groups), op, ": input of size ",
              input.sizes(), " must have ", weight.size(1) * groups,
              " channels for weight of size ", weight.sizes(), " and groups=", groups, ", but has ",
              input.size(1));
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must be 1-D with ",
                weight.size(0), " elements, but got bias of size ", bias->sizes());
    TORCH_CHECK(bias->scalar_type() == input.scalar_type(), op,
                ": input and bias must have the same dtype, but got input of ", input.scalar_type(),
                " and bias of ", bias->scalar_type());
    TORCH_CHECK(bias->device() == input.device(), op,
                ": input and bias must be on the same device, but got input on ", input.device(),
                " and bias on ", bias->device());
  }

  Conv2dProblem problem;
  problem.batch = input.size(0);
  problem.in_channels = input.size(1);
  problem.out_channels = weight.size(0);
  problem.groups = groups;
  problem.in_height = input.size(2);
  problem.in_width = input.size(3);
  problem.kernel_height = weight.size(2);
  problem.kernel_width = weight.size(3);
  problem.stride_h = arguments.stride[0];
  problem.stride_w = arguments.stride[1];
  problem.pad_top = arguments.padding[0];
  problem.pad_left = arguments.padding[1];
  problem.dilation_h = arguments.dilation[0];
  problem.dilation_w = arguments.dilation[1];
  problem.dtype = dtype_of(input);
  problem.layout = conv_layout(input, weight);
  problem.precision = float32_precision(input.device());
  set_weight_strides(problem, weight);
  int64_t out[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t size = input.size(2 + axis);
    const int64_t kernel = weight.size(2 + axis);
    TORCH_CHECK(kernel > 0, op, ": weight must have a kernel, but got weight of size ",
                weight.sizes());
    const int64_t bordered =
        checked_add(op, size, checked_multiply(op, 2, arguments.padding[axis]));
    const int64_t extent = kernel_extent(op, kernel, arguments.dilation[axis]);
    TORCH_CHECK(extent <= bordered, op,
                ": the kernel does not fit: ", axis == 0 ? "height " : "width ", extent,
                " (weight of size ", weight.sizes(), ", dilation=", arguments.dilation[axis],
                ") is larger than the padded input's ", bordered, " (input of size ", input.sizes(),
                ", padding=", arguments.padding[axis], ")");
    out[axis] = (bordered - extent) / arguments.stride[axis] + 1;
  }
  problem.out_height = out[0];
  problem.out_width = out[1];
  drop_unused_strides(problem);
  checked_multiply(
      op, checked_multiply(op, problem.batch, problem.out_channels),
      checked_multiply(op, checked_multiply(op, problem.out_height, problem.out_width), 8));
  return problem;
}

MaxPool2dProblem pool_problem(const char* op, at::IntArrayRef input_size, DType dtype,
                              Layout layout, const PoolArguments& arguments) {
  TORCH_CHECK(input_size[1] > 0 && input_size[2] > 0 && input_size[3] > 0, op,
              ": only the batch of input may be empty, but got input of size ", input_size);
  MaxPool2dProblem problem;
  problem.batch = input_size[0];
  problem.channels = input_size[1];
  problem.in_height = input_size[2];
  problem.in_width = input_size[3];
  problem.kernel_height = arguments.kernel_size[0];
  problem.kernel_width = arguments.kernel_size[1];
  problem.stride_h = arguments.stride[0];
  problem.stride_w = arguments.stride[1];
  problem.pad_top = arguments.padding[0];
  problem.pad_left = arguments.padding[1];
  problem.dilation_h = arguments.dilation[0];
  problem.dilation_w = arguments.dilation[1];
  problem.dtype = dtype;
  // One channel lies the same in both layouts, and a row fills a vector better than a pixel.
  problem.layout = problem.channels == 1 ? Layout::nchw : layout;
  problem.out_height =
      pool_output_size(op, "height", problem.in_height, problem.kernel_height, problem.stride_h,
                       problem.pad_top, problem.dilation_h, arguments.ceil_mode);
  problem.out_width =
      pool_output_size(op, "width", problem.in_width, problem.kernel_width, problem.stride_w,
                       problem.pad_left, problem.dilation_w, arguments.ceil_mode);
  drop_unused_strides(problem);
  return problem;
}

namespace {

constexpr PoolNames kPoolNames = {"pool_kernel_size", "pool_stride", "pool_padding",
                                  "pool_dilation"};

}  // namespace

BlockArguments block_arguments(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, int64_t groups,
                               at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                               at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                               bool pool_ceil_mode) {
  return {conv_arguments(op, stride, padding, dilation, groups),
          pool_arguments(op, pool_kernel_size, pool_stride, pool_padding, pool_dilation,
                         pool_ceil_mode, kPoolNames)};
}

at::Tensor composed_block(const at::Tensor& input, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, const BlockArguments& arguments) {
  const at::Tensor convolved =
      ops::conv2d_relu(input, weight, bias, arguments.conv.stride, arguments.conv.padding,
                       arguments.conv.dilation, arguments.conv.groups);
  return ops::max_pool2d(convolved, arguments.pool.kernel_size, arguments.pool.stride,
                         arguments.pool.padding, arguments.pool.dilation, arguments.pool.ceil_mode);
}

std::string block_not_native(const at::Tensor& input, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias,
                             const BlockArguments& arguments) {
  const PoolArguments& pool = arguments.pool;
  const std::string reason = conv2d_not_native(input, weight, bias, Devices::cpu_and_cuda);
  if (!reason.empty()) return reason;
  if ((pool.dilation[0] > 1 || pool.dilation[1] > 1) &&
      (pool.padding[0] > 0 || pool.padding[1] > 0)) {
    return "a dilated pooling window with padding";
  }
  if (pool.ceil_mode && (pool.dilation[0] > 1 || pool.dilation[1] > 1)) {
    return "a dilated pooling window with ceil_mode";
  }
  if (window_is_too_large(pool)) return "a window of more than 65536 elements";
  if (!input.is_cpu()) return "";  // sizes are the device's
  for (int axis = 0; axis < 2; ++axis) {
    if (arguments.conv.padding[axis] > 1024 || arguments.conv.dilation[axis] > 1024) {
      return "padding or dilation of more than 1024";  // the kernel writes out the border
    }
  }
  return "";
}

Conv2dReluMaxPool2dProblem block_problem(const char* op, const at::Tensor& images,
                                         const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias,
                                         const BlockArguments& arguments) {
  Conv2dReluMaxPool2dProblem problem;
  problem.conv = conv_problem(op, images, weight, bias, arguments.conv);
  // As torch's ReLU, which returns the contiguous format where both are the same.
  if (problem.conv.out_channels == 1 ||
      (problem.conv.out_height == 1 && problem.conv.out_width == 1)) {
    problem.conv.layout = Layout::nchw;
  }
  const std::array<int64_t, 4> conv_size = {problem.conv.batch, problem.conv.out_channels,
                                            problem.conv.out_height, problem.conv.out_width};
  problem.pool =
      pool_problem(op, conv_size, problem.conv.dtype, problem.conv.layout, arguments.pool);
  return problem;
}

bool mostly_border(const Conv2dProblem& problem) {
  const auto bordered = [](int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
    return static_cast<double>(out - 1) * static_cast<double>(stride) +
           static_cast<double>(kernel - 1) * static_cast<double>(dilation) + 1;
  };
  const double plane =
      bordered(problem.out_height, problem.stride_h, problem.kernel_height, problem.dilation_h) *
      bordered(problem.out_width, problem.stride_w, problem.kernel_width, problem.dilation_w);
  const double image =
      static_cast<double>(problem.in_height) * static_cast<double>(problem.in_width);
  return plane > 16 * image + 65536;
}

void set_weight_strides(Conv2dProblem& problem, const at::Tensor& weight) {
  problem.weight_stride_k = weight.stride(0);
  problem.weight_stride_c = weight.stride(1);
  problem.weight_stride_r = weight.stride(2);
  problem.weight_stride_s = weight.stride(3);
}

ThreadPool torch_thread_pool() {
  const auto run = [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                      void* context) {
    at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, at::in_parallel_region() ? 1 : at::get_num_threads()};
}

KernelCalls& kernel_calls() {
  static KernelCalls calls;
  return calls;
}

void check_argmax(const char* op, const at::Tensor& argmax, const at::Tensor& output,
                  const MaxPool2dProblem& problem) {
  TORCH_CHECK(argmax.device() == output.device() &&
                  argmax.scalar_type() == (problem.compact_argmax() ? at::kByte : at::kInt),
              op, ": argmax must be ", problem.compact_argmax() ? "uint8" : "int32", " on ",
              output.device(), " for windows of ", problem.window(), " elements, but got ",
              argmax.scalar_type(), " on ", argmax.device());
  TORCH_CHECK(argmax.sizes() == output.sizes(), op, ": argmax must have the output's size ",
              output.sizes(), ", but got argmax of size ", argmax.sizes());
}

}  // namespace cnnkernels
