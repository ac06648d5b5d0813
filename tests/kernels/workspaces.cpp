#include "workspaces.h"

#include <algorithm>
#include <cstdint>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

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
  expect(kept >= 28 * mebibyte, "blocks are kept for the next call");
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
}

}  // namespace kernel_tests
