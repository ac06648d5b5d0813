// Winograd's minimal filtering F(2x2, 3x3).
//
// A tile of 2x2 results of a 3x3 kernel takes 36 products, or, of a transformed 4x4
// patch of the source and a transformed kernel, 16: 2.25 times fewer (A. Lavin, S. Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2015, section 4.1). The 16
// positions of a patch are 16 matrix products of (tiles x source channels) and
// (source channels x result channels), which outer_product_block computes; vectors lie
// along the channels throughout. Transforms only add: the error grows by little, and
// less than by a chain of products.
//
// A task transforms its tiles, multiplies them position by position, so that one
// position's weights stay in the cache for all of them, and transforms back. Float
// images in channels_last are read and written where they lie; others go through a
// window, a vector of channels of a row of tiles, as floats in channels_last.
//
// Sums of a patch spread what is infinite or NaN in one pixel over results that do not
// read it, so that a result that is not finite asks for another algorithm.

#include "kernels/cpu/conv2d_outer_product_block.inl"

constexpr int64_t kPatch = 4, kPositions = kPatch * kPatch, kTileSize = 2;

// B^T d along one axis of a patch.
CNNK_INLINE void transform_source(Vec<float>& d0, Vec<float>& d1, Vec<float>& d2, Vec<float>& d3) {
  const Vec<float> t1 = d1 + d2, t2 = d2 - d1;
  d0 -= d2;
  d3 = d1 - d3;
  d1 = t1;
  d2 = t2;
}

// Pixels of channels in memory: what patches are read from and results written to.
template <class Float>
struct PixelView {
  Float* data;
  int64_t channels, height, width;
};

// A vector of channels from c on of the patch at (y, x), zero outside of the view,
// transformed and stored `position_step` apart.
template <bool Inside>
CNNK_INLINE void transform_patch(const PixelView<const float>& source, int64_t y, int64_t x,
                                 int64_t c, float* to, int64_t position_step) {
  const int64_t count = std::min<int64_t>(kLanes<float>, source.channels - c);
  Vec<float> d[kPatch][kPatch];
#pragma GCC unroll 4
  for (int64_t i = 0; i < kPatch; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kPatch; ++j) {
      const bool inside =
          Inside || (y + i >= 0 && y + i < source.height && x + j >= 0 && x + j < source.width);
      const float* const from =
          source.data + ((y + i) * source.width + x + j) * source.channels + c;
      d[i][j] = !inside                  ? Vec<float>{}
                : count == kLanes<float> ? load(from)
                                         : load_head(from, count);
    }
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < kPatch; ++i) transform_source(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma GCC unroll 4
  for (int64_t j = 0; j < kPatch; ++j) {
    transform_source(d[0][j], d[1][j], d[2][j], d[3][j]);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kPatch; ++i) store(to + (i * kPatch + j) * position_step, d[i][j]);
  }
}

// Fills a window of `rows` rows and `columns` columns at (y, x) with a vector of channels
// from c on, zero outside of the image.
inline void fill_window(const WinogradImages& images, const void* data, int64_t image, int64_t y,
                        int64_t x, int64_t rows, int64_t columns, int64_t c, float* window) {
  constexpr int64_t lanes = kLanes<float>;
  const PlaneSource plane =
      plane_source(images.layout, images.channels, images.height, images.width);
  const int64_t count = std::min(lanes, images.channels - c);
  const int64_t begin = std::clamp<int64_t>(-x, 0, columns);
  const int64_t end = std::clamp<int64_t>(images.width - x, begin, columns);
  with_storage<float>(images.dtype, [&](auto element) {
    const auto* const first = static_cast<const decltype(element)*>(data) +
                              image * image_stride(images.channels, images.height, images.width) +
                              c * plane.channel_stride;
    for (int64_t i = 0; i < rows; ++i, window += columns * lanes) {
      const bool inside = y + i >= 0 && y + i < images.height;
      for (int64_t j = 0; j < columns; ++j) {
        if (!inside || j < begin || j >= end) store(window + j * lanes, Vec<float>{});
      }
      if (!inside) continue;
      const auto* const row = first + (y + i) * plane.row_stride + x * plane.column_stride;
      if (plane.channel_stride == 1) {
        for (int64_t j = begin; j < end; ++j) {
          const auto* const from = row + j * plane.column_stride;
          store(window + j * lanes, count == lanes ? load_widened(from) : load_head(from, count));
        }
        continue;
      }
      for (int64_t j = begin; j < end; j += lanes) {
        const int64_t pixels = std::min(lanes, end - j);
        Vec<float> square[lanes];
        for (int64_t l = 0; l < lanes; ++l) {
          const auto* const from = row + l * plane.channel_stride + j;
          square[l] = l >= count        ? Vec<float>{}
                      : pixels == lanes ? load_widened(from)
                                        : load_head(from, pixels);
        }
        transpose<float>(square);
        for (int64_t p = 0; p < pixels; ++p) store(window + (j + p) * lanes, square[p]);
      }
    }
  });
}

