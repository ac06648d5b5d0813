// Pooled outputs: the maximum and the tap that it was found at stay in registers
// over the window.
//
// One row of a plane: vectors along the row. Elements outside of the image are
// -inf, which never replaces a maximum; where nothing does, the result is the
// window's first tap inside of the image.

template <class A>
struct PoolRow {
  const A* source;          // position of output column 0, window row 0
  const int64_t* row_taps;  // kernel_width offsets of a window row's taps
  int64_t row_step;         // from one window row to the next
  int64_t kernel_height, kernel_width;
  int64_t first_row, last_row;  // window rows inside of the image: [first, last)
  const Mask<A>* first_column;  // of each output column: its first tap inside
  int64_t width;
  bool deinterleaves;  // stride 2 in a plain row; else neighbours read neighbours
};

template <class A>
struct Winner {
  Vec<A> value;
  Vec<Mask<A>> tap;
};

// torch's order: a greater value or a NaN replaces the maximum.
template <class A, bool WithTap = true>
CNNK_INLINE void challenge(Winner<A>& winner, Vec<A> value, Mask<A> tap) {
  const Vec<Mask<A>> wins = (value > winner.value) | (value != value);
  winner.value = select<A>(wins, value, winner.value);
  if constexpr (WithTap) winner.tap = wins ? broadcast<Mask<A>>(tap) : winner.tap;
}

// Kernel: the window's width where that is known, else 0.
template <bool WithTap, bool Deinterleaves, int Kernel, class A>
CNNK_INLINE Winner<A> pool_window(const PoolRow<A>& row, int64_t x) {
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const int64_t width = Kernel > 0 ? Kernel : row.kernel_width;
  Winner<A> winner;
  winner.value = broadcast<A>(lowest);
  winner.tap =
      load(row.first_column + x) + broadcast<Mask<A>>(static_cast<Mask<A>>(row.first_row * width));
  for (int64_t r = row.first_row; r < row.last_row; ++r) {
    const auto meet = [&](int64_t s, Vec<A> value) {
      challenge<A, WithTap>(winner, value, static_cast<Mask<A>>(r * width + s));
    };
    if constexpr (Deinterleaves) {
      const A* const source = row.source + r * row.row_step + 2 * x;
      int64_t s = 0;
#pragma GCC unroll 2
      for (; s + 2 <= width; s += 2) {
        const EvenOdd<A> columns = load_even_odd(source + s);
        meet(s, columns.even);
        meet(s + 1, columns.odd);
      }
      // The last column of an odd window: nothing is read that no window has.
      if (s < width) meet(s, load_even_odd(source + s - 1).odd);
    } else {
      const A* const source = row.source + r * row.row_step + x;
#pragma GCC unroll 3
      for (int64_t s = 0; s < width; ++s) meet(s, load(source + row.row_taps[s]));
    }
  }
  return winner;
}

// Where the taps of winners go: uint8_t or int32_t elements, or nowhere. Windows
// whose maximum is not positive hold `clipped` instead; -1 if there is no ReLU.
struct ArgmaxOut {
  void* data;
  bool compact;
  int32_t clipped;
};

// Short runs of taps, without a call and without touching what follows: the last
// eight bytes are moved back to end with the run.
template <class Tap>
CNNK_INLINE void copy_taps(const Tap* from, Tap* to, int64_t count) {
  constexpr int64_t piece = 8 / static_cast<int64_t>(sizeof(Tap));
#if CNNK_TIER_ID == 2 && !defined(CNNK_EMULATE_AVX512)
  if (sizeof(Tap) == 1 && count <= 16) {
    const __mmask16 run = static_cast<__mmask16>((1u << count) - 1);
    _mm_mask_storeu_epi8(to, run, _mm_maskz_loadu_epi8(run, from));
    return;
  }
#endif
  if (count < piece) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i < count; i += piece) {
    const int64_t at = std::min(i, count - piece);
    __builtin_memcpy(to + at, from + at, 8);
  }
}

template <class A, class Tap>
CNNK_INLINE void store_taps_as(Tap* to, Vec<Mask<A>> taps, int64_t count, int64_t step) {
  constexpr int lanes = kLanes<A>;
  typedef Tap Narrow __attribute__((vector_size(lanes * sizeof(Tap))));
  const Narrow narrow_taps = __builtin_convertvector(taps, Narrow);
  if (step == 1 && count == lanes) {
    __builtin_memcpy(to, &narrow_taps, sizeof narrow_taps);
    return;
  }
  Tap values[lanes];
  __builtin_memcpy(values, &narrow_taps, sizeof values);
  if (step == 1) return copy_taps(values, to, count);
  for (int64_t i = 0; i < count; ++i) to[i * step] = values[i];
}

