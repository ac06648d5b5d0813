// Checks every CUDA kernel on the emulator against naive loops in double, and the plans.
//
//   usage: PROGRAM SEED [--first] CHECK=TIMES...
//
// Each check has random numbers of its own. With --first the first failure ends it.
//
// Numbers are so small that all results are exact: they must be equal.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cases.h"
#include "conv2d_tests.h"
#include "kernels/cuda/gradient_step.h"
#include "kernels/cuda/max_pool2d.h"
#include "plan_tests.h"
#include "problems.h"
#include "schedules.h"
#include "support.h"
#include "weight_gradient_tests.h"

namespace cuda_kernel_tests {
namespace {

using namespace cnnkernels;
using cuda::DeviceLimits;
using cuda::LaunchGrid;
using kernel_tests::Dims;
using kernel_tests::Element;
using kernel_tests::expect_holds;
using kernel_tests::GradientStepCase;
using kernel_tests::MaxPool2dCase;
using kernel_tests::Memory;
using kernel_tests::Random;
using kernel_tests::Tensor;

Memory::Placement random_placement(Random& random, int aligned) {
  return random.chance(aligned) ? Memory::Placement::aligned : Memory::Placement::unaligned;
}

// Poolings as networks have them: windows of strips, and channels in whole vectors.
MaxPool2dProblem random_pooling(Random& random) {
  MaxPool2dProblem p = kernel_tests::random_max_pool2d(random);
  if (random.chance(40)) {
    p.layout = Layout::nchw;
    p.channels = random.between(1, 5);
    p.kernel_height = p.kernel_width = random.between(2, 3);
    p.stride_h = p.stride_w = 2;
    p.dilation_h = p.dilation_w = 1;
    p.pad_top = p.pad_left = random.between(0, p.kernel_width - 2);
    p.out_width = random.between(1, 12);
    p.in_width = 2 * p.out_width;
    p.in_height = random.between(p.kernel_height, 20);
    p.out_height = (p.in_height + 2 * p.pad_top - p.kernel_height) / 2 + 1;
    return p;
  }
  if (random.chance(30)) {  // at stride 1
    const int64_t kernel = random.between(2, 5);
    p.kernel_height = p.kernel_width = kernel;
    p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
    p.pad_top = p.pad_left = random.between(0, kernel / 2);
    p.in_height = random.between(kernel, 20);
    p.in_width = random.between(kernel, 30);
    p.out_height = p.in_height + 2 * p.pad_top - kernel + 1;
    p.out_width = p.in_width + 2 * p.pad_left - kernel + 1;
  }
  if (random.chance(50)) p.channels = 8 * random.between(1, 5);
  return p;
}

// Devices so small that threads go over several images.
DeviceLimits random_limits(Random& random) {
  DeviceLimits limits = cuda::architecture_limits(90);
  limits.multiprocessors = static_cast<int>(random.chance(50) ? 1 : random.between(2, 200));
  return limits;
}

// As a grid may be for a problem too large for it.
LaunchGrid with_fewer_images(Random& random, LaunchGrid grid) {
  grid.y = static_cast<unsigned>(random.between(1, grid.y));
  return grid;
}

void check_max_pool2d(Random& random) {
  const MaxPool2dCase c(random, random_pooling(random));
  const MaxPool2dProblem& p = c.problem;
  const Dims in_strides = c.in_strides(), out_strides = c.out_strides();
  const Dims& shape = c.values.shape;
  if (p.batch == 0) return;  // callers launch nothing
  const Memory::Placement placement = random_placement(random, 85);
  cuda::MaxPool2dPlan plan =
      cuda::plan_max_pool2d(p, placement == Memory::Placement::aligned ? 16 : element_size(p.dtype),
                            random_limits(random));
  if (random.chance(50)) {
    plan.forward = with_fewer_images(random, plan.forward);
    plan.backward = with_fewer_images(random, plan.backward);
    plan.each_window = with_fewer_images(random, plan.each_window);
  }

  const Memory input(c.element, c.input, in_strides, placement);
  const Memory grad_output(c.element, c.grad_output, out_strides, placement);
  const Memory argmax(c.tap_element, c.taps, out_strides, placement);
  const Memory winners_only(c.tap_element, c.winning_taps, out_strides, placement);
  const bool with_taps = random.chance(80);
  // No kernel here has a barrier: one order shows as much as all.
  kernel_tests::set_context(kernel_tests::describe(p) + ", " + plan.algorithm + " of " +
                            std::to_string(plan.width));
  const Memory values(c.element, shape, out_strides, placement);
  const Memory taps(c.tap_element, shape, out_strides, placement);
  cuda::max_pool2d_forward(p, plan, input.data(), values.data(), with_taps ? taps.data() : nullptr,
                           nullptr);
  expect_holds(values, c.values, "output");
  if (with_taps) expect_holds(taps, c.taps, "argmax");
  const Memory grad_input(c.element, c.input.shape, in_strides, placement);
  cuda::max_pool2d_backward(p, plan, grad_output.data(), winners_only.data(), grad_input.data(),
                            nullptr);
  expect_holds(grad_input, c.grad_input, "gradient of the input");
  const Memory gathered(c.element, shape, out_strides, placement);
  cuda::max_pool2d_gather(p, plan, input.data(), winners_only.data(), gathered.data(), nullptr);
  expect_holds(gathered, c.gathered, "gathered values");
  const Memory indices(Element::int64, shape, out_strides, placement);
  cuda::max_pool2d_indices(p, plan, argmax.data(), indices.data<int64_t>(), nullptr);
  expect_holds(indices, c.indices, "indices");
}

// An argmax that is none of its window's, or an element outside of the image, reaches no memory.
void check_foreign_argmax(Random& random) {
  const MaxPool2dCase c(random, random_pooling(random));
  const MaxPool2dProblem& p = c.problem;
  if (p.outputs() == 0) return;
  kernel_tests::set_context("foreign argmax: " + kernel_tests::describe(p));
  Tensor foreign(c.taps.shape), gathered(c.taps.shape), positions(c.taps.shape);
  Tensor expected_gradient(c.input.shape);
  for (int64_t i = 0; i < kernel_tests::element_count(foreign.shape); ++i) {
    const int64_t most = p.compact_argmax() ? 255 : 1 << 30;
    int64_t tap = random.chance(70) ? random.between(0, p.window() - 1) : most;
    if (!p.compact_argmax() && random.chance(10)) tap = -1;
    const int64_t x = i % p.out_width, y = i / p.out_width % p.out_height;
    const int64_t plane = i / (p.out_height * p.out_width) * p.in_height * p.in_width;
    const int64_t position = kernel_tests::tap_position(p, y, x, tap);
    foreign[i] = static_cast<double>(tap);
    positions[i] = position == kernel_tests::kOutside ? -1 : static_cast<double>(position);
    if (position != kernel_tests::kOutside) {
      expected_gradient[plane + position] += c.grad_output[i];
      gathered[i] = c.input[plane + position];
    } else {
      gathered[i] = tap == p.no_winner() ? 0 : std::nan("");
    }
  }
  const cuda::MaxPool2dPlan plan = cuda::plan_max_pool2d(p, 1, random_limits(random));
  const Memory input(c.element, c.input, c.in_strides());
  const Memory argmax(c.tap_element, foreign, c.out_strides());
  const Memory grad_output(c.element, c.grad_output, c.out_strides());
  const Memory grad_input(c.element, c.input.shape, c.in_strides());
  cuda::max_pool2d_backward(p, plan, grad_output.data(), argmax.data(), grad_input.data(), nullptr);
  expect_holds(grad_input, expected_gradient, "gradient of the input");
  const Memory values(c.element, c.taps.shape, c.out_strides());
  cuda::max_pool2d_gather(p, plan, input.data(), argmax.data(), values.data(), nullptr);
  expect_holds(values, gathered, "gathered values");
  const Memory indices(Element::int64, c.taps.shape, c.out_strides());
  cuda::max_pool2d_indices(p, plan, argmax.data(), indices.data<int64_t>(), nullptr);
  expect_holds(indices, positions, "indices");
}

// One number in the type in which `dtype` is summed.
struct DeviceNumber {
  std::unique_ptr<double> as_double;
  std::unique_ptr<float> as_float;

