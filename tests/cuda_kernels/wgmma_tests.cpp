// The convolution by warpgroup products, which takes few of the random problems of the others.
#include <algorithm>

#include "conv2d_tests.h"
#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/conv2d_wgmma.h"
#include "problems.h"
#include "reference.h"
#include "schedules.h"

namespace cuda_kernel_tests {
namespace {

using namespace cnnkernels;
using cuda::ConvolutionPass;
using kernel_tests::Dims;
using kernel_tests::element_of;
using kernel_tests::expect;
using kernel_tests::Memory;
using kernel_tests::Random;
using kernel_tests::Tensor;

constexpr int64_t kAlignment = 16;

cuda::DeviceLimits hopper() { return cuda::architecture_limits(90); }

int64_t random_channels(Random& random, int64_t groups) {
  const int64_t chunks[] = {1, 2, 3, 4, 5, 8, 9, 12, 16, 17};
  return groups * (groups == 1 ? 8 * chunks[random.between(0, 9)] : 16 * random.between(1, 3));
}

// What the kernel takes, forward or backward or both.
Conv2dProblem random_problem(Random& random) {
  constexpr int64_t kMostProducts = 4000000;
  while (true) {
    Conv2dProblem p = {};
    p.dtype = random.chance(50) ? DType::float16 : DType::bfloat16;
    p.layout = Layout::nhwc;
    p.batch = random.between(1, 2);
    p.groups = random.chance(50) ? 1 : random.between(2, 3);
    const int64_t any = p.groups * random.between(1, random.chance(70) ? 64 : 150);
    p.in_channels = p.groups > 1 || random.chance(80) ? random_channels(random, p.groups) : any;
    p.out_channels = random.chance(50) ? random_channels(random, p.groups) : any;
    p.in_height = random.between(1, 40);
    p.in_width = random.between(1, 24);
    p.kernel_height = random.between(1, 5);
    p.kernel_width = random.between(1, 5);
    p.stride_h = p.stride_w = 1;
    if (random.chance(30)) {  // more patches than stages, each of few taps
      p.in_channels = p.groups * 16 * random.between(9, 13);
      p.kernel_height = p.kernel_width = 1;
    }
    p.dilation_h = random.chance(70) ? 1 : random.between(2, 3);
    p.dilation_w = random.chance(70) ? 1 : random.between(2, 3);
    p.pad_top = random.between(0, 4);
    p.pad_left = random.between(0, 4);
    p.out_height = p.in_height + 2 * p.pad_top - p.dilation_h * (p.kernel_height - 1);
    p.out_width = p.in_width + 2 * p.pad_left - p.dilation_w * (p.kernel_width - 1);
    if (p.out_height < 1 || p.out_width < 1) continue;
    const Dims strides = kernel_tests::layout_strides(
        {p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width},
        random.chance(50) ? Layout::nchw : Layout::nhwc);
    p.weight_stride_k = strides[0];
    p.weight_stride_c = strides[1];
    p.weight_stride_r = strides[2];
    p.weight_stride_s = strides[3];
    p.relu = random.chance(40);
    if (p.multiply_adds() <= kMostProducts) return p;
  }
}

// Source and result of a pass, and whether the result is to be clipped.
struct Run {
  ConvolutionPass pass;
  const Tensor* source;
  const Tensor* expected;
  const Memory* bias;
  bool relu;
};

void check_run(Random& random, const Conv2dProblem& p, const Memory& weight, Run run,
               const std::string& name) {
  if (!cuda::wgmma_applies(run.pass, p.dtype, kAlignment, hopper())) return;
  const auto element = element_of(p.dtype);
  const Layout layout = random.chance(60) ? Layout::nhwc : Layout::nchw;
  const Memory source(element, *run.source,
                      kernel_tests::layout_strides(run.source->shape, Layout::nhwc),
                      Memory::Placement::aligned);
  const Dims strides = kernel_tests::layout_strides(run.expected->shape, layout);
  const Memory result(
      element, run.expected->shape, strides,
      random.chance(80) ? Memory::Placement::aligned : Memory::Placement::unaligned);
  run.pass.result_stride_n = strides[0];
  run.pass.result_stride_c = strides[1];
  run.pass.result_stride_h = strides[2];
  run.pass.result_stride_w = strides[3];
  const Memory packed(kernel_tests::Element::uint8,
                      Dims{cuda::packed_weight_bytes(run.pass, element_size(p.dtype)), 1, 1, 1},
                      {1, 1, 1, 1}, Memory::Placement::aligned);
  const cuda::Error error = cuda::wgmma_pass(p.dtype, run.pass, source.data(), weight.data(),
                                             run.bias == nullptr ? nullptr : run.bias->data(),
                                             result.data(), run.relu, packed.data(), nullptr);
  expect(error == cuda::kSuccess, name + " is launched");
  expect(packed.guards_intact(), name + ": packed weights stay in bounds");
  kernel_tests::expect_holds(result, *run.expected, name);
}

}  // namespace

void check_wgmma(Random& random) {
  const Conv2dProblem p = random_problem(random);
  using Order = cuda_emulator::Schedule::Order;
  constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::shuffled};
  cuda_emulator::schedule() = {kOrders[random.between(0, 2)],
                               static_cast<uint32_t>(random.between(0, 1000))};
  kernel_tests::set_context("warpgroup products, " + kernel_tests::describe(p));
  const Dims weight_shape = {p.out_channels, p.in_channels / p.groups, p.kernel_height,
                             p.kernel_width};
  Tensor input = kernel_tests::random_tensor(
      random, {p.batch, p.in_channels, p.in_height, p.in_width}, p.dtype);
  // One that reaches only the results that it belongs to, of its own group.
  if (random.chance(p.groups > 1 ? 90 : 30)) kernel_tests::add_specials(random, input, 1);
  const Tensor weight = kernel_tests::random_tensor(random, weight_shape, p.dtype);
  const Tensor bias = kernel_tests::random_tensor(random, {p.out_channels, 1, 1, 1}, p.dtype);
  const Tensor grad_output = kernel_tests::random_tensor(
      random, {p.batch, p.out_channels, p.out_height, p.out_width}, p.dtype);
  const bool with_bias = random.chance(70);
  Tensor output = kernel_tests::conv2d(p, input, weight, with_bias ? &bias : nullptr);
  if (p.relu) output = kernel_tests::relu(output);
  const Tensor grad_input = kernel_tests::conv2d_gradients(p, grad_output, input, weight).input;
  const Memory weight_memory(
      element_of(p.dtype), weight,
      {p.weight_stride_k, p.weight_stride_c, p.weight_stride_r, p.weight_stride_s});
  const Memory bias_memory(element_of(p.dtype), bias, {1, 1, 1, 1});
  check_run(random, p, weight_memory,
            {cuda::forward_pass(p), &input, &output, with_bias ? &bias_memory : nullptr, p.relu},
            "output");
  check_run(random, p, weight_memory,
            {cuda::input_gradient_pass(p), &grad_output, &grad_input, nullptr, false},
            "gradient of the input");
  cuda_emulator::schedule() = {};
}

