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

// Blocks of one cache, counted.
void check_cache() {
  using cnnkernels::BlockCache;
  using cnnkernels::MemoryBlock;
  BlockCache cache(
      [](size_t bytes) -> void* {
        ++blocks_alive;
        return bytes > 1000 ? nullptr : ::operator new(bytes);
      },
      [](void* data) {
        --blocks_alive;
        ::operator delete(data);
      },
      100);
  const MemoryBlock small = cache.take(40, 50), large = cache.take(60, 70);
  cache.give(small);
  cache.give(large);
  expect(blocks_alive == 2, "as many bytes are kept as were in use, up to the bound");
  const MemoryBlock other = cache.take(30, 35);
  expect(other.capacity == 30, "a block is neither smaller nor larger than asked for");
  expect(blocks_alive == 2, "a new block takes the place of the oldest kept");
  const MemoryBlock again = cache.take(58, 70);
  expect(again.data == large.data && again.capacity == 60, "a kept block is used again");
  const MemoryBlock huge = cache.take(200, 300);
  cache.give(huge);
  expect(blocks_alive == 2, "a block over the bound is freed");
  cache.give(other);
  cache.give(again);
  const MemoryBlock first = cache.take(30, 100), second = cache.take(30, 100);
  expect(first.data == other.data && second.data == again.data, "the smallest that fits is used");
  cache.give(first);
  cache.give(second);
  bool thrown = false;
  try {
    cache.take(2000, 2000);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  blocks_alive -= 2;  // which were counted and refused
  expect(thrown && blocks_alive == 0, "what is kept is freed before memory runs out");
  cache.give(cache.take(30, 30));
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
