#include "weight_gradient_tests.h"

#include <cmath>

#include "kernels/cuda/conv2d_kernels.h"
#include "reference.h"
#include "schedules.h"

namespace cuda_kernel_tests {
namespace {

using namespace cnnkernels;
using cuda::ConvolutionPass;
using cuda::TensorProducts;
using cuda::WeightGradientChoice;
using kernel_tests::Dims;
using kernel_tests::Element;
using kernel_tests::Memory;
using kernel_tests::Random;
using kernel_tests::Tensor;

const Dims kVector = {1, 1, 1, 1};

int64_t one_of(Random& random, std::initializer_list<int64_t> values) {
  return values.begin()[random.between(0, static_cast<int64_t>(values.size()) - 1)];
}

void draw_axis(Random& random, int64_t in, int64_t& out, int64_t& kernel, int64_t& stride,
               int64_t& pad, int64_t& dilation) {
  kernel = one_of(random, {1, 2, 3, 3, 5, 7});
  stride = one_of(random, {1, 1, 2, 3});
  dilation = random.chance(80) ? 1 : random.between(2, 4);
  pad = random.chance(30) ? 0 : random.between(0, dilation * (kernel - 1));
  const int64_t pad_after = random.chance(70) ? pad : random.between(0, dilation * (kernel - 1));
  const int64_t room = in + pad + pad_after - dilation * (kernel - 1) - 1;
  out = room < 0 ? 0 : room / stride + 1;
}

Conv2dProblem draw_problem(Random& random) {
  constexpr int64_t kMostProducts = 400000;
  constexpr DType kTypes[] = {DType::float32, DType::float32, DType::bfloat16, DType::float16};
  while (true) {
    Conv2dProblem p = {};
    p.dtype = kTypes[random.between(0, 3)];
    p.layout = random.chance(40) ? Layout::nchw : Layout::nhwc;
    p.groups = random.chance(75) ? 1 : random.between(2, 3);
    p.batch = random.between(1, 3);
    if (random.chance(15)) p.batch = random.between(4, 40);
    // Whole chunks of 16 bytes, or any number.
    p.in_channels =
        p.groups * (random.chance(50) ? 8 * random.between(1, 9) : random.between(1, 70));
    p.out_channels =
        p.groups * (random.chance(50) ? 8 * random.between(1, 18) : random.between(1, 140));
    p.in_height = random.between(1, 20);
    p.in_width = random.chance(60) ? random.between(1, 20) : random.between(20, 90);
    draw_axis(random, p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top,
              p.dilation_h);
    draw_axis(random, p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left,
              p.dilation_w);
    if (p.out_height < 1 || p.out_width < 1 || p.multiply_adds() > kMostProducts) continue;
    const Dims shape = {p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width};
    const Dims strides =
        kernel_tests::layout_strides(shape, random.chance(50) ? Layout::nchw : Layout::nhwc);
    p.weight_stride_k = strides[0];
    p.weight_stride_c = strides[1];
    p.weight_stride_r = strides[2];
    p.weight_stride_s = strides[3];
    if (cuda::conv2d_not_native(p).empty()) return p;
  }
}

// What the plan makes of a random device, or any tile that fits an H100.
WeightGradientChoice draw_choice(Random& random, const ConvolutionPass& pass, DType dtype,
                                 int64_t alignment) {
  const TensorProducts products =
      random.chance(50) ? TensorProducts::tf32 : TensorProducts::exact_parts;
  constexpr int kArchitectures[] = {80, 86, 90, 100};
  cuda::DeviceLimits limits = cuda::architecture_limits(kArchitectures[random.between(0, 3)]);
  limits.multiprocessors = static_cast<int>(random.between(1, 150));
  WeightGradientChoice choice =
      cuda::choose_weight_gradient(pass, dtype, products, alignment, limits);
  kernel_tests::expect(choice.results > 0 && choice.parts > 0, "a tile fits");
  kernel_tests::expect(
      cuda::weight_gradient_shared_bytes(pass, dtype, choice) <= limits.shared_bytes_per_block,
      "the shared memory fits");
  if (random.chance(40)) return choice;
  constexpr int64_t kMostSharedBytes = 227 * 1024;
  while (true) {
    choice.row_warps = static_cast<int>(one_of(random, {1, 2, 4}));
    choice.column_warps = static_cast<int>(one_of(random, {1, 2, 4, 8}));
    choice.results = static_cast<int>(random.between(1, 16) * 32);
    choice.parts =
        static_cast<int>(random.chance(70) ? random.between(1, 5) : random.between(8, 40));
    const std::optional<int64_t> bytes = cuda::weight_gradient_shared_bytes(pass, dtype, choice);
    if (choice.row_warps * choice.column_warps <= 16 && bytes && *bytes <= kMostSharedBytes) {
      return choice;
    }
  }
}

// The gradient as the kernel has it, in tensors of the problem's layout.
struct Run {
  const Conv2dProblem& problem;
  Memory::Placement placement;
  Memory input, grad_output, grad_weight, totals;

