// Scratch memory for kernels: reused from call to call, bounded, releasable.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/block_cache.h"

namespace cnnkernels {

// Owns a 64-byte-aligned block for its lifetime. Blocks come from and return
// to one cache for the whole process, which keeps at most 32 MiB; contents are
// undefined. Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(block_.data);
  }

 private:
  const MemoryBlock block_;
};

// For tests: fills every block with NaN before it is used, so that a kernel that
// reads what it did not write is seen.
void poison_workspaces(bool poison);

// Frees the blocks that no call is using.
void release_workspaces();

}  // namespace cnnkernels
