// Pixels by number: where each of a sequence of pixels lies in an image, if anywhere,
// and how 16 of them are read and written, in either layout.
//
// A sequence of pixels is what the rows of a matrix product are; it runs on over the
// ends of rows and over a border, whose pixels are nowhere. Vectors of 16 pixels and
// vectors of 16 channels are turned into each other by a transpose, so that a
// layout costs at most that.

#include "kernels/cpu/outer_product_tile.inl"

constexpr int64_t kNowhere = -1;

// Pixels are fetched so far ahead of those that are read.
constexpr int64_t kFetchAhead = 32;

// Sixteen pixels. In a run, those that are somewhere follow one another in memory.
struct PixelGroup {
  int64_t first;  // where the first lies that is somewhere
  uint32_t somewhere;
  int count;
  bool run;
};

struct PixelTable {
  // Element offset of channel 0, or kNowhere; kFetchAhead pixels more than there are.
  std::vector<int64_t> at;
  std::vector<PixelGroup> groups;
};

// One axis of a sequence: position i is first + i * step of `size`, or outside.
struct PixelAxis {
  int64_t first, step, size;
  bool inside(int64_t i) const {
    const int64_t position = first + i * step;
    return position >= 0 && position < size;
  }
};

inline void pad_table(PixelTable& table, int64_t multiple) {
  table.at.resize(static_cast<size_t>(round_up(static_cast<int64_t>(table.at.size()), multiple)),
                  kNowhere);
}

// Appends `rows` rows of `pitch` pixels of one image.
inline void append_pixels(PixelTable& table, int64_t image_at, const PlaneSource& plane,
                          const PixelAxis& row_axis, int64_t rows, const PixelAxis& column_axis,
                          int64_t pitch) {
  for (int64_t i = 0; i < rows; ++i) {
    const bool inside = row_axis.inside(i);
    const int64_t row_at = image_at + (row_axis.first + i * row_axis.step) * plane.row_stride;
    for (int64_t j = 0; j < pitch; ++j) {
      table.at.push_back(inside && column_axis.inside(j)
                             ? row_at +
                                   (column_axis.first + j * column_axis.step) * plane.column_stride
                             : kNowhere);
    }
  }
}

// Appends pixels [begin, end) of the sequence of `rows` rows of `columns` pixels of each
// image, one after the other.
inline void append_range(PixelTable& table, int64_t begin, int64_t end, int64_t image_step,
                         const PlaneSource& plane, const PixelAxis& row_axis, int64_t rows,
                         const PixelAxis& column_axis, int64_t columns) {
  int64_t row = begin / columns, j = begin % columns;
  for (int64_t p = begin; p < end; ++row, j = 0) {
    const int64_t i = row % rows;
    const bool inside = row_axis.inside(i);
    const int64_t row_at = row / rows * image_step +
                           (row_axis.first + i * row_axis.step) * plane.row_stride +
                           column_axis.first * plane.column_stride;
    for (; j < columns && p < end; ++j, ++p) {
      table.at.push_back(inside && column_axis.inside(j)
                             ? row_at + j * column_axis.step * plane.column_stride
                             : kNowhere);
    }
  }
}

// To be called once the pixels are there. `neighbour` is the step from a pixel to
// the next in memory.
inline void group_pixels(PixelTable& table, int64_t neighbour) {
  pad_table(table, kTileRows);
  for (size_t i = 0; i < table.at.size(); i += kTileRows) {
    PixelGroup group = {kNowhere, 0, 0, true};
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const int64_t at = table.at[i + static_cast<size_t>(lane)];
      if (at == kNowhere) continue;
      if (group.count == 0) group.first = at;
      if (at != group.first + group.count * neighbour) group.run = false;
      group.somewhere |= 1u << lane;
      ++group.count;
    }
    table.groups.push_back(group);
  }
  table.at.resize(table.at.size() + kFetchAhead, kNowhere);
}

// Calls body(begin, end) for ranges of groups, in which it goes over all channels:
// short ones where a pixel's channels lie together, for they are then read in the
// order of memory; long ones where its planes lie apart.
template <class Body>
CNNK_INLINE void in_memory_order(const PixelTable& table, int64_t channel_step, Body&& body) {
  const int64_t groups = static_cast<int64_t>(table.groups.size());
  const int64_t range = channel_step == 1 ? 2 : 32;
  for (int64_t i = 0; i < groups; i += range) body(i, std::min(groups, i + range));
}

// The first lanes of v spread over the lanes of the mask, zero elsewhere.
CNNK_INLINE Vec<float> expand_lanes(Vec<float> v, uint32_t mask) {
#if !defined(CNNK_EMULATE_AVX512)
  return (Vec<float>)_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), (__m512)v);
#else
  Vec<float> result{};
  for (int lane = 0, next = 0; lane < 16; ++lane) {
    if ((mask >> lane & 1u) != 0) result[lane] = v[next++];
  }
  return result;
#endif
}

// The lanes of the mask, moved to the front.
CNNK_INLINE Vec<float> compress_lanes(Vec<float> v, uint32_t mask) {
#if !defined(CNNK_EMULATE_AVX512)
  return (Vec<float>)_mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)v);
#else
  Vec<float> result{};
  for (int lane = 0, next = 0; lane < 16; ++lane) {
    if ((mask >> lane & 1u) != 0) result[next++] = v[lane];
  }
  return result;
