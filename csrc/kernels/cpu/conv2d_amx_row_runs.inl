// A forward pass on matrix tiles whose input has few channels.
//
// A tile 32 channels deep would be nearly empty. But in channels_last the taps of a
// kernel row, with all their channels, are one run of elements, and the run of the next
// output begins a stride behind: a tile of sixteen outputs by 32 of a run is read where
// it lies, with rows that overlap. A 7x7 kernel of three channels takes 7 steps instead
// of 49, and nothing is packed but the input, once, with its border and in its parts.
// Where a run is shorter than a tile, weights of zero meet what follows it; the input
// must therefore be finite in every type.

template <class T>
void widen_all(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load_widened(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
}

// Elements [0, count) of a row, as parts.
template <class T, int Parts>
void store_row(const float* from, int64_t count, uint16_t* to, int64_t part_step,
               Largest& largest) {
  alignas(64) float rest[2 * 16] = {};
  for (int64_t i = 0; i < count; i += 32) {
    const float* at = from + i;
    if (count - i < 32) {
      std::copy(at, from + count, rest);
      at = rest;
    }
    const Vec<float> a = load(at), b = load(at + 16);
    mark(largest, a);
    mark(largest, b);
    if (count - i >= 32) {
      store_parts<T, Parts>(a, b, to + i, part_step);
      continue;
    }
    alignas(64) uint16_t parts[Parts * 32];
    store_parts<T, Parts>(a, b, parts, 32);
    for (int part = 0; part < Parts; ++part) {
      std::copy(parts + part * 32, parts + part * 32 + count - i, to + part * part_step + i);
    }
  }
}

// Parts of the input in channels_last, with the border that outputs read.
template <class T, int Parts>
void pack_row_runs(const Conv2dProblem& problem, const ThreadPool& pool, bool serial,
                   const T* input, uint16_t* to, int64_t part_step, Magnitudes& magnitudes) {
  const int64_t channels = problem.in_channels;
  const int64_t rows = bordered_rows(problem), columns = bordered_columns(problem);
  const Pixels source = pixels_of(problem.layout, channels, problem.in_height, problem.in_width);
  const int64_t left = std::min(problem.pad_left, columns);
  const int64_t inside = std::clamp<int64_t>(columns - left, 0, problem.in_width);
  parallel_for(pool, problem.batch * rows, serial, [&](int64_t begin, int64_t end) {
    const Workspace row_workspace(columns * channels * static_cast<int64_t>(sizeof(float)));
    float* const row = row_workspace.as<float>();
    std::fill_n(row, columns * channels, 0.0f);
    float* const image = row + left * channels;
    Largest largest{};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % rows - problem.pad_top;
      uint16_t* const packed = to + i * columns * channels;
      if (y < 0 || y >= problem.in_height) {
        for (int part = 0; part < Parts; ++part) {
          std::fill_n(packed + part * part_step, columns * channels, uint16_t{0});
        }
        continue;
      }
      const T* const from = input + i / rows * source.image_step + y * source.plane.row_stride;
      if (source.plane.channel_stride == 1) {
        widen_all(from, inside * channels, image);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const T* const plane = from + c * source.plane.channel_stride;
          for (int64_t x = 0; x < inside; ++x) image[x * channels + c] = widen(plane[x]);
        }
      }
      store_row<T, Parts>(row, columns * channels, packed, part_step, largest);
    }
    magnitudes.add_source(largest);
  });
  // What is read past the last row.
  const int64_t end = problem.batch * rows * columns * channels;
  for (int part = 0; part < Parts; ++part) {
    std::fill(to + part * part_step + end, to + (part + 1) * part_step, uint16_t{0});
  }
}

// The weights of a kernel row as one tap of kernel_width * channels channels.
template <class T>
void copy_weight_runs(const Conv2dProblem& problem, const T* weight, T* to) {
  for (int64_t k = 0; k < problem.out_channels; ++k) {
    for (int64_t r = 0; r < problem.kernel_height; ++r) {
      for (int64_t s = 0; s < problem.kernel_width; ++s) {
        const T* const tap = weight + k * problem.weight_stride_k + r * problem.weight_stride_r +
                             s * problem.weight_stride_s;
        for (int64_t c = 0; c < problem.in_channels; ++c) *to++ = tap[c * problem.weight_stride_c];
      }
    }
  }
}

