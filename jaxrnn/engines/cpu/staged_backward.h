// Gated recurrences with options backwards, in chunks of steps: first the cotangents of sums, step by step; then, as large
// products over all rows of the chunk, those of weights and inputs.

template <class F>
class StagedBackwardRun : Staged<F> {
  using Base = Staged<F>;
  using Base::LSTM, Base::BEFORE, Base::APART, Base::GROUPS, Base::V, Base::VF, Base::E;
  using Base::n_, Base::rule_, Base::S_, Base::H_, Base::B_, Base::layout_, Base::out_, Base::blocks_, Base::width_;
  using Base::s_width_, Base::team_, Base::time, Base::valid, Base::wait, Base::heads, Base::norm, Base::projected;
  static constexpr int GATES = F::GATES, FIRST = F::FIRST;

 public:
  StagedBackwardRun(const StagedBackward& p, int threads)
      : Base(p, threads), p_(p), units_{H_, 1, OUT}, inputs_{p.n.inputs, 1, OUT} {
    const long D = n_.inputs, G = blocks_ * V * LANES, parts = team_.threads, K = rule_.theta();
    const long weights = p_.weights ? 1 : 0, second = BEFORE ? GROUPS * LANES * blocks_ : projected() ? s_width_ : 0;
    at_once_ = std::max(1l, std::min(n_.steps, 256 / B_));
    const long rows = at_once_ * B_, in = p_.d_xs ? inputs_.blocks() * inputs_.units() : 0;
    Scratch scratch(s_width_ * G + units_.blocks() * units_.units() * second + in * G +
                    weights * (G * (D + S_ + 1) + second * H_) +
                    B_ * (5 * s_width_ + 2 * units_.blocks() * units_.units() + (E + 6) * width_ + 4) + 2 * (rows + 1) * G +
                    (rows + 1) * (second + H_ + S_ + 32) + K * width_ * (parts + 1) + parts * (4 + 2 * LANES) * B_ + 64 * parts + D + S_ + H_ + 2048);
    w_h_ = scratch.take(FIRST ? s_width_ * G : 0);
    w_2_ = scratch.take(units_.blocks() * units_.units() * second);
    w_x_ = scratch.take(in * G);
    d_w_x_ = scratch.take(weights * G * D);
    d_w_h_ = scratch.take(weights * G * S_);
    d_w_2_ = scratch.take(weights * second * H_);
    d_b_ = scratch.take(weights * G);
    theta_ = scratch.take(K * width_);
    d_theta_ = scratch.take(parts * K * width_);
    d_h_ = scratch.take(B_ * s_width_);
    through_ = scratch.take(B_ * s_width_);
    d_read_ = scratch.take(B_ * std::max(s_width_, width_));
    for (int e = 0; e < E; ++e) d_rest_[e] = scratch.take(B_ * width_);
    d_mid_ = scratch.take(B_ * units_.blocks() * units_.units());
    mid_rows_ = scratch.rows(d_mid_, B_, mid_width());
    carried_ = scratch.take(B_ * s_width_);
    carried_rows_ = scratch.rows(carried_, B_, s_width_);
    work_ = scratch.take(2 * B_ * width_);
    normal_ = scratch.take(B_ * width_);
    d_u_ = scratch.take((rows + 1) * G);
    d_v_ = APART || norm() ? scratch.take((rows + 1) * G) : d_u_;
    for (Real*& each : along_) each = scratch.take(parts * B_ * LANES);
    d_second_ = scratch.take(projected() ? (rows + 1) * s_width_ : 0);
    mids_ = scratch.take(second ? rows * H_ : 0);
    reads_ = scratch.take(p_.mask ? rows * S_ : 0);
    nothing_ = scratch.take(std::max({D, S_, H_}));
    for (Real*& each : partial_) each = scratch.take(parts * B_);
    std::memset(nothing_, 0, std::max({D, S_, H_}) * sizeof(Real));
    if (p_.valid || p_.start) trace();
  }

  void run() {
    in_team(team_, [&](const Worker& w) {
      prepare(w);
      w.barrier.wait();
      for (long last = n_.steps; last > 0; last -= at_once_) {
        const Chunk chunk{std::max(0l, last - at_once_), last};
        for (long k = last - 1; k >= chunk.first; --k) step(chunk, k, w);
        w.barrier.wait();
        if (p_.weights) weights(chunk, w.part(blocks_), w.part(projected() ? out_.blocks() : 0));
        if (p_.d_xs) inputs(chunk, w.part(chunk.steps() * B_));
        w.barrier.wait();
      }
      finish(w);
    });
  }