  DeviceNumber(DType dtype, double value) {
    if (dtype == DType::float64) {
      as_double = std::make_unique<double>(value);
    } else {
      as_float = std::make_unique<float>(static_cast<float>(value));
    }
  }
  const void* data() const {
    return as_double != nullptr ? static_cast<const void*>(as_double.get()) : as_float.get();
  }
};

std::vector<int64_t> random_counts(Random& random) {
  const bool many = random.chance(5);  // more than fit in a launch
  std::vector<int64_t> counts(
      static_cast<size_t>(many ? random.between(60, 700) : random.between(0, 6)));
  const bool large = !many && random.chance(20);  // several chunks
  for (int64_t& count : counts) {
    count = random.chance(5) ? 0 : random.between(1, many ? 3 : large ? 9000 : 300);
  }
  if (many) counts[static_cast<size_t>(random.between(8, 59))] = 20000;
  return counts;
}

void check_gradient_step(Random& random) {
  GradientStepCase c(random, random_counts(random));
  const Element element = kernel_tests::element_of(c.dtype);
  const bool skips = random.chance(15);
  cuda::StepScalars scalars;
  const DeviceNumber lr(c.dtype, c.options.lr);
  const float grad_scale = static_cast<float>(c.options.grad_scale);
  const float found_inf = skips ? (random.chance(50) ? 1.0f : 3.0f) : 0;
  if (random.chance(30)) {
    scalars.lr = lr.data();
    c.options.lr = std::nan("");
  }
  if (c.options.unscale && random.chance(70)) {
    scalars.grad_scale = &grad_scale;
    c.options.grad_scale = std::nan("");
  }
  if (skips || random.chance(20)) scalars.found_inf = &found_inf;
  const DeviceLimits limits = random_limits(random);
  kernel_tests::set_context(c.describe() + (skips ? " skipped" : ""));

  const Dims strides = {1, 1, 1, 1};
  const bool with_buffers = c.options.momentum != 0;
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<StepTensor> list;
  std::vector<int64_t> counts;
  for (const kernel_tests::StepTensors& tensors : c.before) {
    const Memory::Placement placement = random_placement(random, 80);
    for (const Tensor* const tensor : {&tensors.param, &tensors.grad, &tensors.buffer}) {
      memory.push_back(std::make_unique<Memory>(
          element, *tensor, strides, random.chance(90) ? placement : random_placement(random, 50)));
    }
    const std::unique_ptr<Memory>* const last = &memory.back();
    counts.push_back(kernel_tests::element_count(tensors.param.shape));
    list.push_back({last[-2]->data(), last[-1]->data(), with_buffers ? last[0]->data() : nullptr,
                    counts.back()});
  }
  cuda::gradient_step(c.dtype, cuda::plan_gradient_step(counts, c.dtype, limits), list, c.options,
                      scalars, nullptr);
  for (size_t i = 0; i < c.after.size(); ++i) {
    const kernel_tests::StepTensors& expected = skips ? c.before[i] : c.after[i];
    expect_holds(*memory[3 * i], expected.param, "parameter");
    expect_holds(*memory[3 * i + 1], expected.grad, "gradient");
    expect_holds(*memory[3 * i + 2], expected.buffer, "momentum buffer");
  }
}

}  // namespace
}  // namespace cuda_kernel_tests

