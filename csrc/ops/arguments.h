// From tensors to problems: argument checks, memory formats, and the decision
// whether the native kernels cover a call.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/conv2d_relu_max_pool2d.h"
#include "kernels/cuda/conv2d.h"

namespace cnnkernels {

using Pair = std::array<int64_t, 2>;

// One integer for both axes, or one each, vertical first.
Pair expand_pair(const char* op, const char* name, at::IntArrayRef values);

struct ConvArguments {
  Pair stride, padding, dilation;
  int64_t groups;
};

struct PoolArguments {
  Pair kernel_size, stride, padding, dilation;
  bool ceil_mode;
};

ConvArguments conv_arguments(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, int64_t groups);

// What an operator calls the arguments of its pooling, for its errors.
struct PoolNames {
  const char* kernel_size = "kernel_size";
  const char* stride = "stride";
  const char* padding = "padding";
  const char* dilation = "dilation";
};

// An empty stride means the kernel size.
PoolArguments pool_arguments(const char* op, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode,
                             const PoolNames& names = {});

// Where an operator has kernels: on CUDA only in a library built with it.
enum class Devices { cpu, cpu_and_cuda };

// A CUDA device, as far as it matters here.
struct CudaDevice {
  cuda::DeviceLimits limits;
  std::string reason;  // why the kernels do not run on it; empty if they do
};
// Null in a library without CUDA kernels: what is linked into it for them sets this when it is
// loaded.
using CudaDeviceOf = const CudaDevice& (*)(const at::Device&);
CudaDeviceOf& cuda_device_of();

// The planner of CUDA's convolutions and blocks, and null likewise.
struct CudaConv2dPlanner {
  decltype(&cuda::plan_conv2d) plan_conv2d = nullptr;
  decltype(&cuda::plan_block) plan_block = nullptr;
};
CudaConv2dPlanner& cuda_conv2d_planner();

// Why the native kernels do not take a tensor; empty if they do.
std::string not_native(const at::Tensor& tensor, Devices devices = Devices::cpu);

bool window_is_too_large(const PoolArguments& pool);

// The same for a pooling of this input, whose windows must each hold an element.
std::string not_native(const at::Tensor& input, const PoolArguments& pool);

// The same for a convolution of these tensors, and for all of its arguments, which are checked
// where the device's kernels have limits.
std::string conv2d_not_native(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, Devices devices);
std::string conv2d_not_native(const char* op, const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

// A convolution's input and symmetric padding for padding="same" or "valid".
struct PaddedInput {
  at::Tensor input;
  Pair padding;
};
PaddedInput pad_input(const char* op, const at::Tensor& input, const at::Tensor& weight,
                      at::IntArrayRef stride, std::string_view padding, at::IntArrayRef dilation);

// Raises torch's class of error for an input (4-D, batched) and weight that do
// not fit, naming the argument and its value.
Conv2dProblem conv_problem(const char* op, const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const ConvArguments& arguments);

// The torch calls, for what the kernels do not cover.
at::Tensor composed_conv2d(bool relu, const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

MaxPool2dProblem pool_problem(const char* op, at::IntArrayRef input_size, DType dtype,
                              Layout layout, const PoolArguments& arguments);

struct BlockArguments {
  ConvArguments conv;
  PoolArguments pool;
};

BlockArguments block_arguments(const char* op, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, int64_t groups,
                               at::IntArrayRef pool_kernel_size, at::IntArrayRef pool_stride,
                               at::IntArrayRef pool_padding, at::IntArrayRef pool_dilation,
                               bool pool_ceil_mode);

// Two operators, for what the block's kernels do not cover.
at::Tensor composed_block(const at::Tensor& input, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, const BlockArguments& arguments);

// The fused block: the convolution's reasons, and pooling windows that might
// lie in the padding alone.
std::string block_not_native(const at::Tensor& input, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias,
                             const BlockArguments& arguments);

Conv2dReluMaxPool2dProblem block_problem(const char* op, const at::Tensor& images,
                                         const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias,
                                         const BlockArguments& arguments);

// Raises unless `argmax` is one that a pooling with this problem and output gives.
void check_argmax(const char* op, const at::Tensor& argmax, const at::Tensor& output,
                  const MaxPool2dProblem& problem);

// The layout in which torch computes, and returns, a convolution or a pooling.
Layout conv_layout(const at::Tensor& input, const at::Tensor& weight);
Layout pool_layout(const at::Tensor& input);
at::MemoryFormat memory_format(Layout layout);

DType dtype_of(const at::Tensor& tensor);

// Whether the CPU's kernels, which write out the border, would do little else. ATen
// takes such calls.
bool mostly_border(const Conv2dProblem& problem);

// Writes the tensor's strides into the problem.
void set_weight_strides(Conv2dProblem& problem, const at::Tensor& weight);

// Raises unless the dimensions are 3 or 4.
void check_input_dimensions(const char* op, const at::Tensor& input);

ThreadPool torch_thread_pool();

// How often each native kernel ran; tests ask, so that no promise of a native
// path goes unproved.
struct KernelCalls {
  std::atomic<int64_t> conv2d{0}, conv2d_relu{0}, conv2d_backward{0}, max_pool2d{0},
      max_pool2d_backward{0}, max_pool2d_gather{0}, conv2d_relu_max_pool2d{0},
      conv2d_relu_max_pool2d_backward{0}, gd_step{0}, sgd_step{0};
};
KernelCalls& kernel_calls();

inline void count(std::atomic<int64_t>& calls) { calls.fetch_add(1, std::memory_order_relaxed); }

}  // namespace cnnkernels
