// A single step of a few rows: the weights are read once, as they lie, row after row. Memory is what takes the time, and
// wide vectors would slow the processor down for all that the caller does between two steps: half as wide they are as
// fast, and a quarter where the weights stay in the cache.

template <Kind K>
class OneStep : Cell<K> {
 public:
  using Cell<K>::GATES, Cell<K>::LSTM, Cell<K>::AFTER, Cell<K>::BEFORE;

  OneStep(const Sizes& n, const Forward& p, int threads)
      : n_(n), p_(p), blocks_((n.units + LANES - 1) / LANES), width_(blocks_ * LANES), threads_(threads) {
    Scratch scratch(n.rows * (SUMS_KEPT + 1) * width_ + 64);
    sums_ = scratch.take(n.rows * SUMS_KEPT * width_);
    reset_ = scratch.take(n.rows * width_);
  }

  void run() {
    in_parts([&](Range units) {
      for (long r = 0; r < n_.rows; ++r) {
        products(r, units);
        if (!BEFORE) finish(r, units);
      }
    });
    if (BEFORE)
      in_parts([&](Range units) {
        for (long r = 0; r < n_.rows; ++r) {
          add(reset_ + r * width_, n_.units, p_.w_h, 2, 3, units, row_sums(r), 0);
          finish(r, units);
        }
      });
  }

 private:
  static constexpr long SUMS_KEPT = GATES + 1;  // of a GRU, u_n and v_n are two

  template <class Work>
  void in_parts(const Work& work) const {
    auto part = [&](int k) {
      const Range blocks = share(blocks_, threads_, k);
      work(Range{blocks.begin * LANES, std::min(blocks.end * LANES, n_.units)});
    };
    if (threads_ > 1 && Pool::share(threads_, part)) return;
    for (int k = 0; k < threads_; ++k) part(k);
  }

  float* row_sums(long row) const { return sums_ + row * SUMS_KEPT * width_; }

  void products(long row, Range units) const {
    const long D = n_.inputs, H = n_.units;
    const float* h = p_.h + row * H;
    float* a = row_sums(row);
    begin(a, units);
    add(p_.xs + row * D, D, p_.w_x, 0, GATES, units, a, 0);
    add(h, H, p_.w_h, 0, BEFORE ? 2 : GATES, units, a, AFTER ? 1 : 0);
    for (long u = units.begin; BEFORE && u < units.end; u += LANES)
      store(reset_ + row * width_ + u, logistic(load(a + u)) * load(h + u, std::min(LANES, H - u)));
  }

  void begin(float* a, Range units) const {
    for (long gate = 0; gate < SUMS_KEPT; ++gate)
      for (long u = units.begin; u < units.end; u += LANES) {
        const long n = std::min(LANES, n_.units - u);
        const float* b = gate < GATES ? (p_.b ? p_.b + gate * n_.units : nullptr) : AFTER ? p_.b_hn : nullptr;
        store(a + gate * width_ + u, b ? load(b + u, n) : Vec{});
      }
  }

  // a += x w in some gates. The last one of them goes to a place of its own, `apart` further, if that is not 0.
  void add(const float* x, long length, const float* w, long first, long last, Range units, float* a, long apart) const {
    const long stride = GATES * n_.units;
    constexpr long AT_ONCE = 8;
    const Range whole{units.begin / LANES, units.end / LANES};  // a last vector may be a part of one
    for (long k = 0; k < length; k += AT_ONCE) {
      const long count = std::min(AT_ONCE, length - k);
      for (long gate = first; gate < last; ++gate) {
        float* sums = a + (gate + (gate == last - 1 ? apart : 0)) * width_;
        const float* from = w + k * stride + gate * n_.units;
        tiles<8>(whole, [&](auto vectors, long v) {
          add_rows<decltype(vectors)::value>(x + k, count, from + v * LANES, stride, sums + v * LANES);
        });
        if (const long u = whole.end * LANES; u < units.end)
          for (long i = 0; i < count; ++i)
            store(sums + u, load(sums + u) + x[k + i] * load(from + i * stride + u, units.end - u));
      }
    }
  }

  template <int N>
  JAXRNN_INLINE static void add_rows(const float* x, long count, const float* w, long stride, float* sums) {
    Vec s[N];
    for (int v = 0; v < N; ++v) s[v] = load(sums + v * LANES);
    for (long i = 0; i < count; ++i, w += stride) {
      const Vec factor = splat(x[i]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) s[v] += factor * load(w + v * LANES);
    }
    for (int v = 0; v < N; ++v) store(sums + v * LANES, s[v]);
  }

  void finish(long row, Range units) const {
    for (long u = units.begin; u < units.end; u += LANES) finish(row_sums(row) + u, row, u);
  }

  void finish(const float* a, long row, long unit) const {
    const long H = n_.units, n = std::min(LANES, H - unit), at = row * H + unit;
    Vec gates[1][GATES], y[1];
    for (long gate = 0; gate < GATES; ++gate) gates[0][gate] = load(a + gate * width_);
    if constexpr (LSTM) {
      Vec c[1] = {load(p_.c + at, n)};
      lstm<1>(gates, c, y);
      store(p_.last_c + at, c[0], n);
    } else if constexpr (AFTER) {
      const Vec u_n[1] = {gates[0][2]}, h[1] = {load(p_.h + at, n)};
      Vec candidate[1];
      gates[0][2] = load(a + 3 * width_);
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
  const long blocks_, width_;
  const int threads_;
  float *sums_, *reset_;
};

template <Kind K>
inline void run_step(const Sizes& n, const Forward& p, int threads) {
  OneStep<K>(n, p, threads).run();
}

inline void enter_steps(void (**steps)(const Sizes&, const Forward&, int threads)) {
  each_kind([&](auto kind) { steps[static_cast<int>(decltype(kind)::value)] = run_step<decltype(kind)::value>; });
}
