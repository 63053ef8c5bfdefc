// A single step of a few rows: the weights are read once, as they lie, row after row, and each thread reads rows of its
// own. Memory is what takes the time, and wide vectors would slow the processor down for all that the caller does
// between two steps: half as wide they are as fast, and a quarter where the weights stay in the cache. Of weights that
// do not, every other step begins with what the last one read last. Sums of a part of the rows are kept by themselves,
// so that no order changes them.

template <Kind K>
class OneStep : Cell<K> {
 public:
  using Cell<K>::GATES, Cell<K>::LSTM, Cell<K>::AFTER, Cell<K>::BEFORE;

  OneStep(const Sizes& n, const Forward& p, int threads)
      : n_(n), p_(p), threads_(threads), each_(std::clamp((n.inputs + n.units) * GATES * n.units / (PART * threads), 1L, 8L)) {
    thread_local bool last = false;
    backwards_ = last = !last;
    Scratch scratch(parts() * n.rows * sums_size() + n.rows * n.units + 64);
    sums_ = scratch.take(parts() * n.rows * sums_size());
    reset_ = scratch.take(n.rows * n.units);
  }

  void run() {
    const long D = n_.inputs, H = n_.units;
    in_parts(D + H, [&](long part, Range k) {
      begin(part);
      add(part, p_.xs, p_.w_x, {std::min(k.begin, D), std::min(k.end, D)}, D, {0, GATES * H}, 0);
      add(part, p_.h, p_.w_h, {std::max(k.begin, D) - D, std::max(k.end, D) - D}, H, {0, (BEFORE ? 2 : GATES) * H},
          AFTER ? GATES * H : 0);
    });
    if (BEFORE) {
      each_vector([&](long row, long u, long n) {
        const long at = row * H + u;
        store(reset_ + at, logistic(sum(row, u, n)) * load(p_.h + at, n), n);
      });
      in_parts(H, [&](long part, Range k) { add(part, reset_, p_.w_h, k, H, {2 * H, 3 * H}, 0); });
    }
    each_vector([&](long row, long u, long n) { finish(row, u, n); });
  }

 private:
  static constexpr long PART = 1 << 17;  // weights
  long parts() const { return threads_ * each_; }

  // Of a row and a part. A GRU that resets after its product keeps those of x and of h apart.
  long sums_size() const { return (AFTER ? 2 : 1) * GATES * n_.units; }
  Real* sums(long part, long row) const { return sums_ + (part * n_.rows + row) * sums_size(); }

  template <class Work>
  void in_parts(long count, const Work& work) const {
    auto thread = [&](int k) {
      for (long i = 0; i < each_; ++i) {
        const long part = k * each_ + (backwards_ ? each_ - 1 - i : i);
        work(part, share(count, parts(), part));
      }
    };
    if (threads_ > 1 && Pool::share(threads_, thread)) return;
    for (int k = 0; k < threads_; ++k) thread(k);
  }

  template <class Work>
  void each_vector(const Work& work) const {
    for (long row = 0; row < n_.rows; ++row)
      for (long u = 0; u < n_.units; u += LANES) work(row, u, std::min(LANES, n_.units - u));
  }

  void begin(long part) const {
    const long size = sums_size(), H = n_.units;
    for (long row = 0; row < n_.rows; ++row) {
      Real* a = sums(part, row);
      std::fill(a, a + size, 0.0f);
      if (part == 0 && p_.b) std::copy(p_.b, p_.b + GATES * H, a);
      if (part == 0 && p_.b_hn) std::copy(p_.b_hn, p_.b_hn + H, a + size - H);
    }
  }

  // The sums of a part, from `to` on, += x w, for rows k of w, and columns of it. x is (rows, length).
  void add(long part, const Real* x, const Real* w, Range k, long length, Range columns, long to) const {
    constexpr long AT_ONCE = 8;
    const long stride = GATES * n_.units, whole = columns.size() / LANES, rest = columns.size() % LANES;
    for (long first = k.begin; first < k.end; first += AT_ONCE)
      for (long row = 0; row < n_.rows; ++row) {
        const long count = std::min(AT_ONCE, k.end - first);
        const Real *factors = x + row * length + first, *from = w + first * stride + columns.begin;
        Real* a = sums(part, row) + to + columns.begin;
        tiles<8>({0, whole}, [&](auto vectors, long v) {
          add_rows<decltype(vectors)::value>(factors, count, from + v * LANES, stride, a + v * LANES);
        });
        for (long i = 0; rest && i < count; ++i) {
          Real* last = a + whole * LANES;
          store(last, load(last, rest) + factors[i] * load(from + i * stride + whole * LANES, rest), rest);
        }
      }
  }

  template <int N>
  JAXRNN_INLINE static void add_rows(const Real* x, long count, const Real* w, long stride, Real* sums) {
    Vec s[N];
    for (int v = 0; v < N; ++v) s[v] = load(sums + v * LANES);
    for (long i = 0; i < count; ++i, w += stride) {
      const Vec factor = splat(x[i]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) s[v] += factor * load(w + v * LANES);
    }
    for (int v = 0; v < N; ++v) store(sums + v * LANES, s[v]);
  }

  // Of all parts.
  JAXRNN_INLINE Vec sum(long row, long at, long n) const {
    Vec s = load(sums(0, row) + at, n);
    for (long part = 1; part < parts(); ++part) s += load(sums(part, row) + at, n);
    return s;
  }

  JAXRNN_INLINE void finish(long row, long u, long n) const {
    const long H = n_.units, at = row * H + u;
    Vec gates[1][GATES], y[1];
    for (long gate = 0; gate < GATES; ++gate) gates[0][gate] = sum(row, gate * H + u, n);
    if constexpr (LSTM) {
      Vec c[1] = {load(p_.c + at, n)};
      lstm<1>(gates, c, y);
      store(p_.last_c + at, c[0], n);
    } else if constexpr (AFTER) {
      const Vec u_n[1] = {gates[0][2]}, h[1] = {load(p_.h + at, n)};
      Vec candidate[1];
      for (long gate = 0; gate < GATES; ++gate) {
        const Vec v = sum(row, (GATES + gate) * H + u, n);
        gates[0][gate] = gate == 2 ? v : gates[0][gate] + v;
      }
      gru<1>(gates, u_n, h, candidate, y);
    } else if constexpr (BEFORE) {
      const Vec z = logistic(gates[0][1]);
      y[0] = (1.0f - z) * tangent(gates[0][2]) + z * load(p_.h + at, n);
    } else {
      elman<K, 1>(gates[0]);
      y[0] = gates[0][0];
    }
    store(p_.ys + at, y[0], n);
    store(p_.last_h + at, y[0], n);
  }

  const Sizes n_;
  const Forward p_;
  const int threads_;
  const long each_;  // parts of a thread
  bool backwards_;
  Real *sums_, *reset_;
};

template <Kind K>
inline void run_step(const Sizes& n, const Forward& p, int threads) {
  OneStep<K>(n, p, threads).run();
}

inline void enter_steps(void (**steps)(const Sizes&, const Forward&, int threads)) {
  each_kind([&](auto kind) { steps[static_cast<int>(decltype(kind)::value)] = run_step<decltype(kind)::value>; });
}
