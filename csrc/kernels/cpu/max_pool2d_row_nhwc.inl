// One window of channels_last images: vectors along the channels, the maximum and
// its tap in registers over the window.

// An element of a window: where its channels lie, from those of the window's
// first, and its tap.
template <class A>
struct WindowElement {
  int64_t offset;
  Mask<A> tap;
};

// `Vectors` vectors of channels of one window: calls put(v, winner) for each.
template <bool WithTap, int Vectors, class T, class Put>
CNNK_INLINE void pool_channels(const WindowElement<Accumulator<T>>* elements, int64_t count,
                               const T* window, Put&& put) {
  using A = Accumulator<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  Winner<A> winners[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    winners[v] = {broadcast<A>(lowest), broadcast<Mask<A>>(elements[0].tap)};
  }
  for (int64_t k = 0; k < count; ++k) {
    const T* const source = window + elements[k].offset;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      challenge<A, WithTap>(winners[v], load_widened(source + v * kLanes<A>), elements[k].tap);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) put(v, winners[v]);
}

// The last channels of a pixel, fewer than a vector.
template <bool WithTap, class T>
CNNK_INLINE Winner<Accumulator<T>> pool_last_channels(const WindowElement<Accumulator<T>>* elements,
                                                      int64_t count, const T* window,
                                                      int64_t channels) {
  using A = Accumulator<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  Winner<A> winner = {broadcast<A>(lowest), broadcast<Mask<A>>(elements[0].tap)};
  for (int64_t k = 0; k < count; ++k) {
    challenge<A, WithTap>(winner, load_head(window + elements[k].offset, channels),
                          elements[k].tap);
  }
  return winner;
}

// As many vectors of channels at a time as the registers hold with their taps.
constexpr int kChannelVectors = CNNK_VECTOR_REGISTERS >= 32 ? 4 : 2;

// Channels [c0, c1) of one window: calls put(c, count, winner) for each vector.
template <bool WithTap, class T, class Put>
CNNK_INLINE void pool_pixel(const WindowElement<Accumulator<T>>* elements, int64_t count,
                            const T* window, int64_t c0, int64_t c1, Put&& put) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  int64_t c = c0;
  const auto put_vector = [&](int v, const Winner<A>& winner) {
    put(c + v * lanes, lanes, winner);
  };
  for (; c + kChannelVectors * lanes <= c1; c += kChannelVectors * lanes) {
    pool_channels<WithTap, kChannelVectors>(elements, count, window + c, put_vector);
  }
  for (; c + lanes <= c1; c += lanes) {
    pool_channels<WithTap, 1>(elements, count, window + c, put_vector);
  }
  if (c < c1) put(c, c1 - c, pool_last_channels<WithTap>(elements, count, window + c, c1 - c));
}

// The elements of a window that lie inside of the image.
template <class A>
class WindowElements {
 public:
  explicit WindowElements(const MaxPool2dProblem& problem)
      : problem_(problem), elements_(static_cast<size_t>(problem.window())) {}

  // Returns their number; the same rows and columns again cost nothing.
  int64_t count(const WindowRange& rows, const WindowRange& columns) {
    if (rows == rows_ && columns == columns_) return count_;
    rows_ = rows;
    columns_ = columns;
    count_ = 0;
    // What wins where no element is inside.
    elements_[0].tap = static_cast<Mask<A>>(rows.first * problem_.kernel_width + columns.first);
    for (int64_t r = rows.first; r < rows.last; ++r) {
      for (int64_t s = columns.first; s < columns.last; ++s) {
        elements_[count_++] = {
            (r * problem_.dilation_h * problem_.in_width + s * problem_.dilation_w) *
                problem_.channels,
            static_cast<Mask<A>>(r * problem_.kernel_width + s)};
      }
    }
    return count_;
  }
  const WindowElement<A>* data() const { return elements_.data(); }

 private:
  const MaxPool2dProblem& problem_;
  std::vector<WindowElement<A>> elements_;
  WindowRange rows_ = {-1, -1}, columns_ = {-1, -1};
  int64_t count_ = 0;
};