void check_wgmma_cut() {
  kernel_tests::set_context("which passes warpgroup products take");
  Conv2dProblem p = {};
  p.batch = p.groups = 1;
  p.in_channels = p.out_channels = 128;
  p.in_height = p.in_width = p.out_height = p.out_width = 56;
  p.kernel_height = p.kernel_width = 3;
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_left = 1;
  p.dtype = DType::bfloat16;
  p.layout = Layout::nhwc;
  const auto applies = [](const Conv2dProblem& problem, int64_t alignment = kAlignment,
                          int capability = 90) {
    return cuda::wgmma_applies(cuda::forward_pass(problem), problem.dtype, alignment,
                               cuda::architecture_limits(capability));
  };
  expect(applies(p), "a layer of a network");
  const auto cut_of = [](const Conv2dProblem& problem) {
    const ConvolutionPass pass = cuda::forward_pass(problem);
    return cuda::wgmma_cut(pass, cuda::wgmma_patch(pass));
  };
  const cuda::WgmmaCut cut = cut_of(p);
  const cuda::SourcePatch patch = cuda::wgmma_patch(cuda::forward_pass(p));
  expect(cut.channels == 128 && patch.pixels == 18 * 10 && patch.tiles == 4 * 7, "its tiles");
  expect(cut.patch_stages == 2 && cut.weight_stages == 4 && cut.shared_bytes <= 113 * 1024,
         "two blocks share a multiprocessor");
  for (const int capability : {75, 80, 86, 89, 100, 120}) {
    expect(!applies(p, kAlignment, capability), "no other architecture");
  }
  expect(!applies(p, 8), "only aligned sources");
  const auto refused = [&](auto&& change) {
    Conv2dProblem other = p;
    change(other);
    return !applies(other);
  };
  expect(refused([](auto& other) { other.dtype = DType::float32; }), "only 16 bits");
  expect(refused([](auto& other) { other.layout = Layout::nchw; }), "only NHWC sources");
  expect(refused([](auto& other) {
           other.stride_h = 2;
           other.out_height = 28;
         }),
         "only stride 1");
  expect(refused([](auto& other) { other.in_channels = 12; }), "only whole chunks");
  expect(refused([](auto& other) {
           other.groups = 2;
           other.in_channels = 48;
         }),
         "only whole products of a group");
  expect(refused([](auto& other) { other.dilation_h = other.dilation_w = 60; }),
         "only patches that shared memory holds");
  Conv2dProblem wide = p;
  wide.dilation_h = wide.dilation_w = wide.pad_top = wide.pad_left = 5;
  expect(applies(wide), "a patch for which a block has a multiprocessor for itself");
  expect(cut_of(wide).shared_bytes > 113 * 1024, "its shared memory is more than half");
}

}  // namespace cuda_kernel_tests
