// The emulator's own tests: what its operations give, and what it refuses.
//
//   usage: PROGRAM
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "block_sum.cuh"
#include "kernels/cuda/hopper.cuh"
#include "matrix_product.cuh"
#include "schedules.h"
#include "support.h"

namespace cuda_kernel_tests {
namespace {

using kernel_tests::expect;
using kernel_tests::Random;
using kernel_tests::set_context;

void run(unsigned threads, const std::function<void()>& kernel, unsigned blocks = 1,
         size_t dynamic_shared_bytes = 0) {
  cuda_emulator::launch(dim3(blocks), dim3(threads), dynamic_shared_bytes, nullptr, kernel);
}

// That the kernel fails, and that the message has these words.
void expect_error(const std::string& words, unsigned threads, const std::function<void()>& kernel,
                  size_t dynamic_shared_bytes = 0) {
  std::string message = "(none)";
  try {
    run(threads, kernel, 1, dynamic_shared_bytes);
  } catch (const cuda_emulator::Error& error) {
    message = error.what();
  }
  expect(message.find(words) != std::string::npos, "an error with '" + words + "', not " + message);
}

void check_indices() {
  set_context("indices");
  std::vector<int> seen(2 * 3 * 2 * 4 * 2 * 2);
  cuda_emulator::launch(dim3(2, 3, 2), dim3(4, 2, 2), 0, nullptr, [&] {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    ++seen[block * 16 + thread];
  });
  for (const int times : seen) expect(times == 1, "every thread of every block runs once");
}

void check_shuffles() {
  set_context("shuffles");
  run(64, [&] {
    const int lane = static_cast<int>(threadIdx.x % 32), all = static_cast<int>(threadIdx.x);
    expect(__shfl_sync(kAllLanes, all, 5) == all - lane + 5, "__shfl_sync");
    expect(__shfl_sync(kAllLanes, lane, 3, 8) == lane / 8 * 8 + 3, "__shfl_sync of width 8");
    expect(__shfl_up_sync(kAllLanes, lane, 3) == (lane < 3 ? lane : lane - 3), "__shfl_up_sync");
    expect(__shfl_down_sync(kAllLanes, lane, 3, 16) == (lane % 16 > 12 ? lane : lane + 3),
           "__shfl_down_sync of width 16");
    expect(__shfl_xor_sync(kAllLanes, lane, 17) == (lane ^ 17), "__shfl_xor_sync");
    expect(__shfl_xor_sync(kAllLanes, lane, 16, 16) == (lane < 16 ? lane : lane - 16),
           "__shfl_xor_sync reads earlier groups, and no later ones");
    expect(__shfl_up_sync(kAllLanes, lane, 3, 8) == (lane % 8 < 3 ? lane : lane - 3),
           "__shfl_up_sync of width 8");
    expect(__shfl_xor_sync(kAllLanes, lane * 1.5, 1) == (lane ^ 1) * 1.5, "a shuffle of doubles");
    if (lane < 8) {
      expect(__shfl_xor_sync(0xffu, lane, 4) == (lane ^ 4), "a shuffle of eight lanes");
      expect(std::isnan(__shfl_sync(0xffu, 1.0f, 9)), "a lane outside of the mask has nothing");
    }
    expect(__ballot_sync(kAllLanes, lane % 3 == 0) == 0x49249249u, "__ballot_sync");
    expect(__any_sync(kAllLanes, lane == 7) == 1, "__any_sync");
    expect(__any_sync(kAllLanes, 0) == 0, "__any_sync of nothing");
    expect(__all_sync(kAllLanes, 1) == 1, "__all_sync");
    expect(__all_sync(kAllLanes, lane != 7) == 0, "__all_sync but for one");
    __syncwarp();
  });
  expect_error("which its mask leaves out", 32, [] { __shfl_sync(0x7fffffffu, 0, 0); });
  expect_error("waits for ever", 32, [] {
    if (threadIdx.x != 9) __shfl_sync(kAllLanes, 0, 0);
  });
  expect_error("waits for ever", 32, [] {
    if (threadIdx.x < 16) {
      __shfl_sync(kAllLanes, 0, 0);
    } else {
      __shfl_sync(kAllLanes, 0, 1);  // another place
    }
  });
  expect_error("waits for ever", 24, [] { __ballot_sync(kAllLanes, 1); });  // eight lanes too few
  expect_error("of width 12", 32, [] { __shfl_sync(kAllLanes, 0, 0, 12); });
}

void check_barriers() {
  set_context("barriers");
  std::vector<int> order;
  run(96, [&] {
    order.push_back(1);
    __syncthreads();
    order.push_back(2);
  });
  expect(std::is_sorted(order.begin(), order.end()) && order.size() == 192, "a barrier holds all");
  expect_error("exited", 64, [] {
    if (threadIdx.x == 63) return;
    __syncthreads();
  });
  expect_error("is divided at __syncthreads", 64, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  expect_error("waits for ever", 64, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncwarp(threadIdx.x == 40 ? 0x100u : 0xffffffffu);
    }
  });
}

void check_shared_memory() {
  set_context("shared memory");
  for (int block = 0; block < 2; ++block) {
    run(
        33,
        [] {
          CNNK_SHARED(float, first, 40);
          CNNK_SHARED(double, second, 3);
          CNNK_DYNAMIC_SHARED(float, third);
          if (threadIdx.x == 0) {
            for (const float value : first) expect(std::isnan(value), "it begins as NaN");
            for (const double value : second) expect(std::isnan(value), "it begins as NaN");
            expect(std::isnan(third[24]), "dynamic memory begins as NaN");
            second[2] = 7;
          }
          __syncthreads();
          first[threadIdx.x] = static_cast<float>(threadIdx.x);
          __syncthreads();
          expect(first[(threadIdx.x + 1) % 33] == static_cast<float>((threadIdx.x + 1) % 33),
                 "threads share it");
          expect(second[2] == 7, "arrays are apart");
        },
        2, 100);
  }
  expect_error("bytes of static shared memory", 1, [] {
    CNNK_SHARED(char, large, 48 * 1024 + 1);
    large[0] = 0;
  });
  expect_error("dynamic shared memory", 1, [] {
    CNNK_DYNAMIC_SHARED(float, none);
    none[0] = 0;
  });
  expect_error("cannot be launched", 1, [] {}, 228 * 1024);
  expect_error("cannot be launched", 1025, [] {});
  expect_error("cannot be launched", 0, [] {});
}

// A template's array is another one for each type, and so are two on a line.
template <class T>
T* shared_of_type() {
  CNNK_SHARED(T, first, 4);
  CNNK_SHARED(T, second, 4);
  expect(&first[0] != &second[0], "arrays on one line are apart");
  return first;
}

void check_shared_templates() {
  set_context("shared memory of templates");
  run(1, [] {
    float* const floats = shared_of_type<float>();
    expect(static_cast<void*>(floats) != shared_of_type<double>(),
           "types have arrays of their own");
    expect(floats == shared_of_type<float>(), "a place has one array");
  });
}

void check_accesses() {
  set_context("accesses");
  alignas(16) float numbers[8] = {};
  expect_error("an access of 16 bytes", 1, [&] { CNNK_CHECK_ALIGNMENT(numbers + 1, 16); });
  run(1, [&] { CNNK_CHECK_ALIGNMENT(numbers + 4, 16); });
  int total = 0, most = 0, first = -1;
  float sum = 0;
  run(70, [&] {
    const int thread = static_cast<int>(threadIdx.x);
    atomicAdd(&total, thread);
    atomicAdd(&sum, 0.5f);
    atomicMax(&most, thread);
    atomicCAS(&first, -1, thread);
  });
  expect(total == 69 * 35 && sum == 35 && most == 69 && first >= 0, "atomics");
}

void check_asynchronous_copies() {
  set_context("asynchronous copies");
  alignas(16) const float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  run(1, [&] {
    CNNK_SHARED(float, target, 8);
    target[0] = 9;
    cp_async<16>(target, source);
    cp_async_commit();
    cp_async<16>(target + 4, source + 4, 8);
    cp_async_commit();
    expect(std::isnan(target[0]), "nothing is there before the wait");
    cp_async_wait<1>();
    expect(target[0] == 1 && target[3] == 4, "the first group is there");
    expect(std::isnan(target[4]), "the second group is not");
    cp_async_wait<0>();
    expect(target[4] == 5 && target[5] == 6 && target[6] == 0 && target[7] == 0,
           "bytes that are not valid are zero");
  });
  expect_error("outside of shared memory", 1, [&] {
    float own[4];
    cp_async<4>(own, source);
  });
  expect_error("an access of 16 bytes", 1, [&] {
    CNNK_SHARED(float, target, 8);
    cp_async<16>(target, source + 1);
  });
  expect_error("outside of shared memory", 1, [&] {
    CNNK_SHARED(float, target, 6);
    cp_async<16>(target + 4, source);
  });
  expect_error("ldmatrix.x4 outside of shared memory", 32, [] {
    uint32_t r[4];
    alignas(16) const uint16_t row[8] = {};
    ldmatrix_x4(r, row);
  });
}

void check_row_sums(Random& random) {
  const int rows = static_cast<int>(random.between(1, 4));
  const int count = static_cast<int>(random.between(1, 700));
  std::vector<float> numbers(static_cast<size_t>(rows * count));
  for (float& number : numbers) number = static_cast<float>(random.between(-8, 8));
  for_each_schedule("row_sums of " + std::to_string(count), [&] {
    std::vector<float> sums(static_cast<size_t>(rows), std::nanf(""));
    LaunchGrid grid;
    grid.block_x = kSumThreads;
    launch(row_sums_kernel, grid, 0, nullptr, numbers.data(), rows, count, sums.data());
    for (int row = 0; row < rows; ++row) {
      float expected = 0;
      for (int i = 0; i < count; ++i) expected += numbers[static_cast<size_t>(row * count + i)];
      expect(sums[static_cast<size_t>(row)] == expected, "the sum of a row");
    }
  });
}

// Small integers, whose products and sums are exact in every type. Memory ends with the last one.
template <class T>
struct Matrix {
  int rows, columns;
  std::vector<double> values;
  std::unique_ptr<T[]> elements;

