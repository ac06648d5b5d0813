// Plans of convolution: which algorithm, by an estimate of its cycles, and how the
// work is cut; and the way from a plan to its kernel.
#include "kernels/conv2d.h"

#include <algorithm>

#include "kernels/cpu/conv2d_amx.h"
#include "kernels/cpu/conv2d_depthwise.h"
#include "kernels/cpu/conv2d_direct.h"
#include "kernels/cpu/conv2d_outer_product.h"
#include "kernels/cpu/conv2d_patches.h"
#include "kernels/cpu/conv2d_runs.h"
#include "kernels/cpu/conv2d_winograd.h"
#include "kernels/cpu/gradient_phase.h"

namespace cnnkernels {
namespace {

// What the tiles read should stay in the second-level cache of all threads.
constexpr int64_t kPackedChunkBytes = 512 * 1024;

// Cuts `rows` so that every thread gets several tasks when there are few
// (image, channel block) pairs.
int64_t rows_per_task(int64_t rows, int64_t other_tasks, int threads) {
  if (threads == 1) return rows;
  const int64_t wanted_tasks = 4 * int64_t{threads};
  const int64_t blocks = std::clamp<int64_t>(ceil_div(wanted_tasks, other_tasks), 1, rows);
  return ceil_div(rows, blocks);
}

// The plan of a pass that packs `packed_image` elements an image and gives
// `group_channels` channels of `rows` rows in each group.
Conv2dPlan pass_plan(const Conv2dProblem& problem, ConvAlgorithm algorithm, Isa isa, int threads,
                     int64_t packed_image, int64_t group_channels, int64_t rows) {
  Conv2dPlan plan;
  plan.algorithm = algorithm;
  plan.isa = isa;
  plan.vector_lanes = static_cast<int>(vector_bytes(isa) / accumulator_size(problem.dtype));
  plan.threads = problem.multiply_adds() < kSerialMultiplyAdds ? 1 : threads;
  const int64_t image_bytes = std::max<int64_t>(1, packed_image * accumulator_size(problem.dtype));
  plan.images_per_chunk = std::clamp<int64_t>(plan.threads * kPackedChunkBytes / image_bytes, 1,
                                              std::max<int64_t>(1, problem.batch));
  plan.channels_per_task =
      algorithm == ConvAlgorithm::direct ? std::min<int64_t>(group_channels, 24) : group_channels;
  const int64_t other_tasks =
      plan.images_per_chunk * problem.groups * ceil_div(group_channels, plan.channels_per_task);
  plan.rows_per_task = std::max<int64_t>(1, rows_per_task(rows, other_tasks, plan.threads));
  plan.parts = amx_parts(problem);
  plan.amx_order = AmxOrder::chunks;
  plan.channels_per_slice = 0;
  plan.in_place = false;
  plan.weights_first = false;
  plan.workspace_bytes = plan.images_per_chunk * image_bytes;
  return plan;
}

int64_t lanes_of(const Conv2dProblem& problem, Isa isa) {
  return vector_bytes(isa) / accumulator_size(problem.dtype);
}

// Whether tiles can read elements where they lie.
bool of_accumulator_type(const Conv2dProblem& problem) {
  return problem.dtype == DType::float32 || problem.dtype == DType::float64;
}

// A pass over one image and group, as all algorithms see it.
struct Pass {
  int64_t from;      // channels of the source
  int64_t taps;      // products with each of them in an output
  int64_t channels;  // of the output
  int64_t rows, columns;
  int64_t residues;  // source pixels for each of the output's, by the stride

