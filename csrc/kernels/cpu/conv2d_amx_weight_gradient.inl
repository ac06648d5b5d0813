// The weight gradient on matrix tiles.
//
// Rows of the product are input channels, depth the output pixels, columns the output
// channels, once a tap. Input channels are packed as planes of bfloat16 in the order of
// the grid's positions: a tap moves the whole plane, so that one packing serves all
// taps. The output's gradient is packed in the same order as pairs of pixels, zero
// where a position is no output. A task packs the chunks of its slice of the positions,
// for some input channels and all output channels, and sums their products; slices are
// added in their order. The problem alone decides how many there are, so that a sum has
// one order whatever the number of threads.

// Packs 16 channels' planes of the table's groups [begin, end), which are even.
template <class T, int Parts>
void pack_planes_of_parts(const T* from, const PixelTable& table, int64_t begin, int64_t end,
                          int64_t channel_step, int64_t channels, uint16_t* to, int64_t plane,
                          int64_t part_step, Largest& largest) {
  for (int64_t i = begin; i < end; i += 2) {
    Vec<float> a[16], b[16];
    load_planes(from, table, i, channel_step, channels, a);
    load_planes(from, table, i + 1, channel_step, channels, b);
    for (int64_t c = 0; c < 16; ++c) {
      mark(largest, a[c]);
      mark(largest, b[c]);
      store_parts<T, Parts>(a[c], b[c], to + c * plane + i * 16, part_step);
    }
  }
}

// Packs 16 output channels as tiles of columns, 32 pixels each.
template <class T, int Parts>
void pack_gradient_tiles(const T* from, const PixelTable& table, int64_t begin, int64_t end,
                         int64_t channel_step, int64_t channels, uint16_t* to, Largest& largest) {
  for (int64_t i = begin; i < end; ++i) {
    Vec<float> rows[16];
    load_pixels(from, table, i, channel_step, channels, rows);
    uint16_t* const tile = to + i / 2 * Parts * kTileElements + i % 2 * (kTileElements / 2);
    for (int64_t q = 0; q < 8; ++q) {
      mark(largest, rows[2 * q]);
      mark(largest, rows[2 * q + 1]);
      store_pairs<T, Parts>(rows[2 * q], rows[2 * q + 1], tile + q * 32, kTileElements);
    }
  }
}

// Writes one block of totals, [tap][input channel][output channel], to the weights
// from element `at` on. Weights of an output channel that lie in one piece are
// transposed, 16 at a time.
inline void write_weights(const Conv2dProblem& problem, void* weights, int64_t at,
                          int64_t out_channels, int64_t in_channels, const float* totals,
                          int64_t tap_step) {
  const int64_t taps = problem.kernel_height * problem.kernel_width;
  const auto tap_offset = [&](int64_t tap) {
    return tap / problem.kernel_width * problem.weight_stride_r +
           tap % problem.kernel_width * problem.weight_stride_s;
  };
  // Elements i of a piece lie side by side, the output channels of total(i) in a row.
  const auto write_piece = [&](int64_t piece_at, int64_t count, auto&& total) {
    for (int64_t k = 0; k < out_channels; k += 16) {
      for (int64_t i = 0; i < count; i += 16) {
        Vec<float> square[16];
        for (int64_t j = 0; j < 16; ++j) {
          square[j] = load(total(std::min(i + j, count - 1)) + k);
        }
        transpose<float>(square);
        for (int64_t row = 0; row < std::min<int64_t>(16, out_channels - k); ++row) {
          store_out<float>(problem.dtype, weights,
                           piece_at + (k + row) * problem.weight_stride_k + i, square[row],
                           std::min<int64_t>(16, count - i), 1);
        }
      }
    }
  };
  if (problem.weight_stride_c == 1) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      write_piece(at + tap_offset(tap), in_channels,
                  [&](int64_t i) { return totals + tap * tap_step + i * kBlock; });
    }
    return;
  }
  if (problem.weight_stride_c == taps && problem.weight_stride_s == 1 &&
      problem.weight_stride_r == problem.kernel_width) {
    write_piece(at, in_channels * taps,
                [&](int64_t i) { return totals + i % taps * tap_step + i / taps * kBlock; });
    return;
  }
  for (int64_t c = 0; c < in_channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* const from = totals + tap * tap_step + c * kBlock;
      for (int64_t k = 0; k < out_channels; k += 16) {
        store_as<float>(
            problem.dtype, weights,
            at + k * problem.weight_stride_k + c * problem.weight_stride_c + tap_offset(tap),
            load(from + k), std::min<int64_t>(16, out_channels - k), problem.weight_stride_k);
      }
    }
  }
}

// The packed pixels of a chunk.
struct GradientChunk {
  std::vector<PixelTable> sources;  // by residue
  PixelTable outputs;
  std::vector<int64_t> offsets;  // of planes, by step
};