 private:
  struct Chunk {
    long first, last;
    long steps() const { return last - first; }
    // Rows between two panels: one more than there are, or panels of a power of two would share the same cache sets.
    long stride(long rows) const { return steps() * rows + 1; }
  };
  // Vectors of every row of a chunk, (block, row, width).
  static Real* panel(Real* base, const Chunk& chunk, long rows, long width, long j, long m) {
    return base + (j * chunk.stride(rows) + m) * width;
  }
  // Of the gates' sums as they read x and as they read h, and then of the products themselves, before their norm.
  Real* d_u(const Chunk& chunk, long j, long m) const { return panel(d_u_, chunk, B_, V * LANES, j, m); }
  Real* d_v(const Chunk& chunk, long j, long m) const { return panel(d_v_, chunk, B_, V * LANES, j, m); }
  Real* d_second(const Chunk& chunk, long j, long m) const { return panel(d_second_, chunk, B_, OUT * LANES, j, m); }
  Panels panels_of(const Chunk& chunk, const Real* first, long width, long each) const {
    return {first, chunk.stride(B_) * width, width, each};
  }
  const Real* kept(long at) const { return p_.kept + at * rule_.kept(H_); }
  const Real* stats(long at) const { return kept(at) + rule_.before_stats(H_); }

  void prepare(const Worker& w) {
    const long D = n_.inputs, G = GATES * H_, columns = (FIRST + BEFORE) * H_;
    const Range blocks = w.part(blocks_), units = w.part(units_.blocks()), out = w.part(out_.blocks());
    if (FIRST) pack_transposed(p_.w_h, columns, layout_, 0, VF, out_, out, w_h_);
    if (BEFORE) pack_transposed(p_.w_h, columns, layout_, GATES - 1, GATES, units_, units, w_2_);
    if (projected()) pack_transposed(p_.w_2, S_, out_, 0, OUT, units_, units, w_2_);
    if (p_.d_xs) pack_transposed(p_.w_x, G, layout_, 0, V, inputs_, w.part(inputs_.blocks()), w_x_);
    auto zero = [](Real* to, Range part, long each) {
      std::memset(to + part.begin * each, 0, part.size() * each * sizeof(Real));
    };
    if (p_.weights) {
      zero(d_w_x_, blocks, V * LANES * D), zero(d_w_h_, blocks, V * LANES * S_), zero(d_b_, blocks, V * LANES);
      if (BEFORE) zero(d_w_2_, blocks, LANES * H_);
      if (projected()) zero(d_w_2_, out, OUT * LANES * H_);
    }
    if (w.number == 0) this->pad_theta(theta_);
    for (Real* each : along_) zero(each, {w.number, w.number + 1}, B_ * LANES);
    zero(d_theta_, {w.number, w.number + 1}, rule_.theta() * width_);
    const Range rows = w.part(B_);
    zero(d_h_, rows, s_width_), zero(through_, rows, s_width_), zero(d_read_, rows, std::max(s_width_, width_));
    for (long r = rows.begin; r < rows.end; ++r) {
      std::memcpy(d_h_ + r * s_width_, p_.d_last_h + r * S_, S_ * sizeof(Real));
      for (int e = 0; e < E; ++e) {
        zero(d_rest_[e], {r, r + 1}, width_);
        std::memcpy(d_rest_[e] + r * width_, p_.d_last_rest + (r * E + e) * H_, H_ * sizeof(Real));
      }
    }
    if (p_.d_fresh_h) zero(p_.d_fresh_h, rows, S_);
    if (p_.d_fresh_rest) zero(p_.d_fresh_rest, rows, E * H_);
  }

