#include "plan_tests.h"

#include <limits>
#include <sstream>

#include "kernels/cuda/gradient_step.h"
#include "kernels/cuda/max_pool2d.h"
#include "problems.h"

namespace cuda_kernel_tests {
namespace {

using namespace cnnkernels;
using cuda::DeviceLimits;
using cuda::LaunchGrid;
using kernel_tests::expect;
using kernel_tests::Random;
using kernel_tests::set_context;

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

}  // namespace cuda_kernel_tests
