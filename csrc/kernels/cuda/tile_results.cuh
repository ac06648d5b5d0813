// What becomes of a block's sums: bias, ReLU, and pooling where whole windows lie in the tile.
//
// The results of a tile meet in shared memory, in their own type, so that the lanes of a store have
// neighbouring pixels in NCHW and neighbouring channels in NHWC, 16 bytes each where they lie so.
// Pooling compares them after they are rounded: the winner is that of the composition, ties
// included, and its tap is one byte.
#pragma once

#include "kernels/cuda/max_pool2d_device.cuh"
#include "kernels/cuda/source_patch.cuh"

namespace cnnkernels::cuda {

// Where the results of channel 0 of a group go, and in which accesses.
template <class T>
struct ResultTarget {
  T* result;
  const T* bias;  // may be null
  bool relu;
  bool vectors;  // rows of a plane, or channels of a pixel, take accesses of 16 bytes
};

// Whether runs of 16 bytes of a tile's results lie in one piece.
inline bool results_are_vectors(const ConvolutionPass& pass, const SourcePatch& patch,
                                int64_t element_bytes, int64_t alignment) {
  const int64_t elements = kVectorBytes / element_bytes;
  if (alignment % kVectorBytes != 0) return false;
  if (pass.result_stride_c == 1) {
    return pass.result_channels % elements == 0 && pass.result_stride_w % elements == 0;
  }
  return pass.phase_count == 1 && pass.result_step_w == 1 && patch.columns % elements == 0 &&
         pass.phases[0].columns % elements == 0;
}

// Of square windows of 2x2 or 3x3.
struct BlockPool {
  int kernel, pad;
  int rows, columns;  // of the pooled planes
  uint8_t* argmax;    // may be null; as the pooled result lies
};

inline BlockPool block_pool(const MaxPool2dProblem& pool, void* argmax) {
  return {static_cast<int>(pool.kernel_height), static_cast<int>(pool.pad_top),
          static_cast<int>(pool.out_height), static_cast<int>(pool.out_width),
          static_cast<uint8_t*>(argmax)};
}

// A pass whose results are pooled: its strides are the pooled tensor's.
inline void store_pooled(ConvolutionPass& pass, const MaxPool2dProblem& pool) {
  const int64_t plane = pool.out_height * pool.out_width;
  pass.result_stride_n = pool.channels * plane;
  if (pass.result_stride_c == 1) {
    pass.result_stride_w = pool.channels;
    pass.result_stride_h = pool.out_width * pool.channels;
  } else {
    pass.result_stride_c = plane;
    pass.result_stride_h = pool.out_width;
    pass.result_stride_w = 1;
  }
}

// What the kernels of a pass are launched with.
struct PassCall {
  const ConvolutionPass& pass;
  const SourcePatch& patch;
  const void* source;
  const void* weight;
  const void* bias;
  void* result;
  bool relu, vectors;
  const BlockPool* pool;  // or null
  Stream stream;

  template <class T>
  ResultTarget<T> target() const {
    return {static_cast<T*>(result), static_cast<const T*>(bias), relu, vectors};
  }
  BlockPool pooling() const { return pool != nullptr ? *pool : BlockPool{}; }
};

// Elements of padding of a staged tile.
constexpr int kStagedPadding = 8;

// The staged results of a tile. Neighbours of a plane are neighbours in NCHW, those of a pixel's
// channels in NHWC; eight elements of padding keep the lanes that write them in different banks.
template <class T, int kResults, int kChannels>
struct StagedTile {
  static constexpr int kElements = (kResults + kStagedPadding) * (kChannels + kStagedPadding);

  T* elements;
  bool planes;

