// The backward pass of the matrix recurrence: chunk by chunk of steps, and in a chunk panel by panel of columns.
//
// With D = ∂L/∂S after a step, e what k writes, and d_r = −β d_e, of the delta rule, or Dᵀ u, of the low rank one:
//
//     D += q d_yᵀ;   d_q = S d_y,  d_k = D e,  d_u = D r,  d_e = Dᵀ k;   add: D' = a ⊙ D
//     delta: D' = a ⊙ (D + k d_rᵀ),  d_k += a ⊙ S' d_r;   low rank: D' = a ⊙ D + w d_rᵀ,  d_w = S' d_r
//     d log a: the sums of rows of D' ⊙ S', of low rank without w d_rᵀ
//
// where ' is of the step before. The states of a chunk are computed again from the one that was kept. Then one pass
// over D and S does the second half of a step and the first half of the one before it, since they need the same S. Here
// a vector holds rows of one column: all sums but d_e and d_r are over columns, and add lane by lane.

// Where the numbers of a panel are: blocks of rows, of which each holds one column after the other.
struct PanelShape {
  long rows, columns, room;  // `rows` and `room`, of columns, are multiples of LANES
  static constexpr long BLOCK = 2 * LANES;
  PanelShape(long rows, long columns)
      : rows((rows + LANES - 1) / LANES * LANES), columns(columns), room((columns + LANES - 1) / LANES * LANES) {}
  long size() const { return rows * room; }
  // f(first row, vectors), of each block.
  template <class F>
  JAXRNN_INLINE void each_block(const F& f) const {
    long i = 0;
    for (; i + BLOCK <= rows; i += BLOCK) f(i, std::integral_constant<long, BLOCK / LANES>{});
    if (i < rows) f(i, std::integral_constant<long, 1>{});
  }
  // f(first row, first column, first number, how far apart columns are), of squares of LANES².
  template <class F>
  void each_square(const F& f) const {
    for (long i = 0; i < rows; i += LANES) {
      const long begin = i / BLOCK * BLOCK, height = std::min(BLOCK, rows - begin);
      for (long j = 0; j < room; j += LANES) f(i, j, begin * room + j * height + i - begin, height);
    }
  }
  // From K rows of V numbers, and back; what is beyond them is 0.
  JAXRNN_APART void take(Real* panel, const Real* p, long K, long V) const {
    each_square([&](long i, long j, long at, long height) {
      Vec x[LANES];
      for (long l = 0; l < LANES; ++l) x[l] = i + l < K ? load(p + (i + l) * V + j, columns - j) : Vec{};
      transpose(x);
      for (long l = 0; l < LANES; ++l) store(panel + at + l * height, x[l]);
    });
  }
  JAXRNN_APART void give(const Real* panel, Real* p, long K, long V, bool add) const {
    each_square([&](long i, long j, long at, long height) {
      Vec x[LANES];
      for (long l = 0; l < LANES; ++l) x[l] = load(panel + at + l * height);
      transpose(x);
      for (long l = 0; l < std::min(LANES, K - i); ++l) {
        Real* to = p + (i + l) * V + j;
        store(to, add ? load(to, columns - j) + x[l] : x[l], columns - j);
      }
    });
  }
};

constexpr long MOST_COLUMNS = 64, PANEL = 1 << 11;  // numbers of a panel, of which a chunk fits the cache

// A row of numbers for each step of a chunk; and one more, of the step after the chunk, whose second half is due.
struct Rows {
  Real* data;
  long width;
  Real* operator[](long j) const { return data + j * width; }
};

// A head: its chunks from the last to the first.
template <Decay D, Update U>
class BackwardHead {
 public:
  BackwardHead(const Head& head, const MatrixGradient& gradient, Real* memory)
      : h(head), p(head.p), g(gradient), K(p.keys), V(p.values), wide(columns_of(p)) {
    auto take = [&](long floats) { return std::exchange(memory, memory + floats); };
    const PanelShape whole(K, V), panel(K, wide);
    const long n = rows_of(p);
    dS = take(whole.size()), states = take(n * panel.size()), fresh = take(panel.size());
    nothing = take(whole.rows + whole.room), ones = take(whole.rows), unused = take(2 * whole.rows);
    std::memset(nothing, 0, (whole.rows + whole.room) * sizeof(Real));
    std::fill(ones, ones + whole.rows, 1.0f);
    for (Rows* rows : {&decay, &k, &q, &u, &w, &sum_q, &sum_k, &sum_u, &sum_read, &sum_decay})
      *rows = {take(n * whole.rows), whole.rows};
    for (Rows* rows : {&e, &r, &d_y, &d_e, &d_r}) *rows = {take(n * whole.room), whole.room};
  }

