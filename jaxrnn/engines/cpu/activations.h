// Activations and their derivatives. Each is said once, of a number N: a vector, or one together with its derivative.

struct Dual {
  Vec x, d;
};
JAXRNN_INLINE Dual operator+(Dual a, Dual b) { return {a.x + b.x, a.d + b.d}; }
JAXRNN_INLINE Dual operator-(Dual a, Dual b) { return {a.x - b.x, a.d - b.d}; }
JAXRNN_INLINE Dual operator*(Dual a, Dual b) { return {a.x * b.x, a.d * b.x + a.x * b.d}; }
JAXRNN_INLINE Dual operator+(Dual a, Real b) { return {a.x + b, a.d}; }
JAXRNN_INLINE Dual operator*(Dual a, Real b) { return {a.x * b, a.d * b}; }
JAXRNN_INLINE Dual operator/(Dual a, Real b) { return {a.x / b, a.d / b}; }

JAXRNN_INLINE Vec value(Vec x) { return x; }
JAXRNN_INLINE Vec value(Dual x) { return x.x; }
JAXRNN_INLINE Vec constant(Vec, Real x) { return splat(x); }
JAXRNN_INLINE Dual constant(Dual, Real x) { return {splat(x), Vec{}}; }
// The function that has this value and this slope.
JAXRNN_INLINE Vec chain(Vec, Vec y, Vec) { return y; }
JAXRNN_INLINE Dual chain(Dual x, Vec y, Vec slope) { return {y, x.d * slope}; }
JAXRNN_INLINE Vec choose(Int where, Vec on, Vec off) { return where ? on : off; }
JAXRNN_INLINE Dual choose(Int where, Dual on, Dual off) { return {where ? on.x : off.x, where ? on.d : off.d}; }

// The distribution function of the standard normal distribution: ½ erfc(z), z = −x / √2, where erfc(z) =
// t exp(P(t) − z²), t = 1 / (1 + z / 2) for z ≥ 0, by a fit of Chebyshev polynomials of relative error 1.2e-7 (Press et
// al., Numerical Recipes, section 6.2).
JAXRNN_INLINE Vec normal_distribution(Vec x) {
#ifdef JAXRNN_FLOAT64
  for (long l = 0; l < LANES; ++l) x[l] = 0.5 * std::erfc(-0.70710678118654752 * x[l]);
  return x;
#else
  const Vec z = absolute(x) * 0.70710678f, t = divide(splat(1.0f), 1.0f + 0.5f * z);
  Vec sum = splat(0.17087277f);
  for (Real c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                  1.00002368f, -1.26551223f})
    sum = sum * t + c;
  const Vec tail = 0.5f * t * exponential(sum - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
#endif
}

// Where both are equal, the derivative is the mean of both.
template <class N>
JAXRNN_INLINE N maximum(N x, Real bound) {
  const Vec v = value(x);
  return choose(v < bound, constant(x, bound), choose(v == bound, chain(x, v, splat(0.5f)), x));
}
template <class N>
JAXRNN_INLINE N minimum(N x, Real bound) {
  return maximum(x * -1.0f, -bound) * -1.0f;
}
template <class N>
JAXRNN_INLINE N between(N x, Real low, Real high) {
  return minimum(maximum(x, low), high);
}
template <class N>
JAXRNN_INLINE N flat(N x, Real low, Real high) {  // clipped, with slope 0 at both ends
  const Vec v = value(x);
  return choose(v <= low, constant(x, low), choose(v >= high, constant(x, high), x));
}
template <class N>
JAXRNN_INLINE N tanh_of(N x) {
  const Vec y = tangent(value(x));
  return chain(x, y, 1.0f - y * y);
}
template <class N>
JAXRNN_INLINE N sigmoid_of(N x) {
  const Vec y = logistic(value(x));
  return chain(x, y, y * (1.0f - y));
}
template <class N>
JAXRNN_INLINE N softplus_of(N x) {
  const Softplus found(value(x));
  return chain(x, found.y, found.slope);
}
template <class N>
JAXRNN_INLINE N elu_of(N x, Real alpha, Real rate) {  // α (e^{rate x} − 1) below 0
  const Vec v = value(x), less = alpha * exponential_less_one(rate * (v > 0.0f ? Vec{} : v));
  return choose(v > 0.0f, x, chain(x, less, rate * (less + alpha)));
}

