// The memory of large results, which is kept for the next one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace cnnkernels {

// Results of fewer bytes are left to torch's allocator: malloc has room for them.
constexpr int64_t kSmallestKeptResult = 256 * 1024;

// How many bytes are kept at most when CNNKERNELS_CACHE_MIB does not say.
constexpr int64_t kKeptResultBytes = int64_t{512} << 20;

// at::empty for a result, but not through the dispatcher, which on small tensors costs more
// than the memory, and of memory that was kept, if it is large.
at::Tensor empty_cpu(at::IntArrayRef size, at::ScalarType dtype,
                     at::MemoryFormat format = at::MemoryFormat::Contiguous);

// Frees what is kept.
void release_results();

}  // namespace cnnkernels
