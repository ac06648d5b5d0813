// What the checks share: random numbers, tensors of doubles and their images in
// guarded memory, thread pools, and the count of checks and failures.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/types.h"

namespace kernel_tests {

using cnnkernels::DType;
using cnnkernels::Layout;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t between(int64_t low, int64_t high) {  // both included
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }

 private:
  std::mt19937_64 engine_;
};

// Four sizes or strides: image, channel, row, column; of a weight: output
// channel, input channel, kernel row, kernel column.
using Dims = std::vector<int64_t>;

inline int64_t element_count(const Dims& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

// Values in the order of their indices, wherever they lie in memory.
struct Tensor {
  Dims shape;
  std::vector<double> values;

  explicit Tensor(Dims dims)
      : shape(std::move(dims)), values(static_cast<size_t>(element_count(shape)), 0.0) {}
  int64_t index(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return ((a * shape[1] + b) * shape[2] + c) * shape[3] + d;
  }
  double& operator[](int64_t i) { return values[static_cast<size_t>(i)]; }
  double operator[](int64_t i) const { return values[static_cast<size_t>(i)]; }
};

// Dense strides; `order` names the dimensions from the outermost to the innermost.
Dims dense_strides(const Dims& shape, const std::vector<int>& order);
Dims layout_strides(const Dims& shape, Layout layout);

enum class Element { float32, float64, bfloat16, float16, uint8, int32, int64 };

Element element_of(DType dtype);

// The nearest value that an element can hold.
double rounded(Element element, double value);

// A block that ends exactly with its last element, so that AddressSanitizer sees
// what is read past it, between guard bytes that hold huge numbers. Where it is
// not initialised it is all ones: NaN in every float type.
class Memory {
 public:
  // Unaligned is one element past a multiple of 16 bytes.
  enum class Placement { unaligned, aligned };

  Memory(Element element, const Dims& shape, const Dims& strides,
         Placement placement = Placement::unaligned);
  Memory(Element element, const Tensor& tensor, const Dims& strides,
         Placement placement = Placement::unaligned);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T = void>
  T* data() const {
    return static_cast<T*>(static_cast<void*>(bytes_.get() + front_));
  }
  Element element() const { return element_; }
  Tensor read() const;
  bool guards_intact() const;

 private:
  Element element_;
  Dims shape_, strides_;
  size_t front_, size_, back_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// A pool of 1, 2 or 3 threads. Ranges are short and start in any order.
cnnkernels::ThreadPool thread_pool(int threads);

// What is being checked; failures name it.
void set_context(const std::string& context);
void expect(bool condition, const std::string& what);
// Equal, with NaN equal to NaN, after rounding `expected` to the elements.
void expect_holds(const Memory& memory, const Tensor& expected, const std::string& what);

// How many checks have failed so far.
int64_t failures();
// Prints how many checks there were and how many failed; returns what main() is to.
int report();

}  // namespace kernel_tests