// Writes a window of results, of which the image has rows and columns up to its end.
inline void write_window(const WinogradImages& images, void* data, int64_t image, int64_t y,
                         int64_t x, int64_t rows, int64_t columns, int64_t k, const float* window) {
  constexpr int64_t lanes = kLanes<float>;
  const PlaneSource plane =
      plane_source(images.layout, images.channels, images.height, images.width);
  const int64_t count = std::min(lanes, images.channels - k);
  const int64_t end = std::min(columns, images.width - x);
  for (int64_t i = 0; i < std::min(rows, images.height - y); ++i) {
    const int64_t at = image * image_stride(images.channels, images.height, images.width) +
                       (y + i) * plane.row_stride + x * plane.column_stride +
                       k * plane.channel_stride;
    const float* const from = window + i * columns * lanes;
    if (plane.channel_stride == 1) {
      for (int64_t j = 0; j < end; ++j) {
        store_out<float>(images.dtype, data, at + j * plane.column_stride, load(from + j * lanes),
                         count, 1);
      }
      continue;
    }
    for (int64_t j = 0; j < end; j += lanes) {
      const int64_t pixels = std::min(lanes, end - j);
      Vec<float> square[lanes];
      for (int64_t p = 0; p < lanes; ++p) {
        square[p] = load(from + (j + std::min(p, pixels - 1)) * lanes);
      }
      transpose<float>(square);
      for (int64_t l = 0; l < count; ++l) {
        store_out<float>(images.dtype, data, at + l * plane.channel_stride + j, square[l], pixels,
                         1);
      }
    }
  }
}

// G g G^T of a vector of kernels, in place of which 16 vectors are stored.
CNNK_INLINE void transform_kernel(const Vec<float> (&g)[3][3], float* to, int64_t position_step) {
  Vec<float> t[kPatch][3];
#pragma GCC unroll 3
  for (int64_t s = 0; s < 3; ++s) {
    const Vec<float> outer = 0.5f * (g[0][s] + g[2][s]), inner = 0.5f * g[1][s];
    t[0][s] = g[0][s];
    t[1][s] = outer + inner;
    t[2][s] = outer - inner;
    t[3][s] = g[2][s];
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < kPatch; ++i) {
    const Vec<float> outer = 0.5f * (t[i][0] + t[i][2]), inner = 0.5f * t[i][1];
    float* const row = to + i * kPatch * position_step;
    store(row, t[i][0]);
    store(row + position_step, outer + inner);
    store(row + 2 * position_step, outer - inner);
    store(row + 3 * position_step, t[i][2]);
  }
}

// `count` kernels that are `step` apart.
template <class T>
CNNK_INLINE void load_kernels(const T* from, const WinogradWeights& weights, int64_t step,
                              int64_t count, Vec<float> (&g)[3][3]) {
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t s = 0; s < 3; ++s) {
      const T* const tap = from + r * weights.row_step + s * weights.column_step;
      if (step == 1) {
        g[r][s] = count == kLanes<float> ? load_widened(tap) : load_head(tap, count);
        continue;
      }
      float lanes[kLanes<float>] = {};
      for (int64_t i = 0; i < count; ++i) lanes[i] = widen(tap[i * step]);
      g[r][s] = load(lanes);
    }
  }
}

// All kernels of a vector of result channels, of which weights.data + at is the first:
// panel[c][lane] a position. Where the source channels lie together, squares are
// transformed along them and then transposed.
template <class T>
void transform_kernels(const T* first, const WinogradWeights& weights, int64_t from, int64_t count,
                       float* panel, int64_t position_step) {
  constexpr int64_t lanes = kLanes<float>;
  Vec<float> g[3][3];
  if (weights.from_step != 1 || weights.to_step == 1) {
    for (int64_t c = 0; c < from; ++c) {
      load_kernels(first + c * weights.from_step, weights, weights.to_step, count, g);
      transform_kernel(g, panel + c * lanes, position_step);
    }
    return;
  }
  alignas(64) float squares[kPositions][lanes][lanes] = {};
  for (int64_t c = 0; c < from; c += lanes) {
    const int64_t depth = std::min(lanes, from - c);
    for (int64_t i = 0; i < count; ++i) {
      load_kernels(first + i * weights.to_step + c, weights, 1, depth, g);
      transform_kernel(g, squares[0][i], lanes * lanes);
    }
    for (int64_t position = 0; position < kPositions; ++position) {
      Vec<float> rows[lanes];
      for (int64_t i = 0; i < lanes; ++i) rows[i] = load(squares[position][i]);
      transpose<float>(rows);
      for (int64_t i = 0; i < depth; ++i) {
        store(panel + position * position_step + (c + i) * lanes, rows[i]);
      }
    }
  }
}

