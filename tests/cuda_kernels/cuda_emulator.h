// Runs CUDA kernels on the CPU: the part of CUDA C++ that csrc/kernels/cuda uses, for a host
// compiler. docs/cuda-emulator.md says what it finds and what it cannot.
//
// Blocks run one after the other. A block's threads are fibers, which give up the processor only
// where they wait: at __syncthreads, at a warp's collective operation, and at their end. A warp
// runs as far as it can before another one moves: what one warp writes and another reads without a
// barrier between them is then either not written yet, or overwritten already. Warps take turns in
// several orders (Schedule). Shared memory holds NaN when a block begins. Whatever CUDA leaves
// undefined and the emulator can see is an Error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <typeindex>
#include <utility>
#include <vector>

#include "kernels/types.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// --- CUDA's keywords ---------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define CNNK_SHARED(T, name, count)                                                                \
  T(&name)                                                                                         \
  [count] = *static_cast<T(*)[count]>(cuda_emulator::shared_array(__FILE__, __LINE__, __COUNTER__, \
                                                                  typeid(T), sizeof(T) * (count)))
#define CNNK_DYNAMIC_SHARED(T, name) T* const name = cuda_emulator::dynamic_shared_array<T>()
#define CNNK_CHECK_ALIGNMENT(pointer, bytes) cuda_emulator::check_alignment(pointer, bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  uint64_t count() const { return uint64_t{x} * y * z; }
};

namespace cuda_emulator {

// A kernel did what CUDA does not define, or waits for ever.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned kWarp = 32;

// In what order warps, and the lanes of a warp, take their turns.
struct Schedule {
  enum class Order { forward, reverse, shuffled } order = Order::forward;
  uint32_t seed = 0;  // of shuffled
};
inline Schedule& schedule() {
  static Schedule chosen;
  return chosen;
}

// What a launch may ask for; those of an H100.
struct Limits {
  size_t static_shared_bytes = 48 * 1024;
  size_t dynamic_shared_bytes = 48 * 1024;  // more only for a kernel that has asked
  size_t shared_bytes = 227 * 1024;
};
inline Limits& limits() {
  static Limits chosen;
  return chosen;
}
// What the kernel of the next launch has asked for.
inline size_t& asked_shared_bytes() {
  static size_t bytes = 0;
  return bytes;
}

// --- Fibers ------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 128 * 1024;

// A stack and a place on it. To switch is to save this place and to go on at another.
class Fiber {
 public:
  Fiber() = default;  // the place that launch() was called from
  explicit Fiber(void (*entry)()) : stack_(new char[kStackBytes]) { start(entry); }

  // Begins again, at entry, on an empty stack.
  void start(void (*entry)());
  // Goes on at `next`, until something switches back. `ends`: nothing will.
  void switch_to(Fiber& next, bool ends = false);
  // To be called by entry first.
  void entered();

 private:
  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  // The sanitizer must know of each stack that is changed to.
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  static Fiber*& previous() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
#endif
};

#if defined(__x86_64__)
// Saves the registers that a call preserves, and the stack pointer, in *save; loads others.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

inline void Fiber::start(void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  const auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) & ~uintptr_t{15};
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // entry's own return address; it never returns
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--stack = nullptr;
  stack_pointer_ = stack;
#if defined(__SANITIZE_ADDRESS__)
  fake_stack_ = nullptr;
  bottom_ = stack_.get();
  size_ = kStackBytes;
#endif
}
#else
inline void Fiber::start(void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#if defined(__SANITIZE_ADDRESS__)
  fake_stack_ = nullptr;
  bottom_ = stack_.get();
  size_ = kStackBytes;
#endif
}
#endif

