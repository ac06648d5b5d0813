#include "kernels/workspace.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace cnnkernels {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKeptBytes = size_t{32} << 20;

struct Block {
  void* data;
  size_t capacity;
};

struct FreeList {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};

// Never destroyed: threads of the pool may outlive static destructors.
FreeList& free_list() {
  static FreeList* list = new FreeList;
  return *list;
}

std::atomic<bool> poisoned{false};

void poison(void* data, size_t bytes) {
  // All ones is a NaN in every float type.
  if (poisoned.load(std::memory_order_relaxed)) std::memset(data, 0xff, bytes);
}

size_t rounded_capacity(int64_t bytes) {
  const size_t granule = 4096;
  const size_t wanted = bytes > 0 ? static_cast<size_t>(bytes) : 1;
  return (wanted + granule - 1) / granule * granule;
}

}  // namespace

Workspace::Workspace(int64_t bytes) : data_(nullptr), capacity_(rounded_capacity(bytes)) {
  FreeList& list = free_list();
  {
    const std::lock_guard<std::mutex> lock(list.mutex);
    size_t best = list.blocks.size();
    for (size_t i = 0; i < list.blocks.size(); ++i) {
      if (list.blocks[i].capacity < capacity_) continue;
      if (best == list.blocks.size() || list.blocks[i].capacity < list.blocks[best].capacity) {
        best = i;
      }
    }
    if (best < list.blocks.size()) {
      data_ = list.blocks[best].data;
      capacity_ = list.blocks[best].capacity;
      list.bytes -= capacity_;
      list.blocks[best] = list.blocks.back();
      list.blocks.pop_back();
      poison(data_, capacity_);
      return;
    }
  }
  data_ = std::aligned_alloc(kAlignment, capacity_);
  if (data_ == nullptr) throw std::bad_alloc();
  poison(data_, capacity_);
}

Workspace::~Workspace() {
  FreeList& list = free_list();
  {
    const std::lock_guard<std::mutex> lock(list.mutex);
    if (list.bytes + capacity_ <= kKeptBytes && list.blocks.size() < 64) {
      list.blocks.push_back({data_, capacity_});
      list.bytes += capacity_;
      return;
    }
  }
  std::free(data_);
}

void poison_workspaces(bool poison) { poisoned.store(poison); }

void release_workspaces() {
  FreeList& list = free_list();
  std::vector<Block> blocks;
  {
    const std::lock_guard<std::mutex> lock(list.mutex);
    blocks.swap(list.blocks);
    list.bytes = 0;
  }
  for (const Block& block : blocks) std::free(block.data);
}

}  // namespace cnnkernels