  Matrix(Random& random, int rows_, int columns_)
      : rows(rows_),
        columns(columns_),
        values(static_cast<size_t>(rows_ * columns_)),
        elements(new T[values.size()]) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<double>(random.between(-8, 8));
      elements[i] = narrow<T>(static_cast<float>(values[i]));
    }
  }
  double at(int row, int column) const {
    return values[static_cast<size_t>(row * columns + column)];
  }
};

template <class T>
void check_product(const char* name, Random& random, int m, int n, int k, const LaunchGrid& grid,
                   void (*kernel)(const T*, const T*, float*, int, int, int)) {
  const Matrix<T> a(random, m, k), b(random, k, n);
  const std::string context = std::string(name) + " " + std::to_string(m) + "x" +
                              std::to_string(n) + "x" + std::to_string(k);
  for_each_schedule(context, [&] {
    std::vector<float> c(static_cast<size_t>(m * n), std::nanf(""));
    launch(kernel, grid, 0, nullptr, a.elements.get(), b.elements.get(), c.data(), m, n, k);
    bool equal = true;
    for (int row = 0; row < m; ++row) {
      for (int column = 0; column < n; ++column) {
        double expected = 0;
        for (int d = 0; d < k; ++d) expected += a.at(row, d) * b.at(d, column);
        equal = equal && c[static_cast<size_t>(row * n + column)] == expected;
      }
    }
    expect(equal, "a product of matrices");
  });
}

