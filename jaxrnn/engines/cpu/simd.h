// Vectors of JAXRNN_WIDTH bytes, and tanh and the logistic function on them. Included once for each instruction set,
// inside its namespace.

typedef Real Vec __attribute__((vector_size(JAXRNN_WIDTH)));
using Whole = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
typedef Whole Int __attribute__((vector_size(JAXRNN_WIDTH)));
constexpr long LANES = JAXRNN_WIDTH / sizeof(Real);
constexpr bool DOUBLE = sizeof(Real) == 8;

JAXRNN_INLINE Vec splat(Real x) { return x - Vec{}; }

// In memory anywhere, and what is stored may be no other thing than numbers.
typedef Real Loose __attribute__((vector_size(JAXRNN_WIDTH), aligned(sizeof(Real))));

JAXRNN_INLINE Vec load(const Real* p) { return *reinterpret_cast<const Loose*>(p); }

JAXRNN_INLINE void store(Real* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }

// The first n lanes; the others are 0 when read and left alone when written.
#if JAXRNN_WIDTH == 64
#ifdef JAXRNN_FLOAT64
JAXRNN_INLINE Vec masked(unsigned lanes, const Real* p) { return _mm512_maskz_loadu_pd(lanes, p); }
JAXRNN_INLINE void masked(unsigned lanes, Real* p, Vec v) { _mm512_mask_storeu_pd(p, lanes, v); }
JAXRNN_INLINE Vec square_root(Vec x) { return _mm512_sqrt_pd(x); }
JAXRNN_INLINE Vec times_power(Vec x, Vec n) { return _mm512_maskz_scalef_pd(0xff, x, n); }
#else
JAXRNN_INLINE Vec masked(unsigned lanes, const Real* p) { return _mm512_maskz_loadu_ps(lanes, p); }
JAXRNN_INLINE void masked(unsigned lanes, Real* p, Vec v) { _mm512_mask_storeu_ps(p, lanes, v); }
JAXRNN_INLINE Vec square_root(Vec x) { return _mm512_sqrt_ps(x); }
JAXRNN_INLINE Vec times_power(Vec x, Vec n) { return _mm512_maskz_scalef_ps(0xffff, x, n); }
#endif

JAXRNN_INLINE Vec load(const Real* p, long n) { return n >= LANES ? load(p) : masked((1u << n) - 1, p); }

JAXRNN_INLINE void store(Real* p, Vec v, long n) {
  if (n >= LANES) store(p, v);
  else masked((1u << n) - 1, p, v);
}
#else
JAXRNN_INLINE Vec load(const Real* p, long n) {
  if (n >= LANES) return load(p);
  Vec v{};
  for (long k = 0; k < n; ++k) v[k] = p[k];
  return v;
}

JAXRNN_INLINE void store(Real* p, Vec v, long n) {
  if (n >= LANES) return store(p, v);
  for (long k = 0; k < n; ++k) p[k] = v[k];
}
#endif

// LANES bytes as numbers. A conversion of vectors is compiled to one of every lane.
JAXRNN_INLINE Vec of_bytes(const uint8_t* p) {
#if JAXRNN_WIDTH == 64 && !defined(JAXRNN_FLOAT64)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p));
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif JAXRNN_WIDTH == 64
  return _mm512_maskz_cvtepi32_pd(0xff, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p))));
#elif JAXRNN_WIDTH == 32 && !defined(JAXRNN_FLOAT64)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p))));
#else
  Vec x;
  for (long l = 0; l < LANES; ++l) x[l] = p[l];
  return x;
#endif
}

// Lanes of x and y, whose numbers go on from those of x: PLACE::of(l) is what lane l takes.
template <class PLACE, size_t... l>
JAXRNN_INLINE Vec pick(Vec x, Vec y, std::index_sequence<l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, PLACE::of(l)...);
#else
  return __builtin_shuffle(x, y, Int{PLACE::of(l)...});
#endif
}

// In each n lanes, the first half of those of x and of those of y; and the second half.
template <long n>
struct Low {
  static constexpr Whole of(long l) { return static_cast<Whole>(l % n < n / 2 ? l : LANES + l - n / 2); }
};
template <long n>
struct High {
  static constexpr Whole of(long l) { return static_cast<Whole>(l % n < n / 2 ? l + n / 2 : LANES + l); }
};
template <class PLACE>
JAXRNN_INLINE Vec pick(Vec x, Vec y) {
  return pick<PLACE>(x, y, std::make_index_sequence<LANES>{});
}

// The sums of LANES vectors, in their order: halves of pairs are added, until each lane is a sum.
template <long n = LANES>
JAXRNN_INLINE Vec sums_of(const Vec* x) {
  if constexpr (n == 1) return x[0];
  else {
    Vec half[n / 2];
    for (long k = 0; k < n / 2; ++k)
      half[k] = pick<Low<n>>(x[k], x[k + n / 2]) + pick<High<n>>(x[k], x[k + n / 2]);
    return sums_of<n / 2>(half);
  }
}

