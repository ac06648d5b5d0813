// What the orders of a pass on matrix tiles share: packing of sources and weights, the
// steps and destinations of a residue class, and a block's way from tiles to memory.

#include "kernels/cpu/amx_tile.inl"
#include "kernels/cpu/bfloat16_parts.inl"
#include "kernels/cpu/pixel_table.inl"
#include "kernels/cpu/widened_weights.inl"

// Weights of one direction: `to` channels are columns, `from` channels the depth.
struct WeightMatrix {
  int64_t from_channels, to_channels;  // of a group
  int64_t from_step, to_step, group_step;
  int64_t row_step, column_step;  // of kernel indices
  int64_t kernel_size;            // taps of a pair of channels
  int64_t last_tap;               // from the first tap to the farthest
};

// count <= 16 elements, `step` apart; zero past them.
template <class T>
CNNK_INLINE Vec<float> load_apart(const T* from, int64_t step, int64_t count) {
  if (step == 1) return count == 16 ? load_widened(from) : load_head(from, count);
#if !defined(CNNK_EMULATE_AVX512)
  if (std::is_same_v<T, float> && step < (int64_t{1} << 26)) {
    const Vec<int32_t> index = lane_numbers<int32_t>() * broadcast(static_cast<int32_t>(step));
    return (Vec<float>)_mm512_mask_i32gather_ps(
        _mm512_setzero_ps(), static_cast<__mmask16>((1u << count) - 1), (__m512i)index, from, 4);
  }
#endif
  float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = widen(from[i * step]);
  return load(lanes);
}

// Kernel indices of one pass, and a tap's offset among the weights.
struct ClassTaps {
  const std::vector<GridTap>& rows;
  const std::vector<GridTap>& columns;
};

// Packs one block of 32 deep by 16 columns for all taps: [pair][column][2] a part,
// `tap_step` from tap to tap. Vectors go along the columns. Where a column's weights
// lie in one piece they are read along it, and squares are transposed.
template <class T, int Parts>
void pack_weight_block(const T* weight, const WeightMatrix& matrix, const ClassTaps& taps,
                       int64_t kernel_size, int64_t depth, int64_t columns, uint16_t* to,
                       int64_t part_step, int64_t tap_step, Largest& largest) {
  constexpr int64_t kMostKernel = 9;
  const bool along_depth = matrix.from_step == 1 && matrix.to_step != 1;
  const bool along_taps = matrix.from_step == kernel_size && kernel_size <= kMostKernel &&
                          kernel_size > 1 && matrix.last_tap == kernel_size - 1;
  alignas(64) float squares[kMostKernel * kTileDepth][16];
  const auto transpose_columns = [&](const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
      Vec<float> square[16];
      for (int64_t k = 0; k < 16; ++k) {
        square[k] = k < columns ? load_apart(from + k * matrix.to_step + i, 1,
                                             std::min<int64_t>(16, count - i))
                                : Vec<float>{};
      }
      transpose<float>(square);
      for (int64_t j = 0; j < 16; ++j) store(squares[i + j], square[j]);
    }
  };
  if (along_taps) transpose_columns(weight, depth * kernel_size);
  for (const GridTap& r : taps.rows) {
    for (const GridTap& s : taps.columns) {
      const int64_t tap = r.kernel_index * matrix.row_step + s.kernel_index * matrix.column_step;
      if (along_depth) transpose_columns(weight + tap, depth);
      const auto channel = [&](int64_t c) {
        if (c >= depth) return Vec<float>{};
        if (along_taps) return load(squares[c * kernel_size + tap]);
        if (along_depth) return load(squares[c]);
        return load_apart(weight + tap + c * matrix.from_step, matrix.to_step, columns);
      };
      for (int64_t q = 0; q < 16; ++q) {
        const Vec<float> even = channel(2 * q), odd = channel(2 * q + 1);
        mark(largest, even);
        mark(largest, odd);
        store_pairs<T, Parts>(even, odd, to + q * 32, part_step);
      }
      to += tap_step;
    }
  }
}

// One pass over a grid, from packed positions to a residue class of destinations.
struct ClassSteps {
  const GridPass* rows;
  const GridPass* columns;
  std::vector<int64_t> offsets;  // of packed positions, by step
  int64_t steps_before;          // of the classes before this one
};

// A source or a destination: its plane, and the step from image to image.
struct Pixels {
  PlaneSource plane;
  int64_t image_step;
  int64_t channels;  // of all groups
};

