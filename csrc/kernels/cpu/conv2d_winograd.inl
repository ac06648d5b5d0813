// Winograd's minimal filtering F(2x2, 3x3), in channels_last.
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
// position's weights stay in the cache for all of them, and transforms back.
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

// Vectors of `lanes` source channels from c on of the patch at (y, x), zero outside of
// the image, transformed and stored `position_step` apart.
template <bool Inside>
CNNK_INLINE void transform_patch(const WinogradSource& source, const float* image, int64_t y,
                                 int64_t x, int64_t c, float* to, int64_t position_step) {
  const int64_t count = std::min<int64_t>(kLanes<float>, source.channels - c);
  Vec<float> d[kPatch][kPatch];
#pragma GCC unroll 4
  for (int64_t i = 0; i < kPatch; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kPatch; ++j) {
      const bool inside =
          Inside || (y + i >= 0 && y + i < source.height && x + j >= 0 && x + j < source.width);
      const float* const from = image + ((y + i) * source.width + x + j) * source.channels + c;
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
CNNK_INLINE void load_kernels(const float* from, const WinogradWeights& weights, int64_t step,
                              int64_t count, Vec<float> (&g)[3][3]) {
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t s = 0; s < 3; ++s) {
      const float* const tap = from + r * weights.row_step + s * weights.column_step;
      if (step == 1) {
        g[r][s] = count == kLanes<float> ? load(tap) : load_head(tap, count);
        continue;
      }
      float lanes[kLanes<float>] = {};
      for (int64_t i = 0; i < count; ++i) lanes[i] = tap[i * step];
      g[r][s] = load(lanes);
    }
  }
}

// All kernels of a vector of result channels from k on: panel[c][lane] a position.
// Where the source channels lie together, squares are transformed along them and then
// transposed.
inline void transform_kernels(const WinogradWeights& weights, int64_t from, int64_t k,
                              int64_t count, float* panel, int64_t position_step) {
  constexpr int64_t lanes = kLanes<float>;
  const float* const first = weights.data + k * weights.to_step;
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

// A vector of products back to 2x2 results, of which those inside of the image are
// stored.
CNNK_INLINE void transform_products(const float* products, int64_t position_step, Vec<float> bias,
                                    const WinogradDestination& out, float* image, int64_t y,
                                    int64_t x, int64_t k, Vec<float>& marks) {
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
    float* const to = image + ((y + i) * out.width + x) * out.channels + k;
    const Vec<float> left = s[i][0] + s[i][1] + s[i][2] + bias;
    const Vec<float> right = s[i][1] - s[i][2] - s[i][3] + bias;
    mark(marks, left);
    mark(marks, right);
    if (count == kLanes<float>) {
      store(to, left);
      if (x + 1 < out.width) store(to + out.channels, right);
    } else {
      store_head(to, left, count);
      if (x + 1 < out.width) store_head(to + out.channels, right, count);
    }
  }
}

// Destination (y, x) reads source (y - pad_top + r, x - pad_left + s). False if a result
// is not finite.
inline bool winograd_pass(const Conv2dPlan& plan, const ThreadPool& pool, int64_t batch,
                          const WinogradSource& source, const WinogradDestination& destination,
                          int64_t pad_top, int64_t pad_left, const WinogradWeights& weights,
                          const float* bias) {
  constexpr int64_t lanes = kLanes<float>;
  const bool serial = plan.threads == 1;
  const int64_t from = source.channels, to = destination.channels;
  const int64_t padded_from = round_up(from, lanes), padded_to = round_up(to, lanes);

  const Workspace panel_workspace(kPositions * padded_to * from *
                                  static_cast<int64_t>(sizeof(float)));
  float* const panels = panel_workspace.as<float>();
  parallel_for(pool, padded_to / lanes, serial, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      transform_kernels(weights, from, v * lanes, std::min(lanes, to - v * lanes),
                        panels + v * from * lanes, padded_to * from);
    }
  });

  std::vector<int64_t> offsets(static_cast<size_t>(from));
  for (size_t c = 0; c < offsets.size(); ++c) offsets[c] = static_cast<int64_t>(c);
  const int64_t tile_rows = ceil_div(destination.height, kTileSize);
  const int64_t tile_columns = ceil_div(destination.width, kTileSize);
  const int64_t tiles = batch * tile_rows * tile_columns;
  const int64_t task_tiles = plan.rows_per_task;
  std::atomic<bool> finite{true};
  parallel_for(pool, ceil_div(tiles, task_tiles), serial, [&](int64_t begin, int64_t end) {
    const Workspace workspace(kPositions * task_tiles * (padded_from + padded_to) *
                              static_cast<int64_t>(sizeof(float)));
    float* const patches = workspace.as<float>();
    float* const products = patches + kPositions * task_tiles * padded_from;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * task_tiles;
      const int64_t count = std::min(task_tiles, tiles - first);
      const auto each_tile = [&](auto&& body) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t tile = first + i;
          body(i, tile / tile_columns / tile_rows, tile / tile_columns % tile_rows * kTileSize,
               tile % tile_columns * kTileSize);
        }
      };
      each_tile([&](int64_t i, int64_t n, int64_t tile_y, int64_t tile_x) {
        const float* const image = source.data + n * source.height * source.width * from;
        const int64_t y = tile_y - pad_top, x = tile_x - pad_left;
        const bool inside =
            y >= 0 && x >= 0 && y + kPatch <= source.height && x + kPatch <= source.width;
        for (int64_t c = 0; c < from; c += lanes) {
          float* const patch = patches + i * padded_from + c;
          if (inside) {
            transform_patch<true>(source, image, y, x, c, patch, task_tiles * padded_from);
          } else {
            transform_patch<false>(source, image, y, x, c, patch, task_tiles * padded_from);
          }
        }
      });
      for (int64_t position = 0; position < kPositions; ++position) {
        outer_product_block<float>(
            {offsets.data(), from, panels + position * padded_to * from, from * lanes, lanes},
            {DType::float32, products + position * task_tiles * padded_to, 1, padded_to, nullptr},
            {1, count, patches + position * task_tiles * padded_from, 0, padded_from, 0, 0,
             padded_to});
      }
      Vec<float> marks{};
      each_tile([&](int64_t i, int64_t n, int64_t y, int64_t x) {
        float* const image = destination.data + n * destination.height * destination.width * to;
        for (int64_t k = 0; k < to; k += lanes) {
          const Vec<float> added = bias == nullptr   ? Vec<float>{}
                                   : to - k >= lanes ? load(bias + k)
                                                     : load_head(bias + k, to - k);
          transform_products(products + i * padded_to + k, task_tiles * padded_to, added,
                             destination, image, y, x, k, marks);
        }
      });
      if (!all_finite(marks)) finite.store(false, std::memory_order_relaxed);
      if (!finite.load(std::memory_order_relaxed)) return;
    }
  });
  return finite.load(std::memory_order_relaxed);
}
