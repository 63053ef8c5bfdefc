// Linear recurrences of single units, h' = f h + b, with the gates that f and b come from:
//
//     minGRU     h' = (1 − i) h + i n,   i = σ(u_0), n = g(u_1)
//     minLSTM    h' = f h + (1 − f) n,   f = σ(log σ(u_0) − log σ(u_1)), n = g(u_2)
//     HGRN       h' = f h + (1 − f) n,   f = γ + (1 − γ) σ(u_0), n = silu(u_1)
//     SRU        h' = f h + (1 − f) n,   n = u_0, f = σ(u_1);        y = r φ(h') + (1 − r) x, r = σ(u_2)
//     QRNN       h' = f h + (1 − f) n,   n = tanh(u_0), f = σ(u_1);  y = σ(u_2) h'
//     RG-LRU     h' = a h + √(1 − a²) i x,   a = exp(c σ(u_0)), i = σ(u_1); no root at the first step of a sequence
//
// where u are sums, to which a bias is added here, and g(v) = v + 1/2 for v ≥ 0, else σ(v). A lane is a unit, and some
// lanes walk over time: they read their sums once, and the backward pass computes the gates again.

// What a step reads of LANES units: sums, x, and the c of the RG-LRU; whether the sequence has begun, and γ.
template <long SUMS>
struct Sums {
  Vec u[SUMS], x, rate;
  bool begun;
  float bound;
};

// The cotangents of these.
template <long SUMS>
struct SumsBack {
  Vec u[SUMS], x{}, rate{};
};

// The gates of a unit that averages, and how its cotangents go on: from d_f = d (h − n) and d_n = d (1 − f).
struct Average {
  Vec f, i, n;  // f + i = 1
  JAXRNN_INLINE Vec next(Vec h) const { return f * h + i * n; }
  JAXRNN_INLINE Vec sum_of_gate(Vec h, Vec d) const { return d * (h - n) * f * i; }  // of the sum v in f = σ(v)
};

template <bool POSITIVE>
JAXRNN_INLINE Vec candidate(Vec v) {
  return !POSITIVE ? v : v < 0.0f ? logistic(v) : v + 0.5f;
}
template <bool POSITIVE>
JAXRNN_INLINE Vec candidate_slope(Vec v, Vec n) {
  return !POSITIVE ? splat(1.0f) : v < 0.0f ? n * (1.0f - n) : splat(1.0f);
}

template <bool POSITIVE>
struct MinGru : Average {
  static constexpr long SUMS = 2;
  static constexpr bool READS = false;  // whether y is not h
  JAXRNN_INLINE explicit MinGru(const Sums<2>& s) {
    i = logistic(s.u[0]);
    f = 1.0f - i;
    n = candidate<POSITIVE>(s.u[1]);
  }
  JAXRNN_INLINE Vec back(const Sums<2>& s, Vec h, Vec d, SumsBack<2>& to) const {
    to.u[0] = -sum_of_gate(h, d);
    to.u[1] = d * i * candidate_slope<POSITIVE>(s.u[1], n);
    return d * f;
  }
};

template <bool POSITIVE>
struct MinLstm : Average {
  static constexpr long SUMS = 3;
  static constexpr bool READS = false;
  Vec falls, rises;  // σ(−u) of the sums of f and i
  JAXRNN_INLINE explicit MinLstm(const Sums<3>& s) {
    const Softplus forget(-s.u[0]), input(-s.u[1]);
    const Vec odds = input.y - forget.y, e = decay_of(-absolute(odds));
    const Vec more = divide(splat(1.0f), 1.0f + e), less = e * more;
    falls = forget.slope, rises = input.slope;
    f = odds < 0.0f ? less : more;
    i = odds < 0.0f ? more : less;
    n = candidate<POSITIVE>(s.u[2]);
  }
  JAXRNN_INLINE Vec back(const Sums<3>& s, Vec h, Vec d, SumsBack<3>& to) const {
    const Vec d_odds = sum_of_gate(h, d);
    to.u[0] = d_odds * falls;
    to.u[1] = -d_odds * rises;
    to.u[2] = d * i * candidate_slope<POSITIVE>(s.u[2], n);
    return d * f;
  }
};