void check_products(Random& random) {
  const int m = static_cast<int>(random.between(1, 100));
  const int n = static_cast<int>(8 * random.between(1, 13));
  const int k = static_cast<int>(8 * random.between(1, 20));
  LaunchGrid grid;
  grid.x = static_cast<unsigned>(ceil_div(m, kTile));
  grid.y = static_cast<unsigned>(ceil_div(n, kTile));
  grid.block_x = kProductThreads;
  check_product("float16", random, m, n, k, grid, matrix_product_kernel<float16>);
  check_product("bfloat16", random, m, n, k, grid, matrix_product_kernel<bfloat16>);
  const int columns = static_cast<int>(random.between(1, 20));
  const int depth = static_cast<int>(random.between(1, 30));
  LaunchGrid small;
  small.x = static_cast<unsigned>(ceil_div(m, 16));
  small.y = static_cast<unsigned>(ceil_div(columns, 8));
  small.block_x = 32;
  check_product("tf32", random, m, columns, depth, small, matrix_product_tf32_kernel);
}

// That TF32 leaves the lower bits out, as the hardware does.
void check_tf32() {
  set_context("tf32");
  const float a = 1 + std::ldexp(1.0f, -10) + std::ldexp(1.0f, -11), b = 1;
  float c = 0;
  LaunchGrid grid;
  grid.block_x = 32;
  launch(matrix_product_tf32_kernel, grid, 0, nullptr, &a, &b, &c, 1, 1, 1);
  expect(c == 1 + std::ldexp(1.0f, -10), "ten bits of a mantissa take part");
}

