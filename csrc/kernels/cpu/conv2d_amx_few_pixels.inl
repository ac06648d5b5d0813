// A pass on matrix tiles where weights outweigh pixels.

// Few pixels and many weights: a task has some output channels of all pixels, and
// packs sources and weights as it goes, some channels at a time, so that every weight
// is packed once and used while it is in the cache.
template <int Parts>
bool few_pixels_pass(const Conv2dPlan& plan, const ThreadPool& pool, const GridProblem& problem) {
  const Grid& grid = problem.grid;
  const int64_t from = problem.matrix.from_channels, to = problem.matrix.to_channels;
  const int64_t positions = grid.packed_positions(problem.batch, grid.rows.count);
  const int64_t slice_blocks = plan.channels_per_slice / kTileDepth;
  const int64_t residue_step = slice_blocks * positions * kTileDepth;
  const int64_t part_step = grid.residues() * residue_step;
  const std::vector<ClassSteps> classes =
      class_steps(problem, slice_blocks, residue_step, positions);
  size_t most_steps = 0;
  for (const ClassSteps& steps : classes) most_steps = std::max(most_steps, steps.offsets.size());
  const int64_t weight_elements = static_cast<int64_t>(most_steps) * Parts * 2 * kTileElements;

  Magnitudes magnitudes;
  const int64_t ranges = ceil_div(to, plan.channels_per_task);
  parallel_for(pool, ranges, plan.threads == 1, [&](int64_t begin, int64_t end) {
    std::vector<ClassPixels> pixels(classes.size());
    int64_t pixel_blocks = 0;
    for (size_t i = 0; i < classes.size(); ++i) {
      locate_class(pixels[i], problem, classes[i], 0, problem.batch, 0, grid.rows.count);
      pixel_blocks += pixels[i].blocks();
    }
    const int64_t column_blocks = plan.channels_per_task / kBlock;
    const Workspace packed_workspace((Parts * part_step + weight_elements) *
                                     static_cast<int64_t>(sizeof(uint16_t)));
    uint16_t* const packed = packed_workspace.as<uint16_t>();
    uint16_t* const weights = packed + Parts * part_step;
    const Workspace sums_workspace(pixel_blocks * column_blocks * kSums *
                                   static_cast<int64_t>(sizeof(float)));
    const TileScope tile_scope;
    alignas(64) float two_sums[2][kSums];
    for (int64_t range = begin; range < end; ++range) {
      const int64_t k_begin = range * plan.channels_per_task;
      const int64_t k_end = std::min(to, k_begin + plan.channels_per_task);
      for (int64_t c = 0; c < from; c += plan.channels_per_slice) {
        const int64_t c_end = std::min(from, c + plan.channels_per_slice);
        const int64_t blocks = ceil_div(c_end - c, kTileDepth);
        Largest source{}, weight{};
        const auto with_type = [&](auto&& body) {
          with_storage<float>(problem.dtype, [&](auto element) { body(element); });
        };
        with_type([&](auto element) {
          using T = decltype(element);
          pack_chunk<T, Parts>(static_cast<const T*>(problem.source_data), problem.source, 1, c,
                               c_end, grid, 0, problem.batch, 0, grid.rows.count, positions, packed,
                               residue_step, part_step, source);
        });
        float* sums = sums_workspace.as<float>();
        for (size_t i = 0; i < classes.size(); ++i) {
          const int64_t taps =
              static_cast<int64_t>(classes[i].rows->taps.size() * classes[i].columns->taps.size());
          BlockStore store(problem.pixels_out(&pixels[i].table), magnitudes);
          for (int64_t k = k_begin; k < k_end; k += kBlock, sums += pixels[i].blocks() * kSums) {
            with_type([&](auto element) {
              pack_class_weights<decltype(element), Parts>(problem, classes[i], 0, c / kTileDepth,
                                                           c / kTileDepth + blocks, k / 16, weights,
                                                           weight);
            });
            multiply_pixels<Parts>(classes[i], 0, blocks * taps, false, c == 0, c_end == from,
                                   pixels[i], 0, pixels[i].blocks(), packed, part_step, weights,
                                   column_block(problem, 0, k, k_end), store, store, two_sums,
                                   sums);
          }
        }
        magnitudes.add_source(source);
        magnitudes.add_weights(weight);
        if (problem.splits() && !magnitudes.finite()) return;
      }
    }
  });
  return !problem.splits() || magnitudes.exact();
}
