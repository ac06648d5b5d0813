// The memory of large results, which is kept for the next one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace cnnkernels {

// Results of fewer bytes are left to torch's allocator: malloc has room for them.
constexpr uint64_t kSmallestKeptResult = 256 * 1024;

// How much is kept at most when CNNKERNELS_CACHE_MIB does not say.
constexpr double kKeptResultMebibytes = 512;

// at::empty for a result, but not through the dispatcher, which on small tensors costs more
// than the memory, and of memory that was kept, if it is large.
at::Tensor empty_cpu(at::IntArrayRef size, at::ScalarType dtype,
                     at::MemoryFormat format = at::MemoryFormat::Contiguous);

// How much is kept, and what is wrong with the variable, if anything.
struct ResultMemory {
  size_t most_kept;  // bytes, with what precedes results
  double mebibytes;
  std::string note;
};
const ResultMemory& result_memory();

// Frees what is kept.
void release_results();

}  // namespace cnnkernels
