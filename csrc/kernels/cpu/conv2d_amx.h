// Convolution by the matrix tiles of AMX, in bfloat16 parts: forward, input gradient
// and weight gradient. See conv2d_amx.inl for the idea.
#pragma once

#include "kernels/conv2d.h"
#include "kernels/cpu/axis_pass.h"

namespace cnnkernels {

// Channels in the depth of a tile, and rows or columns of a block of tiles.
constexpr int64_t kAmxDepth = 32;
constexpr int64_t kAmxBlock = 32;

// Parts of which an element of the problem is the sum.
int amx_parts(const Conv2dProblem& problem);

// One axis of a grid of source positions. Cell g of residue f holds source position
// (j0 + g + low) * step + f where the first destination is j0, so that destination j
// reads cell j - j0 + tap.cell of the tap's residue, whatever the stride.
struct GridTap {
  int64_t kernel_index;
  size_t residue;  // index into GridAxis::residues
  int64_t cell;
};
// The destinations first, first + stride, … (count of them).
struct GridPass {
  int64_t first, stride, count;
  std::vector<GridTap> taps;
};
struct GridAxis {
  int64_t step, low;
  int64_t extra;   // cells more than destinations
  int64_t shared;  // cells of border that end a row and begin the next as well
  int64_t count;   // destinations, of the longest pass
  std::vector<int64_t> residues;
  std::vector<GridPass> passes;

  int64_t pitch() const { return count + extra - shared; }
};

struct Grid {
  GridAxis rows, columns;

  int64_t residues() const {
    return static_cast<int64_t>(rows.residues.size() * columns.residues.size());
  }
  // One tap, and no border: a source position for each destination.
  bool pointwise() const {
    return destinations() == 1 && rows.passes.front().taps.size() == 1 &&
           columns.passes.front().taps.size() == 1;
  }
  int64_t destinations() const {  // classes of them
    return static_cast<int64_t>(rows.passes.size() * columns.passes.size());
  }
  int64_t positions(int64_t images, int64_t row_count) const {
    return images * (row_count + rows.extra) * columns.pitch();
  }
  // With those that taps read past the last position, and past the end of a block.
  int64_t packed_positions(int64_t images, int64_t row_count) const {
    return (positions(images, row_count) + columns.extra + 2 * kAmxBlock - 1) / kAmxBlock *
           kAmxBlock;
  }
};

// The grid of the input for the forward pass, and of the output's gradient for the
// input gradient.
Grid forward_grid(const Conv2dProblem& problem);
Grid gradient_grid(const Conv2dProblem& problem);

// Whether the forward pass takes the taps of a kernel row, with all channels, for the
// depth of a tile: conv2d_amx_row_runs.inl.
bool has_row_runs(const Conv2dProblem& problem);
// Rows and columns of the input, with its border, that outputs read.
int64_t bordered_rows(const Conv2dProblem& problem);
int64_t bordered_columns(const Conv2dProblem& problem);
// Elements of the copy that it makes, of one part.
int64_t row_run_elements(const Conv2dProblem& problem);

// Images and rows that are packed at a time.
struct GridChunk {
  int64_t images, rows;
};
// Chunks of at most `bytes`, where a position takes `position_bytes`, of which there
// are several a thread if there can be.
GridChunk grid_chunk(const Grid& grid, int64_t batch, int64_t position_bytes, int64_t bytes,
                     int threads);

// The weight gradient sums so many slices of the chunks on their own: as many as, with
// ranges of input channels, keep sixteen threads busy, if their totals are not too much
// memory. A range packs all of the output's gradient again, so that there are two
// slices at least.
int64_t amx_gradient_slices(const Conv2dProblem& problem, int64_t chunks);

// These return false, with undefined results, if the type is not bfloat16 and an operand
// is infinite or NaN, or numbers are so small that parts lose bits: those then need
// another algorithm.
bool conv2d_amx_forward(const Conv2dProblem& problem, const Conv2dPlan& plan,
                        const ThreadPool& pool, const void* input, const void* weight,
                        const void* bias, void* output);
bool conv2d_amx_input_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                               const ThreadPool& pool, const void* grad_output, const void* weight,
                               void* grad_input);
// Also false for bfloat16: a border's zero gradient would make NaN of an
// infinite input.
bool conv2d_amx_weight_gradient(const Conv2dProblem& problem, const Conv2dPlan& plan,
                                const ThreadPool& pool, const void* grad_output, const void* input,
                                void* grad_weight);

}  // namespace cnnkernels