  void finish(const Worker& w) const {
    const long D = n_.inputs, G = GATES * H_, columns = (FIRST + BEFORE) * H_;
    const Range rows = w.part(B_), blocks = w.part(blocks_);
    for (long r = rows.begin; r < rows.end; ++r) {
      std::memcpy(p_.d_h + r * S_, d_h_ + r * s_width_, S_ * sizeof(Real));
      for (int e = 0; e < E; ++e)
        std::memcpy(p_.d_rest + (r * E + e) * H_, d_rest_[e] + r * width_, H_ * sizeof(Real));
    }
    if (!p_.weights) return;
    unpack(d_w_x_, D, G, layout_, blocks, p_.d_w_x);
    if (FIRST) unpack(d_w_h_, S_, columns, Layout{H_, FIRST, VF}, blocks, p_.d_w_h);
    if (BEFORE) unpack(d_w_2_, H_, columns, Layout{H_, 1, GROUPS}, blocks, p_.d_w_h + FIRST * H_);
    if (projected()) unpack(d_w_2_, H_, S_, out_, w.part(out_.blocks()), p_.d_w_2);
    if (p_.d_b) unpack(d_b_, 1, G, layout_, blocks, p_.d_b);
    const Range theta = w.part(rule_.theta());
    for (long k = theta.begin; p_.d_theta && k < theta.end; ++k)
      for (long u = 0; u < H_; ++u) {
        Real sum = 0;
        for (int part = 0; part < w.count; ++part) sum += d_theta_[(part * rule_.theta() + k) * width_ + u];
        p_.d_theta[k * H_ + u] = sum;
      }
  }

  // For every step of every row where the carry before it lies: after which step, or in the first or a fresh carry.
  static constexpr int32_t NONE = -1, FRESH = -2;
  void trace() {
    before_.resize(n_.steps * B_);
    for (long b = 0; b < B_; ++b) {
      int32_t last = NONE;
      for (long k = 0; k < n_.steps; ++k) {
        const long at = n_.at(time(k), b);
        before_[at] = start(at) ? FRESH : last;
        if (valid(at)) last = static_cast<int32_t>(time(k));
      }
    }
  }
  bool start(long at) const { return p_.start && p_.start[at]; }
  const Real* before(long k, long b, const Real* states, const Real* first, const Real* fresh, long size) const {
    long t = k == 0 ? NONE : time(k - 1);
    if (!before_.empty()) t = before_[n_.at(time(k), b)];
    return t == FRESH ? fresh + b * size : t == NONE ? first + b * size : states + n_.at(t, b) * size;
  }
  const Real* h_before(long k, long b) const { return before(k, b, p_.ys, p_.h, p_.fresh_h, S_); }
  const Real* rest_before(long k, long b) const {
    return before(k, b, p_.rests, p_.rest, p_.fresh_rest, E * H_);
  }

  void step(const Chunk& chunk, long k, const Worker& w) {
    in_groups(w, w.rows(B_), [&](Range rows) { step_of(chunk, k, rows, w); });
  }
  void step_of(const Chunk& chunk, long k, Range rows, const Worker& w) {
    const Range units = w.blocks(units_.blocks()), out = w.blocks(out_.blocks());
    const long scale = units_.units() / layout_.units();
    const Place at{chunk, k, (k - chunk.first) * B_, w, rows,
                   {std::min(units.begin * scale, blocks_), std::min(units.end * scale, blocks_)}};
    if (projected()) {
      project(at, out);
      wait(w);
      transposed(at, units);
    }
    if constexpr (BEFORE) {
      second_gates(at);
      if (norm()) second_norm(at);
      wait(w);
      transposed(at, units);
    }
    if constexpr (LSTM)
      if (norm()) output_norm(at);
    gates(at);
    if (norm()) norms(at);
    wait(w);
    carry(at, out);
    wait(w);
  }

  // A step of a chunk, and the part of a worker; m is the chunk's row of row 0.
  struct Place {
    const Chunk& chunk;
    long k, m;
    const Worker& worker;
    Range rows, blocks;
  };
  long at(const Place& p, long row) const { return n_.at(time(p.k), row); }

  // The units of a step's rows, with what was before it.
  template <class Work>
  JAXRNN_INLINE void each(const Place& p, const Work& work) const {
    auto before = [&](Entry& e) { e.h = h_before(p.k, e.row), e.rest = rest_before(p.k, e.row); };
    this->template batches<true>(p.k, p.rows, p.blocks, theta_, before, work);
  }

  // The cotangent of the new h; what stays of h goes on as it is.
  JAXRNN_INLINE Vec d_new(long at, long row, long unit, long n) const {
    const long place = row * s_width_ + unit;
    const Vec d = load(d_h_ + place) + load(p_.d_ys + at * S_ + unit, n);
    const Vec z = rule_.zoned ? this->h_stays(at, unit, n) : Vec{};
    store(through_ + place, z * d);
    return (1.0f - z) * d;
  }