inline Pixels pixels_of(Layout layout, int64_t channels, int64_t height, int64_t width) {
  return {plane_source(layout, channels, height, width), image_stride(channels, height, width),
          channels};
}

// Packs one tile: up to 32 channels of the table's group i.
template <class T, int Parts>
CNNK_INLINE void pack_tile(const T* from, const PixelTable& table, int64_t i, int64_t channel_step,
                           int64_t channels, uint16_t* to, int64_t part_step, Largest& largest) {
  if (std::is_same_v<T, bfloat16> && channel_step == 1 && channels == kTileDepth) {
    const int64_t* const at = table.at.data() + i * kTileRows;
    for (int64_t p = 0; p < kTileRows; ++p) {
      __builtin_prefetch(from + at[p + kFetchAhead]);
      const Vec<int32_t> pixel =
          at[p] == kNowhere ? Vec<int32_t>{} : load(reinterpret_cast<const int32_t*>(from + at[p]));
      store(reinterpret_cast<int32_t*>(to + p * kTileDepth), pixel);
    }
    return;
  }
  Vec<float> a[16], b[16];
  load_pixels(from, table, i, channel_step, std::min<int64_t>(channels, 16), a);
  if (channels > 16) {
    load_pixels(from + 16 * channel_step, table, i, channel_step, channels - 16, b);
  } else {
    for (Vec<float>& zero : b) zero = Vec<float>{};
  }
  for (int64_t p = 0; p < kTileRows; ++p) {
    mark(largest, a[p]);
    mark(largest, b[p]);
    store_parts<T, Parts>(a[p], b[p], to + p * kTileDepth, part_step);
  }
}

// Packs channels [c_begin, c_end) of each group of the grid's chunk that starts at
// `image` and row `j0`.
template <class T, int Parts>
void pack_chunk(const T* source, const Pixels& pixels, int64_t groups, int64_t c_begin,
                int64_t c_end, const Grid& grid, int64_t image, int64_t images, int64_t j0,
                int64_t rows, int64_t positions, uint16_t* packed, int64_t residue_step,
                int64_t part_step, Largest& largest) {
  const int64_t group_channels = pixels.channels / groups;
  const int64_t pitch = grid.columns.pitch();
  const int64_t channel_step = pixels.plane.channel_stride;
  uint16_t* to = packed;
  PixelTable table;
  for (const int64_t row_residue : grid.rows.residues) {
    for (const int64_t column_residue : grid.columns.residues) {
      table.at.clear();
      table.groups.clear();
      const PixelAxis row_axis = {(j0 + grid.rows.low) * grid.rows.step + row_residue,
                                  grid.rows.step, pixels.plane.height};
      const PixelAxis column_axis = {grid.columns.low * grid.columns.step + column_residue,
                                     grid.columns.step, pixels.plane.width};
      for (int64_t i = 0; i < images; ++i) {
        append_pixels(table, (image + i) * pixels.image_step, pixels.plane, row_axis,
                      rows + grid.rows.extra, column_axis, pitch);
      }
      table.at.resize(static_cast<size_t>(positions), kNowhere);
      group_pixels(table, pixels.plane.column_stride);
      in_memory_order(table, channel_step, [&](int64_t begin, int64_t end) {
        uint16_t* block = to;
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t c = c_begin; c < c_end; c += kTileDepth) {
            const int64_t channels = std::min<int64_t>(kTileDepth, c_end - c);
            const T* const from = source + (group * group_channels + c) * channel_step;
            for (int64_t i = begin; i < end; ++i) {
              pack_tile<T, Parts>(from, table, i, channel_step, channels, block + i * kTileElements,
                                  part_step, largest);
            }
            block += positions * kTileDepth;
          }
        }
      });
      to += residue_step;
    }
  }
}

// What vectors do while tiles multiply: they store the block before, and fetch the
// weights that come next into the second-level cache.
class BlockStore {
 public:
  BlockStore(const PixelsOut& out, Magnitudes& magnitudes)
      : out_(out), magnitudes_(magnitudes), by_planes_(out.channel_step != 1) {}
  ~BlockStore() {
    finish();
    magnitudes_.add_result(largest_);
#if !defined(CNNK_EMULATE_AVX512)
    // Stores past the caches are not ordered before what tells others that they are done.
    if (out_.streams) _mm_sfence();
#endif
  }
  BlockStore(const BlockStore&) = delete;
  BlockStore& operator=(const BlockStore&) = delete;