inline void Fiber::switch_to(Fiber& next, [[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  previous() = this;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake_stack_, next.bottom_, next.size_);
#endif
#if defined(__x86_64__)
  switch_stacks(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  entered();
#endif
}

inline void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  // Where the fiber that was left has its stack is known only now.
  __sanitizer_finish_switch_fiber(fake_stack_, &previous()->bottom_, &previous()->size_);
#endif
}

// --- A block -----------------------------------------------------------------------------------

// A place in the source, for messages and to tell two barriers from each other.
struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  std::string text() const {
    const char* const slash = std::strrchr(file, '/');
    return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

// An operation of several lanes of a warp: each brings an operand and a result to fill, and the
// last one to come computes for all.
struct Collective {
  using Lanes = std::vector<Collective*>;  // of the whole warp; null for one that takes no part
  const char* name = "";
  Site site;
  unsigned mask = 0;
  const void* operand = nullptr;
  void* result = nullptr;
  const std::function<void(const Lanes&)>* compute = nullptr;
};

// A copy to shared memory that is under way: it is done where its thread waits for it.
struct AsyncCopy {
  void* target;
  const void* source;
  size_t bytes, valid_bytes;  // what is not valid becomes zero
};

// A barrier in shared memory; its threads and its copies are told apart by what they bring.
struct SharedBarrier {
  unsigned count, left;  // arrivals of a phase, and those that are still to come
  int64_t bytes = 0;     // that this phase expects still
  unsigned phase = 0;
  bool published = false;  // seen by copies

  void complete() {
    if (left > 0 || bytes > 0) return;
    ++phase;
    left = count;
  }
  bool is_over(unsigned parity) const { return phase % 2 != parity; }
};

// A copy of a box of a tensor: it is done where nothing else can go on.
struct BoxCopy {
  const char* target;
  size_t bytes;
  SharedBarrier* barrier;
  std::function<void()> finish;
};

// A product of a warpgroup that is under way: it is done where its thread waits for it.
struct Product {
  float* sums;
  std::function<void(float*)> add;  // to this thread's sums
};

struct Thread {
  enum class State { ready, at_barrier, at_shared_barrier, in_collective, exited };

  Fiber fiber;
  State state = State::ready;
  dim3 index;
  Site barrier;
  Collective collective;
  std::vector<AsyncCopy> copies;              // not committed yet
  std::deque<std::vector<AsyncCopy>> groups;  // committed, the oldest first

  const SharedBarrier* awaited = nullptr;  // at_shared_barrier
  unsigned parity = 0;
  std::vector<Product> products;                 // not committed yet
  std::deque<std::vector<Product>> multiplying;  // committed, the oldest first
  std::map<float*, std::vector<float>> sums;     // of products under way
  bool fenced = false;                           // since it may have touched sums
  uint64_t product_trail = 0;                    // of all products so far
};

class Block {
 public:
  Block(dim3 grid, dim3 size, size_t dynamic_shared_bytes, const std::function<void()>& kernel);

  void run(dim3 index);  // from the outside; throws Error
  [[noreturn]] void fail(const std::string& what);

  // By a thread, which they may stop for a while.
  void barrier(Site site);
  void collective(Collective operation);
  void shared_barrier(const SharedBarrier& awaited, unsigned parity, Site site);

  // An array of its own for each place, and each type that a template has there.
  using SharedKey = std::tuple<std::string, int, std::type_index>;  // the file, a number in it
  void* shared_array(const SharedKey& key, size_t bytes);
  void* dynamic_shared() const { return dynamic_shared_.get(); }
  bool holds_shared(const void* pointer, size_t bytes) const;
  // The address that dynamic shared memory has in its own space, and the way back. It begins where
  // no alignment but that of 16 bytes is given.
  static constexpr uint32_t kDynamicAddress = 1024 + 16;
  uint32_t shared_address(const void* pointer);
  char* shared_pointer(uint32_t address, size_t bytes);

  std::map<const void*, SharedBarrier> barriers;
  std::vector<BoxCopy> box_copies;  // under way

  Thread& thread() { return *running_; }
  unsigned thread_number() const { return static_cast<unsigned>(running_ - threads_.data()); }
  unsigned lane() const { return static_cast<unsigned>(running_ - threads_.data()) % kWarp; }

  const dim3 grid, size;
  dim3 index;
  size_t asked = 0;  // of dynamic shared memory

 private:
  struct Shared {
    std::unique_ptr<char, decltype(&std::free)> memory;
    size_t bytes;
  };
  static Shared poisoned(size_t bytes);
  static void entry();

  void stop(Thread::State state);
  bool run_warp(const std::vector<unsigned>& lanes);
  bool wake();
  bool finish_box_copy();
  void check_end() const;
  void complete_collectives(unsigned first, unsigned end, bool* progress);
  void complete_barrier();
  std::string waiting() const;
  std::vector<std::vector<unsigned>> turns();

  std::vector<Thread> threads_;
  Thread* running_ = nullptr;
  Fiber scheduler_;
  const std::function<void()>& kernel_;
  std::string failure_;
  std::map<SharedKey, Shared> shared_;
  std::unique_ptr<char, decltype(&std::free)> dynamic_shared_;
  size_t dynamic_shared_bytes_, static_shared_bytes_ = 0;
  std::mt19937 random_;
};

inline Block*& current_block() {
  static Block* block = nullptr;
  return block;
}
inline Block& block() {
  if (current_block() == nullptr) throw Error("device code runs outside of a kernel");
  return *current_block();
}

inline std::string text(dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

inline Block::Block(dim3 grid_, dim3 size_, size_t dynamic_shared_bytes,
                    const std::function<void()>& kernel)
    : grid(grid_),
      size(size_),
      threads_(size_.count()),
      kernel_(kernel),
      dynamic_shared_(nullptr, &std::free),
      dynamic_shared_bytes_(dynamic_shared_bytes),
      random_(schedule().seed) {
  for (unsigned i = 0; i < threads_.size(); ++i) {
    threads_[i].fiber = Fiber(&Block::entry);
    threads_[i].index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
  }
}

// Exactly as large as was asked for, so that AddressSanitizer sees an access past its end.
inline Block::Shared Block::poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  return {{static_cast<char*>(memory), &std::free}, bytes};
}

inline void Block::entry() {
  Block& block = *current_block();
  block.running_->fiber.entered();
  try {
    block.kernel_();
    const Thread& thread = *block.running_;
    if (!thread.products.empty() || !thread.multiplying.empty()) {
      block.fail("it ends before its products do");
    }
  } catch (const Error& error) {
    block.failure_ = error.what();
  }
  block.running_->state = Thread::State::exited;
  block.running_->fiber.switch_to(block.scheduler_, true);
}

inline void Block::stop(Thread::State state) {
  running_->state = state;
  running_->fiber.switch_to(scheduler_);
}

inline void Block::fail(const std::string& what) {
  throw Error("block " + text(index) + ", thread " + text(running_->index) + ": " + what);
}

inline void Block::barrier(Site site) {
  running_->barrier = site;
  stop(Thread::State::at_barrier);
}

inline void Block::shared_barrier(const SharedBarrier& awaited, unsigned parity, Site site) {
  while (!awaited.is_over(parity)) {
    running_->awaited = &awaited;
    running_->parity = parity;
    running_->barrier = site;
    stop(Thread::State::at_shared_barrier);
  }
}

inline void Block::collective(Collective operation) {
  if ((operation.mask >> lane() & 1) == 0) {
    fail(std::string(operation.name) + " at " + operation.site.text() + " by lane " +
         std::to_string(lane()) + ", which its mask leaves out");
  }
  running_->collective = operation;
  stop(Thread::State::in_collective);
}

inline void* Block::shared_array(const SharedKey& key, size_t bytes) {
  const auto found = shared_.find(key);
  if (found != shared_.end()) return found->second.memory.get();
  static_shared_bytes_ += bytes;
  if (static_shared_bytes_ > limits().static_shared_bytes) {
    fail(std::to_string(static_shared_bytes_) + " bytes of static shared memory, more than " +
         std::to_string(limits().static_shared_bytes));
  }
  // A launch that has not asked for more has so much of both.
  const size_t most =
      dynamic_shared_bytes_ <= asked ? limits().shared_bytes : limits().static_shared_bytes;
  if (static_shared_bytes_ + dynamic_shared_bytes_ > most) {
    fail(std::to_string(static_shared_bytes_) + " bytes of static and " +
         std::to_string(dynamic_shared_bytes_) + " of dynamic shared memory, more than " +
         std::to_string(limits().shared_bytes));
  }
  return shared_.emplace(key, poisoned(bytes)).first->second.memory.get();
}

inline bool Block::holds_shared(const void* pointer, size_t bytes) const {
  const char* const begin = static_cast<const char*>(pointer);
  const auto inside = [&](const char* memory, size_t size_of_memory) {
    return memory != nullptr && begin >= memory && begin + bytes <= memory + size_of_memory;
  };
  if (inside(dynamic_shared_.get(), dynamic_shared_bytes_)) return true;
  return std::any_of(shared_.begin(), shared_.end(), [&](const auto& entry) {
    return inside(entry.second.memory.get(), entry.second.bytes);
  });
}

inline uint32_t Block::shared_address(const void* pointer) {
  const char* const begin = dynamic_shared_.get();
  const char* const at = static_cast<const char*>(pointer);
  if (begin == nullptr || at < begin || at > begin + dynamic_shared_bytes_) {
    fail("the shared address of what is not in dynamic shared memory");
  }
  return kDynamicAddress + static_cast<uint32_t>(at - begin);
}

inline char* Block::shared_pointer(uint32_t address, size_t bytes) {
  if (address < kDynamicAddress || address + bytes > kDynamicAddress + dynamic_shared_bytes_) {
    fail("the address of what is not in dynamic shared memory");
  }
  return dynamic_shared_.get() + (address - kDynamicAddress);
}

// Lets those go on for whom a phase is over.
inline bool Block::wake() {
  bool progress = false;
  for (Thread& thread : threads_) {
    if (thread.state != Thread::State::at_shared_barrier) continue;
    if (!thread.awaited->is_over(thread.parity)) continue;
    thread.state = Thread::State::ready;
    progress = true;
  }
  return progress;
}

// Copies arrive in any order, one at a time, and as late as possible.
inline bool Block::finish_box_copy() {
  if (box_copies.empty()) return false;
  size_t next = 0;
  if (schedule().order == Schedule::Order::reverse) next = box_copies.size() - 1;
  if (schedule().order == Schedule::Order::shuffled) next = random_() % box_copies.size();
  const BoxCopy copy = box_copies[next];
  box_copies.erase(box_copies.begin() + static_cast<std::ptrdiff_t>(next));
  SharedBarrier& barrier = *copy.barrier;
  if (barrier.bytes < static_cast<int64_t>(copy.bytes)) {
    throw Error("block " + text(index) + ": a copy brings " + std::to_string(copy.bytes) +
                " bytes where a barrier expects " + std::to_string(barrier.bytes));
  }
  copy.finish();
  barrier.bytes -= static_cast<int64_t>(copy.bytes);
  barrier.complete();
  return true;
}

inline void Block::check_end() const {
  if (!box_copies.empty()) throw Error("block " + text(index) + " ends before its copies do");
  for (size_t i = 0; i < threads_.size(); ++i) {
    if (threads_[i].product_trail != threads_[i / 128 * 128].product_trail) {
      throw Error("block " + text(index) + ": threads of a warpgroup differ in their products");
    }
  }
}

// The threads of each warp, warps and lanes in the order of the schedule.
inline std::vector<std::vector<unsigned>> Block::turns() {
  std::vector<std::vector<unsigned>> warps;
  for (unsigned first = 0; first < threads_.size(); first += kWarp) {
    warps.emplace_back();
    for (unsigned i = first; i < std::min<size_t>(threads_.size(), first + kWarp); ++i) {
      warps.back().push_back(i);
    }
    if (schedule().order == Schedule::Order::reverse) {
      std::reverse(warps.back().begin(), warps.back().end());
    } else if (schedule().order == Schedule::Order::shuffled) {
      std::shuffle(warps.back().begin(), warps.back().end(), random_);
    }
  }
  if (schedule().order == Schedule::Order::reverse) {
    std::reverse(warps.begin(), warps.end());
  } else if (schedule().order == Schedule::Order::shuffled) {
    std::shuffle(warps.begin(), warps.end(), random_);
  }
  return warps;
}

// Lets each thread of a warp run until it waits or ends, and completes what all wait for. Returns
// whether anything happened.
inline bool Block::run_warp(const std::vector<unsigned>& lanes) {
  bool progress = false;
  for (const unsigned i : lanes) {
    if (threads_[i].state != Thread::State::ready) continue;
    progress = true;
    running_ = &threads_[i];
    scheduler_.switch_to(running_->fiber);
    if (!failure_.empty()) throw Error(failure_);
  }
  const unsigned first = *std::min_element(lanes.begin(), lanes.end());
  complete_collectives(first, first + static_cast<unsigned>(lanes.size()), &progress);
  return progress;
}

inline void Block::complete_collectives(unsigned first, unsigned end, bool* progress) {
  for (unsigned i = first; i < end; ++i) {
    if (threads_[i].state != Thread::State::in_collective) continue;
    const Collective& operation = threads_[i].collective;
    Collective::Lanes lanes(kWarp, nullptr);
    bool complete = true;
    for (unsigned lane = 0; lane < kWarp && complete; ++lane) {
      if ((operation.mask >> lane & 1) == 0) continue;
      Thread* const other = first + lane < end ? &threads_[first + lane] : nullptr;
      complete = other != nullptr && other->state == Thread::State::in_collective &&
                 other->collective.mask == operation.mask &&
                 other->collective.site == operation.site &&
                 std::strcmp(other->collective.name, operation.name) == 0;
      if (complete) lanes[lane] = &other->collective;
    }
    if (!complete) continue;
    (*operation.compute)(lanes);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (lanes[lane] != nullptr) threads_[first + lane].state = Thread::State::ready;
    }
    *progress = true;
  }
}

// All threads wait at one barrier, or something is wrong.
inline void Block::complete_barrier() {
  const Site* site = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.state != Thread::State::at_barrier) {
      throw Error("block " + text(index) + " waits for ever: " + waiting());
    }
    if (site != nullptr && !(*site == thread.barrier)) {
      throw Error("block " + text(index) + " is divided at __syncthreads: " + waiting());
    }
    site = &thread.barrier;
  }
  for (Thread& thread : threads_) thread.state = Thread::State::ready;
}

