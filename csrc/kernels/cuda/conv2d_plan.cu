// Which kernel computes a pass of a convolution, and how it is cut up.
//
// Host code. It stands among the kernels' sources because it asks them for what they need: the
// bytes of a workspace, and whether accesses of 16 bytes fit.
//
// A pass that several kernels take gets the one with the fewest cycles, by an estimate: products
// over the rate of the units that multiply, in waves of blocks over the multiprocessors, or bytes
// over the bandwidth, whichever is more. The automatic policy compares it with what torch takes, as
// it was measured or else by an estimate of the same kind, and leaves the pass to torch where the
// kernel is not ahead.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/conv2d.h"
#include "kernels/cuda/source_patch.h"

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

TensorProducts products_of(const Conv2dProblem& p) {
  return p.precision == Float32Precision::high ? TensorProducts::tf32 : TensorProducts::exact_parts;
}

bool multiplies_parts(const Conv2dProblem& p) {
  return p.dtype == DType::float32 && products_of(p) == TensorProducts::exact_parts;
}

// mma.sync with asynchronous copies; there is none of float64 here. Products of parts are as near
// to float64 as a chain of floats from some ten products a sum on: shorter ones round less often.
bool gemm_applies(const Conv2dProblem& p, const PassShape& shape, Conv2dPass pass,
                  const DeviceLimits& limits) {
  constexpr double kLeastProducts = 16;
  const double products = pass == Conv2dPass::weight_gradient
                              ? static_cast<double>(shape.pixels)
                              : static_cast<double>(shape.channels) * shape.taps;
  const bool is_exact = !multiplies_parts(p) || products >= kLeastProducts;
  return limits.compute_capability >= 80 && p.dtype != DType::float64 && is_exact;
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

// ---- Estimates, in cycles of a multiprocessor. Rates are products a cycle.

// Reference: CUDA C++ Programming Guide, "Arithmetic Instructions".
double multiply_add_rate(const Conv2dProblem& p, const DeviceLimits& limits) {
  const int capability = limits.compute_capability;
  if (p.dtype == DType::float64) {
    return capability == 80 ? 32 : capability == 90 || capability == 100 ? 64 : 2;
  }
  return capability <= 80 ? 64 : 128;
}

// Of 16-bit types, in whatever instructions.
double full_tensor_rate(const DeviceLimits& limits) {
  const int capability = limits.compute_capability;
  return capability >= 90 && capability < 120 ? 2048 : capability == 80 ? 1024 : 512;
}

double torch_tensor_rate(const Conv2dProblem& p, const DeviceLimits& limits) {
  return full_tensor_rate(limits) / (p.dtype == DType::float32 ? 2 : 1);
}

double tensor_rate(const Conv2dProblem& p, const DeviceLimits& limits) {
  // mma.sync gets about 63% of Hopper's rate.
  const int capability = limits.compute_capability;
  const double rate = full_tensor_rate(limits) * (capability >= 90 && capability < 120 ? 0.63 : 1);
  if (p.dtype != DType::float32) return rate;
  return products_of(p) == TensorProducts::tf32 ? rate / 2 : rate / 6;
}

// What kernels reach of these rates.
constexpr double kDirectShare = 0.5;
constexpr double kPlainShare = 0.15;
constexpr double kWeightShare = 0.4;  // of the weight gradient on tensor cores
// Of channels that do not lie together: they come through registers, once for all taps of a patch.
constexpr double kGatheredShare = 0.9, kGatheredPointwiseShare = 0.7;

struct GemmTile {
  int rows, columns;
  double share;  // larger tiles read less of shared memory for a product
};
constexpr GemmTile kGemmTiles[] = {{64, 64, 0.35}, {128, 64, 0.5}, {128, 128, 0.6}};

// What a launch costs a device that has nothing else to do.
constexpr double kLaunchCycles = 2500;

double gemm_share(const Conv2dProblem& p) {
  if (p.layout == Layout::nhwc) return 1;
  return p.kernel_height * p.kernel_width > 1 ? kGatheredShare : kGatheredPointwiseShare;
}

// Blocks of so many products each. A multiprocessor with one or two of them waits for their loads.
double product_cycles(double blocks, double products, double rate, const DeviceLimits& limits) {
  const double each = std::ceil(blocks / std::max(1, limits.multiprocessors));
  const double waiting = each <= 1 ? 1.6 : each <= 2 ? 1.2 : 1;
  return each * waiting * products / rate;
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
  return kLaunchCycles +
         std::max(
             product_cycles(blocks, products, kDirectShare * multiply_add_rate(p, limits), limits),
             byte_cycles(shape.bytes, limits));
}

// Products are of two chunks of channels at a time.
int64_t filled_up(const Conv2dProblem& p, int64_t channels) {
  return round_up(channels, 2 * kVectorBytes / element_size(p.dtype));
}

double gemm_cycles(const Conv2dProblem& p, const PassShape& shape, const DeviceLimits& limits,
                   const GemmTile& tile) {
  const double blocks = blocks_of(shape.pixels, tile.rows) *
                        blocks_of(shape.columns, tile.columns) * static_cast<double>(shape.groups);
  const double products =
      static_cast<double>(int64_t{tile.rows} * tile.columns * filled_up(p, shape.channels)) *
      shape.taps;
  const double rate = tile.share * gemm_share(p) * tensor_rate(p, limits);
  // Weights that do not lie as they are read are packed by a launch of their own.
  const int launches = p.layout == Layout::nhwc ? 1 : 2;
  return launches * kLaunchCycles +
         std::max(product_cycles(blocks, products, rate, limits), byte_cycles(shape.bytes, limits));
}

// The sums and parts of 128 x 128 results are more registers than a thread has.
GemmTile gemm_tile(const Conv2dProblem& p, const PassShape& shape, const DeviceLimits& limits) {
  const bool parts = multiplies_parts(p);
  GemmTile best = kGemmTiles[0];
  for (const GemmTile& tile : kGemmTiles) {
    if (parts && tile.columns > 64) continue;
    if (gemm_cycles(p, shape, limits, tile) < gemm_cycles(p, shape, limits, best)) best = tile;
  }
  return best;
}

// Bound by its bytes.
double depthwise_cycles(const PassShape& shape, const DeviceLimits& limits) {
  constexpr double kShare = 0.7;  // of the bandwidth
  return kLaunchCycles + byte_cycles(shape.bytes, limits) / kShare;
}

// The weight gradient: output channels by weights of one, over all pixels. Parts of the pixels fill
// the device, so that there are no waves; a second launch adds them up.
double weight_cycles(const PassShape& shape, const DeviceLimits& limits, int64_t row_tile,
                     int64_t channel_tile, double rate) {
  const double products = static_cast<double>(round_up(shape.columns, row_tile)) *
                          static_cast<double>(round_up(shape.channels, channel_tile)) * shape.taps *
                          static_cast<double>(shape.pixels * shape.groups);
  return 2 * kLaunchCycles + std::max(products / rate / std::max(1, limits.multiprocessors),
                                      byte_cycles(shape.bytes, limits));
}

double weight_plain_cycles(const Conv2dProblem& p, const PassShape& shape,
                           const DeviceLimits& limits) {
  return weight_cycles(shape, limits, 32, 1, kPlainShare * multiply_add_rate(p, limits));
}

double weight_gemm_cycles(const Conv2dProblem& p, const PassShape& shape,
                          const DeviceLimits& limits) {
  return weight_cycles(shape, limits, 32, 8, kWeightShare * gemm_share(p) * tensor_rate(p, limits));
}

// ---- What torch takes.

// What cuDNN reaches of all tensor cores' rate; on an H100 0.3 with 64 channels.
double torch_tensor_share(const PassShape& shape) {
  const int64_t channels = std::min(shape.columns, shape.channels);
  return channels <= 64 ? 0.35 : channels <= 128 ? 0.45 : 0.6;
}

// Its kernels read NHWC; in NCHW, and where they use tensor cores, source and result are copied
// before and behind, and a bias is an addition of its own. On an H100 these two took twice and
// three times as long as their bytes.
double torch_cycles(const Conv2dProblem& p, const PassShape& shape, Conv2dPass pass,
                    Conv2dAlgorithm algorithm, const DeviceLimits& limits) {
  constexpr double kMultiplyAddShare = 0.7, kDepthwiseShare = 0.5;
  constexpr double kCopyShare = 0.5, kBiasShare = 0.4;
  const bool tensor_cores = p.dtype != DType::float64 &&
                            (p.dtype != DType::float32 || products_of(p) == TensorProducts::tf32);
  const double bytes = byte_cycles(shape.bytes, limits);
  double cycles = kLaunchCycles;
  if (algorithm == Conv2dAlgorithm::depthwise) {
    cycles += bytes / kDepthwiseShare;
  } else {
    const double rate = tensor_cores ? torch_tensor_share(shape) * torch_tensor_rate(p, limits)
                                     : kMultiplyAddShare * multiply_add_rate(p, limits);
    constexpr int64_t kRows = 128, kColumns = 64;
    const double blocks = blocks_of(shape.pixels, kRows) * blocks_of(shape.columns, kColumns) *
                          static_cast<double>(shape.groups);
    const double products =
        static_cast<double>(kRows * kColumns * round_up(shape.channels, 8)) * shape.taps;
    cycles += std::max(product_cycles(blocks, products, rate, limits), bytes);
    if (tensor_cores && p.layout == Layout::nchw)
      cycles += 2 * (kLaunchCycles + bytes / kCopyShare);
  }
  if (pass == Conv2dPass::forward) {
    const double result = static_cast<double>(shape.pixels * shape.columns * shape.groups) *
                          static_cast<double>(element_size(p.dtype));
    cycles += kLaunchCycles + byte_cycles(2 * result, limits) / kBiasShare;
  }
  return cycles;
}

// ---- What was measured.

enum class ShapeClass : uint8_t { first_layer, other };
enum class Precision : uint8_t { half, tf32, full };  // 16-bit types; float32 in either way

struct Measurement {
  ShapeClass shape;
  Precision precision;
  Layout layout;
  Conv2dPass pass;
  Conv2dAlgorithm algorithm;
  float ratio;  // torch's time over the kernel's
};

// Of one H200, cuDNN 9.19 with benchmark=True, and for devices of its kind: the direct kernel
// before it could pool or store vectors, which these layers do not. What has no row here goes by
// the estimates: the other kernels have changed since they were measured.
constexpr int kMeasuredCapability = 90;
constexpr Measurement kMeasured[] = {
    {ShapeClass::first_layer, Precision::half, Layout::nchw, Conv2dPass::forward,
     Conv2dAlgorithm::direct, 1.5f},
    {ShapeClass::first_layer, Precision::full, Layout::nchw, Conv2dPass::forward,
     Conv2dAlgorithm::direct, 1.5f},
};

// What the kernel has to be ahead of torch by, where neither was measured.
constexpr float kMargin = 1.1f;

Precision precision_of(const Conv2dProblem& p) {
  if (p.dtype != DType::float32) return Precision::half;
  return products_of(p) == TensorProducts::tf32 ? Precision::tf32 : Precision::full;
}

ShapeClass class_of(const Conv2dProblem& p) {
  // Larger kernels are another matter.
  return is_first_layer(p) && p.kernel_height * p.kernel_width <= 25 ? ShapeClass::first_layer
                                                                     : ShapeClass::other;
}

struct TorchRatio {
  float ratio;  // torch's time over the kernel's
  bool measured;

  bool is_ahead() const { return ratio >= (measured ? 1 : kMargin); }
};

TorchRatio torch_ratio(const Conv2dProblem& p, Conv2dPass pass, Conv2dAlgorithm algorithm,
                       double cycles, const DeviceLimits& limits) {
  for (const Measurement& row : kMeasured) {
    if (limits.compute_capability == kMeasuredCapability && row.shape == class_of(p) &&
        row.precision == precision_of(p) && row.layout == p.layout && row.pass == pass &&
        row.algorithm == algorithm) {
      return {row.ratio, true};
    }
  }
  const double torchs = torch_cycles(p, shape_of(p, pass), pass, algorithm, limits);
  return {static_cast<float>(torchs / cycles), false};
}

// ---- The choice.

struct Choice {
  Conv2dAlgorithm algorithm;
  double cycles;
};

Choice cheaper(Choice a, Choice b) { return b.cycles < a.cycles ? b : a; }

Choice fastest_of_pass(const Conv2dProblem& p, const PassShape& shape, Conv2dPass pass,
                       const DeviceLimits& limits) {
  const Choice depthwise = {Conv2dAlgorithm::depthwise, depthwise_cycles(shape, limits)};
  if (one_channel_a_group(shape) && depthwise_applies(shape)) return depthwise;
  Choice fastest = {Conv2dAlgorithm::direct, direct_cycles(p, shape, limits)};
  if (gemm_applies(p, shape, pass, limits)) {
    const GemmTile tile = gemm_tile(p, shape, limits);
    fastest =
        cheaper(fastest, {Conv2dAlgorithm::implicit_gemm, gemm_cycles(p, shape, limits, tile)});
  }
  return fastest;
}

Choice fastest_of_weight(const Conv2dProblem& p, const PassShape& shape,
                         const DeviceLimits& limits) {
  constexpr Conv2dPass pass = Conv2dPass::weight_gradient;
  const Choice depthwise = {Conv2dAlgorithm::depthwise, depthwise_cycles(shape, limits)};
  if (one_channel_a_group(shape) && depthwise_applies(shape)) return depthwise;
  Choice fastest = {Conv2dAlgorithm::plain, weight_plain_cycles(p, shape, limits)};
  if (gemm_applies(p, shape, pass, limits)) {
    fastest =
        cheaper(fastest, {Conv2dAlgorithm::implicit_gemm, weight_gemm_cycles(p, shape, limits)});
  }
  return fastest;
}

// The one that a policy names, where it takes the pass, and else the fastest.
Choice native_choice(const Conv2dProblem& p, Conv2dPass pass, const DeviceLimits& limits,
                     Conv2dPolicy policy) {
  if (pass == Conv2dPass::bias_gradient) return {Conv2dAlgorithm::sum, 0};
  const PassShape shape = shape_of(p, pass);
  const bool of_weight = pass == Conv2dPass::weight_gradient;
  if (policy == Conv2dPolicy::direct) {
    return {of_weight ? Conv2dAlgorithm::plain : Conv2dAlgorithm::direct, 0};
  }
  if (policy == Conv2dPolicy::implicit_gemm && gemm_applies(p, shape, pass, limits)) {
    return {Conv2dAlgorithm::implicit_gemm, 0};
  }
  if (policy == Conv2dPolicy::depthwise && depthwise_applies(shape)) {
    return {Conv2dAlgorithm::depthwise, 0};
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

constexpr int64_t kMostTotalBytes = int64_t{64} << 20;  // of parts, where there is a choice

void size_weight_gradient(const Conv2dProblem& p, int64_t alignment, const DeviceLimits& limits,
                          Conv2dPlan& plan) {
  const ConvolutionPass pass = forward_pass(p);
  if (plan.algorithm == Conv2dAlgorithm::implicit_gemm) {
    plan.weight = choose_weight_gradient(pass, p.dtype, products_of(p), alignment, limits);
    plan.parts = plan.weight.parts;
    // A patch that no block holds.
    if (plan.weight.results == 0) {
      plan.weight = {};
      plan.algorithm = Conv2dAlgorithm::plain;
    }
  }
  if (plan.algorithm == Conv2dAlgorithm::depthwise) {
    plan.parts = depthwise_weight_parts(p.dtype, pass, limits.multiprocessors);
  } else if (plan.algorithm == Conv2dAlgorithm::plain) {
    constexpr int64_t kLeastPixels = 512, kTile = 32, kBlocksEach = 8;
    const PassShape shape = forward_shape(p);
    const int64_t columns = shape.channels * pass.kernel_taps();
    const int64_t blocks = ceil_div(shape.columns, kTile) * ceil_div(columns, kTile) * shape.groups;
    const int64_t most = std::min(kMostBlocksYZ / shape.groups,
                                  kMostTotalBytes / weight_total_bytes(pass, 1, p.dtype));
    const int parts = parts_of(blocks, kBlocksEach, shape.pixels, kLeastPixels, most, limits);
    // Parts are whole slices, so that fewer may do.
    const int64_t pixels_of_part = std::max(1, positions_of_part(pass, parts));
    plan.parts = static_cast<int>(std::max<int64_t>(1, ceil_div(shape.pixels, pixels_of_part)));
  }
  plan.workspace_bytes = weight_total_bytes(pass, plan.parts, p.dtype);
}

// The tile of an implicit matrix product, and where tensors lie: a smaller tile where a block does
// not hold the larger one's patch, and direct where it holds none.
void size_gemm(const Conv2dProblem& p, const PassShape& shape, const ConvolutionPass& pass,
               const MaxPool2dProblem* pool, int64_t alignment, const DeviceLimits& limits,
               Conv2dPlan& plan) {
  const GemmTile best = gemm_tile(p, shape, limits);
  for (const GemmTile& tile : {best, kGemmTiles[0]}) {
    plan.gemm = make_gemm_choice(pass, p.dtype, tile.rows, tile.columns, products_of(p), alignment);
    if (gemm_shared_bytes(pass, p.dtype, plan.gemm, pool) <= limits.shared_bytes_per_block) {
      if (plan.gemm.packs_weights) {
        plan.workspace_bytes = packed_weight_bytes(pass, element_size(p.dtype));
      }
      return;
    }
  }
  plan.gemm = {};
  plan.algorithm = Conv2dAlgorithm::direct;
}

void size_bias_gradient(const Conv2dProblem& p, const DeviceLimits& limits, Conv2dPlan& plan) {
  constexpr int64_t kChannels = 32, kBlocksEach = 8;
  const int64_t images = std::max<int64_t>(1, p.batch);
  const int parts =
      parts_of(ceil_div(p.out_channels, kChannels), kBlocksEach, images, 1, kMostBlocksYZ, limits);
  plan.parts = static_cast<int>(ceil_div(images, ceil_div(images, parts)));
  plan.workspace_bytes = bias_total_bytes(p, plan.parts);
}

// Fused, windows that overlap are convolved twice where tiles meet, and the convolution's result is
// neither written nor read.
bool fusing_pays(const Conv2dReluMaxPool2dProblem& block, const Choice& native,
                 const DeviceLimits& limits) {
  const Conv2dProblem& p = block.conv;
  const double repeated = block.pool.kernel_height == 3 ? 1.4 : 1;
  const double convolved = static_cast<double>(p.batch * p.out_channels) *
                           static_cast<double>(p.out_height * p.out_width * element_size(p.dtype));
  const double fused = native.cycles * repeated;
  double composed = native.cycles + kLaunchCycles + byte_cycles(1.5 * convolved, limits);
  const TorchRatio ratio =
      torch_ratio(p, Conv2dPass::forward, native.algorithm, native.cycles, limits);
  if (!ratio.is_ahead()) {
    const double relu = kLaunchCycles + byte_cycles(2 * convolved, limits);  // torch's own
    composed += native.cycles * (static_cast<double>(ratio.ratio) - 1) + relu;
  }
  return fused <= composed;
}

// An empty batch is explained as one image is, and never launched.
Conv2dProblem never_empty(Conv2dProblem p) {
  p.batch = std::max<int64_t>(1, p.batch);
  return p;
}

}  // namespace

Conv2dAlgorithm choose_conv2d(const Conv2dProblem& problem, Conv2dPass pass,
                              const DeviceLimits& limits, Conv2dPolicy policy) {
  const Conv2dProblem p = never_empty(problem);
  const Choice native = native_choice(p, pass, limits, policy);
  if (policy != Conv2dPolicy::automatic || native.algorithm == Conv2dAlgorithm::sum) {
    return native.algorithm;
  }
  const TorchRatio ratio = torch_ratio(p, pass, native.algorithm, native.cycles, limits);
  return ratio.is_ahead() ? native.algorithm : Conv2dAlgorithm::aten;
}

Conv2dPlan plan_conv2d(const Conv2dProblem& problem, Conv2dPass pass, int64_t alignment,
                       const DeviceLimits& limits, Conv2dPolicy policy) {
  const Conv2dProblem p = never_empty(problem);
  Conv2dPlan plan = {};
  plan.algorithm = choose_conv2d(p, pass, limits, policy);
  if (plan.algorithm == Conv2dAlgorithm::aten) {
    const Choice native = native_choice(p, pass, limits, policy);
    const TorchRatio ratio = torch_ratio(p, pass, native.algorithm, native.cycles, limits);
    plan.torch_ratio = ratio.ratio;
    plan.measured = ratio.measured;
    return plan;
  }
  plan.alignment = alignment;
  if (pass == Conv2dPass::bias_gradient) {
    size_bias_gradient(p, limits, plan);
    return plan;
  }
  if (pass == Conv2dPass::weight_gradient) {
    size_weight_gradient(p, alignment, limits, plan);
    return plan;
  }
  const ConvolutionPass of_kernel =
      pass == Conv2dPass::forward ? forward_pass(p) : input_gradient_pass(p);
  if (policy == Conv2dPolicy::wgmma && wgmma_applies(of_kernel, p.dtype, alignment, limits)) {
    plan.algorithm = Conv2dAlgorithm::wgmma;
    plan.workspace_bytes = packed_weight_bytes(of_kernel, element_size(p.dtype));
  } else if (plan.algorithm == Conv2dAlgorithm::implicit_gemm) {
    size_gemm(p, shape_of(p, pass), of_kernel, nullptr, alignment, limits, plan);
  }
  return plan;
}

BlockPlan plan_block(const Conv2dReluMaxPool2dProblem& block, int64_t alignment,
                     const DeviceLimits& limits, Conv2dPolicy policy) {
  const Conv2dProblem p = never_empty(block.conv);
  BlockPlan plan = {};
  plan.reason = conv2d_not_native(p);
  if (!plan.reason.empty()) return plan;
  const Conv2dPolicy native = policy == Conv2dPolicy::automatic ? Conv2dPolicy::native : policy;
  const Choice choice = native_choice(p, Conv2dPass::forward, limits, native);
  if (!pools_in_block(block.pool)) {
    plan.reason = "windows of a pooling other than 2x2 and 3x3 at stride 2";
  } else if (choice.algorithm == Conv2dAlgorithm::depthwise) {
    plan.reason = "depthwise kernels do not pool";
  } else if (policy == Conv2dPolicy::automatic && !fusing_pays(block, choice, limits)) {
    plan.reason = "one after the other they are estimated to take less";
  }
  plan.fused = plan.reason.empty();
  if (!plan.fused) return plan;
  plan.conv.algorithm = choice.algorithm;
  plan.conv.alignment = alignment;
  if (choice.algorithm == Conv2dAlgorithm::implicit_gemm) {
    size_gemm(p, shape_of(p, Conv2dPass::forward), forward_pass(p), &block.pool, alignment, limits,
              plan.conv);
  }
  return plan;
}

}  // namespace cnnkernels::cuda