struct Hgrn : Average {
  static constexpr long SUMS = 2;
  static constexpr bool READS = false;
  Vec gate, sigma;
  JAXRNN_INLINE explicit Hgrn(const Sums<2>& s) : gate(logistic(s.u[0])), sigma(logistic(s.u[1])) {
    f = s.bound + (1.0f - s.bound) * gate;
    i = (1.0f - s.bound) * (1.0f - gate);
    n = s.u[1] * sigma;
  }
  JAXRNN_INLINE Vec back(const Sums<2>& s, Vec h, Vec d, SumsBack<2>& to) const {
    to.u[0] = d * (h - n) * i * gate;
    to.u[1] = d * i * sigma * (1.0f + s.u[1] * (1.0f - sigma));
    return d * f;
  }
};

template <bool TANH>
struct Sru : Average {
  static constexpr long SUMS = 3;
  static constexpr bool READS = true;
  Vec r;
  JAXRNN_INLINE explicit Sru(const Sums<3>& s) : r(logistic(s.u[2])) {
    n = s.u[0];
    f = logistic(s.u[1]);
    i = 1.0f - f;
  }
  JAXRNN_INLINE Vec read(const Sums<3>& s, Vec h) const { return r * (TANH ? tangent(h) : h) + (1.0f - r) * s.x; }
  // The cotangent of h from that of y.
  JAXRNN_INLINE Vec read_back(const Sums<3>& s, Vec h, Vec d_y, SumsBack<3>& to) const {
    const Vec squashed = TANH ? tangent(h) : h;
    to.u[2] = d_y * (squashed - s.x) * r * (1.0f - r);
    to.x = d_y * (1.0f - r);
    return d_y * r * (TANH ? 1.0f - squashed * squashed : splat(1.0f));
  }
  JAXRNN_INLINE Vec back(const Sums<3>&, Vec h, Vec d, SumsBack<3>& to) const {
    to.u[0] = d * i;
    to.u[1] = sum_of_gate(h, d);
    return d * f;
  }
};

struct Qrnn : Average {
  static constexpr long SUMS = 3;
  static constexpr bool READS = true;
  Vec o;
  JAXRNN_INLINE explicit Qrnn(const Sums<3>& s) : o(logistic(s.u[2])) {
    n = tangent(s.u[0]);
    f = logistic(s.u[1]);
    i = 1.0f - f;
  }
  JAXRNN_INLINE Vec read(const Sums<3>&, Vec h) const { return o * h; }
  JAXRNN_INLINE Vec read_back(const Sums<3>&, Vec h, Vec d_y, SumsBack<3>& to) const {
    to.u[2] = d_y * h * o * (1.0f - o);
    return d_y * o;
  }
  JAXRNN_INLINE Vec back(const Sums<3>&, Vec h, Vec d, SumsBack<3>& to) const {
    to.u[0] = d * i * (1.0f - n * n);
    to.u[1] = sum_of_gate(h, d);
    return d * f;
  }
};

struct RgLru {
  static constexpr long SUMS = 2;
  static constexpr bool READS = false;
  Vec r, i, a, square, scale, in;
  JAXRNN_INLINE explicit RgLru(const Sums<2>& s) : r(logistic(s.u[0])), i(logistic(s.u[1])), a(decay_of(s.rate * r)) {
    square = (1.0f - a) * (1.0f + a);
    scale = s.begun ? root(square) : splat(1.0f);
    in = i * s.x;
  }
  JAXRNN_INLINE Vec next(Vec h) const { return a * h + scale * in; }
  JAXRNN_INLINE Vec back(const Sums<2>& s, Vec h, Vec d, SumsBack<2>& to) const {
    Vec d_a = d * h;
    if (s.begun) {  // the derivative of the root is at most 1000
      const Vec least = splat(1e-6f), four = 4.0f * square;
      d_a -= d * in * 2.0f * a / root(four < least ? least : four);
    }
    const Vec d_in = d * scale, d_power = d_a * a;
    to.rate = d_power * r;
    to.u[0] = d_power * s.rate * r * (1.0f - r);
    to.u[1] = d_in * s.x * i * (1.0f - i);
    to.x = d_in * i;
    return d * a;
  }
};

