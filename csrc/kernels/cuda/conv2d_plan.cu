// Which kernel computes a pass of a convolution, and how it is cut up.
//
// Host code. It stands among the kernels' sources because it asks them for what they need: the
// bytes of a workspace, and whether accesses of 16 bytes fit.
//
// A pass that several kernels take gets the one with the fewest cycles, by an estimate: products
// over the rate of the units that multiply, in waves of blocks over the multiprocessors, or bytes
// over the bandwidth, whichever is more. The automatic policy then looks up how torch's time
// compared with that kernel's where both were measured, and leaves the pass to torch where torch
// was clearly faster.
#include <algorithm>

#include "kernels/cuda/conv2d.h"

namespace cnnkernels::cuda {
namespace {

// ---- What a pass is, as a matrix product for each group.

struct PassShape {
  int64_t pixels;    // results of a channel
  int64_t columns;   // result channels of a group
  int64_t channels;  // source channels of a group
  int64_t groups;
  double taps;   // that reach a result, in the mean
  double bytes;  // of source, result and weight
};

// Of the forward pass, and of the weight gradient, which reads the same pixels.
PassShape forward_shape(const Conv2dProblem& p) {
  PassShape shape;
  shape.pixels = p.batch * p.out_height * p.out_width;
  shape.columns = p.out_channels / p.groups;
  shape.channels = p.in_channels / p.groups;
  shape.groups = p.groups;
  shape.taps = static_cast<double>(p.kernel_height * p.kernel_width);
  const double elements =
      static_cast<double>(p.batch * p.in_height * p.in_width) * static_cast<double>(p.in_channels) +
      static_cast<double>(shape.pixels) * static_cast<double>(p.out_channels) +
      static_cast<double>(p.out_channels * shape.channels) * shape.taps;
  shape.bytes = elements * static_cast<double>(element_size(p.dtype));
  return shape;
}

PassShape shape_of(const Conv2dProblem& p, Conv2dPass pass) {
  PassShape shape = forward_shape(p);
  if (pass == Conv2dPass::input_gradient) {
    shape.pixels = p.batch * p.in_height * p.in_width;
    std::swap(shape.columns, shape.channels);
    shape.taps /= static_cast<double>(p.stride_h * p.stride_w);
  }
  return shape;
}

// ---- Which kernels take a pass.

// mma.sync with asynchronous copies; there is none of float64 here.
bool gemm_applies(const Conv2dProblem& p, const DeviceLimits& limits) {
  return limits.compute_capability >= 80 && p.dtype != DType::float64;
}

// Few channels a group: as many results for an element of the source as its sums keep up with.
bool depthwise_applies(const PassShape& shape) {
  constexpr int64_t kMostChannels = 8;
  return shape.columns <= kMostChannels && shape.channels <= kMostChannels &&
         shape.groups * shape.columns <= kMostBlocksYZ;
}

bool one_channel_a_group(const PassShape& shape) {
  return shape.columns == 1 && shape.channels == 1;
}

// Up to four channels, whose patches are mostly gaps in tiles of 16 bytes of channels.
bool is_first_layer(const Conv2dProblem& p) { return p.groups == 1 && p.in_channels <= 4; }

TensorProducts products_of(const Conv2dProblem& p) {
  return p.precision == Float32Precision::high ? TensorProducts::tf32 : TensorProducts::exact_parts;
}

// ---- Estimates, in cycles of a multiprocessor. Rates are products a cycle.

// Reference: CUDA C++ Programming Guide, "Arithmetic Instructions".
double multiply_add_rate(const Conv2dProblem& p, const DeviceLimits& limits) {
  const int capability = limits.compute_capability;
  if (p.dtype == DType::float64) {
    return capability == 80 ? 32 : capability == 90 || capability == 100 ? 64 : 2;
  }
  return capability <= 80 ? 64 : 128;
}

double tensor_rate(const Conv2dProblem& p, const DeviceLimits& limits) {
  const int capability = limits.compute_capability;
  // Of 16-bit types, through mma.sync.
  const double rate = capability == 80 || (capability >= 90 && capability < 120) ? 1024 : 512;
  if (p.dtype != DType::float32) return rate;
  return products_of(p) == TensorProducts::tf32 ? rate / 2 : rate / 6;
}

// What kernels reach of these rates.
constexpr double kDirectShare = 0.5;
constexpr double kPlanesShare = 0.2;  // of depthwise: one load a product
constexpr double kPlainShare = 0.15;
constexpr double kGemmShare = 0.5;
constexpr double kSmallTileShare = 0.35;  // of tiles of 64, which read twice as much a product
constexpr double kGatheredShare = 0.6;    // of that, where channels do not lie together

double gemm_rate(const Conv2dProblem& p, const DeviceLimits& limits, int tile) {
  const double share = (tile == 128 ? kGemmShare : kSmallTileShare) *
                       (p.layout == Layout::nhwc ? 1 : kGatheredShare);
  return share * tensor_rate(p, limits);
}

// Blocks of so many products each, in waves.
double product_cycles(double blocks, double products, double rate, const DeviceLimits& limits) {
  const double multiprocessors = std::max(1, limits.multiprocessors);
  const double waves = static_cast<double>(
      ceil_div(static_cast<int64_t>(blocks), static_cast<int64_t>(multiprocessors)));
  return waves * products / rate;
}

double byte_cycles(double bytes, const DeviceLimits& limits) {
  constexpr double kBytes = 12;  // that a multiprocessor's share of the memory moves in a cycle
  return bytes / (kBytes * std::max(1, limits.multiprocessors));
}

double blocks_of(int64_t count, int64_t tile) { return static_cast<double>(ceil_div(count, tile)); }

double direct_cycles(const Conv2dProblem& p, const PassShape& shape, const DeviceLimits& limits) {
  const int64_t tile = 256, columns = shape.columns <= 8 ? 8 : 16;
  const double blocks = blocks_of(shape.pixels, tile) * blocks_of(shape.columns, columns) *
                        static_cast<double>(shape.groups);
  const double products = static_cast<double>(tile * columns * shape.channels) * shape.taps;
  return std::max(
      product_cycles(blocks, products, kDirectShare * multiply_add_rate(p, limits), limits),
      byte_cycles(shape.bytes, limits));
}

double depthwise_cycles(const Conv2dProblem& p, const PassShape& shape,
                        const DeviceLimits& limits) {
  const int64_t tile = 1024;
  const double blocks =
      blocks_of(shape.pixels, tile) * static_cast<double>(shape.columns * shape.groups);
  const double products = static_cast<double>(tile * shape.channels) * shape.taps;
  return std::max(
      product_cycles(blocks, products, kPlanesShare * multiply_add_rate(p, limits), limits),
      byte_cycles(shape.bytes, limits));
}

int64_t filled_up(const Conv2dProblem& p, int64_t channels) {
  return round_up(channels, kVectorBytes / element_size(p.dtype));
}

double gemm_cycles(const Conv2dProblem& p, const PassShape& shape, const DeviceLimits& limits,
                   int tile) {
  constexpr double kPackingCycles = 3000;  // a launch of its own packs the weights
  const double blocks = blocks_of(shape.pixels, tile) * blocks_of(shape.columns, tile) *
                        static_cast<double>(shape.groups);
  const double products =
      static_cast<double>(int64_t{tile} * tile * filled_up(p, shape.channels)) * shape.taps;
  return kPackingCycles +
         std::max(product_cycles(blocks, products, gemm_rate(p, limits, tile), limits),
                  byte_cycles(shape.bytes, limits));
}

int gemm_tile(const Conv2dProblem& p, const PassShape& shape, const DeviceLimits& limits) {
  return gemm_cycles(p, shape, limits, 64) < gemm_cycles(p, shape, limits, 128) ? 64 : 128;
}

// The weight gradient: output channels by weights of one, in tiles, over all pixels. Parts of the
// pixels fill the device, so that there are no waves.
int64_t weight_columns(const Conv2dProblem& p) {
  return p.in_channels / p.groups * p.kernel_height * p.kernel_width;
}
double weight_cycles(const Conv2dProblem& p, const PassShape& shape, const DeviceLimits& limits,
                     int tile, double rate) {
  const double blocks = blocks_of(shape.columns, tile) * blocks_of(weight_columns(p), tile) *
                        static_cast<double>(shape.groups);
  const double products = blocks * tile * tile * static_cast<double>(shape.pixels);
  return products / rate / std::max(1, limits.multiprocessors);
}

constexpr int kPlainTile = 32;
double weight_plain_cycles(const Conv2dProblem& p, const PassShape& shape,
                           const DeviceLimits& limits) {
  return weight_cycles(p, shape, limits, kPlainTile, kPlainShare * multiply_add_rate(p, limits));
}

double weight_gemm_cycles(const Conv2dProblem& p, const PassShape& shape,
                          const DeviceLimits& limits, int tile) {
  return weight_cycles(p, shape, limits, tile, gemm_rate(p, limits, tile));
}

int weight_gemm_tile(const Conv2dProblem& p, const PassShape& shape, const DeviceLimits& limits) {
  return weight_gemm_cycles(p, shape, limits, 64) < weight_gemm_cycles(p, shape, limits, 128) ? 64
                                                                                              : 128;
}

// Once over the pixels for each tap.
double weight_depthwise_cycles(const Conv2dProblem& p, const PassShape& shape,
                               const DeviceLimits& limits) {
  const double products = static_cast<double>(shape.pixels) *
                          static_cast<double>(shape.groups * shape.columns * shape.channels) *
                          shape.taps;
  return products / (kPlanesShare * multiply_add_rate(p, limits)) /
         std::max(1, limits.multiprocessors);
}

// ---- What was measured.

// What the table tells apart.
enum class ShapeClass : uint8_t {
  first_layer,
  stem,  // a first layer of 7x7 or more
  dense,
  pointwise,  // 1x1
  depthwise,
  depthwise_strided,
  unmeasured,
};

enum class Precision : uint8_t { half, tf32, full };  // 16-bit types; float32 in either way

struct Measurement {
  ShapeClass shape;
  Precision precision;
  Layout layout;
  Conv2dPass pass;
  float ratio;  // torch's time over the kernel's
};

// Of one H200, cuDNN 9.19 with benchmark=True; a range is one number in its middle. A class without
// a row is the kernels'. The kernels of a class are those that native_algorithm names for it.
constexpr Layout kNchw = Layout::nchw, kNhwc = Layout::nhwc;
constexpr Conv2dPass kForward = Conv2dPass::forward, kInput = Conv2dPass::input_gradient,
                     kWeight = Conv2dPass::weight_gradient;
constexpr Measurement kMeasured[] = {
    {ShapeClass::first_layer, Precision::half, kNchw, kForward, 1.5f},
    {ShapeClass::first_layer, Precision::half, kNhwc, kForward, 0.5f},
    {ShapeClass::first_layer, Precision::tf32, kNhwc, kForward, 0.5f},
    {ShapeClass::first_layer, Precision::full, kNchw, kForward, 1.5f},
    {ShapeClass::first_layer, Precision::full, kNhwc, kForward, 0.6f},
    {ShapeClass::first_layer, Precision::half, kNchw, kWeight, 0.2f},
    {ShapeClass::first_layer, Precision::half, kNhwc, kWeight, 0.2f},
    {ShapeClass::first_layer, Precision::tf32, kNchw, kWeight, 0.2f},
    {ShapeClass::first_layer, Precision::tf32, kNhwc, kWeight, 0.2f},
    {ShapeClass::first_layer, Precision::full, kNchw, kWeight, 0.5f},
    {ShapeClass::first_layer, Precision::full, kNhwc, kWeight, 0.5f},

    {ShapeClass::stem, Precision::half, kNchw, kForward, 0.56f},
    {ShapeClass::stem, Precision::half, kNhwc, kForward, 0.5f},
    {ShapeClass::stem, Precision::tf32, kNhwc, kForward, 0.5f},
    {ShapeClass::stem, Precision::full, kNchw, kForward, 0.97f},
    {ShapeClass::stem, Precision::full, kNhwc, kForward, 0.6f},
    {ShapeClass::stem, Precision::half, kNchw, kWeight, 0.2f},
    {ShapeClass::stem, Precision::half, kNhwc, kWeight, 0.2f},
    {ShapeClass::stem, Precision::tf32, kNchw, kWeight, 0.2f},
    {ShapeClass::stem, Precision::tf32, kNhwc, kWeight, 0.2f},
    {ShapeClass::stem, Precision::full, kNchw, kWeight, 0.5f},
    {ShapeClass::stem, Precision::full, kNhwc, kWeight, 0.5f},

    {ShapeClass::dense, Precision::half, kNchw, kForward, 0.4f},
    {ShapeClass::dense, Precision::half, kNhwc, kForward, 0.4f},
    {ShapeClass::dense, Precision::tf32, kNchw, kForward, 0.4f},
    {ShapeClass::dense, Precision::tf32, kNhwc, kForward, 0.4f},
    {ShapeClass::dense, Precision::full, kNchw, kForward, 1.0f},
    {ShapeClass::dense, Precision::full, kNhwc, kForward, 1.6f},
    {ShapeClass::dense, Precision::half, kNchw, kInput, 0.4f},
    {ShapeClass::dense, Precision::half, kNhwc, kInput, 0.4f},
    {ShapeClass::dense, Precision::tf32, kNchw, kInput, 0.4f},
    {ShapeClass::dense, Precision::tf32, kNhwc, kInput, 0.4f},
    {ShapeClass::dense, Precision::full, kNchw, kInput, 1.0f},
    {ShapeClass::dense, Precision::full, kNhwc, kInput, 1.2f},
    {ShapeClass::dense, Precision::half, kNchw, kWeight, 0.2f},
    {ShapeClass::dense, Precision::half, kNhwc, kWeight, 0.2f},
    {ShapeClass::dense, Precision::tf32, kNchw, kWeight, 0.2f},
    {ShapeClass::dense, Precision::tf32, kNhwc, kWeight, 0.2f},
    {ShapeClass::dense, Precision::full, kNchw, kWeight, 0.5f},
    {ShapeClass::dense, Precision::full, kNhwc, kWeight, 0.5f},

    {ShapeClass::pointwise, Precision::half, kNchw, kForward, 0.92f},
    {ShapeClass::pointwise, Precision::half, kNhwc, kForward, 1.05f},
    {ShapeClass::pointwise, Precision::tf32, kNchw, kForward, 0.92f},
    {ShapeClass::pointwise, Precision::tf32, kNhwc, kForward, 1.05f},
    {ShapeClass::pointwise, Precision::full, kNchw, kForward, 1.0f},
    {ShapeClass::pointwise, Precision::full, kNhwc, kForward, 1.6f},
    {ShapeClass::pointwise, Precision::half, kNchw, kInput, 0.92f},
    {ShapeClass::pointwise, Precision::half, kNhwc, kInput, 1.05f},
    {ShapeClass::pointwise, Precision::tf32, kNchw, kInput, 0.92f},
    {ShapeClass::pointwise, Precision::tf32, kNhwc, kInput, 1.05f},
    {ShapeClass::pointwise, Precision::full, kNchw, kInput, 1.0f},
    {ShapeClass::pointwise, Precision::full, kNhwc, kInput, 1.2f},
    {ShapeClass::pointwise, Precision::half, kNchw, kWeight, 0.2f},
    {ShapeClass::pointwise, Precision::half, kNhwc, kWeight, 0.2f},
    {ShapeClass::pointwise, Precision::tf32, kNchw, kWeight, 0.2f},
    {ShapeClass::pointwise, Precision::tf32, kNhwc, kWeight, 0.2f},
    {ShapeClass::pointwise, Precision::full, kNchw, kWeight, 0.5f},
    {ShapeClass::pointwise, Precision::full, kNhwc, kWeight, 0.5f},

    {ShapeClass::depthwise, Precision::half, kNchw, kForward, 0.45f},
    {ShapeClass::depthwise, Precision::half, kNhwc, kForward, 0.7f},
    {ShapeClass::depthwise, Precision::tf32, kNchw, kForward, 0.45f},
    {ShapeClass::depthwise, Precision::tf32, kNhwc, kForward, 0.7f},
    {ShapeClass::depthwise, Precision::full, kNchw, kForward, 0.45f},
    {ShapeClass::depthwise, Precision::full, kNhwc, kForward, 0.7f},
    {ShapeClass::depthwise, Precision::half, kNchw, kInput, 0.45f},
    {ShapeClass::depthwise, Precision::half, kNhwc, kInput, 0.7f},
    {ShapeClass::depthwise, Precision::tf32, kNchw, kInput, 0.45f},
    {ShapeClass::depthwise, Precision::tf32, kNhwc, kInput, 0.7f},
    {ShapeClass::depthwise, Precision::full, kNchw, kInput, 0.45f},
    {ShapeClass::depthwise, Precision::full, kNhwc, kInput, 0.7f},
    {ShapeClass::depthwise, Precision::half, kNchw, kWeight, 0.1f},
    {ShapeClass::depthwise, Precision::half, kNhwc, kWeight, 0.1f},
    {ShapeClass::depthwise, Precision::tf32, kNchw, kWeight, 0.1f},
    {ShapeClass::depthwise, Precision::tf32, kNhwc, kWeight, 0.1f},
    {ShapeClass::depthwise, Precision::full, kNchw, kWeight, 0.1f},
    {ShapeClass::depthwise, Precision::full, kNhwc, kWeight, 0.1f},

    {ShapeClass::depthwise_strided, Precision::half, kNchw, kForward, 0.45f},
    {ShapeClass::depthwise_strided, Precision::half, kNhwc, kForward, 0.7f},
    {ShapeClass::depthwise_strided, Precision::tf32, kNchw, kForward, 0.45f},
    {ShapeClass::depthwise_strided, Precision::tf32, kNhwc, kForward, 0.7f},
    {ShapeClass::depthwise_strided, Precision::full, kNchw, kForward, 0.45f},
    {ShapeClass::depthwise_strided, Precision::full, kNhwc, kForward, 0.7f},
    {ShapeClass::depthwise_strided, Precision::half, kNchw, kInput, 1.8f},
    {ShapeClass::depthwise_strided, Precision::half, kNhwc, kInput, 1.8f},
    {ShapeClass::depthwise_strided, Precision::tf32, kNchw, kInput, 1.8f},
    {ShapeClass::depthwise_strided, Precision::tf32, kNhwc, kInput, 1.8f},
    {ShapeClass::depthwise_strided, Precision::full, kNchw, kInput, 1.8f},
    {ShapeClass::depthwise_strided, Precision::full, kNhwc, kInput, 1.8f},
    {ShapeClass::depthwise_strided, Precision::half, kNchw, kWeight, 0.1f},
    {ShapeClass::depthwise_strided, Precision::half, kNhwc, kWeight, 0.1f},
    {ShapeClass::depthwise_strided, Precision::tf32, kNchw, kWeight, 0.1f},
    {ShapeClass::depthwise_strided, Precision::tf32, kNhwc, kWeight, 0.1f},
    {ShapeClass::depthwise_strided, Precision::full, kNchw, kWeight, 0.1f},
    {ShapeClass::depthwise_strided, Precision::full, kNhwc, kWeight, 0.1f},
};

// A ratio that torch has to fall below: a tenth is what machines and shapes of a class differ by.
constexpr float kClearlyFaster = 0.9f;

Precision precision_of(const Conv2dProblem& p) {
  if (p.dtype != DType::float32) return Precision::half;
  return products_of(p) == TensorProducts::tf32 ? Precision::tf32 : Precision::full;
}

ShapeClass class_of(const Conv2dProblem& p, Conv2dPass pass, Conv2dAlgorithm algorithm) {
  const int64_t taps = p.kernel_height * p.kernel_width;
  // The input gradient of a first layer is hardly ever wanted, and was not measured.
  if (is_first_layer(p) && pass != Conv2dPass::input_gradient) {
    return taps >= 49 ? ShapeClass::stem : ShapeClass::first_layer;
  }
  switch (algorithm) {
    case Conv2dAlgorithm::implicit_gemm:
      return taps == 1 ? ShapeClass::pointwise : ShapeClass::dense;
    case Conv2dAlgorithm::depthwise:
      return p.stride_h * p.stride_w > 1 ? ShapeClass::depthwise_strided : ShapeClass::depthwise;
    default:
      return ShapeClass::unmeasured;
  }
}

// torch's time over that of a kernel, and 1 where nothing is known.
float torch_ratio(const Conv2dProblem& p, Conv2dPass pass, Conv2dAlgorithm algorithm,
                  const DeviceLimits& limits) {
  if (p.dtype == DType::float64) return 1;
  const ShapeClass shape = class_of(p, pass, algorithm);
  const Precision precision = precision_of(p);
  if (shape == ShapeClass::unmeasured) {
    // Before the architectures that these kernels are for, tensor cores are torch's alone.
    const bool torch_has_more = precision == Precision::half && !gemm_applies(p, limits);
    return torch_has_more ? static_cast<float>(kDirectShare * multiply_add_rate(p, limits) /
                                               (kGemmShare * tensor_rate(p, limits)))
                          : 1;
  }
  for (const Measurement& row : kMeasured) {
    if (row.shape == shape && row.precision == precision && row.layout == p.layout &&
        row.pass == pass) {
      return row.ratio;
    }
  }
  return 1;
}

// ---- The choice.

Conv2dAlgorithm fastest_of_pass(const Conv2dProblem& p, const PassShape& shape, Conv2dPass pass,
                                const DeviceLimits& limits) {
  if (one_channel_a_group(shape) && depthwise_applies(shape)) return Conv2dAlgorithm::depthwise;
  if (pass == Conv2dPass::forward && is_first_layer(p)) return Conv2dAlgorithm::direct;
  Conv2dAlgorithm fastest = Conv2dAlgorithm::direct;
  double least = direct_cycles(p, shape, limits);
  const auto consider = [&](Conv2dAlgorithm algorithm, double cycles) {
    if (cycles >= least) return;
    fastest = algorithm;
    least = cycles;
  };
  if (p.groups > 1 && depthwise_applies(shape)) {
    consider(Conv2dAlgorithm::depthwise, depthwise_cycles(p, shape, limits));
  }
  if (gemm_applies(p, limits)) {
    const int tile = gemm_tile(p, shape, limits);
    consider(Conv2dAlgorithm::implicit_gemm, gemm_cycles(p, shape, limits, tile));
  }
  return fastest;
}

Conv2dAlgorithm fastest_of_weight(const Conv2dProblem& p, const PassShape& shape,
                                  const DeviceLimits& limits) {
  if (one_channel_a_group(shape) && depthwise_applies(shape)) return Conv2dAlgorithm::depthwise;
  Conv2dAlgorithm fastest = Conv2dAlgorithm::plain;
  double least = weight_plain_cycles(p, shape, limits);
  const auto consider = [&](Conv2dAlgorithm algorithm, double cycles) {
    if (cycles >= least) return;
    fastest = algorithm;
    least = cycles;
  };
  if (p.groups > 1 && depthwise_applies(shape)) {
    consider(Conv2dAlgorithm::depthwise, weight_depthwise_cycles(p, shape, limits));
  }
  if (gemm_applies(p, limits)) {
    const int tile = weight_gemm_tile(p, shape, limits);
    consider(Conv2dAlgorithm::implicit_gemm, weight_gemm_cycles(p, shape, limits, tile));
  }
  return fastest;
}

// The one that a policy names, where it takes the pass, and else the fastest.
Conv2dAlgorithm native_algorithm(const Conv2dProblem& p, Conv2dPass pass,
                                 const DeviceLimits& limits, Conv2dPolicy policy) {
  if (pass == Conv2dPass::bias_gradient) return Conv2dAlgorithm::sum;
  const PassShape shape = shape_of(p, pass);
  const bool of_weight = pass == Conv2dPass::weight_gradient;
  if (policy == Conv2dPolicy::direct) {
    return of_weight ? Conv2dAlgorithm::plain : Conv2dAlgorithm::direct;
  }
  if (policy == Conv2dPolicy::implicit_gemm && gemm_applies(p, limits)) {
    return Conv2dAlgorithm::implicit_gemm;
  }
  if (policy == Conv2dPolicy::depthwise && depthwise_applies(shape)) {
    return Conv2dAlgorithm::depthwise;
  }
  return of_weight ? fastest_of_weight(p, shape, limits) : fastest_of_pass(p, shape, pass, limits);
}

// ---- The sizes.

// As many parts as give each multiprocessor `blocks_each` blocks, where a part without them has
// `blocks`; within what a grid and a workspace hold, and none of fewer than `least` of `count`.
int parts_of(int64_t blocks, int64_t blocks_each, int64_t count, int64_t least, int64_t most,
             const DeviceLimits& limits) {
  const int64_t wanted = ceil_div(blocks_each * std::max(1, limits.multiprocessors), blocks);
  return static_cast<int>(
      std::clamp<int64_t>(std::min(wanted, count / least), 1, std::max<int64_t>(1, most)));
}

void size_weight_gradient(const Conv2dProblem& p, const DeviceLimits& limits, Conv2dPlan& plan) {
  constexpr int64_t kMostBytes = int64_t{64} << 20;  // of totals, where there is a choice
  constexpr int64_t kLeastPixels = 512;              // of a part
  const ConvolutionPass pass = forward_pass(p);
  const PassShape shape = forward_shape(p);
  int64_t blocks = shape.groups * shape.columns * shape.channels, blocks_each = 16;
  int64_t most = kMostBlocksYZ;
  if (plan.algorithm != Conv2dAlgorithm::depthwise) {
    int tile = kPlainTile;
    if (plan.algorithm == Conv2dAlgorithm::implicit_gemm) {
      tile = plan.gemm.tile = weight_gemm_tile(p, shape, limits);
      plan.gemm.contiguous = false;
      plan.gemm.products = products_of(p);
    }
    blocks = ceil_div(shape.columns, tile) * ceil_div(weight_columns(p), tile) * shape.groups;
    blocks_each = plan.algorithm == Conv2dAlgorithm::implicit_gemm ? 2 : 8;
    most = kMostBlocksYZ / shape.groups;
  }
  most = std::min(most, kMostBytes / weight_total_bytes(pass, 1, p.dtype));
  const int parts = parts_of(blocks, blocks_each, shape.pixels, kLeastPixels, most, limits);
  // Parts are whole slices, so that fewer may do.
  const int64_t pixels_of_part = std::max(1, positions_of_part(pass, parts));
  plan.parts = static_cast<int>(std::max<int64_t>(1, ceil_div(shape.pixels, pixels_of_part)));
  plan.workspace_bytes = weight_total_bytes(pass, plan.parts, p.dtype);
}

void size_bias_gradient(const Conv2dProblem& p, const DeviceLimits& limits, Conv2dPlan& plan) {
  constexpr int64_t kChannels = 32, kBlocksEach = 8;
  const int64_t images = std::max<int64_t>(1, p.batch);
  const int parts =
      parts_of(ceil_div(p.out_channels, kChannels), kBlocksEach, images, 1, kMostBlocksYZ, limits);
  plan.parts = static_cast<int>(ceil_div(images, ceil_div(images, parts)));
  plan.workspace_bytes = bias_total_bytes(p, plan.parts);
}

}  // namespace

Conv2dAlgorithm choose_conv2d(const Conv2dProblem& p, Conv2dPass pass, const DeviceLimits& limits,
                              Conv2dPolicy policy) {
  const Conv2dAlgorithm algorithm = native_algorithm(p, pass, limits, policy);
  const bool is_torchs =
      policy == Conv2dPolicy::automatic && torch_ratio(p, pass, algorithm, limits) < kClearlyFaster;
  return is_torchs ? Conv2dAlgorithm::aten : algorithm;
}

Conv2dPlan plan_conv2d(const Conv2dProblem& p, Conv2dPass pass, int64_t alignment,
                       const DeviceLimits& limits, Conv2dPolicy policy) {
  Conv2dPlan plan = {};
  plan.algorithm = choose_conv2d(p, pass, limits, policy);
  if (plan.algorithm == Conv2dAlgorithm::aten) {
    plan.torch_ratio = torch_ratio(p, pass, native_algorithm(p, pass, limits, policy), limits);
    return plan;
  }
  if (pass == Conv2dPass::bias_gradient) {
    size_bias_gradient(p, limits, plan);
    return plan;
  }
  if (pass == Conv2dPass::weight_gradient) {
    size_weight_gradient(p, limits, plan);
    return plan;
  }
  const ConvolutionPass of_kernel =
      pass == Conv2dPass::forward ? forward_pass(p) : input_gradient_pass(p);
  const int64_t bytes = element_size(p.dtype);
  if (plan.algorithm == Conv2dAlgorithm::implicit_gemm) {
    plan.gemm.tile = gemm_tile(p, shape_of(p, pass), limits);
    plan.gemm.contiguous = chunks_are_contiguous(of_kernel, bytes, alignment);
    plan.gemm.products = products_of(p);
    plan.workspace_bytes = packed_weight_bytes(of_kernel, bytes);
  } else if (plan.algorithm == Conv2dAlgorithm::depthwise) {
    plan.channels = depthwise_channels_apply(of_kernel, bytes, alignment);
  }
  return plan;
}

}  // namespace cnnkernels::cuda
