// A pass on matrix tiles with one tap over bfloat16 in channels_last: pixels are tiles where
// they lie.
//
// 32 pixels are multiplied with all weights, which stay in the cache. Their sums are stored
// while the next 32 are multiplied, pixel by pixel with all channels: a row of results is
// written in one go, which the processor's write path and prefetchers are made for, where 32
// channels of 32 pixels would be 32 scattered lines.

// Up to 32 channels of the results, in memory of any alignment.
struct ResultColumns {
  int64_t channel, count;
  float biases[kBlock];
};

// What vectors do while tiles multiply: they store the 32 pixels before, and fetch those that
// come next.
class PixelRowStore {
 public:
  PixelRowStore(const GridProblem& problem, const std::vector<ResultColumns>& columns)
      : columns_(columns),
        out_(problem.pixels_out(nullptr)),
        channels_(problem.destination.channels) {}
  ~PixelRowStore() { finish(); }
  PixelRowStore(const PixelRowStore&) = delete;
  PixelRowStore& operator=(const PixelRowStore&) = delete;

  // Takes over the sums of `pixels` <= 32 from number `first` on, [column block][pixel][32].
  // They are stored by so many calls of next(), and finish(). Fetches lines meanwhile.
  void take(const float* sums, int64_t first, int64_t pixels, int64_t calls, FetchedLines lines) {
    finish();
    sums_ = sums;
    at_ = first * channels_;
    pixel_ = 0;
    count_ = pixels;
    a_call_ = ceil_div(pixels, calls);
    calls_a_pixel_ = std::max<int64_t>(1, calls / std::max<int64_t>(1, pixels));
    wait_ = 0;
    lines_ = lines;
    lines_a_call_ = ceil_div(lines.count, calls);
  }

  CNNK_INLINE void next() {
    for (int64_t i = 0; i < lines_a_call_; ++i) lines_.fetch_next();
    if (++wait_ < calls_a_pixel_) return;
    wait_ = 0;
    if (pixel_ < count_) store_until(std::min(count_, pixel_ + a_call_));
  }

  void finish() { store_until(count_); }

 private:
  __attribute__((noinline)) void store_until(int64_t end) {
    for (; pixel_ < end; ++pixel_, at_ += channels_) {
      const float* from = sums_ + pixel_ * kBlock;
      for (const ResultColumns& block : columns_) {
        store_pixel(out_, at_ + block.channel, block.count, load(from) + load(block.biases),
                    load(from + 16) + load(block.biases + 16));
        from += kSums;
      }
    }
  }

  const std::vector<ResultColumns>& columns_;
  PixelsOut out_;
  int64_t channels_;
  const float* sums_ = nullptr;
  int64_t at_ = 0, pixel_ = 0, count_ = 0, a_call_ = 0, calls_a_pixel_ = 1, wait_ = 0;
  FetchedLines lines_ = {nullptr, 0};
  int64_t lines_a_call_ = 0;
};

inline void in_place_pass(const Conv2dPlan& plan, const ThreadPool& pool,
                          const GridProblem& problem) {
  const int64_t group_out = problem.matrix.to_channels, depth = problem.matrix.from_channels;
  const int64_t steps_count = problem.blocks();
  const std::vector<ClassSteps> classes = class_steps(problem, steps_count, 0, kBlock);
  const ClassSteps& steps = classes.front();
  const Workspace weight_workspace(packed_weight_elements<1>(problem, classes) *
                                   static_cast<int64_t>(sizeof(uint16_t)));
  uint16_t* const tiles = weight_workspace.as<uint16_t>();
  Magnitudes magnitudes;
  pack_all_weights<1>(pool, plan.threads == 1, problem, classes, tiles, magnitudes);

  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < steps_count; ++i) offsets.push_back(i * kTileDepth);
  std::vector<ResultColumns> columns;
  std::vector<TileSteps> products;  // of each block of columns; rows from the group's on
  for (int64_t group = 0; group < problem.groups; ++group) {
    for (int64_t k = 0; k < group_out; k += kBlock) {
      ResultColumns block = {group * group_out + k, std::min(kBlock, group_out - k), {}};
      if (problem.bias != nullptr) {
        std::copy_n(problem.bias + block.channel, block.count, block.biases);
      }
      columns.push_back(block);
      TileSteps product;
      product.rows = static_cast<const uint16_t*>(problem.source_data) + group * depth;
      product.offsets = offsets.data();
      product.count = steps_count;
      product.rows_part = 0;
      product.columns = class_weights<1>(tiles, problem, steps, group, k / 16);
      product.columns_part = ceil_div(block.count, 16) * kTileElements;
      product.columns_tile = kTileElements;
      product.row_bytes = problem.source.channels * static_cast<int64_t>(sizeof(uint16_t));
      product.rows_tile = kTileRows * problem.source.channels;
      products.push_back(product);
    }
  }
  const int64_t count = static_cast<int64_t>(columns.size());
  const int64_t pixels = problem.batch * problem.grid.rows.count * problem.grid.columns.count;
  const int64_t block_elements = kBlock * problem.source.channels;
  parallel_for(pool, ceil_div(pixels, kBlock), plan.threads == 1, [&](int64_t begin, int64_t end) {
    const Workspace sums_workspace(2 * count * kSums * static_cast<int64_t>(sizeof(float)));
    const Workspace last_pixels(block_elements * static_cast<int64_t>(sizeof(uint16_t)));
    const TileScope tile_scope;
    PixelRowStore store(problem, columns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kBlock;
      const int64_t block_pixels = std::min(kBlock, pixels - first);
      const auto* const source = static_cast<const uint16_t*>(problem.source_data);
      const uint16_t* rows = source + first * problem.source.channels;
      if (block_pixels < kBlock) {
        // A tile of 16 pixels must not read past the last.
        uint16_t* const copy = last_pixels.as<uint16_t>();
        const int64_t elements = block_pixels * problem.source.channels;
        std::copy_n(rows, elements, copy);
        std::fill_n(copy + elements, block_elements - elements, uint16_t{0});
        rows = copy;
      }
      float* const sums = sums_workspace.as<float>() + i % 2 * count * kSums;
      for (int64_t block = 0; block < count; ++block) {
        TileSteps product = products[static_cast<size_t>(block)];
        product.rows = rows + (product.rows - source);
        multiply_block<1>(product, 0, steps_count, block_pixels,
                          columns[static_cast<size_t>(block)].count, false, store,
                          sums + block * kSums);
      }
      // The pixels after the next, which are multiplied while these are stored.
      const int64_t following = std::min(pixels, first + 2 * kBlock);
      const int64_t count_following = std::min(pixels - following, kBlock);
      store.take(sums, first, block_pixels, count * steps_count,
                 {reinterpret_cast<const char*>(source + following * problem.source.channels),
                  count_following * problem.source.channels / kTileDepth});
    }
  });
}