inline std::string Block::waiting() const {
  std::map<std::string, std::pair<unsigned, unsigned>> first_and_count;
  for (unsigned i = 0; i < threads_.size(); ++i) {
    const Thread& thread = threads_[i];
    std::string where = "exited";
    if (thread.state == Thread::State::at_shared_barrier) {
      where = "at a barrier in shared memory, " + thread.barrier.text();
    } else if (thread.state == Thread::State::at_barrier) {
      where = "at __syncthreads, " + thread.barrier.text();
    } else if (thread.state == Thread::State::in_collective) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "%#x", thread.collective.mask);
      where = std::string("in ") + thread.collective.name + " of mask " + mask + ", " +
              thread.collective.site.text();
    }
    const auto [entry, fresh] = first_and_count.try_emplace(where, i, 0);
    ++entry->second.second;
  }
  std::string result;
  for (const auto& [where, counted] : first_and_count) {
    if (!result.empty()) result += "; ";
    result += std::to_string(counted.second) + " threads " + where + " (the first is thread " +
              text(threads_[counted.first].index) + ")";
  }
  return result;
}

inline void Block::run(dim3 index_) {
  index = index_;
  for (auto& [site, shared] : shared_) std::memset(shared.memory.get(), 0xff, shared.bytes);
  if (dynamic_shared_bytes_ > 0) {
    if (dynamic_shared_ == nullptr) dynamic_shared_ = poisoned(dynamic_shared_bytes_).memory;
    std::memset(dynamic_shared_.get(), 0xff, dynamic_shared_bytes_);
  }
  for (Thread& thread : threads_) {
    thread.fiber.start(&Block::entry);
    thread.state = Thread::State::ready;
    thread.copies.clear();
    thread.groups.clear();
    thread.products.clear();
    thread.multiplying.clear();
    thread.sums.clear();
    thread.fenced = false;
    thread.product_trail = 0;
  }
  barriers.clear();
  box_copies.clear();
  const auto exited = [](const Thread& thread) { return thread.state == Thread::State::exited; };
  while (!std::all_of(threads_.begin(), threads_.end(), exited)) {
    bool progress = false;
    for (const std::vector<unsigned>& warp : turns()) {
      while (run_warp(warp)) progress = true;
      progress = wake() || progress;
    }
    // A copy is not done before a barrier that does not wait for it.
    const bool at_barrier = std::all_of(threads_.begin(), threads_.end(), [](const Thread& thread) {
      return thread.state == Thread::State::at_barrier;
    });
    if (!progress && (at_barrier || !finish_box_copy())) complete_barrier();
    wake();
  }
  check_end();
}