  int64_t steps() const { return from * taps; }
};

Pass forward_pass(const Conv2dProblem& problem) {
  return {problem.in_channels / problem.groups,
          problem.kernel_height * problem.kernel_width,
          problem.out_channels / problem.groups,
          problem.out_height,
          problem.out_width,
          std::min(problem.stride_h, problem.kernel_height) *
              std::min(problem.stride_w, problem.kernel_width)};
}

// Estimates of the cycles that an image takes, of which only the comparison
// matters. A multiply-add of vectors costs half a cycle and somewhat more for
// what surrounds it; storing costs by the vector, packing by the element. The factors
// are fitted to measurements of an AVX2 machine, those of tiles to a machine with AMX.
double direct_cost(const Pass& pass, Layout layout, int64_t lanes) {
  const double vectors =
      static_cast<double>(pass.channels * pass.rows * ceil_div(pass.columns, lanes));
  // Planes of channels_last are gathered.
  const double packing = static_cast<double>(pass.from * pass.rows * pass.columns) *
                         (layout == Layout::nchw ? 0.5 : 4);
  return vectors * (0.75 * static_cast<double>(pass.steps()) + (layout == Layout::nchw ? 3 : 12)) +
         packing;
}

double outer_product_cost(const Pass& pass, Layout layout, int64_t lanes, int64_t batch) {
  constexpr int64_t kTile = 8;
  const int64_t vectors = ceil_div(pass.channels, lanes);
  const double pixels = static_cast<double>(std::max(kTile, pass.rows * pass.columns));
  const double store = layout == Layout::nchw ? 6 : pass.channels % lanes == 0 ? 3 : 12;
  const double panels =
      0.7 * static_cast<double>(pass.steps() * vectors * lanes) / static_cast<double>(batch);
  return pixels * static_cast<double>(vectors) *
             (0.62 * static_cast<double>(pass.steps()) + store) +
         panels;
}

ConvAlgorithm cheaper(const Pass& pass, const Conv2dProblem& problem, Isa isa) {
  const int64_t lanes = lanes_of(problem, isa);
  return outer_product_cost(pass, problem.layout, lanes, problem.batch) <
                 direct_cost(pass, problem.layout, lanes)
             ? ConvAlgorithm::outer_product
             : ConvAlgorithm::direct;
}

// A step of a block of 32 pixels, 32 channels and 32 deep, by the number of parts.
double amx_block_cycles(const Conv2dProblem& problem) {
  const int parts = amx_parts(problem);
  return parts == 3 ? 400 : parts == 2 ? 220 : 100;
}

// The same for matrix tiles.
double amx_cost(const Pass& pass, const Conv2dProblem& problem) {
  const double pixels = static_cast<double>(round_up(pass.rows * pass.columns, 16));
  const double channels = static_cast<double>(round_up(pass.channels, 16));
  const double depth = static_cast<double>(round_up(pass.from, kAmxDepth));
  const double taps = static_cast<double>(pass.taps);
  const double products = pixels / 32 * channels / 32 * depth / 32 * taps;
  const double packing = 1.4 * pixels * depth * static_cast<double>(pass.residues);
  const double storing = 0.5 * pixels * channels;
  const double weights = channels * depth * taps * 1.5;
  const double call = 40000;
  return products * amx_block_cycles(problem) + packing + storing +
         (weights + call) / static_cast<double>(std::max<int64_t>(1, problem.batch));
}

// The same for a forward pass whose input is read in runs.
double row_runs_cost(const Conv2dProblem& problem) {
  const double blocks =
      static_cast<double>(problem.out_height * ceil_div(problem.out_width, kAmxBlock));
  const double channels = static_cast<double>(round_up(problem.out_channels, 16));
  const double steps = static_cast<double>(
      problem.kernel_height * ceil_div(problem.kernel_width * problem.in_channels, kAmxDepth));
  // A run is seldom aligned: tiles load slower than they multiply.
  const double products = blocks * channels / kAmxBlock * steps * 1.5;
  const double copying =
      static_cast<double>(problem.in_height * problem.in_width * problem.in_channels);
  const double storing = blocks * kAmxBlock * channels * 0.35;
  const double call = 40000;
  return products * amx_block_cycles(problem) +
         (problem.layout == Layout::nchw ? 1.5 : 0.7) * copying + storing +
         call / static_cast<double>(std::max<int64_t>(1, problem.batch));
}

// The cost of a weight gradient on matrix tiles.
double amx_weight_gradient_cost(const Conv2dProblem& problem) {
  const double pixels =
      static_cast<double>(round_up(problem.out_height * problem.out_width, kAmxDepth));
  const double in = static_cast<double>(round_up(problem.in_channels / problem.groups, 16));
  const double out = static_cast<double>(round_up(problem.out_channels / problem.groups, 16));
  const double taps = static_cast<double>(problem.kernel_height * problem.kernel_width);
  const double products = pixels / 32 * in / 32 * out / 32 * taps;
  const double residues = static_cast<double>(std::min(problem.stride_h, problem.kernel_height) *
                                              std::min(problem.stride_w, problem.kernel_width));
  const double packing = pixels * (in * residues + out) * 0.6;
  const double call = (3000 + in * out * taps) / static_cast<double>(problem.batch);
  return products * amx_block_cycles(problem) + packing + call;
}

// Weights of a group.
int64_t weight_elements(const Conv2dProblem& problem) {
  return problem.in_channels / problem.groups * problem.kernel_height * problem.kernel_width *
         (problem.out_channels / problem.groups);
}

// Whether a weight gradient that is read where it lies is faster than one that is packed, if
// not for tiles: its totals are read and written for every block of pixels.
bool runs_pay(const Conv2dProblem& problem) {
  constexpr int64_t kMostWeights = 48 * 1024;
  return weight_elements(problem) <= kMostWeights;
}

// The cost of a weight gradient that is read where it lies, beside that on tiles.
double runs_cost(const Conv2dProblem& problem, int64_t lanes) {
  const GradientRuns runs = gradient_runs(problem, lanes);
  const double vectors =
      static_cast<double>(ceil_div(runs.vector_channels, lanes) * runs.run * problem.kernel_height);
  const double totals = static_cast<double>(weight_elements(problem)) / (128 * 1024);
  return static_cast<double>(problem.out_height * problem.out_width) * vectors *
         (0.34 + 0.16 * totals);
}

// The same for Winograd's algorithm: 16 products a tile of 2x2, and its transforms.
double winograd_cost(const Pass& pass, const Conv2dProblem& problem, int64_t lanes) {
  const double tiles = static_cast<double>(ceil_div(pass.rows, 2) * ceil_div(pass.columns, 2));
  const double from = static_cast<double>(ceil_div(pass.from, lanes));
  const double to = static_cast<double>(ceil_div(pass.channels, lanes));
  const double products = 16 * 0.62 * static_cast<double>(pass.from) * to;
  const double weights = 200 * static_cast<double>(pass.from) * to /
                         static_cast<double>(std::max<int64_t>(1, problem.batch));
  // Through a window each vector is read and written once more.
  const double window = problem.dtype == DType::float32 && problem.layout == Layout::nhwc ? 0 : 1;
  return tiles * (products + (50 + 40 * window) * from + (80 + 40 * window) * to) + weights;
}

// With few channels the transforms cost more than they save, and their error shows.
constexpr int64_t kWinogradChannels = 32;

// amx: the cost of matrix tiles, if they take the problem.
ConvAlgorithm cheapest(const Pass& pass, double amx, const Conv2dProblem& problem, Isa isa) {
  ConvAlgorithm best = cheaper(pass, problem, isa);
  const int64_t lanes = lanes_of(problem, isa);
  double cost = best == ConvAlgorithm::direct
                    ? direct_cost(pass, problem.layout, lanes)
                    : outer_product_cost(pass, problem.layout, lanes, problem.batch);
  if (winograd_applies(problem) && problem.in_channels >= kWinogradChannels &&
      problem.out_channels >= kWinogradChannels) {
    const double winograd = winograd_cost(pass, problem, lanes);
    if (winograd < cost) {
      best = ConvAlgorithm::winograd;
      cost = winograd;
    }
  }
  if (amx_applies(problem, isa) && amx < cost) best = ConvAlgorithm::amx;
  return best;
}

// Cuts a pass of outer products from `from` channels a group to `to` into tasks: rows of an
// image, and, where too few pixels would share the reading of the weights, ranges of
// channels. A row of results packs `row_bytes`, and a task `border_bytes` more.
void cut_into_tasks(Conv2dPlan& plan, const Conv2dProblem& problem, int64_t from, int64_t to,
                    int64_t rows, int64_t columns, int64_t row_bytes, int64_t border_bytes) {
  // Panels that stay in a second-level cache, and sources that do beside a part of them.
  constexpr int64_t kFewPanelBytes = 1024 * 1024, kFewSourceBytes = 1536 * 1024;
  constexpr int64_t kFewestPixels = 192;
  const int64_t size = accumulator_size(problem.dtype);
  const int64_t panel_bytes = size * problem.groups * from * problem.kernel_height *
                              problem.kernel_width * round_up(to, plan.vector_lanes);
  const int64_t source_bytes =
      problem.batch * (plan.in_place ? size * problem.groups * from * rows * columns
                                     : border_bytes + rows * row_bytes);
  plan.images_per_chunk = problem.batch;
  if (panel_bytes > kFewPanelBytes && panel_bytes > source_bytes &&
      source_bytes <= kFewSourceBytes) {
    plan.weights_first = true;
    plan.rows_per_task = std::max<int64_t>(1, rows);
    // A tile of vectors, or what gives every thread a task.
    const int64_t vectors = problem.groups * ceil_div(to, int64_t{plan.vector_lanes});
    const int64_t tile =
        std::clamp<int64_t>(ceil_div(vectors, plan.threads), 1, plan.isa >= Isa::avx512 ? 4 : 2);
    plan.channels_per_task = tile * plan.vector_lanes;
    plan.workspace_bytes =
        (plan.in_place ? 0 : source_bytes) +
        plan.threads * panel_bytes / std::max<int64_t>(1, to / plan.channels_per_task);
    return;
  }
  const int64_t tasks = std::max<int64_t>(1, problem.batch * problem.groups);
  const int64_t wanted = plan.threads == 1 ? 1 : ceil_div(4 * int64_t{plan.threads}, tasks);
  // As many blocks of rows as pixels allow; ranges make them the number wanted.
  int64_t blocks = std::min({wanted, rows, rows * columns / kFewestPixels + 1});
  while (blocks > 1 && wanted % blocks != 0) --blocks;
  const int64_t ranges = std::min(ceil_div(wanted, std::max<int64_t>(1, blocks)),
                                  ceil_div(to, int64_t{plan.vector_lanes}));
  if (blocks * ranges < wanted) blocks = std::min(rows, ceil_div(wanted, ranges));
  if (row_bytes > 0) {
    const int64_t cached = std::max<int64_t>(1, (kPackedChunkBytes - border_bytes) / row_bytes);
    blocks = std::max(blocks, ceil_div(rows, cached));
  }
  plan.rows_per_task = std::max<int64_t>(1, ceil_div(rows, std::max<int64_t>(1, blocks)));
  plan.channels_per_task = round_up(ceil_div(to, std::max<int64_t>(1, ranges)), plan.vector_lanes);
  plan.workspace_bytes =
      panel_bytes + plan.threads * (border_bytes + plan.rows_per_task * row_bytes);
}

// Whether the outer product's forward pass reads the input where it lies.
bool forward_in_place(const Conv2dProblem& problem) {
  const PackedPlanes packed = packed_input(problem, 1);
  return of_accumulator_type(problem) && problem.pad_top == 0 && problem.pad_left == 0 &&
         packed.rows <= problem.in_height && packed.row_length <= problem.in_width;
}

// A pass that gives `rows` rows of an image of `source_rows`. What is packed: the
// weights in NHWC, a plane or a vector of them a thread in NCHW.
Conv2dPlan plan_depthwise(const Conv2dProblem& problem, Isa isa, int threads, int64_t rows,
                          const DepthwisePasses& passes, int64_t source_rows, bool backward) {
  Conv2dPlan plan = pass_plan(problem, ConvAlgorithm::depthwise, isa, threads, 0, 1, rows);
  plan.images_per_chunk = problem.batch;
  plan.rows_per_task = problem.layout == Layout::nhwc
                           ? std::max<int64_t>(1, rows_per_task(rows, problem.batch, plan.threads))
                           : rows;
  plan.in_place = problem.layout == Layout::nhwc;
  if (depthwise_interleaves(problem, plan.vector_lanes, backward)) {
    plan.workspace_bytes =
        plan.threads * vector_bytes(isa) *
        (problem.in_height * problem.in_width + problem.out_height * problem.out_width +
         2 * problem.kernel_height * problem.kernel_width);
    return plan;
  }
  plan.workspace_bytes =
      accumulator_size(problem.dtype) *
      (problem.layout == Layout::nhwc
           ? problem.out_channels * (problem.in_channels / problem.groups) * problem.kernel_height *
                 problem.kernel_width
           : plan.threads * depthwise_packed_plane(passes.columns, source_rows).plane());
  return plan;
}

// What a thread packs at a time: half of a second-level cache, beside the weights.
constexpr int64_t kAmxChunkBytes = 1024 * 1024;
// Packed weights of which more does not stay in a second-level cache.
constexpr int64_t kAmxFewWeightBytes = 2 * 1024 * 1024;
constexpr int64_t kAmxGradientBytes = 1536 * 1024;

// Sums of 32 pixels, twice, of all channels.
int64_t in_place_sums_bytes(const Conv2dProblem& problem, int64_t to) {
  return 2 * 4 * kAmxBlock * kAmxBlock * problem.groups * ceil_div(to, kAmxBlock);
}

// Whether the pixels of a pass from `from` channels a group to `to` are tiles where they lie,
// and their sums stay in a second-level cache.
bool reads_tiles_in_place(const Conv2dProblem& problem, int64_t from, int64_t to) {
  constexpr int64_t kMostSumsBytes = 1024 * 1024;
  return problem.dtype == DType::bfloat16 && problem.layout == Layout::nhwc &&
         problem.kernel_height == 1 && problem.kernel_width == 1 && problem.stride_h == 1 &&
         problem.stride_w == 1 && problem.pad_top == 0 && problem.pad_left == 0 &&
         problem.out_height == problem.in_height && problem.out_width == problem.in_width &&
         from % kAmxDepth == 0 && in_place_sums_bytes(problem, to) <= kMostSumsBytes;
}

// A pass on matrix tiles from `from` channels a group to `to`.
Conv2dPlan plan_amx(const Conv2dProblem& problem, Isa isa, int threads, const Grid& grid,
                    int64_t from, int64_t to) {
  Conv2dPlan plan = pass_plan(problem, ConvAlgorithm::amx, isa, threads, 0, to, 1);
  const int64_t element = 2 * amx_parts(problem);
  const int64_t position_bytes =
      element * grid.residues() * problem.groups * round_up(from, kAmxDepth);
  const int64_t weight_bytes = element * problem.groups * round_up(from, kAmxDepth) *
                               round_up(to, 16) * problem.kernel_height * problem.kernel_width;
  if (reads_tiles_in_place(problem, from, to) && weight_bytes <= kAmxFewWeightBytes / 2) {
    plan.amx_order = AmxOrder::in_place;
    plan.in_place = true;
    plan.channels_per_task = round_up(to, kAmxBlock);
    plan.workspace_bytes = weight_bytes + plan.threads * (in_place_sums_bytes(problem, to) +
                                                          2 * kAmxBlock * problem.groups * from);
    return plan;
  }
  if (grid.pointwise() && weight_bytes <= kAmxFewWeightBytes / 2) {
    plan.amx_order = AmxOrder::pointwise;
    plan.channels_per_task = round_up(to, kAmxBlock);
    plan.workspace_bytes = plan.threads * 2 * kAmxBlock * position_bytes + weight_bytes;
    return plan;
  }
  const int64_t positions = grid.packed_positions(problem.batch, grid.rows.count);
  const int64_t range = round_up(ceil_div(to, plan.threads), kAmxBlock);
  const int64_t sums_bytes = 4 * positions * grid.destinations() * range;
  if (problem.groups == 1 && weight_bytes > kAmxFewWeightBytes &&
      weight_bytes > positions * position_bytes && sums_bytes <= kAmxChunkBytes) {
    plan.amx_order = AmxOrder::few_pixels;
    plan.images_per_chunk = problem.batch;
    plan.rows_per_task = grid.rows.count;
    plan.channels_per_task = range;
    const int64_t block_bytes = element * kAmxDepth * grid.residues() * positions;
    const int64_t blocks = ceil_div(from, kAmxDepth);
    // Nothing is packed where no tap reaches the source.
    const int64_t slices = std::max<int64_t>(1, ceil_div(blocks * block_bytes, kAmxChunkBytes));
    plan.channels_per_slice = ceil_div(blocks, std::min(slices, blocks)) * kAmxDepth;
    plan.workspace_bytes =
        plan.threads *
        (plan.channels_per_slice / kAmxDepth * block_bytes + sums_bytes +
         weight_bytes / ceil_div(to, kAmxBlock) / ceil_div(from, plan.channels_per_slice));
    return plan;
  }
  const GridChunk chunk =
      grid_chunk(grid, problem.batch, position_bytes, kAmxChunkBytes, plan.threads);
  plan.images_per_chunk = chunk.images;
  plan.rows_per_task = chunk.rows;
  // Where chunks are few, threads share their channels, and each packs them.
  const int64_t chunks = ceil_div(problem.batch, chunk.images) *
                         ceil_div(std::max<int64_t>(1, grid.rows.count), chunk.rows);
  const int64_t blocks = ceil_div(to, kAmxBlock);
  int64_t ranges = 1;
  if (chunks % plan.threads != 0 && chunks < 4 * plan.threads) {
    ranges = std::min<int64_t>(blocks, plan.threads);
  }
  plan.channels_per_task = ceil_div(blocks, ranges) * kAmxBlock;
  plan.workspace_bytes =
      plan.threads * position_bytes * grid.packed_positions(chunk.images, chunk.rows) +
      weight_bytes;
  return plan;
}

Conv2dPlan plan_row_runs(const Conv2dProblem& problem, Isa isa, int threads) {
  Conv2dPlan plan = pass_plan(problem, ConvAlgorithm::amx, isa, threads, 0, 1, problem.out_height);
  plan.amx_order = AmxOrder::row_runs;
  plan.images_per_chunk = 1;
  plan.rows_per_task =
      std::max<int64_t>(1, rows_per_task(problem.out_height, problem.batch, plan.threads));
  plan.channels_per_task = round_up(problem.out_channels, kAmxBlock);
  const int64_t steps =
      problem.kernel_height * ceil_div(problem.kernel_width * problem.in_channels, kAmxDepth);
  plan.workspace_bytes =
      2 * amx_parts(problem) *
      (row_run_elements(problem) + steps * kAmxDepth * round_up(problem.out_channels, 16));
  return plan;
}

Conv2dPlan plan_amx_weight_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  const Grid grid = forward_grid(problem);
  Conv2dPlan plan = pass_plan(problem, ConvAlgorithm::amx, isa, threads, 0, 1, 1);
  const int64_t element = 2 * amx_parts(problem);
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t group_out = problem.out_channels / problem.groups;
  const auto position_bytes = [&](int64_t range) {
    return element * (grid.residues() * range + round_up(group_out, 16));
  };
  // The order of the sums must not depend on the number of threads: neither the chunks
  // nor the slices do. Ranges of channels may.
  const GridChunk chunk =
      grid_chunk(grid, problem.batch, position_bytes(round_up(group_in, 16)), kAmxGradientBytes, 1);
  plan.images_per_chunk = chunk.images;
  plan.rows_per_task = chunk.rows;
  const int64_t chunks =
      ceil_div(problem.batch, chunk.images) * ceil_div(grid.rows.count, chunk.rows);
  const int64_t tasks = problem.groups * amx_gradient_slices(problem, chunks);
  const int64_t blocks = ceil_div(group_in, kAmxBlock);
  const int64_t ranges =
      tasks % plan.threads == 0 ? 1 : std::min<int64_t>(blocks, ceil_div(plan.threads, tasks));
  plan.channels_per_task = ceil_div(blocks, ranges) * kAmxBlock;
  plan.workspace_bytes = plan.threads * position_bytes(plan.channels_per_task) *
                             grid.packed_positions(chunk.images, chunk.rows) +
                         4 * tasks * round_up(group_in, kAmxBlock) *
                             round_up(group_out, kAmxBlock) * problem.kernel_height *
                             problem.kernel_width;
  return plan;
}

Conv2dPlan plan_outer_product_weight_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  // Pixels of so few channels are whole cache lines, more are packed.
  constexpr int64_t kLineChannels = 16;
  constexpr int64_t kFewestPairs = 24, kMostElements = 128 * 1024;
  Conv2dPlan plan =
      pass_plan(problem, ConvAlgorithm::outer_product, isa, threads, 0, 1, problem.out_height);
  const int64_t group_in = problem.in_channels / problem.groups;
  plan.in_place = forward_in_place(problem) &&
                  (problem.layout == Layout::nchw || problem.in_channels <= kLineChannels);
  const GradientSum sum = gradient_sum(problem);
  const int64_t slices = gradient_slices(problem);
  const int64_t positions =
      sum.images * gradient_source_rows(problem).count * gradient_source_columns(problem).count;
  // Every range packs the output's gradient again: there are as many as threads ask for, and
  // as keep what a task packs small, the same number for each thread.
  const int64_t taps = problem.kernel_height * problem.kernel_width;
  const int64_t wanted = ceil_div(int64_t{plan.threads}, slices * problem.groups);
  int64_t ranges = wanted;
  if (!plan.in_place) ranges = round_up(ceil_div(group_in * positions, kMostElements), wanted);
  ranges = std::min(ranges, group_in * taps / kFewestPairs);
  plan.channels_per_task = std::min(
      group_in, round_up(ceil_div(group_in, std::max<int64_t>(1, ranges)), int64_t{kTilePairs}));
  const int64_t tile = (isa >= Isa::avx512 ? 4 : 2) * vector_bytes(isa);
  plan.workspace_bytes =
      plan.threads * (sum.images * sum.rows * problem.out_width * tile +
                      (plan.in_place ? 0
                                     : accumulator_size(problem.dtype) * positions *
                                           round_up(plan.channels_per_task, int64_t{kTilePairs}))) +
      accumulator_size(problem.dtype) * slices * group_in * problem.kernel_height *
          problem.kernel_width * problem.groups *
          round_up(problem.out_channels / problem.groups, lanes_of(problem, isa));
  return plan;
}

