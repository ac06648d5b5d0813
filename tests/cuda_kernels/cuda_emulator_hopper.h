// The part of the emulator for kernels/cuda/hopper.cuh: barriers in shared memory, copies of tensor
// boxes, and products of warpgroups. cuda_emulator.h includes it.
//
// A copy poisons its target when it begins. It is done, and its barrier told, only when no thread
// of the block can go on without it; which of several comes first depends on the schedule. A
// product is computed where its thread waits for it, from what shared memory holds by then, so that
// a stage that is filled again too early shows. Until then its sums are NaN.
#pragma once

// --- The driver's part: maps of tensors --------------------------------------------------------

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// For kernels it is opaque.
struct CUtensorMap {
  const char* elements;
  uint64_t sizes[5];
  uint64_t strides[5];  // in bytes, of all dimensions
  uint32_t box[5];
  uint32_t rank;
  bool swizzled;
};
static_assert(sizeof(CUtensorMap) <= 128, "no larger than CUDA's");

// Of 16-bit elements, which are all that is copied here. That strides grow from dimension to
// dimension is how CUDA's documentation makes them, not what it asks for.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* elements, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  constexpr uint64_t kElementBytes = 2, kSwizzleRow = 128;
  bool valid = rank >= 1 && rank <= 5 && reinterpret_cast<uintptr_t>(elements) % 16 == 0;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  std::memset(static_cast<void*>(map), 0, sizeof *map);
  *map = {static_cast<const char*>(elements),   {}, {kElementBytes}, {}, rank,
          swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  for (uint32_t i = 0; i < rank; ++i) {
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    valid = valid && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 &&
            element_strides[i] == 1;
    if (i == 0) continue;
    map->strides[i] = strides[i - 1];
    valid = valid && strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40;
  }
  const uint64_t row = box[0] * kElementBytes;
  valid = valid && row % 16 == 0 && (!map->swizzled || row <= kSwizzleRow);
  return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

#define CUDART_VERSION 13000
enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1
};
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// --- The instructions of kernels/cuda/hopper.cuh -----------------------------------------------

namespace cnnkernels::cuda {

struct Barrier;

inline uint32_t shared_address(const void* pointer) {
  return cuda_emulator::block().shared_address(pointer);
}

namespace emulated {

inline cuda_emulator::SharedBarrier& barrier_of(const Barrier& barrier) {
  const auto found = block().barriers.find(&barrier);
  if (found == block().barriers.end()) block().fail("a barrier that nobody has initialized");
  return found->second;
}

inline void arrive(cuda_emulator::SharedBarrier& barrier) {
  if (barrier.left == 0) block().fail("more arrivals than the phase of a barrier counts");
  --barrier.left;
  barrier.complete();
}

constexpr uint32_t kPatternBytes = 1024;
// Chunks of 16 bytes of a row of 128 bytes, by the row's number in a pattern of eight.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

template <int kRank>
void copy_box(void* target, const CUtensorMap& map, const Barrier& barrier, const int (&at)[kRank],
              cuda_emulator::Site site) {
  auto& own = barrier_of(barrier);
  if (!own.published) block().fail("a copy for a barrier that was not published");
  if (map.rank != kRank) block().fail("a copy of a box of another rank");
  const uint32_t address = block().shared_address(target);
  const uint32_t alignment = map.swizzled ? kPatternBytes : 128;
  if (address % alignment != 0) {
    block().fail("a box begins " + std::to_string(address % alignment) +
                 " bytes past a multiple of " + std::to_string(alignment) + ", " + site.text());
  }
  size_t rows = 1;
  for (uint32_t i = 1; i < map.rank; ++i) rows *= map.box[i];
  const size_t row_bytes = map.box[0] * size_t{2}, bytes = rows * row_bytes;
  if (map.swizzled && row_bytes != 128) block().fail("swizzled rows of less than 128 bytes");
  char* const first = block().shared_pointer(address, bytes);
  std::memset(first, 0xff, bytes);  // what is read before it is there, or was to be read still
  std::vector<int64_t> from(at, at + kRank);
  const auto finish = [=] {
    for (size_t row = 0; row < rows; ++row) {
      bool inside = true;
      const char* source = map.elements;
      size_t rest = row;
      for (uint32_t i = 1; i < map.rank; ++i) {
        const int64_t place = from[i] + static_cast<int64_t>(rest % map.box[i]);
        rest /= map.box[i];
        inside = inside && place >= 0 && place < static_cast<int64_t>(map.sizes[i]);
        source += place * static_cast<int64_t>(map.strides[i]);
      }
      for (uint32_t i = 0; i < map.box[0]; ++i) {
        const int64_t place = from[0] + i;
        const bool is_there = inside && place >= 0 && place < static_cast<int64_t>(map.sizes[0]);
        uint32_t to = address + static_cast<uint32_t>(row * row_bytes + i * 2);
        if (map.swizzled) to = swizzle(to);
        if (is_there) {
          std::memcpy(first + (to - address), source + place * 2, 2);
        } else {
          std::memset(first + (to - address), 0, 2);
        }
      }
    }
  };
  block().box_copies.push_back({first, bytes, &own, finish});
}

// A matrix as its descriptor says.
struct Matrix {
  uint32_t address, depth_bytes, row_bytes;
  bool swizzled;