template <int A, class N>
JAXRNN_INLINE N activate(N x, Real alpha, Real beta) {
  const Vec v = value(x);
  const N zero = constant(x, 0.0f);
  if constexpr (A == kIdentity) return x;
  if constexpr (A == kAffine) return x * alpha + beta;
  if constexpr (A == kExponential) {
    const Vec y = exponential(v);
    return chain(x, y, y);
  }
  if constexpr (A == kRelu) return choose(v <= 0.0f, zero, x);
  if constexpr (A == kRelu6) return flat(x, 0.0f, 6.0f);
  if constexpr (A == kLeakyRelu) return choose(v < 0.0f, x * alpha, x);
  if constexpr (A == kThresholdedRelu) return choose(v > alpha, x, zero);
  if constexpr (A == kElu) return elu_of(x, alpha, 1.0f);
  if constexpr (A == kCelu) return elu_of(x, alpha, 1.0f / alpha);
  if constexpr (A == kSelu) return elu_of(x, static_cast<Real>(1.6732632423543772), 1.0f) * static_cast<Real>(1.0507009873554805);
  if constexpr (A == kGelu) {
    const Vec phi = normal_distribution(v);
    return x * chain(x, phi, static_cast<Real>(0.3989422804014327) * exponential(-0.5f * v * v));
  }
  if constexpr (A == kGeluTanh) {
    const N y = between(x, -12.0f, 12.0f);
    return x * 0.5f * (tanh_of((y + y * y * y * static_cast<Real>(0.044715)) * static_cast<Real>(0.7978845608028654)) + constant(x, 1.0f));
  }
  if constexpr (A == kSilu) return x * sigmoid_of(x);
  if constexpr (A == kHardSilu) return x * (flat(x + constant(x, 3.0f), 0.0f, 6.0f) / 6.0f);
  if constexpr (A == kMish) return x * tanh_of(softplus_of(x));
  if constexpr (A == kSoftplus) return softplus_of(x);
  if constexpr (A == kSquareplus) {
    const Vec r = splat(std::sqrt(alpha)), a = absolute(v), most = a > r ? a : r, least = a > r ? r : a;
    const Vec ratio = least / (most == 0.0f ? splat(1.0f) : most), hypotenuse = most * root(1.0f + ratio * ratio);
    const Vec slope = v / (hypotenuse == 0.0f ? splat(1.0f) : hypotenuse);
    return (x + chain(x, hypotenuse, slope)) * 0.5f;
  }
  if constexpr (A == kSoftshrink) return x - between(x, -alpha, alpha);
  if constexpr (A == kHardshrink) return choose(absolute(v) > alpha, x, zero);
  if constexpr (A == kTanhshrink) return x - tanh_of(x);
  if constexpr (A == kTanh) return tanh_of(x);
  if constexpr (A == kScaledTanh) return tanh_of(x * beta) * alpha;
  if constexpr (A == kHardTanh) return between(x, alpha, beta);
  if constexpr (A == kSoftsign) {
    const Vec part = splat(1.0f) / (1.0f + absolute(v));
    return chain(x, v * part, part * part);
  }
  if constexpr (A == kSigmoid) return sigmoid_of(x);
  if constexpr (A == kLogSigmoid) return softplus_of(x * -1.0f) * -1.0f;
  if constexpr (A == kHardSigmoid) return between(x * alpha + constant(x, beta), 0.0f, 1.0f);
  if constexpr (A == kKerasHardSigmoid) return between(x / 6.0f + constant(x, 0.5f), 0.0f, 1.0f);
}

// Of n vectors in place, and their slopes if there is a place for them. A pass and not a call for each vector, which
// would cost more than what it calls.
template <int A>
void activation_pass(Vec* x, Vec* slope, int n, Real alpha, Real beta) {
  for (int i = 0; i < n; ++i) {
    if (slope) {
      const Dual y = activate<A>(Dual{x[i], splat(1.0f)}, alpha, beta);
      x[i] = y.x, slope[i] = y.d;
    } else {
      x[i] = activate<A>(x[i], alpha, beta);
    }
  }
}

using ActivationPass = void (*)(Vec* x, Vec* slope, int n, Real alpha, Real beta);
template <int... A>
inline ActivationPass activation_pass_of(int64_t code, std::integer_sequence<int, A...>) {
  static constexpr ActivationPass all[] = {activation_pass<A>...};
  return all[code];
}

JAXRNN_INLINE void activate_all(const Choice& f, Vec* x, Vec* slope, int n) {
  activation_pass_of(f.code, std::make_integer_sequence<int, ACTIVATIONS>{})(x, slope, n, f.alpha, f.beta);
}

// The slopes of activations that tell them by their values.
JAXRNN_INLINE void slopes_of_values(const Choice& f, const Vec* y, Vec* slope, int n) {
  const Vec one = splat(1.0f);
  for (int i = 0; i < n; ++i) {
    const Vec v = y[i];
    if (f.code == kSigmoid) slope[i] = v * (one - v);
    else if (f.code == kTanh) slope[i] = one - v * v;
    else slope[i] = f.code == kRelu ? (v > 0.0f ? one : Vec{}) : one;
  }
}
