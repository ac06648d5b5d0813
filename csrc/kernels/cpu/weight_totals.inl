// From the totals of slices, vectors along one side's channels, to weights in any order.

// A row of totals and the weight that it becomes, of the first channel.
struct GradientWeight {
  int64_t row, at;
};

// Totals [row][channel] of all slices, added up, to the weights of `count` channels, which are
// `weight_step` apart.
template <class T>
void write_totals(const Accumulator<T>* totals, int64_t row_length, int64_t slices,
                  int64_t slice_step, const std::vector<GradientWeight>& weights, int64_t count,
                  T* to, int64_t weight_step) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t pairs = static_cast<int64_t>(weights.size());
  const auto sum = [&](const GradientWeight& weight) {
    const A* const first = totals + weight.row * row_length;
    Vec<A> total = load(first);
    for (int64_t slice = 1; slice < slices; ++slice) total += load(first + slice * slice_step);
    return total;
  };
  for (int64_t i = 0; i < pairs;) {
    const GradientWeight* const next = weights.data() + i;
    bool consecutive = i + lanes <= pairs;
    for (int64_t j = 1; consecutive && j < lanes; ++j) consecutive = next[j].at == next->at + j;
    if (!consecutive) {
      store_first(to + next->at, sum(*next), count, weight_step);
      ++i;
      continue;
    }
    Vec<A> square[lanes];
    for (int64_t j = 0; j < lanes; ++j) square[j] = sum(next[j]);
    transpose<A>(square);
    for (int64_t k = 0; k < count; ++k) store_narrowed(to + k * weight_step + next->at, square[k]);
    i += lanes;
  }
}