  // Takes over sums: `pixels` <= 32 from number `first` on, `channels` <= 32 from
  // channel k on. They are stored by so many calls of next(), and finish().
  void take(const float* sums, int64_t first, int64_t pixels, int64_t k, int64_t channels,
            const Vec<float>* bias, int64_t calls) {
    finish();
    sums_ = sums;
    first_ = first;
    pixels_ = pixels;
    k_ = k;
    channels_ = channels;
    bias_[0] = bias[0];
    bias_[1] = bias[1];
    next_ = 0;
    count_ = by_planes_ ? ceil_div(pixels, 16) * ceil_div(channels, 16) : pixels;
    a_call_ = ceil_div(count_, calls);
  }

  // Whether sums are still being stored.
  bool storing(const float* sums) const { return sums == sums_ && next_ < count_; }

  // Fetches [begin, end) in so many calls.
  void fetch(const uint16_t* begin, const uint16_t* end, int64_t calls) {
    fetched_ = reinterpret_cast<const char*>(begin);
    fetch_end_ = reinterpret_cast<const char*>(end);
    fetch_a_call_ = ceil_div(ceil_div(fetch_end_ - fetched_, 64), std::max<int64_t>(1, calls)) * 64;
  }

  CNNK_INLINE void next() {
    if (next_ < count_) store_until(std::min(count_, next_ + a_call_));
    const char* const end = std::min(fetch_end_, fetched_ + fetch_a_call_);
    for (; fetched_ < end; fetched_ += 64) __builtin_prefetch(fetched_, 0, 2);
  }

  void finish() { store_until(count_); }

 private:
  __attribute__((noinline)) void store_until(int64_t end) {
    for (; next_ < end; ++next_) {
      if (by_planes_) {
        const int64_t halves = ceil_div(pixels_, 16);
        const int64_t half = next_ % halves;
        const int64_t c = next_ / halves * 16;
        Vec<float> rows[16];
        for (int64_t p = 0; p < 16; ++p) {
          rows[p] = load(sums_ + (half * 16 + p) * kBlock + c) + bias_[c / 16];
          mark(largest_, rows[p]);
        }
        store_planes_of(out_, first_ / 16 + half, k_ + c, std::min<int64_t>(16, channels_ - c),
                        rows);
        continue;
      }
      const int64_t at = out_.table->at[static_cast<size_t>(first_ + next_)];
      if (at == kNowhere) continue;
      const float* const from = sums_ + next_ * kBlock;
      const Vec<float> low = load(from) + bias_[0], high = load(from + 16) + bias_[1];
      mark(largest_, low);
      if (channels_ > 16) mark(largest_, high);
      store_pixel(out_, at + k_, channels_, low, high);
    }
  }

  PixelsOut out_;
  Magnitudes& magnitudes_;
  Largest largest_{};
  bool by_planes_;
  const float* sums_ = nullptr;
  int64_t first_ = 0, pixels_ = 0, k_ = 0, channels_ = 0;
  Vec<float> bias_[2] = {};
  int64_t next_ = 0, count_ = 0, a_call_ = 0;
  const char* fetched_ = nullptr;
  const char* fetch_end_ = nullptr;
  int64_t fetch_a_call_ = 0;
};

// A pass over a grid: forward, or an input gradient with its residue classes.
struct GridProblem {
  DType dtype;
  int64_t groups, batch;
  Grid grid;
  Pixels source, destination;
  const void* source_data;
  WeightMatrix matrix;
  const void* weight;
  const float* bias;
  void* out;
  bool relu;

  // A store past the caches need not read what it overwrites. It pays where the result
  // would leave them anyway; below that, what reads the result pays for it (measured
  // with a ReLU behind: 20 MB lose, 25 MB gain).
  bool streams() const {
    constexpr int64_t kStreamedBytes = 24 * 1024 * 1024;
    return dtype == DType::float32 && batch * destination.image_step * 4 > kStreamedBytes;
  }
  PixelsOut pixels_out(const PixelTable* table) const {
    return {dtype, out, destination.plane.channel_stride, table, streams(), relu};
  }
  // Whether elements are turned into parts, which what is not finite does not have.
  bool splits() const { return dtype != DType::bfloat16; }
  int64_t blocks() const { return ceil_div(matrix.from_channels, kTileDepth); }
  int64_t column_tiles() const { return ceil_div(matrix.to_channels, 16); }
};

