#include "cases.h"

#include <cmath>
#include <sstream>

#include "problems.h"

namespace kernel_tests {

using namespace cnnkernels;

MaxPool2dCase::MaxPool2dCase(Random& random, const MaxPool2dProblem& of)
    : problem(of),
      element(element_of(of.dtype)),
      tap_element(of.compact_argmax() ? Element::uint8 : Element::int32),
      input(random_tensor(random, {of.batch, of.channels, of.in_height, of.in_width}, of.dtype)),
      grad_output({of.batch, of.channels, of.out_height, of.out_width}),
      values(grad_output.shape),
      taps(grad_output.shape),
      winning_taps(grad_output.shape),
      grad_input(input.shape),
      gathered(grad_output.shape),
      indices(grad_output.shape) {
  if (random.chance(50)) add_specials(random, input, element_count(input.shape) / 20);
  if (random.chance(20)) input.values.assign(input.values.size(), -kInfinity);
  grad_output = random_tensor(random, grad_output.shape, problem.dtype);
  if (random.chance(20)) add_specials(random, grad_output, 1);
  Pooled pooled = max_pool2d(problem, input);
  values = std::move(pooled.values);
  taps = winning_taps = std::move(pooled.taps);
  const std::vector<int64_t> positions = winners(problem, taps);
  const int clipped = random.chance(30) ? 20 : 0;
  for (size_t i = 0; i < positions.size(); ++i) {
    if (random.chance(clipped)) {
      winning_taps.values[i] = static_cast<double>(problem.no_winner());
    } else {
      grad_input[positions[i]] += grad_output.values[i];
      gathered.values[i] = input[positions[i]];
    }
    indices.values[i] = static_cast<double>(positions[i] % (problem.in_height * problem.in_width));
  }
}

namespace {

// Options of which every step is exact.
StepOptions random_step_options(Random& random, DType dtype) {
  StepOptions options;
  options.lr = dtype == DType::float64 ? 0.125 + std::ldexp(1.0, -28) : 0.125;
  options.momentum = random.chance(60) ? 0.5 : 0;
  options.nesterov = random.chance(40);
  options.dampening = !options.nesterov && random.chance(50) ? 0.25 : 0;
  options.weight_decay = random.chance(50) ? 0.125 : 0;
  options.maximize = random.chance(30);
  options.first_step = random.chance(30);
  options.unscale = random.chance(30);
  options.grad_scale = options.unscale ? 4 : 1;
  return options;
}

StepTensors stepped(const StepTensors& from, const StepOptions& options) {
  StepTensors to = from;
  for (size_t i = 0; i < from.param.values.size(); ++i) {
    double& grad = to.grad.values[i];
    double& buffer = to.buffer.values[i];
    if (options.unscale) grad /= options.grad_scale;
    double direction = options.maximize ? -grad : grad;
    direction += options.weight_decay * from.param.values[i];
    if (options.momentum != 0) {
      buffer = options.first_step ? direction
                                  : options.momentum * buffer + (1 - options.dampening) * direction;
      direction = options.nesterov ? direction + options.momentum * buffer : buffer;
    }
    to.param.values[i] -= options.lr * direction;
  }
  return to;
}

}  // namespace

GradientStepCase::GradientStepCase(Random& random, const std::vector<int64_t>& counts)
    : dtype(random_dtype(random)), options(random_step_options(random, dtype)) {
  for (const int64_t count : counts) {
    const Dims shape = {count, 1, 1, 1};
    StepTensors tensors = {Tensor(shape), Tensor(shape), Tensor(shape)};
    for (Tensor* const tensor : {&tensors.param, &tensors.grad, &tensors.buffer}) {
      // Not of `dtype`, whose scale would cost bits that the steps need.
      *tensor = random_tensor(random, shape, DType::float32, 64);
    }
    if (options.first_step) {
      tensors.buffer.values.assign(tensors.buffer.values.size(), std::nan(""));
    }
    after.push_back(stepped(tensors, options));
    before.push_back(std::move(tensors));
  }
}

std::string GradientStepCase::describe() const {
  std::ostringstream text;
  text << "gradient_step " << kernel_tests::describe(dtype, Layout::nchw) << " momentum "
       << options.momentum << " nesterov " << options.nesterov << " dampening " << options.dampening
       << " weight_decay " << options.weight_decay << " maximize " << options.maximize
       << " first_step " << options.first_step << " unscale " << options.unscale << " elements";
  for (const StepTensors& tensors : before) text << ' ' << tensors.param.values.size();
  return text.str();
}

}  // namespace kernel_tests
