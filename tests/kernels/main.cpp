// Checks every kernel on every instruction-set tier of this machine against
// naive loops, without Python or torch.
//
//   usage: PROGRAM CASES SEED
//
// Tensors hold few-bit numbers, of which all sums are exact, so that results are
// compared for equality and one missing product is seen; in float64 they need
// more bits than a float has. Some tensors hold infinities and NaN, which must
// not leak into their neighbours.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "cases.h"
#include "conversions.h"
#include "kernels/conv2d_relu_max_pool2d.h"
#include "kernels/cpu/conv2d_patches.h"
#include "kernels/gradient_step.h"
#include "kernels/workspace.h"
#include "problems.h"
#include "reference.h"
#include "support.h"
#include "workspaces.h"

namespace kernel_tests {
namespace {

using namespace cnnkernels;

// Calls body(isa, pool) for every tier, on one thread and on several.
template <class Body>
void for_each_run(const std::string& context, Body&& body) {
  for (const Isa isa : supported_isas()) {
    for (const int threads : {1, isa == Isa::baseline ? 2 : 3}) {
      set_context(std::string(isa_name(isa)) + ", " + std::to_string(threads) +
                  " threads: " + context);
      body(isa, thread_pool(threads));
    }
  }
}

// The tensors of a convolution, in memory and as doubles.
struct Conv2dTensors {
  Tensor input, weight, bias;
  Dims input_strides, weight_strides, output_shape, output_strides;

  Conv2dTensors(Random& random, const Conv2dProblem& p)
      : input(random_tensor(random, {p.batch, p.in_channels, p.in_height, p.in_width}, p.dtype)),
        weight(random_tensor(
            random, {p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width},
            p.dtype)),
        bias(random_tensor(random, {p.out_channels, 1, 1, 1}, p.dtype)),
        input_strides(layout_strides(input.shape, p.layout)),
        weight_strides{p.weight_stride_k, p.weight_stride_c, p.weight_stride_r, p.weight_stride_s},
        output_shape{p.batch, p.out_channels, p.out_height, p.out_width},
        output_strides(layout_strides(output_shape, p.layout)) {}
};

const Dims kBiasStrides = {1, 1, 1, 1};

// Poisoned memory for gradients, of which some are not wanted.
struct GradientMemory {
  Memory input, weight, bias;
  bool wants_input, wants_weight, wants_bias;

  GradientMemory(Random& random, Element element, const Conv2dTensors& tensors)
      : input(element, tensors.input.shape, tensors.input_strides),
        weight(element, tensors.weight.shape, tensors.weight_strides),
        bias(element, tensors.bias.shape, kBiasStrides),
        wants_input(random.chance(80)),
        wants_weight(random.chance(80)),
        wants_bias(random.chance(80)) {}

  void* input_data() const { return wants_input ? input.data() : nullptr; }
  void* weight_data() const { return wants_weight ? weight.data() : nullptr; }
  void* bias_data() const { return wants_bias ? bias.data() : nullptr; }