  // The same where h is a projection.
  void project(const Place& p, Range out) const {
    for (long j = out.begin; j < out.end; ++j)
      for (long row = p.rows.begin; row < p.rows.end; ++row)
        for (int v = 0; v < OUT; ++v) {
          const long n = out_.lanes(j, v), step = at(p, row);
          const bool live = n && valid(step);
          store(d_second(p.chunk, j, p.m + row) + v * LANES, live ? d_new(step, row, out_.unit(j, v), n) : Vec{});
        }
  }

  // The cotangent of what the second product reads.
  void transposed(const Place& p, Range units) const {
    const long each = BEFORE ? LANES : OUT * LANES, panels = BEFORE ? blocks_ : out_.blocks(), m = p.m + p.rows.begin;
    const Panels d = BEFORE ? panels_of(p.chunk, d_v(p.chunk, 0, m) + (GATES - 1) * LANES, V * LANES, each)
                            : panels_of(p.chunk, d_second(p.chunk, 0, m), each, each);
    for (long j = units.begin; j < units.end; ++j)
      product_of_panels(d, {0, panels}, w_2_ + j * panels * each * OUT * LANES, p.rows.size(), mid_rows_ + p.rows.begin,
                        units_.unit(j, 0), units_.units());
  }
  long mid_width() const { return units_.blocks() * units_.units(); }

  Vec theta(long k, long unit) const { return load(theta_ + k * width_ + unit); }
  void add_theta(const Worker& w, long k, long unit, Vec d) const {
    Real* to = d_theta_ + (w.number * rule_.theta() + k) * width_ + unit;
    store(to, load(to) + d);
  }

  // What the next step reads lies on other pages, in more streams than a processor follows by itself.
  JAXRNN_INLINE void look_ahead(const Place& p, const Entry& e) const {
    if (p.k == 0) return;
    const long next = n_.at(time(p.k - 1), e.row);
    const Real* from = kept(next) + e.unit;
    const int vectors = norm() ? 2 * GATES + LSTM : F::SUMS;
    for (int q = 0; q < vectors; ++q) __builtin_prefetch(from + q * H_);
    for (int s = 0; s < E; ++s) __builtin_prefetch(p_.rests + (next * E + s) * H_ + e.unit);
    if (!projected()) __builtin_prefetch(p_.d_ys + next * S_ + e.unit), __builtin_prefetch(p_.ys + next * S_ + e.unit);
  }

  // Some gates or their sums.
  template <class B>
  JAXRNN_INLINE void recall_gates(B& b, int first, int last) const {
    for (int i = 0; i < b.n; ++i) {
      const Entry& e = b.entries[i];
      const Real* from = kept(e.at) + e.unit;
      for (int q = first; q < last; ++q) b.a[q][i] = norm() ? sum_of_normal(b, i, from, q) : load(from + q * H_, e.n);
      if (LSTM && norm()) b.c[i] = load(from + 2 * GATES * H_, e.n);
    }
  }
  // What else the gates read, and what is asked of them.
  template <class B>
  JAXRNN_APART void recall(const Place& p, B& b) const {
    recall_gates(b, 0, LSTM && norm() ? GATES - 1 : F::SUMS);
    for (int i = 0; i < b.n; ++i) {
      const Entry& e = b.entries[i];
      look_ahead(p, e);
      if (!LSTM) b.s[0][i] = load(e.h + e.unit, e.n);
      if (BEFORE || FIRST == 0) b.read[i] = p_.mask ? b.s[0][i] * load(p_.mask + e.row * S_ + e.unit, e.n) : b.s[0][i];
      for (int s = 0; s < E; ++s) {
        b.s[s + 1][i] = load(e.rest + s * H_ + e.unit, e.n);
        const Vec d = load(d_rest_[s] + e.row * width_ + e.unit);
        const Vec z = rule_.zoned ? this->rest_stays(e.at, s, e.unit, e.n) : Vec{};
        b.through[s + 1][i] = z * d;
        b.d_s[s + 1][i] = (1.0f - z) * d;
      }
    }
  }
  template <class B>
  JAXRNN_INLINE Vec sum_of_normal(const B& b, int i, const Real* from, int q) const {
    const Entry& e = b.entries[i];
    const int gate = q < GATES ? q : GATES - 1;
    const Vec u = load(from + gate * H_, e.n) * b.theta(this->gain_x() + gate, i) + b.theta(this->shift() + gate, i);
    const Vec v = load(from + (GATES + gate) * H_, e.n) * b.theta(this->gain_h() + gate, i);
    return !APART || q < 2 ? u + v : q == 2 ? v + b.theta(0, i) : u;
  }
  JAXRNN_INLINE Vec d_output(const Entry& e) const {
    if (projected()) return load(d_mid_ + e.row * mid_width() + e.unit);
    return e.live ? d_new(e.at, e.row, e.unit, e.n) : Vec{};
  }
  Real* d_sums(Real* base, const Place& p, const Entry& e) const {
    return panel(base, p.chunk, B_, V * LANES, Base::block_of(e.unit), p.m + e.row) + Base::in_block(e.unit);
  }