  Run(const Conv2dProblem& p, Memory::Placement place, const Tensor& in, const Tensor& grad,
      int parts)
      : problem(p),
        placement(place),
        input(kernel_tests::element_of(p.dtype), in,
              kernel_tests::layout_strides(in.shape, p.layout), place),
        grad_output(kernel_tests::element_of(p.dtype), grad,
                    kernel_tests::layout_strides(grad.shape, p.layout), place),
        grad_weight(
            kernel_tests::element_of(p.dtype),
            Dims{p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width},
            Dims{p.weight_stride_k, p.weight_stride_c, p.weight_stride_r, p.weight_stride_s},
            place),
        totals(Element::uint8,
               Dims{cuda::weight_total_bytes(cuda::forward_pass(p), parts, p.dtype), 1, 1, 1},
               kVector, Memory::Placement::aligned) {}

  void gemm(const WeightGradientChoice& choice) const {
    cuda::weight_gradient_gemm(problem.dtype, choice, cuda::forward_pass(problem), choice.parts,
                               grad_output.data(), input.data(), grad_weight.data(), totals.data(),
                               nullptr);
    kernel_tests::expect(totals.guards_intact(), "totals stay in bounds");
  }
};

Tensor normal_tensor(Random& random, const Dims& shape) {
  Tensor tensor(shape);
  for (double& value : tensor.values) {
    double sum = 0;  // of uniform numbers, as good as normal
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(random.between(0, 1 << 20)) / (1 << 20);
    value = kernel_tests::rounded(Element::float32, sum - 6);
  }
  return tensor;
}

}  // namespace

void check_weight_gradient(Random& random) {
  const Conv2dProblem p = draw_problem(random);
  const auto placement =
      random.chance(80) ? Memory::Placement::aligned : Memory::Placement::unaligned;
  const int64_t alignment = placement == Memory::Placement::aligned ? 16 : element_size(p.dtype);
  Tensor input = kernel_tests::random_tensor(
      random, {p.batch, p.in_channels, p.in_height, p.in_width}, p.dtype);
  Tensor grad_output = kernel_tests::random_tensor(
      random, {p.batch, p.out_channels, p.out_height, p.out_width}, p.dtype);
  if (random.chance(40)) {
    kernel_tests::add_specials(random, input, random.between(0, 2));
    kernel_tests::add_specials(random, grad_output, random.between(0, 2));
  }
  const ConvolutionPass pass = cuda::forward_pass(p);
  const WeightGradientChoice choice = draw_choice(random, pass, p.dtype, alignment);
  kernel_tests::set_context(
      kernel_tests::describe(p) + " rows of " + std::to_string(choice.row_warps) + " columns of " +
      std::to_string(choice.column_warps) + " warps, tiles of " + std::to_string(choice.results) +
      " in " + std::to_string(choice.parts) + " parts");
  using Order = cuda_emulator::Schedule::Order;
  constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::shuffled};
  cuda_emulator::schedule() = {kOrders[random.between(0, 2)],
                               static_cast<uint32_t>(random.between(0, 1000))};
  const Run run(p, placement, input, grad_output, choice.parts);
  run.gemm(choice);
  cuda_emulator::schedule() = {};
  const Tensor weight({p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width});
  const Tensor expected = kernel_tests::conv2d_gradients(p, grad_output, input, weight).weight;
  kernel_tests::expect_holds(run.grad_weight, expected, "gradient of the weight");
}

// Tensor cores cut off what they add: a chain of thousands of products would be off by more than
// ten times what floats lose.
void check_weight_gradient_accuracy(Random& random) {
  Conv2dProblem p = {};
  p.batch = 1;
  p.in_channels = 3;
  p.out_channels = 4;
  p.groups = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.in_height = p.in_width = p.out_height = p.out_width = 50;
  p.kernel_height = p.kernel_width = 1;
  p.weight_stride_k = 3;
  p.weight_stride_c = p.weight_stride_r = p.weight_stride_s = 1;
  p.dtype = DType::float32;
  p.layout = Layout::nchw;
  const Tensor input = normal_tensor(random, {1, p.in_channels, p.in_height, p.in_width});
  const Tensor grad_output = normal_tensor(random, {1, p.out_channels, p.out_height, p.out_width});
  const Tensor weight({p.out_channels, p.in_channels, 1, 1});
  const Tensor expected = kernel_tests::conv2d_gradients(p, grad_output, input, weight).weight;
  WeightGradientChoice choice = {};
  choice.products = TensorProducts::exact_parts;
  choice.row_warps = 4;
  choice.column_warps = 4;
  choice.results = 64;
  choice.parts = 1;
  const Run run(p, Memory::Placement::aligned, input, grad_output, choice.parts);
  run.gemm(choice);
  const Tensor found = run.grad_weight.read();
  double squares = 0, plain_squares = 0;
  for (int64_t k = 0; k < p.out_channels; ++k) {
    for (int64_t c = 0; c < p.in_channels; ++c) {
      float chain = 0;
      for (int64_t i = 0; i < p.in_height * p.in_width; ++i) {
        chain += static_cast<float>(grad_output[k * p.in_height * p.in_width + i]) *
                 static_cast<float>(input[c * p.in_height * p.in_width + i]);
      }
      const int64_t at = k * p.in_channels + c;
      squares += std::pow(found[at] - expected[at], 2);
      plain_squares += std::pow(chain - expected[at], 2);
    }
  }
  kernel_tests::set_context("three products of TF32 parts");
  kernel_tests::expect(squares <= plain_squares,
                       "as near to float64 as a chain of floats: " +
                           std::to_string(std::sqrt(squares / plain_squares)) + " of its distance");
}

}  // namespace cuda_kernel_tests
