#include "plan_tests.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "kernels/cuda/conv2d.h"
#include "kernels/cuda/gradient_step.h"
#include "kernels/cuda/max_pool2d.h"
#include "kernels/cuda/source_patch.h"
#include "problems.h"
#include "reference.h"

namespace cuda_kernel_tests {
namespace {

using namespace cnnkernels;
using cuda::Conv2dAlgorithm;
using cuda::Conv2dPass;
using cuda::Conv2dPlan;
using cuda::Conv2dPolicy;
using cuda::DeviceLimits;
using cuda::LaunchGrid;
using kernel_tests::expect;
using kernel_tests::expect_holds;
using kernel_tests::Memory;
using kernel_tests::Random;
using kernel_tests::set_context;
using kernel_tests::Tensor;

// What the package is built for, and one that is not known.
constexpr int kCapabilities[] = {75, 80, 86, 87, 89, 90, 100, 103, 120, 121, 130};

// Evenly in its logarithm, so that every magnitude comes up.
int64_t of_any_size(Random& random, int bits) {
  const int64_t low = int64_t{1} << random.between(0, bits - 1);
  return random.between(low, 2 * low - 1);
}

void check_grid(const LaunchGrid& grid) {
  expect(grid.x >= 1 && grid.x <= cuda::kMostBlocksX, "blocks in x");
  expect(grid.y >= 1 && grid.y <= cuda::kMostBlocksYZ, "blocks in y");
  expect(grid.z >= 1 && grid.z <= cuda::kMostBlocksYZ, "blocks in z");
  expect(grid.threads() >= 1 && grid.threads() <= cuda::kPoolThreads, "threads of a block");
  expect(static_cast<int>(grid.block_z) <= cuda::kMostThreadsZ, "threads in z");
}

// Every pixel and channel has a thread; images may be gone over.
void check_covers(const LaunchGrid& grid, int64_t images, int64_t pixels, int64_t channels) {
  check_grid(grid);
  expect(int64_t{grid.x} * grid.block_y >= pixels, "every pixel has a thread");
  expect(int64_t{grid.z} * grid.block_x >= channels, "every channel has a thread");
  expect(int64_t{grid.x - 1} * grid.block_y < pixels, "no block has no pixel");
  expect(int64_t{grid.z - 1} * grid.block_x < channels, "no block has no channel");
  expect(int64_t{grid.y - 1} * grid.block_z < images, "no block has no image");
}

// An axis of a pooling of any size, as torch would make it.
void draw_axis(Random& random, int64_t& in, int64_t& out, int64_t& kernel, int64_t& stride,
               int64_t& pad, int64_t& dilation) {
  kernel = random.chance(80) ? random.between(1, 5) : random.between(1, 300);
  stride = random.chance(50) ? 2 : random.between(1, 5);
  dilation = random.chance(70) ? 1 : random.between(2, 4);
  pad = random.between(0, kernel / 2);
  in = random.chance(15) ? random.between(1, 2) : of_any_size(random, 17);
  in += dilation * (kernel - 1);
  out = (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

MaxPool2dProblem pooling_of_any_size(Random& random) {
  MaxPool2dProblem p = {};
  p.dtype = kernel_tests::random_dtype(random);
  p.layout = random.chance(50) ? Layout::nchw : Layout::nhwc;
  p.batch = of_any_size(random, 12);
  p.channels = random.chance(50) ? 8 * of_any_size(random, 8) : of_any_size(random, 12);
  draw_axis(random, p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top,
            p.dilation_h);
  draw_axis(random, p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left, p.dilation_w);
  if (random.chance(5)) p.in_height = p.out_height = int64_t{1} << random.between(24, 34);
  if (random.chance(5)) p.channels = int64_t{1} << random.between(20, 34);
  if (random.chance(30)) {  // the windows of strips, or nearly so
    p.kernel_height = p.kernel_width = random.between(2, 3);
    p.stride_h = p.stride_w = 2;
    p.dilation_h = p.dilation_w = 1;
    p.pad_top = p.pad_left = random.between(0, p.kernel_width - 2);
    p.in_height = of_any_size(random, 12) + 2;
    p.in_width = 2 * random.between(1, 200);
    p.out_height = (p.in_height + 2 * p.pad_top - p.kernel_height) / 2 + 1;
    p.out_width = p.in_width / 2;
    if (random.chance(40)) {
      int64_t* const fields[] = {&p.kernel_height, &p.stride_h,   &p.stride_w, &p.pad_top,
                                 &p.dilation_h,    &p.dilation_w, &p.in_width, &p.kernel_width};
      *fields[random.between(0, 7)] += 1;
    }
  }
  return p;
}

constexpr Conv2dPass kPasses[] = {Conv2dPass::forward, Conv2dPass::input_gradient,
                                  Conv2dPass::weight_gradient, Conv2dPass::bias_gradient};
constexpr Conv2dPolicy kPolicies[] = {Conv2dPolicy::automatic, Conv2dPolicy::native,
                                      Conv2dPolicy::direct,    Conv2dPolicy::implicit_gemm,
                                      Conv2dPolicy::depthwise, Conv2dPolicy::wgmma};

DeviceLimits any_device(Random& random) {
  DeviceLimits limits = cuda::architecture_limits(kCapabilities[random.between(0, 10)]);
  limits.multiprocessors = static_cast<int>(random.between(1, 200));
  return limits;
}

void set_dense_weight(Conv2dProblem& p) {
  p.weight_stride_s = 1;
  p.weight_stride_r = p.kernel_width;
  p.weight_stride_c = p.kernel_height * p.kernel_width;
  p.weight_stride_k = p.weight_stride_c * (p.in_channels / p.groups);
}

// First layers, dense, pointwise, depthwise and grouped ones.
Conv2dProblem convolution_of_any_size(Random& random) {
  Conv2dProblem p = {};
  p.dtype = kernel_tests::random_dtype(random);
  p.layout = random.chance(50) ? Layout::nchw : Layout::nhwc;
  p.precision = random.chance(50) ? Float32Precision::high : Float32Precision::highest;
  p.batch = random.chance(5) ? 0 : of_any_size(random, 9);
  p.groups = random.chance(60) ? 1 : of_any_size(random, random.chance(5) ? 18 : 10);
  p.in_channels = p.groups * (random.chance(40) ? random.between(1, 8) : of_any_size(random, 12));
  p.out_channels = p.groups * (random.chance(40) ? random.between(1, 8) : of_any_size(random, 12));
  if (random.chance(3)) p.in_channels *= of_any_size(random, 12);
  if (random.chance(3)) p.out_channels *= of_any_size(random, 12);
  const auto draw = [&](int64_t& in, int64_t& out, int64_t& kernel, int64_t& stride, int64_t& pad,
                        int64_t& dilation) {
    kernel = random.chance(30)   ? 1
             : random.chance(90) ? random.between(2, 7)
                                 : random.between(8, 20);
    stride = random.chance(60) ? 1 : random.between(2, 5);
    dilation = random.chance(80) ? 1 : random.between(2, 4);
    pad = random.between(0, kernel);
    if (random.chance(4)) {  // taps far apart, about a small image
      dilation = of_any_size(random, 13);
      pad = (dilation * (kernel - 1) + 1) / 2;
      in = random.between(1, 8);
      out = (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
      return;
    }
    in = of_any_size(random, random.chance(5) ? 16 : 9) + dilation * (kernel - 1);
    out = (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
  };
  draw(p.in_height, p.out_height, p.kernel_height, p.stride_h, p.pad_top, p.dilation_h);
  draw(p.in_width, p.out_width, p.kernel_width, p.stride_w, p.pad_left, p.dilation_w);
  set_dense_weight(p);
  return p;
}

bool same(const cuda::GemmChoice& a, const cuda::GemmChoice& b) {
  return a.rows == b.rows && a.columns == b.columns && a.products == b.products &&
         a.contiguous == b.contiguous && a.aligned == b.aligned &&
         a.packs_weights == b.packs_weights;
}

bool same(const cuda::WeightGradientChoice& a, const cuda::WeightGradientChoice& b) {
  return a.products == b.products && a.gradient_contiguous == b.gradient_contiguous &&
         a.source_contiguous == b.source_contiguous && a.row_warps == b.row_warps &&
         a.column_warps == b.column_warps && a.results == b.results && a.parts == b.parts;
}

bool same(const Conv2dPlan& a, const Conv2dPlan& b) {
  return a.algorithm == b.algorithm && a.torch_ratio == b.torch_ratio && a.measured == b.measured &&
         a.alignment == b.alignment && same(a.gemm, b.gemm) && same(a.weight, b.weight) &&
         a.parts == b.parts && a.workspace_bytes == b.workspace_bytes;
}

bool within(int64_t x, int64_t y, int64_t z) {
  return x >= 1 && x <= cuda::kMostBlocksX && y >= 1 && y <= cuda::kMostBlocksYZ && z >= 1 &&
         z <= cuda::kMostBlocksYZ;
}

// The grid of a forward pass, an input gradient or a block, and what its kernel asks for.
void check_pass_plan(const Conv2dProblem& p, const Conv2dPlan& plan, cuda::ConvolutionPass pass,
                     const MaxPool2dProblem* pool, int64_t alignment, const DeviceLimits& limits) {
  const int64_t bytes = element_size(p.dtype);
  switch (plan.algorithm) {
    case Conv2dAlgorithm::direct:
      expect(within(cuda::number_tiles(pass, 256), ceil_div(pass.result_channels, 8), pass.groups),
             "the grid of the direct kernel");
      expect(plan.workspace_bytes == 0, "it has no workspace");
      break;
    case Conv2dAlgorithm::implicit_gemm: {
      expect(p.dtype != DType::float64, "float64 has no tensor cores");
      const cuda::GemmChoice& gemm = plan.gemm;
      expect((gemm.rows == 64 && gemm.columns == 64) ||
                 (gemm.rows == 128 && (gemm.columns == 64 || gemm.columns == 128)),
             "a tile that there is");
      expect(
          (gemm.products == cuda::TensorProducts::tf32) == (p.precision == Float32Precision::high),
          "products are as exact as asked for");
      expect(gemm.columns == 64 || p.dtype != DType::float32 ||
                 gemm.products == cuda::TensorProducts::tf32,
             "parts fit registers");
      expect(!gemm.contiguous || (p.layout == Layout::nhwc && alignment >= cuda::kVectorBytes),
             "chunks are contiguous where channels are");
      expect(
          plan.workspace_bytes == (gemm.packs_weights ? cuda::packed_weight_bytes(pass, bytes) : 0),
          "packed weights fit");
      expect(cuda::gemm_shared_bytes(pass, p.dtype, gemm, pool) <= limits.shared_bytes_per_block,
             "a block's shared memory is there");
      const cuda::SourcePatch patch = cuda::make_source_patch(pass, gemm.rows, pool);
      expect(patch.results > 0 && patch.results <= gemm.rows, "a tile has no more rows");
      expect(within(patch.tiles, ceil_div(pass.result_channels, gemm.columns), pass.groups),
             "the grid of the implicit GEMM");
      break;
    }
    case Conv2dAlgorithm::wgmma:
      expect(cuda::wgmma_applies(pass, p.dtype, alignment, limits), "products that there are");
      expect(cuda::chunks_are_contiguous(pass, bytes, alignment), "of chunks that a copy takes");
      expect(plan.workspace_bytes == cuda::packed_weight_bytes(pass, bytes), "packed weights fit");
      break;
    case Conv2dAlgorithm::depthwise:
      expect(pass.source_channels * pass.kernel_taps() <= cuda::kMostDepthwiseWeights,
             "weights fit in shared memory");
      expect(within(cuda::number_tiles(pass, 4), int64_t{pass.groups} * pass.result_channels, 1),
             "the grid of the depthwise kernels");
      break;
    default:
      expect(false, "an algorithm of a pass");
  }
}

void check_weight_plan(const Conv2dProblem& p, const Conv2dPlan& plan, const DeviceLimits& limits) {
  const cuda::ConvolutionPass pass = cuda::forward_pass(p);
  const int64_t columns = int64_t{pass.kernel_taps()} * pass.source_channels;
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  expect(plan.parts >= 1 && plan.parts <= cuda::kMostBlocksYZ, "parts");
  if (plan.algorithm == Conv2dAlgorithm::implicit_gemm) {
    const cuda::SourcePatch patch = cuda::make_source_patch(pass, plan.weight.results, nullptr);
    expect(plan.parts <= patch.tiles, "a part has a tile");
  } else {
    const int64_t of_part = cuda::positions_of_part(pass, plan.parts);
    expect(plan.parts * of_part >= pixels, "parts cover all pixels");
    expect(plan.parts == 1 || (plan.parts - 1) * of_part < pixels, "no part is empty");
  }
  expect(plan.workspace_bytes == cuda::weight_total_bytes(pass, plan.parts, p.dtype), "totals fit");
  expect(plan.parts == 1 || plan.workspace_bytes <= (int64_t{64} << 20), "totals are bounded");
  int64_t tile = 32;
  switch (plan.algorithm) {
    case Conv2dAlgorithm::depthwise:
      expect(
          within(int64_t{pass.groups} * pass.result_channels * pass.source_channels, plan.parts, 1),
          "the grid of the depthwise kernel");
      return;
    case Conv2dAlgorithm::implicit_gemm: {
      expect(p.dtype != DType::float64, "float64 has no tensor cores");
      const auto shared = cuda::weight_gradient_shared_bytes(pass, p.dtype, plan.weight);
      expect(shared.has_value() && *shared <= limits.shared_bytes_per_block,
             "a block's shared memory is there");
      return;
    }
    default:
      expect(plan.algorithm == Conv2dAlgorithm::plain, "an algorithm of a weight gradient");
  }
  expect(within(ceil_div(pass.result_channels, tile), ceil_div(columns, tile),
                int64_t{pass.groups} * plan.parts),
         "the grid of a weight gradient");
}

void check_bias_plan(const Conv2dProblem& p, const Conv2dPlan& plan) {
  expect(plan.algorithm == Conv2dAlgorithm::sum, "the algorithm of a bias gradient");
  expect(within(ceil_div(p.out_channels, 32), plan.parts, 1), "the grid of a bias gradient");
  expect(plan.parts <= std::max<int64_t>(1, p.batch), "a part has an image");
  expect(plan.workspace_bytes == cuda::bias_total_bytes(p, plan.parts), "totals fit");
}

}  // namespace

void check_architectures() {
  for (const int capability : kCapabilities) {
    set_context("compute capability " + std::to_string(capability));
    const DeviceLimits limits = cuda::architecture_limits(capability);
    expect(limits.compute_capability == capability, "it is kept");
    expect(limits.threads_per_multiprocessor % cuda::kStepThreads == 0, "whole blocks fill it");
    expect(
        limits.shared_bytes_per_block >= 48 * 1024 && limits.shared_bytes_per_block <= 227 * 1024,
        "shared memory");
  }
  set_context("the emulated device");
  DeviceLimits limits;
  expect(cuda::device_limits(0, &limits) == cuda::kSuccess, "it has limits");
  const DeviceLimits known = cuda::architecture_limits(90);
  expect(limits.compute_capability == 90 && limits.multiprocessors == 132 &&
             limits.threads_per_multiprocessor == known.threads_per_multiprocessor &&
             limits.shared_bytes_per_block == known.shared_bytes_per_block,
         "they are the architecture's");
  expect(cuda::device_limits(7, &limits) != cuda::kSuccess, "there is no other");
  expect(std::string(cuda::error_name(1)) == "cudaErrorInvalidValue", "errors have names");
}

void check_step_plan(Random& random) {
  DeviceLimits limits = cuda::architecture_limits(kCapabilities[random.between(0, 10)]);
  limits.multiprocessors = static_cast<int>(random.between(1, 200));
  const DType dtype = kernel_tests::random_dtype(random);
  std::vector<int64_t> counts(
      static_cast<size_t>(random.between(0, random.chance(20) ? 2000 : 80)));
  const int bits = random.chance(10) ? 45 : static_cast<int>(random.between(1, 26));
  for (int64_t& count : counts) count = random.chance(10) ? 0 : of_any_size(random, bits);
  std::ostringstream context;
  context << "plan of " << counts.size() << " tensors of up to " << bits << " bits count on "
          << limits.multiprocessors << " multiprocessors";
  set_context(context.str());

  const auto plan = cuda::plan_gradient_step(counts, dtype, limits);
  const int vector = 16 / static_cast<int>(element_size(dtype));
  expect(plan.chunk > 0 && plan.chunk % (vector * cuda::kStepThreads) == 0,
         "a chunk is whole vectors");
  if (bits < 30) expect(plan.chunk <= 8 * vector * cuda::kStepThreads, "a block ends soon");
  size_t next = 0;
  int64_t total = 0, blocks = 0;
  for (const cuda::StepLaunch& part : plan.launches) {
    for (; next < part.begin; ++next) expect(counts[next] == 0, "what is left out is empty");
    expect(part.begin == next && part.end > part.begin && part.end <= counts.size(), "in order");
    expect(part.end - part.begin <= size_t{cuda::kMostStepTensors}, "what a launch takes");
    expect(part.few == (part.end - part.begin <= size_t{cuda::kFewStepTensors}), "few are few");
    int64_t chunks = 0;
    for (size_t i = part.begin; i < part.end; ++i) {
      chunks += ceil_div(counts[i], plan.chunk);
      total += counts[i];
    }
    expect(chunks == part.blocks && part.blocks >= 1, "a block a chunk");
    blocks += part.blocks;
    next = part.end;
  }
  for (; next < counts.size(); ++next) expect(counts[next] == 0, "what is left out is empty");
  // Small lists are spread: no thread has more than is under way while a multiprocessor has none.
  if (blocks < limits.multiprocessors && total > 0) {
    expect(plan.chunk == 2 * vector * cuda::kStepThreads, "a small list is spread over the device");
  }
}

void check_pool_plan(Random& random) {
  const MaxPool2dProblem p = pooling_of_any_size(random);
  const int64_t alignment = int64_t{1} << random.between(element_size(p.dtype) == 8 ? 3 : 2, 5);
  set_context("plan of " + kernel_tests::describe(p) + " aligned to " + std::to_string(alignment));
  if (!cuda::max_pool2d_not_native(p).empty()) {
    expect(p.in_height > (1 << 29) / p.in_width || p.out_height > (1 << 29) / p.out_width ||
               p.channels > (1 << 23),
           "only huge problems are refused");
    return;
  }
  DeviceLimits limits = cuda::architecture_limits(kCapabilities[random.between(0, 10)]);
  limits.multiprocessors = static_cast<int>(random.between(1, 200));
  // What kernels compute in 32 bits.
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  expect(p.in_height * p.in_width <= kMost && p.out_height * p.out_width <= kMost &&
             p.in_height + p.pad_top + p.kernel_height * p.dilation_h + p.stride_h <= kMost &&
             p.in_width + p.pad_left + p.kernel_width * p.dilation_w + p.stride_w <= kMost,
         "positions fit");
  const cuda::MaxPool2dPlan plan = cuda::plan_max_pool2d(p, alignment, limits);
  const bool planes = p.layout == Layout::nchw || p.channels == 1;
  const int64_t images = planes ? p.batch * p.channels : p.batch;
  const int64_t channels = planes ? 1 : p.channels;
  check_covers(plan.each_window, images, p.out_height * p.out_width, channels);
  if (plan.kind == cuda::PoolAlgorithm::strips) {
    expect(planes && p.in_width == 2 * p.out_width && p.out_width % plan.width == 0,
           "strips cover whole rows");
    expect(
        p.kernel_height == p.kernel_width && p.stride_h == 2 && p.stride_w == 2 &&
            p.dilation_h == 1 && p.dilation_w == 1 && p.pad_top == p.pad_left &&
            ((p.kernel_width == 2 && p.pad_left == 0) || (p.kernel_width == 3 && p.pad_left <= 1)),
        "strips are of 2x2 and 3x3 windows at stride 2");
    // What a strip reads and writes begins at a multiple of its accesses.
    const int64_t bytes = 2 * plan.width * element_size(p.dtype);
    expect(alignment >= std::min<int64_t>(bytes, 16), "strips are aligned");
    expect(p.in_width * element_size(p.dtype) % std::min<int64_t>(bytes, 16) == 0,
           "rows keep strips aligned");
    check_covers(plan.forward, images, p.out_height * (p.out_width / plan.width), 1);
    check_covers(plan.backward, images, ceil_div(p.in_height, 2) * (p.out_width / plan.width), 1);
    return;
  }
  expect(channels % plan.width == 0, "vectors cover all channels");
  if (plan.width > 1) {
    expect(plan.width * element_size(p.dtype) == 16 && alignment >= 16, "vectors are aligned");
    expect(p.compact_argmax(), "argmaxes of vectors are bytes");
  }
  check_covers(plan.forward, images, p.out_height * p.out_width, channels / plan.width);
  check_covers(plan.backward, images, p.in_height * p.in_width, channels / plan.width);
}

void check_conv2d_plan(Random& random) {
  const Conv2dProblem p = convolution_of_any_size(random);
  const int64_t alignment = int64_t{1} << random.between(element_size(p.dtype) == 8 ? 3 : 1, 4);
  const DeviceLimits limits = any_device(random);
  if (!cuda::conv2d_not_native(p).empty()) {
    expect(p.batch * p.in_height * p.in_width > (1 << 29) || p.in_channels > (1 << 18) ||
               p.out_channels > (1 << 18) || p.groups > (1 << 15) || p.stride_h * p.stride_w > 16 ||
               p.kernel_height * p.kernel_width > 200 ||
               p.kernel_height * p.kernel_width * (p.in_channels / p.groups) > (1 << 20) ||
               p.pad_top + p.kernel_height * p.dilation_h > 16383 ||
               p.pad_left + p.kernel_width * p.dilation_w > 16383,
           "only huge problems are refused");
    return;
  }
  for (const Conv2dPolicy policy : kPolicies) {
    for (const Conv2dPass pass : kPasses) {
      std::ostringstream context;
      context << "plan of " << kernel_tests::describe(p) << " pass " << static_cast<int>(pass)
              << " by " << cuda::policy_name(policy) << " aligned to " << alignment << " on "
              << limits.compute_capability << " with " << limits.multiprocessors;
      set_context(context.str());
      const Conv2dPlan plan = cuda::plan_conv2d(p, pass, alignment, limits, policy);
      expect(same(plan, cuda::plan_conv2d(p, pass, alignment, limits, policy)), "plans are pure");
      const Conv2dAlgorithm choice = cuda::choose_conv2d(p, pass, limits, policy);
      const bool of_weight = pass == Conv2dPass::weight_gradient;
      const bool too_large =
          choice == Conv2dAlgorithm::implicit_gemm &&
          plan.algorithm == (of_weight ? Conv2dAlgorithm::plain : Conv2dAlgorithm::direct);
      expect(plan.algorithm == choice || too_large || plan.algorithm == Conv2dAlgorithm::wgmma,
             "and so is a choice");
      expect(plan.algorithm != Conv2dAlgorithm::wgmma || policy == Conv2dPolicy::wgmma,
             "warpgroup products only by name");
      if (p.batch == 0) continue;  // which is planned, for explain, and never launched
      if (plan.algorithm == Conv2dAlgorithm::aten) {
        expect(policy == Conv2dPolicy::automatic, "torch is chosen where it may be");
        expect(plan.torch_ratio > 0 && plan.torch_ratio < 1.1f, "where it is faster");
        continue;
      }
      expect(plan.algorithm != Conv2dAlgorithm::implicit_gemm || limits.compute_capability >= 80,
             "tensor cores that there are");
      switch (pass) {
        case Conv2dPass::forward:
          check_pass_plan(p, plan, cuda::forward_pass(p), nullptr, alignment, limits);
          break;
        case Conv2dPass::input_gradient:
          check_pass_plan(p, plan, cuda::input_gradient_pass(p), nullptr, alignment, limits);
          break;
        case Conv2dPass::weight_gradient:
          check_weight_plan(p, plan, limits);
          break;
        default:
          check_bias_plan(p, plan);
      }
      const bool of_bias = pass == Conv2dPass::bias_gradient;
      const bool has_direct = pass == Conv2dPass::forward || pass == Conv2dPass::input_gradient;
      if (policy == Conv2dPolicy::direct && has_direct) {
        expect(plan.algorithm == Conv2dAlgorithm::direct, "direct is forced");
      }
      if (policy == Conv2dPolicy::implicit_gemm && !of_bias && p.dtype != DType::float64 &&
          limits.compute_capability >= 80) {
        // Products of parts are for sums of some length.
        const int64_t taps = p.kernel_height * p.kernel_width, pixels = p.out_height * p.out_width;
        const bool may_be_short = p.dtype == DType::float32 &&
                                  p.precision == Float32Precision::highest &&
                                  (p.in_channels / p.groups * taps < 16 || p.batch * pixels < 16 ||
                                   p.out_channels / p.groups * taps < 16 * p.stride_h * p.stride_w);
        expect(plan.algorithm == Conv2dAlgorithm::implicit_gemm || too_large || may_be_short,
               "implicit GEMM is forced");
      }
      if (p.groups > 1 && p.groups == p.in_channels && p.groups == p.out_channels && !of_bias &&
          (policy == Conv2dPolicy::native || policy == Conv2dPolicy::depthwise)) {
        expect(plan.algorithm == Conv2dAlgorithm::depthwise, "depthwise layers are depthwise");
      }
    }
  }
}

void check_block_plan(Random& random) {
  Conv2dReluMaxPool2dProblem block;
  block.conv = convolution_of_any_size(random);
  const Conv2dProblem& p = block.conv;
  const bool is_native = cuda::conv2d_not_native(p).empty();
  MaxPool2dProblem& pool = block.pool;
  pool = {};
  pool.batch = p.batch;
  pool.channels = p.out_channels;
  pool.in_height = p.out_height;
  pool.in_width = p.out_width;
  pool.kernel_height = pool.kernel_width = random.between(1, 4);
  pool.pad_top = pool.pad_left = random.between(0, pool.kernel_width / 2);
  pool.dilation_h = pool.dilation_w = 1;
  pool.stride_h = pool.stride_w = random.chance(80) ? 2 : random.between(1, 3);
  pool.dtype = p.dtype;
  pool.layout = p.layout;
  const auto windows = [&](int64_t size, int64_t& stride) {
    const int64_t count = (size + 2 * pool.pad_top - pool.kernel_height) / stride + 1;
    if (count == 1) stride = 1;  // as operators make it
    return count;
  };
  if (p.out_height + 2 * pool.pad_top < pool.kernel_height ||
      p.out_width + 2 * pool.pad_left < pool.kernel_width) {
    return;
  }
  pool.out_height = windows(p.out_height, pool.stride_h);
  pool.out_width = windows(p.out_width, pool.stride_w);
  const int64_t alignment = int64_t{1} << random.between(element_size(p.dtype) == 8 ? 3 : 1, 4);
  const DeviceLimits limits = any_device(random);
  for (const Conv2dPolicy policy : kPolicies) {
    set_context("plan of " + kernel_tests::describe(p) + " then " + kernel_tests::describe(pool) +
                " by " + cuda::policy_name(policy));
    const cuda::BlockPlan plan = cuda::plan_block(block, alignment, limits, policy);
    const cuda::BlockPlan again = cuda::plan_block(block, alignment, limits, policy);
    expect(plan.fused == again.fused && plan.reason == again.reason && same(plan.conv, again.conv),
           "plans are pure");
    expect(plan.fused == plan.reason.empty(), "there is a reason");
    expect(is_native || !plan.fused, "a convolution that no kernel takes is torch's");
    if (!plan.fused || p.batch == 0) continue;
    expect(cuda::pools_in_block(pool), "blocks pool windows that they hold");
    expect(plan.conv.algorithm == Conv2dAlgorithm::direct ||
               plan.conv.algorithm == Conv2dAlgorithm::implicit_gemm,
           "by kernels that pool");
    check_pass_plan(p, plan.conv, cuda::forward_pass(p), &pool, alignment, limits);
    const cuda::SourcePatch patch = cuda::make_source_patch(cuda::forward_pass(p), 256, &pool);
    expect(patch.results > 0 && patch.results <= 256 && patch.tiles <= cuda::kMostBlocksX,
           "a tile of the direct kernel");
  }
}

void check_conv2d_policies() {
  set_context("policies of convolutions");
  for (const Conv2dPolicy policy : kPolicies) {
    const auto choice = cuda::choose_conv2d_policy(cuda::policy_name(policy));
    expect(choice.policy == policy && choice.note.empty(), "their names are understood");
  }
  expect(cuda::choose_conv2d_policy("Implicit_GEMM").policy == Conv2dPolicy::implicit_gemm,
         "in any letters");
  for (const char* const nothing : {static_cast<const char*>(nullptr), ""}) {
    const auto choice = cuda::choose_conv2d_policy(nothing);
    expect(choice.policy == Conv2dPolicy::automatic && choice.note.empty(), "none is automatic");
  }
  const auto choice = cuda::choose_conv2d_policy("winograd");
  expect(choice.policy == Conv2dPolicy::automatic, "another is automatic");
  expect(choice.note.find("CNNKERNELS_CUDA_CONV2D=winograd") == 0, "and there is a note of it");
}

void check_planned_conv2d(Random& random) {
  constexpr int64_t kMostProducts = 100000;
  Conv2dProblem p;
  do {
    p = kernel_tests::random_conv2d(random);
  } while (p.batch == 0 || p.multiply_adds() > kMostProducts ||
           !cuda::conv2d_not_native(p).empty());
  p.relu = random.chance(40);
  const Conv2dPolicy policy = kPolicies[random.between(1, 5)];
  const DeviceLimits limits = any_device(random);
  set_context(kernel_tests::describe(p) + " by " + cuda::policy_name(policy));
  const auto element = kernel_tests::element_of(p.dtype);
  const auto placement =
      random.chance(80) ? Memory::Placement::aligned : Memory::Placement::unaligned;
  const int64_t alignment =
      placement == Memory::Placement::aligned ? cuda::kVectorBytes : element_size(p.dtype);
  const kernel_tests::Dims vector = {1, 1, 1, 1}, bias_shape = {p.out_channels, 1, 1, 1},
                           weight_strides = {p.weight_stride_k, p.weight_stride_c,
                                             p.weight_stride_r, p.weight_stride_s};
  const auto numbers = [&](const kernel_tests::Dims& shape) {
    return kernel_tests::random_tensor(random, shape, p.dtype);
  };
  const Tensor input = numbers({p.batch, p.in_channels, p.in_height, p.in_width});
  const Tensor weight =
      numbers({p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width});
  const Tensor bias = numbers(bias_shape);
  const Tensor grad_output = numbers({p.batch, p.out_channels, p.out_height, p.out_width});
  Tensor output = kernel_tests::conv2d(p, input, weight, &bias);
  if (p.relu) output = kernel_tests::relu(output);
  const auto gradients = kernel_tests::conv2d_gradients(p, grad_output, input, weight);

  const auto strides = [&](const Tensor& t) {
    return kernel_tests::layout_strides(t.shape, p.layout);
  };
  const Memory x(element, input, strides(input), placement);
  const Memory w(element, weight, weight_strides, placement);
  const Memory b(element, bias, vector, placement);
  const Memory g(element, grad_output, strides(grad_output), placement);
  // Each pass has a workspace of exactly as many bytes as its plan says.
  const auto check = [&](Conv2dPass pass, const Tensor& expected, const kernel_tests::Dims& lies,
                         const char* what, auto&& run) {
    const Conv2dPlan plan = cuda::plan_conv2d(p, pass, alignment, limits, policy);
    const Memory result(element, expected.shape, lies, placement);
    const Memory workspace(kernel_tests::Element::uint8, {plan.workspace_bytes, 1, 1, 1}, vector,
                           Memory::Placement::aligned);
    expect(run(plan, result.data(), workspace.data()) == cuda::kSuccess, "it is launched");
    expect_holds(result, expected, std::string(what) + " by " + algorithm_name(plan.algorithm));
    expect(workspace.guards_intact(), "the workspace is large enough");
  };
  check(Conv2dPass::forward, output, strides(output), "output",
        [&](const Conv2dPlan& plan, void* result, void* workspace) {
          return cuda::conv2d_forward(p, plan, x.data(), w.data(), b.data(), result, workspace,
                                      nullptr);
        });
  check(Conv2dPass::input_gradient, gradients.input, strides(input), "gradient of the input",
        [&](const Conv2dPlan& plan, void* result, void* workspace) {
          return cuda::conv2d_input_gradient(p, plan, g.data(), w.data(), result, workspace,
                                             nullptr);
        });
  check(Conv2dPass::weight_gradient, gradients.weight, weight_strides, "gradient of the weight",
        [&](const Conv2dPlan& plan, void* result, void* workspace) {
          return cuda::conv2d_weight_gradient(p, plan, g.data(), x.data(), result, workspace,
                                              nullptr);
        });
  check(Conv2dPass::bias_gradient, gradients.bias, vector, "gradient of the bias",
        [&](const Conv2dPlan& plan, void* result, void* workspace) {
          return cuda::conv2d_bias_gradient(p, plan, g.data(), result, workspace, nullptr);
        });
}

}  // namespace cuda_kernel_tests