  void expect_all(const Conv2dGradients& expected) const {
    if (wants_input) expect_holds(input, expected.input, "gradient of the input");
    if (wants_weight) expect_holds(weight, expected.weight, "gradient of the weight");
    if (wants_bias) expect_holds(bias, expected.bias, "gradient of the bias");
  }
};

constexpr ConvAlgorithm kAlgorithms[] = {ConvAlgorithm::direct,    ConvAlgorithm::outer_product,
                                         ConvAlgorithm::depthwise, ConvAlgorithm::winograd,
                                         ConvAlgorithm::amx,       ConvAlgorithm::patches,
                                         ConvAlgorithm::runs};
constexpr ConvAlgorithm kBlockAlgorithms[] = {ConvAlgorithm::direct, ConvAlgorithm::outer_product};

bool reads_border(const Conv2dProblem& p) {
  return p.pad_top > 0 || p.pad_left > 0 ||
         (p.out_height - 1) * p.stride_h + (p.kernel_height - 1) * p.dilation_h >= p.in_height ||
         (p.out_width - 1) * p.stride_w + (p.kernel_width - 1) * p.dilation_w >= p.in_width;
}

// Cuts the work of outer products and of matrix tiles in any way: problems large enough for
// the planner to do so would take long.
Conv2dPlan cut_at_random(Random& random, const Conv2dProblem& p, Conv2dPlan plan) {
  if (plan.algorithm == ConvAlgorithm::outer_product && random.chance(60)) {
    plan.weights_first = random.chance(50);
    plan.rows_per_task = plan.weights_first ? p.in_height + p.out_height : random.between(1, 4);
    plan.channels_per_task = plan.vector_lanes * random.between(1, 5);
    return plan;
  }
  if (plan.algorithm != ConvAlgorithm::amx || random.chance(30)) return plan;
  if (plan.amx_order == AmxOrder::in_place && random.chance(30)) {
    plan.amx_order = AmxOrder::pointwise;
    return plan;
  }
  plan.images_per_chunk = random.between(1, std::max<int64_t>(1, p.batch));
  plan.rows_per_task = random.between(1, std::max<int64_t>(1, plan.rows_per_task));
  plan.channels_per_task = 32 * random.between(1, 2);
  if (random.chance(50)) {
    // Few channels, of which most problems here are, without runs of rows.
    plan.amx_order = AmxOrder::chunks;
  }
  if (plan.amx_order == AmxOrder::row_runs) return plan;
  const bool one_tap =
      plan.amx_order == AmxOrder::pointwise || plan.amx_order == AmxOrder::in_place;
  if (one_tap && random.chance(50)) return plan;
  plan.amx_order = AmxOrder::chunks;
  if (p.groups == 1 && random.chance(40)) {
    plan.amx_order = AmxOrder::few_pixels;
    plan.channels_per_slice = 32 * random.between(1, 2);
  }
  return plan;
}

// Calls run(problem, output) for the convolution alone and with a ReLU.
template <class Run>
void check_forward(Conv2dProblem p, const Tensor& output, const Tensor& clipped, Run&& run) {
  for (const bool with_relu : {false, true}) {
    p.relu = with_relu;
    const Memory out(element_of(p.dtype), output.shape, layout_strides(output.shape, p.layout));
    run(p, out.data());
    expect_holds(out, with_relu ? clipped : output, with_relu ? "output of the ReLU" : "output");
  }
}

// Every algorithm, whatever a planner would choose, and then the choice.
void check_conv2d(Random& random) {
  const Conv2dProblem p = random_conv2d(random);
  const Element element = element_of(p.dtype);
  Conv2dTensors tensors(random, p);
  Tensor grad_output = random_tensor(random, tensors.output_shape, p.dtype);
  // One of them with more bits than a bfloat16 has: it is the sum of two.
  if (p.dtype == DType::float32 && random.chance(60)) {
    Tensor& wide = random.chance(50) ? tensors.input : grad_output;
    wide = random_tensor(random, wide.shape, p.dtype, 1000);
  }
  if (random.chance(20)) add_specials(random, tensors.input, 2);
  // Depthwise kernels leave the border out, where others multiply by its zeros: an
  // infinite gradient makes NaN of a zero.
  if (random.chance(10) &&
      (!(depthwise_applies(p, Isa::baseline) || depthwise_applies(p, Isa::avx512)) ||
       !reads_border(p))) {
    add_specials(random, grad_output, 1);
  }
  const bool with_bias = random.chance(60);
  const Tensor output =
      conv2d(p, tensors.input, tensors.weight, with_bias ? &tensors.bias : nullptr);
  const Tensor clipped = relu(output);
  const Conv2dGradients gradients = conv2d_gradients(p, grad_output, tensors.input, tensors.weight);

  const Memory input(element, tensors.input, tensors.input_strides);
  const Memory weight(element, tensors.weight, tensors.weight_strides);
  const Memory bias(element, tensors.bias, kBiasStrides);
  const Memory grad_out(element, grad_output, tensors.output_strides);
  const void* const bias_data = with_bias ? bias.data() : nullptr;
  for (const ConvAlgorithm algorithm : kAlgorithms) {
    for_each_run(
        describe(p) + ", " + algorithm_name(algorithm), [&](Isa isa, const ThreadPool& pool) {
          if (algorithm == ConvAlgorithm::depthwise && !depthwise_applies(p, isa)) return;
          if (algorithm == ConvAlgorithm::amx && !amx_applies(p, isa)) return;
          if (algorithm == ConvAlgorithm::winograd && !winograd_applies(p)) return;
          if (algorithm == ConvAlgorithm::patches && (p.groups > 1 || !patch_order(p).dense)) {
            return;
          }
          const bool runs = algorithm == ConvAlgorithm::runs;  // the weight gradient alone
          if (runs && !runs_apply(p, isa)) return;
          if (!runs) {
            check_forward(p, output, clipped, [&](const Conv2dProblem& problem, void* out) {
              const Conv2dPlan plan = plan_forward(problem, algorithm, isa, pool.threads);
              conv2d_forward(problem, cut_at_random(random, problem, plan), pool, input.data(),
                             weight.data(), bias_data, out);
            });
          }
          GradientMemory to(random, element, tensors);
          to.wants_bias = false;
          to.wants_input = to.wants_input && !runs;
          if (to.wants_input) {
            conv2d_input_gradient(
                p, cut_at_random(random, p, plan_input_gradient(p, algorithm, isa, pool.threads)),
                pool, grad_out.data(), weight.data(), to.input_data());
          }
          if (algorithm == ConvAlgorithm::winograd) to.wants_weight = false;
          if (to.wants_weight) {
            conv2d_weight_gradient(
                p, cut_at_random(random, p, plan_weight_gradient(p, algorithm, isa, pool.threads)),
                pool, grad_out.data(), input.data(), to.weight_data());
          }
          to.expect_all(gradients);
        });
  }
  for_each_run(describe(p), [&](Isa isa, const ThreadPool& pool) {
    check_forward(p, output, clipped, [&](const Conv2dProblem& problem, void* out) {
      conv2d_forward(problem, isa, pool, input.data(), weight.data(), bias_data, out);
    });
    const GradientMemory to(random, element, tensors);
    conv2d_backward(p, isa, pool, grad_out.data(), input.data(), weight.data(), to.input_data(),
                    to.weight_data(), to.bias_data());
    to.expect_all(gradients);
  });
}

// An argmax that no window has must be refused.
void check_refused(const MaxPool2dProblem& p, const Tensor& taps, Element element,
                   Element tap_element, const Dims& in_shape) {
  if (p.no_winner() == 255) return;  // all bytes mean something
  Tensor wrong = taps;
  wrong.values.back() = p.compact_argmax() ? 255 : -1;
  const Memory argmax(tap_element, wrong, layout_strides(taps.shape, p.layout));
  const Memory in(element, in_shape, layout_strides(in_shape, p.layout));
  const Memory out(element, taps.shape, layout_strides(taps.shape, p.layout));
  const Memory indices(Element::int64, taps.shape, layout_strides(taps.shape, p.layout));
  const auto refuses = [&](const char* name, const auto& call) {
    bool thrown = false;
    try {
      call();
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    expect(thrown, std::string(name) + " takes an argmax that no window has");
  };
  const ThreadPool pool = thread_pool(1);
  refuses("backward", [&] {
    max_pool2d_backward(p, active_isa(), pool, out.data(), argmax.data(), in.data());
  });
  refuses("gather", [&] { max_pool2d_gather(p, pool, in.data(), argmax.data(), out.data()); });
  refuses("indices", [&] { max_pool2d_indices(p, pool, argmax.data(), indices.data<int64_t>()); });
}

void check_max_pool2d(Random& random) {
  const MaxPool2dCase c(random, random_max_pool2d(random));
  const MaxPool2dProblem& p = c.problem;
  const Dims in_strides = c.in_strides(), out_strides = c.out_strides();
  const Dims& shape = c.values.shape;
  const Memory input(c.element, c.input, in_strides);
  const Memory grad_output(c.element, c.grad_output, out_strides);
  const Memory argmax(c.tap_element, c.taps, out_strides);
  const Memory winners_only(c.tap_element, c.winning_taps, out_strides);
  for_each_run(describe(p), [&](Isa isa, const ThreadPool& pool) {
    const Memory values(c.element, shape, out_strides);
    const Memory taps(c.tap_element, shape, out_strides);
    const bool with_taps = random.chance(80);
    max_pool2d_forward(p, isa, pool, input.data(), values.data(),
                       with_taps ? taps.data() : nullptr);
    expect_holds(values, c.values, "output");
    if (with_taps) expect_holds(taps, c.taps, "argmax");
    const Memory grad_input(c.element, c.input.shape, in_strides);
    max_pool2d_backward(p, isa, pool, grad_output.data(), winners_only.data(), grad_input.data());
    expect_holds(grad_input, c.grad_input, "gradient of the input");
    if (isa != Isa::baseline) return;  // what follows has one source for all tiers
    const Memory picked(c.element, shape, out_strides);
    max_pool2d_gather(p, pool, input.data(), winners_only.data(), picked.data());
    expect_holds(picked, c.gathered, "gathered values");
    const Memory flat(Element::int64, shape, out_strides);
    max_pool2d_indices(p, pool, argmax.data(), flat.data<int64_t>());
    expect_holds(flat, c.indices, "indices");
  });
  set_context(describe(p));
  if (p.outputs() > 0) check_refused(p, c.taps, c.element, c.tap_element, c.input.shape);
}

// The argmax of the block: its windows that the ReLU clips have no winner.
Tensor block_taps(const MaxPool2dProblem& p, const Pooled& pooled) {
  Tensor taps = pooled.taps;
  for (int64_t i = 0; i < element_count(taps.shape); ++i) {
    if (pooled.values[i] <= 0) taps[i] = static_cast<double>(p.no_winner());
  }
  return taps;
}

void check_block(Random& random) {
  const Conv2dReluMaxPool2dProblem p = random_block(random);
  const Element element = element_of(p.conv.dtype);
  const Element tap_element = p.pool.compact_argmax() ? Element::uint8 : Element::int32;
  Conv2dTensors tensors(random, p.conv);
  const bool special_input = random.chance(20);
  if (special_input) add_specials(random, tensors.input, 2);
  const bool with_bias = random.chance(60);
  Tensor convolved =
      conv2d(p.conv, tensors.input, tensors.weight, with_bias ? &tensors.bias : nullptr);
  for (double& value : convolved.values) value = rounded(element, value);  // as its own operator
  const Tensor activations = relu(convolved);
  const Pooled pooled = max_pool2d(p.pool, activations);
  const Dims& shape = pooled.values.shape;
  const Dims strides = layout_strides(shape, p.conv.layout);
  Tensor grad_output = random_tensor(random, shape, p.conv.dtype);
  const bool special_gradient = random.chance(10);
  if (special_gradient) add_specials(random, grad_output, 1);
  const Conv2dGradients gradients =
      conv2d_relu_max_pool2d_gradients(p, grad_output, tensors.input, tensors.weight, pooled);

  const Memory input(element, tensors.input, tensors.input_strides);
  const Memory weight(element, tensors.weight, tensors.weight_strides);
  const Memory bias(element, tensors.bias, kBiasStrides);
  const Tensor winning_taps = block_taps(p.pool, pooled);
  const Memory argmax(tap_element, winning_taps, strides);
  const Memory grad_out(element, grad_output, strides);
  const std::string context = describe(p.conv) + ", " + describe(p.pool);
  const void* const bias_data = with_bias ? bias.data() : nullptr;
  for (const ConvAlgorithm algorithm : kBlockAlgorithms) {
    if (algorithm == ConvAlgorithm::outer_product && !windows_are_quads(p.pool)) continue;
    for_each_run(context + ", " + algorithm_name(algorithm), [&](Isa isa, const ThreadPool& pool) {
      const Memory values(element, shape, strides);
      const Memory taps(tap_element, shape, strides);
      const bool with_taps = random.chance(80);
      conv2d_relu_max_pool2d_forward(p, plan_block_forward(p, algorithm, isa, pool.threads), pool,
                                     input.data(), weight.data(), bias_data, values.data(),
                                     with_taps ? taps.data() : nullptr);
      expect_holds(values, pooled.values, "output");
      if (with_taps) expect_holds(taps, winning_taps, "argmax");
    });
  }
  for_each_run(context, [&](Isa isa, const ThreadPool& pool) {
    const Conv2dReluMaxPool2dPlan chosen = plan_conv2d_relu_max_pool2d(p, isa, pool.threads);
    for (const bool staged : {false, true}) {
      Conv2dReluMaxPool2dPlan plan = chosen;
      if (chosen.staged && !staged) continue;  // its algorithm may be none of the block's own
      plan.staged = staged;
      const Memory values(element, shape, strides);
      const Memory taps(tap_element, shape, strides);
      conv2d_relu_max_pool2d_forward(p, plan, pool, input.data(), weight.data(), bias_data,
                                     values.data(), taps.data());
      expect_holds(values, pooled.values, "output");
      expect_holds(taps, winning_taps, "argmax");
    }
    for (const BlockBackward backward : {BlockBackward::winners, BlockBackward::windows,
                                         BlockBackward::neighbourhoods, BlockBackward::dense}) {
      if (backward == BlockBackward::windows && !windows_are_quads(p.pool)) continue;
      if (backward == BlockBackward::neighbourhoods && !neighbourhoods_apply(p, isa)) continue;
      Conv2dReluMaxPool2dPlan plan = chosen;
      plan.backward = backward;
      plan.input_backward = backward == BlockBackward::windows ? BlockBackward::winners : backward;
      std::vector<char> scratch(static_cast<size_t>(block_backward_scratch_bytes(p, plan)));
      const GradientMemory to(random, element, tensors);
      // Only single winners leave out products of zero, which infinities make NaN.
      if (backward != BlockBackward::winners && (special_input || special_gradient)) continue;
      conv2d_relu_max_pool2d_backward(p, plan, pool, grad_out.data(), input.data(), weight.data(),
                                      argmax.data(), to.input_data(), to.weight_data(),
                                      to.bias_data(), scratch.data());
      to.expect_all(gradients);
    }
  });
}

void check_gradient_step(Random& random) {
  const bool large = random.chance(5);  // enough for several threads
  std::vector<int64_t> counts(static_cast<size_t>(random.between(0, 5)));
  for (int64_t& count : counts) {
    count = random.chance(5) ? 0 : random.between(1, large ? 40000 : 100);
  }
  const GradientStepCase c(random, counts);
  const Element element = element_of(c.dtype);
  for_each_run(c.describe(), [&](Isa isa, const ThreadPool& pool) {
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<StepTensor> list;
    for (const StepTensors& tensors : c.before) {
      for (const Tensor* const tensor : {&tensors.param, &tensors.grad, &tensors.buffer}) {
        memory.push_back(std::make_unique<Memory>(element, *tensor, kBiasStrides));
      }
      const std::unique_ptr<Memory>* const last = &memory.back();
      list.push_back({last[-2]->data(), last[-1]->data(),
                      c.options.momentum != 0 ? last[0]->data() : nullptr,
                      element_count(tensors.param.shape)});
    }
    gradient_step(c.dtype, plan_gradient_step(list, isa, pool.threads), pool, list, c.options);
    for (size_t i = 0; i < c.after.size(); ++i) {
      expect_holds(*memory[3 * i], c.after[i].param, "parameter");
      expect_holds(*memory[3 * i + 1], c.after[i].grad, "gradient");
      expect_holds(*memory[3 * i + 2], c.after[i].buffer, "momentum buffer");
    }
  });
}

}  // namespace
}  // namespace kernel_tests

int main(int argc, char** argv) {
  using namespace kernel_tests;
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s CASES SEED\n", argv[0]);
    return 2;
  }
  const long cases = std::atol(argv[1]);
  Random random(std::strtoull(argv[2], nullptr, 10));
  cnnkernels::poison_workspaces(true);
  check_conversions();
  check_workspaces();
  for (long i = 0; i < cases; ++i) {
    check_conv2d(random);
    check_max_pool2d(random);
    check_block(random);
    check_gradient_step(random);
  }
  std::printf("tiers:");
  for (const cnnkernels::Isa isa : cnnkernels::supported_isas()) {
    std::printf(" %s", cnnkernels::isa_name(isa));
  }
  std::printf("\n");
  return report();
}
