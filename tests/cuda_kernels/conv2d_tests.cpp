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

const Dims kVector = {1, 1, 1, 1};

// Few products, in vectors of channels often enough.
Conv2dProblem random_problem(Random& random) {
  constexpr int64_t kMostProducts = 100000;
  while (true) {
    Conv2dProblem p = kernel_tests::random_conv2d(random);
    p.relu = false;
    if (p.batch > 0 && p.multiply_adds() <= kMostProducts && cuda::conv2d_not_native(p).empty()) {
      return p;
    }
  }
}

// The tensors of a convolution, what its passes give, and where they lie.
struct Case {
  Conv2dProblem problem;
  Element element;
  Memory::Placement placement;
  Tensor input, weight, bias, grad_output, output;
  kernel_tests::Conv2dGradients gradients;
  Dims weight_strides;

  Case(Random& random, const Conv2dProblem& p)
      : problem(p),
        element(kernel_tests::element_of(p.dtype)),
        placement(random.chance(80) ? Memory::Placement::aligned : Memory::Placement::unaligned),
        input(kernel_tests::random_tensor(random, {p.batch, p.in_channels, p.in_height, p.in_width},
                                          p.dtype)),
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

void check_all(Random& random, const Case& c) {
  const Conv2dProblem& p = c.problem;
  const Memory input = c.in_layout(c.input), grad_output = c.in_layout(c.grad_output);
  const Memory weight(c.element, c.weight, c.weight_strides, c.placement);
  const Memory bias(c.element, c.bias, kVector, c.placement);
  const ConvolutionPass forward = cuda::forward_pass(p);
  const int parts = static_cast<int>(random.between(1, 4));
  const GemmChoice choice = {
      random.chance(50) ? 64 : 128, false,
      random.chance(50) ? TensorProducts::tf32 : TensorProducts::exact_parts};

  check_passes(c, input, grad_output, bias, "direct",
               [&](const ConvolutionPass& pass, const void* source, const void* added, void* result,
                   bool relu) {
                 cuda::direct_pass(p.dtype, pass, source, weight.data(), added, result, relu,
                                   nullptr);
               });
  if (p.dtype != DType::float64) {
    check_passes(c, input, grad_output, bias, "implicit GEMM",
                 [&](const ConvolutionPass& pass, const void* source, const void* added,
                     void* result, bool relu) {
                   GemmChoice own = choice;
                   own.contiguous =
                       cuda::chunks_are_contiguous(pass, c.element_bytes(), c.alignment());
                   const Scratch packed(cuda::packed_weight_bytes(pass, c.element_bytes()));
                   cuda::implicit_gemm_pass(p.dtype, own, pass, source, weight.data(), added,
                                            result, relu, packed.data(), nullptr);
                   kernel_tests::expect(packed.guards_intact(), "packed weights stay in bounds");
                 });
  }
  const int64_t most = std::max(forward.source_channels, forward.result_channels);
  if (most * forward.kernel_taps() <= cuda::kMostDepthwiseWeights) {
    check_passes(c, input, grad_output, bias, "depthwise",
                 [&](const ConvolutionPass& pass, const void* source, const void* added,
                     void* result, bool relu) {
                   const bool channels =
                       cuda::depthwise_channels_apply(pass, c.element_bytes(), c.alignment());
                   cuda::depthwise_pass(p.dtype, pass, channels, source, weight.data(), added,
                                        result, relu, nullptr);
                 });
  }

  const auto check_weight = [&](const std::string& name, auto&& run) {
    const Memory grad_weight(c.element, c.weight.shape, c.weight_strides, c.placement);
    const Scratch totals(cuda::weight_total_bytes(forward, parts, p.dtype));
    run(grad_weight.data(), totals.data());
    expect_holds(grad_weight, c.gradients.weight, name + ": gradient of the weight");
    kernel_tests::expect(totals.guards_intact(), "totals stay in bounds");
  };
  check_weight("plain", [&](void* grad_weight, void* totals) {
    cuda::weight_gradient_plain(p.dtype, forward, parts, grad_output.data(), input.data(),
                                grad_weight, totals, nullptr);
  });
  check_weight("depthwise", [&](void* grad_weight, void* totals) {
    cuda::depthwise_weight_gradient(p.dtype, forward, parts, grad_output.data(), input.data(),
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
  using Order = cuda_emulator::Schedule::Order;
  constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::shuffled};
  cuda_emulator::schedule() = {kOrders[random.between(0, 2)],
                               static_cast<uint32_t>(random.between(0, 1000))};
  kernel_tests::set_context(kernel_tests::describe(c.problem));
  check_all(random, c);
  cuda_emulator::schedule() = {};
}

}  // namespace cuda_kernel_tests