Conv2dPlan plan_patches(const Conv2dProblem& problem, Isa isa, int threads) {
  Conv2dPlan plan =
      pass_plan(problem, ConvAlgorithm::patches, isa, threads, 0, 1, problem.out_height);
  plan.images_per_chunk = problem.batch;
  plan.workspace_bytes = accumulator_size(problem.dtype) * problem.batch * problem.out_height *
                         problem.out_width * problem.in_channels * problem.kernel_height *
                         problem.kernel_width;
  return plan;
}

Conv2dPlan plan_runs(const Conv2dProblem& problem, Isa isa, int threads) {
  Conv2dPlan plan = pass_plan(problem, ConvAlgorithm::runs, isa, threads, 0, 1, 1);
  const GradientRuns runs = gradient_runs(problem, plan.vector_lanes);
  const int64_t packed = gradient_runs_packed_elements(problem, runs);
  plan.rows_per_task = runs.block_rows;
  plan.in_place = packed == 0;
  plan.workspace_bytes =
      accumulator_size(problem.dtype) *
      (plan.threads * packed + runs.slices * problem.kernel_height * runs.run *
                                   round_up(runs.vector_channels, int64_t{plan.vector_lanes}));
  return plan;
}

// A pass to `to` channels of rows x columns results.
Conv2dPlan plan_winograd(const Conv2dProblem& problem, Isa isa, int threads, int64_t from,
                         int64_t to, int64_t rows, int64_t columns) {
  Conv2dPlan plan = pass_plan(problem, ConvAlgorithm::winograd, isa, threads, 0, to, 1);
  plan.images_per_chunk = problem.batch;
  plan.rows_per_task = winograd_tiles_per_task(
      from, to, problem.batch * ceil_div(rows, 2) * ceil_div(columns, 2), plan.threads);
  const int64_t lanes = lanes_of(problem, isa);
  plan.workspace_bytes =
      16 * 4 *
      (round_up(to, lanes) * from +
       plan.threads * plan.rows_per_task * (round_up(from, lanes) + round_up(to, lanes)));
  return plan;
}

}  // namespace

