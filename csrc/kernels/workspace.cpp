#include "kernels/workspace.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "kernels/block_cache.h"

namespace cnnkernels {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKeptBytes = size_t{32} << 20;

void* allocate(size_t bytes) {
  void* const data = std::aligned_alloc(kAlignment, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

// Never destroyed: threads of the pool may outlive static destructors.
BlockCache& cache() {
  static BlockCache* const cache = new BlockCache(allocate, std::free, kKeptBytes);
  return *cache;
}

std::atomic<bool> poisoned{false};

size_t rounded_capacity(int64_t bytes) {
  const size_t granule = 4096;
  const size_t wanted = bytes > 0 ? static_cast<size_t>(bytes) : 1;
  return (wanted + granule - 1) / granule * granule;
}

}  // namespace

Workspace::Workspace(int64_t bytes)
    : block_(cache().take(rounded_capacity(bytes), std::numeric_limits<size_t>::max())) {
  // All ones is a NaN in every float type.
  if (poisoned.load(std::memory_order_relaxed)) std::memset(block_.data, 0xff, block_.capacity);
}

Workspace::~Workspace() { cache().give(block_); }

void poison_workspaces(bool poison) { poisoned.store(poison); }

void release_workspaces() { cache().release(); }

}  // namespace cnnkernels
