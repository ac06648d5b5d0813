// The fused block's kernels, and what rounding and infinities make of a convolution.
#include <algorithm>
#include <cmath>

#include "conv2d_tests.h"
#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/source_patch.h"
#include "problems.h"
#include "reference.h"
#include "schedules.h"

namespace cuda_kernel_tests {
namespace {

using namespace cnnkernels;
using cuda::ConvolutionPass;
using cuda::GemmChoice;
using cuda::TensorProducts;
using kernel_tests::Dims;
using kernel_tests::Element;
using kernel_tests::expect;
using kernel_tests::expect_holds;
using kernel_tests::Memory;
using kernel_tests::Random;
using kernel_tests::Tensor;

// A block whose windows the kernels pool.
Conv2dReluMaxPool2dProblem random_pooled_block(Random& random) {
  constexpr int64_t kMostProducts = 60000;
  while (true) {
    Conv2dReluMaxPool2dProblem p = kernel_tests::random_block(random);
    const bool three = random.chance(50);
    MaxPool2dProblem& pool = p.pool;
    // More rows than a tile has.
    const int64_t more = random.chance(40) ? random.between(1, 40) : 0;
    p.conv.in_height += more * p.conv.stride_h;
    p.conv.out_height += more;
    pool.in_height += more;
    pool.kernel_height = pool.kernel_width = three ? 3 : 2;
    pool.stride_h = pool.stride_w = 2;
    pool.dilation_h = pool.dilation_w = 1;
    pool.pad_top = pool.pad_left = random.between(0, 1);
    const bool ceil_mode = random.chance(30);
    bool fits = p.conv.batch > 0 && p.conv.multiply_adds() <= kMostProducts &&
                cuda::conv2d_not_native(p.conv).empty();
    const auto windows = [&](int64_t size) {
      const int64_t room = size + 2 * pool.pad_top - pool.kernel_height;
      int64_t count = room < 0 ? 0 : (room + (ceil_mode ? 1 : 0)) / 2 + 1;
      if (count > 0 && (count - 1) * 2 >= size + pool.pad_top) --count;
      return count;
    };
    pool.out_height = windows(pool.in_height);
    pool.out_width = windows(pool.in_width);
    fits = fits && pool.out_height > 0 && pool.out_width > 0;
    if (pool.out_height == 1) pool.stride_h = 1;  // as operators make it
    if (pool.out_width == 1) pool.stride_w = 1;
    if (fits && cuda::pools_in_block(pool)) return p;
  }
}

// The argmax of the block: its windows that the ReLU clips have no winner.
Tensor block_taps(const MaxPool2dProblem& p, const kernel_tests::Pooled& pooled) {
  Tensor taps = pooled.taps;
  for (size_t i = 0; i < taps.values.size(); ++i) {
    if (pooled.values.values[i] <= 0) taps.values[i] = static_cast<double>(p.no_winner());
  }
  return taps;
}

void round_to(Element element, Tensor& tensor) {
  for (double& value : tensor.values) value = kernel_tests::rounded(element, value);
}

// A sum of twelve: nearly normal, and with all bits that a float has.
double random_normal(Random& random) {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += static_cast<double>(random.between(0, 1 << 20)) / (1 << 20);
  return sum * 0.7390851332151607;
}

Tensor normal_tensor(Random& random, const Dims& shape) {
  Tensor tensor(shape);
  for (double& value : tensor.values) {
    value = kernel_tests::rounded(Element::float32, random_normal(random));
  }
  return tensor;
}

double distance(const Tensor& a, const Tensor& b) {
  double sum = 0;
  for (size_t i = 0; i < a.values.size(); ++i) sum += std::pow(a.values[i] - b.values[i], 2);
  return std::sqrt(sum);
}

Conv2dProblem plain_problem(DType dtype, Layout layout, int64_t channels, int64_t results,
                            int64_t size) {
  Conv2dProblem p = {};
  p.batch = p.groups = 1;
  p.in_channels = channels;
  p.out_channels = results;
  p.in_height = p.in_width = p.out_height = p.out_width = size;
  p.kernel_height = p.kernel_width = 3;
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_left = 1;
  p.weight_stride_k = channels * 9;
  p.weight_stride_c = 9;
  p.weight_stride_r = 3;
  p.weight_stride_s = 1;
  p.dtype = dtype;
  p.layout = layout;
  return p;
}

void run_gemm(const Conv2dProblem& p, TensorProducts products, const Memory& input,
              const Memory& weight, const Memory& output) {
  const ConvolutionPass pass = cuda::forward_pass(p);
  const GemmChoice choice = cuda::make_gemm_choice(pass, p.dtype, 64, 64, products, 16);
  const Memory packed(Element::uint8,
                      Dims{cuda::packed_weight_bytes(pass, element_size(p.dtype)), 1, 1, 1},
                      kVector, Memory::Placement::aligned);
  cuda::implicit_gemm_pass(p.dtype, choice, pass, input.data(), weight.data(), nullptr,
                           output.data(), false, nullptr, nullptr, packed.data(), nullptr);
}

}  // namespace

namespace {

void check_accuracy(Random& random, int64_t channels) {
  const Conv2dProblem p = plain_problem(DType::float32, Layout::nhwc, channels, 8, 4);
  const Tensor input = normal_tensor(random, {1, p.in_channels, 4, 4});
  const Tensor weight = normal_tensor(random, {p.out_channels, p.in_channels, 3, 3});
  const Tensor exact = kernel_tests::conv2d(p, input, weight, nullptr);
  // As a thread of a plain kernel sums.
  Tensor chain(exact.shape);
  for (int64_t i = 0; i < kernel_tests::element_count(chain.shape); ++i) {
    const int64_t k = i / 16, y = i / 4 % 4, x = i % 4;
    float sum = 0;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t row = y + tap / 3 - 1, column = x + tap % 3 - 1;
      if (row < 0 || row >= 4 || column < 0 || column >= 4) continue;
      for (int64_t c = 0; c < p.in_channels; ++c) {
        sum = std::fma(static_cast<float>(input[input.index(0, c, row, column)]),
                       static_cast<float>(weight[weight.index(k, c, tap / 3, tap % 3)]), sum);
      }
    }
    chain[i] = sum;
  }
  const Memory source(Element::float32, input, kernel_tests::layout_strides(input.shape, p.layout),
                      Memory::Placement::aligned);
  const Memory weights(Element::float32, weight,
                       kernel_tests::layout_strides(weight.shape, Layout::nchw),
                       Memory::Placement::aligned);
  const Memory output(Element::float32, exact.shape,
                      kernel_tests::layout_strides(exact.shape, p.layout),
                      Memory::Placement::aligned);
  kernel_tests::set_context("accuracy of " + kernel_tests::describe(p));
  run_gemm(p, TensorProducts::exact_parts, source, weights, output);
  const double ours = distance(output.read(), exact), plain = distance(chain, exact);
  expect(ours <= 2 * plain, "products of parts are as near as a chain of floats: " +
                                std::to_string(ours / plain) + " times its distance");
}

}  // namespace