  static long floats(const MatrixProblem& p) {
    const PanelShape whole(p.keys, p.values), panel(p.keys, columns_of(p));
    const long n = rows_of(p);
    return whole.size() + (n + 1) * panel.size() + (10 * n + 4) * whole.rows + (5 * n + 1) * whole.room;
  }

  void run() {
    each_panel([&](long column, const PanelShape& panel) {
      panel.take(D_of(column), g.d_last + corner(column), K, V);
    });
    if (g.d_fresh) std::memset(g.d_fresh + corner(0), 0, K * V * sizeof(Real));
    for (long end = p.steps; end > 0; end = begin) {
      begin = (end - 1) / p.chunk * p.chunk, count = end - begin;
      load_chunk(end < p.steps);
      each_panel([&](long column, const PanelShape& panel) {
        find_states(column, panel);
        for (long j = count - 1; j >= 0; --j) step(j, column, panel);
    });
      for (long j = end < p.steps ? count : count - 1; j > 0; --j) give(j);
    }
    if (p.steps) {
      each_panel([&](long column, const PanelShape& panel) {
        if (h.starts(h.time(0))) return restart(0, column, panel);
        panel.take(states, p.s + corner(column), K, V);
        pass<false>(0, column, panel, states, due_of(0, column));
    });
      give(0);
    }
    each_panel([&](long column, const PanelShape& panel) {
      panel.give(D_of(column), g.d_s + corner(column), K, V, false);
    });
  }

 private:
  // What a pass reads of the step that is due, and where S d_r and the rows of D ⊙ S go.
  struct Due {
    const Real *decay, *read, *d_r;
    Real *sum_read, *sum_decay;
  };

  const Head h;
  const MatrixProblem& p;
  const MatrixGradient& g;
  const long K, V, wide;     // the last: columns of a panel
  long begin = 0, count = 0;  // of the steps of the chunk
  Real *dS, *states, *fresh, *nothing, *ones, *unused;
  Rows decay, k, q, u, w, sum_q, sum_k, sum_u, sum_read, sum_decay;  // S d_y, D e, D r, S d_r, rows of D ⊙ S
  Rows e, r, d_y, d_e, d_r;
  alignas(64) Vec lanes_e[MOST_COLUMNS], lanes_r[MOST_COLUMNS];  // d_e and Dᵀ u of a panel, before lanes are added

  static long columns_of(const MatrixProblem& p) {
    const long fit = std::max(LANES, PANEL / p.keys / LANES * LANES);
    return std::min({fit, MOST_COLUMNS, p.values});
  }
  static long rows_of(const MatrixProblem& p) { return std::min(p.chunk, p.steps) + 1; }

  template <class F>
  void each_panel(const F& f) {
    for (long column = 0; column < V; column += wide) f(column, PanelShape(K, std::min(wide, V - column)));
  }
  long corner(long column) const { return h.state() + column; }
  // What was kept of the state before step n, the first one of a chunk.
  const Real* state(long n, long column) const {
    return p.states + n / p.chunk * p.rows * p.heads * K * V + corner(column);
  }
  Real* D_of(long column) const { return dS + k.width * column; }
  const Real* value(const Real* array, long t) const { return array + h.place(t) * V; }
  Real beta(long t) const { return U == Update::kDelta ? p.beta.data[h.at(t, p.beta.heads)] : 1.0f; }
  Due due_of(long j, long column) const {
    return {decay[j], U == Update::kLowRank ? w[j] : k[j], d_r[j] + column, sum_read[j], sum_decay[j]};
  }
  static void copy(Real* to, const Real* from, long n) {
    for (long i = 0; i < n; i += LANES) store(to + i, load(from + i, n - i));
  }

  // Fetches what the chunk before this one reads, a part of it with each step.
  JAXRNN_INLINE void look_ahead(long j, long column, const PanelShape& panel) const {
    if (begin < p.chunk) return;
    const Real* S = state(begin - p.chunk, column);
    for (long i = j * K / p.chunk; i < (j + 1) * K / p.chunk; ++i) prefetch(S + i * V, panel.columns);
    if (column > 0) return;
    const long t = h.time(begin - p.chunk + j);
    fetch<D, U>(h, t, 0, V);
    prefetch(value(g.d_ys, t), V);
    if constexpr (U != Update::kAdd) prefetch(value(p.reads, t), V);
  }