// A map of `rows` rows of `columns` elements of 16 bits, or an error.
CUtensorMap map_of(const uint16_t* elements, int columns, int rows, int box_columns, int box_rows,
                   bool swizzled, int planes = 1) {
  const auto width = static_cast<uint64_t>(columns), height = static_cast<uint64_t>(rows);
  CUtensorMap map;
  const Error error = encode_tensor_map(
      {4,
       elements,
       {width, height, static_cast<uint64_t>(planes), 1},
       {2 * width, 2 * width * height, 2 * width * height * static_cast<uint64_t>(planes)},
       {static_cast<uint32_t>(box_columns), static_cast<uint32_t>(box_rows), 1, 1},
       swizzled},
      &map);
  expect(error == kSuccess, "a map of a tensor");
  return map;
}

// Dynamic shared memory at the first multiple of 1024 of its addresses; launches ask for so many
// bytes more.
constexpr size_t kAlignmentBytes = 1024;
unsigned char* aligned_shared() {
  CNNK_DYNAMIC_SHARED(unsigned char, shared);
  return shared + (-shared_address(shared) & (kSwizzleBytes - 1));
}

void init_one(Barrier& barrier, int arrivals) {
  if (threadIdx.x == 0) {
    init_barrier(barrier, arrivals);
    publish_barriers();
  }
  __syncthreads();
}

void check_barriers_in_shared_memory() {
  std::vector<int> order;
  for_each_schedule("barriers in shared memory", [&] {
    order.clear();
    run(96, [&] {
      CNNK_SHARED(Barrier, barriers, 1);
      init_one(barriers[0], 32);
      for (int phase = 0; phase < 3; ++phase) {
        if (threadIdx.x < 32) {
          order.push_back(2 * phase);
          arrive(barriers[0]);
        }
        wait(barriers[0], phase % 2);
        order.push_back(2 * phase + 1);
        __syncthreads();
      }
      wait(barriers[0], 0);  // the phase before the one that goes on
    });
    expect(std::is_sorted(order.begin(), order.end()), "all wait for all arrivals of a phase");
  });
  set_context("errors of barriers in shared memory");
  expect_error("that nobody has initialized", 1, [] {
    CNNK_SHARED(Barrier, barriers, 1);
    arrive(barriers[0]);
  });
  expect_error("initialized twice", 1, [] {
    CNNK_SHARED(Barrier, barriers, 1);
    init_barrier(barriers[0], 1);
    init_barrier(barriers[0], 1);
  });
  expect_error("outside of shared memory", 1, [] {
    Barrier own;
    init_barrier(own, 1);
  });
  expect_error("of no arrivals", 1, [] {
    CNNK_SHARED(Barrier, barriers, 1);
    init_barrier(barriers[0], 0);
  });
  expect_error("waits for ever: 1 threads at a barrier in shared memory", 1, [] {
    CNNK_SHARED(Barrier, barriers, 1);
    init_barrier(barriers[0], 2);
    arrive(barriers[0]);
    wait(barriers[0], 0);
  });
  expect_error("waits for ever", 1, [] {  // for bytes that no copy brings
    CNNK_SHARED(Barrier, barriers, 1);
    init_barrier(barriers[0], 1);
    arrive_expecting(barriers[0], 16);
    wait(barriers[0], 0);
  });
  expect_error("more arrivals than the phase", 1, [] {
    CNNK_SHARED(Barrier, barriers, 1);
    init_barrier(barriers[0], 1);
    arrive_expecting(barriers[0], 16);
    arrive(barriers[0]);
  });
}

