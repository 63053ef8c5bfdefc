// The matrix recurrence, one panel of columns of S at a time, sequential in time.
//
//     S' = a ⊙ S + k eᵀ,  y = S'ᵀ q      add: e = v;  delta: e = β (v − r), r = (a ⊙ S)ᵀ k
//     S' = a ⊙ S + k vᵀ + u rᵀ           low rank: r = Sᵀ w
//
// Columns do not touch each other, so a panel of S stays in the first-level cache for the whole sequence. One pass over
// it does the update of a step, its y, and what the next step reads. Backward, the states of a chunk are computed again
// from the one that was kept, and one pass over D = ∂L/∂S and S ends a step and begins the one before it.

enum class Decay { kNone, kScalar, kRow };
enum class Update { kAdd, kDelta, kLowRank };

// exp(x) for x ≤ 0; 0 where float32 has no normal number for it.
JAXRNN_INLINE Vec decay_of(Vec x) {
  Exponential power(x < -87.0f ? splat(-87.0f) : x);
  Vec y = (power.p + 1.0f) * Exponential::power(power.whole());
  return x < -87.0f ? Vec{} : y;
}

JAXRNN_INLINE float sum_of(Vec x) {
  float sum = 0;
  for (long k = 0; k < LANES; ++k) sum += x[k];
  return sum;
}

// The sums of LANES vectors, in their order: halves of pairs are added, until each lane is a sum.
JAXRNN_INLINE Vec sums_of(Vec* x) {
#if defined(__GNUC__) && !defined(__clang__)
  for (long n = LANES; n > 1; n /= 2) {
    Int low, high;
    for (long l = 0; l < LANES; ++l) {
      const long at = l % n, half = n / 2;
      low[l] = static_cast<int32_t>(at < half ? l : LANES + l - half);
      high[l] = static_cast<int32_t>(at < half ? l + half : LANES + l);
    }
    for (long k = 0; k < n / 2; ++k)
      x[k] = __builtin_shuffle(x[k], x[k + n / 2], low) + __builtin_shuffle(x[k], x[k + n / 2], high);
  }
  return x[0];
#else
  Vec sums;
  for (long k = 0; k < LANES; ++k) sums[k] = sum_of(x[k]);
  return sums;
#endif
}

// Columns of a panel: Z vectors, of which the last one holds `last` numbers.
template <long Z>
struct Columns {
  long last;
  JAXRNN_INLINE void read(Vec* to, const float* p) const {
    for (long z = 0; z < Z - 1; ++z) to[z] = load(p + z * LANES);
    to[Z - 1] = load(p + (Z - 1) * LANES, last);
  }
  JAXRNN_INLINE void write(float* p, const Vec* from) const {
    for (long z = 0; z < Z - 1; ++z) store(p + z * LANES, from[z]);
    store(p + (Z - 1) * LANES, from[Z - 1], last);
  }
  // K rows of V numbers to a panel, and back.
  void take(float* panel, const float* p, long rows, long stride) const {
    for (long i = 0; i < rows; ++i) {
      Vec row[Z];
      read(row, p + i * stride);
      for (long z = 0; z < Z; ++z) store(panel + (i * Z + z) * LANES, row[z]);
    }
  }
  void give(const float* panel, float* p, long rows, long stride) const {
    for (long i = 0; i < rows; ++i) {
      Vec row[Z];
      for (long z = 0; z < Z; ++z) row[z] = load(panel + (i * Z + z) * LANES);
      write(p + i * stride, row);
    }
  }
};

// Where the arrays of one row and head begin, and how far apart their steps are.
struct Head {
  const MatrixProblem& p;
  long row, head;
  long time(long n) const { return p.reverse ? p.steps - 1 - n : n; }
  long at(long t, long heads) const { return (t * p.rows + row) * heads + (heads == 1 ? 0 : head); }
  const float* key(const Shared& array, long t) const { return array.data + at(t, array.heads) * p.keys; }
  long place(long t) const { return at(t, p.heads); }  // of what all heads have
  bool starts(long t) const { return p.start && p.start[t * p.rows + row]; }
  long state() const { return (row * p.heads + head) * p.keys * p.values; }
};

