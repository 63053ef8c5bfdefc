// The units of linear recurrences, h' = f h + b, with the gates that f and b come from:
//
//     minGRU     h' = (1 − i) h + i n,   i = σ(u_0), n = g(u_1)
//     minLSTM    h' = f h + (1 − f) n,   f = σ(u_0) / (σ(u_0) + σ(u_1)), n = g(u_2)
//     HGRN       h' = f h + (1 − f) n,   f = γ + (1 − γ) σ(u_0), n = silu(u_1)
//     SRU        h' = f h + (1 − f) n,   n = u_0, f = σ(u_1);        y = r φ(h') + (1 − r) s, r = σ(u_2), s = x or u_3
//     QRNN       h' = f h + (1 − f) n,   n = tanh(u_0), f = σ(u_1);  y = σ(u_2) h'
//     RG-LRU     h' = a h + √(1 − a²) i x,   a = exp(θ σ(u_0)), i = σ(u_1); no root at the first step of a sequence
//     LRU        h' = λ h + u,           complex numbers, of which θ, u and h hold both parts;  y = [Re h', Im h'] w_y
//
// where u are sums, with their bias, and g(v) = v + 1/2 for v ≥ 0, else σ(v). A lane is a unit.

// What a step reads of LANES units: sums, and x; numbers of every step; whether the sequence has begun, and γ.
template <int SUMS>
struct Sums {
  Vec u[SUMS], x, theta[2];
  bool begun;
  Real bound;
};

// The cotangents of these.
template <int SUMS>
struct SumsBack {
  Vec u[SUMS], x{}, theta[2]{};
};

// A unit has STATES numbers, reads THETA numbers at every step, may read its x (then it has as many inputs as units), and
// may give another y than its state, alone or by a product.
template <int sums, int states = 1, int theta = 0, bool reads_x = false, bool gives_y = false, bool projects = false>
struct UnitKind {
  static constexpr int SUMS = sums, STATES = states, THETA = theta;
  static constexpr bool READS_X = reads_x, GIVES_Y = gives_y, PROJECTS = projects, LOGS = false;
};