template <long n = LANES>
JAXRNN_INLINE Real sum_of(Vec x) {
  if constexpr (n == 1) return x[0];
  else return sum_of<n / 2>(x + pick<High<n>>(x, x));
}

constexpr Whole WITHOUT_SIGN = std::numeric_limits<Whole>::max();

JAXRNN_INLINE Vec absolute(Vec x) { return (Vec)((Int)x & WITHOUT_SIGN); }

JAXRNN_INLINE Vec with_sign_of(Vec x, Vec sign) { return (Vec)((Int)x | ((Int)sign & ~WITHOUT_SIGN)); }

// 1 / b for 1 ≤ b < 2^120.
JAXRNN_INLINE Vec inverse(Vec b) {
#if JAXRNN_WIDTH == 64 && !defined(JAXRNN_FLOAT64)
  const Vec y = _mm512_maskz_rcp14_ps(0xffff, b);
  return y + y * (1.0f - b * y);
#else
  return 1.0f / b;
#endif
}

// a / b for 1 ≤ b < 2^120.
JAXRNN_INLINE Vec divide(Vec a, Vec b) {
#if JAXRNN_WIDTH == 64 && !defined(JAXRNN_FLOAT64)
  const Vec y = inverse(b), q = a * y;
  return q + y * (a - b * q);
#else
  return a / b;
#endif
}

// The same of sums whose second terms are what the first lost to rounding.
JAXRNN_INLINE Vec divide(Vec a, Vec a_low, Vec b, Vec b_low) {
#if defined(JAXRNN_FMA) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Vec y = inverse(b), q = a * y;
  return q + y * ((a - b * q) + (a_low - b_low * q));
#else
  const Vec q = a / b;
  return q + (a_low - b_low * q) / b;
#endif
}

// How the bits of a number lie, and from where on functions of it are constant.
constexpr int FRACTION = DOUBLE ? 52 : 23;
constexpr Whole BIAS = DOUBLE ? 1023 : 127;
constexpr Real NEAREST = DOUBLE ? 6755399441055744.0 : 12582912.0;  // 1.5 · 2^FRACTION: adding it rounds to an integer
constexpr Real LEAST_LOG = DOUBLE ? -746 : -104, MOST_LOG = DOUBLE ? 710 : 89;  // e^x is 0 below, infinite above
constexpr Real LEAST_NORMAL_LOG = DOUBLE ? -708 : -87;
constexpr Real FLAT = DOUBLE ? 19.1 : 9.1;  // tanh is 1 from there on
// log 2 in two parts, of which products of the first with an exponent are exact.
constexpr Real LOG_2_HIGH = DOUBLE ? 6.93147180369123816490e-01 : 0.693359375;
constexpr Real LOG_2_LOW = DOUBLE ? 1.90821492927058770002e-10 : -2.12194440e-4;
constexpr Real LOG2_E = static_cast<Real>(1.44269504088896341), LN_2 = static_cast<Real>(0.693147180559945309);

// (e^r - 1 - r) / r² for |r| ≤ ln 2 / 2: Taylor's series, or the polynomial of Cephes' expf.
JAXRNN_INLINE Vec exponential_beyond_line(Vec r) {
  Vec q;
  if constexpr (DOUBLE) {
    constexpr Real INVERSE[] = {1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,       1. / 5040,
                                1. / 40320,  1. / 362880,  1. / 3628800,  1. / 39916800,  1. / 479001600, 1. / 6227020800};
    q = splat(INVERSE[11]);
#pragma GCC unroll 12
    for (int k = 10; k >= 0; --k) q = q * r + INVERSE[k];
  } else {
    q = splat(1.9875691500e-4f);
    q = q * r + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
  }
  return q;
}

JAXRNN_INLINE Vec small_exponential_less_one(Vec r) { return exponential_beyond_line(r) * (r * r) + r; }

// e^x - 1 = 2^n (p + 1) - 1, where p = e^r - 1 loses `low` to rounding.
struct Exponential {
  Vec shifted, p, low;
  JAXRNN_INLINE explicit Exponential(Vec x) {
    shifted = x * LOG2_E + NEAREST;
    const Vec n = shifted - NEAREST, r = (x - n * LOG_2_HIGH) - n * LOG_2_LOW;
    const Vec beyond = exponential_beyond_line(r), square = r * r;
    p = beyond * square + r;
    low = beyond * square + (r - p);
  }
  static JAXRNN_INLINE Vec power(Int n) { return (Vec)((n + BIAS) << FRACTION); }
  // n, which is in the lowest bits.
  JAXRNN_INLINE Int whole() const { return (Int)shifted - (Int)splat(NEAREST); }
  // 2^n x, also where that is subnormal.
  JAXRNN_INLINE Vec scaled(Vec x) const {
#if JAXRNN_WIDTH == 64
    return times_power(x, shifted - NEAREST);
#else
    const Int n = whole(), half = n >> 1;  // in two factors
    return x * power(half) * power(n - half);
#endif
  }
};