  explicit Matrix(uint64_t descriptor)
      : address(field(descriptor)),
        depth_bytes(field(descriptor >> 16)),
        row_bytes(field(descriptor >> 32)),
        swizzled(descriptor >> 62 == 1) {
    constexpr uint64_t kUnused = uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{0xffff} << 46;
    if ((descriptor & kUnused) != 0 || descriptor >> 62 > 1) {
      block().fail("a descriptor of a matrix that is not plain, nor swizzled by 128 bytes");
    }
  }
  static uint32_t field(uint64_t bits) { return static_cast<uint32_t>(bits & 0x3fff) << 4; }

  // Of 16 bytes of depth, of which a product has two.
  uint32_t at(uint32_t row, uint32_t chunk) const {
    if (!swizzled) return address + row / 8 * row_bytes + row % 8 * 16 + chunk * depth_bytes;
    return swizzle(address + row / 8 * row_bytes + row % 8 * 128 + chunk * 16);
  }
  // That nothing is still on its way to where the matrix lies.
  void check(uint32_t rows) const {
    for (uint32_t row = 0; row < rows; row += 8) {
      for (uint32_t chunk = 0; chunk < 2; ++chunk) {
        const char* const core = block().shared_pointer(at(row, chunk), 16);
        for (const auto& copy : block().box_copies) {
          if (core >= copy.target && core < copy.target + copy.bytes) {
            block().fail("a product of what a copy has still to bring");
          }
        }
      }
    }
  }
  const uint16_t* elements(uint32_t row, uint32_t chunk) const {
    return reinterpret_cast<const uint16_t*>(block().shared_pointer(at(row, chunk), 16));
  }
};

// Adds to the sums of one thread.
template <class T, int kCount>
void add_products(const Matrix& a, const Matrix& b, unsigned thread, float* sums) {
  constexpr uint32_t kDepth = 16;
  const uint32_t lane = thread % 32, warp = thread / 32;
  const auto load = [](const Matrix& matrix, uint32_t row, float (&values)[kDepth]) {
    for (uint32_t k = 0; k < kDepth; ++k) {
      values[k] = widen(T{matrix.elements(row, k / 8)[k % 8]});
    }
  };
  float of_a[2][kDepth], of_b[kDepth];
  for (uint32_t half = 0; half < 2; ++half) load(a, 16 * warp + lane / 4 + 8 * half, of_a[half]);
  for (uint32_t j = 0; j < kCount / 2; ++j) {
    const uint32_t column = j / 2 * 8 + lane % 4 * 2 + j % 2;
    load(b, column, of_b);
    for (uint32_t half = 0; half < 2; ++half) {
      float& to = sums[j / 2 * 4 + half * 2 + j % 2];
      double sum = to;
      for (uint32_t k = 0; k < kDepth; ++k) sum += static_cast<double>(of_a[half][k]) * of_b[k];
      to = toward_zero(sum);
    }
  }
}

// All lanes of a warp are at the same instruction, with the same operands.
inline void aligned(const char* name, cuda_emulator::Site site, uint64_t a = 0, uint64_t b = 0) {
  const struct Operands {
    const char* name;
    cuda_emulator::Site site;
    uint64_t a, b;
  } operands = {name, site, a, b};
  // One reference, so that nothing is left on the heap by a thread that is never resumed.
  cuda_emulator::collective<int>(
      name, site, 0xffffffffu, operands, [&operands](const Collective::Lanes& lanes) {
        for (const Collective* const lane : lanes) {
          const auto& own = cuda_emulator::operand_of<Operands>(lane);
          if (own.a != operands.a || own.b != operands.b) {
            throw cuda_emulator::Error(std::string(operands.name) + " at " + operands.site.text() +
                                       ": lanes have different descriptors");
          }
        }
      });
}

template <class T, int kCount>
void wgmma(float (&sums)[kCount], uint64_t a, uint64_t b, cuda_emulator::Site site) {
  aligned("wgmma.mma_async", site, a, b);
  auto& thread = block().thread();
  const Matrix rows(a), columns(b);
  rows.check(64);
  columns.check(kCount * 2);
  auto& own = thread.sums;
  if (own.find(sums) == own.end()) {
    if (!thread.fenced) block().fail("a product without a wgmma.fence, " + site.text());
    own.emplace(sums, std::vector<float>(sums, sums + kCount));
  }
  std::fill(sums, sums + kCount, std::nanf(""));
  thread.product_trail =
      (thread.product_trail * 31 + a) * 31 + b * 31 + static_cast<uint64_t>(site.line);
  const unsigned in_group = (block().thread_number()) % 128;
  thread.products.push_back(
      {sums, [=](float* to) { add_products<T, kCount>(rows, columns, in_group, to); }});
}

// Computes the oldest groups until so many are left.
inline void wait_for_products(size_t left) {
  auto& thread = block().thread();
  while (thread.multiplying.size() > left) {
    for (const auto& product : thread.multiplying.front()) {
      product.add(thread.sums.at(product.sums).data());
    }
    thread.multiplying.pop_front();
  }
  // The sums of no product under way are the thread's again.
  for (auto sums = thread.sums.begin(); sums != thread.sums.end();) {
    const auto has = [&](const std::vector<cuda_emulator::Product>& products) {
      return std::any_of(products.begin(), products.end(),
                         [&](const auto& product) { return product.sums == sums->first; });
    };
    if (has(thread.products) ||
        std::any_of(thread.multiplying.begin(), thread.multiplying.end(), has)) {
      ++sums;
      continue;
    }
    std::copy(sums->second.begin(), sums->second.end(), sums->first);
    sums = thread.sums.erase(sums);
    thread.fenced = false;
  }
}

}  // namespace emulated

inline void init_barrier(Barrier& barrier, int arrivals) {
  using emulated::block;
  if (!block().holds_shared(&barrier, 8)) block().fail("a barrier outside of shared memory");
  if (arrivals < 1) block().fail("a barrier of no arrivals");
  const auto count = static_cast<unsigned>(arrivals);
  if (!block().barriers.try_emplace(&barrier, cuda_emulator::SharedBarrier{count, count}).second) {
    block().fail("a barrier that is initialized twice");
  }
}
inline void publish_barriers() {
  for (auto& [place, barrier] : emulated::block().barriers) barrier.published = true;
}
inline void arrive(Barrier& barrier) { emulated::arrive(emulated::barrier_of(barrier)); }
inline void arrive_expecting(Barrier& barrier, int bytes) {
  auto& own = emulated::barrier_of(barrier);
  own.bytes += bytes;
  emulated::arrive(own);
}
inline void wait(Barrier& barrier, int parity, CUDA_EMULATOR_SITE) {
  emulated::block().shared_barrier(emulated::barrier_of(barrier), static_cast<unsigned>(parity),
                                   {file, line});
}

template <int kRank>
void copy_box(void* target, const CUtensorMap& map, Barrier& barrier, const int (&at)[kRank],
              CUDA_EMULATOR_SITE) {
  emulated::copy_box<kRank>(target, map, barrier, at, {file, line});
}

inline void wgmma_fence(CUDA_EMULATOR_SITE) {
  emulated::aligned("wgmma.fence", {file, line});
  emulated::block().thread().fenced = true;
}
inline void wgmma_commit(CUDA_EMULATOR_SITE) {
  emulated::aligned("wgmma.commit_group", {file, line});
  auto& thread = emulated::block().thread();
  thread.multiplying.push_back(std::move(thread.products));
  thread.products.clear();
}
template <int kLeft>
void wgmma_wait(CUDA_EMULATOR_SITE) {
  emulated::aligned("wgmma.wait_group", {file, line});
  emulated::wait_for_products(kLeft);
}
template <int kCount>
void wgmma_finish(float (&)[kCount], CUDA_EMULATOR_SITE) {
  wgmma_wait<0>(file, line);
}
template <class T, size_t kCount>
void wgmma_m64k16(float (&sums)[kCount], uint64_t a, uint64_t b, CUDA_EMULATOR_SITE) {
  emulated::wgmma<T, static_cast<int>(kCount)>(sums, a, b, {file, line});
}

}  // namespace cnnkernels::cuda
