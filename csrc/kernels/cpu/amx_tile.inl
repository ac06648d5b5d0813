// The matrix tiles of AMX: eight registers of 16 rows by 64 bytes.
//
// A product adds to 16x16 floats the product of 16 rows of 32 bfloat16 and 16 rows of
// 16 pairs: c[i][j] += a[i][2q] * b[q][2j] + a[i][2q+1] * b[q][2j+1] over q. The
// processor sums the even and the odd products of the 16 q in two chains from zero,
// rounding to nearest, adds the two, and adds that to c; denormals count as zero. The
// emulation does the same in the same order (Intel's instruction set reference,
// TDPBF16PS).

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;              // bfloat16 in a row
constexpr int64_t kTileElements = 16 * 32;  // bfloat16 in a tile

#if defined(CNNK_EMULATE_AVX512)

inline thread_local uint32_t tile_registers[8][16][16];

struct TileScope {
  TileScope() { __builtin_memset(tile_registers, 0xff, sizeof tile_registers); }
};

template <int Tile>
void load_tile(const uint16_t* from, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy(tile_registers[Tile][row],
                     reinterpret_cast<const char*>(from) + row * row_bytes, 64);
  }
}

template <int Tile>
void clear_tile() {
  __builtin_memset(tile_registers[Tile], 0, sizeof tile_registers[Tile]);
}

template <int Tile>
void store_tile(float* to, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy(reinterpret_cast<char*>(to) + row * row_bytes, tile_registers[Tile][row], 64);
  }
}

template <int C, int A, int B>
void multiply_tiles() {
  const auto flushed = [](float value) {
    return value < 0x1p-126f && value > -0x1p-126f ? 0.0f : value;
  };
  const auto low = [](uint32_t pair) { return float_from_bits(pair << 16); };
  const auto high = [](uint32_t pair) { return float_from_bits(pair & 0xffff0000u); };
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float even = 0, odd = 0;
      for (int q = 0; q < 16; ++q) {
        const uint32_t a = tile_registers[A][i][q], b = tile_registers[B][q][j];
        even = flushed(__builtin_fmaf(flushed(low(a)), flushed(low(b)), even));
        odd = flushed(__builtin_fmaf(flushed(high(a)), flushed(high(b)), odd));
      }
      const float sum = flushed(float_from_bits(tile_registers[C][i][j]) + flushed(even + odd));
      tile_registers[C][i][j] = float_bits(sum);
    }
  }
}

#else