inline void locate_chunk(GradientChunk& chunk, const Grid& grid, const Pixels& source,
                         const Pixels& gradient, int64_t image, int64_t images, int64_t j0,
                         int64_t rows, int64_t positions) {
  const int64_t pitch = grid.columns.pitch();
  chunk.sources.clear();
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
      chunk.sources.push_back(std::move(table));
    }
  }
  chunk.outputs = {};
  chunk.offsets.clear();
  // Without border rows all images are one sequence of rows.
  const bool one_run = grid.rows.extra == 0;
  for (int64_t i = 0; i < images; ++i) {
    const int64_t begin = one_run ? 0 : static_cast<int64_t>(chunk.outputs.at.size());
    append_pixels(chunk.outputs, (image + i) * gradient.image_step, gradient.plane,
                  {j0, 1, gradient.plane.height}, rows, {0, 1, gradient.plane.width}, pitch);
    if (one_run && i + 1 < images) continue;
    pad_table(chunk.outputs, kBlock);
    const int64_t first = one_run ? 0 : i * (rows + grid.rows.extra) * pitch;
    for (int64_t p = begin; p < static_cast<int64_t>(chunk.outputs.at.size()); p += kBlock) {
      chunk.offsets.push_back(first + p - begin);
    }
  }
  group_pixels(chunk.outputs, gradient.plane.column_stride);
}