bool winograd_applies(const Conv2dProblem& problem) {
  return problem.dtype != DType::float64 && problem.groups == 1 && problem.kernel_height == 3 &&
         problem.kernel_width == 3 && problem.stride_h == 1 && problem.stride_w == 1 &&
         problem.dilation_h == 1 && problem.dilation_w == 1;
}

bool patches_apply(const Conv2dProblem& problem) {
  // With more pixels, or with fewer elements than vectors have, tiles do better.
  constexpr int64_t kMostPixels = 8, kFewestElements = 32;
  const int64_t pixels = problem.batch * problem.out_height * problem.out_width;
  return pixels >= 1 && pixels <= kMostPixels && problem.groups == 1 &&
         problem.in_channels * problem.out_channels > 1 &&
         problem.in_channels * problem.kernel_height * problem.kernel_width >= kFewestElements &&
         patch_order(problem).dense;
}

bool runs_apply(const Conv2dProblem& problem, Isa isa) {
  const int64_t lanes = lanes_of(problem, isa);
  return problem.layout == Layout::nhwc && problem.groups == 1 && of_accumulator_type(problem) &&
         (problem.dilation_w == 1 || problem.kernel_width == 1) &&
         gradient_runs(problem, lanes).vector_channels >= lanes;
}

bool amx_applies(const Conv2dProblem& problem, Isa isa) {
  return isa == Isa::amx && problem.dtype != DType::float64;
}

