// The linear recurrence h_t = a_t h_{t-1} + b_t over columns: one pass over memory, threads dividing the columns.
//
// What waits is the memory: a second store for each one to hs (a state of its own) would take twice as long, and so
// would reading what nobody has asked for ahead of time. So a step reads the last one's hs, and asks for what comes.

// Columns [first, last) of one step: hs = a before + b, or before + b without a; a cut stands for a = 0, by selection.
JAXRNN_INLINE void linear_step(const Real* a, const Real* before, const Real* b, bool cut, Real* hs, long first,
                               long last, long ahead) {
  auto one = [&](long u, long n) {
    const Vec x = load(b + u, n);
    if (cut) return store(hs + u, x, n);
    const Vec s = load(before + u, n);
    store(hs + u, (a ? load(a + u, n) * s : s) + x, n);
  };
  long u = first;
  for (; u + LANES <= last; u += LANES) {
    if (a) __builtin_prefetch(a + u + ahead);
    __builtin_prefetch(b + u + ahead);
    __builtin_prefetch(hs + u + ahead, 1);
    one(u, LANES);
  }
  if (u < last) one(u, last - u);
}

// Columns [first, last) of A h, where a cut stands for A = 0.
JAXRNN_INLINE void linear_end(const Real* a, const Real* h, bool cut, Real* end, long first, long last) {
  for (long u = first; u < last; ++u) end[u] = cut ? 0 : a[u] * h[u];
}

inline void linear_columns(const LinearProblem& p, Range columns) {
  constexpr long AHEAD = 512;  // floats, of the columns at hand
  const long group = p.cut ? p.columns / p.cut_groups : p.columns, first_group = columns.begin / group;
  const long rows = (AHEAD + columns.size() - 1) / columns.size();
  const long ahead = (p.reverse ? -rows : rows) * p.columns;
  // The coefficients that step k multiplies by: its own, or if shifted those of the step before, which the first lacks.
  auto run = [&](long k, auto part) {
    const long t = p.reverse ? p.steps - 1 - k : k;
    const Real* a = k < 0 ? nullptr : p.a + (p.a_steps == 1 ? 0 : t) * p.columns;
    const uint8_t* cut = !p.cut || k < 0 ? nullptr : p.cut + (p.cut_steps == 1 ? 0 : t) * p.cut_groups;
    for (long g = first_group; g * group < columns.end; ++g)
      part(a, cut && cut[g], std::max(columns.begin, g * group), std::min(columns.end, (g + 1) * group));
  };
  const Real* before = p.h;
  for (long k = 0; k < p.steps; ++k) {
    const long t = p.reverse ? p.steps - 1 - k : k;
    Real* hs = p.hs + t * p.columns;
    run(p.shifted ? k - 1 : k, [&](const Real* a, bool cut, long first, long last) {
      linear_step(a, before, p.b + t * p.columns, cut, hs, first, last, ahead);
    });
    before = hs;
  }
  if (p.shifted && p.steps)
    run(p.steps - 1, [&](const Real* a, bool cut, long first, long last) {
      linear_end(a, before, cut, p.last, first, last);
    });
  else std::memcpy(p.last + columns.begin, before + columns.begin, columns.size() * sizeof(Real));
}

inline void run_linear(const LinearProblem& p, int threads) {
  constexpr long PAIR = 32, BLOCK = 1 << 12;  // floats of two cache lines, fetched together; of a step that stays there
  const long pairs = (p.columns + PAIR - 1) / PAIR;
  const int parts = static_cast<int>(std::min<long>(p.steps * p.columns < 20000 ? 1 : threads, std::max(pairs, 1l)));
  auto part = [&](int k) {
    const Range own = share(pairs, parts, k);
    const long end = std::min(own.end * PAIR, p.columns);
    for (long begin = own.begin * PAIR; begin < end; begin += BLOCK)
      linear_columns(p, {begin, std::min(begin + BLOCK, end)});
  };
  auto all = [&](const auto& work) {
    if (parts > 1 && Pool::share(parts, work)) return;
    for (int k = 0; k < parts; ++k) work(k);
  };
  all(part);
}