// The tiles' shape is state of a thread: set while this lives, and given back, so that
// the system need not save the tiles any more.
struct TileScope {
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    // GCC's intrinsic claims to read the first eight bytes only: the others must be there too.
    __asm__ volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The intrinsics want the register's number as a literal.
#define CNNK_FOR_TILE(Tile, CALL)     \
  do {                                \
    if constexpr (Tile == 0) CALL(0); \
    if constexpr (Tile == 1) CALL(1); \
    if constexpr (Tile == 2) CALL(2); \
    if constexpr (Tile == 3) CALL(3); \
    if constexpr (Tile == 4) CALL(4); \
    if constexpr (Tile == 5) CALL(5); \
    if constexpr (Tile == 6) CALL(6); \
    if constexpr (Tile == 7) CALL(7); \
  } while (false)

template <int Tile>
CNNK_INLINE void load_tile(const uint16_t* from, int64_t row_bytes) {
#define CNNK_CALL(tile) _tile_loadd(tile, from, row_bytes)
  CNNK_FOR_TILE(Tile, CNNK_CALL);
#undef CNNK_CALL
}

template <int Tile>
CNNK_INLINE void clear_tile() {
  CNNK_FOR_TILE(Tile, _tile_zero);
}

template <int Tile>
CNNK_INLINE void store_tile(float* to, int64_t row_bytes) {
#define CNNK_CALL(tile) _tile_stored(tile, to, row_bytes)
  CNNK_FOR_TILE(Tile, CNNK_CALL);
#undef CNNK_CALL
}

// Sums are in tiles 0 to 3, 2 * row + column; rows in 4 and 5, columns in 6 and 7.
template <int C, int A, int B>
CNNK_INLINE void multiply_tiles() {
  static_assert(C < 4 && A == 4 + C / 2 && B == 6 + C % 2);
  if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
}
#undef CNNK_FOR_TILE

#endif

// One sum of products: by step, where the rows' tile lies, and a tile of columns.
// Operands are the sum of Parts bfloat16 (bfloat16_parts.inl).
struct TileSteps {
  const uint16_t* rows;
  const int64_t* offsets;  // of rows, by step
  int64_t count;
  int64_t row_bytes;        // from one row to the next
  int64_t rows_tile;        // from the first 16 rows to the next 16
  int64_t rows_part;        // from one part of the rows to the next
  const uint16_t* columns;  // [step][part][tile][pair][column][2]
  int64_t columns_part;     // from one part of the columns to the next
  int64_t columns_tile;     // from the first 16 columns to the next 16
};

constexpr int64_t kBlock = 32;  // rows and columns of a block of 2x2 tiles

// Of `count` steps, how many add their products in tiles: each adds to a chain as often
// as there are products of parts, and the error of a sum grows with its chains. Few
// steps are cut in two, where a plain sum would be accurate too.
constexpr int64_t steps_per_sum(int64_t count) {
  return ceil_div(count, count > 8 ? std::max<int64_t>(2, ceil_div(count, 16)) : 1);
}

// The products of steps [begin, end): sums[row][column], kBlock to a row, of R by C
// tiles.
//
// Of nine products of three parts by three the six largest are enough: what is left
// out is 2^-24 of a product. Every product of parts changes one operand of the last,
// and so loads R or C tiles for R*C multiplications. Vectors are idle meanwhile:
// `meanwhile` is called after each product, and does the vectors' work on an earlier
// block.
template <int Parts, int R, int C, class Meanwhile>
CNNK_INLINE void multiply_steps(const TileSteps& steps, int64_t begin, int64_t end,
                                Meanwhile& meanwhile, float* sums) {
  clear_tile<0>();
  if constexpr (C > 1) clear_tile<1>();
  if constexpr (R > 1) clear_tile<2>();
  if constexpr (R > 1 && C > 1) clear_tile<3>();
  for (int64_t i = begin; i < end; ++i) {
    const uint16_t* const rows = steps.rows + steps.offsets[i];
    const uint16_t* const columns = steps.columns + i * Parts * steps.columns_part;
    const auto load_rows = [&](int part) __attribute__((always_inline)) {
      const uint16_t* const from = rows + part * steps.rows_part;
      load_tile<4>(from, steps.row_bytes);
      if constexpr (R > 1) load_tile<5>(from + steps.rows_tile, steps.row_bytes);
    };
    const auto load_columns = [&](int part) __attribute__((always_inline)) {
      const uint16_t* const from = columns + part * steps.columns_part;
      load_tile<6>(from, 64);
      if constexpr (C > 1) load_tile<7>(from + steps.columns_tile, 64);
    };
    const auto multiply = [&]() __attribute__((always_inline)) {
      multiply_tiles<0, 4, 6>();
      if constexpr (C > 1) multiply_tiles<1, 4, 7>();
      if constexpr (R > 1) multiply_tiles<2, 5, 6>();
      if constexpr (R > 1 && C > 1) multiply_tiles<3, 5, 7>();
      meanwhile.next();
    };
    load_rows(0);
    load_columns(Parts - 1);
    multiply();
    if constexpr (Parts == 3) {
      load_columns(1);
      multiply();
      load_rows(1);
      multiply();
      load_columns(0);
      multiply();
      load_rows(2);
      multiply();
      load_rows(0);
      multiply();
    } else if constexpr (Parts == 2) {
      load_columns(0);
      multiply();
      load_rows(1);
      multiply();
    }
  }
  constexpr int64_t kRowBytes = kBlock * static_cast<int64_t>(sizeof(float));
  store_tile<0>(sums, kRowBytes);
  if constexpr (C > 1) store_tile<1>(sums + 16, kRowBytes);
  if constexpr (R > 1) store_tile<2>(sums + 16 * kBlock, kRowBytes);
  if constexpr (R > 1 && C > 1) store_tile<3>(sums + 16 * kBlock + 16, kRowBytes);
}

constexpr int products_of_parts(int parts) { return parts == 3 ? 6 : parts == 2 ? 3 : 1; }

// sums = or, to add to them, += the products of steps [begin, end).
template <int Parts, int R, int C, class Meanwhile>
__attribute__((noinline)) void multiply_sums(const TileSteps& steps, int64_t begin, int64_t end,
                                             bool add, Meanwhile& meanwhile, float* sums) {
  alignas(64) float partial[kBlock * kBlock];
  const int64_t length = steps_per_sum(end - begin);
  do {
    const int64_t next = std::min(end, begin + length);
    multiply_steps<Parts, R, C>(steps, begin, next, meanwhile, add ? partial : sums);
    if (add) {
      for (int64_t row = 0; row < R * 16; ++row) {
#pragma GCC unroll 2
        for (int64_t column = 0; column < C * 16; column += 16) {
          float* const sum = sums + row * kBlock + column;
          store(sum, load(sum) + load(partial + row * kBlock + column));
        }
      }
    }
    add = true;
    begin = next;
  } while (begin < end);
}

// The same for `rows` and `columns` of at most kBlock.
template <int Parts, class Meanwhile>
CNNK_INLINE void multiply_block(const TileSteps& steps, int64_t begin, int64_t end, int64_t rows,
                                int64_t columns, bool add, Meanwhile& meanwhile, float* sums) {
  if (rows > kTileRows) {
    if (columns > kTileRows) {
      return multiply_sums<Parts, 2, 2>(steps, begin, end, add, meanwhile, sums);
    }
    return multiply_sums<Parts, 2, 1>(steps, begin, end, add, meanwhile, sums);
  }
  if (columns > kTileRows) {
    return multiply_sums<Parts, 1, 2>(steps, begin, end, add, meanwhile, sums);
  }
  multiply_sums<Parts, 1, 1>(steps, begin, end, add, meanwhile, sums);
}

struct Nothing {
  void next() {}
};