void check_box_copies() {
  constexpr int kColumns = 16, kRows = 5, kPlanes = 2;
  alignas(16) uint16_t elements[kPlanes * kRows * kColumns];
  for (size_t i = 0; i < std::size(elements); ++i) elements[i] = static_cast<uint16_t>(i + 1);
  const CUtensorMap map = map_of(elements, kColumns, kRows, 8, 4, false, kPlanes);
  constexpr int kBoxBytes = 8 * 4 * 2;
  for_each_schedule("copies of boxes", [&] {
    run(
        1,
        [&] {
          CNNK_SHARED(Barrier, barriers, 1);
          auto* const target = reinterpret_cast<uint16_t*>(aligned_shared());
          init_one(barriers[0], 1);
          target[0] = 7;
          arrive_expecting(barriers[0], 2 * kBoxBytes);
          copy_box(target, map, barriers[0], {-3, 3, 1, 0});
          copy_box(target + 64, map, barriers[0], {8, -1, 2, 0});
          expect(target[0] == 0xffff, "nothing is there before the wait");
          wait(barriers[0], 0);
          bool equal = true;
          for (int row = 0; row < 4; ++row) {
            for (int column = 0; column < 8; ++column) {
              const bool inside = row + 3 < kRows && column - 3 >= 0;
              const int place = (kRows + row + 3) * kColumns + column - 3;
              equal = equal && target[row * 8 + column] == (inside ? place + 1 : 0);
              equal = equal && target[64 + row * 8 + column] == 0;  // a plane past the last
            }
          }
          expect(equal, "a box, and zeros outside of the tensor");
        },
        1, kAlignmentBytes + 192);
  });
  set_context("errors of copies of boxes");
  const auto expect_box_error = [&](const char* words, auto&& kernel) {
    expect_error(
        words, 1,
        [&] {
          CNNK_SHARED(Barrier, barriers, 1);
          init_barrier(barriers[0], 1);
          kernel(barriers[0], aligned_shared());
        },
        kAlignmentBytes + 192);
  };
  const int at[4] = {0, 0, 0, 0};
  const CUtensorMap large = map_of(elements, kColumns, kRows, 8, 8, false, kPlanes);
  expect_box_error("was not published", [&](Barrier& barrier, unsigned char* target) {
    copy_box(target, map, barrier, at);
  });
  expect_box_error("16 bytes past a multiple of 128", [&](Barrier& barrier, unsigned char* target) {
    publish_barriers();
    copy_box(target + 16, map, barrier, at);
  });
  expect_box_error("not in dynamic shared memory", [&](Barrier& barrier, unsigned char* target) {
    publish_barriers();
    copy_box(target + 128, large, barrier, at);
  });
  expect_box_error("of another rank", [&](Barrier& barrier, unsigned char* target) {
    publish_barriers();
    copy_box(target, map, barrier, {0, 0, 0, 0, 0});
  });
  expect_box_error("ends before its copies do", [&](Barrier& barrier, unsigned char* target) {
    publish_barriers();
    arrive_expecting(barrier, kBoxBytes);
    copy_box(target, map, barrier, at);
  });
  expect_box_error("brings 64 bytes where a barrier expects 32",
                   [&](Barrier& barrier, unsigned char* target) {
                     publish_barriers();
                     arrive_expecting(barrier, kBoxBytes / 2);
                     copy_box(target, map, barrier, at);
                     wait(barrier, 0);
                   });
  set_context("maps of tensors");
  CUtensorMap refused;
  const auto refuses = [&](TensorBoxes boxes, const char* why) {
    expect(encode_tensor_map(boxes, &refused) != kSuccess, why);
  };
  refuses({2, elements, {16, 4}, {32}, {4, 4}, false}, "rows of 8 bytes");
  refuses({2, elements, {16, 4}, {32}, {8, 257}, false}, "a box of 257 rows");
  refuses({2, elements, {16, 4}, {24}, {8, 4}, false}, "a stride of 24 bytes");
  refuses({2, elements, {16, 0}, {32}, {8, 4}, false}, "no rows");
  refuses({2, elements, {72, 4}, {144}, {72, 4}, true}, "swizzled rows of 144 bytes");
  refuses({2, elements + 4, {16, 4}, {32}, {8, 4}, false}, "elements at 8 bytes");
}

