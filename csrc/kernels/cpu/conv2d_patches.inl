// Convolution with few output pixels: a pixel is the product of its patch, all elements
// that it reads, with the weights, which are read once, where they lie.
//
// With few pixels a weight takes part in few products, and reading it is what a pass costs;
// a copy of the weights, as the other algorithms make, would cost several times that. The
// patches are copied instead, in the order in which a channel's weights lie, so that both
// are read by vectors. Forward, four channels by two pixels are dot products at once: eight
// chains of additions, as many as two units of a latency of four keep busy. The gradient of
// the patches adds up rows of weights, four vectors by two pixels at a time, and goes back
// to the image pixel by pixel; that of the weights is stored as it is computed.

#include "kernels/cpu/outer_product_tile.inl"
#include "kernels/cpu/widened_weights.inl"

constexpr int64_t kPatchChannels = 4, kPatchVectors = 4, kPatchPixels = 2;

// Calls body(source element, patch element) for those elements of an output pixel's patch
// that lie inside of the image; the source's are offsets from the start of the batch.
template <class Body>
void for_each_patch_element(const Conv2dProblem& p, int64_t pixel, Body&& body) {
  const PlaneSource image = plane_source(p.layout, p.in_channels, p.in_height, p.in_width);
  const int64_t x = pixel % p.out_width, y = pixel / p.out_width % p.out_height;
  const int64_t n = pixel / p.out_width / p.out_height;
  const bool planes = patch_order(p).planes;
  const int64_t taps = p.kernel_height * p.kernel_width;
  for (int64_t r = 0; r < p.kernel_height; ++r) {
    const int64_t row = y * p.stride_h - p.pad_top + r * p.dilation_h;
    if (row < 0 || row >= p.in_height) continue;
    for (int64_t s = 0; s < p.kernel_width; ++s) {
      const int64_t column = x * p.stride_w - p.pad_left + s * p.dilation_w;
      if (column < 0 || column >= p.in_width) continue;
      const int64_t tap = r * p.kernel_width + s;
      const int64_t at = n * image_stride(p.in_channels, p.in_height, p.in_width) +
                         row * image.row_stride + column * image.column_stride;
      for (int64_t c = 0; c < p.in_channels; ++c) {
        body(at + c * image.channel_stride, planes ? c * taps + tap : tap * p.in_channels + c);
      }
    }
  }
}

// Where the first channel of an output pixel lies.
inline int64_t output_at(const Conv2dProblem& p, const PlaneSource& plane, int64_t pixel) {
  const int64_t area = p.out_height * p.out_width;
  return pixel / area * image_stride(p.out_channels, p.out_height, p.out_width) +
         pixel % area / p.out_width * plane.row_stride + pixel % p.out_width * plane.column_stride;
}

struct PatchSizes {
  int64_t pixels;    // output pixels of the batch
  int64_t elements;  // of a patch
  int64_t padded;    // the same in whole vectors
};

template <class A>
PatchSizes patch_sizes(const Conv2dProblem& p) {
  const int64_t elements = p.in_channels * p.kernel_height * p.kernel_width;
  return {p.batch * p.out_height * p.out_width, elements, round_up(elements, kLanes<A>)};
}

// Patches as [pixel][element], zero outside of the image and in the padding.
template <class T>
void gather_patches(const Conv2dProblem& p, const PatchSizes& sizes, const void* input,
                    Accumulator<T>* to) {
  std::fill_n(to, sizes.pixels * sizes.padded, Accumulator<T>{0});
  for (int64_t pixel = 0; pixel < sizes.pixels; ++pixel, to += sizes.padded) {
    for_each_patch_element(p, pixel, [&](int64_t from, int64_t element) {
      to[element] = widen(static_cast<const T*>(input)[from]);
    });
  }
}

// Output gradients as [pixel][channel].
template <class T>
void gather_gradients(const Conv2dProblem& p, int64_t pixels, const void* grad_output,
                      Accumulator<T>* to) {
  const PlaneSource plane = plane_source(p.layout, p.out_channels, p.out_height, p.out_width);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const T* const from = static_cast<const T*>(grad_output) + output_at(p, plane, pixel);
    for (int64_t k = 0; k < p.out_channels; ++k) *to++ = widen(from[k * plane.channel_stride]);
  }
}

// a0 + a[half], b0 + b[half], a1 + a[half + 1], b1 + …
template <class A>
CNNK_INLINE Vec<A> add_halves(Vec<A> a, Vec<A> b) {
  Vec<A> low, high;
  interleave_at<A>(a, b, low, high, std::make_index_sequence<kLanes<A>>{});
  return low + high;
}

