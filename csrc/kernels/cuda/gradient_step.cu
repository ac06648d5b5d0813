// The gradient-descent step of a list of tensors.
//
// Memory is the limit: 12 bytes a float parameter, 20 with momentum, for two to six operations. So
// every access is a vector of 16 bytes, a thread has up to two vectors of each stream under way
// before it computes, and all chunks of all tensors are one launch, as many as the device runs at
// once where they are few. The list lies in the kernel's arguments, which are copied at the launch:
// nothing has to be uploaded, or kept alive, for a step, and a CUDA graph captures it whole. A
// block finds its tensor by a binary search there, which all its threads do alike.
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/gradient_step.h"

namespace cnnkernels::cuda {
namespace {

// What a step does with the momentum buffer.
enum class Momentum { none, first, later };

// Vectors of a stream that a thread loads before it computes. Two of 16-bit elements would be
// sixteen of them, and more than its registers hold.
template <class T>
constexpr int kVectorsUnderWay = sizeof(T) == 2 ? 1 : 2;

template <int kTensors>
struct TensorList {
  void* param[kTensors];
  void* grad[kTensors];
  void* momentum_buffer[kTensors];
  int64_t count[kTensors];
  int first_block[kTensors];
  int tensors;
  int chunk;
};

// Numbers in the type of the sums: one double scalar would cost double arithmetic an element.
template <class A>
struct Rule {
  A lr, momentum, undampened, weight_decay, grad_scale;  // undampened: 1 - dampening
  bool decays, nesterov, maximize, unscales;
  const A* device_lr;
  const float* device_grad_scale;
  const float* found_inf;
};

template <int kTensors>
__device__ inline int tensor_of_block(const TensorList<kTensors>& list, int block) {
  int low = 0, high = list.tensors;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (list.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// Steps one element; the gradient is changed only where it is unscaled.
template <class T, Momentum kMomentum, class A = Accumulator<T>>
__device__ inline void step_element(T& param, T& grad, T& momentum_buffer, const Rule<A>& rule,
                                    A lr, A grad_scale) {
  A direction = to_accumulator(grad);
  if (rule.unscales) {
    direction /= grad_scale;
    grad = from_accumulator<T>(direction);
  }
  if (rule.maximize) direction = -direction;
  const A value = to_accumulator(param);
  if (rule.decays) direction += rule.weight_decay * value;
  if constexpr (kMomentum != Momentum::none) {
    A velocity = direction;
    if constexpr (kMomentum == Momentum::later) {
      velocity = rule.momentum * to_accumulator(momentum_buffer) + rule.undampened * direction;
    }
    momentum_buffer = from_accumulator<T>(velocity);
    direction = rule.nesterov ? direction + rule.momentum * velocity : velocity;
  }
  param = from_accumulator<T>(value - lr * direction);
}

// The elements of a chunk, in vectors of kWidth: [begin, end) in units of vectors.
template <class T, Momentum kMomentum, int kWidth, class A = Accumulator<T>>
__device__ inline void step_vectors(T* param, T* grad, T* momentum_buffer, int begin, int end,
                                    const Rule<A>& rule, A lr, A grad_scale) {
  using Elements = Vector<T, kWidth>;
  constexpr int kVectors = kVectorsUnderWay<T>;
  for (int first = begin + static_cast<int>(threadIdx.x); first < end;
       first += kVectors * kStepThreads) {
    Elements params[kVectors], grads[kVectors], buffers[kVectors];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int i = first + u * kStepThreads;
      if (i >= end) break;
      params[u] = load_vector<kWidth>(param + int64_t{i} * kWidth);
      grads[u] = load_vector<kWidth>(grad + int64_t{i} * kWidth);
      if constexpr (kMomentum == Momentum::later) {
        buffers[u] = load_vector<kWidth>(momentum_buffer + int64_t{i} * kWidth);
      }
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int i = first + u * kStepThreads;
      if (i >= end) break;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        step_element<T, kMomentum>(params[u][v], grads[u][v], buffers[u][v], rule, lr, grad_scale);
      }
      store_vector<kWidth>(param + int64_t{i} * kWidth, params[u]);
      if (rule.unscales) store_vector<kWidth>(grad + int64_t{i} * kWidth, grads[u]);
      if constexpr (kMomentum != Momentum::none) {
        store_vector<kWidth>(momentum_buffer + int64_t{i} * kWidth, buffers[u]);
      }
    }
  }
}

template <class T, Momentum kMomentum, int kTensors>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks)
    gradient_step_kernel(const __grid_constant__ TensorList<kTensors> list,
                         const __grid_constant__ Rule<Accumulator<T>> rule) {
  using A = Accumulator<T>;
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  const int block = static_cast<int>(blockIdx.x);
  const int tensor = tensor_of_block(list, block);
  const int64_t begin = int64_t{block - list.first_block[tensor]} * list.chunk;
  const int64_t left = list.count[tensor] - begin;
  const int count = static_cast<int>(left < list.chunk ? left : list.chunk);
  T* const param = static_cast<T*>(list.param[tensor]) + begin;
  T* const grad = static_cast<T*>(list.grad[tensor]) + begin;
  T* momentum_buffer = nullptr;
  if constexpr (kMomentum != Momentum::none) {
    momentum_buffer = static_cast<T*>(list.momentum_buffer[tensor]) + begin;
  }
  if (rule.found_inf != nullptr && *rule.found_inf != 0) return;
  const A lr = rule.device_lr != nullptr ? *rule.device_lr : rule.lr;
  const A grad_scale =
      rule.device_grad_scale != nullptr ? static_cast<A>(*rule.device_grad_scale) : rule.grad_scale;
  // A view may begin anywhere. Its chunks do not change its alignment: they are whole vectors.
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(param) |
                              reinterpret_cast<uintptr_t>(grad) |
                              reinterpret_cast<uintptr_t>(momentum_buffer);
  int stepped = 0;
  if (addresses % kVectorBytes == 0) {
    step_vectors<T, kMomentum, kWidth>(param, grad, momentum_buffer, 0, count / kWidth, rule, lr,
                                       grad_scale);
    stepped = count / kWidth * kWidth;
  }
  step_vectors<T, kMomentum, 1>(param, grad, momentum_buffer, stepped, count, rule, lr, grad_scale);
}

template <class T>
Rule<Accumulator<T>> make_rule(const StepOptions& options, const StepScalars& scalars) {
  using A = Accumulator<T>;
  Rule<A> rule;
  rule.lr = static_cast<A>(options.lr);
  rule.momentum = static_cast<A>(options.momentum);
  rule.undampened = static_cast<A>(1 - options.dampening);
  rule.weight_decay = static_cast<A>(options.weight_decay);
  rule.decays = options.weight_decay != 0;
  rule.nesterov = options.nesterov;
  rule.maximize = options.maximize;
  rule.device_lr = static_cast<const A*>(scalars.lr);
  rule.unscales = options.unscale;
  rule.grad_scale = static_cast<A>(options.grad_scale);
  rule.device_grad_scale = scalars.grad_scale;
  rule.found_inf = scalars.found_inf;
  return rule;
}

template <class T, Momentum kMomentum, int kTensors>
Error launch_step(const StepLaunch& part, int chunk, const std::vector<StepTensor>& tensors,
                  const Rule<Accumulator<T>>& rule, Stream stream) {
  TensorList<kTensors> list;
  list.tensors = 0;
  list.chunk = chunk;
  int64_t block = 0;
  for (size_t i = part.begin; i < part.end; ++i) {
    const StepTensor& tensor = tensors[i];
    if (tensor.count == 0) continue;
    const int t = list.tensors++;
    list.param[t] = tensor.param;
    list.grad[t] = tensor.grad;
    list.momentum_buffer[t] = tensor.momentum_buffer;
    list.count[t] = tensor.count;
    list.first_block[t] = static_cast<int>(block);
    block += ceil_div(tensor.count, chunk);
  }
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(part.blocks);
  grid.block_x = kStepThreads;
  return launch(gradient_step_kernel<T, kMomentum, kTensors>, grid, 0, stream, list, rule);
}

template <class T, Momentum kMomentum>
Error launch_steps(const GradientStepPlan& plan, const std::vector<StepTensor>& tensors,
                   const StepOptions& options, const StepScalars& scalars, Stream stream) {
  const auto rule = make_rule<T>(options, scalars);
  for (const StepLaunch& part : plan.launches) {
    const auto launch_part = part.few ? launch_step<T, kMomentum, kFewStepTensors>
                                      : launch_step<T, kMomentum, kMostStepTensors>;
    const Error error = launch_part(part, plan.chunk, tensors, rule, stream);
    if (error != kSuccess) return error;
  }
  return kSuccess;
}

}  // namespace

Error gradient_step(DType dtype, const GradientStepPlan& plan,
                    const std::vector<StepTensor>& tensors, const StepOptions& options,
                    const StepScalars& scalars, Stream stream) {
  Error error = kSuccess;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if (options.momentum == 0) {
      error = launch_steps<T, Momentum::none>(plan, tensors, options, scalars, stream);
    } else if (options.first_step) {
      error = launch_steps<T, Momentum::first>(plan, tensors, options, scalars, stream);
    } else {
      error = launch_steps<T, Momentum::later>(plan, tensors, options, scalars, stream);
    }
  });
  return error;
}

}  // namespace cnnkernels::cuda
