#include "kernels/block_cache.h"

#include <algorithm>
#include <mutex>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace cnnkernels {
namespace {

constexpr size_t kMostBlocks = 256;

// One for all caches: it is held for as long as it takes to look through a list. Whoever
// forks holds it, or it might stay locked in the child for ever. Never destroyed: threads
// may outlive static destructors.
std::mutex& cache_mutex() {
  static std::mutex* const mutex = [] {
    static std::mutex* const made = new std::mutex;
#if defined(__unix__) || defined(__APPLE__)
    const auto unlock = [] { made->unlock(); };
    pthread_atfork([] { made->lock(); }, unlock, unlock);
#endif
    return made;
  }();
  return *mutex;
}

}  // namespace

BlockCache::BlockCache(Allocate allocate, Free free, size_t most_kept)
    : allocate_(allocate), free_(free), most_kept_(most_kept) {
  blocks_.reserve(kMostBlocks);
}

// Takes the oldest blocks out until so many bytes and blocks are left.
std::vector<MemoryBlock> BlockCache::evict(size_t most_kept, size_t most_blocks) {
  size_t count = 0;
  while (count < blocks_.size() && (kept_ > most_kept || blocks_.size() - count > most_blocks)) {
    kept_ -= blocks_[count++].capacity;
  }
  const auto end = blocks_.begin() + static_cast<std::ptrdiff_t>(count);
  std::vector<MemoryBlock> evicted(blocks_.begin(), end);
  blocks_.erase(blocks_.begin(), end);
  return evicted;
}

void BlockCache::free_all(const std::vector<MemoryBlock>& blocks) const {
  for (const MemoryBlock& block : blocks) free_(block.data);
}

MemoryBlock BlockCache::take(size_t bytes, size_t most) {
  std::vector<MemoryBlock> evicted;
  {
    const std::lock_guard<std::mutex> lock(cache_mutex());
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->capacity < bytes || block->capacity > most) continue;
      if (best == blocks_.end() || block->capacity <= best->capacity) best = block;
    }
    if (best != blocks_.end()) {
      const MemoryBlock block = *best;
      blocks_.erase(best);
      kept_ -= block.capacity;
      in_use_ += block.capacity;
      most_in_use_ = std::max(most_in_use_, in_use_);
      return block;
    }
    in_use_ += bytes;
    most_in_use_ = std::max(most_in_use_, in_use_);
    evicted = evict(most_in_use_ - in_use_, kMostBlocks);
  }
  free_all(evicted);
  void* data = allocate_(bytes);
  if (data == nullptr) {
    release();
    data = allocate_(bytes);
  }
  if (data == nullptr) {
    const std::lock_guard<std::mutex> lock(cache_mutex());
    in_use_ -= bytes;
    throw std::bad_alloc();
  }
  return {data, bytes};
}

void BlockCache::give(MemoryBlock block) {
  std::vector<MemoryBlock> evicted;
  {
    const std::lock_guard<std::mutex> lock(cache_mutex());
    in_use_ -= block.capacity;
    if (block.capacity <= most_kept_) {
      evicted = evict(most_kept_ - block.capacity, kMostBlocks - 1);
      blocks_.push_back(block);
      kept_ += block.capacity;
    } else {
      evicted.push_back(block);
    }
  }
  free_all(evicted);
}

void BlockCache::release() {
  std::vector<MemoryBlock> evicted;
  {
    const std::lock_guard<std::mutex> lock(cache_mutex());
    evicted = evict(0, 0);
  }
  free_all(evicted);
}

}  // namespace cnnkernels
