#include "conv2d_tests.h"

#include <algorithm>
#include <functional>

#include "kernels/cuda/conv2d_kernels.h"
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
using kernel_tests::expect_holds;
using kernel_tests::Memory;
using kernel_tests::Random;
using kernel_tests::Tensor;

// Few products, in vectors of channels often enough.
Conv2dProblem random_problem(Random& random) {
  constexpr int64_t kMostProducts = 30000;
  while (true) {
    Conv2dProblem p = kernel_tests::random_conv2d(random);
    p.relu = false;
    if (p.batch > 0 && p.multiply_adds() <= kMostProducts && cuda::conv2d_not_native(p).empty()) {
      return p;
    }
  }
}

// Of one channel a group, as networks have them and as they might: whole tiles of results and not,
// rows that are aligned and not, kernels that have tiles and that have none.
Conv2dProblem random_depthwise(Random& random) {
  Conv2dProblem p = {};
  // Fewer of float64, which has no tiles.
  p.dtype = kernel_tests::random_dtype(random);
  if (p.dtype == DType::float64) p.dtype = kernel_tests::random_dtype(random);
  p.layout = random.chance(60) ? Layout::nchw : Layout::nhwc;
  p.batch = random.between(1, 3);
  p.groups = p.in_channels = random.chance(80) ? 4 * random.between(1, 6) : random.between(1, 9);
  p.out_channels = p.groups * (random.chance(80) ? 1 : random.between(2, 3));
  const bool common = random.chance(90);
  const int64_t kernel = common ? 2 * random.between(1, 3) + 1 : random.between(1, 7);
  const int64_t stride = common ? random.between(1, 2) : random.between(1, 3);
  const int64_t dilation = common ? 1 : random.between(1, 2);
  const bool centred = random.chance(90);
  const auto draw_axis = [&](int64_t& in, int64_t& out, int64_t& size, int64_t& step, int64_t& pad,
                             int64_t& apart) {
    size = common ? kernel : std::max<int64_t>(1, kernel - random.between(0, 1));
    step = common ? stride : random.between(1, stride);
    apart = dilation;
    pad = centred ? (size - 1) / 2 : random.between(0, size);
    do {
      in = random.chance(70) ? 4 * random.between(1, 8) : random.between(1, 31);
      if (random.chance(30)) in = 7 * random.between(1, 4);
      out = (in + 2 * pad - apart * (size - 1) - 1) / step + 1;
    } while (in + 2 * pad < apart * (size - 1) + 1);
  };
  draw_axis(p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top, p.dilation_h);
  draw_axis(p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left, p.dilation_w);
  const Dims shape = {p.out_channels, 1, p.kernel_height, p.kernel_width};
  const Dims strides =
      kernel_tests::layout_strides(shape, random.chance(70) ? Layout::nchw : Layout::nhwc);
  p.weight_stride_k = strides[0];
  p.weight_stride_c = strides[1];
  p.weight_stride_r = strides[2];
  p.weight_stride_s = strides[3];
  return p;
}

Tensor with_specials(Random& random, Tensor tensor, int64_t count) {
  kernel_tests::add_specials(random, tensor, count);
  return tensor;
}

// The tensors of a convolution, what its passes give, and where they lie.
struct Case {
  Conv2dProblem problem;
  Element element;
  Memory::Placement placement;
  Tensor input, weight, bias, grad_output, output;
  kernel_tests::Conv2dGradients gradients;
  Dims weight_strides;

  Case(Random& random, const Conv2dProblem& p, int64_t specials = 0)
      : problem(p),
        element(kernel_tests::element_of(p.dtype)),
        placement(random.chance(80) ? Memory::Placement::aligned : Memory::Placement::unaligned),
        input(with_specials(random,
                            kernel_tests::random_tensor(
                                random, {p.batch, p.in_channels, p.in_height, p.in_width}, p.dtype),
                            specials)),
        weight(kernel_tests::random_tensor(
            random, {p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width},
            p.dtype)),
        bias(kernel_tests::random_tensor(random, {p.out_channels, 1, 1, 1}, p.dtype)),
        grad_output(kernel_tests::random_tensor(
            random, {p.batch, p.out_channels, p.out_height, p.out_width}, p.dtype)),
        output(kernel_tests::conv2d(p, input, weight, &bias)),
        gradients(kernel_tests::conv2d_gradients(p, grad_output, input, weight)),
        weight_strides{p.weight_stride_k, p.weight_stride_c, p.weight_stride_r, p.weight_stride_s} {
    problem.relu = random.chance(40);
    if (problem.relu) output = kernel_tests::relu(output);
  }

  int64_t element_bytes() const { return element_size(problem.dtype); }
  int64_t alignment() const {
    return placement == Memory::Placement::aligned ? 16 : element_bytes();
  }
  Memory in_layout(const Tensor& tensor) const {
    return {element, tensor, kernel_tests::layout_strides(tensor.shape, problem.layout), placement};
  }
  Memory unwritten(const Dims& shape) const {
    return {element, shape, kernel_tests::layout_strides(shape, problem.layout), placement};
  }
};

// Exactly as much as a kernel asks for, all ones.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(Element::uint8, Dims{bytes, 1, 1, 1}, kVector, Memory::Placement::aligned) {}
  void* data() const { return memory_.data(); }
  bool guards_intact() const { return memory_.guards_intact(); }

 private:
  const Memory memory_;
};

using Run = std::function<void(const ConvolutionPass&, const void* source, const void* bias,
                               void* result, bool relu)>;

