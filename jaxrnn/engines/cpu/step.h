// A single step of a few rows: the weights are read once, as they lie, row after row.

template <Kind K>
class OneStep : Cell<K> {
 public:
  using Cell<K>::GATES, Cell<K>::LSTM, Cell<K>::AFTER, Cell<K>::BEFORE;

  static bool serves(const Sizes& n, const Forward& p) {
    return n.steps == 1 && n.rows <= 2 && !p.kept && !p.cs && !p.valid && !p.start;
  }

  OneStep(const Sizes& n, const Forward& p, int threads)
      : n_(n), p_(p), blocks_((n.units + LANES - 1) / LANES), width_(blocks_ * LANES),
        team_{(n.inputs + n.units) * GATES * n.units < ALONE ? 1 : threads, false} {
    Scratch scratch(n.rows * (SUMS_KEPT + 1) * width_ + 64);
    sums_ = scratch.take(n.rows * SUMS_KEPT * width_);
    reset_ = scratch.take(n.rows * width_);
  }

  void run() {
    in_team(team_, [&](const Worker& worker) {
      const Range blocks = worker.part(blocks_);
      const Range units{blocks.begin * LANES, std::min(blocks.end * LANES, n_.units)};
      const long D = n_.inputs, H = n_.units, G = GATES * H;
      for (long r = 0; r < n_.rows; ++r) {
        float* a = sums_ + r * SUMS_KEPT * width_;
        begin(a, units);
        add(p_.xs + r * D, D, p_.w_x, G, 0, GATES, units, a, 0);
        if (AFTER) add(p_.h + r * H, H, p_.w_h, G, 0, 3, units, a, 1);
        else add(p_.h + r * H, H, p_.w_h, G, 0, BEFORE ? 2 : GATES, units, a, 0);
        if constexpr (BEFORE)
          for (long u = units.begin; u < units.end; u += LANES) {
            const long n = std::min(LANES, H - u);
            store(reset_ + r * width_ + u, logistic(load(a + u)) * load(p_.h + r * H + u, n));
          }
      }
      if (BEFORE) worker.barrier.wait();
      for (long r = 0; r < n_.rows; ++r) {
        float* a = sums_ + r * SUMS_KEPT * width_;
        if (BEFORE) add(reset_ + r * width_, H, p_.w_h, G, 2, 3, units, a, 0);
        for (long u = units.begin; u < units.end; u += LANES) finish(a + u, r, u);
      }
    });
  }

 private:
  static constexpr long SUMS_KEPT = GATES + 1;  // of a GRU, u_n and v_n are two
  static constexpr long ALONE = 600000;         // multiplications below which waking another thread takes longer

  void begin(float* a, Range units) const {
    for (long gate = 0; gate < SUMS_KEPT; ++gate)
      for (long u = units.begin; u < units.end; u += LANES) {
        const long n = std::min(LANES, n_.units - u);
        const float* b = gate < GATES ? (p_.b ? p_.b + gate * n_.units : nullptr) : AFTER ? p_.b_hn : nullptr;
        store(a + gate * width_ + u, b ? load(b + u, n) : Vec{});
      }
  }

  // a += x w in some gates. The last one of them goes to a place of its own, `apart` further, if that is not 0.
  void add(const float* x, long length, const float* w, long stride, long first, long last, Range units, float* a,
           long apart) const {
    constexpr long AT_ONCE = 8;
    for (long k = 0; k < length; k += AT_ONCE) {
      const long count = std::min(AT_ONCE, length - k);
      for (long gate = first; gate < last; ++gate) {
        float* sums = a + (gate + (gate == last - 1 ? apart : 0)) * width_;
        const float* from = w + k * stride + gate * n_.units;
        for (long u = units.begin; u < units.end; u += LANES) {
          const long n = std::min(LANES, n_.units - u);
          Vec even = load(sums + u), odd{};
          if (count == AT_ONCE && n == LANES) {
#pragma GCC unroll 8
            for (long i = 0; i < AT_ONCE; i += 2) {
              even += x[k + i] * load(from + i * stride + u);
              odd += x[k + i + 1] * load(from + (i + 1) * stride + u);
            }
          } else {
            for (long i = 0; i < count; ++i) even += x[k + i] * load(from + i * stride + u, n);
          }
          store(sums + u, even + odd);
        }
      }
    }
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
  const Team team_;
  float *sums_, *reset_;
};
