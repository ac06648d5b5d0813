#include "problems.h"

#include <cmath>
#include <sstream>
#include <utility>

namespace kernel_tests {

using namespace cnnkernels;

namespace {

Dims random_strides(Random& random, const Dims& shape) {
  std::vector<int> order = {0, 1, 2, 3};
  if (random.chance(60)) {
    for (int i = 3; i > 0; --i) std::swap(order[i], order[random.between(0, i)]);
  }
  return dense_strides(shape, order);
}

// One axis of a convolution. Padding may exceed the kernel, and differ before
// and after the image.
void random_conv2d_axis(Random& random, bool large_kernel, int64_t in, int64_t& out,
                        int64_t& kernel, int64_t& stride, int64_t& pad, int64_t& dilation) {
  kernel = large_kernel ? random.between(5, 9) : random.between(1, 4);
  stride = random.chance(50) ? 1 : random.between(1, 4);
  // A few so wide that taps lie further apart than a block of matrix tiles is long.
  dilation = random.chance(70)   ? 1
             : random.chance(85) ? random.between(2, 3)
                                 : random.between(9, 40);
  const int64_t most_padding = dilation > 3 ? dilation * (kernel - 1) : kernel;
  pad = random.chance(40) ? 0 : random.between(0, most_padding);
  if (random.chance(3)) {  // windows that lie in the padding alone
    pad = random.between(kernel, 60);
    stride = in + pad + random.between(0, 3);
  }
  const int64_t pad_after = random.chance(50) ? pad : random.between(0, most_padding);
  const int64_t room = in + pad + pad_after - dilation * (kernel - 1) - 1;
  out = room < 0 ? 0 : room / stride + 1;
}

// Few random problems have a 3x3 kernel and all else that Winograd's algorithm wants.
void make_winograd(Random& random, Conv2dProblem& p) {
  if (p.dtype == DType::float64) p.dtype = DType::float32;
  p.groups = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.kernel_height = p.kernel_width = 3;
  p.pad_top = random.between(0, 3);
  p.pad_left = random.between(0, 3);
  p.out_height = p.in_height + p.pad_top + random.between(0, 3) - 2;
  p.out_width = p.in_width + p.pad_left + random.between(0, 3) - 2;
}

// What matrix tiles read where it lies, forward or backward.
void make_pointwise_bfloat16(Random& random, Conv2dProblem& p) {
  p.dtype = DType::bfloat16;
  p.layout = Layout::nhwc;
  p.groups = random.between(1, 3);
  const int64_t whole = 32 * random.between(1, 2), any = random.between(1, 70);
  const bool forward = random.chance(50);
  p.in_channels = p.groups * (forward ? whole : any);
  p.out_channels = p.groups * (forward ? any : whole);
  p.kernel_height = p.kernel_width = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_left = 0;
  p.out_height = p.in_height;
  p.out_width = p.in_width;
}

Conv2dProblem draw_conv2d(Random& random) {
  Conv2dProblem p = {};
  p.dtype = random_dtype(random);
  p.layout = random.chance(50) ? Layout::nchw : Layout::nhwc;
  bool large_kernel = random.chance(5);
  int64_t group_in = random.chance(40) ? random.between(1, 3) : random.between(1, 10);
  int64_t group_out = random.chance(40) ? random.between(1, 3) : random.between(1, 14);
  p.groups = random.chance(60) ? 1 : random.between(2, 4);
  p.batch = random.chance(3) ? 0 : random.between(1, 3);
  p.in_height = random.between(1, 14);
  p.in_width = random.chance(50) ? random.between(1, 20) : random.between(10, 80);
  switch (random.between(0, 7)) {
    case 0:  // several chunks of images
      p.batch = random.between(10, 24);
      p.in_height = random.between(25, 40);
      p.in_width = random.between(25, 40);
      group_in = random.between(5, 16);
      group_out = random.between(1, 3);
      p.groups = 1;
      break;
    case 1:  // several blocks of channels
      group_in = random.between(20, 70);
      group_out = random.between(20, 60);
      break;
    case 2:  // depthwise
      p.groups = random.between(5, 40);
      group_in = group_out = random.chance(60) ? 1 : int64_t{1} << random.between(1, 3);
      break;
    case 3:  // more taps than are summed at once
      large_kernel = true;
      p.in_height = random.between(5, 24);
      p.in_width = random.between(5, 24);
      break;
    default:
      break;
  }
  p.in_channels = p.groups * group_in;
  p.out_channels = p.groups * group_out;
  random_conv2d_axis(random, large_kernel, p.in_height, p.out_height, p.kernel_height, p.stride_h,
                     p.pad_top, p.dilation_h);
  random_conv2d_axis(random, large_kernel, p.in_width, p.out_width, p.kernel_width, p.stride_w,
                     p.pad_left, p.dilation_w);
  if (random.chance(10) && p.in_height > 2 && p.in_width > 2) make_winograd(random, p);
  if (random.chance(6)) make_pointwise_bfloat16(random, p);
  const Dims shape = {p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width};
  const Dims strides = random.chance(30)   ? layout_strides(shape, Layout::nchw)
                       : random.chance(40) ? layout_strides(shape, Layout::nhwc)
                                           : random_strides(random, shape);
  p.weight_stride_k = strides[0];
  p.weight_stride_c = strides[1];
  p.weight_stride_r = strides[2];
  p.weight_stride_s = strides[3];
  return p;
}

// One axis of a pooling, as torch would make it; false if some window has no
// element inside of the image.
bool random_pool_axis(Random& random, int64_t in, int64_t max_kernel, int64_t& out, int64_t& kernel,
                      int64_t& stride, int64_t& pad, int64_t& dilation) {
  kernel = random.between(1, max_kernel);
  stride = random.chance(40) ? kernel : random.between(1, 4);
  dilation = random.chance(70) ? 1 : random.between(2, 3);
  pad = random.between(0, kernel / 2);
  const bool ceil_mode = random.chance(40);
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  if (room < 0) return false;
  out = room / stride + 1;
  if ((out - 1) * stride >= in + pad) --out;
  for (int64_t i = 0; i < out; ++i) {
    int64_t at = i * stride - pad;
    for (int64_t tap = 1; tap < kernel && at < 0; ++tap) at += dilation;
    if (at < 0 || at >= in) return false;
  }
  return out > 0;
}

// A pooling of the tensor that the first fields of `p` describe.
bool draw_windows(Random& random, MaxPool2dProblem& p) {
  const int64_t max_kernel = random.chance(5) ? 20 : 5;
  return random_pool_axis(random, p.in_height, max_kernel, p.out_height, p.kernel_height,
                          p.stride_h, p.pad_top, p.dilation_h) &&
         random_pool_axis(random, p.in_width, max_kernel, p.out_width, p.kernel_width, p.stride_w,
                          p.pad_left, p.dilation_w);
}

}  // namespace

Tensor random_tensor(Random& random, const Dims& shape, DType dtype, int64_t limit) {
  const double scale = dtype == DType::float64 ? 4097 : 0.25;
  Tensor tensor(shape);
  for (double& value : tensor.values) {
    value = scale * static_cast<double>(random.between(-limit, limit));
  }
  return tensor;
}

void add_specials(Random& random, Tensor& tensor, int64_t count) {
  const double specials[] = {kInfinity, -kInfinity, std::nan("")};
  const int64_t elements = element_count(tensor.shape);
  for (int64_t i = 0; i < count && elements > 0; ++i) {
    tensor[random.between(0, elements - 1)] = specials[random.between(0, 2)];
  }
}

DType random_dtype(Random& random) { return static_cast<DType>(random.between(0, 3)); }

// Most problems are far below kSerialMultiplyAdds, so that many fit in a second.
Conv2dProblem random_conv2d(Random& random) {
  const int64_t limit = random.chance(20) ? 6 * kSerialMultiplyAdds : kSerialMultiplyAdds / 4;
  const int64_t least = limit < kSerialMultiplyAdds ? 0 : kSerialMultiplyAdds;
  while (true) {
    const Conv2dProblem p = draw_conv2d(random);
    if (p.out_height < 1 || p.out_width < 1) continue;
    if (p.multiply_adds() >= least && p.multiply_adds() <= limit) return p;
  }
}

MaxPool2dProblem random_max_pool2d(Random& random) {
  MaxPool2dProblem p = {};
  do {
    p.dtype = random_dtype(random);
    p.layout = random.chance(50) ? Layout::nchw : Layout::nhwc;
    p.batch = random.chance(3) ? 0 : random.between(1, 3);
    p.channels = random.between(1, 40);
    p.in_height = random.between(1, 24);
    p.in_width = random.between(1, 40);
    if (random.chance(10)) {  // several bands of rows, and threads
      p.channels = random.between(1, 4);
      p.in_height = random.between(30, 60);
      p.in_width = random.between(200, 400);
    }
  } while (!draw_windows(random, p));
  return p;
}

Conv2dReluMaxPool2dProblem random_block(Random& random) {
  Conv2dReluMaxPool2dProblem p = {};
  MaxPool2dProblem& window = p.pool;
  bool fits = false;
  while (!fits) {
    p.conv = random_conv2d(random);
    window = {};
    window.batch = p.conv.batch;
    window.channels = p.conv.out_channels;
    window.in_height = p.conv.out_height;
    window.in_width = p.conv.out_width;
    window.dtype = p.conv.dtype;
    window.layout = p.conv.layout;
    if (random.chance(50)) {
      window.out_height = window.in_height / 2;
      window.out_width = window.in_width / 2;
      window.kernel_height = window.kernel_width = window.stride_h = window.stride_w = 2;
      window.dilation_h = window.dilation_w = 1;
      fits = window.out_height > 0 && window.out_width > 0;
    } else {
      fits = draw_windows(random, window);
    }
  }
  return p;
}

std::string describe(DType dtype, Layout layout) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  return std::string(names[static_cast<int>(dtype)]) + (layout == Layout::nchw ? " NCHW" : " NHWC");
}