bool depthwise_applies(const Conv2dProblem& problem, Isa isa) {
  const int64_t lanes = lanes_of(problem, isa);
  const int64_t channels = problem.in_channels / problem.groups;
  if (problem.in_channels != problem.out_channels) return false;
  if (channels == 1) return problem.layout == Layout::nchw || problem.groups >= lanes;
  // Groups that fill a vector, and vectors without permutations, are for outer products.
  return problem.layout == Layout::nhwc && isa >= Isa::avx2 && problem.dtype != DType::float64 &&
         (channels == 2 || channels == 4 || channels == 8) && channels < lanes &&
         problem.in_channels >= lanes;
}

Conv2dPlan plan_forward(const Conv2dProblem& problem, ConvAlgorithm algorithm, Isa isa,
                        int threads) {
  if (algorithm == ConvAlgorithm::patches) return plan_patches(problem, isa, threads);
  if (algorithm == ConvAlgorithm::depthwise) {
    return plan_depthwise(problem, isa, threads, problem.out_height,
                          depthwise_forward_passes(problem), problem.in_height, false);
  }
  if (algorithm == ConvAlgorithm::winograd) {
    return plan_winograd(problem, isa, threads, problem.in_channels, problem.out_channels,
                         problem.out_height, problem.out_width);
  }
  if (algorithm == ConvAlgorithm::amx) {
    if (has_row_runs(problem)) return plan_row_runs(problem, isa, threads);
    return plan_amx(problem, isa, threads, forward_grid(problem),
                    problem.in_channels / problem.groups, problem.out_channels / problem.groups);
  }
  if (algorithm == ConvAlgorithm::outer_product) {
    Conv2dPlan plan = pass_plan(problem, algorithm, isa, threads, 0, 1, problem.out_height);
    plan.in_place = forward_in_place(problem);
    const int64_t row = plan.in_place ? 0
                                      : accumulator_size(problem.dtype) * problem.in_channels *
                                            packed_input(problem, 1).row_length;
    const int64_t border = (problem.kernel_height - 1) * problem.dilation_h + 1 - problem.stride_h;
    cut_into_tasks(plan, problem, problem.in_channels / problem.groups,
                   problem.out_channels / problem.groups, problem.out_height, problem.out_width,
                   problem.stride_h * row, border * row);
    return plan;
  }
  const PackedPlanes packed = packed_input(problem, problem.stride_w);
  Conv2dPlan plan =
      pass_plan(problem, algorithm, isa, threads, problem.in_channels * packed.plane(),
                problem.out_channels / problem.groups, problem.out_height);
  plan.in_place = of_accumulator_type(problem) && problem.layout == Layout::nchw &&
                  problem.stride_w == 1 && problem.pad_top == 0 && problem.pad_left == 0 &&
                  packed.rows <= problem.in_height && packed.row_length <= problem.in_width &&
                  problem.out_width >= plan.vector_lanes;
  if (plan.in_place) plan.workspace_bytes = 0;
  return plan;
}

