// A single step of S4D: a small system for every channel, in steps of length Δ.
//
//     λ = −exp(log_decay) + i frequency,  z = Δ λ
//     h' = ā h + b̄ x,  ā = e^z, b̄ = (e^z − 1) / λ;  or bilinear  ā = (1 + z/2) / (1 − z/2), b̄ = Δ / (1 − z/2)
//     y = 2 Re Σ c h' + d x

struct Complex {
  Vec re, im;
};
JAXRNN_INLINE Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
JAXRNN_INLINE Complex operator*(Vec a, Complex b) { return {a * b.re, a * b.im}; }
JAXRNN_INLINE Complex conjugate(Complex a) { return {a.re, -a.im}; }
JAXRNN_INLINE Vec square(Complex a) { return a.re * a.re + a.im * a.im; }

// Pairs, whose first numbers are those of one vector, and back.
struct First {
  static constexpr Whole of(long l) { return static_cast<Whole>(2 * l); }
};
struct Second {
  static constexpr Whole of(long l) { return static_cast<Whole>(2 * l + 1); }
};
template <long FROM>
struct Pairs {
  static constexpr Whole of(long l) { return static_cast<Whole>(FROM + l / 2 + (l % 2 ? LANES : 0)); }
};
JAXRNN_INLINE Complex load_pairs(const Real* p, long n) {
  const Vec a = load(p, 2 * n), b = 2 * n > LANES ? load(p + LANES, 2 * n - LANES) : Vec{};
  return {pick<First>(a, b), pick<Second>(a, b)};
}
JAXRNN_INLINE void store_pairs(Real* p, Complex x, long n) {
  store(p, pick<Pairs<0>>(x.re, x.im), 2 * n);
  if (2 * n > LANES) store(p + LANES, pick<Pairs<LANES / 2>>(x.re, x.im), 2 * n - LANES);
}

constexpr Real LARGEST_ANGLE = DOUBLE ? 1 << 19 : 1 << 12;

// sin x and cos x: x = n π/2 + r, |r| ≤ π/4, by π/2 in three parts of which products of the first two with n are exact,
// and Taylor's series; of x up to the largest angle unless it says `large`.
struct Angle {
  Vec sine, cosine;
  JAXRNN_INLINE Angle(Vec x, bool large) {
    constexpr Real PARTS[] = {DOUBLE ? 1.57079632673412561417 : 1.5703125,
                              DOUBLE ? 6.07710050630396597660e-11 : 4.83751296997070312e-4,
                              DOUBLE ? 2.02226624879595063154e-21 : 7.54978995489188216e-8};
    constexpr int TERMS = DOUBLE ? 8 : 5;
    const Vec shifted = x * static_cast<Real>(0.636619772367581343) + NEAREST, n = shifted - NEAREST;
    const Vec r = ((x - n * PARTS[0]) - n * PARTS[1]) - n * PARTS[2], square = r * r;
    Vec s = splat(1), c = splat(1);
#pragma GCC unroll 8
    for (int k = TERMS; k > 0; --k) {
      s = 1.0f - s * square * (Real(1) / Real(2 * k * (2 * k + 1)));
      c = 1.0f - c * square * (Real(1) / Real(2 * k * (2 * k - 1)));
    }
    s *= r;
    const Int quarter = (Int)shifted - (Int)splat(NEAREST), odd = -(quarter & 1);
    sine = odd ? c : s, cosine = odd ? s : c;
    sine = (quarter & 2) ? -sine : sine, cosine = ((quarter + 1) & 2) ? -cosine : cosine;
    if (large)
      for (long l = 0; l < LANES; ++l) sine[l] = std::sin(x[l]), cosine[l] = std::cos(x[l]);
  }
};

struct Discrete {
  Complex a, b;
};
// Over a step of length `step`, that of λ.
JAXRNN_INLINE Discrete discrete(Complex eigenvalue, Real step, bool bilinear, bool large) {
  constexpr Real LEAST = 1e-30f;  // of |z|²: from there on (e^z − 1) / z is 1
  const Complex z = splat(step) * eigenvalue;
  if (bilinear) {
    const Complex above{1.0f + 0.5f * z.re, 0.5f * z.im}, below{1.0f - 0.5f * z.re, -0.5f * z.im};
    const Complex inverse = (1.0f / square(below)) * conjugate(below);
    return {above * inverse, splat(step) * inverse};
  }
  const Exponential power(z.re < LEAST_NORMAL_LOG ? splat(LEAST_NORMAL_LOG) : z.re > MOST_LOG ? splat(MOST_LOG) : z.re);
  const Vec scale = Exponential::power(power.whole()), size = scale * power.p + scale;
  const Angle half(0.5f * z.im, large);
  const Vec lost = 2.0f * half.sine * half.sine;  // 1 − cos
  const Vec sine = 2.0f * half.sine * half.cosine;
  const Complex less{scale * power.p + (scale - 1.0f) - lost * size, size * sine};
  const Vec length = square(z);
  const Int zero = length < LEAST;
  const Complex mean = (step / (zero ? splat(1.0f) : length)) * (less * conjugate(z));
  return {{size * (1.0f - lost), less.im}, {zero ? splat(step) : mean.re, zero ? Vec{} : mean.im}};
}

inline void run_s4d_step(const S4dStep& p, int threads) {
  const long N = p.states, D = p.channels, vectors = (N + LANES - 1) / LANES;
  constexpr long WORK = 16;  // of a state, in products
  in_turns(D, p.rows * D * N * WORK, threads, [&](long channel) {
    Scratch scratch(vectors * 4 * LANES);
    Discrete* all = reinterpret_cast<Discrete*>(scratch.take(vectors * 4 * LANES));
    const Real step = exponential(splat(p.log_step[channel]))[0];
    Vec turns{};
    for (long n = 0; n < N; n += LANES) turns += absolute(load(p.frequency + channel * N + n, N - n));
    const Real most = sum_of(turns);
    for (long row = 0; row < p.rows; ++row) {
      const long at = row * D + channel;
      const Real x = p.x[at];
      Vec y{};
      for (long n = 0; n < N; n += LANES) {
        const long of = channel * N + n, left = std::min(LANES, N - n);
        Discrete& system = all[n / LANES];
        if (row == 0 || p.time) {
          const Complex eigenvalue{-exponential(load(p.log_decay + of, left)), load(p.frequency + of, left)};
          const Real length = p.time ? step * p.time[row] : step;
          system = discrete(eigenvalue, length, p.bilinear, !(std::abs(length * most) <= LARGEST_ANGLE));
        }
        const Real *from = p.h + 2 * (at * N + n), *c = p.c + of;
        Complex h = system.a * load_pairs(from, left);
        h.re += x * system.b.re, h.im += x * system.b.im;
        store_pairs(p.last + 2 * (at * N + n), h, left);
        y += load(c, left) * h.re - load(c + D * N, left) * h.im;
      }
      p.ys[at] = 2 * sum_of(y) + p.d[channel] * x;
    }
  });
}