// Both passes that are of one form.
void check_passes(const Case& c, const Memory& input, const Memory& grad_output, const Memory& bias,
                  const std::string& name, const Run& run) {
  const Memory output = c.unwritten(c.output.shape);
  run(cuda::forward_pass(c.problem), input.data(), bias.data(), output.data(), c.problem.relu);
  expect_holds(output, c.output, name + ": output");
  const Memory grad_input = c.unwritten(c.input.shape);
  run(cuda::input_gradient_pass(c.problem), grad_output.data(), nullptr, grad_input.data(), false);
  expect_holds(grad_input, c.gradients.input, name + ": gradient of the input");
}

void check_weight_gradient(const Case& c, int parts, const std::string& name,
                           const std::function<void(void* grad_weight, void* totals)>& run) {
  const Memory grad_weight(c.element, c.weight.shape, c.weight_strides, c.placement);
  const Scratch totals(
      cuda::weight_total_bytes(cuda::forward_pass(c.problem), parts, c.problem.dtype));
  run(grad_weight.data(), totals.data());
  expect_holds(grad_weight, c.gradients.weight, name + ": gradient of the weight");
  kernel_tests::expect(totals.guards_intact(), "totals stay in bounds");
}

void check_depthwise(const Case& c, const Memory& input, const Memory& grad_output,
                     const Memory& weight, const Memory& bias, int parts) {
  const DType dtype = c.problem.dtype;
  const ConvolutionPass forward = cuda::forward_pass(c.problem);
  const int64_t most = std::max(forward.source_channels, forward.result_channels);
  if (most * forward.kernel_taps() <= cuda::kMostDepthwiseWeights) {
    check_passes(c, input, grad_output, bias, "depthwise",
                 [&](const ConvolutionPass& pass, const void* source, const void* added,
                     void* result, bool relu) {
                   cuda::depthwise_pass(dtype, pass, source, weight.data(), added, result, relu,
                                        nullptr);
                 });
  }
  check_weight_gradient(c, parts, "depthwise", [&](void* grad_weight, void* totals) {
    cuda::depthwise_weight_gradient(dtype, forward, parts, grad_output.data(), input.data(),
                                    grad_weight, totals, nullptr);
  });
}

void check_all(Random& random, const Case& c) {
  const Conv2dProblem& p = c.problem;
  const Memory input = c.in_layout(c.input), grad_output = c.in_layout(c.grad_output);
  const Memory weight(c.element, c.weight, c.weight_strides, c.placement);
  const Memory bias(c.element, c.bias, kVector, c.placement);
  const ConvolutionPass forward = cuda::forward_pass(p);
  const int parts = static_cast<int>(random.between(1, 4));
  const int rows = random.chance(50) ? 64 : 128;
  const int columns = rows == 128 && random.chance(50) ? 128 : 64;
  const TensorProducts products =
      random.chance(50) ? TensorProducts::tf32 : TensorProducts::exact_parts;

  check_passes(c, input, grad_output, bias, "direct",
               [&](const ConvolutionPass& pass, const void* source, const void* added, void* result,
                   bool relu) {
                 cuda::direct_pass(p.dtype, pass, source, weight.data(), added, result, relu,
                                   c.alignment(), nullptr, nullptr, nullptr);
               });
  if (p.dtype != DType::float64) {
    check_passes(c, input, grad_output, bias, "implicit GEMM",
                 [&](const ConvolutionPass& pass, const void* source, const void* added,
                     void* result, bool relu) {
                   const GemmChoice own = cuda::make_gemm_choice(pass, p.dtype, rows, columns,
                                                                 products, c.alignment());
                   if (cuda::gemm_shared_bytes(pass, p.dtype, own, nullptr) > kSharedBytes) {
                     cuda::direct_pass(p.dtype, pass, source, weight.data(), added, result, relu, 1,
                                       nullptr, nullptr, nullptr);
                     return;
                   }
                   const Scratch packed(
                       own.packs_weights ? cuda::packed_weight_bytes(pass, c.element_bytes()) : 0);
                   cuda::implicit_gemm_pass(p.dtype, own, pass, source, weight.data(), added,
                                            result, relu, nullptr, nullptr, packed.data(), nullptr);
                   kernel_tests::expect(packed.guards_intact(), "packed weights stay in bounds");
                 });
  }
  check_depthwise(c, input, grad_output, weight, bias, parts);

  const auto check_weight = [&](const std::string& name, auto&& run) {
    check_weight_gradient(c, parts, name, run);
  };
  check_weight("plain", [&](void* grad_weight, void* totals) {
    cuda::weight_gradient_plain(p.dtype, forward, parts, grad_output.data(), input.data(),
                                grad_weight, totals, nullptr);
  });
  const int image_parts = static_cast<int>(random.between(1, p.batch));
  const Memory grad_bias(c.element, c.bias.shape, kVector, c.placement);
  const Scratch totals(cuda::bias_total_bytes(p, image_parts));
  cuda::bias_gradient(p, image_parts, grad_output.data(), grad_bias.data(), totals.data(), nullptr);
  expect_holds(grad_bias, c.gradients.bias, "gradient of the bias");
}

}  // namespace

void check_conv2d(Random& random) {
  const Case c(random, random_problem(random));
  use_random_schedule(random);
  kernel_tests::set_context(kernel_tests::describe(c.problem));
  check_all(random, c);
  cuda_emulator::schedule() = {};
}

void check_depthwise(Random& random) {
  const Case c(random, random_depthwise(random), random.chance(30) ? 2 : 0);
  use_random_schedule(random);
  kernel_tests::set_context("depthwise " + kernel_tests::describe(c.problem));
  const Memory bias(c.element, c.bias, kVector, c.placement);
  const Memory weight(c.element, c.weight, c.weight_strides, c.placement);
  check_depthwise(c, c.in_layout(c.input), c.in_layout(c.grad_output), weight, bias,
                  static_cast<int>(random.between(1, 4)));
  cuda_emulator::schedule() = {};
}

}  // namespace cuda_kernel_tests