Conv2dPlan plan_input_gradient(const Conv2dProblem& problem, ConvAlgorithm algorithm, Isa isa,
                               int threads) {
  if (algorithm == ConvAlgorithm::patches) return plan_patches(problem, isa, threads);
  if (algorithm == ConvAlgorithm::depthwise) {
    return plan_depthwise(problem, isa, threads, problem.in_height,
                          depthwise_gradient_passes(problem), problem.out_height, true);
  }
  if (algorithm == ConvAlgorithm::winograd) {
    return plan_winograd(problem, isa, threads, problem.out_channels, problem.in_channels,
                         problem.in_height, problem.in_width);
  }
  if (algorithm == ConvAlgorithm::amx) {
    return plan_amx(problem, isa, threads, gradient_grid(problem),
                    problem.out_channels / problem.groups, problem.in_channels / problem.groups);
  }
  const GradientBorder rows =
      gradient_border(problem.in_height, problem.kernel_height, problem.stride_h, problem.pad_top,
                      problem.dilation_h);
  const GradientBorder columns =
      gradient_border(problem.in_width, problem.kernel_width, problem.stride_w, problem.pad_left,
                      problem.dilation_w);
  const int64_t group_in = problem.in_channels / problem.groups;
  const int64_t class_rows = ceil_div(problem.in_height, problem.stride_h);
  if (algorithm == ConvAlgorithm::direct) {
    return pass_plan(problem, algorithm, isa, threads,
                     problem.out_channels * rows.size * columns.size, group_in, class_rows);
  }
  Conv2dPlan plan = pass_plan(problem, algorithm, isa, threads, 0, 1, class_rows);
  plan.in_place = of_accumulator_type(problem) && rows.before == 0 && columns.before == 0 &&
                  rows.size <= problem.out_height && columns.size <= problem.out_width;
  const int64_t row =
      plan.in_place ? 0 : accumulator_size(problem.dtype) * problem.out_channels * columns.size;
  const int64_t border = rows.before + ceil_div(problem.pad_top, problem.stride_h);
  cut_into_tasks(plan, problem, problem.out_channels / problem.groups, group_in, class_rows,
                 ceil_div(problem.in_width, problem.stride_w), row, border * row);
  return plan;
}