#endif
}

// Sixteen pixels' elements of one plane; zero where a pixel is nowhere.
template <class T>
CNNK_INLINE Vec<float> load_plane(const T* plane, const PixelTable& table, int64_t i) {
  const PixelGroup& group = table.groups[static_cast<size_t>(i)];
  __builtin_prefetch(plane + group.first + 4 * kFetchAhead);
  if (group.run && group.count == kTileRows) return load_widened(plane + group.first);
  if (group.run) {
    if (group.count == 0) return Vec<float>{};
    return expand_lanes(load_head(plane + group.first, group.count), group.somewhere);
  }
  const int64_t* const at = table.at.data() + i * kTileRows;
  float lanes[kTileRows];
  for (int lane = 0; lane < kTileRows; ++lane) {
    lanes[lane] = at[lane] == kNowhere ? 0.0f : widen(plane[at[lane]]);
  }
  return load(lanes);
}

// rows[pixel] = `channels` <= 16 channels of group i's pixels, zero where there is
// nothing. `from` is the first of the channels.
template <class T>
CNNK_INLINE void load_pixels(const T* from, const PixelTable& table, int64_t i,
                             int64_t channel_step, int64_t channels, Vec<float> (&rows)[16]) {
  if (channel_step != 1) {
    for (int64_t c = 0; c < kTileRows; ++c) {
      rows[c] = c < channels ? load_plane(from + c * channel_step, table, i) : Vec<float>{};
    }
    transpose<float>(rows);
    return;
  }
  const int64_t* const at = table.at.data() + i * kTileRows;
  for (int64_t p = 0; p < kTileRows; ++p) {
    __builtin_prefetch(from + at[p + kFetchAhead]);
    rows[p] = at[p] == kNowhere       ? Vec<float>{}
              : channels == kTileRows ? load_widened(from + at[p])
                                      : load_head(from + at[p], channels);
  }
}

// rows[channel] = group i's pixels of each channel.
template <class T>
CNNK_INLINE void load_planes(const T* from, const PixelTable& table, int64_t i,
                             int64_t channel_step, int64_t channels, Vec<float> (&rows)[16]) {
  if (channel_step == 1) {
    load_pixels(from, table, i, channel_step, channels, rows);
    transpose<float>(rows);
    return;
  }
  for (int64_t c = 0; c < kTileRows; ++c) {
    rows[c] = c < channels ? load_plane(from + c * channel_step, table, i) : Vec<float>{};
  }
}

// Where results go: vectors of 16 channels, or of 16 pixels of a plane.
struct PixelsOut {
  DType dtype;
  void* data;
  int64_t channel_step;
  const PixelTable* table;
  bool streams;  // whole vectors of float32 pixels go past the caches
  bool relu;
};

// Writes `count` <= 32 channels of one pixel to element `at`.
CNNK_INLINE void store_pixel(const PixelsOut& out, int64_t at, int64_t count, Vec<float> low,
                             Vec<float> high) {
  low = relu_if<float>(out.relu, low);
  high = relu_if<float>(out.relu, high);
  const int64_t first = std::min<int64_t>(16, count);
  if (out.dtype == DType::float32) {
    float* const to = static_cast<float*>(out.data) + at;
#if !defined(CNNK_EMULATE_AVX512)
    if (out.streams && count == 32 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      _mm512_stream_ps(to, (__m512)low);
      _mm512_stream_ps(to + 16, (__m512)high);
      return;
    }
#endif
    first == 16 ? store(to, low) : store_head(to, low, first);
    if (count == 32) return store(to + 16, high);
    if (count > 16) store_head(to + 16, high, count - 16);
    return;
  }
#if !defined(CNNK_EMULATE_AVX512)
  if (out.dtype == DType::bfloat16 && count == 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    __builtin_memcpy(static_cast<bfloat16*>(out.data) + at, &both, sizeof both);
    return;
  }
#endif
  with_storage<float>(out.dtype, [&](auto element) {
    auto* const to = static_cast<decltype(element)*>(out.data) + at;
    first == 16 ? store_narrowed(to, low) : store_first(to, low, first);
    if (count == 32) return store_narrowed(to + 16, high);
    if (count > 16) store_first(to + 16, high, count - 16);
  });
}

// Writes `channels` planes from channel k on of group i's pixels, rows[pixel].
inline void store_planes_of(const PixelsOut& out, int64_t i, int64_t k, int64_t channels,
                            Vec<float> (&rows)[16]) {
  const PixelGroup& group = out.table->groups[static_cast<size_t>(i)];
  transpose<float>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t plane = (k + c) * out.channel_step;
    rows[c] = relu_if<float>(out.relu, rows[c]);
    if (group.run) {
      const Vec<float> pixels =
          group.count == kTileRows ? rows[c] : compress_lanes(rows[c], group.somewhere);
      store_out<float>(out.dtype, out.data, group.first + plane, pixels, group.count, 1);
      continue;
    }
    const int64_t* const at = out.table->at.data() + i * kTileRows;
    float lanes[kTileRows];
    store(lanes, rows[c]);
    with_storage<float>(out.dtype, [&](auto element) {
      using T = decltype(element);
      for (int lane = 0; lane < kTileRows; ++lane) {
        if (at[lane] == kNowhere) continue;
        static_cast<T*>(out.data)[at[lane] + plane] = narrow<T>(lanes[lane]);
      }
    });
  }
}