// A vector of products back to 2x2 results, of which those inside of the view are
// stored. They are marked before a ReLU makes a number of an infinity.
CNNK_INLINE void transform_products(const float* products, int64_t position_step, Vec<float> bias,
                                    bool relu, const PixelView<float>& out, int64_t y, int64_t x,
                                    int64_t k, Vec<float>& marks) {
  const int64_t count = std::min<int64_t>(kLanes<float>, out.channels - k);
  Vec<float> s[kTileSize][kPatch];
#pragma GCC unroll 4
  for (int64_t j = 0; j < kPatch; ++j) {
    Vec<float> m[kPatch];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kPatch; ++i) m[i] = load(products + (i * kPatch + j) * position_step);
    s[0][j] = m[0] + m[1] + m[2];
    s[1][j] = m[1] - m[2] - m[3];
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < kTileSize; ++i) {
    if (y + i >= out.height) continue;
    float* const to = out.data + ((y + i) * out.width + x) * out.channels + k;
    Vec<float> left = s[i][0] + s[i][1] + s[i][2] + bias;
    Vec<float> right = s[i][1] - s[i][2] - s[i][3] + bias;
    mark(marks, left);
    mark(marks, right);
    left = relu_if<float>(relu, left);
    right = relu_if<float>(relu, right);
    if (count == kLanes<float>) {
      store(to, left);
      if (x + 1 < out.width) store(to + out.channels, right);
    } else {
      store_head(to, left, count);
      if (x + 1 < out.width) store_head(to + out.channels, right, count);
    }
  }
}

// Tiles [begin, end) of a row of tiles; the first is number `number` of its task.
struct TileRun {
  int64_t number, image, row, begin, end;
};