std::string describe(const Conv2dProblem& p) {
  std::ostringstream text;
  text << "conv2d " << describe(p.dtype, p.layout) << " input " << p.batch << 'x' << p.in_channels
       << 'x' << p.in_height << 'x' << p.in_width << " output " << p.out_channels << 'x'
       << p.out_height << 'x' << p.out_width << " groups " << p.groups << " kernel "
       << p.kernel_height << 'x' << p.kernel_width << " stride " << p.stride_h << ',' << p.stride_w
       << " pad " << p.pad_top << ',' << p.pad_left << " dilation " << p.dilation_h << ','
       << p.dilation_w << " weight strides " << p.weight_stride_k << ',' << p.weight_stride_c << ','
       << p.weight_stride_r << ',' << p.weight_stride_s;
  return text.str();
}

std::string describe(const MaxPool2dProblem& p) {
  std::ostringstream text;
  text << "max_pool2d " << describe(p.dtype, p.layout) << " input " << p.batch << 'x' << p.channels
       << 'x' << p.in_height << 'x' << p.in_width << " output " << p.out_height << 'x'
       << p.out_width << " kernel " << p.kernel_height << 'x' << p.kernel_width << " stride "
       << p.stride_h << ',' << p.stride_w << " pad " << p.pad_top << ',' << p.pad_left
       << " dilation " << p.dilation_h << ',' << p.dilation_w;
  return text.str();
}

}  // namespace kernel_tests