Conv2dPlan plan_weight_gradient(const Conv2dProblem& problem, ConvAlgorithm algorithm, Isa isa,
                                int threads) {
  if (algorithm == ConvAlgorithm::patches) return plan_patches(problem, isa, threads);
  if (algorithm == ConvAlgorithm::depthwise) {
    return plan_depthwise(problem, isa, threads, problem.out_height,
                          depthwise_forward_passes(problem), problem.in_height, true);
  }
  if (algorithm == ConvAlgorithm::amx) return plan_amx_weight_gradient(problem, isa, threads);
  if (algorithm == ConvAlgorithm::runs) return plan_runs(problem, isa, threads);
  if (algorithm == ConvAlgorithm::outer_product) {
    return plan_outer_product_weight_gradient(problem, isa, threads);
  }
  const int64_t group_out = problem.out_channels / problem.groups;
  // Sums must be the same for any number of threads, and so chunks are the same.
  Conv2dPlan plan = pass_plan(
      problem, algorithm, isa, 2,
      problem.in_channels * packed_input(problem, problem.stride_w).plane() +
          problem.out_channels * problem.out_height * (problem.out_width + vector_bytes(isa)),
      group_out, problem.out_height);
  plan.threads = std::min(plan.threads, threads);
  return plan;
}

ConvAlgorithm cheaper_forward(const Conv2dProblem& problem, Isa isa, int64_t rows, int64_t columns,
                              int64_t pixels) {
  const Pass pass = {problem.in_channels / problem.groups,
                     pixels * problem.kernel_height * problem.kernel_width,
                     problem.out_channels / problem.groups,
                     rows,
                     columns,
                     1};
  return cheaper(pass, problem, isa);
}

Conv2dPlan plan_conv2d(const Conv2dProblem& problem, Isa isa, int threads) {
  if (patches_apply(problem)) {
    return plan_forward(problem, ConvAlgorithm::patches, isa, threads);
  }
  if (depthwise_applies(problem, isa)) {
    return plan_forward(problem, ConvAlgorithm::depthwise, isa, threads);
  }
  const Pass pass = forward_pass(problem);
  const bool row_runs = amx_applies(problem, isa) && has_row_runs(problem);
  const double amx = row_runs ? row_runs_cost(problem) : amx_cost(pass, problem);
  return plan_forward(problem, cheapest(pass, amx, problem, isa), isa, threads);
}

Conv2dPlan plan_conv2d_input_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  if (patches_apply(problem)) {
    return plan_input_gradient(problem, ConvAlgorithm::patches, isa, threads);
  }
  if (depthwise_applies(problem, isa)) {
    return plan_input_gradient(problem, ConvAlgorithm::depthwise, isa, threads);
  }
  // One residue class: its pixels, and those of the taps that reach it.
  const Pass pass = {problem.out_channels / problem.groups,
                     ceil_div(problem.kernel_height, problem.stride_h) *
                         ceil_div(problem.kernel_width, problem.stride_w),
                     problem.in_channels / problem.groups,
                     ceil_div(problem.in_height, problem.stride_h),
                     ceil_div(problem.in_width, problem.stride_w),
                     1};
  return plan_input_gradient(problem, cheapest(pass, amx_cost(pass, problem), problem, isa), isa,
                             threads);
}

Conv2dPlan plan_conv2d_weight_gradient(const Conv2dProblem& problem, Isa isa, int threads) {
  if (patches_apply(problem)) {
    return plan_weight_gradient(problem, ConvAlgorithm::patches, isa, threads);
  }
  if (depthwise_applies(problem, isa)) {
    return plan_weight_gradient(problem, ConvAlgorithm::depthwise, isa, threads);
  }
  const int64_t lanes = lanes_of(problem, isa);
  const int64_t group_out = problem.out_channels / problem.groups;
  const double pairs = static_cast<double>(problem.in_channels / problem.groups *
                                           problem.kernel_height * problem.kernel_width);
  // As in the costs above; packing a vector of output gradients costs 8.
  const double direct =
      1.25 * pairs *
      static_cast<double>(group_out * problem.out_height * ceil_div(problem.out_width, lanes));
  const double outer =
      (0.62 * pairs + 8) *
      static_cast<double>(problem.out_height * problem.out_width * ceil_div(group_out, lanes));
  ConvAlgorithm best = outer < direct ? ConvAlgorithm::outer_product : ConvAlgorithm::direct;
  double cost = std::min(outer, direct);
  if (runs_apply(problem, isa) && runs_pay(problem)) {
    best = ConvAlgorithm::runs;
    cost = runs_cost(problem, lanes);
  }
  if (amx_applies(problem, isa) && amx_weight_gradient_cost(problem) < cost) {
    best = ConvAlgorithm::amx;
  }
  return plan_weight_gradient(problem, best, isa, threads);
}

PackedPlanes packed_input(const Conv2dProblem& problem, int64_t phases) {
  PackedPlanes packed;
  packed.top = problem.pad_top;
  packed.left = problem.pad_left;
  packed.phases = phases;
  packed.rows = (problem.out_height - 1) * problem.stride_h +
                (problem.kernel_height - 1) * problem.dilation_h + 1;
  const int64_t columns = (problem.out_width - 1) * problem.stride_w +
                          (problem.kernel_width - 1) * problem.dilation_w + 1;
  packed.row_length = ceil_div(columns, phases);
  return packed;
}