// A product of 64 rows of A, whose rows of eight lie some bytes apart, and kColumns swizzled rows
// of B; both 64 deep.
constexpr int kProductRows = 64, kProductDepth = 64;
constexpr int kCorePitch = 128 + 48, kPlaneBytes = 8 * kCorePitch + 16;
template <class T, int kColumns>
void check_warpgroup_product(const char* name, Random& random) {
  std::vector<T> a(kProductRows * kProductDepth);
  auto b = std::make_unique<T[]>(kColumns * kProductDepth);
  for (T& value : a) value = narrow<T>(static_cast<float>(random.between(-8, 8)));
  for (int i = 0; i < kColumns * kProductDepth; ++i) {
    b[static_cast<size_t>(i)] = narrow<T>(static_cast<float>(random.between(-8, 8)));
  }
  const CUtensorMap map = map_of(reinterpret_cast<const uint16_t*>(b.get()), kProductDepth,
                                 kColumns, kProductDepth, kColumns, true);
  constexpr int kBBytes = kColumns * kProductDepth * 2;
  std::vector<float> c(kProductRows * kColumns);
  for_each_schedule(name, [&] {
    run(
        128,
        [&] {
          CNNK_SHARED(Barrier, barriers, 1);
          unsigned char* const of_b = aligned_shared();
          unsigned char* const of_a = of_b + kBBytes + 16;  // no multiple of 128
          const int thread = static_cast<int>(threadIdx.x);
          for (int i = thread; i < kProductRows * kProductDepth; i += 128) {
            const int row = i / kProductDepth, k = i % kProductDepth;
            std::memcpy(
                of_a + row / 8 * kCorePitch + row % 8 * 16 + k / 8 * kPlaneBytes + k % 8 * 2,
                &a[static_cast<size_t>(i)], 2);
          }
          init_one(barriers[0], 1);
          if (thread == 0) {
            arrive_expecting(barriers[0], kBBytes);
            copy_box(of_b, map, barriers[0], {0, 0, 0, 0});
          }
          wait(barriers[0], 0);
          const uint64_t rows =
              matrix_descriptor(shared_address(of_a), kPlaneBytes, kCorePitch, false);
          const uint64_t columns = matrix_descriptor(shared_address(of_b), 16, 1024, true);
          float sums[kColumns / 2] = {};
          wgmma_fence();
          for (int k = 0; k < kProductDepth / 16; ++k) {
            wgmma_m64k16<T>(sums, advance_descriptor(rows, k * 2 * kPlaneBytes),
                            advance_descriptor(columns, k * 32));
            if (k == 1) wgmma_commit();
          }
          wgmma_commit();
          wgmma_wait<1>();
          expect(std::isnan(sums[3]), "sums are not there before the last wait");
          wgmma_finish(sums);
          for (int i = 0; i < kColumns / 2; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
            const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            c[static_cast<size_t>(row * kColumns + column)] = sums[i];
          }
        },
        1, kAlignmentBytes + kBBytes + 16 + kProductDepth / 8 * kPlaneBytes);
    bool equal = true;
    for (int row = 0; row < kProductRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        float expected = 0;
        for (int k = 0; k < kProductDepth; ++k) {
          expected += widen(a[static_cast<size_t>(row * kProductDepth + k)]) *
                      widen(b[static_cast<size_t>(column * kProductDepth + k)]);
        }
        equal = equal && c[static_cast<size_t>(row * kColumns + column)] == expected;
      }
    }
    expect(equal, "a product of a warpgroup");
  });
}

