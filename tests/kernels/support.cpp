#include "support.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <thread>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kernel_tests {
namespace {

constexpr size_t kGuardBytes = 64;
constexpr unsigned char kGuard = 0x7f;  // a huge number in every float type, or NaN
constexpr int64_t kShownFailures = 10;

std::string current_context;
int64_t check_count = 0;
int64_t failure_count = 0;

// Calls body with a value of the element's type.
template <class Body>
void with_element(Element element, Body&& body) {
  switch (element) {
    case Element::uint8:
      return body(uint8_t{});
    case Element::int32:
      return body(int32_t{});
    case Element::int64:
      return body(int64_t{});
    default:
      return cnnkernels::with_dtype(static_cast<DType>(element), body);
  }
}

size_t size_of(Element element) {
  size_t size = 0;
  with_element(element, [&](auto value) { size = sizeof value; });
  return size;
}

template <class T>
double to_double(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<double>(value);
  } else {
    return cnnkernels::widen(value);
  }
}

template <class T>
T from_double(double value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(value);
  } else {
    return cnnkernels::narrow<T>(static_cast<cnnkernels::Accumulator<T>>(value));
  }
}

template <class Visit>
void for_each_element(const Dims& shape, const Dims& strides, Visit&& visit) {
  int64_t i = 0;
  for (int64_t a = 0; a < shape[0]; ++a) {
    for (int64_t b = 0; b < shape[1]; ++b) {
      for (int64_t c = 0; c < shape[2]; ++c) {
        for (int64_t d = 0; d < shape[3]; ++d) {
          visit(i++, a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]);
        }
      }
    }
  }
}

template <int Threads>
void run_on_threads(int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t step = n / (5 * Threads) + 1;
  std::atomic<int64_t> next{cnnkernels::ceil_div(n, step)};
  const auto work = [&] {
    for (int64_t i = --next; i >= 0; i = --next) {
      body(context, i * step, std::min(n, (i + 1) * step));
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < Threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

Dims dense_strides(const Dims& shape, const std::vector<int>& order) {
  Dims strides(shape.size());
  int64_t stride = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    strides[static_cast<size_t>(*dim)] = stride;
    stride *= shape[static_cast<size_t>(*dim)];
  }
  return strides;
}

Dims layout_strides(const Dims& shape, Layout layout) {
  if (layout == Layout::nchw) return dense_strides(shape, {0, 1, 2, 3});
  return dense_strides(shape, {0, 2, 3, 1});
}

Element element_of(DType dtype) { return static_cast<Element>(dtype); }

double rounded(Element element, double value) {
  double result = 0;
  with_element(element, [&](auto type) { result = to_double(from_double<decltype(type)>(value)); });
  return result;
}

Memory::Memory(Element element, const Dims& shape, const Dims& strides, Placement placement)
    : element_(element),
      shape_(shape),
      strides_(strides),
      front_(kGuardBytes + (placement == Placement::aligned ? 0 : size_of(element))),
      size_(static_cast<size_t>(element_count(shape)) * size_of(element)) {
#if defined(__SANITIZE_ADDRESS__)
  back_ = 0;
#else
  back_ = kGuardBytes;
#endif
  bytes_.reset(new unsigned char[front_ + size_ + back_]);
  std::memset(bytes_.get(), kGuard, front_ + size_ + back_);
  std::memset(bytes_.get() + front_, 0xff, size_);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(bytes_.get(), kGuardBytes);
#endif
}

Memory::Memory(Element element, const Tensor& tensor, const Dims& strides, Placement placement)
    : Memory(element, tensor.shape, strides, placement) {
  with_element(element_, [&](auto type) {
    using T = decltype(type);
    for_each_element(shape_, strides_,
                     [&](int64_t i, int64_t at) { data<T>()[at] = from_double<T>(tensor[i]); });
  });
}

Memory::~Memory() {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(bytes_.get(), kGuardBytes);
#endif
}

Tensor Memory::read() const {
  Tensor tensor(shape_);
  with_element(element_, [&](auto type) {
    using T = decltype(type);
    for_each_element(shape_, strides_,
                     [&](int64_t i, int64_t at) { tensor[i] = to_double(data<const T>()[at]); });
  });
  return tensor;
}

bool Memory::guards_intact() const {
#if defined(__SANITIZE_ADDRESS__)
  const size_t first = kGuardBytes;  // the sanitizer watches the rest
#else
  const size_t first = 0;
#endif
  for (size_t i = first; i < front_ + size_ + back_; ++i) {
    if (i == front_) i += size_;
    if (i < front_ + size_ + back_ && bytes_[i] != kGuard) return false;
  }
  return true;
}

cnnkernels::ThreadPool thread_pool(int threads) {
  switch (threads) {
    case 1:
      return {&run_on_threads<1>, 1};
    case 2:
      return {&run_on_threads<2>, 2};
    default:
      return {&run_on_threads<3>, 3};
  }
}

void set_context(const std::string& context) { current_context = context; }

void expect(bool condition, const std::string& what) {
  ++check_count;
  if (condition) return;
  if (++failure_count > kShownFailures) return;
  std::printf("FAILED %s\n  %s\n", current_context.c_str(), what.c_str());
}

void expect_holds(const Memory& memory, const Tensor& expected, const std::string& what) {
  expect(memory.guards_intact(), what + ": written outside of the buffer");
  const Tensor actual = memory.read();
  int64_t wrong = 0;
  std::ostringstream message;
  message << what << ": ";
  for_each_element(expected.shape, dense_strides(expected.shape, {0, 1, 2, 3}),
                   [&](int64_t i, int64_t) {
                     const double value = rounded(memory.element(), expected[i]);
                     if (actual[i] == value || (std::isnan(actual[i]) && std::isnan(value))) return;
                     if (wrong++ == 0) {
                       message << "element " << i << " is " << actual[i] << ", not " << value;
                     }
                   });
  message << "; " << wrong << " of " << element_count(expected.shape) << " are wrong";
  expect(wrong == 0, message.str());
}

int64_t failures() { return failure_count; }

int report() {
  std::printf("checks: %lld\nfailures: %lld\n", static_cast<long long>(check_count),
              static_cast<long long>(failure_count));
  return failure_count == 0 ? 0 : 1;
}

}  // namespace kernel_tests
