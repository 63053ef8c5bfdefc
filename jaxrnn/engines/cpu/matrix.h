// The matrix recurrence, one panel of columns of S at a time, sequential in time.
//
//     S' = a ⊙ S + k eᵀ,  y = S'ᵀ q      add: e = v;  delta: e = β (v − r), r = (a ⊙ S)ᵀ k
//     S' = a ⊙ S + k vᵀ + u rᵀ           low rank: r = Sᵀ w
//
// Columns do not touch each other, so a panel of S stays in the first-level cache for the whole sequence. One pass over
// it does the update of a step, its y, and what the next step reads.

enum class Decay { kNone, kScalar, kRow };
enum class Update { kAdd, kDelta, kLowRank };

// Rows of LANES numbers become columns.
template <long n = LANES>
JAXRNN_INLINE void transpose(Vec* x) {
  if constexpr (n > 1) {
    for (long k = 0; k < LANES; ++k)
      if (k % n < n / 2) {
        const Vec low = pick<Low<n>>(x[k], x[k + n / 2]), high = pick<High<n>>(x[k], x[k + n / 2]);
        x[k] = low, x[k + n / 2] = high;
      }
    transpose<n / 2>(x);
  }
}

// Where the arrays of one row and head begin, and how far apart their steps are.
struct Head {
  const MatrixProblem& p;
  long row, head;
  long time(long n) const { return p.reverse ? p.steps - 1 - n : n; }
  long at(long t, long heads) const { return (t * p.rows + row) * heads + (heads == 1 ? 0 : head); }
  const Real* key(const Shared& array, long t) const { return array.data + at(t, array.heads) * p.keys; }
  long place(long t) const { return at(t, p.heads); }  // of what all heads have
  bool starts(long t) const { return p.start && p.start[t * p.rows + row]; }
  long state() const { return (row * p.heads + head) * p.keys * p.values; }
};

template <Decay D>
JAXRNN_INLINE void find_decay(const Head& h, long t, Real* a) {
  if constexpr (D == Decay::kScalar) {
    Vec x = decay_of(splat(h.p.log_decay.data[h.at(t, h.p.log_decay.heads)]));
    a[0] = x[0];
  }
  if constexpr (D == Decay::kRow) {
    const Real* g = h.p.log_decay.data + h.at(t, h.p.log_decay.heads) * h.p.keys;
    for (long i = 0; i < h.p.keys; i += LANES)
      store(a + i, decay_of(load(g + i, h.p.keys - i)));
  }
}

template <Decay D>
JAXRNN_INLINE Real decay_at(const Real* a, long i) {
  return D == Decay::kNone ? 1.0f : D == Decay::kScalar ? a[0] : a[i];
}

// Sᵀ x of a panel.
template <long Z>
JAXRNN_INLINE void read_panel(const Real* S, const Real* x, long rows, Vec* sum) {
  for (long z = 0; z < Z; ++z) sum[z] = Vec{};
  for (long i = 0; i < rows; ++i)
    for (long z = 0; z < Z; ++z) sum[z] += x[i] * load(S + (i * Z + z) * LANES);
}

// Steps of a head lie too far apart for the processor to guess what comes next.
constexpr long AHEAD = 4;

// Inlined at once: GCC takes a function that does nothing else for one that does nothing.
JAXRNN_INLINE void prefetch(const Real* from, long n) {
  for (long i = 0; i < n; i += 16) __builtin_prefetch(from + i);
}

template <Decay D, Update U>
JAXRNN_INLINE void fetch(const Head& h, long t, long column, long columns) {
  const MatrixProblem& p = h.p;
  prefetch(h.key(p.q, t), p.keys), prefetch(h.key(p.k, t), p.keys);
  prefetch(p.v + h.place(t) * p.values + column, columns);
  if constexpr (U == Update::kLowRank) prefetch(h.key(p.u, t), p.keys), prefetch(h.key(p.w, t), p.keys);
  if constexpr (D == Decay::kRow) prefetch(h.key(p.log_decay, t), p.keys);
}

