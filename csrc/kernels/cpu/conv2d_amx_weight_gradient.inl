// The weight gradient on matrix tiles.
//
// Rows of the product are input channels, depth the output pixels, columns the output
// channels, once a tap. Input channels are packed as planes of bfloat16 in the order of
// the grid's positions: a tap moves the whole plane, so that one packing serves all
// taps. The output's gradient is packed in the same order as pairs of pixels, zero
// where a position is no output. A task owns some channels of both for all taps and
// goes over the chunks in their order, so that a sum has one order whatever the number
// of threads; a chunk's sums go to totals in float, which are few.

// Packs 16 channels' planes.
template <class T, int Parts>
void pack_planes_of_parts(const T* from, const PixelTable& table, int64_t channel_step,
                          int64_t channels, uint16_t* to, int64_t plane, int64_t part_step,
                          Vec<float>& marks) {
  const int64_t groups = static_cast<int64_t>(table.groups.size());
  for (int64_t i = 0; i < groups; i += 2) {
    Vec<float> a[16], b[16];
    load_planes(from, table, i, channel_step, channels, a);
    load_planes(from, table, i + 1, channel_step, channels, b);
    for (int64_t c = 0; c < 16; ++c) {
      mark(marks, a[c]);
      mark(marks, b[c]);
      store_parts<T, Parts>(a[c], b[c], to + c * plane + i * 16, part_step);
    }
  }
}

// Packs 16 output channels as tiles of columns, 32 pixels each.
template <class T, int Parts>
void pack_gradient_tiles(const T* from, const PixelTable& table, int64_t channel_step,
                         int64_t channels, uint16_t* to, Vec<float>& marks) {
  const int64_t groups = static_cast<int64_t>(table.groups.size());
  for (int64_t i = 0; i < groups; ++i) {
    Vec<float> rows[16];
    load_pixels(from, table, i, channel_step, channels, rows);
    uint16_t* const tile = to + i / 2 * Parts * kTileElements + i % 2 * (kTileElements / 2);
    for (int64_t q = 0; q < 8; ++q) {
      mark(marks, rows[2 * q]);
      mark(marks, rows[2 * q + 1]);
      store_pairs<T, Parts>(rows[2 * q], rows[2 * q + 1], tile + q * 32, kTileElements);
    }
  }
}