// The steps of all classes in `blocks` blocks of channels that are packed at a time.
inline std::vector<ClassSteps> class_steps(const GridProblem& problem, int64_t blocks,
                                           int64_t residue_step, int64_t positions) {
  const Grid& grid = problem.grid;
  std::vector<ClassSteps> classes;
  int64_t steps_before = 0;
  for (const GridPass& rows : grid.rows.passes) {
    for (const GridPass& columns : grid.columns.passes) {
      ClassSteps steps = {&rows, &columns, {}, steps_before};
      for (int64_t block = 0; block < blocks; ++block) {
        for (const GridTap& r : rows.taps) {
          for (const GridTap& s : columns.taps) {
            const int64_t residue =
                static_cast<int64_t>(r.residue * grid.columns.residues.size() + s.residue);
            steps.offsets.push_back(residue * residue_step +
                                    (block * positions + r.cell * grid.columns.pitch() + s.cell) *
                                        kTileDepth);
          }
        }
      }
      steps_before += static_cast<int64_t>(steps.offsets.size());
      classes.push_back(std::move(steps));
    }
  }
  return classes;
}

// Packs the weights of blocks [begin, end) of channels and of up to two tiles of columns
// from `tile` on: [step][part][tile].
template <class T, int Parts>
void pack_class_weights(const GridProblem& problem, const ClassSteps& steps, int64_t group,
                        int64_t begin, int64_t end, int64_t tile, uint16_t* to, Largest& largest) {
  const WeightMatrix& matrix = problem.matrix;
  const int64_t taps = static_cast<int64_t>(steps.rows->taps.size() * steps.columns->taps.size());
  const int64_t width = std::min<int64_t>(2, problem.column_tiles() - tile);
  const int64_t part = width * kTileElements;
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t block = begin; block < end; ++block) {
      pack_weight_block<T, Parts>(
          static_cast<const T*>(problem.weight) + group * matrix.group_step +
              block * kTileDepth * matrix.from_step + (tile + i) * 16 * matrix.to_step,
          matrix, {steps.rows->taps, steps.columns->taps}, matrix.kernel_size,
          std::min<int64_t>(kTileDepth, matrix.from_channels - block * kTileDepth),
          std::min<int64_t>(16, matrix.to_channels - (tile + i) * 16),
          to + (block - begin) * taps * Parts * part + i * kTileElements, part, Parts * part,
          largest);
    }
  }
}

// Weights of all classes, [class][group][pair of column tiles][step][part][tile].
template <int Parts>
int64_t packed_weight_elements(const GridProblem& problem, const std::vector<ClassSteps>& classes) {
  int64_t count = 0;
  for (const ClassSteps& steps : classes) count += static_cast<int64_t>(steps.offsets.size());
  return count * problem.groups * problem.column_tiles() * Parts * kTileElements;
}

template <int Parts>
uint16_t* class_weights(uint16_t* tiles, const GridProblem& problem, const ClassSteps& steps,
                        int64_t group, int64_t tile) {
  const int64_t count = static_cast<int64_t>(steps.offsets.size());
  return tiles + (problem.groups * problem.column_tiles() * steps.steps_before +
                  (group * problem.column_tiles() + tile) * count) *
                     Parts * kTileElements;
}

template <int Parts>
void pack_all_weights(const ThreadPool& pool, bool serial, const GridProblem& problem,
                      const std::vector<ClassSteps>& classes, uint16_t* tiles,
                      Magnitudes& magnitudes) {
  const int64_t blocks = problem.blocks(), pairs = ceil_div(problem.column_tiles(), 2);
  for (const ClassSteps& steps : classes) {
    const int64_t taps = static_cast<int64_t>(steps.offsets.size()) / blocks;
    parallel_for(pool, problem.groups * pairs * blocks, serial, [&](int64_t begin, int64_t end) {
      Largest largest{};
      with_storage<float>(problem.dtype, [&](auto element) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t block = i % blocks, tile = i / blocks % pairs * 2;
          const int64_t group = i / blocks / pairs;
          const int64_t width = std::min<int64_t>(2, problem.column_tiles() - tile);
          pack_class_weights<decltype(element), Parts>(
              problem, steps, group, block, block + 1, tile,
              class_weights<Parts>(tiles, problem, steps, group, tile) +
                  block * taps * Parts * width * kTileElements,
              largest);
        }
      });
      magnitudes.add_weights(largest);
    });
  }
}

// A class's destinations in a chunk, as runs of pixels in whole blocks.
struct ClassPixels {
  PixelTable table;
  int64_t runs, run_length, run_blocks;
  int64_t run_step;  // positions from a run to the next

  int64_t blocks() const { return runs * run_blocks; }
};