  // `later`: whether the first step of the chunk after this one is due.
  void load_chunk(bool later) {
    if (later)
      for (const Rows* rows : {&decay, &k, &q, &u, &w, &sum_q, &sum_k, &sum_u, &sum_read, &sum_decay, &r, &d_e, &d_r})
        std::memcpy((*rows)[count], (*rows)[0], rows->width * sizeof(Real));
    for (const Rows* rows : {&sum_q, &sum_k, &sum_u, &sum_read, &sum_decay})
      std::memset(rows->data, 0, count * rows->width * sizeof(Real));
    for (long j = 0; j < count; ++j) {
      const long t = h.time(begin + j);
      find_decay<D>(h, t, decay[j]);
      copy(k[j], h.key(p.k, t), K);
      copy(q[j], h.key(p.q, t), K);
      if constexpr (U == Update::kLowRank) copy(u[j], h.key(p.u, t), K), copy(w[j], h.key(p.w, t), K);
      copy(d_y[j], value(g.d_ys, t), V);
      copy(e[j], value(p.v, t), V);
      if constexpr (U != Update::kAdd) copy(r[j], value(p.reads, t), V);
      if constexpr (U == Update::kDelta)
        for (long c = 0; c < V; c += LANES) store(e[j] + c, beta(t) * (load(e[j] + c) - load(r[j] + c)));
    }
  }

  void find_fresh(Real* to, long column, const PanelShape& panel) const {
    if (p.fresh) panel.take(to, p.fresh + corner(column), K, V);
    else std::memset(to, 0, panel.size() * sizeof(Real));
  }

  // The states of a panel before the chunk and after each of its steps.
  void find_states(long column, const PanelShape& panel) {
    for (long c = panel.columns; c < panel.room; ++c) lanes_e[c] = lanes_r[c] = Vec{};
    panel.take(states, state(begin, column), K, V);
    for (long j = 0; j < count; ++j) {
      Real *before = states + j * panel.size(), *after = before + panel.size();
      if (h.starts(h.time(begin + j))) find_fresh(before = after, column, panel);
      const Real *of_e = e[j] + column, *of_r = r[j] + column;
      panel.each_block([&](long i, auto vectors) {
        constexpr long Z = vectors;
        Vec a[Z], to[Z], add[Z];
        for (long z = 0; z < Z; ++z) {
          const long at = i + z * LANES;
          if constexpr (D != Decay::kNone) a[z] = D == Decay::kRow ? load(decay[j] + at) : splat(decay[j][0]);
          to[z] = load(k[j] + at);
          if constexpr (U == Update::kLowRank) add[z] = load(u[j] + at);
        }
        const Real* from = before + i * panel.room;
        Real* into = after + i * panel.room;
        for (long c = 0; c < panel.columns; ++c)
          for (long z = 0; z < Z; ++z) {
            const long at = (c * Z + z) * LANES;
            Vec s = load(from + at);
            if constexpr (D != Decay::kNone) s = a[z] * s;
            s += to[z] * of_e[c];
            if constexpr (U == Update::kLowRank) s += add[z] * of_r[c];
            store(into + at, s);
          }
    });
    }
  }

  // D and S of a panel once: the second half of the step that is due, and if OWN the first one of step j.
  template <bool OWN>
  JAXRNN_INLINE void pass(long j, long column, const PanelShape& panel, const Real* S, const Due& due) {
    const Real *of_e = e[j] + column, *of_r = r[j] + column, *of_y = d_y[j] + column;
    panel.each_block([&](long i, auto vectors) {
      constexpr long Z = vectors;
      Vec a[Z], read[Z], of_k[Z], of_q[Z], of_u[Z], sq[Z] = {}, sk[Z] = {}, su[Z] = {}, sr[Z] = {}, sa[Z] = {};
      for (long z = 0; z < Z; ++z) {
        const long at = i + z * LANES;
        if constexpr (D != Decay::kNone) a[z] = D == Decay::kRow ? load(due.decay + at) : splat(due.decay[0]);
        if constexpr (U != Update::kAdd) read[z] = load(due.read + at);
        if constexpr (OWN) of_k[z] = load(k[j] + at), of_q[z] = load(q[j] + at);
        if constexpr (OWN && U == Update::kLowRank) of_u[z] = load(u[j] + at);
      }
      const Real* from = S + i * panel.room;
      Real* into = D_of(column) + i * panel.room;
      for (long c = 0; c < panel.columns; ++c) {
        const Real x_r = due.d_r[c], x_y = of_y[c], x_e = of_e[c], x_u = of_r[c];
        Vec to_e{}, to_r{};
        if (i > 0) to_e = lanes_e[c], to_r = lanes_r[c];
        for (long z = 0; z < Z; ++z) {
          const long at = (c * Z + z) * LANES;
          const Vec s = load(from + at);
          Vec d = load(into + at);
          if constexpr (U == Update::kDelta) d += read[z] * x_r;
          if constexpr (D != Decay::kNone) d = a[z] * d, sa[z] += d * s;
          if constexpr (U == Update::kLowRank) d += read[z] * x_r;
          if constexpr (OWN) {
            d += of_q[z] * x_y;
            sq[z] += s * x_y;
            sk[z] += d * x_e;
            to_e += of_k[z] * d;
            if constexpr (U == Update::kLowRank) su[z] += d * x_u, to_r += of_u[z] * d;
          }
          if constexpr (U != Update::kAdd) sr[z] += s * x_r;
          store(into + at, d);
        }
        if constexpr (OWN) lanes_e[c] = to_e;
        if constexpr (OWN && U == Update::kLowRank) lanes_r[c] = to_r;
      }
      auto add = [&](Real* to, const Vec* sums) {
        for (long z = 0; z < Z; ++z) store(to + i + z * LANES, load(to + i + z * LANES) + sums[z]);
      };
      if constexpr (OWN) add(sum_q[j], sq), add(sum_k[j], sk);
      if constexpr (OWN && U == Update::kLowRank) add(sum_u[j], su);
      if constexpr (U != Update::kAdd) add(due.sum_read, sr);
      if constexpr (D != Decay::kNone) add(due.sum_decay, sa);
    });
  }

