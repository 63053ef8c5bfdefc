// Vectors of WIDTH bytes, and exp, tanh and the logistic function on them. Included once for each instruction set,
// inside its namespace.

typedef float Vec __attribute__((vector_size(JAXRNN_WIDTH)));
typedef int32_t Int __attribute__((vector_size(JAXRNN_WIDTH)));
constexpr long LANES = JAXRNN_WIDTH / sizeof(float);

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n lanes; the others are 0 when read and left alone when written.
inline Vec load(const float* p, long n) {
  if (n >= LANES) return load(p);
  Vec v{};
  for (long k = 0; k < n; ++k) v[k] = p[k];
  return v;
}

inline void store(float* p, Vec v, long n) {
  if (n >= LANES) return store(p, v);
  for (long k = 0; k < n; ++k) p[k] = v[k];
}

inline Vec absolute(Vec x) { return (Vec)((Int)x & 0x7fffffff); }

inline Vec with_sign_of(Vec x, Vec sign) { return (Vec)((Int)x | ((Int)sign & ~0x7fffffff)); }

// e^x = 2^n e^r with |r| ≤ ln 2 / 2; e^r by the polynomial of Cephes' expf. 2^n in two factors, for subnormal results.
inline Vec exponential(Vec x) {
  x = x > 89.0f ? splat(89.0f) : x;
  x = x < -104.0f ? splat(-104.0f) : x;
  const Vec shift = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  Vec n = (x * 1.44269504088896341f + shift) - shift;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Int whole = __builtin_convertvector(n, Int);
  Int half = whole >> 1;
  Vec a = (Vec)((half + 127) << 23), b = (Vec)((whole - half + 127) << 23);
  return p * a * b;
}

// e^-|x| never overflows, and both branches keep their relative accuracy.
inline Vec logistic(Vec x) {
  Vec e = exponential(-absolute(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

inline Vec tangent(Vec x) {
  Vec a = absolute(x), z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  Vec small = p * z * x + x;
  Vec e = exponential(-2.0f * a);
  Vec large = with_sign_of((1.0f - e) / (1.0f + e), x);
  return a < 0.625f ? small : x != x ? x : large;
}
