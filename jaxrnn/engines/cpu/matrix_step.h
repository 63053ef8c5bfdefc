// A single step of cells whose state is a matrix, from features to y.
//
//     S' = a ⊙ S + k eᵀ,  y = S'ᵀ q      delta rule: e = β (v − r), r = Sᵀ (a ⊙ k)
//     S' = a ⊙ S + k vᵀ + u rᵀ           low rank: r = Sᵀ w

// What a head does: numbers for each row of S, and for each column.
struct MatrixStep {
  long keys, values;
  const Real *s, *a, *w, *k, *q, *u, *v;  // without u it is the delta rule
  Real beta;
  Real *last, *y;
};

template <bool LOW_RANK, bool WHOLE, long Z>
inline void step_columns(const MatrixStep& h, long column, Columns<Z> columns) {
  const long K = h.keys, V = h.values;
  const Real* from = h.s + column;
  Vec r[2][Z] = {}, y[Z] = {}, e[Z];  // two rows at once, so that sums need not wait for each other
  auto look = [&](long i, long j) {
    for (long z = 0; z < Z; ++z) r[j][z] += h.w[i] * columns.template get<WHOLE>(from + i * V, z);
  };
  for (long i = 0; i + 2 <= K; i += 2) look(i, 0), look(i + 1, 1);
  if (K % 2) look(K - 1, 0);
  for (long z = 0; z < Z; ++z) {
    r[0][z] += r[1][z];
    e[z] = columns.template get<WHOLE>(h.v + column, z);
    if (!LOW_RANK) e[z] = h.beta * (e[z] - r[0][z]);
  }
  for (long i = 0; i < K; ++i)
    for (long z = 0; z < Z; ++z) {
      Vec s = h.a[i] * columns.template get<WHOLE>(from + i * V, z) + h.k[i] * e[z];
      if (LOW_RANK) s += h.u[i] * r[0][z];
      columns.template put<WHOLE>(h.last + column + i * V, z, s);
      y[z] += h.q[i] * s;
    }
  for (long z = 0; z < Z; ++z) columns.template put<WHOLE>(h.y + column, z, y[z]);
}

template <bool LOW_RANK>
inline void matrix_step(const MatrixStep& h) {
  for (long column = 0; column < h.values; column += WIDTH)
    with_columns(std::min(WIDTH, h.values - column), [&](auto columns) {
      if (columns.last == LANES) step_columns<LOW_RANK, true>(h, column, columns);
      else step_columns<LOW_RANK, false>(h, column, columns);
    });
}

// f(i, n) for each vector of `count` numbers: where it begins, and how many are left.
template <class F>
JAXRNN_INLINE void each_vector(long count, const F& f) {
  for (long i = 0; i < count; i += LANES) f(i, count - i);
}

template <class F>
JAXRNN_INLINE Real summed(long count, const F& f) {
  Vec sum{};
  each_vector(count, [&](long i, long n) { sum += f(i, n); });
  return sum_of(sum);
}

constexpr Real UNIT_EPSILON = 1e-6;  // what is added to the square of a length

// factor · x / |x|; `to` has whole vectors.
JAXRNN_INLINE void to_unit(const Real* x, long count, Real factor, Real* to) {
  const Real square = summed(count, [&](long i, long n) {
    const Vec v = load(x + i, n);
    return v * v;
  });
  const Real scale = factor / std::sqrt(square + UNIT_EPSILON);
  each_vector(count, [&](long i, long n) { store(to + i, scale * load(x + i, n)); });
}

// The shares of the rows of a head that are kept.
inline void delta_decay(const DeltaStep& p, long row, long head, Real* a) {
  const long each = p.gates / p.heads;
  std::fill(a, a + p.keys, Real(1));
  if (each == 0) return;
  const Real* gate = p.gate ? p.gate + row * p.gates : p.x + (row + 1) * p.features - p.gates;
  const Real rate = exponential(splat(p.log_decay[head]))[0];
  each_vector(each, [&](long i, long n) {
    const Vec z = load(gate + head * each + i, n) + load(p.b_gate + head * each + i, n);
    store(a + i, decay_of(p.bound < 0.0f ? p.bound * logistic(rate * z) : -rate * Softplus(z).y));
  });
  if (each == 1) std::fill(a, a + p.keys, a[0]);
}

