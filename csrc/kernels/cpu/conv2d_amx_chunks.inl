// A pass on matrix tiles, chunk by chunk of the source.

// Steps of the weights of a block of columns that are used for all pixels of a chunk
// before the next: they, those that come next, and the chunk fit into a second-level
// cache.
constexpr int64_t kWeightSliceBytes = 256 * 1024;
// Weights of all columns that stay there beside the chunk.
constexpr int64_t kStayingWeightBytes = 512 * 1024;

// Weights are packed before; a task packs a chunk and computes some of its channels.
template <int Parts>
bool chunks_pass(const Conv2dPlan& plan, const ThreadPool& pool, const GridProblem& problem) {
  const bool serial = plan.threads == 1;
  const Grid& grid = problem.grid;
  const int64_t groups = problem.groups;
  const int64_t group_in = problem.matrix.from_channels, group_out = problem.matrix.to_channels;
  const int64_t blocks = problem.blocks();
  const int64_t positions = grid.packed_positions(plan.images_per_chunk, plan.rows_per_task);
  const int64_t residue_step = groups * blocks * positions * kTileDepth;
  const int64_t part_step = grid.residues() * residue_step;
  const std::vector<ClassSteps> classes = class_steps(problem, blocks, residue_step, positions);
  const int64_t weight_elements = packed_weight_elements<Parts>(problem, classes);
  const Workspace weight_workspace(weight_elements * static_cast<int64_t>(sizeof(uint16_t)));
  uint16_t* const tiles = weight_workspace.as<uint16_t>();
  Magnitudes magnitudes;
  pack_all_weights<Parts>(pool, serial, problem, classes, tiles, magnitudes);
  if (problem.splits() && !magnitudes.finite()) return false;

  const int64_t slice = kWeightSliceBytes / (2 * Parts * kTileElements * 2);
  const int64_t row_chunks = ceil_div(grid.rows.count, plan.rows_per_task);
  const int64_t chunks = ceil_div(problem.batch, plan.images_per_chunk) * row_chunks;
  const int64_t channel_ranges = ceil_div(group_out, plan.channels_per_task);
  parallel_for(pool, chunks * channel_ranges, serial, [&](int64_t begin, int64_t end) {
    const Workspace workspace(Parts * part_step * static_cast<int64_t>(sizeof(uint16_t)));
    uint16_t* const packed = workspace.as<uint16_t>();
    const TileScope tile_scope;
    ClassPixels pixels;
    alignas(64) float two_sums[2][kSums];
    std::vector<float> sums;  // of all blocks, where there are several slices
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / channel_ranges;
      const int64_t k_begin = task % channel_ranges * plan.channels_per_task;
      const int64_t k_end = std::min(group_out, k_begin + plan.channels_per_task);
      const int64_t image = chunk / row_chunks * plan.images_per_chunk;
      const int64_t images = std::min(plan.images_per_chunk, problem.batch - image);
      const int64_t j0 = chunk % row_chunks * plan.rows_per_task;
      const int64_t rows = std::min(plan.rows_per_task, grid.rows.count - j0);
      if (task == begin || task % channel_ranges == 0) {
        Largest largest{};
        with_storage<float>(problem.dtype, [&](auto element) {
          using T = decltype(element);
          pack_chunk<T, Parts>(static_cast<const T*>(problem.source_data), problem.source, groups,
                               0, group_in, grid, image, images, j0, rows, positions, packed,
                               residue_step, part_step, largest);
        });
        magnitudes.add_source(largest);
      }
      if (problem.splits() && !magnitudes.finite()) return;
      for (const ClassSteps& steps : classes) {
        const int64_t count = static_cast<int64_t>(steps.offsets.size());
        locate_class(pixels, problem, steps, image, images, j0, rows);
        // Weights that stay in the cache let a pixel be written whole.
        const bool pixels_outside =
            problem.destination.plane.channel_stride == 1 && count <= slice &&
            weight_elements * static_cast<int64_t>(sizeof(uint16_t)) <= kStayingWeightBytes;
        if (count > slice) sums.resize(static_cast<size_t>(pixels.blocks() * kSums));
        BlockStore meanwhile(problem.pixels_out(&pixels.table), magnitudes);
        for (int64_t group = 0; group < groups; ++group) {
          const uint16_t* const group_packed = packed + group * blocks * positions * kTileDepth;
          if (pixels_outside) {
            for (int64_t i = 0; i < pixels.blocks(); ++i) {
              for (int64_t k = k_begin; k < k_end; k += kBlock) {
                multiply_pixels<Parts>(steps, 0, count, true, true, true, pixels, i, i + 1,
                                       group_packed, part_step,
                                       class_weights<Parts>(tiles, problem, steps, group, k / 16),
                                       column_block(problem, group, k, k_end), meanwhile, meanwhile,
                                       two_sums, nullptr);
              }
            }
            continue;
          }
          for (int64_t k = k_begin; k < k_end; k += kBlock) {
            const ColumnBlock columns = column_block(problem, group, k, k_end);
            const int64_t step = Parts * ceil_div(columns.columns, 16) * kTileElements;
            const uint16_t* const weights =
                class_weights<Parts>(tiles, problem, steps, group, k / 16);
            for (int64_t first = 0; first < count || first == 0; first += slice) {
              const int64_t last = std::min(count, first + slice);
              // What comes next: the next slice, or the next columns' first.
              meanwhile.fetch(weights + last * step,
                              std::min<const uint16_t*>(weights + (2 * last - first) * step,
                                                        tiles + weight_elements),
                              (last - first) * products_of_parts(Parts) * pixels.blocks());
              multiply_pixels<Parts>(steps, first, last, count <= slice, first == 0, last == count,
                                     pixels, 0, pixels.blocks(), group_packed, part_step,
                                     weights + first * step, columns, meanwhile, meanwhile,
                                     two_sums, sums.data());
            }
          }
        }
      }
    }
  });
  return !problem.splits() || magnitudes.exact();
}
