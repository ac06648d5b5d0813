// Which kernel pools a problem, and in what grid.
#include <algorithm>
#include <limits>

#include "kernels/cuda/max_pool2d.h"
#include "kernels/cuda/max_pool2d_kernels.h"

namespace cnnkernels::cuda {
namespace {

constexpr int64_t k32Bits = std::numeric_limits<int>::max();

// Planes are images of one channel. One channel in NHWC lies as in NCHW.
bool in_planes(const MaxPool2dProblem& p) { return p.layout == Layout::nchw || p.channels == 1; }

int64_t images(const MaxPool2dProblem& p) { return in_planes(p) ? p.batch * p.channels : p.batch; }

// The least power of two that is not less, but at most `most`, which is one.
unsigned power_of_two(int64_t value, unsigned most) {
  unsigned power = 1;
  while (power < value && power < most) power *= 2;
  return power;
}

// A thread's place in an image takes two divisions, which several images then share: so many times
// as many blocks as run at once are enough to fill the device evenly to the end.
constexpr int64_t kMostWaves = 4;

// Threads for images x pixels x channels (vectors of them, or strips for pixels). A block takes
// neighbours: channels first, as many pixels as fit, and images where these are few. Kernels go
// over the images that a grid does not hold.
LaunchGrid make_grid(int64_t image_count, int64_t pixels, int64_t channels,
                     const DeviceLimits& limits) {
  LaunchGrid grid;
  grid.block_x = power_of_two(channels, kPoolThreads);
  grid.block_y = power_of_two(pixels, kPoolThreads / grid.block_x);
  const unsigned left = kPoolThreads / (grid.block_x * grid.block_y);
  grid.block_z = power_of_two(image_count, std::min<unsigned>(left, kMostThreadsZ));
  grid.x = static_cast<unsigned>(ceil_div(pixels, grid.block_y));
  grid.z = static_cast<unsigned>(ceil_div(channels, grid.block_x));
  const int64_t most =
      std::max<int64_t>(1, kMostWaves * kPoolBlocks * limits.multiprocessors / grid.x / grid.z);
  grid.y =
      static_cast<unsigned>(std::min({kMostBlocksYZ, most, ceil_div(image_count, grid.block_z)}));
  return grid;
}

// Whether strips of `width` windows cover the rows of input and output, each from an address that
// its accesses may have.
bool strips_fit(const MaxPool2dProblem& p, int64_t width, int64_t alignment) {
  const int64_t access = std::min<int64_t>(kVectorBytes, 2 * width * element_size(p.dtype));
  return alignment >= access && p.out_width % width == 0 && p.in_width == 2 * p.out_width;
}

// 2x2 or 3x3 windows at stride 2, undilated, with the same padding of at most one on both axes.
bool halves(const MaxPool2dProblem& p) {
  return p.kernel_height == p.kernel_width && (p.kernel_width == 2 || p.kernel_width == 3) &&
         p.stride_h == 2 && p.stride_w == 2 && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.pad_top == p.pad_left && p.pad_left <= (p.kernel_width == 3 ? 1 : 0);
}

}  // namespace

PoolGeometry::PoolGeometry(const MaxPool2dProblem& p, bool clips)
    : images(cuda::images(p)),
      channels(in_planes(p) ? 1 : static_cast<int>(p.channels)),
      in_height(static_cast<int>(p.in_height)),
      in_width(static_cast<int>(p.in_width)),
      out_height(static_cast<int>(p.out_height)),
      out_width(static_cast<int>(p.out_width)),
      kernel_height(static_cast<int>(p.kernel_height)),
      kernel_width(static_cast<int>(p.kernel_width)),
      stride_h(static_cast<int>(p.stride_h)),
      stride_w(static_cast<int>(p.stride_w)),
      pad_top(static_cast<int>(p.pad_top)),
      pad_left(static_cast<int>(p.pad_left)),
      dilation_h(static_cast<int>(p.dilation_h)),
      dilation_w(static_cast<int>(p.dilation_w)),
      clipped_tap(clips ? static_cast<int>(p.no_winner()) : kWinnersTap) {}

std::string max_pool2d_not_native(const MaxPool2dProblem& p) {
  // Half of 32 bits: a window's end, and the next thread's pixel, are computed in them too.
  constexpr int64_t kMost = k32Bits / 2;
  const bool small =
      p.channels <= kMostBlocksYZ * kPoolThreads && p.in_height <= kMost / p.in_width &&
      p.out_height <= kMost / p.out_width &&
      p.in_height + p.pad_top + p.dilation_h * p.kernel_height + p.stride_h <= kMost &&
      p.in_width + p.pad_left + p.dilation_w * p.kernel_width + p.stride_w <= kMost;
  return small ? "" : "a plane, a window or channels larger than a grid of CUDA's";
}

MaxPool2dPlan plan_max_pool2d(const MaxPool2dProblem& p, int64_t alignment,
                              const DeviceLimits& limits) {
  MaxPool2dPlan plan;
  const int64_t outputs = p.out_height * p.out_width;
  const int64_t image_count = images(p);
  const int64_t channels = in_planes(p) ? 1 : p.channels;
  plan.each_window = make_grid(image_count, outputs, channels, limits);
  if (in_planes(p) && halves(p)) {
    for (int width = widest_strip(element_size(p.dtype)); width >= 1; width /= 2) {
      if (!strips_fit(p, width, alignment)) continue;
      plan.algorithm = "strips";
      plan.kind = PoolAlgorithm::strips;
      plan.width = width;
      plan.forward = make_grid(image_count, outputs / width, 1, limits);
      // A strip of windows has the gradients of two rows of the input.
      plan.backward =
          make_grid(image_count, ceil_div(p.in_height, 2) * (p.out_width / width), 1, limits);
      return plan;
    }
  }
  plan.algorithm = "windows";
  plan.kind = PoolAlgorithm::windows;
  const int64_t widest = kVectorBytes / element_size(p.dtype);
  const bool vectors = p.compact_argmax() && alignment >= kVectorBytes && channels % widest == 0;
  plan.width = static_cast<int>(vectors ? widest : 1);
  plan.forward = make_grid(image_count, outputs, channels / plan.width, limits);
  plan.backward = make_grid(image_count, p.in_height * p.in_width, channels / plan.width, limits);
  return plan;
}

}  // namespace cnnkernels::cuda