inline void run_delta_step(const DeltaStep& p, int threads) {
  const long K = p.keys, V = p.values, padded = Scratch::rounded(K), size = K * V;
  const Real* x = p.x;
  in_turns(p.rows * p.heads, p.rows * p.heads * p.products * size, threads, [&](long task) {
    Scratch scratch(4 * padded);
    Real *a = scratch.take(padded), *w = scratch.take(padded), *k = scratch.take(padded), *q = scratch.take(padded);
    const long row = task / p.heads, head = task % p.heads, key = head / (p.heads / p.key_heads);
    // Where features begin.
    const long of_q = row * p.features, of_k = of_q + p.key_heads * K, of_v = of_k + p.products * p.key_heads * K;
    const long of_beta = of_v + p.products * p.heads * V;
    delta_decay(p, row, head, a);
    to_unit(x + of_q + key * K, K, 1 / std::sqrt(Real(K)), q);
    MatrixStep h{K, V, p.s + task * size, a, w, k, q, nullptr, nullptr, 0, p.last + task * size, p.ys + task * V};
    for (long n = 0; n < p.products; ++n) {
      to_unit(x + of_k + (n * p.key_heads + key) * K, K, 1, k);
      each_vector(K, [&](long i, long) { store(w + i, load(a + i) * load(k + i)); });
      h.v = x + of_v + (n * p.heads + head) * V;
      h.beta = p.strength * logistic(splat(x[of_beta + n * p.heads + head]))[0];
      matrix_step<false>(h);
      h.s = h.last;  // only the first product lets the state decay
      std::fill(a, a + K, Real(1));
    }
  });
}

// Of a head that has been read, y gets the mean 0 and the variance 1, and a share of v.
inline void normalize(const Rwkv7Step& p, long head, const Real* v, Real share, Real* y) {
  const long V = p.values;
  const Real mean = summed(V, [&](long i, long n) { return load(y + i, n); }) / V;
  const Real variance = summed(V, [&](long i, long n) {
    Vec off = load(y + i, n) - mean;
    for (long l = n; l < LANES; ++l) off[l] = 0;
    return off * off;
  }) / V;
  const Real factor = 1 / std::sqrt(variance + p.epsilon * V);
  each_vector(V, [&](long i, long n) {
    const Vec scale = load(p.scale + head * V + i, n), offset = load(p.offset + head * V + i, n);
    store(y + i, factor * (load(y + i, n) - mean) * scale + offset + share * load(v + i, n), n);
  });
}

inline void run_rwkv7_step(const Rwkv7Step& p, int threads) {
  const long K = p.keys, V = p.values, padded = Scratch::rounded(K), size = K * V, of_all = p.heads * K;
  in_turns(p.rows * p.heads, p.rows * p.heads * size, threads, [&](long task) {
    Scratch scratch(4 * padded);
    Real *a = scratch.take(padded), *w = scratch.take(padded), *k = scratch.take(padded), *u = scratch.take(padded);
    const long row = task / p.heads, head = task % p.heads, at = head * K;
    const Real *q = p.x + row * p.features + at, *key = q + of_all, *v = p.x + row * p.features + 2 * of_all + head * V;
    const Real* rest = p.x + (row + 1) * p.features - 2 * of_all + at;
    const Real* decay = p.decay ? p.decay + row * of_all + at : rest;
    const Real* rate = p.rate ? p.rate + row * of_all + at : rest + of_all;
    Vec length{}, bonus{};
    each_vector(K, [&](long i, long n) {
      auto of = [&](const Real* weights) { return load(weights + at + i, n); };
      const Vec alpha = logistic(load(rate + i, n) + of(p.b_rate)), before = load(key + i, n);
      const Vec removed = of(p.removal) * before, written = before * (1.0f + (alpha - 1.0f) * of(p.replacement));
      store(a + i, decay_of(-p.slowest * logistic(load(decay + i, n) + of(p.b_decay))));
      store(k + i, written);
      store(w + i, -removed);
      store(u + i, alpha);
      length += removed * removed;
      bonus += load(q + i, n) * written * of(p.bonus);
    });
    const Real scale = 1 / std::sqrt(std::max(sum_of(length), p.smallest * p.smallest));
    each_vector(K, [&](long i, long) {
      const Vec removal = scale * load(w + i);
      store(w + i, removal);
      store(u + i, -removal * load(u + i));
    });
    Real* y = p.ys + task * V;
    matrix_step<true>({K, V, p.s + task * size, a, w, k, q, u, v, 0, p.last + task * size, y});
    normalize(p, head, v, sum_of(bonus), y);
  });
}
