// Memory that is used again: freed blocks wait here for the next that wants one.
//
// A page that a process touches for the first time costs more than the arithmetic of a
// small layer, and malloc gives large blocks back to the system as soon as they are free.
#pragma once

#include <cstddef>
#include <vector>

namespace cnnkernels {

struct MemoryBlock {
  void* data;
  size_t capacity;  // bytes
};

// Hands out blocks and keeps those that come back, the oldest of which go first when there
// are too many. A new block is made only when, with those in use and kept, it is no more than
// were once in use at a time and kSlackBytes: else kept ones are freed first. Any thread may
// call, and a process that has been forked too.
class BlockCache {
 public:
  // For blocks of different sizes that are in use one after the other.
  static constexpr size_t kSlackBytes = size_t{16} << 20;

  // Where blocks come from and go to. Throws where there is no memory.
  using Allocate = void* (*)(size_t bytes);
  using Free = void (*)(void* data);

  // Keeps at most `most_kept` bytes, and few enough blocks to look through.
  BlockCache(Allocate allocate, Free free, size_t most_kept);
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;

  // The smallest block kept of `bytes` to `most` bytes, or a new one of `bytes`. Its contents
  // are undefined. Where there is no memory all that is kept is freed; throws what `allocate`
  // throws if that does not help.
  MemoryBlock take(size_t bytes, size_t most);
  void give(MemoryBlock block);

  // Frees what is kept.
  void release();

 private:
  void evict(size_t most_kept, size_t most_blocks);
  void* allocate_anew(size_t bytes);

  const Allocate allocate_;
  const Free free_;
  const size_t most_kept_;
  std::vector<MemoryBlock> blocks_;  // the oldest first
  size_t kept_ = 0, in_use_ = 0, most_in_use_ = 0;
};

}  // namespace cnnkernels