// The sums of the lanes of four vectors, all at once.
template <class A>
CNNK_INLINE void sum_lanes_of_four(const Vec<A> (&v)[4], A (&sums)[4]) {
  constexpr int lanes = kLanes<A>;
  if constexpr (lanes < 4) {
    for (int r = 0; r < 4; ++r) sums[r] = sum_lanes<A>(v[r]);
  } else {
    A parts[lanes];
    store(parts, add_halves<A>(add_halves<A>(v[0], v[2]), add_halves<A>(v[1], v[3])));
    for (int r = 0; r < 4; ++r) {
      sums[r] = parts[r];
      for (int i = 4; i < lanes; i += 4) sums[r] += parts[r + i];
    }
  }
}

// sums[pixel][channel] of four rows of weights and P patches.
template <class T, int P>
CNNK_INLINE void patch_dot_products(const T* const (&rows)[kPatchChannels],
                                    const Accumulator<T>* const (&patches)[P], int64_t elements,
                                    Accumulator<T> (&sums)[P][kPatchChannels]) {
  using A = Accumulator<T>;
  constexpr int R = kPatchChannels;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t whole = elements / lanes * lanes;
  const int64_t chain = chain_length(elements) * lanes;
  Vec<A> total[R][P] = {};
  for (int64_t begin = 0; begin < whole; begin += chain) {
    Vec<A> sum[R][P] = {};
    const int64_t end = std::min(whole, begin + chain);
    for (int64_t i = begin; i < end; i += lanes) {
      Vec<A> x[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) x[p] = load(patches[p] + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> w = load_widened(rows[r] + i);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sum[r][p] += w * x[p];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) total[r][p] += sum[r][p];
    }
  }
  for (int p = 0; p < P; ++p) {
    Vec<A> columns[R];
    for (int r = 0; r < R; ++r) {
      columns[r] = total[r][p];
      if (whole < elements) {
        columns[r] += load_head(rows[r] + whole, elements - whole) * load(patches[p] + whole);
      }
    }
    sum_lanes_of_four<A>(columns, sums[p]);
  }
}

// Calls body(first pixel, Constant<P>) for all pixels.
template <class Body>
CNNK_INLINE void for_each_pixel_pair(int64_t pixels, Body&& body) {
  int64_t p = 0;
  for (; p + kPatchPixels <= pixels; p += kPatchPixels) body(p, Constant<kPatchPixels>{});
  if (p < pixels) body(p, Constant<1>{});
}

template <class T>
void patches_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                     const void* input, const void* weight, const void* bias, void* output) {
  using A = Accumulator<T>;
  const PatchSizes sizes = patch_sizes<A>(problem);
  const Workspace workspace(sizes.pixels * sizes.padded * static_cast<int64_t>(sizeof(A)));
  A* const patches = workspace.as<A>();
  gather_patches<T>(problem, sizes, input, patches);
  const PlaneSource plane =
      plane_source(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const int64_t channels = problem.out_channels;
  parallel_for(
      pool, ceil_div(channels, kPatchChannels), plan.threads == 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin * kPatchChannels; k < std::min(channels, end * kPatchChannels);
             k += kPatchChannels) {
          const T* rows[kPatchChannels];
          for (int64_t r = 0; r < kPatchChannels; ++r) {
            rows[r] = static_cast<const T*>(weight) +
                      std::min(k + r, channels - 1) * problem.weight_stride_k;
          }
          for_each_pixel_pair(sizes.pixels, [&](int64_t first, auto count) {
            constexpr int P = decltype(count)::value;
            const A* from[P];
            for (int p = 0; p < P; ++p) from[p] = patches + (first + p) * sizes.padded;
            A sums[P][kPatchChannels];
            patch_dot_products(rows, from, sizes.elements, sums);
            for (int p = 0; p < P; ++p) {
              T* const to = static_cast<T*>(output) + output_at(problem, plane, first + p);
              for (int64_t r = 0; r < std::min(kPatchChannels, channels - k); ++r) {
                const A added = bias != nullptr ? widen(static_cast<const T*>(bias)[k + r]) : A{0};
                const A sum = sums[p][r] + added;
                to[(k + r) * plane.channel_stride] =
                    narrow<T>(problem.relu && sum <= 0 ? A{0} : sum);
              }
            }
          });
        }
      });
}