void check_warpgroup_errors() {
  set_context("errors of warpgroup products");
  constexpr size_t kBytes = kAlignmentBytes + 16384;
  // Of 64 rows, in zeros.
  const auto expect_product_error = [&](const char* words, auto&& kernel) {
    expect_error(
        words, 128,
        [&] {
          CNNK_DYNAMIC_SHARED(unsigned char, shared);
          if (threadIdx.x == 0) std::memset(shared, 0, kBytes);
          __syncthreads();
          float sums[32] = {};
          kernel(sums, matrix_descriptor(shared_address(aligned_shared()), 1024, 128, false));
        },
        kBytes);
  };
  using Sums = float (&)[32];
  expect_product_error("without a wgmma.fence", [](Sums sums, uint64_t matrix) {
    wgmma_m64k16<float16>(sums, matrix, matrix);
  });
  expect_product_error("without a wgmma.fence", [](Sums sums, uint64_t matrix) {
    wgmma_fence();
    wgmma_m64k16<float16>(sums, matrix, matrix);
    wgmma_commit();
    wgmma_finish(sums);
    sums[0] = 1;
    wgmma_m64k16<float16>(sums, matrix, matrix);
  });
  expect_product_error("it ends before its products do", [](Sums sums, uint64_t matrix) {
    wgmma_fence();
    wgmma_m64k16<float16>(sums, matrix, matrix);
    wgmma_commit();
  });
  expect_product_error("lanes have different descriptors", [](Sums sums, uint64_t matrix) {
    wgmma_fence();
    wgmma_m64k16<float16>(sums, advance_descriptor(matrix, threadIdx.x == 5 ? 16 : 0), matrix);
  });
  expect_product_error("waits for ever", [](Sums sums, uint64_t matrix) {
    wgmma_fence();
    if (threadIdx.x != 5) wgmma_m64k16<float16>(sums, matrix, matrix);
    wgmma_commit();
    wgmma_finish(sums);
  });
  expect_product_error("threads of a warpgroup differ", [](Sums sums, uint64_t matrix) {
    wgmma_fence();
    wgmma_m64k16<float16>(sums, matrix, advance_descriptor(matrix, threadIdx.x < 32 ? 16 : 0));
    wgmma_commit();
    wgmma_finish(sums);
  });
  expect_product_error("not in dynamic shared memory", [](Sums sums, uint64_t matrix) {
    wgmma_fence();
    wgmma_m64k16<float16>(sums, advance_descriptor(matrix, 16384), matrix);
  });
  expect_product_error("a descriptor of a matrix", [](Sums sums, uint64_t matrix) {
    wgmma_fence();
    wgmma_m64k16<float16>(sums, matrix | uint64_t{1} << 49, matrix);
  });
  alignas(16) const uint16_t elements[64 * 8] = {};
  const CUtensorMap map = map_of(elements, 8, 64, 8, 64, false);
  expect_product_error("a product of what a copy has still to bring",
                       [&](Sums sums, uint64_t matrix) {
                         CNNK_SHARED(Barrier, barriers, 1);
                         init_one(barriers[0], 1);
                         if (threadIdx.x == 0) {
                           arrive_expecting(barriers[0], 1024);
                           copy_box(aligned_shared(), map, barriers[0], {0, 0, 0, 0});
                         }
                         __syncthreads();
                         wgmma_fence();
                         wgmma_m64k16<float16>(sums, matrix, matrix);
                       });
}

// More dynamic shared memory than every architecture has is for those who ask.
__global__ void large_kernel() {
  CNNK_DYNAMIC_SHARED(char, shared);
  shared[100 * 1024 - 1] = 1;
}
void check_large_shared_memory() {
  set_context("large shared memory");
  const LaunchGrid one;
  expect(launch(large_kernel, one, 100 * 1024, nullptr) == kSuccess, "a launch asks for it");
  expect(launch(large_kernel, one, 228 * 1024, nullptr) != kSuccess, "there is no more");
  expect_error("cannot be launched", 1, [] {}, 100 * 1024);
}

}  // namespace
}  // namespace cuda_kernel_tests

int main() {
  using namespace cuda_kernel_tests;
  try {
    check_indices();
    check_shuffles();
    check_barriers();
    check_shared_memory();
    check_shared_templates();
    check_accesses();
    check_asynchronous_copies();
    check_tf32();
    check_large_shared_memory();
    check_barriers_in_shared_memory();
    check_box_copies();
    check_warpgroup_errors();
    Random random(1);
    check_warpgroup_product<float16, 64>("wgmma of float16", random);
    check_warpgroup_product<bfloat16, 128>("wgmma of bfloat16", random);
    for (int i = 0; i < 5; ++i) {
      check_row_sums(random);
      check_products(random);
    }
  } catch (const cuda_emulator::Error& error) {
    expect(false, error.what());
  }
  return kernel_tests::report();
}
