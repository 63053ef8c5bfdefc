// The linear recurrence h_t = a_t h_{t-1} + b_t over columns: one pass over memory, threads dividing the columns.

// Columns [first, last) of one step. A cut stands for a = 0, by selection.
template <bool SHIFTED>
JAXRNN_INLINE void linear_step(const float* a, const float* b, bool cut, float* state, float* hs, long first, long last) {
  auto one = [&](long u, long n) {
    const Vec s = load(state + u, n), x = load(b + u, n);
    Vec h, next;
    if (SHIFTED) h = s + x, next = cut ? Vec{} : load(a + u, n) * h;
    else h = next = cut ? x : load(a + u, n) * s + x;
    store(hs + u, h, n);
    store(state + u, next, n);
  };
  long u = first;
  for (; u + LANES <= last; u += LANES) one(u, LANES);
  if (u < last) one(u, last - u);
}

template <bool SHIFTED>
inline void linear_columns(const LinearProblem& p, Range columns) {
  for (long k = 0; k < p.steps; ++k) {
    const long t = p.reverse ? p.steps - 1 - k : k;
    const float *a = p.a + (p.a_steps == 1 ? 0 : t) * p.columns, *b = p.b + t * p.columns;
    float* hs = p.hs + t * p.columns;
    if (!p.cut) {
      linear_step<SHIFTED>(a, b, false, p.last, hs, columns.begin, columns.end);
      continue;
    }
    const uint8_t* cut = p.cut + (p.cut_steps == 1 ? 0 : t) * p.cut_groups;
    const long group = p.columns / p.cut_groups;
    for (long g = columns.begin / group; g * group < columns.end; ++g)
      linear_step<SHIFTED>(a, b, cut[g], p.last, hs, std::max(columns.begin, g * group),
                           std::min(columns.end, (g + 1) * group));
  }
}

inline void run_linear(const LinearProblem& p, int threads) {
  constexpr long LINE = 16, BLOCK = 1 << 15;  // floats of a cache line, and of a state that stays in the cache
  const long lines = (p.columns + LINE - 1) / LINE;
  const int parts = static_cast<int>(std::min<long>(p.steps * p.columns < 20000 ? 1 : threads, std::max(lines, 1l)));
  auto part = [&](int k) {
    const Range own = share(lines, parts, k);
    const Range columns{own.begin * LINE, std::min(own.end * LINE, p.columns)};
    for (long begin = columns.begin; begin < columns.end; begin += BLOCK) {
      const Range block{begin, std::min(begin + BLOCK, columns.end)};
      std::memcpy(p.last + begin, p.h + begin, block.size() * sizeof(float));
      if (p.shifted) linear_columns<true>(p, block);
      else linear_columns<false>(p, block);
    }
  };
  if (parts > 1 && Pool::share(parts, part)) return;
  for (int k = 0; k < parts; ++k) part(k);
}
