// Copies planes into the layout of packed_planes.h, converting to the
// accumulator type on the way. Rows and columns outside of the image get `fill`.

// The part of sub-row `phase` that lies inside of the image.
struct ColumnRange {
  int64_t begin, end;
};

CNNK_INLINE ColumnRange columns_inside(const PackedPlanes& packed, int64_t width, int64_t phase) {
  const int64_t before = packed.left - phase;
  // With much padding the whole row may lie before the image.
  const int64_t begin =
      std::min(before > 0 ? ceil_div(before, packed.phases) : 0, packed.row_length);
  const int64_t last = width - 1 + packed.left - phase;
  const int64_t end = last < 0 ? 0 : last / packed.phases + 1;
  return {begin, std::clamp(end, begin, packed.row_length)};
}

template <class A>
CNNK_INLINE void fill_row(A* row, int64_t begin, int64_t end, A fill) {
  for (int64_t i = begin; i < end; ++i) row[i] = fill;
}

// Rows at stride 2, the commonest after 1, by vectors. Past the last element may be
// no memory.
template <class T, class A>
CNNK_INLINE void copy_every_second(const T* from, A* to, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    constexpr int64_t lanes = kLanes<float>;
    int64_t i = 0;
    for (; i + lanes < count; i += lanes) store(to + i, load_even_odd(from + 2 * i).even);
    if (i == count) return;
    const int64_t rest = 2 * (count - i) - 1;
    const Vec<float> low = load_head(from + 2 * i, std::min(rest, lanes));
    const Vec<float> high =
        rest > lanes ? load_head(from + 2 * i + lanes, rest - lanes) : Vec<float>{};
    store_head(to + i, shuffled<float, even_lane>(low, high), count - i);
  }
}

// Channels are interleaved in NHWC, so that several are packed in one sweep.
constexpr int64_t kInterleavedChannels = 8;

template <class T>
void pack_planes(const T* image, const PlaneSource& source, int64_t channels,
                 const PackedPlanes& packed, Accumulator<T> fill, Accumulator<T>* out) {
  using A = Accumulator<T>;
  const int64_t plane = packed.plane();
  const int64_t sweep = source.column_stride == 1 ? 1 : kInterleavedChannels;
  const int64_t step = packed.phases * source.column_stride;
  for (int64_t phase = 0; phase < packed.phases; ++phase) {
    const ColumnRange inside = columns_inside(packed, source.width, phase);
    const int64_t width = inside.end - inside.begin;
    const int64_t first_column = inside.begin * packed.phases + phase - packed.left;
    for (int64_t c0 = 0; c0 < channels; c0 += sweep) {
      const int64_t count = std::min(sweep, channels - c0);
      const T* const from_channel =
          image + c0 * source.channel_stride + first_column * source.column_stride;
      A* row = out + c0 * plane + phase * packed.row_length;
      for (int64_t y = 0; y < packed.rows; ++y, row += packed.pitch()) {
        const int64_t source_y = y - packed.top;
        if (source_y < 0 || source_y >= source.height) {
          for (int64_t c = 0; c < count; ++c) {
            fill_row(row + c * plane, 0, packed.row_length, fill);
          }
          continue;
        }
        for (int64_t c = 0; c < count; ++c) {
          fill_row(row + c * plane, 0, inside.begin, fill);
          fill_row(row + c * plane, inside.end, packed.row_length, fill);
        }
        const T* from = from_channel + source_y * source.row_stride;
        A* const to = row + inside.begin;
        if (step == 1) {
          widen_row(from, to, width);
        } else if (std::is_same_v<T, float> && step == 2 && sweep == 1) {
          copy_every_second(from, to, width);
        } else if (count == kInterleavedChannels) {
          for (int64_t i = 0; i < width; ++i, from += step) {
            for (int64_t c = 0; c < kInterleavedChannels; ++c) to[c * plane + i] = widen(from[c]);
          }
        } else {
          for (int64_t i = 0; i < width; ++i, from += step) {
            for (int64_t c = 0; c < count; ++c) {
              to[c * plane + i] = widen(from[c * source.channel_stride]);
            }
          }
        }
      }
    }
  }
}

// The same for an image of `dtype` that starts at element `at`.
template <class A>
void pack_planes_as(DType dtype, const void* image, int64_t at, const PlaneSource& source,
                    int64_t channels, const PackedPlanes& packed, A fill, A* out) {
  with_storage<A>(dtype, [&](auto element) {
    using T = decltype(element);
    pack_planes(static_cast<const T*>(image) + at, source, channels, packed, fill, out);
  });
}