// Patches' gradients of elements [i, i + V * lanes), or up to `elements`: rows of weights
// times P pixels' gradients, of all channels.
template <class T, int V, int P>
CNNK_INLINE void patch_gradient_tile(const T* weight, int64_t row_step, int64_t channels, int64_t i,
                                     int64_t elements, const Accumulator<T>* gradients,
                                     Accumulator<T>* to, int64_t padded) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t chain = chain_length(channels);
  const bool whole = i + V * lanes <= elements;
  Vec<A> total[V][P] = {};
  for (int64_t begin = 0; begin < channels; begin += chain) {
    Vec<A> sum[V][P] = {};
    for (int64_t k = begin; k < std::min(channels, begin + chain); ++k) {
      const T* const row = weight + k * row_step + i;
      Vec<A> g[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) g[p] = broadcast(gradients[p * channels + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<A> w =
            V > 1 || whole ? load_widened(row + v * lanes) : load_head(row, elements - i);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sum[v][p] += w * g[p];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) total[v][p] += sum[v][p];
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int p = 0; p < P; ++p) store(to + p * padded + i + v * lanes, total[v][p]);
  }
}

template <class T>
void patches_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                            const ThreadPool& pool, const void* grad_output, const void* weight,
                            void* grad_input) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>, tile = kPatchVectors * lanes;
  const PatchSizes sizes = patch_sizes<A>(problem);
  const int64_t channels = problem.out_channels;
  const int64_t image_elements =
      problem.batch * image_stride(problem.in_channels, problem.in_height, problem.in_width);
  const int64_t sum_elements = std::is_same_v<T, A> ? 0 : image_elements;
  const Workspace workspace((sizes.pixels * (sizes.padded + channels) + sum_elements) *
                            static_cast<int64_t>(sizeof(A)));
  A* const patches = workspace.as<A>();
  A* const gradients = patches + sizes.pixels * sizes.padded;
  gather_gradients<T>(problem, sizes.pixels, grad_output, gradients);
  parallel_for(
      pool, ceil_div(sizes.elements, tile), plan.threads == 1, [&](int64_t begin, int64_t end) {
        const T* const rows = static_cast<const T*>(weight);
        const int64_t last = std::min(sizes.elements, end * tile);
        for_each_pixel_pair(sizes.pixels, [&](int64_t first, auto count) {
          constexpr int P = decltype(count)::value;
          const A* const from = gradients + first * channels;
          A* const to = patches + first * sizes.padded;
          int64_t i = begin * tile;
          for (; i + tile <= last; i += tile) {
            patch_gradient_tile<T, kPatchVectors, P>(rows, problem.weight_stride_k, channels, i,
                                                     sizes.elements, from, to, sizes.padded);
          }
          for (; i < last; i += lanes) {
            patch_gradient_tile<T, 1, P>(rows, problem.weight_stride_k, channels, i, sizes.elements,
                                         from, to, sizes.padded);
          }
        });
      });

  A* const sums =
      std::is_same_v<T, A> ? static_cast<A*>(grad_input) : gradients + sizes.pixels * channels;
  std::fill_n(sums, image_elements, A{0});
  for (int64_t pixel = 0; pixel < sizes.pixels; ++pixel) {
    const A* const patch = patches + pixel * sizes.padded;
    for_each_patch_element(problem, pixel,
                           [&](int64_t to, int64_t element) { sums[to] += patch[element]; });
  }
  if constexpr (!std::is_same_v<T, A>) {
    narrow_row<T>(sums, static_cast<T*>(grad_input), image_elements);
  }
}

template <class T>
void patches_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                             const ThreadPool& pool, const void* grad_output, const void* input,
                             void* grad_weight) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const PatchSizes sizes = patch_sizes<A>(problem);
  const int64_t channels = problem.out_channels;
  const Workspace workspace(sizes.pixels * (sizes.padded + channels) *
                            static_cast<int64_t>(sizeof(A)));
  A* const patches = workspace.as<A>();
  A* const gradients = patches + sizes.pixels * sizes.padded;
  gather_patches<T>(problem, sizes, input, patches);
  gather_gradients<T>(problem, sizes.pixels, grad_output, gradients);
  parallel_for(pool, channels, plan.threads == 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T* const to = static_cast<T*>(grad_weight) + k * problem.weight_stride_k;
      for (int64_t i = 0; i < sizes.elements; i += lanes) {
        Vec<A> sum{};
        for (int64_t p = 0; p < sizes.pixels; ++p) {
          sum += gradients[p * channels + k] * load(patches + p * sizes.padded + i);
        }
        const int64_t count = std::min(lanes, sizes.elements - i);
        count == lanes ? store_narrowed(to + i, sum) : store_head(to + i, sum, count);
      }
    }
  });
}
