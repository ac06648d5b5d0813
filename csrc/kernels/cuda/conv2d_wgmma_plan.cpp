#include <algorithm>

#include "kernels/cuda/conv2d_kernels.h"
#include "kernels/cuda/conv2d_wgmma.h"

namespace cnnkernels::cuda {
namespace {

// Of a copied box, along each axis.
constexpr int kMostBox = 256;
// The way to a multiple of 1024, where swizzled rows begin.
constexpr int kAlignmentBytes = 1024;
// What one block of a multiprocessor may ask for, and each of two, without what barriers take.
constexpr int kBarrierBytes = 128;
constexpr int kBlockBytes = 227 * 1024 - kBarrierBytes, kHalfBytes = 113 * 1024 - kBarrierBytes;
constexpr int kLeastWeightStages = 2;

}  // namespace

SourcePatch wgmma_patch(const ConvolutionPass& pass) {
  return fixed_source_patch(pass, kWgmmaRows, kWgmmaColumns);
}

WgmmaCut wgmma_cut(const ConvolutionPass& pass, const SourcePatch& patch) {
  WgmmaCut cut = {};
  cut.channels = pass.result_channels > 64 ? 128 : 64;
  // A product is two chunks deep.
  const int64_t chunks = round_up(ceil_div(pass.source_channels, kWgmmaChunk), 2);
  cut.slab_chunks = static_cast<int>(std::min<int64_t>(chunks, kWgmmaSlab / kWgmmaChunk));
  cut.patch_stages = pass.source_channels > kWgmmaSlab ? kMostPatchStages : 1;
  const PatchPhase& phase = patch.phases[0];
  if (phase.height > kMostBox || phase.width > kMostBox) return cut;

  const int64_t patches =
      cut.patch_stages * round_up(patch_bytes(cut, patch), 128) + kAlignmentBytes;
  // Two blocks a multiprocessor where that leaves stages enough: one stores while one multiplies.
  for (const int64_t room : {kHalfBytes, kBlockBytes}) {
    const int64_t stages = (room - patches) / weight_bytes(cut.channels);
    if (room < patches || stages < kLeastWeightStages) continue;
    cut.weight_stages = static_cast<int>(std::min<int64_t>(stages, kMostWeightStages));
    break;
  }
  // Results are staged in the same memory, of which there is enough: where there are few stages the
  // patch is large.
  cut.shared_bytes = static_cast<int>(patches + cut.weight_stages * weight_bytes(cut.channels));
  return cut;
}

bool wgmma_applies(const ConvolutionPass& pass, DType dtype, int64_t alignment,
                   const DeviceLimits& limits) {
  const bool of_16_bits = dtype == DType::float16 || dtype == DType::bfloat16;
  // Code for 9.0 that other architectures do not have, not even later ones.
  if (limits.compute_capability != 90 || !of_16_bits) return false;
  if (pass.phase_count != 1 || pass.phases[0].taps == 0) return false;
  if (pass.source_step_h != 1 || pass.source_step_w != 1) return false;
  // Chunks of 16 bytes; two chunks of a product are of one group, or the second is no group's.
  if (!chunks_are_contiguous(pass, element_size(dtype), alignment)) return false;
  if (pass.source_channels % (pass.groups == 1 ? kWgmmaChunk : 2 * kWgmmaChunk) != 0) return false;
  const WgmmaCut cut = wgmma_cut(pass, wgmma_patch(pass));
  return cut.weight_stages > 0 && cut.shared_bytes <= limits.shared_bytes_per_block &&
         ceil_div(pass.result_channels, cut.channels) <= kMostBlocksYZ;
}

}  // namespace cnnkernels::cuda
