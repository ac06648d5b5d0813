// Stands in for csrc/kernels/workspace.cpp and its checks under
// AddressSanitizer: every block is new and ends where the kernel said, so that
// the sanitizer sees what a kernel reads or writes past its scratch memory.
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels/workspace.h"
#include "workspaces.h"

namespace cnnkernels {
namespace {

bool poisoned = false;

}  // namespace

Workspace::Workspace(int64_t bytes) : data_(nullptr), capacity_(static_cast<size_t>(bytes)) {
  if (posix_memalign(&data_, 64, capacity_) != 0) throw std::bad_alloc();
  if (poisoned) std::memset(data_, 0xff, capacity_);
}

Workspace::~Workspace() { std::free(data_); }

void poison_workspaces(bool poison) { poisoned = poison; }

void release_workspaces() {}

}  // namespace cnnkernels

namespace kernel_tests {

void check_workspaces() {}

}  // namespace kernel_tests