// Runs kernel() as every thread of the grid. Launches of several threads take turns.
inline void launch(dim3 grid, dim3 size, size_t dynamic_shared_bytes, const void*,
                   const std::function<void()>& kernel) {
  const size_t asked = std::min(std::exchange(asked_shared_bytes(), 0), limits().shared_bytes);
  const bool fits = grid.count() > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                    grid.z <= 65535 && size.count() > 0 && size.count() <= 1024 && size.z <= 64 &&
                    dynamic_shared_bytes <= std::max(limits().dynamic_shared_bytes, asked);
  if (!fits) {
    throw Error("a grid of " + text(grid) + " blocks of " + text(size) + " threads with " +
                std::to_string(dynamic_shared_bytes) +
                " bytes of shared memory cannot be launched");
  }
  static std::mutex device;
  const std::lock_guard lock(device);
  Block block(grid, size, dynamic_shared_bytes, kernel);
  block.asked = asked;
  struct Current {
    explicit Current(Block* running) { current_block() = running; }
    ~Current() { current_block() = nullptr; }
  } const current(&block);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) block.run(dim3(x, y, z));
    }
  }
}

inline void* shared_array(const char* file, int line, int number, std::type_index type,
                          size_t bytes) {
  return block().shared_array({std::string(file) + ":" + std::to_string(line), number, type},
                              bytes);
}

