// Images as rows of pixels of channels, with a border: a kernel row of a patch is then
// one contiguous run, however few the channels are.

// An image as bordered rows of pixels, one group after the other.
struct PixelRows {
  int64_t rows, columns;
  int64_t channels;  // of one group
  int64_t row() const { return columns * channels; }
  int64_t group() const { return rows * row(); }
};

inline PixelRows pixel_rows(const Conv2dProblem& conv) {
  return {(conv.out_height - 1) * conv.stride_h + (conv.kernel_height - 1) * conv.dilation_h + 1,
          (conv.out_width - 1) * conv.stride_w + (conv.kernel_width - 1) * conv.dilation_w + 1,
          conv.in_channels / conv.groups};
}

// Visits the pixels of the image that pixel rows cover: visit(group, offset in
// the group's rows, offset of its first channel in the image, channel stride).
template <class Visit>
CNNK_INLINE void for_each_pixel(const Conv2dProblem& conv, const PixelRows& pixels, Visit&& visit) {
  const PlaneSource source =
      plane_source(conv.layout, conv.in_channels, conv.in_height, conv.in_width);
  const int64_t y0 = std::max<int64_t>(0, conv.pad_top);
  const int64_t y1 = std::min(pixels.rows, conv.in_height + conv.pad_top);
  const int64_t x0 = std::max<int64_t>(0, conv.pad_left);
  const int64_t x1 = std::min(pixels.columns, conv.in_width + conv.pad_left);
  for (int64_t group = 0; group < conv.groups; ++group) {
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = x0; x < x1; ++x) {
        visit(group, y * pixels.row() + x * pixels.channels,
              group * pixels.channels * source.channel_stride +
                  (y - conv.pad_top) * source.row_stride +
                  (x - conv.pad_left) * source.column_stride,
              source.channel_stride);
      }
    }
  }
}
