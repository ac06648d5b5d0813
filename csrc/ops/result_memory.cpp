#include "ops/result_memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/empty_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/safe_numerics.h>

#include <cstdlib>
#include <new>

#include "kernels/block_cache.h"

namespace cnnkernels {
namespace {

// What precedes the data of a result, the block's capacity: a deleter knows only where the
// data is. As long as the alignment of torch's memory.
constexpr size_t kHeaderBytes = 64;

c10::Allocator& torch_allocator() { return *c10::GetDefaultCPUAllocator(); }

// A result as large as the bound is kept, with what precedes it.
ResultMemory setting_of(double mebibytes, std::string note) {
  constexpr double kHeaders = 1;
  const double kept = mebibytes > 0 ? mebibytes + kHeaders : 0;
  return {static_cast<size_t>(kept * 1024 * 1024), mebibytes, std::move(note)};
}

ResultMemory read_setting(const char* mebibytes) {
  if (mebibytes == nullptr || *mebibytes == '\0') return setting_of(kKeptResultMebibytes, "");
  char* end = nullptr;
  const double value = std::strtod(mebibytes, &end);
  if (end != mebibytes && *end == '\0' && value >= 0 && value < 1e9) return setting_of(value, "");
  return setting_of(kKeptResultMebibytes,
                    "CNNKERNELS_CACHE_MIB is '" + std::string(mebibytes) +
                        "', which is not a number of MiB: the default of 512 holds");
}

// Never destroyed: tensors may outlive static destructors.
BlockCache& cache() {
  static BlockCache* const cache = new BlockCache(
      [](size_t bytes) { return torch_allocator().raw_allocate(bytes); },
      [](void* data) { torch_allocator().raw_deallocate(data); }, result_memory().most_kept);
  return *cache;
}

void free_result(void* data) {
  if (data == nullptr) return;
  void* const block = static_cast<char*>(data) - kHeaderBytes;
  cache().give({block, *static_cast<size_t*>(block)});
}

class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    constexpr size_t kGranule = 4096;
    const size_t wanted = (bytes + kHeaderBytes + kGranule - 1) / kGranule * kGranule;
    // A block that is a little larger serves as well.
    const MemoryBlock block = cache().take(wanted, wanted + wanted / 8);
    new (block.data) size_t(block.capacity);
    void* const data = static_cast<char*>(block.data) + kHeaderBytes;
    return {data, data, &free_result, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_result; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

at::Tensor empty_cpu(at::IntArrayRef size, at::ScalarType dtype, at::MemoryFormat format) {
  // torch refuses sizes that overflow; and a profile of memory is to see results as torch's.
  uint64_t elements = 0;
  if (c10::safe_multiplies_u64(size, &elements) ||
      elements < kSmallestKeptResult / c10::elementSize(dtype) || c10::memoryProfilingEnabled()) {
    return at::native::empty_cpu(size, dtype, at::kStrided, at::kCPU, false, format);
  }
  static ResultAllocator* const allocator = new ResultAllocator;
  at::Tensor result = at::detail::empty_generic(
      size, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, format);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    at::native::fill_empty_deterministic_(result);
  }
  return result;
}

const ResultMemory& result_memory() {
  static const ResultMemory setting = read_setting(std::getenv("CNNKERNELS_CACHE_MIB"));
  return setting;
}

void release_results() { cache().release(); }

}  // namespace cnnkernels