// e^-|x| never overflows, and both branches keep their relative accuracy.
JAXRNN_INLINE Vec logistic(Vec x) {
  Vec a = absolute(x);
  const Exponential power(-(a > -LEAST_LOG ? splat(-LEAST_LOG) : a));
  const Vec sum = power.p + 1.0f, e = power.scaled(sum), e_low = power.scaled(power.p - (sum - 1.0f)), d = 1.0f + e;
  return divide(x < 0.0f ? e : splat(1.0f), x < 0.0f ? e_low : Vec{}, d, (e - (d - 1.0f)) + e_low);
}

// (e^2|x| - 1) / (e^2|x| + 1).
JAXRNN_INLINE Vec tangent(Vec x) {
  Vec a = absolute(x);
  Exponential power(2.0f * (a > FLAT ? splat(FLAT) : a));
  const Vec scale = Exponential::power(power.whole());
  const Vec less = scale - 1.0f, more = scale + 1.0f, e = scale * power.p + less, b = scale * power.p + more;
  const Vec low = scale * power.low;
  return with_sign_of(divide(e, scale * power.p + (less - e) + low, b, scale * power.p + (more - b) + low), x);
}

// exp(x) for x ≤ 0; 0 where there is no normal number for it.
JAXRNN_INLINE Vec decay_of(Vec x) {
  Exponential power(x < LEAST_NORMAL_LOG ? splat(LEAST_NORMAL_LOG) : x);
  Vec y = (power.p + 1.0f) * Exponential::power(power.whole());
  return x < LEAST_NORMAL_LOG ? Vec{} : y;
}

// 2 artanh(z) for z² ≤ 1/9.
JAXRNN_INLINE Vec twice_artanh(Vec z) {
  constexpr int LAST = DOUBLE ? 33 : 13;
  const Vec square = z * z;
  Vec sum = splat(Real(1) / LAST);
#pragma GCC unroll 16
  for (int odd = LAST - 2; odd > 0; odd -= 2) sum = sum * square + Real(1) / static_cast<Real>(odd);
  return 2.0f * z * sum;
}

// log(1 + e^x) and its derivative, with log(1 + e) = 2 artanh(e / (2 + e)) for e = e^−|x|. In float32 of a relative error of
// 2e-7.
struct Softplus {
  Vec y, slope;
  JAXRNN_INLINE explicit Softplus(Vec x) {
    const Vec e = decay_of(-absolute(x));
    y = (x < 0.0f ? Vec{} : x) + twice_artanh(divide(e, e + 2.0f));
    slope = divide(x < 0.0f ? e : splat(1.0f), e + 1.0f);
  }
};

// The same for x ≤ 0.
JAXRNN_INLINE Vec log_of_more(Vec x) {
  const Vec e = decay_of(x);
  return twice_artanh(divide(e, e + 2.0f));
}

// log x = n log 2 + 2 artanh((m − 1) / (m + 1)) for x = 2^n m and √½ ≤ m < √2; of normal numbers.
JAXRNN_INLINE Vec logarithm(Vec x) {
  constexpr Whole ROOT = static_cast<Whole>(DOUBLE ? 0x3fe6a09e667f3bcd : 0x3f3504f3);  // the bits of √½
  const Int bits = (Int)x, n = (bits - ROOT) >> FRACTION;
  const Vec m = (Vec)(bits - (n << FRACTION)), whole = __builtin_convertvector(n, Vec);
  return whole * LOG_2_HIGH + (whole * LOG_2_LOW + twice_artanh(divide(m - 1.0f, m + 1.0f)));
}

// e^x, 0 from `LEAST_LOG` on.
JAXRNN_INLINE Vec exponential(Vec x) {
  x = x < LEAST_LOG ? splat(LEAST_LOG) : x > MOST_LOG ? splat(MOST_LOG) : x;
  const Exponential power(x);
  return power.scaled(power.p + 1.0f);
}

// e^x − 1, −1 from `LEAST_LOG` on, infinite from `MOST_LOG` on.
JAXRNN_INLINE Vec exponential_less_one(Vec x) {
  const Exponential power(x < LEAST_LOG ? splat(LEAST_LOG) : x > MOST_LOG ? splat(MOST_LOG) : x);
  const Int n = power.whole();
  const Vec scale = Exponential::power(n < 1 - BIAS ? Int{} + (1 - BIAS) : n);
  return scale * power.p + (scale - 1.0f);
}

JAXRNN_INLINE Vec root(Vec x) {
#if JAXRNN_WIDTH == 64
  return square_root(x);
#else
  for (long l = 0; l < LANES; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}
