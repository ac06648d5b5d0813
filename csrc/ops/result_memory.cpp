#include "ops/result_memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/empty_native.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <new>

#include "kernels/block_cache.h"

namespace cnnkernels {
namespace {

// What precedes the data of a result: a deleter knows only where that is. As long as the
// alignment of torch's memory.
constexpr size_t kHeaderBytes = 64;

c10::Allocator& torch_allocator() { return *c10::GetDefaultCPUAllocator(); }

// The variable's number of MiB, or the default where it is none.
size_t kept_bytes(const char* mebibytes) {
  if (mebibytes == nullptr) return kKeptResultBytes;
  char* end = nullptr;
  const double value = std::strtod(mebibytes, &end);
  if (end == mebibytes || *end != '\0' || !(value >= 0 && value < 1e9)) return kKeptResultBytes;
  return static_cast<size_t>(value * 1024 * 1024);
}

// Never destroyed: tensors may outlive static destructors.
BlockCache& cache() {
  static BlockCache* const cache =
      new BlockCache([](size_t bytes) { return torch_allocator().raw_allocate(bytes); },
                     [](void* data) { torch_allocator().raw_deallocate(data); },
                     kept_bytes(std::getenv("CNNKERNELS_CACHE_MIB")));
  return *cache;
}

// In the header: the block's capacity, or none if the cache does not know the block.
void free_result(void* data) {
  if (data == nullptr) return;
  void* const block = static_cast<char*>(data) - kHeaderBytes;
  const size_t capacity = *static_cast<size_t*>(block);
  capacity > 0 ? cache().give({block, capacity}) : torch_allocator().raw_deallocate(block);
}

class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    constexpr size_t kGranule = 4096;
    const size_t wanted = (bytes + kHeaderBytes + kGranule - 1) / kGranule * kGranule;
    // A profile of memory is to see every result. A block that is a little larger serves as
    // well.
    const MemoryBlock block = c10::memoryProfilingEnabled()
                                  ? MemoryBlock{torch_allocator().raw_allocate(wanted), 0}
                                  : cache().take(wanted, wanted + wanted / 8);
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
  const int64_t bytes =
      c10::multiply_integers(size) * static_cast<int64_t>(c10::elementSize(dtype));
  if (bytes < kSmallestKeptResult) {
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

void release_results() { cache().release(); }

}  // namespace cnnkernels