template <int Parts>
bool weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                     const void* grad_output, const void* input, void* grad_weight) {
  const bool serial = plan.threads == 1;
  const Grid grid = forward_grid(problem);
  const int64_t pitch = grid.columns.pitch();
  const int64_t groups = problem.groups;
  const int64_t group_in = problem.in_channels / groups, group_out = problem.out_channels / groups;
  const int64_t out_tiles = ceil_div(group_out, 16);
  const Pixels source =
      pixels_of(problem.layout, problem.in_channels, problem.in_height, problem.in_width);
  const Pixels gradient =
      pixels_of(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const std::vector<GridTap>& row_taps = grid.rows.passes.front().taps;
  const std::vector<GridTap>& column_taps = grid.columns.passes.front().taps;
  const int64_t taps = static_cast<int64_t>(row_taps.size() * column_taps.size());
  const int64_t row_chunks = ceil_div(grid.rows.count, plan.rows_per_task);
  const int64_t chunks = ceil_div(problem.batch, plan.images_per_chunk) * row_chunks;

  // An odd number of cache lines: sixteen planes do not fall onto one set of the cache.
  const int64_t plane =
      (grid.packed_positions(plan.images_per_chunk, plan.rows_per_task) / kBlock | 1) * kBlock;
  const int64_t range = plan.channels_per_task;
  const int64_t planes_step = range * plane;
  const int64_t source_part = grid.residues() * planes_step;
  // Runs of pixels, each padded to whole tiles.
  const int64_t most_pixels =
      grid.rows.extra == 0 ? round_up(plan.images_per_chunk * plan.rows_per_task * pitch, kBlock)
                           : plan.images_per_chunk * round_up(plan.rows_per_task * pitch, kBlock);
  const int64_t gradient_tile = most_pixels * 16 * Parts;

  // Totals: [slice][group][in block][out block][tap]. Taps' blocks are a cache line
  // more than a page apart.
  constexpr int64_t kTapStep = kBlock * kBlock + 16;
  const int64_t in_blocks = ceil_div(group_in, kBlock), out_blocks = ceil_div(group_out, kBlock);
  const int64_t slices = amx_gradient_slices(problem, chunks);
  const int64_t slice_step = groups * in_blocks * out_blocks * taps * kTapStep;
  const Workspace totals_workspace(slices * slice_step * static_cast<int64_t>(sizeof(float)));
  float* const totals = totals_workspace.as<float>();
  const int64_t ranges = ceil_div(group_in, range);
  Magnitudes magnitudes;
  parallel_for(pool, slices * groups * ranges, serial, [&](int64_t begin, int64_t end) {
    const int64_t source_elements = Parts * source_part;
    const Workspace workspace((source_elements + out_tiles * gradient_tile) *
                              static_cast<int64_t>(sizeof(uint16_t)));
    uint16_t* const planes = workspace.as<uint16_t>();
    uint16_t* const gradients = planes + source_elements;
    const TileScope tile_scope;
    GradientChunk pixels;
    Nothing nothing;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c_begin = task % ranges * range;
      const int64_t c_end = std::min(group_in, c_begin + range);
      const int64_t group = task / ranges % groups;
      const int64_t slice = task / ranges / groups;
      const int64_t chunk_begin = slice * chunks / slices;
      const int64_t chunk_end = (slice + 1) * chunks / slices;
      float* const task_totals =
          totals + slice * slice_step + group * in_blocks * out_blocks * taps * kTapStep;
      // An empty batch has no chunk: its gradient is zero.
      if (chunk_begin == chunk_end) {
        std::fill_n(task_totals + c_begin / kBlock * out_blocks * taps * kTapStep,
                    ceil_div(c_end - c_begin, kBlock) * out_blocks * taps * kTapStep, 0.0f);
      }
      for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
        const int64_t image = chunk / row_chunks * plan.images_per_chunk;
        const int64_t images = std::min(plan.images_per_chunk, problem.batch - image);
        const int64_t j0 = chunk % row_chunks * plan.rows_per_task;
        const int64_t rows = std::min(plan.rows_per_task, grid.rows.count - j0);
        locate_chunk(pixels, grid, source, gradient, image, images, j0, rows, plane);
        Largest largest_source{}, largest_gradient{};
        with_storage<float>(problem.dtype, [&](auto element) {
          using T = decltype(element);
          const int64_t channel_step = source.plane.channel_stride;
          for (size_t residue = 0; residue < pixels.sources.size(); ++residue) {
            const PixelTable& table = pixels.sources[residue];
            in_memory_order(table, channel_step, [&](int64_t begin, int64_t end) {
              for (int64_t c = c_begin; c < c_end; c += 16) {
                pack_planes_of_parts<T, Parts>(
                    static_cast<const T*>(input) + (group * group_in + c) * channel_step, table,
                    begin, end, channel_step, std::min<int64_t>(16, c_end - c),
                    planes + static_cast<int64_t>(residue) * planes_step + (c - c_begin) * plane,
                    plane, source_part, largest_source);
              }
            });
          }
          in_memory_order(pixels.outputs, channel_step, [&](int64_t begin, int64_t end) {
            for (int64_t k = 0; k < group_out; k += 16) {
              pack_gradient_tiles<T, Parts>(
                  static_cast<const T*>(grad_output) +
                      (group * group_out + k) * gradient.plane.channel_stride,
                  pixels.outputs, begin, end, gradient.plane.channel_stride,
                  std::min<int64_t>(16, group_out - k), gradients + k / 16 * gradient_tile,
                  largest_gradient);
            }
          });
        });
        magnitudes.add_source(largest_source);
        magnitudes.add_weights(largest_gradient);
        if (!magnitudes.finite()) return;

        TileSteps product;
        product.offsets = pixels.offsets.data();
        product.count = static_cast<int64_t>(pixels.offsets.size());
        product.row_bytes = plane * static_cast<int64_t>(sizeof(uint16_t));
        product.rows_tile = 16 * plane;
        product.rows_part = source_part;
        product.columns_part = kTileElements;
        product.columns_tile = gradient_tile;
        const auto multiply = [&](int64_t c, int64_t k) {
          product.columns = gradients + k / 16 * gradient_tile;
          float* const block_totals =
              task_totals + (c / kBlock * out_blocks + k / kBlock) * taps * kTapStep;
          // All taps of some pixels, which then lie in the cache.
          const int64_t length = steps_per_sum(product.count);
          for (int64_t step = 0; step < product.count; step += length) {
            const int64_t last = std::min(product.count, step + length);
            float* tap_totals = block_totals;
            for (const GridTap& r : row_taps) {
              for (const GridTap& s : column_taps) {
                const int64_t residue =
                    static_cast<int64_t>(r.residue * grid.columns.residues.size() + s.residue);
                product.rows = planes + residue * planes_step + (c - c_begin) * plane +
                               r.cell * pitch + s.cell;
                multiply_block<Parts>(product, step, last, std::min(kBlock, c_end - c),
                                      std::min(kBlock, group_out - k),
                                      chunk > chunk_begin || step > 0, nothing, tap_totals);
                tap_totals += kTapStep;
              }
            }
          }
        };
        // The smaller side stays in the cache for each block of the larger.
        if (c_end - c_begin > group_out) {
          for (int64_t c = c_begin; c < c_end; c += kBlock) {
            for (int64_t k = 0; k < group_out; k += kBlock) multiply(c, k);
          }
        } else {
          for (int64_t k = 0; k < group_out; k += kBlock) {
            for (int64_t c = c_begin; c < c_end; c += kBlock) multiply(c, k);
          }
        }
      }
    }
  });
  if (!magnitudes.finite()) return false;

  parallel_for(pool, groups * in_blocks * out_blocks, serial, [&](int64_t begin, int64_t end) {
    Largest largest{};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % out_blocks * kBlock;
      const int64_t c = i / out_blocks % in_blocks * kBlock;
      const int64_t group = i / out_blocks / in_blocks;
      float* const block = totals + i * taps * kTapStep;
      for (int64_t slice = 1; slice < slices; ++slice) {
        const float* const more = block + slice * slice_step;
        for (int64_t j = 0; j < taps * kTapStep; j += 16) {
          store(block + j, load(block + j) + load(more + j));
        }
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t row = 0; row < std::min(kBlock, group_in - c); ++row) {
          const float* const total = block + tap * kTapStep + row * kBlock;
          mark(largest, load(total));
          if (group_out - k > 16) mark(largest, load(total + 16));
        }
      }
      write_weights(problem, grad_weight,
                    (group * group_out + k) * problem.weight_stride_k + c * problem.weight_stride_c,
                    std::min(kBlock, group_out - k), std::min(kBlock, group_in - c), block,
                    kTapStep);
    }
    magnitudes.add_result(largest);
  });
  return problem.dtype == DType::bfloat16 || magnitudes.exact();
}