template <Decay D, Update U, long Z>
void matrix_forward(const Head& h, long column, Columns<Z> columns, Real* memory) {
  const MatrixProblem& p = h.p;
  const long K = p.keys, V = p.values, padded = (K + LANES - 1) / LANES * LANES;
  constexpr long TWO = Z < 4 ? 2 : 1;  // rows at once, so that sums need not wait for each other
  Real* S = memory;
  Real* a = S + K * Z * LANES;   // decays of this step and of the next
  Real* next_a = a + padded;
  Real* reads = next_a + padded;  // what the next step reads with, a ⊙ k
  columns.take(S, p.s + h.state() + column, K, V);
  const Real* fresh = p.fresh ? p.fresh + h.state() + column : nullptr;
  // What step t reads with.
  auto reader = [&](long t, const Real* decay) -> const Real* {
    if constexpr (U == Update::kLowRank) return h.key(p.w, t);
    const Real* k = h.key(p.k, t);
    if constexpr (D != Decay::kRow) return k;
    for (long i = 0; i < K; ++i) reads[i] = decay[i] * k[i];
    return reads;
  };
  Vec r[Z], e[Z], y[Z];
  if (p.steps) find_decay<D>(h, h.time(0), a);
  if (U != Update::kAdd && p.steps) read_panel<Z>(S, reader(h.time(0), a), K, r);
  for (long n = 0; n < p.steps; ++n) {
    const long t = h.time(n), value = h.place(t) * V + column;
    if (p.states && n % p.chunk == 0)
      columns.give(S, p.states + (n / p.chunk) * p.rows * p.heads * K * V + h.state() + column, K, V);
    if (h.starts(t)) {
      if (fresh) columns.take(S, fresh, K, V);
      else std::memset(S, 0, K * Z * LANES * sizeof(Real));
      if constexpr (U != Update::kAdd) read_panel<Z>(S, reader(t, a), K, r);
    }
    if constexpr (U == Update::kDelta && D == Decay::kScalar)
      for (long z = 0; z < Z; ++z) r[z] *= a[0];
    columns.read(e, p.v + value);
    if constexpr (U != Update::kAdd)
      if (p.reads) columns.write(p.reads + value, r);
    if constexpr (U == Update::kDelta) {
      const Real beta = p.beta.data[h.at(t, p.beta.heads)];
      for (long z = 0; z < Z; ++z) e[z] = beta * (e[z] - r[z]);
    }
    const Real *k = h.key(p.k, t), *q = h.key(p.q, t), *u = U == Update::kLowRank ? h.key(p.u, t) : nullptr;
    const Real* next = k;
    const bool more = n + 1 < p.steps;
    if (n + AHEAD < p.steps) fetch<D, U>(h, h.time(n + AHEAD), column, Z * LANES);
    if (more) find_decay<D>(h, h.time(n + 1), next_a);
    if constexpr (U != Update::kAdd)
      if (more) next = reader(h.time(n + 1), next_a);
    Vec sum[TWO][Z] = {}, seen[TWO][Z] = {};
    auto row = [&](long i, long j) {
      const Real decay = decay_at<D>(a, i), to = k[i], from = q[i], then = next[i];
      for (long z = 0; z < Z; ++z) {
        Real* at = S + (i * Z + z) * LANES;
        Vec s = load(at);
        if constexpr (D != Decay::kNone) s = decay * s;
        s += to * e[z];
        if constexpr (U == Update::kLowRank) s += u[i] * r[z];
        store(at, s);
        sum[j][z] += from * s;
        if constexpr (U != Update::kAdd) seen[j][z] += then * s;
      }
    };
    long i = 0;
    for (; i + TWO <= K; i += TWO)
      for (long j = 0; j < TWO; ++j) row(i + j, j);
    for (; i < K; ++i) row(i, 0);
    for (long z = 0; z < Z; ++z) {
      y[z] = sum[0][z];
      r[z] = seen[0][z];
      for (long j = 1; j < TWO; ++j) y[z] += sum[j][z], r[z] += seen[j][z];
    }
    columns.write(p.ys + value, y);
    std::swap(a, next_a);
  }
  columns.give(S, p.last + h.state() + column, K, V);
}

template <class F>
inline void with_kind(const MatrixProblem& p, const F& f) {
  auto update = [&](auto decay) {
    if (p.beta.data) f(decay, std::integral_constant<Update, Update::kDelta>{});
    else if (p.u.data) f(decay, std::integral_constant<Update, Update::kLowRank>{});
    else f(decay, std::integral_constant<Update, Update::kAdd>{});
  };
  if (!p.log_decay.data) update(std::integral_constant<Decay, Decay::kNone>{});
  else if (p.decay_by_row) update(std::integral_constant<Decay, Decay::kRow>{});
  else update(std::integral_constant<Decay, Decay::kScalar>{});
}

// Memory of a panel: S, and three rows of numbers.
inline long floats_forward(const MatrixProblem& p) {
  return p.keys * WIDTH + 3 * (p.keys + LANES);
}

// A task is a panel of a head.
inline void run_matrix(const MatrixProblem& p, int threads) {
  const long panels = (p.values + WIDTH - 1) / WIDTH, heads = p.rows * p.heads;
  with_kind(p, [&](auto decay, auto update) {
    in_turns(heads * panels, heads * p.steps * p.keys * p.values, threads, [&](long task) {
      const Head head{p, task / panels / p.heads, task / panels % p.heads};
      const long column = task % panels * WIDTH;
      Scratch scratch(floats_forward(p));
      Real* memory = scratch.take(floats_forward(p));
      with_columns(std::min(WIDTH, p.values - column), [&](auto columns) {
        matrix_forward<decltype(decay)::value, decltype(update)::value>(head, column, columns, memory);
      });
    });
  });
}