// Stores `count` winners' taps from element `at` on, `step` elements apart.
template <class A>
CNNK_INLINE void store_taps(const ArgmaxOut& out, int64_t at, const Winner<A>& winner,
                            int64_t count, int64_t step) {
  if (out.data == nullptr) return;
  Vec<Mask<A>> taps = winner.tap;
  if (out.clipped >= 0) {
    taps = winner.value <= Vec<A>{} ? broadcast<Mask<A>>(out.clipped) : taps;  // NaN passes
  }
  if (out.compact) {
    store_taps_as<A>(static_cast<uint8_t*>(out.data) + at, taps, count, step);
  } else {
    store_taps_as<A>(static_cast<int32_t*>(out.data) + at, taps, count, step);
  }
}

template <bool WithTap, bool Deinterleaves, int Kernel, class A>
void pool_row_of(const PoolRow<A>& row, DType dtype, void* values, const ArgmaxOut& argmax,
                 int64_t at, int64_t step) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t count = std::min(lanes, row.width);
  for (int64_t next = 0; next < row.width; next += lanes) {
    // The last vector is moved back to end with the row.
    const int64_t x = std::min(next, row.width - count);
    const Winner<A> winner = pool_window<WithTap, Deinterleaves, Kernel>(row, x);
    store_out<A>(dtype, values, at + x * step, winner.value, count, step);
    if constexpr (WithTap) store_taps<A>(argmax, at + x * step, winner, count, step);
  }
}

// Writes a row of values and of taps from element `at` on.
template <class A>
void pool_row(const PoolRow<A>& row, DType dtype, void* values, const ArgmaxOut& argmax, int64_t at,
              int64_t step) {
  const auto run = [&](auto with_tap, auto deinterleaves, auto kernel) {
    pool_row_of<decltype(with_tap)::value, decltype(deinterleaves)::value, decltype(kernel)::value>(
        row, dtype, values, argmax, at, step);
  };
  const auto run_kernel = [&](auto with_tap) {
    if (!row.deinterleaves && row.kernel_width == 3) {
      return run(with_tap, std::false_type{}, Constant<3>{});
    }
    if (!row.deinterleaves) return run(with_tap, std::false_type{}, Constant<0>{});
    if (row.kernel_width == 2) return run(with_tap, std::true_type{}, Constant<2>{});
    if (row.kernel_width == 3) return run(with_tap, std::true_type{}, Constant<3>{});
    run(with_tap, std::true_type{}, Constant<0>{});
  };
  if (argmax.data != nullptr) {
    run_kernel(std::true_type{});
  } else {
    run_kernel(std::false_type{});
  }
}

// The parts of a PoolRow that are the same for every row of a problem.
template <class A>
struct PoolTables {
  std::vector<int64_t> row_taps;
  std::vector<Mask<A>> first_column;

  PoolTables(const MaxPool2dProblem& problem, const PackedPlanes& packed) {
    for (int64_t s = 0; s < problem.kernel_width; ++s) {
      row_taps.push_back(packed.column_offset(s * problem.dilation_w));
    }
    first_column.assign(round_up(problem.out_width, kLanes<A>), 0);
    for (int64_t x = 0; x < problem.out_width; ++x) {
      const int64_t outside = problem.pad_left - x * problem.stride_w;
      if (outside > 0)
        first_column[x] = static_cast<Mask<A>>(ceil_div(outside, problem.dilation_w));
    }
  }
};

// The window rows of output row y that lie inside of the image.
struct WindowRows {
  int64_t first, last;
};

CNNK_INLINE WindowRows window_rows(const MaxPool2dProblem& problem, int64_t y) {
  const int64_t start = y * problem.stride_h - problem.pad_top;
  if (start >= 0 && start + (problem.kernel_height - 1) * problem.dilation_h < problem.in_height) {
    return {0, problem.kernel_height};
  }
  const int64_t first = start < 0 ? ceil_div(-start, problem.dilation_h) : 0;
  const int64_t room = problem.in_height - 1 - start;
  const int64_t last = room < 0 ? 0 : room / problem.dilation_h + 1;
  return {first, std::min(problem.kernel_height, last)};
}