  // From the cotangents of the gates' results those of their sums, of θ and of the states, where no product is between.
  void gates(const Place& p) const {
    each(p, [&](auto& b) {
      recall(p, b);
      for (int i = 0; i < b.n; ++i) {
        const Entry& e = b.entries[i];
        if (BEFORE) {
          b.d_y[i] = load(d_mid_ + e.row * mid_width() + e.unit);
          b.d_a[F::FIRST > 0 ? F::FIRST - 1 : 0][i] = load(work_ + e.row * width_ + e.unit);
        } else if (LSTM && norm()) {
          b.d_y[i] = load(work_ + e.row * width_ + e.unit);
          b.d_a[GATES - 1][i] = load(work_ + (B_ + e.row) * width_ + e.unit);
        } else {
          b.d_y[i] = d_output(e);
        }
      }
      if constexpr (BEFORE) {
        F::back_first(b);
      } else if constexpr (LSTM) {
        F::cell(b);
        if (!norm()) F::output_gate(b), F::back_output(b);
        F::back_gates(b);
      } else {
        F::back(b);
      }
      for (int i = 0; i < b.n; ++i) hand_back(p, b, i);
    });
    // Vectors of the last block that hold no unit.
    for (int g = 0; GROUPS > 1 && p.blocks.end == blocks_ && g < GROUPS; ++g)
      for (long row = p.rows.begin; layout_.lanes(blocks_ - 1, g) == 0 && row < p.rows.end; ++row)
        for (Real* d : {d_u(p.chunk, blocks_ - 1, p.m + row), d_v(p.chunk, blocks_ - 1, p.m + row)})
          store(d + g * LANES, Vec{});
  }

  template <class B>
  JAXRNN_INLINE void hand_back(const Place& p, const B& b, int i) const {
    constexpr int COUNT = BEFORE ? FIRST : GATES;
    const Entry& e = b.entries[i];
    Real *u = d_sums(d_u_, p, e), *v = d_sums(d_v_, p, e);
    if (!e.live) {
      for (int q = 0; q < COUNT; ++q) store(u + q * LANES, Vec{}), store(v + q * LANES, Vec{});
      if (BEFORE || (projected() && !norm())) store(mids_ + (p.m + e.row) * H_ + e.unit, Vec{}, e.n);
      return;
    }
    for (int q = 0; q < COUNT; ++q) {
      store(u + q * LANES, b.d_a[APART && q == 2 ? 3 : q][i]);
      if (APART) store(v + q * LANES, b.d_a[q][i]);
    }
    if (norm()) along<0, COUNT>(p, b, i);
    if (BEFORE || (projected() && !norm())) store(mids_ + (p.m + e.row) * H_ + e.unit, b.y[i], e.n);
    for (int q = 0; q < F::THETA; ++q) add_theta(p.worker, q, e.unit, b.d_theta[q][i]);
    if (!LSTM) {
      Real *through = through_ + e.row * s_width_ + e.unit, *read = d_read_ + e.row * s_width_ + e.unit;
      if (!BEFORE) store(through, load(through) + b.d_s[0][i]);
      store(read, b.d_read[i]);
    }
    for (int s = 0; s < E; ++s) {
      Vec d = b.d_s[s + 1][i] + b.through[s + 1][i];
      if (start(e.at)) {
        Real* fresh = p_.d_fresh_rest + (e.row * E + s) * H_ + e.unit;
        store(fresh, load(fresh, e.n) + d, e.n);
        d = Vec{};
      }
      store(d_rest_[s] + e.row * width_ + e.unit, d);
    }
  }