template <class T>
T* dynamic_shared_array() {
  if (block().dynamic_shared() == nullptr) {
    block().fail("dynamic shared memory, of which the launch gave none");
  }
  return static_cast<T*>(block().dynamic_shared());
}

inline void check_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    block().fail("an access of " + std::to_string(bytes) + " bytes to an address that is " +
                 std::to_string(reinterpret_cast<uintptr_t>(pointer) % bytes) +
                 " past a multiple of them");
  }
}

// Makes `compute` of all lanes in the mask, each of which brings an operand, and returns the
// calling lane's result. Where compute() leaves a result alone it is all ones.
template <class Result, class Operand>
Result collective(const char* name, Site site, unsigned mask, const Operand& operand,
                  const std::function<void(const Collective::Lanes&)>& compute) {
  Result result;
  std::memset(static_cast<void*>(&result), 0xff, sizeof result);
  block().collective({name, site, mask, &operand, &result, &compute});
  return result;
}
template <class Operand>
const Operand& operand_of(const Collective* lane) {
  return *static_cast<const Operand*>(lane->operand);
}
template <class Result>
Result& result_of(Collective* lane) {
  return *static_cast<Result*>(lane->result);
}

// `source_of(lane, first)` names the lane of the warp from which `lane`, of the group that begins
// at `first`, reads. Past the end of its group, and where that is negative, a lane keeps its own
// value.
template <class T, class SourceOf>
T shuffle(const char* name, Site site, unsigned mask, T value, int width, SourceOf source_of) {
  struct Operand {
    T value;
    unsigned source;
  };
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    block().fail(std::string(name) + " of width " + std::to_string(width));
  }
  const int lane = static_cast<int>(block().lane());
  const int first = lane / width * width;
  const int named = source_of(lane, first);
  const auto source = static_cast<unsigned>(named >= 0 && named < first + width ? named : lane);
  return collective<T>(name, site, mask, Operand{value, source},
                       [](const Collective::Lanes& lanes) {
                         for (Collective* const to : lanes) {
                           if (to == nullptr) continue;
                           // What a lane outside of the mask has is undefined: it stays all ones.
                           const Collective* const from = lanes[operand_of<Operand>(to).source];
                           if (from != nullptr) result_of<T>(to) = operand_of<Operand>(from).value;
                         }
                       });
}