template <class F>
inline void with_unit(Unit unit, const F& f) {
  switch (unit) {
    case Unit::kMinGru: return f((MinGru<true>*)nullptr);
    case Unit::kMinGruSigned: return f((MinGru<false>*)nullptr);
    case Unit::kMinLstm: return f((MinLstm<true>*)nullptr);
    case Unit::kMinLstmSigned: return f((MinLstm<false>*)nullptr);
    case Unit::kHgrn: return f((Hgrn*)nullptr);
    case Unit::kSru: return f((Sru<false>*)nullptr);
    case Unit::kSruTanh: return f((Sru<true>*)nullptr);
    case Unit::kQrnn: return f((Qrnn*)nullptr);
    case Unit::kRgLru: return f((RgLru*)nullptr);
  }
}

// Some units of one row, at most a block of them.
template <class Gates>
class Units {
 public:
  static constexpr long BLOCK = 32, V = BLOCK / LANES, SUMS = Gates::SUMS;  // units of two lines of cache, and vectors

  Units(const ElementwiseProblem& p, long row, long first) : p(p), row(row), first(first) {
    const long member = row / (p.rows / p.members);
    for (long v = 0; v < V; ++v) {
      for (long s = 0; s < SUMS; ++s)
        bias[v][s] = p.b ? load(p.b + (member * SUMS + s) * p.units + unit(v), lanes(v)) : Vec{};
      rate[v] = p.rate ? load(p.rate + member * p.units + unit(v), lanes(v)) : Vec{};
    }
  }

  void forward() const {
    Vec h[V];
    take(h, p.h + row * p.units);
    for (long k = 0; k < p.steps; ++k) {
      const long t = time(k);
      fetch(k + AHEAD);
      if (!valid(t)) {
        const Vec none[V] = {};
        give(p.ys + row_of(t), none);
        if (p.hs) give(p.hs + row_of(t), h);
        continue;
      }
      if (starts(t)) fresh(h);
      Vec y[V];
      for (long v = 0; v < V; ++v) {
        const Sums<SUMS> sums = read(t, v);
        const Gates gates(sums);
        h[v] = gates.next(h[v]);
        if constexpr (Gates::READS) y[v] = gates.read(sums, h[v]);
        else y[v] = h[v];
      }
      give(p.ys + row_of(t), y);
      if (p.hs) give(p.hs + row_of(t), h);
    }
    give(p.last + row * p.units, h);
  }

  void backward(const ElementwiseGradient& g) const {
    const float* hs = p.hs ? p.hs : p.ys;
    Vec d[V], d_fresh[V] = {}, d_rate[V] = {}, d_bias[V][SUMS] = {};
    take(d, g.d_last + row * p.units);
    for (long k = p.steps - 1; k >= 0; --k) {
      const long t = time(k);
      fetch(k - AHEAD);
      if (k >= AHEAD) prefetch(hs + at(time(k - AHEAD)), BLOCK), prefetch(g.d_ys + at(time(k - AHEAD)), BLOCK);
      if (!valid(t)) {
        for (long v = 0; v < V; ++v) {
          for (long s = 0; s < SUMS; ++s) store(g.d_u + sum(t, s, v), Vec{}, lanes(v));
          if (g.d_x) store(g.d_x + at(t) + v * LANES, Vec{}, lanes(v));
        }
        continue;
      }
      Vec before[V];
      if (starts(t)) fresh(before);
      else take(before, k == 0 ? p.h + row * p.units : hs + row_of(time(k - 1)));
      for (long v = 0; v < V; ++v) {
        const Sums<SUMS> sums = read(t, v);
        const Gates gates(sums);
        SumsBack<SUMS> back;
        const Vec d_y = load(g.d_ys + at(t) + v * LANES, lanes(v));
        if constexpr (Gates::READS) d[v] += gates.read_back(sums, gates.next(before[v]), d_y, back);
        else d[v] += d_y;
        d[v] = gates.back(sums, before[v], d[v], back);
        for (long s = 0; s < SUMS; ++s) {
          store(g.d_u + sum(t, s, v), back.u[s], lanes(v));
          d_bias[v][s] += back.u[s];
        }
        d_rate[v] += back.rate;
        if (g.d_x) store(g.d_x + at(t) + v * LANES, back.x, lanes(v));
        if (starts(t)) d_fresh[v] += d[v], d[v] = Vec{};
      }
    }
    give(g.d_h + row * p.units, d);
    if (g.d_fresh) give(g.d_fresh + row * p.units, d_fresh);
    if (g.d_rate) give(g.d_rate + row * p.units, d_rate);
    for (long v = 0; g.d_b && v < V; ++v)
      for (long s = 0; s < SUMS; ++s) store(g.d_b + (row * SUMS + s) * p.units + unit(v), d_bias[v][s], lanes(v));
  }