  // Where a second product is between: the cotangents of its sum and of the update gate.
  void second_gates(const Place& p) const {
    if constexpr (BEFORE) {
      each(p, [&](auto& b) {
        recall(p, b);
        for (int i = 0; i < b.n; ++i) b.d_y[i] = d_output(b.entries[i]);
        F::back_second(b);
        for (int i = 0; i < b.n; ++i) {
          const Entry& e = b.entries[i];
          store(d_sums(d_u_, p, e) + (GATES - 1) * LANES, e.live ? b.d_a[GATES - 1][i] : Vec{});
          if (norm() && e.live) along<GATES - 1, GATES>(p, b, i);
          Real* through = through_ + e.row * s_width_ + e.unit;
          store(through, load(through) + b.d_s[0][i]);
          store(work_ + e.row * width_ + e.unit, b.d_a[F::UPDATE][i]);
        }
      });
    }
  }

  Real together(const Worker& w, int slot, long row) const {
    if (w.by_rows) return partial_[slot][w.number * B_ + row];
    Real sum = 0;
    for (int k = 0; k < w.count; ++k) sum += partial_[slot][k * B_ + row];
    return sum;
  }

  // Through v = v̂ γ, where v̂ = scale · (v − its mean, which the weights are without): for every row the sum of
  // d γ v̂ over gates and units, by every worker, of u and of v.
  Real* row_sum(const Place& p, int which, long row) const { return along_[which] + (p.worker.number * B_ + row) * LANES; }
  template <int FROM, int TO, class B>
  JAXRNN_INLINE void along(const Place& p, const B& b, int i) const {
    const Entry& e = b.entries[i];
    const Real* normal = kept(e.at) + e.unit;
    Real *u = row_sum(p, 0, e.row), *v = row_sum(p, 1, e.row);
    Vec of_u{}, of_v{};
    for (int q = FROM; q < TO; ++q) {
      of_u += b.d_a[APART && q == 2 ? 3 : q][i] * b.theta(this->gain_x() + q, i) * load(normal + q * H_, e.n);
      of_v += b.d_a[q][i] * b.theta(this->gain_h() + q, i) * load(normal + (GATES + q) * H_, e.n);
    }
    store(u, load(u) + of_u), store(v, load(v) + of_v);
  }
  void hand_in(const Place& p, int which, int slot) const {
    for (long row = p.rows.begin; row < p.rows.end; ++row) {
      Real* sum = row_sum(p, which, row);
      partial_[slot][p.worker.number * B_ + row] = sum_of(load(sum));
      store(sum, Vec{});
    }
  }
  // Then the cotangents of the products for gates [FROM, TO), of x or of h, by the sum in a slot and the scale in a place
  // among the numbers that are kept; and those of gains, and with x of biases.
  template <int FROM, int TO>
  void norm_back(const Place& p, bool of_h, int slot, int stat) const {
    const long H = H_, width = width_, gain = of_h ? this->gain_h() : this->gain_x();
    const Real *gains = theta_ + gain * width, columns = static_cast<Real>((TO - FROM) * H);
    Real *d_gains = d_theta_ + (p.worker.number * rule_.theta() + gain) * width;
    Real *d_biases = d_gains + (this->shift() - gain) * width;
    for (long row = p.rows.begin; row < p.rows.end; ++row) {
      const long step = at(p, row), m = p.m + row;
      const bool live = valid(step);
      const Real* from = kept(step) + (of_h ? GATES * H : 0);
      const Vec mean = splat(live ? together(p.worker, slot, row) / columns : 0), scale = splat(live ? stats(step)[stat] : 0);
      for (long j = p.blocks.begin; j < p.blocks.end; ++j) {
        const long unit = layout_.unit(j, 0), n = layout_.lanes(j, 0);
        const Real* d = of_h && APART ? d_v(p.chunk, j, m) : d_u(p.chunk, j, m);
        Real* to = of_h ? d_v(p.chunk, j, m) : d_u(p.chunk, j, m);
        for (int q = FROM; q < TO; ++q) {
          const long place = q * width + unit;
          const Vec of_sum = load(d + q * LANES), normal = live ? load(from + q * H + unit, n) : Vec{};
          store(d_gains + place, load(d_gains + place) + of_sum * normal);
          if (!of_h) store(d_biases + place, load(d_biases + place) + of_sum);
          store(to + q * LANES, scale * (of_sum * load(gains + place) - normal * mean));
        }
      }
    }
  }