inline void finish(const std::vector<AsyncCopy>& copies) {
  for (const AsyncCopy& copy : copies) {
    std::memset(copy.target, 0, copy.bytes);
    std::memcpy(copy.target, copy.source, copy.valid_bytes);
  }
}

}  // namespace cuda_emulator

// --- CUDA's functions --------------------------------------------------------------------------

#define threadIdx (cuda_emulator::block().thread().index)
#define blockIdx (cuda_emulator::block().index)
#define blockDim (cuda_emulator::block().size)
#define gridDim (cuda_emulator::block().grid)
constexpr int warpSize = 32;

// The last two arguments are the place of the call.
#define CUDA_EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_EMULATOR_SITE) { cuda_emulator::block().barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATOR_SITE) {
  cuda_emulator::collective<int>("__syncwarp", {file, line}, mask, 0, [](const auto&) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_EMULATOR_SITE) {
  return cuda_emulator::shuffle("__shfl_sync", {file, line}, mask, value, width,
                                [&](int, int first) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATOR_SITE) {
  return cuda_emulator::shuffle("__shfl_up_sync", {file, line}, mask, value, width,
                                [&](int lane, int first) {
                                  const int from = lane - static_cast<int>(delta % 32);
                                  return from >= first ? from : lane;
                                });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATOR_SITE) {
  return cuda_emulator::shuffle("__shfl_down_sync", {file, line}, mask, value, width,
                                [&](int lane, int) { return lane + static_cast<int>(delta % 32); });
}
// A lane may read from an earlier group, but not from a later one.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_EMULATOR_SITE) {
  return cuda_emulator::shuffle("__shfl_xor_sync", {file, line}, mask, value, width,
                                [&](int lane, int) { return lane ^ (bits & 31); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATOR_SITE) {
  using cuda_emulator::Collective;
  return cuda_emulator::collective<unsigned>(
      "__ballot_sync", {file, line}, mask, predicate, [](const Collective::Lanes& lanes) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < cuda_emulator::kWarp; ++lane) {
          if (lanes[lane] != nullptr && cuda_emulator::operand_of<int>(lanes[lane]) != 0) {
            votes |= 1u << lane;
          }
        }
        for (Collective* const lane : lanes) {
          if (lane != nullptr) cuda_emulator::result_of<unsigned>(lane) = votes;
        }
      });
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

// A thread runs alone until it waits, so that these are what they look like.
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, *address + value);
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, std::min(*address, value));
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, value);
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return std::exchange(*address, *address == compare ? value : *address);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __float_as_uint(float value) { return cnnkernels::float_bits(value); }
inline float __uint_as_float(unsigned bits) { return cnnkernels::float_from_bits(bits); }