void check_conv2d_accuracy(Random& random) {
  // No plan has them take sums of less than sixteen products.
  for (const int64_t channels : {4, 8, 30, 256}) check_accuracy(random, channels);
}

void check_conv2d_specials(Random& random) {
  const DType dtype = kernel_tests::random_dtype(random);
  const Layout layout = random.chance(50) ? Layout::nhwc : Layout::nchw;
  const Conv2dProblem p = plain_problem(dtype, layout, random.between(1, 20), 5, 6);
  const Element element = kernel_tests::element_of(dtype);
  Tensor input = kernel_tests::random_tensor(random, {1, p.in_channels, 6, 6}, dtype);
  kernel_tests::add_specials(random, input, 2);
  Tensor weight = kernel_tests::random_tensor(random, {5, p.in_channels, 3, 3}, dtype);
  // An infinite weight meets the zeros of the padding too, where naive loops have nothing: there
  // the direct kernel is the measure.
  const bool of_weight = random.chance(30);
  if (of_weight) kernel_tests::add_specials(random, weight, 1);
  Tensor expected = kernel_tests::conv2d(p, input, weight, nullptr);
  kernel_tests::set_context("infinities in " + kernel_tests::describe(p));
  const Memory source(element, input, kernel_tests::layout_strides(input.shape, layout),
                      Memory::Placement::aligned);
  const Memory weights(element, weight, kernel_tests::layout_strides(weight.shape, Layout::nchw),
                       Memory::Placement::aligned);
  const Dims strides = kernel_tests::layout_strides(expected.shape, layout);
  const Memory direct(element, expected.shape, strides);
  cuda::direct_pass(dtype, cuda::forward_pass(p), source.data(), weights.data(), nullptr,
                    direct.data(), false, 1, nullptr, nullptr, nullptr);
  if (of_weight) {
    const Tensor found = direct.read();
    int64_t nan = 0;
    for (const double value : found.values) nan += std::isnan(value) ? 1 : 0;
    expect(nan > 0, "zeros of the padding times infinity are no numbers");
    expected = found;
  } else {
    expect_holds(direct, expected, "direct");
  }
  if (dtype == DType::float64) return;
  for (const TensorProducts products : {TensorProducts::tf32, TensorProducts::exact_parts}) {
    const Memory output(element, expected.shape, strides, Memory::Placement::aligned);
    run_gemm(p, products, source, weights, output);
    expect_holds(output, expected, "implicit GEMM");
  }
}