  void norms(const Place& p) const {
    hand_in(p, 0, 0), hand_in(p, 1, 1);
    wait(p.worker);
    norm_back<0, FIRST>(p, true, 1, 1);
    norm_back<0, GATES>(p, false, 0, 0);
  }
  void second_norm(const Place& p) const {
    hand_in(p, 1, 2);
    wait(p.worker);
    norm_back<GATES - 1, GATES>(p, true, 2, 2);
  }

  // Through χ and the norm of c': what `gates` begins from.
  void output_norm(const Place& p) const {
    if constexpr (LSTM) {
      each(p, [&](auto& b) {
        recall_gates(b, GATES - 1, GATES);
        for (int i = 0; i < b.n; ++i) {
          const Entry& e = b.entries[i];
          b.d_y[i] = d_output(e);
          b.mean[i] = splat(stats(e.at)[2]), b.scale[i] = splat(stats(e.at)[3]);
        }
        F::output_gate(b);
        F::back_output(b);
        for (int i = 0; i < b.n; ++i) {
          const Entry& e = b.entries[i];
          const long place = e.row * width_ + e.unit;
          const Vec normal = (b.c[i] - b.mean[i]) * b.scale[i], d = b.d_y[i] * F::gain(b, i);
          store(work_ + place, d), store(work_ + B_ * width_ + place, b.d_a[GATES - 1][i]);
          store(normal_ + place, normal);
          Real *sum = row_sum(p, 0, e.row), *along = row_sum(p, 1, e.row);
          store(sum, load(sum) + d), store(along, load(along) + d * normal);
          if (projected()) store(mids_ + (p.m + e.row) * H_ + e.unit, e.live ? b.y[i] : Vec{}, e.n);
          if (!e.live) continue;
          add_theta(p.worker, this->gain_c(), e.unit, b.d_y[i] * normal);
          add_theta(p.worker, this->gain_c() + 1, e.unit, b.d_y[i]);
        }
      });
      hand_in(p, 0, 2), hand_in(p, 1, 3);
      wait(p.worker);
      const Real size = static_cast<Real>(H_);
      for (long row = p.rows.begin; row < p.rows.end; ++row) {
        const Vec mean = splat(together(p.worker, 2, row) / size), along = splat(together(p.worker, 3, row) / size);
        const Vec scale = splat(stats(at(p, row))[3]);
        for (long j = p.blocks.begin; j < p.blocks.end; ++j) {
          const long place = row * width_ + layout_.unit(j, 0);
          store(work_ + place, scale * (load(work_ + place) - mean - load(normal_ + place) * along));
        }
      }
    }
  }

  // The cotangent of h before the step.
  void carry(const Place& p, Range out) const {
    constexpr long each = VF * LANES;
    const Panels d = panels_of(p.chunk, d_v(p.chunk, 0, p.m + p.rows.begin), V * LANES, each);
    for (long j = out.begin; j < out.end; ++j) {
      const Range units = rule_.heads == 1 ? Range{0, H_} : heads(j * out_.units(), out_.units());
      if constexpr (VF > 0)
        product_of_panels(d, {units.begin / layout_.units(), (units.end - 1) / layout_.units() + 1},
                          w_h_ + j * blocks_ * each * OUT * LANES, p.rows.size(), carried_rows_ + p.rows.begin,
                          out_.unit(j, 0), out_.units(), B_ == 1);
      for (long row = p.rows.begin; row < p.rows.end; ++row) carry_row(p, j, row);
    }
  }
  void carry_row(const Place& p, long j, long row) const {
    const bool live = valid(at(p, row));
    for (int v = 0; v < OUT; ++v) {
      const long unit = out_.unit(j, v), n = out_.lanes(j, v), place = row * s_width_ + unit;
      if (n == 0) continue;
      const Vec mask = p_.mask ? load(p_.mask + row * S_ + unit, n) : splat(1.0f);
      if (p_.mask) store(reads_ + (p.m + row) * S_ + unit, live ? load(h_before(p.k, row) + unit, n) * mask : Vec{}, n);
      if (!live) continue;
      Vec d = VF > 0 ? load(carried_ + place) : Vec{};
      if (!LSTM) d += load(d_read_ + place);
      d = d * mask + load(through_ + place);
      if (start(at(p, row))) {
        Real* fresh = p_.d_fresh_h + row * S_ + unit;
        store(fresh, load(fresh, n) + d, n);
        d = Vec{};
      }
      store(d_h_ + place, d);
    }
  }

  static constexpr long MOST = 128;  // rows of a chunk at once