template <int Parts>
bool weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                     const void* grad_output, const void* input, void* grad_weight) {
  const bool serial = plan.threads == 1;
  const Grid grid = forward_grid(problem);
  const int64_t pitch = grid.columns.pitch();
  const int64_t groups = problem.groups;
  const int64_t group_in = problem.in_channels / groups, group_out = problem.out_channels / groups;
  const int64_t in_tiles = ceil_div(group_in, 16), out_tiles = ceil_div(group_out, 16);
  const Pixels source =
      pixels_of(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const Pixels gradient =
      pixels_of(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const std::vector<GridTap>& row_taps = grid.rows.passes.front().taps;
  const std::vector<GridTap>& column_taps = grid.columns.passes.front().taps;
  const int64_t taps = static_cast<int64_t>(row_taps.size() * column_taps.size());

  const int64_t positions =
      round_up(grid.positions(plan.images_per_chunk, plan.rows_per_task) + kSlack, kBlock);
  // An odd number of cache lines: sixteen planes do not fall onto one set of the cache.
  const int64_t plane = (positions / kBlock | 1) * kBlock;
  const int64_t planes_step = groups * in_tiles * 16 * plane;
  const int64_t source_part = grid.residues() * planes_step;
  // Runs of pixels, each padded to whole tiles.
  const int64_t image_pixels = round_up(plan.rows_per_task * pitch, kBlock);
  const int64_t most_pixels =
      grid.rows.extra == 0
          ? round_up(plan.images_per_chunk * plan.rows_per_task * pitch, kBlock)
          : plan.images_per_chunk * image_pixels;
  const int64_t gradient_tile = most_pixels * 16 * Parts;
  const int64_t source_elements = Parts * source_part;
  const int64_t gradient_elements = groups * out_tiles * gradient_tile;
  const Workspace packed_workspace((source_elements + gradient_elements) *
                                   static_cast<int64_t>(sizeof(uint16_t)));
  uint16_t* const planes = packed_workspace.as<uint16_t>();
  uint16_t* const gradients = planes + source_elements;

  const int64_t in_blocks = ceil_div(group_in, kBlock), out_blocks = ceil_div(group_out, kBlock);
  const int64_t tasks = groups * in_blocks * out_blocks;
  const int64_t row_chunks = ceil_div(grid.rows.count, plan.rows_per_task);
  // An empty batch has one empty chunk: its gradient is zero.
  const int64_t chunks =
      std::max<int64_t>(1, ceil_div(problem.batch, plan.images_per_chunk)) * row_chunks;
  // Taps' blocks are a cache line more than a page apart.
  constexpr int64_t kTapStep = kBlock * kBlock + 16;
  const Workspace totals_workspace((chunks > 1 ? tasks : 0) * taps * kTapStep *
                                   static_cast<int64_t>(sizeof(float)));
  std::atomic<bool> finite{true};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t image = chunk / row_chunks * plan.images_per_chunk;
    const int64_t images = std::min(plan.images_per_chunk, problem.batch - image);
    const int64_t j0 = chunk % row_chunks * plan.rows_per_task;
    const int64_t rows = std::min(plan.rows_per_task, grid.rows.count - j0);

    std::vector<PixelTable> source_tables;
    for (const int64_t row_residue : grid.rows.residues) {
      for (const int64_t column_residue : grid.columns.residues) {
        PixelTable table;
        for (int64_t i = 0; i < images; ++i) {
          append_pixels(table, (image + i) * source.image_step, source.plane,
                        {(j0 + grid.rows.low) * grid.rows.step + row_residue, grid.rows.step,
                         source.plane.height},
                        rows + grid.rows.extra,
                        {grid.columns.low * grid.columns.step + column_residue, grid.columns.step,
                         source.plane.width},
                        pitch);
        }
        table.at.resize(static_cast<size_t>(positions), kNowhere);
        group_pixels(table, source.plane.column_stride);
        source_tables.push_back(std::move(table));
      }
    }
    PixelTable pixels;
    std::vector<int64_t> offsets;
    const bool one_run = grid.rows.extra == 0;
    for (int64_t i = 0; i < images; ++i) {
      const size_t begin = pixels.at.size();
      append_pixels(pixels, (image + i) * gradient.image_step, gradient.plane,
                    {j0, 1, gradient.plane.height}, rows, {0, 1, gradient.plane.width}, pitch);
      if (one_run && i + 1 < images) continue;
      pad_table(pixels, kBlock);
      const int64_t first = one_run ? 0 : i * (rows + grid.rows.extra) * pitch;
      const int64_t from = one_run ? 0 : static_cast<int64_t>(begin);
      for (int64_t p = from; p < static_cast<int64_t>(pixels.at.size()); p += kBlock) {
        offsets.push_back(first + p - from);
      }
    }
    group_pixels(pixels, gradient.plane.column_stride);

    const int64_t source_tiles = grid.residues() * groups * in_tiles;
    parallel_for(
        pool, source_tiles + groups * out_tiles, serial, [&](int64_t begin, int64_t end) {
          Vec<float> marks{};
          with_storage<float>(problem.dtype, [&](auto element) {
            using T = decltype(element);
            for (int64_t i = begin; i < end; ++i) {
              if (i < source_tiles) {
                const int64_t c = i % in_tiles * 16, group = i / in_tiles % groups;
                pack_planes_of_parts<T, Parts>(
                    static_cast<const T*>(input) +
                        (group * group_in + c) * source.plane.channel_stride,
                    source_tables[static_cast<size_t>(i / in_tiles / groups)],
                    source.plane.channel_stride, std::min<int64_t>(16, group_in - c),
                    planes + i * 16 * plane, plane, source_part, marks);
              } else {
                const int64_t tile = i - source_tiles;
                const int64_t k = tile % out_tiles * 16, group = tile / out_tiles;
                pack_gradient_tiles<T, Parts>(
                    static_cast<const T*>(grad_output) +
                        (group * group_out + k) * gradient.plane.channel_stride,
                    pixels, gradient.plane.channel_stride, std::min<int64_t>(16, group_out - k),
                    gradients + tile * gradient_tile, marks);
              }
            }
          });
          if (!all_finite(marks)) finite.store(false, std::memory_order_relaxed);
        });
    if (!finite.load(std::memory_order_relaxed)) return false;

    parallel_for(pool, tasks, serial, [&](int64_t begin, int64_t end) {
      const TileScope tile_scope;
      alignas(64) float sums[kBlock * kBlock];
      const Workspace task_totals(chunks > 1 ? 0
                                             : taps * kTapStep *
                                                   static_cast<int64_t>(sizeof(float)));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task % out_blocks * kBlock;
        const int64_t c = task / out_blocks % in_blocks * kBlock;
        const int64_t group = task / out_blocks / in_blocks;
        const int64_t in_count = std::min(kBlock, group_in - c);
        const int64_t out_count = std::min(kBlock, group_out - k);
        float* const totals = chunks > 1
                                  ? totals_workspace.as<float>() + task * taps * kTapStep
                                  : task_totals.as<float>();
        TileSteps product;
        product.offsets = offsets.data();
        product.count = static_cast<int64_t>(offsets.size());
        product.row_bytes = plane * static_cast<int64_t>(sizeof(uint16_t));
        product.rows_tile = 16 * plane;
        product.rows_part = source_part;
        product.columns = gradients + (group * out_tiles + k / 16) * gradient_tile;
        product.columns_tile = gradient_tile;
        float* tap_totals = totals;
        for (const GridTap& r : row_taps) {
          for (const GridTap& s : column_taps) {
            const int64_t residue =
                static_cast<int64_t>(r.residue * grid.columns.residues.size() + s.residue);
            product.rows = planes + residue * planes_step +
                           (group * in_tiles * 16 + c) * plane + r.cell * pitch + s.cell;
            multiply_block<Parts>(product, in_count, out_count,
                                  chunk == 0 ? tap_totals : sums);
            if (chunk > 0) {
              for (int64_t i = 0; i < round_up(in_count, 16) * kBlock; i += 16) {
                store(tap_totals + i, load(tap_totals + i) + load(sums + i));
              }
            }
            tap_totals += kTapStep;
          }
        }
        if (chunk + 1 < chunks) continue;
        with_storage<float>(problem.dtype, [&](auto element) {
          using T = decltype(element);
          T* const to = static_cast<T*>(grad_weight) +
                        (group * group_out + k) * problem.weight_stride_k +
                        c * problem.weight_stride_c;
          for (int64_t i = 0; i < out_count; ++i) {
            for (int64_t j = 0; j < in_count; ++j) {
              T* const out = to + i * problem.weight_stride_k + j * problem.weight_stride_c;
              const float* from = totals + j * kBlock + i;
              for (int64_t r = 0; r < problem.kernel_height; ++r) {
                for (int64_t s = 0; s < problem.kernel_width; ++s, from += kTapStep) {
                  out[r * problem.weight_stride_r + s * problem.weight_stride_s] =
                      narrow<T>(*from);
                }
              }
            }
          }
        });
      }
    });
  }
  return true;
}
