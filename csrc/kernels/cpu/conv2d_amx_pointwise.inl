// A pass on matrix tiles with one tap and small weights.

// Packs tiles of the next 32 pixels, a few a call, beside what BlockStore does.
template <class T, int Parts>
class PackAndStore {
 public:
  PackAndStore(const GridProblem& problem, const PixelTable& source, int64_t part_step,
               BlockStore& store)
      : problem_(problem),
        source_(source),
        part_step_(part_step),
        blocks_(problem.blocks()),
        tiles_(2 * problem.groups * problem.blocks()),
        store_(store) {}

  // Packs block `block` of the table into `packed` in so many calls, and finish().
  void pack(int64_t block, uint16_t* packed, int64_t calls) {
    block_ = block;
    packed_ = packed;
    next_ = 0;
    calls_ = calls;
    balance_ = 0;
  }

  CNNK_INLINE void next() {
    store_.next();
    for (balance_ += tiles_; balance_ >= calls_ && next_ < tiles_; balance_ -= calls_) pack_next();
  }

  void finish() {
    while (next_ < tiles_) pack_next();
  }

  Largest largest() const { return largest_; }

 private:
  __attribute__((noinline)) void pack_next() {
    const int64_t half = next_ % 2, block = next_ / 2 % blocks_, group = next_ / 2 / blocks_;
    const int64_t from = problem_.matrix.from_channels, c = block * kTileDepth;
    const int64_t step = problem_.source.plane.channel_stride;
    pack_tile<T, Parts>(static_cast<const T*>(problem_.source_data) + (group * from + c) * step,
                        source_, block_ * 2 + half, step, std::min<int64_t>(kTileDepth, from - c),
                        packed_ + next_ * kTileElements, part_step_, largest_);
    ++next_;
  }

  const GridProblem& problem_;
  const PixelTable& source_;
  int64_t part_step_, blocks_, tiles_;
  BlockStore& store_;
  int64_t block_ = 0, next_ = 0, calls_ = 1, balance_ = 0;
  uint16_t* packed_ = nullptr;
  Largest largest_{};
};

// One tap, and weights that stay in the cache: all work of the vectors, on the 32
// pixels before and the 32 behind, goes on beside the products of 32 pixels, whose
// parts are in the first-level cache.
template <class T, int Parts>
bool pointwise_pass(const Conv2dPlan& plan, const ThreadPool& pool, const GridProblem& problem) {
  const Grid& grid = problem.grid;
  const int64_t group_out = problem.matrix.to_channels;
  const int64_t blocks = problem.blocks();
  const std::vector<ClassSteps> classes = class_steps(problem, blocks, 0, kBlock);
  const ClassSteps& steps = classes.front();
  const Workspace weight_workspace(packed_weight_elements<Parts>(problem, classes) *
                                   static_cast<int64_t>(sizeof(uint16_t)));
  uint16_t* const tiles = weight_workspace.as<uint16_t>();
  Magnitudes magnitudes;
  pack_all_weights<Parts>(pool, plan.threads == 1, problem, classes, tiles, magnitudes);
  if (problem.splits() && !magnitudes.finite()) return false;

  const int64_t rows = grid.rows.count, columns = grid.columns.count;
  const int64_t pixels = problem.batch * rows * columns;
  constexpr int64_t kMostTableBlocks = 64;
  const int64_t table_pixels =
      kBlock * std::clamp<int64_t>(pixels / kBlock / (4 * plan.threads), 1, kMostTableBlocks);
  const PixelAxis source_rows = {grid.rows.low * grid.rows.step + grid.rows.residues.front(),
                                 grid.rows.step, problem.source.plane.height};
  const PixelAxis source_columns = {
      grid.columns.low * grid.columns.step + grid.columns.residues.front(), grid.columns.step,
      problem.source.plane.width};
  const int64_t part_step = problem.groups * blocks * kBlock * kTileDepth;
  parallel_for(
      pool, ceil_div(pixels, table_pixels), plan.threads == 1, [&](int64_t begin, int64_t end) {
        const Workspace workspace(2 * Parts * part_step * static_cast<int64_t>(sizeof(uint16_t)));
        const TileScope tile_scope;
        ClassPixels destination = {{}, 1, table_pixels, table_pixels / kBlock, 0};
        PixelTable source;
        alignas(64) float two_sums[2][kSums];
        const int64_t calls =
            problem.groups * ceil_div(group_out, kBlock) * blocks * products_of_parts(Parts);
        for (int64_t table = begin; table < end; ++table) {
          const int64_t first = table * table_pixels;
          const int64_t last = std::min(pixels, first + table_pixels);
          for (PixelTable* const empty : {&source, &destination.table}) {
            empty->at.clear();
            empty->groups.clear();
          }
          append_range(source, first, last, problem.source.image_step, problem.source.plane,
                       source_rows, rows, source_columns, columns);
          append_range(destination.table, first, last, problem.destination.image_step,
                       problem.destination.plane, {0, 1, problem.destination.plane.height}, rows,
                       {0, 1, problem.destination.plane.width}, columns);
          pad_table(source, kBlock);
          pad_table(destination.table, kBlock);
          group_pixels(source, problem.source.plane.column_stride);
          group_pixels(destination.table, problem.destination.plane.column_stride);
          destination.run_length = last - first;
          destination.run_blocks = ceil_div(last - first, kBlock);

          BlockStore store(problem.pixels_out(&destination.table), magnitudes);
          PackAndStore<T, Parts> meanwhile(problem, source, part_step, store);
          const auto packed = [&](int64_t i) {
            return workspace.as<uint16_t>() + i % 2 * Parts * part_step;
          };
          meanwhile.pack(0, packed(0), 1);
          meanwhile.finish();
          for (int64_t i = 0; i < destination.run_blocks; ++i) {
            if (i + 1 < destination.run_blocks) meanwhile.pack(i + 1, packed(i + 1), calls);
            for (int64_t group = 0; group < problem.groups; ++group) {
              for (int64_t k = 0; k < group_out; k += kBlock) {
                multiply_pixels<Parts>(steps, 0, blocks, true, true, true, destination, i, i + 1,
                                       packed(i) + (group * blocks - i) * kBlock * kTileDepth,
                                       part_step,
                                       class_weights<Parts>(tiles, problem, steps, group, k / 16),
                                       column_block(problem, group, k, group_out), store, meanwhile,
                                       two_sums, nullptr);
              }
            }
            meanwhile.finish();
          }
          magnitudes.add_source(meanwhile.largest());
          if (problem.splits() && !magnitudes.finite()) return;
        }
      });
  return !problem.splits() || magnitudes.exact();
}