  // Ends step j, which starts from a fresh state: nothing comes to the steps before it.
  void restart(long j, long column, const PanelShape& panel) {
    find_fresh(fresh, column, panel);
    pass<false>(j, column, panel, fresh, due_of(j, column));
    if (g.d_fresh) panel.give(D_of(column), g.d_fresh + corner(column), K, V, true);
    std::memset(D_of(column), 0, panel.size() * sizeof(Real));
  }

  void step(long j, long column, const PanelShape& panel) {
    const long next = begin + j + 1;
    look_ahead(j, column, panel);
    const bool starts = next < p.steps && h.starts(h.time(next)), due = next < p.steps && !starts;
    if (starts) restart(j + 1, column, panel);
    const Due none{ones, nothing, nothing, unused, unused + k.width};
    pass<true>(j, column, panel, states + (j + 1) * panel.size(), due ? due_of(j + 1, column) : none);
    const Real b = beta(h.time(begin + j));
    for (long c = 0; c < panel.room; c += LANES) {
      const Vec x = sums_of(lanes_e + c);
      store(d_e[j] + column + c, x);
      if constexpr (U == Update::kDelta) store(d_r[j] + column + c, -b * x);
      if constexpr (U == Update::kLowRank) store(d_r[j] + column + c, sums_of(lanes_r + c));
    }
  }

  // The cotangents of step j.
  void give(long j) {
    const long t = h.time(begin + j), place = h.place(t);
    Vec of_decay{};
    for (long i = 0; i < K; i += LANES) {
      const long n = K - i, at = place * K + i;
      Vec of_k = load(sum_k[j] + i);
      const Vec of_read = load(sum_read[j] + i), rows = load(sum_decay[j] + i);
      if constexpr (U == Update::kLowRank) store(g.d_u + at, load(sum_u[j] + i), n), store(g.d_w + at, of_read, n);
      if constexpr (U == Update::kDelta)
        of_k += D == Decay::kNone ? of_read
                : D == Decay::kRow ? load(decay[j] + i) * of_read : decay[j][0] * of_read;
      if constexpr (D == Decay::kRow) store(g.d_log_decay + at, rows, n);
      store(g.d_q + at, load(sum_q[j] + i), n);
      store(g.d_k + at, of_k, n);
      of_decay += rows;
    }
    if constexpr (D == Decay::kScalar) g.d_log_decay[place] = sum_of(of_decay);
    const Real b = beta(t), *v = value(p.v, t);
    Vec of_beta{};
    for (long c = 0; c < V; c += LANES) {
      const Vec of_e = load(d_e[j] + c);
      store(g.d_v + place * V + c, b * of_e, V - c);
      if constexpr (U == Update::kDelta) of_beta += of_e * (load(v + c, V - c) - load(r[j] + c));
    }
    if constexpr (U == Update::kDelta) g.d_beta[place] = sum_of(of_beta);
  }
};

// A task is a head, since the cotangents of its keys are sums over its panels.
inline void run_matrix_backward(const MatrixProblem& p, const MatrixGradient& g, int threads) {
  const long heads = p.rows * p.heads;
  with_kind(p, [&](auto decay, auto update) {
    using Task = BackwardHead<decltype(decay)::value, decltype(update)::value>;
    in_turns(heads, heads * p.steps * p.keys * p.values, threads, [&](long task) {
      Scratch scratch(Task::floats(p));
      Task(Head{p, task / p.heads, task % p.heads}, g, scratch.take(Task::floats(p))).run();
    });
  });
}