template <Decay D>
JAXRNN_INLINE void find_decay(const Head& h, long t, float* a) {
  if constexpr (D == Decay::kScalar) {
    Vec x = decay_of(splat(h.p.log_decay.data[h.at(t, h.p.log_decay.heads)]));
    a[0] = x[0];
  }
  if constexpr (D == Decay::kRow) {
    const float* g = h.p.log_decay.data + h.at(t, h.p.log_decay.heads) * h.p.keys;
    for (long i = 0; i < h.p.keys; i += LANES)
      store(a + i, decay_of(load(g + i, h.p.keys - i)));
  }
}

template <Decay D>
JAXRNN_INLINE float decay_at(const float* a, long i) {
  return D == Decay::kNone ? 1.0f : D == Decay::kScalar ? a[0] : a[i];
}

// Sᵀ x of a panel.
template <long Z>
JAXRNN_INLINE void read_panel(const float* S, const float* x, long rows, Vec* sum) {
  for (long z = 0; z < Z; ++z) sum[z] = Vec{};
  for (long i = 0; i < rows; ++i)
    for (long z = 0; z < Z; ++z) sum[z] += x[i] * load(S + (i * Z + z) * LANES);
}

template <Decay D, Update U, long Z>
void matrix_forward(const Head& h, long column, Columns<Z> columns, float* memory) {
  const MatrixProblem& p = h.p;
  const long K = p.keys, V = p.values, padded = (K + LANES - 1) / LANES * LANES;
  constexpr long TWO = Z < 4 ? 2 : 1;  // rows at once, so that sums need not wait for each other
  float* S = memory;
  float* a = S + K * Z * LANES;   // decays of this step and of the next
  float* next_a = a + padded;
  float* reads = next_a + padded;  // what the next step reads with, a ⊙ k
  columns.take(S, p.s + h.state() + column, K, V);
  const float* fresh = p.fresh ? p.fresh + h.state() + column : nullptr;
  // What step t reads with.
  auto reader = [&](long t, const float* decay) -> const float* {
    if constexpr (U == Update::kLowRank) return h.key(p.w, t);
    const float* k = h.key(p.k, t);
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
      else std::memset(S, 0, K * Z * LANES * sizeof(float));
      if constexpr (U != Update::kAdd) read_panel<Z>(S, reader(t, a), K, r);
    }
    if constexpr (U == Update::kDelta && D == Decay::kScalar)
      for (long z = 0; z < Z; ++z) r[z] *= a[0];
    columns.read(e, p.v + value);
    if constexpr (U != Update::kAdd)
      if (p.reads) columns.write(p.reads + value, r);
    if constexpr (U == Update::kDelta) {
      const float beta = p.beta.data[h.at(t, p.beta.heads)];
      for (long z = 0; z < Z; ++z) e[z] = beta * (e[z] - r[z]);
    }
    const float *k = h.key(p.k, t), *q = h.key(p.q, t), *u = U == Update::kLowRank ? h.key(p.u, t) : nullptr;
    const float* next = k;
    const bool more = n + 1 < p.steps;
    if (more) find_decay<D>(h, h.time(n + 1), next_a);
    if constexpr (U != Update::kAdd)
      if (more) next = reader(h.time(n + 1), next_a);
    Vec sum[TWO][Z] = {}, seen[TWO][Z] = {};
    auto row = [&](long i, long j) {
      const float decay = decay_at<D>(a, i), to = k[i], from = q[i], then = next[i];
      for (long z = 0; z < Z; ++z) {
        float* at = S + (i * Z + z) * LANES;
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

// Adds to a row of K numbers, or begins it.
JAXRNN_INLINE void add_row(float* to, Vec x, long n, bool begin) { store(to, begin ? x : load(to, n) + x, n); }

// One panel of the backward pass; the first panel of a head begins the sums over panels.
template <Decay D, Update U, long Z>
void matrix_backward(const Head& h, const MatrixGradient& g, long column, Columns<Z> columns, bool first,
                     float* memory) {
  const MatrixProblem& p = h.p;
  const long K = p.keys, V = p.values, size = K * Z * LANES, padded = (K + LANES - 1) / LANES * LANES;
  float* dS = memory;
  float* a = dS + size;          // decays of the step at hand
  float* later = a + padded;     // and of the one after it, whose second half is due
  float* state = later + padded;  // before the chunk, and after each of its steps
  columns.take(dS, g.d_last + h.state() + column, K, V);
  const float* fresh = p.fresh ? p.fresh + h.state() + column : nullptr;
  Vec dr[Z] = {};
  bool due = false;
  long due_time = 0;

  // What step t adds to the state, from what it reads and its value.
  auto written = [&](long t, Vec* v, Vec* r, Vec* e) {
    columns.read(v, p.v + h.place(t) * V + column);
    if constexpr (U != Update::kAdd) columns.read(r, p.reads + h.place(t) * V + column);
    for (long z = 0; z < Z; ++z)
      e[z] = U == Update::kDelta ? p.beta.data[h.at(t, p.beta.heads)] * (v[z] - r[z]) : v[z];
  };

  // The second half of the step that is due, whose state before it is S: d_read, and D before it.
  auto end_due = [&](const float* S) {
    const float* k = U == Update::kLowRank ? h.key(p.w, due_time) : h.key(p.k, due_time);
    for (long i = 0; i < K; ++i) {
      const float decay = decay_at<D>(later, i);
      Vec seen{};
      for (long z = 0; z < Z; ++z) {
        float* at = dS + (i * Z + z) * LANES;
        Vec d = load(at);
        if constexpr (U == Update::kDelta) d = decay * (d + k[i] * dr[z]);
        else d = decay * d;
        if constexpr (U == Update::kLowRank) d += k[i] * dr[z];
        store(at, d);
        if constexpr (U != Update::kAdd)
          if (S) seen += load(S + (i * Z + z) * LANES) * dr[z];
      }
      if constexpr (U != Update::kAdd) {
        const float sum = sum_of(seen);
        const long at = h.place(due_time) * K + i;
        if constexpr (U == Update::kLowRank) g.d_w[at] = first ? sum : g.d_w[at] + sum;
        else {
          g.d_k[at] += decay * sum;
          if constexpr (D == Decay::kRow) g.d_log_decay[at] += k[i] * decay * sum;
        }
      }
    }
    due = false;
  };

  for (long chunk = (p.steps - 1) / p.chunk; chunk >= 0; --chunk) {
    const long begin = chunk * p.chunk, count = std::min(p.chunk, p.steps - begin);
    columns.take(state, p.states + chunk * p.rows * p.heads * K * V + h.state() + column, K, V);
    for (long j = 0; j < count; ++j) {
      const long t = h.time(begin + j);
      const float* before = state + j * size;
      float* after = state + (j + 1) * size;
      Vec v[Z], r[Z], e[Z];
      written(t, v, r, e);
      find_decay<D>(h, t, a);
      if (h.starts(t)) {
        if (fresh) columns.take(after, fresh, K, V);
        else std::memset(after, 0, size * sizeof(float));
        before = after;
      }
      const float *k = h.key(p.k, t), *u = U == Update::kLowRank ? h.key(p.u, t) : nullptr;
      for (long i = 0; i < K; ++i) {
        const float decay = decay_at<D>(a, i);
        for (long z = 0; z < Z; ++z) {
          const long at = (i * Z + z) * LANES;
          Vec s = load(before + at);
          if constexpr (D != Decay::kNone) s = decay * s;
          s += k[i] * e[z];
          if constexpr (U == Update::kLowRank) s += u[i] * r[z];
          store(after + at, s);
        }
      }
    }
    for (long j = count - 1; j >= 0; --j) {
      const long t = h.time(begin + j), place = h.place(t), value = place * V + column;
      const float* S = state + (j + 1) * size;
      if (due && h.starts(due_time)) {
        std::unique_ptr<float[]> own;
        if (fresh && U != Update::kAdd) {  // seldom
          own.reset(new float[size]);
          columns.take(own.get(), fresh, K, V);
        }
        end_due(own.get());
        if (g.d_fresh)
          for (long i = 0; i < K; ++i)
            for (long z = 0; z < Z; ++z) {
              float* to = g.d_fresh + h.state() + i * V + column + z * LANES;
              const long n = z == Z - 1 ? columns.last : LANES;
              store(to, load(to, n) + load(dS + (i * Z + z) * LANES), n);
            }
        std::memset(dS, 0, size * sizeof(float));
        for (long z = 0; z < Z; ++z) dr[z] = Vec{};
      }
      Vec v[Z], r[Z], e[Z], dy[Z], de[Z] = {}, du_read[Z] = {};
      written(t, v, r, e);
      columns.read(dy, g.d_ys + value);
      find_decay<D>(h, t, a);
      const float *k = h.key(p.k, t), *q = h.key(p.q, t), *u = U == Update::kLowRank ? h.key(p.u, t) : nullptr;
      const float* read = !due ? k : U == Update::kLowRank ? h.key(p.w, due_time) : h.key(p.k, due_time);
      for (long i = 0; i < K; i += LANES) {
        const long rows = std::min(K - i, LANES);
        Vec of_q[LANES], of_k[LANES], of_read[LANES], of_u[LANES];
        auto row = [&](long l) {
          const float decay = due ? decay_at<D>(later, i + l) : 1.0f, then = read[i + l];
          const float to = k[i + l], from = q[i + l];
          Vec sq{}, sk{}, sr{}, su{};
          for (long z = 0; z < Z; ++z) {
            const long at = ((i + l) * Z + z) * LANES;
            const Vec s = load(S + at);
            Vec d = load(dS + at);
            if constexpr (U == Update::kDelta) d += then * dr[z];
            if constexpr (D != Decay::kNone) d = decay * d;
            if constexpr (U == Update::kLowRank) d += then * dr[z];
            d += from * dy[z];
            store(dS + at, d);
            sq += s * dy[z];
            sk += d * e[z];
            de[z] += to * d;
            if constexpr (U != Update::kAdd) sr += s * dr[z];
            if constexpr (U == Update::kLowRank) {
              su += d * r[z];
              du_read[z] += u[i + l] * d;
            }
          }
          of_q[l] = sq, of_k[l] = sk, of_read[l] = sr, of_u[l] = su;
        };
        if (rows == LANES) {
          for (long l = 0; l < LANES; ++l) row(l);
        } else {
          for (long l = 0; l < rows; ++l) row(l);
          for (long l = rows; l < LANES; ++l) of_q[l] = of_k[l] = of_read[l] = of_u[l] = Vec{};
        }
        const Vec d_q = sums_of(of_q), d_k = sums_of(of_k);
        const long at = place * K + i;
        add_row(g.d_q + at, d_q, rows, first);
        add_row(g.d_k + at, d_k, rows, first);
        Vec x = load(q + i, rows) * d_q - load(k + i, rows) * d_k;
        if constexpr (U == Update::kLowRank) {
          const Vec d_u = sums_of(of_u);
          add_row(g.d_u + at, d_u, rows, first);
          x -= load(u + i, rows) * d_u;
        }
        if constexpr (D == Decay::kRow) add_row(g.d_log_decay + at, x, rows, first);
        if constexpr (U != Update::kAdd)
          if (due) {
            const Vec seen = sums_of(of_read);
            const long due_at = h.place(due_time) * K + i;
            if constexpr (U == Update::kLowRank) add_row(g.d_w + due_at, seen, rows, first);
            else {
              const Vec decayed = D == Decay::kRow ? load(later + i, rows) * seen
                                  : D == Decay::kScalar ? later[0] * seen : seen;
              add_row(g.d_k + due_at, decayed, rows, false);
              if constexpr (D == Decay::kRow)
                add_row(g.d_log_decay + due_at, load(read + i, rows) * decayed, rows, false);
            }
          }
      }
      const float beta = U == Update::kDelta ? p.beta.data[h.at(t, p.beta.heads)] : 1.0f;
      Vec dv[Z], d_beta{}, x{};
      for (long z = 0; z < Z; ++z) {
        dv[z] = beta * de[z];
        if constexpr (U == Update::kDelta) {
          d_beta += de[z] * (v[z] - r[z]);
          dr[z] = -dv[z];
        }
        if constexpr (U == Update::kLowRank) dr[z] = du_read[z];
      }
      columns.write(g.d_v + value, dv);
      if constexpr (U == Update::kDelta) {
        const float sum = sum_of(d_beta);
        g.d_beta[place] = first ? sum : g.d_beta[place] + sum;
      }
      if constexpr (D == Decay::kScalar) {
        Vec y[Z];
        columns.read(y, p.ys + value);
        for (long z = 0; z < Z; ++z) {
          x += dy[z] * y[z] - dv[z] * v[z];
          if constexpr (U == Update::kLowRank) x -= dr[z] * r[z];
        }
        const float sum = sum_of(x);
        g.d_log_decay[place] = first ? sum : g.d_log_decay[place] + sum;
      }
      std::swap(a, later);
      due = true;
      due_time = t;
    }
  }
  const bool starts = due && h.starts(due_time);
  if (due) {
    if (starts && fresh) columns.take(state, fresh, K, V);
    else if (starts) std::memset(state, 0, size * sizeof(float));
    else columns.take(state, p.s + h.state() + column, K, V);
    end_due(state);
  }
  if (starts && g.d_fresh)
    for (long i = 0; i < K; ++i)
      for (long z = 0; z < Z; ++z) {
        float* to = g.d_fresh + h.state() + i * V + column + z * LANES;
        const long n = z == Z - 1 ? columns.last : LANES;
        store(to, load(to, n) + load(dS + (i * Z + z) * LANES), n);
      }
  if (starts) std::memset(dS, 0, size * sizeof(float));
  columns.give(dS, g.d_s + h.state() + column, K, V);
}

// d log_decay from what the panels have left there: its sum over the steps from t on, in double precision.
//
// Row i of D ⊙ S, summed over its columns, changes from step to step by what q, k, u and w add.
template <Decay D, Update U>
void sum_decays(const Head& h, const MatrixGradient& g) {
  const MatrixProblem& p = h.p;
  const long K = p.keys, V = p.values, count = D == Decay::kRow ? K : 1;
  std::vector<double> sum(count, 0.0);
  for (long i = 0; i < K; ++i)
    for (long z = 0; z < V; ++z) {
      const long at = h.state() + i * V + z;
      sum[count == 1 ? 0 : i] += static_cast<double>(g.d_last[at]) * p.last[at];
    }
  for (long n = p.steps - 1; n >= 0; --n) {
    const long t = h.time(n), place = h.place(t);
    float* to = g.d_log_decay + place * count;
    for (long i = 0; i < count; ++i) to[i] = static_cast<float>(sum[i] += to[i]);
    if constexpr (U == Update::kLowRank) {
      const float* w = h.key(p.w, t);
      for (long i = 0; i < K; ++i) sum[count == 1 ? 0 : i] += static_cast<double>(w[i]) * g.d_w[place * K + i];
    }
    if (h.starts(t)) std::fill(sum.begin(), sum.end(), 0.0);
  }
}

// Calls f with `count` columns, at most MOST vectors.
template <long MOST, class F>
void with_columns(long count, const F& f) {
  const long vectors = (count + LANES - 1) / LANES, last = count - (vectors - 1) * LANES;
  if constexpr (MOST == 4) {
    if (vectors == 4) return f(Columns<4>{last});
    if (vectors == 3) return f(Columns<3>{last});
  }
  if (vectors == 2) f(Columns<2>{last});
  else f(Columns<1>{last});
}

constexpr long MOST_FORWARD = JAXRNN_WIDTH == 64 ? 4 : 2, MOST_BACKWARD = 2;

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

// Tasks that threads take one by one.
template <class F>
inline void in_turns(long tasks, long work, int threads, const F& task) {
  std::atomic<long> next{0};
  auto part = [&](int) {
    for (long k; (k = next.fetch_add(1)) < tasks;) task(k);
  };
  const int parts = static_cast<int>(std::min<long>(work < 100000 ? 1 : threads, tasks));
  if (parts > 1 && Pool::share(parts, part)) return;
  part(0);
}

// Memory of a panel of Z vectors: S, and three rows of numbers.
inline long floats_forward(const MatrixProblem& p, long vectors) {
  return p.keys * vectors * LANES + 3 * (p.keys + LANES);
}

// D, the states of a chunk and the one before it, and two rows.
inline long floats_backward(const MatrixProblem& p, long vectors) {
  return (std::min(p.chunk, p.steps) + 2) * p.keys * vectors * LANES + 2 * (p.keys + LANES);
}

// A task is a panel of a head.
inline void run_matrix(const MatrixProblem& p, int threads) {
  constexpr long WIDTH = MOST_FORWARD * LANES;
  const long panels = (p.values + WIDTH - 1) / WIDTH, heads = p.rows * p.heads;
  with_kind(p, [&](auto decay, auto update) {
    in_turns(heads * panels, heads * p.steps * p.keys * p.values, threads, [&](long task) {
      const Head head{p, task / panels / p.heads, task / panels % p.heads};
      const long column = task % panels * WIDTH;
      Scratch scratch(floats_forward(p, MOST_FORWARD));
      float* memory = scratch.take(floats_forward(p, MOST_FORWARD));
      with_columns<MOST_FORWARD>(std::min(WIDTH, p.values - column), [&](auto columns) {
        matrix_forward<decltype(decay)::value, decltype(update)::value>(head, column, columns, memory);
      });
    });
  });
}

// A task is a head, since the cotangents of its keys are sums over its panels.
inline void run_matrix_backward(const MatrixProblem& p, const MatrixGradient& g, int threads) {
  constexpr long WIDTH = MOST_BACKWARD * LANES;
  const long heads = p.rows * p.heads;
  with_kind(p, [&](auto decay, auto update) {
    constexpr Decay D = decltype(decay)::value;
    constexpr Update U = decltype(update)::value;
    in_turns(heads, heads * p.steps * p.keys * p.values, threads, [&](long task) {
      const Head head{p, task / p.heads, task % p.heads};
      Scratch scratch(floats_backward(p, MOST_BACKWARD));
      float* memory = scratch.take(floats_backward(p, MOST_BACKWARD));
      if (g.d_fresh) std::memset(g.d_fresh + head.state(), 0, p.keys * p.values * sizeof(float));
      for (long column = 0; column < p.values; column += WIDTH)
        with_columns<MOST_BACKWARD>(std::min(WIDTH, p.values - column), [&](auto columns) {
          matrix_backward<D, U>(head, g, column, columns, column == 0, memory);
        });
      if constexpr (D != Decay::kNone) sum_decays<D, U>(head, g);
    });
  });
}
