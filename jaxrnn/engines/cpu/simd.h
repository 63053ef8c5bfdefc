// Vectors of JAXRNN_WIDTH bytes, and tanh and the logistic function on them. Included once for each instruction set,
// inside its namespace.

typedef float Vec __attribute__((vector_size(JAXRNN_WIDTH)));
typedef int32_t Int __attribute__((vector_size(JAXRNN_WIDTH)));
constexpr long LANES = JAXRNN_WIDTH / sizeof(float);

JAXRNN_INLINE Vec splat(float x) { return x - Vec{}; }

// In memory anywhere, and what is stored may be no other thing than numbers.
typedef float Loose __attribute__((vector_size(JAXRNN_WIDTH), aligned(4)));

JAXRNN_INLINE Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }

JAXRNN_INLINE void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }

// The first n lanes; the others are 0 when read and left alone when written.
#if JAXRNN_WIDTH == 64
JAXRNN_INLINE Vec load(const float* p, long n) { return n >= LANES ? load(p) : _mm512_maskz_loadu_ps((1u << n) - 1, p); }

JAXRNN_INLINE void store(float* p, Vec v, long n) {
  if (n >= LANES) store(p, v);
  else _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
}
#else
JAXRNN_INLINE Vec load(const float* p, long n) {
  if (n >= LANES) return load(p);
  Vec v{};
  for (long k = 0; k < n; ++k) v[k] = p[k];
  return v;
}

JAXRNN_INLINE void store(float* p, Vec v, long n) {
  if (n >= LANES) return store(p, v);
  for (long k = 0; k < n; ++k) p[k] = v[k];
}
#endif

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
  static constexpr int of(long l) { return static_cast<int>(l % n < n / 2 ? l : LANES + l - n / 2); }
};
template <long n>
struct High {
  static constexpr int of(long l) { return static_cast<int>(l % n < n / 2 ? l + n / 2 : LANES + l); }
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
JAXRNN_INLINE float sum_of(Vec x) {
  if constexpr (n == 1) return x[0];
  else return sum_of<n / 2>(x + pick<High<n>>(x, x));
}

JAXRNN_INLINE Vec absolute(Vec x) { return (Vec)((Int)x & 0x7fffffff); }

JAXRNN_INLINE Vec with_sign_of(Vec x, Vec sign) { return (Vec)((Int)x | ((Int)sign & ~0x7fffffff)); }

// a / b for 1 ≤ b < 2^120.
JAXRNN_INLINE Vec divide(Vec a, Vec b) {
#if JAXRNN_WIDTH == 64
  Vec y = _mm512_maskz_rcp14_ps(0xffff, b);
  y = y + y * (1.0f - b * y);
  Vec q = a * y;
  return q + y * (a - b * q);
#else
  return a / b;
#endif
}

// e^x - 1 = 2^n (p + 1) - 1, where p = e^r - 1 for |r| ≤ ln 2 / 2 by the polynomial of Cephes' expf.
struct Exponential {
  Vec n, p;
  JAXRNN_INLINE explicit Exponential(Vec x) {
    const Vec shift = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    n = (x * 1.44269504088896341f + shift) - shift;
    Vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Vec q = splat(1.9875691500e-4f);
    q = q * r + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
    p = q * (r * r) + r;
  }
  static JAXRNN_INLINE Vec power(Int n) { return (Vec)((n + 127) << 23); }
  JAXRNN_INLINE Int whole() const { return __builtin_convertvector(n, Int); }
};

// e^-|x| never overflows, and both branches keep their relative accuracy. 2^n in two factors, for subnormal results.
JAXRNN_INLINE Vec logistic(Vec x) {
  Vec a = absolute(x);
  Exponential power(-(a > 104.0f ? splat(104.0f) : a));
  Int n = power.whole(), half = n >> 1;
  Vec e = (power.p + 1.0f) * Exponential::power(half) * Exponential::power(n - half);
  return divide(x < 0.0f ? e : splat(1.0f), 1.0f + e);
}

// (e^2|x| - 1) / (e^2|x| + 1), which is 1 in float32 from |x| = 9.02 on.
JAXRNN_INLINE Vec tangent(Vec x) {
  Vec a = absolute(x);
  Exponential power(2.0f * (a > 9.1f ? splat(9.1f) : a));
  Vec scale = Exponential::power(power.whole());
  Vec e = scale * power.p + (scale - 1.0f);
  return with_sign_of(divide(e, e + 2.0f), x);
}

// exp(x) for x ≤ 0; 0 where float32 has no normal number for it.
JAXRNN_INLINE Vec decay_of(Vec x) {
  Exponential power(x < -87.0f ? splat(-87.0f) : x);
  Vec y = (power.p + 1.0f) * Exponential::power(power.whole());
  return x < -87.0f ? Vec{} : y;
}

// 2 artanh(z) for z² ≤ 1/9.
JAXRNN_INLINE Vec twice_artanh(Vec z) {
  const Vec square = z * z;
  Vec sum = splat(1.0f / 13);
  for (int odd = 11; odd > 0; odd -= 2) sum = sum * square + 1.0f / static_cast<float>(odd);
  return 2.0f * z * sum;
}

// log(1 + e^x) and its derivative, with log(1 + e) = 2 artanh(e / (2 + e)) for e = e^−|x|. Relative error 2e-7.
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
  const Int bits = (Int)x, n = (bits - 0x3f3504f3) >> 23;
  const Vec m = (Vec)(bits - (n << 23)), whole = __builtin_convertvector(n, Vec);
  return whole * 0.693359375f + (whole * -2.12194440e-4f + twice_artanh(divide(m - 1.0f, m + 1.0f)));
}

// e^x, 0 from −104 on.
JAXRNN_INLINE Vec exponential(Vec x) {
  x = x < -104.0f ? splat(-104.0f) : x > 89.0f ? splat(89.0f) : x;
  const Exponential power(x);
  const Int n = power.whole(), half = n >> 1;
  return (power.p + 1.0f) * Exponential::power(half) * Exponential::power(n - half);
}

JAXRNN_INLINE Vec root(Vec x) {
#if JAXRNN_WIDTH == 64
  return _mm512_sqrt_ps(x);
#else
  for (long l = 0; l < LANES; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}