 private:
  static constexpr long AHEAD = 4;  // steps, which lie too far apart for the processor to guess what comes next

  const ElementwiseProblem& p;
  const long row, first;
  Vec bias[V][SUMS], rate[V];

  long unit(long v) const { return first + v * LANES; }
  long lanes(long v) const { return std::max(0l, std::min(LANES, p.units - unit(v))); }
  long time(long k) const { return p.reverse ? p.steps - 1 - k : k; }
  long place(long t) const { return t * p.rows + row; }
  bool valid(long t) const { return !p.valid || p.valid[place(t)]; }
  bool starts(long t) const { return p.start && p.start[place(t)]; }
  long row_of(long t) const { return place(t) * p.units; }
  long at(long t) const { return row_of(t) + first; }
  long sum(long t, long s, long v) const { return (place(t) * SUMS + s) * p.units + unit(v); }

  // The block, of a row of units; what is absent is 0.
  void take(Vec* to, const float* from) const {
    for (long v = 0; v < V; ++v) to[v] = from ? load(from + unit(v), lanes(v)) : Vec{};
  }
  void fresh(Vec* to) const { take(to, p.fresh ? p.fresh + row * p.units : nullptr); }
  void give(float* to, const Vec* from) const {
    for (long v = 0; v < V; ++v) store(to + unit(v), from[v], lanes(v));
  }

  JAXRNN_INLINE Sums<SUMS> read(long t, long v) const {
    Sums<SUMS> sums;
    for (long s = 0; s < SUMS; ++s) sums.u[s] = load(p.u + sum(t, s, v), lanes(v)) + bias[v][s];
    sums.x = p.x ? load(p.x + at(t) + v * LANES, lanes(v)) : Vec{};
    sums.rate = rate[v];
    sums.begun = !p.begun || p.begun[place(t)];
    sums.bound = p.bound;
    return sums;
  }

  JAXRNN_INLINE void fetch(long k) const {
    if (k < 0 || k >= p.steps) return;
    const long t = time(k);
    for (long s = 0; s < SUMS; ++s) prefetch(p.u + sum(t, s, 0), BLOCK);
    if (p.x) prefetch(p.x + at(t), BLOCK);
  }
};

// f(units) of every block of every row, where `sums` numbers are read of a unit.
template <class F>
inline void each_block(const ElementwiseProblem& p, int threads, const F& f) {
  with_unit(p.unit, [&](auto* gates) {
    using Own = Units<std::remove_pointer_t<decltype(gates)>>;
    const long blocks = (p.units + Own::BLOCK - 1) / Own::BLOCK;
    in_turns(p.rows * blocks, p.rows * p.units * p.steps * 8, threads,
             [&](long task) { f(Own(p, task / blocks, task % blocks * Own::BLOCK)); });
  });
}

inline void run_elementwise(const ElementwiseProblem& p, int threads) {
  each_block(p, threads, [](const auto& units) { units.forward(); });
}

inline void run_elementwise_backward(const ElementwiseProblem& p, const ElementwiseGradient& g, int threads) {
  each_block(p, threads, [&](const auto& units) { units.backward(g); });
}