// Destination (y, x) reads source (y - pad_top + r, x - pad_left + s). False if a result
// is not finite.
inline bool winograd_pass(const Conv2dPlan& plan, const ThreadPool& pool, int64_t batch,
                          const WinogradImages& source, const void* source_data,
                          const WinogradImages& destination, void* destination_data,
                          int64_t pad_top, int64_t pad_left, const WinogradWeights& weights,
                          const void* bias_data, bool relu) {
  constexpr int64_t lanes = kLanes<float>;
  const bool serial = plan.threads == 1;
  const bool in_place = source.dtype == DType::float32 && source.layout == Layout::nhwc;
  const int64_t from = source.channels, to = destination.channels;
  const int64_t padded_from = round_up(from, lanes), padded_to = round_up(to, lanes);

  const Workspace panel_workspace((kPositions * padded_to * from + to) *
                                  static_cast<int64_t>(sizeof(float)));
  float* const panels = panel_workspace.as<float>();
  const float* const bias =
      widened_bias<float>(source.dtype, bias_data, to, panels + kPositions * padded_to * from);
  parallel_for(pool, padded_to / lanes, serial, [&](int64_t begin, int64_t end) {
    with_storage<float>(source.dtype, [&](auto element) {
      const auto* const first = static_cast<const decltype(element)*>(weights.data) + weights.at;
      for (int64_t v = begin; v < end; ++v) {
        transform_kernels(first + v * lanes * weights.to_step, weights, from,
                          std::min(lanes, to - v * lanes), panels + v * from * lanes,
                          padded_to * from);
      }
    });
  });

  std::vector<int64_t> offsets(static_cast<size_t>(from));
  for (size_t c = 0; c < offsets.size(); ++c) offsets[c] = static_cast<int64_t>(c);
  const int64_t tile_rows = ceil_div(destination.height, kTileSize);
  const int64_t tile_columns = ceil_div(destination.width, kTileSize);
  const int64_t tiles = batch * tile_rows * tile_columns;
  const int64_t task_tiles = plan.rows_per_task;
  // Columns of a window of sources: a run has no more tiles than a row or a task.
  const int64_t most_columns = std::min(tile_columns, task_tiles) * kTileSize + 2;
  std::atomic<bool> finite{true};
  parallel_for(pool, ceil_div(tiles, task_tiles), serial, [&](int64_t begin, int64_t end) {
    const Workspace workspace(
        (kPositions * task_tiles * (padded_from + padded_to) + kPatch * most_columns * lanes) *
        static_cast<int64_t>(sizeof(float)));
    float* const patches = workspace.as<float>();
    float* const products = patches + kPositions * task_tiles * padded_from;
    float* const window = products + kPositions * task_tiles * padded_to;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * task_tiles;
      const int64_t count = std::min(task_tiles, tiles - first);
      const auto each_run = [&](auto&& body) {
        for (int64_t i = 0; i < count;) {
          const int64_t column = (first + i) % tile_columns, row = (first + i) / tile_columns;
          const int64_t length = std::min(tile_columns - column, count - i);
          body(TileRun{i, row / tile_rows, row % tile_rows, column, column + length});
          i += length;
        }
      };

      const int64_t patch_step = task_tiles * padded_from;
      each_run([&](const TileRun& run) {
        const int64_t y = run.row * kTileSize - pad_top, x = run.begin * kTileSize - pad_left;
        const int64_t columns = (run.end - run.begin) * kTileSize + 2;
        if (in_place) {
          const PixelView<const float> view = {
              static_cast<const float*>(source_data) +
                  run.image * image_stride(from, source.height, source.width),
              from, source.height, source.width};
          for (int64_t i = 0; i < run.end - run.begin; ++i) {
            const int64_t tile_x = x + i * kTileSize;
            const bool inside = y >= 0 && tile_x >= 0 && y + kPatch <= source.height &&
                                tile_x + kPatch <= source.width;
            for (int64_t c = 0; c < from; c += lanes) {
              float* const patch = patches + (run.number + i) * padded_from + c;
              inside ? transform_patch<true>(view, y, tile_x, c, patch, patch_step)
                     : transform_patch<false>(view, y, tile_x, c, patch, patch_step);
            }
          }
          return;
        }
        for (int64_t c = 0; c < from; c += lanes) {
          fill_window(source, source_data, run.image, y, x, kPatch, columns, c, window);
          for (int64_t i = 0; i < run.end - run.begin; ++i) {
            transform_patch<true>({window, lanes, kPatch, columns}, 0, i * kTileSize, 0,
                                  patches + (run.number + i) * padded_from + c, patch_step);
          }
        }
      });

      for (int64_t position = 0; position < kPositions; ++position) {
        outer_product_block<float>(
            {offsets.data(), from, panels + position * padded_to * from, from * lanes, lanes},
            {DType::float32, products + position * task_tiles * padded_to, 1, padded_to, nullptr},
            {1, count, patches + position * patch_step, 0, padded_from, 0, 0, padded_to, from,
             false});
      }

      Vec<float> marks{};
      const int64_t product_step = task_tiles * padded_to;
      each_run([&](const TileRun& run) {
        const int64_t y = run.row * kTileSize, x = run.begin * kTileSize;
        const int64_t columns = (run.end - run.begin) * kTileSize;
        const PixelView<float> view =
            in_place ? PixelView<float>{static_cast<float*>(destination_data) +
                                            run.image * image_stride(to, destination.height,
                                                                     destination.width),
                                        to, destination.height, destination.width}
                     : PixelView<float>{window, lanes, kTileSize, columns};
        const auto products_back = [&](int64_t i, int64_t k) {
          const Vec<float> added = bias == nullptr   ? Vec<float>{}
                                   : to - k >= lanes ? load(bias + k)
                                                     : load_head(bias + k, to - k);
          const float* const tile = products + (run.number + i) * padded_to + k;
          if (in_place) {
            transform_products(tile, product_step, added, relu, view, y, x + i * kTileSize, k,
                               marks);
          } else {
            transform_products(tile, product_step, added, relu, view, 0, i * kTileSize, 0, marks);
          }
        };
        if (in_place) {
          for (int64_t i = 0; i < run.end - run.begin; ++i) {
            for (int64_t k = 0; k < to; k += lanes) products_back(i, k);
          }
          return;
        }
        for (int64_t k = 0; k < to; k += lanes) {
          for (int64_t i = 0; i < run.end - run.begin; ++i) products_back(i, k);
          write_window(destination, destination_data, run.image, y, x, kTileSize, columns, k,
                       window);
        }
      });
      if (!all_finite(marks)) finite.store(false, std::memory_order_relaxed);
      if (!finite.load(std::memory_order_relaxed)) return;
    }
  });
  return finite.load(std::memory_order_relaxed);
}
