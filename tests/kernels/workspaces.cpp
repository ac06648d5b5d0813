#include "workspaces.h"

#include <algorithm>
#include <cstdint>
#include <new>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "kernels/block_cache.h"
#include "kernels/workspace.h"
#include "support.h"

namespace kernel_tests {
namespace {

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 33)
int64_t bytes_in_use() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<int64_t>(info.uordblks + info.hblkhd);
}

void check_bound() {
  using cnnkernels::Workspace;
  const int64_t mebibyte = 1 << 20;
  cnnkernels::release_workspaces();
  const int64_t before = bytes_in_use();
  {
    const Workspace first(20 * mebibyte), second(20 * mebibyte), third(8 * mebibyte);
    expect(bytes_in_use() - before >= 48 * mebibyte, "three blocks at once are three blocks");
  }
  const int64_t kept = bytes_in_use() - before;
  expect(kept >= 20 * mebibyte, "blocks are kept for the next call");
  expect(kept <= 33 * mebibyte, "no more than 32 MiB are kept");
  {
    const Workspace again(19 * mebibyte);
    expect(bytes_in_use() - before == kept, "a kept block is used again");
  }
  cnnkernels::release_workspaces();
  expect(bytes_in_use() - before < mebibyte, "release_workspaces frees what is kept");
}
#else
void check_bound() {}  // there is nothing to measure with
#endif

int64_t blocks_alive = 0;

// Blocks of one cache, counted. A unit is as large as the slack, so that it does not matter.
void check_cache() {
  using cnnkernels::BlockCache;
  using cnnkernels::MemoryBlock;
  constexpr size_t unit = BlockCache::kSlackBytes;
  BlockCache cache(
      [](size_t bytes) -> void* {
        if (bytes > 1000 * unit) throw std::bad_alloc();
        ++blocks_alive;
        return ::operator new(1);  // nobody writes to it
      },
      [](void* data) {
        --blocks_alive;
        ::operator delete(data);
      },
      100 * unit);
  const MemoryBlock small = cache.take(40 * unit, 50 * unit);
  const MemoryBlock large = cache.take(60 * unit, 70 * unit);
  cache.give(small);
  cache.give(large);
  expect(blocks_alive == 2, "as many bytes are kept as were in use, up to the bound");
  const MemoryBlock other = cache.take(30 * unit, 35 * unit);
  expect(other.capacity == 30 * unit, "a block is neither smaller nor larger than asked for");
  expect(blocks_alive == 2, "a new block takes the place of the oldest kept");
  const MemoryBlock again = cache.take(58 * unit, 70 * unit);
  expect(again.data == large.data && again.capacity == 60 * unit, "a kept block is used again");
  const MemoryBlock huge = cache.take(200 * unit, 300 * unit);
  cache.give(huge);
  expect(blocks_alive == 2, "a block over the bound is freed");
  cache.give(other);
  cache.give(again);
  const MemoryBlock first = cache.take(30 * unit, 100 * unit);
  const MemoryBlock second = cache.take(30 * unit, 100 * unit);
  expect(first.data == other.data && second.data == again.data, "the smallest that fits is used");
  cache.give(first);
  cache.give(second);
  bool thrown = false;
  try {
    cache.take(2000 * unit, 2000 * unit);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  expect(thrown && blocks_alive == 0, "what is kept is freed before memory runs out");
  const MemoryBlock one = cache.take(unit / 2, unit), two = cache.take(unit / 4, unit / 3);
  cache.give(one);
  cache.give(two);
  cache.give(cache.take(unit / 8, unit / 7));
  expect(blocks_alive == 3, "small blocks of different sizes are kept side by side");
  cache.release();
  expect(blocks_alive == 0, "release frees what is kept");
}

}  // namespace

void check_workspaces() {
  set_context("workspaces");
  for (const int64_t bytes : {0, 1, 64, 100, 5000, 1 << 20}) {
    const cnnkernels::Workspace workspace(bytes);
    const unsigned char* const data = workspace.as<unsigned char>();
    expect(reinterpret_cast<uintptr_t>(data) % 64 == 0, "a block is aligned to 64 bytes");
    expect(std::all_of(data, data + bytes, [](unsigned char byte) { return byte == 0xff; }),
           "a block is poisoned");
    std::fill_n(workspace.as<unsigned char>(), bytes, 0);
  }
  check_bound();
  check_cache();
}

}  // namespace kernel_tests