  // d_w_x += xsᵀ d_u, d_w_h += sᵀ d_v, d_b += Σ d_u and those of the second product, over the rows of a chunk.
  void weights(const Chunk& chunk, Range blocks, Range out) const {
    const long D = n_.inputs, count = chunk.steps() * B_;
    const Real *x[MOST], *s[MOST], *mid[MOST];
    for (long begin = 0; begin < count; begin += MOST) {
      const long size = std::min(MOST, count - begin);
      for (long i = 0; i < size; ++i) {
        const long k = chunk.first + (begin + i) / B_, row = (begin + i) % B_, at = n_.at(time(k), row);
        const bool live = valid(at);
        x[i] = live ? p_.xs + at * D : nothing_;
        s[i] = !live ? nothing_ : p_.mask ? reads_ + (begin + i) * S_ : h_before(k, row);
        mid[i] = mids_ + (begin + i) * H_;
      }
      for (long j = blocks.begin; j < blocks.end; ++j) {
        const Real *u = d_u(chunk, j, begin), *v = d_v(chunk, j, begin);
        gram<V>(x, size, {0, D}, u, V * LANES, d_w_x_ + j * V * LANES * D, V * LANES);
        if constexpr (VF > 0)
          gram<VF>(s, size, heads(j * layout_.units(), layout_.units()), v, V * LANES, d_w_h_ + j * VF * LANES * S_, VF * LANES);
        if constexpr (BEFORE)
          gram<1>(mid, size, {0, H_}, v + (GATES - 1) * LANES, V * LANES, d_w_2_ + j * LANES * H_, LANES);
        if (p_.d_b) add_rows<V>(u, size, V * LANES, d_b_ + j * V * LANES);
      }
      for (long j = out.begin; projected() && j < out.end; ++j)
        gram<OUT>(mid, size, {0, H_}, d_second(chunk, j, begin), OUT * LANES, d_w_2_ + j * OUT * LANES * H_, OUT * LANES);
    }
  }

  // d_xs = d_u w_xᵀ.
  void inputs(const Chunk& chunk, Range rows) const {
    const long D = n_.inputs, width = V * LANES;
    Real* d_x[MOST];
    for (long begin = rows.begin; begin < rows.end; begin += MOST) {
      const long size = std::min(MOST, rows.end - begin);
      for (long i = 0; i < size; ++i)
        d_x[i] = p_.d_xs + n_.at(time(chunk.first + (begin + i) / B_), (begin + i) % B_) * D;
      const Panels d = panels_of(chunk, d_u(chunk, 0, begin), width, width);
      for (long j = 0; j < inputs_.blocks(); ++j)
        product_of_panels(d, {0, blocks_}, w_x_ + j * blocks_ * width * OUT * LANES, size, d_x, inputs_.unit(j, 0),
                          D - inputs_.unit(j, 0));
    }
  }

  const StagedBackward& p_;
  const Layout units_, inputs_;
  Real **mid_rows_, **carried_rows_;
  std::vector<int32_t> before_;
  long at_once_;
  Real *w_h_, *w_2_, *w_x_, *d_w_x_, *d_w_h_, *d_w_2_, *d_b_, *theta_, *d_theta_;
  Real *d_h_, *through_, *d_read_, *d_rest_[E > 0 ? E : 1], *d_mid_, *carried_, *work_, *normal_;
  Real *d_u_, *d_v_, *d_second_, *mids_, *reads_, *nothing_, *partial_[4], *along_[2];
};

// f of the family.
template <class Work>
inline void with_family(Family family, const Work& work) {
  switch (family) {
    case Family::kElman: return work(Elman{});
    case Family::kIndRnn: return work(IndRnn{});
    case Family::kLstm: return work(Lstm<false>{});
    case Family::kCoupledLstm: return work(Lstm<true>{});
    case Family::kGru: return work(Gru{});
    case Family::kGruBefore: return work(ResetBefore<false>{});
    case Family::kMgu: return work(ResetBefore<true>{});
    case Family::kSlstm: return work(Slstm{});
  }
}

inline void run_staged(const StagedForward& p, int threads) {
  with_family(p.rule.family, [&](auto family) { StagedForwardRun<decltype(family)>(p, threads).run(); });
}
inline void run_staged_backward(const StagedBackward& p, int threads) {
  with_family(p.rule.family, [&](auto family) { StagedBackwardRun<decltype(family)>(p, threads).run(); });
}