// The gates of a unit that averages, and how its cotangents go on: from d_f = d (h − n) and d_n = d (1 − f).
struct Average {
  Vec f, i, n;  // f + i = 1
  JAXRNN_INLINE void next(Vec* h) const { h[0] = f * h[0] + i * n; }
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
struct MinGru : UnitKind<2>, Average {
  JAXRNN_INLINE explicit MinGru(const Sums<2>& s) {
    i = logistic(s.u[0]);
    f = 1.0f - i;
    n = candidate<POSITIVE>(s.u[1]);
  }
  static JAXRNN_INLINE Vec odds(const Sums<2>& s) { return -s.u[0]; }  // log(f / i)
  JAXRNN_INLINE void back(const Sums<2>& s, const Vec* h, Vec* d, SumsBack<2>& to) const {
    to.u[0] = -sum_of_gate(h[0], d[0]);
    to.u[1] = d[0] * i * candidate_slope<POSITIVE>(s.u[1], n);
    d[0] *= f;
  }
};

template <bool POSITIVE>
struct MinLstm : UnitKind<3>, Average {
  Vec falls, rises;  // σ(−u) of the sums of f and i
  JAXRNN_INLINE explicit MinLstm(const Sums<3>& s) {
    // f / i = σ(v) / σ(w), where σ(v) = e^min(v, 0) / (1 + e^−|v|), and the greater exponential divides both.
    const Vec v = s.u[0], w = s.u[1], zero{}, one = splat(1.0f);
    const Vec low = v < w ? v : w, high = v < w ? w : v;
    const Vec less = decay_of((low < zero ? low : zero) - (high < zero ? high : zero));
    const Vec e_v = decay_of(-absolute(v)), e_w = decay_of(-absolute(w)), more_v = one + e_v, more_w = one + e_w;
    const Vec a = (v < w ? less : one) * more_w, b = (v < w ? one : less) * more_v;
    f = divide(a, a + b);
    i = divide(b, a + b);
    falls = divide(v < zero ? one : e_v, more_v);
    rises = divide(w < zero ? one : e_w, more_w);
    n = candidate<POSITIVE>(s.u[2]);
  }
  static JAXRNN_INLINE Vec odds(const Sums<3>& s) { return Softplus(-s.u[1]).y - Softplus(-s.u[0]).y; }
  JAXRNN_INLINE void back(const Sums<3>& s, const Vec* h, Vec* d, SumsBack<3>& to) const {
    const Vec d_odds = sum_of_gate(h[0], d[0]);
    to.u[0] = d_odds * falls;
    to.u[1] = -d_odds * rises;
    to.u[2] = d[0] * i * candidate_slope<POSITIVE>(s.u[2], n);
    d[0] *= f;
  }
};

// One that averages positive numbers, in two parts: the logarithm of what it has added, log(f s + i n) by the logarithms of
// all factors, and what is left of the state before, of any sign. Its cotangents are those of their sum.
template <class Unit>
struct InLogs : Unit {
  static constexpr bool LOGS = true;
  Vec kept, added;  // log f, log (i n)
  JAXRNN_INLINE explicit InLogs(const Sums<Unit::SUMS>& s) : Unit(s) {
    const Vec odds = Unit::odds(s), v = s.u[Unit::SUMS - 1], rest = log_of_more(-absolute(odds));
    const Vec n = v < 0.0f ? v - log_of_more(v) : logarithm((v < 0.0f ? Vec{} : v) + 0.5f);
    kept = (odds < 0.0f ? odds : Vec{}) - rest;
    added = n - (odds < 0.0f ? Vec{} : odds) - rest;
  }
  JAXRNN_INLINE void next(Vec* h) const {
    const Vec a = kept + h[0];
    h[0] = (a < added ? added : a) + log_of_more(-absolute(a - added));
    h[1] *= this->f;
  }
  static JAXRNN_INLINE void enter(Vec* h) { h[1] = h[0], h[0] = splat(static_cast<Real>(-1e30)); }
  static JAXRNN_INLINE Vec whole(const Vec* h) { return h[1] + exponential(h[0]); }
};

struct Hgrn : UnitKind<2>, Average {
  Vec gate, sigma;
  JAXRNN_INLINE explicit Hgrn(const Sums<2>& s) : gate(logistic(s.u[0])), sigma(logistic(s.u[1])) {
    f = s.bound + (1.0f - s.bound) * gate;
    i = (1.0f - s.bound) * (1.0f - gate);
    n = s.u[1] * sigma;
  }
  JAXRNN_INLINE void back(const Sums<2>& s, const Vec* h, Vec* d, SumsBack<2>& to) const {
    to.u[0] = d[0] * (h[0] - n) * i * gate;
    to.u[1] = d[0] * i * sigma * (1.0f + s.u[1] * (1.0f - sigma));
    d[0] *= f;
  }
};

template <bool TANH, bool SKIP>
struct Sru : UnitKind<SKIP ? 4 : 3, 1, 0, !SKIP, true>, Average {
  static constexpr int SUMS = SKIP ? 4 : 3;
  Vec r, skip;
  JAXRNN_INLINE explicit Sru(const Sums<SUMS>& s) : r(logistic(s.u[2])) {
    if constexpr (SKIP) skip = s.u[3];
    else skip = s.x;
    n = s.u[0];
    f = logistic(s.u[1]);
    i = 1.0f - f;
  }
  JAXRNN_INLINE Vec y(Vec h) const { return r * (TANH ? tangent(h) : h) + (1.0f - r) * skip; }
  // The cotangent of h from that of y.
  JAXRNN_INLINE Vec y_back(Vec h, Vec d_y, SumsBack<SUMS>& to) const {
    const Vec squashed = TANH ? tangent(h) : h;
    to.u[2] = d_y * (squashed - skip) * r * (1.0f - r);
    (SKIP ? to.u[SUMS - 1] : to.x) = d_y * (1.0f - r);
    return d_y * r * (TANH ? 1.0f - squashed * squashed : splat(1.0f));
  }
  JAXRNN_INLINE void back(const Sums<SUMS>&, const Vec* h, Vec* d, SumsBack<SUMS>& to) const {
    to.u[0] = d[0] * i;
    to.u[1] = sum_of_gate(h[0], d[0]);
    d[0] *= f;
  }
};

struct Qrnn : UnitKind<3, 1, 0, false, true>, Average {
  Vec o;
  JAXRNN_INLINE explicit Qrnn(const Sums<3>& s) : o(logistic(s.u[2])) {
    n = tangent(s.u[0]);
    f = logistic(s.u[1]);
    i = 1.0f - f;
  }
  JAXRNN_INLINE Vec y(Vec h) const { return o * h; }
  JAXRNN_INLINE Vec y_back(Vec h, Vec d_y, SumsBack<3>& to) const {
    to.u[2] = d_y * h * o * (1.0f - o);
    return d_y * o;
  }
  JAXRNN_INLINE void back(const Sums<3>&, const Vec* h, Vec* d, SumsBack<3>& to) const {
    to.u[0] = d[0] * i * (1.0f - n * n);
    to.u[1] = sum_of_gate(h[0], d[0]);
    d[0] *= f;
  }
};

struct RgLru : UnitKind<2, 1, 1, true> {
  Vec r, i, a, square, scale, in;
  JAXRNN_INLINE explicit RgLru(const Sums<2>& s)
      : r(logistic(s.u[0])), i(logistic(s.u[1])), a(decay_of(s.theta[0] * r)) {
    square = (1.0f - a) * (1.0f + a);
    scale = s.begun ? root(square) : splat(1.0f);
    in = i * s.x;
  }
  JAXRNN_INLINE void next(Vec* h) const { h[0] = a * h[0] + scale * in; }
  JAXRNN_INLINE void back(const Sums<2>& s, const Vec* h, Vec* d, SumsBack<2>& to) const {
    Vec d_a = d[0] * h[0];
    if (s.begun) {  // the derivative of the root is at most 1000
      const Vec least = splat(static_cast<Real>(1e-6)), four = 4.0f * square;
      d_a -= d[0] * in * 2.0f * a / root(four < least ? least : four);
    }
    const Vec d_in = d[0] * scale, d_power = d_a * a;
    to.theta[0] = d_power * r;
    to.u[0] = d_power * s.theta[0] * r * (1.0f - r);
    to.u[1] = d_in * s.x * i * (1.0f - i);
    to.x = d_in * i;
    d[0] *= a;
  }
};

struct Lru : UnitKind<2, 2, 2, false, false, true> {
  Vec re, im, u[2];
  JAXRNN_INLINE explicit Lru(const Sums<2>& s) : re(s.theta[0]), im(s.theta[1]), u{s.u[0], s.u[1]} {}
  JAXRNN_INLINE void next(Vec* h) const {
    const Vec was = h[0];
    h[0] = re * was - im * h[1] + u[0];
    h[1] = re * h[1] + im * was + u[1];
  }
  JAXRNN_INLINE void back(const Sums<2>&, const Vec* h, Vec* d, SumsBack<2>& to) const {
    const Vec x = d[0], y = d[1];
    to.u[0] = x, to.u[1] = y;
    to.theta[0] = x * h[0] + y * h[1];
    to.theta[1] = y * h[0] - x * h[1];
    d[0] = re * x + im * y;
    d[1] = re * y - im * x;
  }
};

template <class F>
inline void with_unit(Unit unit, const F& f) {
  switch (unit) {
    case Unit::kMinGru: return f((MinGru<true>*)nullptr);
    case Unit::kMinGruSigned: return f((MinGru<false>*)nullptr);
    case Unit::kMinGruLogs: return f((InLogs<MinGru<true>>*)nullptr);
    case Unit::kMinLstm: return f((MinLstm<true>*)nullptr);
    case Unit::kMinLstmSigned: return f((MinLstm<false>*)nullptr);
    case Unit::kMinLstmLogs: return f((InLogs<MinLstm<true>>*)nullptr);
    case Unit::kHgrn: return f((Hgrn*)nullptr);
    case Unit::kSru: return f((Sru<false, false>*)nullptr);
    case Unit::kSruTanh: return f((Sru<true, false>*)nullptr);
    case Unit::kSruSkip: return f((Sru<false, true>*)nullptr);
    case Unit::kSruTanhSkip: return f((Sru<true, true>*)nullptr);
    case Unit::kQrnn: return f((Qrnn*)nullptr);
    case Unit::kRgLru: return f((RgLru*)nullptr);
    case Unit::kLru: return f((Lru*)nullptr);
  }
}