namespace {

using Check = void (*)(kernel_tests::Random&);

void check_fixed(kernel_tests::Random&) {
  cuda_kernel_tests::check_architectures();
  cuda_kernel_tests::check_conv2d_policies();
  cuda_kernel_tests::check_wgmma_cut();
}

Check find_check(const std::string& name) {
  using namespace cuda_kernel_tests;
  const std::pair<const char*, Check> checks[] = {
      {"fixed", check_fixed},
      {"step_plan", check_step_plan},
      {"pool_plan", check_pool_plan},
      {"conv2d_plan", check_conv2d_plan},
      {"block_plan", check_block_plan},
      {"max_pool2d", check_max_pool2d},
      {"foreign_argmax", check_foreign_argmax},
      {"gradient_step", check_gradient_step},
      {"conv2d", check_conv2d},
      {"planned_conv2d", check_planned_conv2d},
      {"specials", check_conv2d_specials},
      {"accuracy", check_conv2d_accuracy},
      {"block", check_block},
      {"weight_gradient", check_weight_gradient},
      {"weight_accuracy", check_weight_gradient_accuracy},
      {"depthwise", check_depthwise},
      {"wgmma", check_wgmma},
  };
  for (const auto& [known, check] : checks) {
    if (name == known) return check;
  }
  return nullptr;
}

void run_check(Check check, long times, uint64_t seed, bool only_first) {
  kernel_tests::Random random(seed);
  try {
    for (long i = 0; i < times && !(only_first && kernel_tests::failures() > 0); ++i) check(random);
  } catch (const cuda_emulator::Error& error) {
    kernel_tests::expect(false, error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  bool only_first = false;
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    if (argument == "--first") {
      only_first = true;
    } else if (const Check check = find_check(argument.substr(0, equals));
               check != nullptr && equals != std::string::npos) {
      run_check(check, std::atol(argument.c_str() + equals + 1), seed, only_first);
    } else {
      std::fprintf(stderr, "%s is no check; usage: %s SEED [--first] CHECK=TIMES...\n", argv[i],
                   argv[0]);
      return 2;
    }
  }
  return kernel_tests::report();
}