template <class T, int Parts>
bool row_runs_pass(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                   const void* input, const void* weight, const float* bias, void* output) {
  const bool serial = plan.threads == 1;
  const int64_t run = problem.kernel_width * problem.in_channels;
  const int64_t kernel = problem.kernel_height * run;
  const int64_t part_step = row_run_elements(problem);
  const Workspace workspace(Parts * part_step * static_cast<int64_t>(sizeof(uint16_t)));
  uint16_t* const packed = workspace.as<uint16_t>();
  Magnitudes magnitudes;
  pack_row_runs<T, Parts>(problem, pool, serial, static_cast<const T*>(input), packed, part_step,
                          magnitudes);
  if (!magnitudes.finite()) return false;

  const Workspace runs_workspace(problem.out_channels * kernel * static_cast<int64_t>(sizeof(T)));
  T* const weight_runs = runs_workspace.as<T>();
  copy_weight_runs(problem, static_cast<const T*>(weight), weight_runs);
  // One column of taps, a row each; its steps are blocks of the run, of all taps each.
  GridPass taps = {0, 1, 1, {}}, column = {0, 1, 1, {{0, 0, 0}}};
  for (int64_t r = 0; r < problem.kernel_height; ++r) taps.taps.push_back({r, 0, 0});
  const Pixels destination =
      pixels_of(problem.layout, problem.out_channels, problem.out_height, problem.out_width);
  const GridProblem grid_problem = {
      problem.dtype,
      1,
      problem.batch,
      {},
      {},
      destination,
      nullptr,
      {run, problem.out_channels, 1, kernel, 0, run, 0, problem.kernel_height, kernel - run},
      weight_runs,
      bias,
      output,
      problem.relu};
  const int64_t row_step = bordered_columns(problem) * problem.in_channels;
  std::vector<ClassSteps> classes = {{&taps, &column, {}, 0}};
  ClassSteps& steps = classes.front();
  for (int64_t block = 0; block < grid_problem.blocks(); ++block) {
    for (int64_t r = 0; r < problem.kernel_height; ++r) {
      steps.offsets.push_back(r * problem.dilation_h * row_step + block * kTileDepth);
    }
  }
  const Workspace weight_workspace(packed_weight_elements<Parts>(grid_problem, classes) *
                                   static_cast<int64_t>(sizeof(uint16_t)));
  uint16_t* const tiles = weight_workspace.as<uint16_t>();
  pack_all_weights<Parts>(pool, serial, grid_problem, classes, tiles, magnitudes);
  if (!magnitudes.finite()) return false;

  const int64_t row_blocks = ceil_div(problem.out_width, kBlock);
  const int64_t count = static_cast<int64_t>(steps.offsets.size());
  const int64_t ranges = ceil_div(problem.out_height, plan.rows_per_task);
  const int64_t pixel_step = problem.stride_w * problem.in_channels;
  parallel_for(pool, problem.batch * ranges, serial, [&](int64_t begin, int64_t end) {
    const TileScope tile_scope;
    alignas(64) float two_sums[2][kSums];
    ClassPixels pixels;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / ranges, first = task % ranges * plan.rows_per_task;
      const int64_t rows = std::min(plan.rows_per_task, problem.out_height - first);
      pixels = {{}, rows, problem.out_width, row_blocks, 0};
      for (int64_t y = first; y < first + rows; ++y) {
        append_pixels(pixels.table, image * destination.image_step, destination.plane,
                      {y, 1, problem.out_height}, 1, {0, 1, problem.out_width}, problem.out_width);
        pad_table(pixels.table, kBlock);
      }
      group_pixels(pixels.table, destination.plane.column_stride);
      BlockStore store(grid_problem.pixels_out(&pixels.table), magnitudes);
      for (int64_t i = 0; i < pixels.blocks(); ++i) {
        const int64_t y = first + i / row_blocks;
        const uint16_t* const at =
            packed + (image * bordered_rows(problem) + y * problem.stride_h) * row_step +
            i % row_blocks * kBlock * pixel_step;
        for (int64_t k = 0; k < problem.out_channels; k += kBlock) {
          multiply_pixels<Parts>(steps, 0, count, true, true, true, pixels, i, i + 1, at, part_step,
                                 class_weights<Parts>(tiles, grid_problem, steps, 0, k / 16),
                                 column_block(grid_problem, 0, k, problem.out_channels), store,
                                 store, two_sums, nullptr, pixel_step);
        }
      }
    }
  });
  return !grid_problem.splits() || magnitudes.exact();
}

template <int Parts>
bool row_runs_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                      const void* input, const void* weight, const float* bias, void* output) {
  bool finite = true;
  with_storage<float>(problem.dtype, [&](auto element) {
    finite =
        row_runs_pass<decltype(element), Parts>(problem, plan, pool, input, weight, bias, output);
  });
  return finite;
}
