// Gradient-descent steps: one pass over parameter, gradient and momentum
// buffer, which is what memory bandwidth allows (12 bytes a float parameter,
// 20 with momentum). Which terms exist is a template argument, so that plain
// gradient descent compiles to one multiply-add an element.

// Memory is streamed a few percent faster than by the processor's prefetchers alone.
template <class T>
CNNK_INLINE void fetch_ahead(const T* at) {
  constexpr int64_t kBytesAhead = 2048;
  __builtin_prefetch(reinterpret_cast<const char*>(at) + kBytesAhead);
}

// `options` is a copy: a reference would be read again after every store.
template <class T, bool WithMomentum, bool Nesterov>
void step_range(const StepTensor& tensor, int64_t begin, int64_t end, const StepOptions options,
                bool fetches_ahead) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = kLanes<A>;
  T* const param = static_cast<T*>(tensor.param);
  T* const grad = static_cast<T*>(tensor.grad);
  T* const buffer = static_cast<T*>(tensor.momentum_buffer);
  const A lr = static_cast<A>(options.lr);
  const A momentum = static_cast<A>(options.momentum);
  const A undamped = static_cast<A>(1 - options.dampening);
  const A weight_decay = static_cast<A>(options.weight_decay);
  const A grad_scale = static_cast<A>(options.grad_scale);
  const A sign = options.maximize ? A{-1} : A{1};
  const bool decays = options.weight_decay != 0;
  const bool first_step = options.first_step;
  const bool unscale = options.unscale;

  const auto update = [=](Vec<A>& p, Vec<A>& g, Vec<A>& m) {
    if (unscale) g = g / grad_scale;
    Vec<A> direction = g * sign;
    if (decays) direction += p * weight_decay;
    if constexpr (WithMomentum) {
      m = first_step ? direction : m * momentum + direction * undamped;
      direction = Nesterov ? direction + m * momentum : m;
    }
    p -= direction * lr;
  };

  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    if (fetches_ahead) {
      fetch_ahead(param + i);
      fetch_ahead(grad + i);
      if constexpr (WithMomentum) fetch_ahead(buffer + i);
    }
    Vec<A> p = load_widened(param + i);
    Vec<A> g = load_widened(grad + i);
    Vec<A> m{};
    if constexpr (WithMomentum) {
      if (!first_step) m = load_widened(buffer + i);
    }
    update(p, g, m);
    store_narrowed(param + i, p);
    if constexpr (WithMomentum) store_narrowed(buffer + i, m);
    if (unscale) store_narrowed(grad + i, g);
  }
  if (i < end) {
    const int64_t count = end - i;
    Vec<A> p = load_head(param + i, count);
    Vec<A> g = load_head(grad + i, count);
    Vec<A> m{};
    if constexpr (WithMomentum) {
      if (!first_step) m = load_head(buffer + i, count);
    }
    update(p, g, m);
    store_head(param + i, p, count);
    if constexpr (WithMomentum) store_head(buffer + i, m, count);
    if (unscale) store_head(grad + i, g, count);
  }
}

template <class T>
void step(const GradientStepPlan& plan, const ThreadPool& pool,
          const std::vector<StepTensor>& tensors, const StepOptions& options) {
  const auto run = options.momentum == 0 ? &step_range<T, false, false>
                   : options.nesterov    ? &step_range<T, true, true>
                                         : &step_range<T, true, false>;
  const std::vector<int64_t>& ends = plan.ends;
  const int64_t total = ends.empty() ? 0 : ends.back();
  if (total == 0) return;
  const int64_t tasks = ceil_div(total, plan.elements_per_task);
  parallel_for(pool, tasks, tasks == 1, [&](int64_t begin, int64_t end) {
    int64_t at = begin * plan.elements_per_task;
    const int64_t stop = std::min(total, end * plan.elements_per_task);
    size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), at) - ends.begin());
    for (; at < stop; ++i) {
      const int64_t start = ends[i] - tensors[i].count;
      const int64_t tensor_stop = std::min(stop, ends[i]);
      run(tensors[i], at - start, tensor_stop - start, options, plan.fetches_ahead);
      at = tensor_stop;
    }
  });
}