// The runtime: one device, an H100.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > cuda_emulator::limits().shared_bytes) {
    return cudaErrorInvalidValue;
  }
  cuda_emulator::asked_shared_bytes() = static_cast<size_t>(bytes);
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion = 90;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)()) {
  *attributes = {};
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // what is wrong throws
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_emulator::limits().shared_bytes);
      break;
  }
  return cudaSuccess;
}

// --- The instructions of kernels/cuda/ptx.cuh --------------------------------------------------

namespace cnnkernels::cuda {
namespace emulated {

using cuda_emulator::block;
using cuda_emulator::Collective;

struct Fragments {
  const float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Element `half` of a pair.
template <class T>
float element(uint32_t pair, int half) {
  return widen(T{static_cast<uint16_t>(pair >> (16 * half))});
}

// The nearest float that is not farther from zero.
inline float toward_zero(double value) {
  const auto nearest = static_cast<float>(value);
  return std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(value)
             ? std::nextafter(nearest, 0.0f)
             : nearest;
}

// d += a b for a_at(lane's operand, row, column) and b_at alike, of kDepth products a sum.
template <int kDepth, class AAt, class BAt>
void mma(const char* name, cuda_emulator::Site site, float (&d)[4], const uint32_t (&a)[4],
         const uint32_t (&b)[2], AAt a_at, BAt b_at) {
  struct Sums {
    float values[4];
  };
  const Sums sums = cuda_emulator::collective<Sums>(
      name, site, 0xffffffffu, Fragments{d, a, b}, [&](const Collective::Lanes& lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          Collective* const own = lanes[static_cast<size_t>(lane)];
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = cuda_emulator::operand_of<Fragments>(own).d[i];
            for (int k = 0; k < kDepth; ++k) {
              sum += static_cast<double>(a_at(lanes, row, k)) * b_at(lanes, k, column);
            }
            cuda_emulator::result_of<Sums>(own).values[i] = toward_zero(sum);
          }
        }
      });
  std::copy(sums.values, sums.values + 4, d);
}

inline const Fragments& of(const Collective::Lanes& lanes, int lane) {
  return cuda_emulator::operand_of<Fragments>(lanes[static_cast<size_t>(lane)]);
}

// The lower 13 bits of a float take no part.
inline float tf32(uint32_t bits) { return float_from_bits(bits & 0xffffe000u); }

inline void ldmatrix(const char* name, cuda_emulator::Site site, uint32_t (&r)[4], const void* row,
                     bool transposed) {
  cuda_emulator::check_alignment(row, 16);
  if (!block().holds_shared(row, 16)) block().fail(std::string(name) + " outside of shared memory");
  struct Registers {
    uint32_t values[4];
  };
  const Registers registers = cuda_emulator::collective<Registers>(
      name, site, 0xffffffffu, row, [&](const Collective::Lanes& lanes) {
        const auto at = [&](int matrix, int i, int j) {
          const auto lane = static_cast<size_t>(8 * matrix + i);
          return static_cast<const uint16_t*>(
              cuda_emulator::operand_of<const void*>(lanes[lane]))[j];
        };
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = transposed ? at(matrix, j, i) : at(matrix, i, j);
            const uint32_t high = transposed ? at(matrix, j + 1, i) : at(matrix, i, j + 1);
            cuda_emulator::result_of<Registers>(lanes[static_cast<size_t>(lane)]).values[matrix] =
                high << 16 | low;
          }
        }
      });
  std::copy(registers.values, registers.values + 4, r);
}

}  // namespace emulated

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  CUDA_EMULATOR_SITE) {
  using emulated::of;
  emulated::mma<16>(
      "mma.m16n8k16", {file, line}, d, a, b,
      [](const auto& lanes, int row, int k) {
        return emulated::element<T>(of(lanes, row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2],
                                    k % 2);
      },
      [](const auto& lanes, int k, int column) {
        return emulated::element<T>(of(lanes, column * 4 + k % 8 / 2).b[k / 8], k % 2);
      });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             CUDA_EMULATOR_SITE) {
  using emulated::of;
  emulated::mma<8>(
      "mma.m16n8k8", {file, line}, d, a, b,
      [](const auto& lanes, int row, int k) {
        return emulated::tf32(of(lanes, row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]);
      },
      [](const auto& lanes, int k, int column) {
        return emulated::tf32(of(lanes, column * 4 + k % 4).b[k / 4]);
      });
}