// Chunk: `images` from `image` on, `rows` rows of the grid from j0 on. Without border
// rows all images are one run.
inline void locate_class(ClassPixels& pixels, const GridProblem& problem, const ClassSteps& steps,
                         int64_t image, int64_t images, int64_t j0, int64_t rows) {
  const Grid& grid = problem.grid;
  const Pixels& destination = problem.destination;
  const int64_t pitch = grid.columns.pitch();
  const int64_t class_rows = std::clamp<int64_t>(steps.rows->count - j0, 0, rows);
  const bool one_run = grid.rows.extra == 0;
  const int64_t run_rows = one_run ? rows : class_rows;
  pixels.runs = one_run ? 1 : images;
  pixels.run_length = (one_run ? images : 1) * run_rows * pitch;
  if (class_rows == 0 || steps.columns->count == 0) pixels.run_length = 0;
  pixels.run_blocks = ceil_div(pixels.run_length, kBlock);
  pixels.run_step = (rows + grid.rows.extra) * pitch;
  pixels.table.at.clear();
  pixels.table.groups.clear();
  if (pixels.run_length == 0) return;
  const PixelAxis row_axis = {steps.rows->first + j0 * steps.rows->stride, steps.rows->stride,
                              destination.plane.height};
  const PixelAxis column_axis = {steps.columns->first, steps.columns->stride,
                                 destination.plane.width};
  for (int64_t i = 0; i < images; ++i) {
    append_pixels(pixels.table, (image + i) * destination.image_step, destination.plane, row_axis,
                  run_rows, column_axis, pitch);
    if (!one_run) pad_table(pixels.table, kBlock);
  }
  pad_table(pixels.table, kBlock);
  group_pixels(pixels.table, destination.plane.column_stride);
}

// One block of columns of one class.
struct ColumnBlock {
  int64_t channel;  // of all groups
  int64_t columns;
  Vec<float> biases[2];
};

inline ColumnBlock column_block(const GridProblem& problem, int64_t group, int64_t k,
                                int64_t k_end) {
  ColumnBlock block = {group * problem.matrix.to_channels + k, std::min(kBlock, k_end - k), {}};
  for (int64_t c = 0; c < block.columns && problem.bias != nullptr; c += 16) {
    const int64_t rest = block.columns - c;
    const float* const from = problem.bias + block.channel + c;
    block.biases[c / 16] = rest >= 16 ? load(from) : load_head(from, rest);
  }
  return block;
}

constexpr int64_t kSums = kBlock * kBlock;

// Multiplies steps [begin, end) of a block of columns with blocks [block_begin,
// block_end) of pixels, from packed weights of these steps. Sums of all blocks are in
// `sums`, or, where these are all steps, go straight to their destination. What
// vectors do `meanwhile` includes `store`. With a pixel_step, `packed` is the first
// pixel of the one block where it lies.
template <int Parts, class Meanwhile>
void multiply_pixels(const ClassSteps& steps, int64_t begin, int64_t end, bool all_steps,
                     bool first, bool last, const ClassPixels& pixels, int64_t block_begin,
                     int64_t block_end, const uint16_t* packed, int64_t part_step,
                     const uint16_t* weights, const ColumnBlock& columns, BlockStore& store,
                     Meanwhile& meanwhile, float (&two_sums)[2][kSums], float* sums,
                     int64_t pixel_step = 0) {
  TileSteps product;
  product.offsets = steps.offsets.data() + begin;
  const int64_t row_step = pixel_step == 0 ? kTileDepth : pixel_step;
  product.row_bytes = row_step * static_cast<int64_t>(sizeof(uint16_t));
  product.rows_tile = kTileRows * row_step;
  product.rows_part = part_step;
  product.columns = weights;
  product.columns_part = ceil_div(columns.columns, 16) * kTileElements;
  product.columns_tile = kTileElements;
  const int64_t calls = std::max<int64_t>(1, (end - begin) * products_of_parts(Parts));
  for (int64_t i = block_begin; i < block_end; ++i) {
    const int64_t run = i / pixels.run_blocks, block = i % pixels.run_blocks;
    const int64_t count = std::min(kBlock, pixels.run_length - block * kBlock);
    product.rows = packed;
    if (pixel_step == 0) {
      product.rows += (run * pixels.run_step + block * kBlock) * kTileDepth;
    }
    float* to = all_steps ? two_sums[0] : sums + i * kSums;
    if (all_steps && store.storing(to)) to = two_sums[1];
    if (store.storing(to)) store.finish();
    multiply_block<Parts>(product, 0, end - begin, count, columns.columns, !first, meanwhile, to);
    if (last) {
      store.take(to, i * kBlock, count, columns.channel, columns.columns, columns.biases, calls);
    }
  }
}