std::vector<Tap> forward_taps(const Conv2dProblem& problem, const PackedPlanes& packed,
                              int64_t weight_stride_r, int64_t weight_stride_s,
                              int64_t first_column) {
  std::vector<Tap> taps;
  taps.reserve(static_cast<size_t>(problem.kernel_height * problem.kernel_width));
  for (int64_t r = 0; r < problem.kernel_height; ++r) {
    for (int64_t s = 0; s < problem.kernel_width; ++s) {
      taps.push_back({r * problem.dilation_h * packed.pitch() +
                          packed.column_offset(first_column + s * problem.dilation_w),
                      r * weight_stride_r + s * weight_stride_s});
    }
  }
  return taps;
}

PlaneSource plane_source(Layout layout, int64_t channels, int64_t height, int64_t width) {
  if (layout == Layout::nchw) return {height, width, height * width, width, 1};
  return {height, width, 1, width * channels, channels};
}

namespace {

// The plan for what is not finite or too small to have parts, and what Winograd's sums
// spread.
template <class Plan>
Conv2dPlan plan_not_finite(const Conv2dProblem& problem, const Conv2dPlan& plan, Plan&& plan_pass) {
  return plan_pass(problem, ConvAlgorithm::outer_product, plan.isa, plan.threads);
}

}  // namespace

void conv2d_forward(const Conv2dProblem& problem, const Conv2dPlan& plan, const ThreadPool& pool,
                    const void* input, const void* weight, const void* bias, void* output) {
  if (plan.algorithm == ConvAlgorithm::amx || plan.algorithm == ConvAlgorithm::winograd) {
    const auto run =
        plan.algorithm == ConvAlgorithm::amx ? conv2d_amx_forward : conv2d_winograd_forward;
    if (run(problem, plan, pool, input, weight, bias, output)) return;
    conv2d_forward(problem, plan_not_finite(problem, plan, plan_forward), pool, input, weight, bias,
                   output);
    return;
  }
  const auto run = plan.algorithm == ConvAlgorithm::direct          ? conv2d_direct_forward
                   : plan.algorithm == ConvAlgorithm::outer_product ? conv2d_outer_product_forward
                   : plan.algorithm == ConvAlgorithm::patches       ? conv2d_patches_forward
                                                                    : conv2d_depthwise_forward;
  run(problem, plan, pool, input, weight, bias, output);
}

void conv2d_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                           const ThreadPool& pool, const void* grad_output, const void* weight,
                           void* grad_input) {
  if (plan.algorithm == ConvAlgorithm::depthwise) {
    conv2d_depthwise_backward(problem, plan, pool, grad_output, nullptr, weight, grad_input,
                              nullptr);
    return;
  }
  if (plan.algorithm == ConvAlgorithm::amx || plan.algorithm == ConvAlgorithm::winograd) {
    const auto run = plan.algorithm == ConvAlgorithm::amx ? conv2d_amx_input_gradient
                                                          : conv2d_winograd_input_gradient;
    if (run(problem, plan, pool, grad_output, weight, grad_input)) return;
    conv2d_input_gradient(problem, plan_not_finite(problem, plan, plan_input_gradient), pool,
                          grad_output, weight, grad_input);
    return;
  }
  const auto run = plan.algorithm == ConvAlgorithm::direct    ? conv2d_direct_input_gradient
                   : plan.algorithm == ConvAlgorithm::patches ? conv2d_patches_input_gradient
                                                              : conv2d_outer_product_input_gradient;
  run(problem, plan, pool, grad_output, weight, grad_input);
}

void conv2d_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                            const ThreadPool& pool, const void* grad_output, const void* input,
                            void* grad_weight) {
  if (plan.algorithm == ConvAlgorithm::depthwise) {
    conv2d_depthwise_backward(problem, plan, pool, grad_output, input, nullptr, nullptr,
                              grad_weight);
    return;
  }
  if (plan.algorithm == ConvAlgorithm::amx) {
    if (conv2d_amx_weight_gradient(problem, plan, pool, grad_output, input, grad_weight)) return;
    conv2d_weight_gradient(problem, plan_not_finite(problem, plan, plan_weight_gradient), pool,
                           grad_output, input, grad_weight);
    return;
  }
  const auto run = plan.algorithm == ConvAlgorithm::direct    ? conv2d_direct_weight_gradient
                   : plan.algorithm == ConvAlgorithm::patches ? conv2d_patches_weight_gradient
                   : plan.algorithm == ConvAlgorithm::runs ? conv2d_runs_weight_gradient
                                                           : conv2d_outer_product_weight_gradient;
  run(problem, plan, pool, grad_output, input, grad_weight);
}

void conv2d_forward(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                    const void* input, const void* weight, const void* bias, void* output) {
  conv2d_forward(problem, plan_conv2d(problem, isa, pool.threads), pool, input, weight, bias,
                 output);
}

void conv2d_backward(const Conv2dProblem& problem, Isa isa, const ThreadPool& pool,
                     const void* grad_output, const void* input, const void* weight,
                     void* grad_input, void* grad_weight, void* grad_bias) {
  if (grad_input != nullptr && grad_weight != nullptr && depthwise_applies(problem, isa)) {
    conv2d_depthwise_backward(problem, plan_conv2d_weight_gradient(problem, isa, pool.threads),
                              pool, grad_output, input, weight, grad_input, grad_weight);
    grad_input = grad_weight = nullptr;
  }
  if (grad_input != nullptr) {
    conv2d_input_gradient(problem, plan_conv2d_input_gradient(problem, isa, pool.threads), pool,
                          grad_output, weight, grad_input);
  }
  if (grad_weight != nullptr) {
    conv2d_weight_gradient(problem, plan_conv2d_weight_gradient(problem, isa, pool.threads), pool,
                           grad_output, input, grad_weight);
  }
  if (grad_bias != nullptr) {
    conv2d_bias_gradient(problem, isa, pool, grad_output, grad_bias);
  }
}

}  // namespace cnnkernels