inline uint32_t to_tf32(uint32_t bits) {
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  return is_finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUDA_EMULATOR_SITE) {
  emulated::ldmatrix("ldmatrix.x4", {file, line}, r, row, false);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, CUDA_EMULATOR_SITE) {
  emulated::ldmatrix("ldmatrix.x4.trans", {file, line}, r, row, true);
}

template <int kBytes>
void cp_async(void* target, const void* source, int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  using emulated::block;
  cuda_emulator::check_alignment(target, kBytes);
  cuda_emulator::check_alignment(source, kBytes);
  if (!block().holds_shared(target, kBytes)) block().fail("cp.async outside of shared memory");
  if (valid_bytes < 0 || valid_bytes > kBytes) block().fail("cp.async of more than its size");
  std::memset(target, 0xff, kBytes);  // what is read before the wait, or was to be read still
  block().thread().copies.push_back({target, source, kBytes, static_cast<size_t>(valid_bytes)});
}
inline void cp_async_commit() {
  auto& thread = emulated::block().thread();
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}
template <int kLeft>
void cp_async_wait() {
  auto& groups = emulated::block().thread().groups;
  while (groups.size() > size_t{kLeft}) {
    cuda_emulator::finish(groups.front());
    groups.pop_front();
  }
}

}  // namespace cnnkernels::cuda

#include "cuda_emulator_hopper.h"