void check_block(Random& random) {
  const Conv2dReluMaxPool2dProblem p = random_pooled_block(random);
  const Conv2dProblem& c = p.conv;
  const Element element = kernel_tests::element_of(c.dtype);
  const Memory::Placement placement =
      random.chance(80) ? Memory::Placement::aligned : Memory::Placement::unaligned;
  use_random_schedule(random);
  kernel_tests::set_context(kernel_tests::describe(c) + " then " + kernel_tests::describe(p.pool));
  const Tensor input = kernel_tests::random_tensor(
      random, {c.batch, c.in_channels, c.in_height, c.in_width}, c.dtype);
  const Tensor weight = kernel_tests::random_tensor(
      random, {c.out_channels, c.in_channels / c.groups, c.kernel_height, c.kernel_width}, c.dtype);
  const Tensor bias = kernel_tests::random_tensor(random, {c.out_channels, 1, 1, 1}, c.dtype);
  Tensor convolved = kernel_tests::relu(kernel_tests::conv2d(c, input, weight, &bias));
  round_to(element, convolved);
  const kernel_tests::Pooled pooled = kernel_tests::max_pool2d(p.pool, convolved);
  const Tensor taps = block_taps(p.pool, pooled);

  const auto in_layout = [&](const Dims& shape) {
    return kernel_tests::layout_strides(shape, c.layout);
  };
  const Memory source(element, input, in_layout(input.shape), placement);
  const Memory weights(element, weight,
                       {c.weight_stride_k, c.weight_stride_c, c.weight_stride_r, c.weight_stride_s},
                       placement);
  const Memory added(element, bias, kVector, placement);
  const ConvolutionPass pass = cuda::forward_pass(c);
  const int64_t alignment = placement == Memory::Placement::aligned ? 16 : element_size(c.dtype);
  const bool with_argmax = random.chance(80);
  const auto check = [&](const std::string& name, auto&& run) {
    const Memory values(element, pooled.values.shape, in_layout(pooled.values.shape), placement);
    const Memory winners(Element::uint8, taps.shape, in_layout(taps.shape), placement);
    run(values.data(), with_argmax ? winners.data() : nullptr);
    expect_holds(values, pooled.values, name + ": pooled values");
    if (with_argmax) expect_holds(winners, taps, name + ": winners");
  };
  check("direct", [&](void* values, void* argmax) {
    cuda::direct_pass(c.dtype, pass, source.data(), weights.data(), added.data(), values, true,
                      alignment, &p.pool, argmax, nullptr);
  });
  if (c.dtype == DType::float64) return;
  const GemmChoice choice = cuda::make_gemm_choice(
      pass, c.dtype, random.chance(50) ? 64 : 128, random.chance(50) ? 64 : 128,
      random.chance(50) ? TensorProducts::tf32 : TensorProducts::exact_parts, alignment);
  if (cuda::gemm_shared_bytes(pass, c.dtype, choice, &p.pool) > kSharedBytes) return;
  check("implicit GEMM", [&](void* values, void* argmax) {
    const Memory packed(Element::uint8,
                        Dims{cuda::packed_weight_bytes(pass, element_size(c.dtype)), 1, 1, 1},
                        kVector, Memory::Placement::aligned);
    cuda::implicit_gemm_pass(c.dtype, choice, pass, source.data(), weights.data(), added.data(),
                             values, true, &p.pool, argmax, packed.data(), nullptr);
  });
}

}  // namespace cuda_kernel_tests
