#include "kernels/block_cache.h"

#include <algorithm>
#include <mutex>

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

// Frees the oldest blocks until so many bytes and blocks are left. Callers hold the mutex:
// a list to free later would itself want memory.
void BlockCache::evict(size_t most_kept, size_t most_blocks) {
  auto end = blocks_.begin();
  size_t left = blocks_.size();
  for (; left > 0 && (kept_ > most_kept || left > most_blocks); ++end, --left) {
    kept_ -= end->capacity;
    free_(end->data);
  }
  blocks_.erase(blocks_.begin(), end);
}

void* BlockCache::allocate_anew(size_t bytes) {
  try {
    return allocate_(bytes);
  } catch (...) {
    release();
  }
  try {
    return allocate_(bytes);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(cache_mutex());
    in_use_ -= bytes;
    throw;
  }
}

MemoryBlock BlockCache::take(size_t bytes, size_t most) {
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
    evict(most_in_use_ + kSlackBytes - in_use_, kMostBlocks);
  }
  return {allocate_anew(bytes), bytes};
}

void BlockCache::give(MemoryBlock block) {
  const std::lock_guard<std::mutex> lock(cache_mutex());
  in_use_ -= block.capacity;
  if (block.capacity > most_kept_) {
    free_(block.data);
    return;
  }
  evict(most_kept_ - block.capacity, kMostBlocks - 1);
  blocks_.push_back(block);
  kept_ += block.capacity;
}

void BlockCache::release() {
  const std::lock_guard<std::mutex> lock(cache_mutex());
  evict(0, 0);
}

}  // namespace cnnkernels