  __device__ int at(int result, int channel) const {
    return planes ? channel * (kResults + kStagedPadding) + result
                  : result * (kChannels + kStagedPadding) + channel;
  }
};

template <class T>
__device__ inline T finished_sum(const ResultTarget<T>& target, Accumulator<T> sum, int channel) {
  if (target.bias != nullptr) sum += to_accumulator(target.bias[channel]);
  if (target.relu) sum = sum < 0 ? 0 : sum;  // and NaN stays
  return from_accumulator<T>(sum);
}

// Of a result of the tile, channel 0 of the tensor.
__device__ inline int64_t result_element(const ConvolutionPass& pass, const PatchTile& tile,
                                         int image, int row, int column) {
  const PassPhase& phase = pass.phases[tile.phase];
  return (tile.image + image) * pass.result_stride_n +
         (phase.first_row + row * pass.result_step_h) * pass.result_stride_h +
         (phase.first_column + column * pass.result_step_w) * pass.result_stride_w;
}

// Stores a staged tile; channels are counted from first_channel, of `channels` that exist.
template <int kThreads, class T, int kResults, int kChannels>
__device__ inline void store_tile(const ConvolutionPass& pass, const SourcePatch& patch,
                                  const PatchTile& tile,
                                  const StagedTile<T, kResults, kChannels>& staged,
                                  const ResultTarget<T>& target, int first_channel, int channels) {
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
  const int thread = static_cast<int>(threadIdx.x);
  const auto store = [&](auto width, int result, int channel) {
    constexpr int kStored = decltype(width)::value;
    const TileResult at = tile_result(pass, patch, tile, result);
    if (!at.exists || channel >= channels) return;
    const int64_t element =
        result_element(pass, tile, at.image, tile.row + at.row, tile.column + at.column) +
        (first_channel + channel) * pass.result_stride_c;
    store_vector<kStored>(target.result + element,
                          load_vector<kStored>(&staged.elements[staged.at(result, channel)]));
  };
  using Wide = std::integral_constant<int, kWidth>;
  using One = std::integral_constant<int, 1>;
  if (staged.planes) {
    if (target.vectors) {
      constexpr int kRuns = kResults / kWidth;
      for (int i = thread; i < kRuns * kChannels; i += kThreads) {
        store(Wide{}, i % kRuns * kWidth, i / kRuns);
      }
    } else {
      for (int i = thread; i < kResults * kChannels; i += kThreads) {
        store(One{}, i % kResults, i / kResults);
      }
    }
  } else if (target.vectors) {
    constexpr int kRuns = kChannels / kWidth;
    for (int i = thread; i < kRuns * kResults; i += kThreads) {
      store(Wide{}, i / kRuns, i % kRuns * kWidth);
    }
  } else {
    for (int i = thread; i < kResults * kChannels; i += kThreads) {
      store(One{}, i / kChannels, i % kChannels);
    }
  }
}

// Pools a staged tile of whole windows. The result's strides are the pooled tensor's.
template <int kThreads, class T, int kResults, int kChannels>
__device__ inline void pool_tile(const ConvolutionPass& pass, const SourcePatch& patch,
                                 const PatchTile& tile,
                                 const StagedTile<T, kResults, kChannels>& staged,
                                 const ResultTarget<T>& target, const BlockPool& pool,
                                 int first_channel, int channels) {
  using A = Accumulator<T>;
  const PassPhase& phase = pass.phases[tile.phase];
  const int windows_down = patch.step_rows / kBlockPoolStride;
  const int windows_across = patch.step_columns / kBlockPoolStride;
  const int windows = patch.images * windows_down * windows_across;
  const int first_row = (tile.row + pool.pad) / kBlockPoolStride;
  const int first_column = (tile.column + pool.pad) / kBlockPoolStride;
  for (int i = static_cast<int>(threadIdx.x); i < windows * kChannels; i += kThreads) {
    const int window = staged.planes ? i % windows : i / kChannels;
    const int channel = staged.planes ? i / windows : i % kChannels;
    const int across = window % windows_across, down = window / windows_across % windows_down;
    const int image = window / windows_across / windows_down;
    const int y = first_row + down, x = first_column + across;
    if (channel >= channels || tile.image + image >= pass.images || y >= pool.rows ||
        x >= pool.columns) {
      continue;
    }
    Winner<A> winner = {minus_infinity<A>(), 0};
    for (int r = 0; r < pool.kernel; ++r) {
      const int row = down * kBlockPoolStride + r;
      if (static_cast<unsigned>(tile.row + row) >= static_cast<unsigned>(phase.rows)) continue;
      for (int s = 0; s < pool.kernel; ++s) {
        const int column = across * kBlockPoolStride + s;
        if (static_cast<unsigned>(tile.column + column) >= static_cast<unsigned>(phase.columns)) {
          continue;
        }
        const int result = (image * patch.rows + row) * patch.columns + column;
        winner.challenge(to_accumulator(staged.elements[staged.at(result, channel)]),
                         r * pool.kernel + s);
      }
    }
    const int64_t element = (tile.image + image) * pass.result_stride_n + y * pass.result_stride_h +
                            x * pass.result_stride_w +
                            (first_channel + channel) * pass.result_stride_c;
    target.result[element] = from_accumulator<T>(winner.value);
    if (pool.argmax != nullptr) {
      // What the ReLU has clipped passes no gradient: it has no winner.
      const bool passes = !(winner.value <= 0);
      pool.argmax[element] = static_cast<uint8_t>(passes ? winner.tap : pool.kernel * pool.kernel);
    }
  }
}

}  // namespace cnnkernels::cuda
