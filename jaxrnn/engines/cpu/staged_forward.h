// Gated recurrences with options, in stages: of every step the products with h of all units, then what the gates do with
// them, row by row. Threads divide the rows or the units, as those of the plain kernels do. Stages that
// need all units of a row (norms, second products) begin when every thread has done what comes before.

template <class F>
class StagedForwardRun : Staged<F> {
  using Base = Staged<F>;
  using Base::LSTM, Base::BEFORE, Base::APART, Base::GROUPS, Base::V, Base::VF, Base::E;
  using Base::n_, Base::rule_, Base::S_, Base::H_, Base::B_, Base::layout_, Base::out_, Base::blocks_, Base::width_;
  using Base::s_width_, Base::team_, Base::time, Base::valid, Base::starts, Base::wait, Base::heads, Base::norm, Base::projected;

 public:
  StagedForwardRun(const StagedForward& p, int threads) : Base(p, threads), p_(p) {
    const long block = layout_.width(), parts = team_.threads, D = n_.inputs;
    most_rows_ = team_.by_rows ? (B_ + parts - 1) / parts : B_;
    const long floats = team_.by_rows ? blocks_ * block : (blocks_ + parts - 1) / parts * block;
    at_once_ = steps_at_once(n_, most_rows_, floats, 32);
    u_size_ = Scratch::rounded(at_once_ * most_rows_ * floats);
    const long second = BEFORE ? width_ * H_ : projected() ? s_width_ * H_ : 0, chunk = at_once_ * most_rows_;
    Scratch scratch(blocks_ * (block * (D + 1) + VF * LANES * S_) + second + rule_.theta() * width_ +
                    B_ * (5 * s_width_ + (E + 1) * width_ + blocks_ * block + 6) +
                    parts * (u_size_ + 4 * chunk + 6 * B_ + 128) + 1024);
    x_ = scratch.take(blocks_ * block * D);
    h_ = scratch.take(blocks_ * VF * LANES * S_);
    second_ = scratch.take(second);
    bias_ = scratch.take(blocks_ * block);
    theta_ = scratch.take(rule_.theta() * width_);
    for (int k = 0; k < 2; ++k) {
      state_[k] = scratch.take(B_ * s_width_);
      read_[k] = p_.mask ? scratch.take(B_ * s_width_) : state_[k];
    }
    for (int e = 0; e < E; ++e) rest_[e] = scratch.take(B_ * width_);
    mid_ = scratch.take(B_ * width_);
    sums_ = scratch.take(blocks_ * B_ * block);
    projected_ = scratch.take(projected() ? B_ * s_width_ : 0);
    for (int k = 0; k < 2; ++k) read_rows_[k] = scratch.rows(read_[k], B_, s_width_);
    mid_rows_ = scratch.rows(mid_, B_, width_);
    u_ = scratch.take(parts * u_size_);
    x_rows_ = reinterpret_cast<const Real**>(scratch.take(2 * parts * chunk));
    of_u_ = scratch.take(parts * chunk), scale_u_ = scratch.take(parts * chunk);
    for (Real** each : {&of_v_, &scale_v_, &of_w_, &of_c_}) *each = scratch.take(parts * B_);
    of_rows_ = scratch.take(2 * parts * B_);
  }

  void run() {
    in_team(team_, [&](const Worker& w) {
      const Range rows = w.rows(B_), blocks = w.blocks(blocks_);
      prepare(w);
      w.barrier.wait();
      for (long first = 0; first < n_.steps; first += at_once_) {
        const Chunk chunk{first, std::min(at_once_, n_.steps - first), rows, blocks, u_ + w.number * u_size_,
                          x_rows_ + w.number * at_once_ * most_rows_};
        project(chunk, w);
        for (long k = first; k < first + chunk.steps; ++k) step(chunk, k, w);
      }
      finish(w);
    });
  }

 private:
  // Steps whose u lies in memory, (step, row, block, width).
  struct Chunk {
    long first, steps;
    Range rows, blocks;
    Real* u;
    const Real** x;
    long count() const { return steps * rows.size(); }
    long at(long k, long row) const { return (k - first) * rows.size() + row - rows.begin; }
  };

  // The products with x and those with h: of every row the vectors of all blocks.
  Real* of_x(const Chunk& chunk, long m, long j) const {
    return chunk.u + (m * chunk.blocks.size() + j - chunk.blocks.begin) * V * LANES;
  }
  Real* of_h(long row, long j = 0) const { return sums_ + (row * blocks_ + j) * V * LANES; }
  Real* kept(long at) const { return p_.kept ? p_.kept + at * rule_.kept(H_) : nullptr; }
  Real* stats(long at) const { return kept(at) + rule_.before_stats(H_); }

  void prepare(const Worker& w) {
    const long D = n_.inputs, G = F::GATES * H_;
    const Range blocks = w.part(blocks_), rows = w.part(B_);
    pack(p_.w_x, D, G, layout_, blocks, x_);
    if constexpr (F::FIRST > 0) {
      const long columns = (F::FIRST + BEFORE) * H_;
      pack(p_.w_h, S_, BEFORE ? columns : F::FIRST * H_, Layout{H_, F::FIRST, VF}, blocks, h_);
      if (BEFORE) pack(p_.w_h + F::FIRST * H_, H_, columns, Layout{H_, 1, GROUPS}, blocks, second_);
    }
    if (projected()) pack(p_.w_2, H_, S_, out_, w.part(out_.blocks()), second_);
    if (p_.b) pack(p_.b, 1, G, layout_, blocks, bias_);
    else std::memset(bias_ + blocks.begin * V * LANES, 0, blocks.size() * V * LANES * sizeof(Real));
    if (w.number == 0) this->pad_theta(theta_);
    for (long r = rows.begin; r < rows.end; ++r) {
      const bool fresh = starts(0, r);
      const Real* h = (fresh ? p_.fresh_h : p_.h) + r * S_;
      for (int k = 0; k < 2; ++k)
        for (Real* to : {state_[k], read_[k]}) std::memset(to + r * s_width_, 0, s_width_ * sizeof(Real));
      std::memcpy(state_[0] + r * s_width_, h, S_ * sizeof(Real));
      for (long i = 0; p_.mask && i < S_; ++i) read_[0][r * s_width_ + i] = h[i] * p_.mask[r * S_ + i];
      for (int e = 0; e < E; ++e) {
        std::memset(rest_[e] + r * width_, 0, width_ * sizeof(Real));
        std::memcpy(rest_[e] + r * width_, (fresh ? p_.fresh_rest : p_.rest) + (r * E + e) * H_, H_ * sizeof(Real));
      }
      std::memset(mid_ + r * width_, 0, width_ * sizeof(Real));
    }
  }

  // What a worker has written of the last carry.
  void finish(const Worker& w) const {
    w.barrier.wait();
    const Range rows = w.part(B_);
    for (long r = rows.begin; r < rows.end; ++r) {
      std::memcpy(p_.last_h + r * S_, state_[n_.steps & 1] + r * s_width_, S_ * sizeof(Real));
      for (int e = 0; e < E; ++e)
        std::memcpy(p_.last_rest + (r * E + e) * H_, rest_[e] + r * width_, H_ * sizeof(Real));
    }
  }

  // Of every row the sum of what all workers have found for it in their units, which they write first, to `partial`.
  Real together(const Worker& w, const Real* partial, long stride, long m) const {
    if (w.by_rows) return partial[w.number * stride + m];
    Real sum = 0;
    for (int k = 0; k < w.count; ++k) sum += partial[k * stride + m];
    return sum;
  }
  Real scale(const Worker& w, const Real* partial, long stride, long m, long columns) const {
    return 1.0f / std::sqrt(together(w, partial, stride, m) / static_cast<Real>(columns) + EPSILON);
  }

  // u = x w_x + b; with a norm only x w_x, and its scale.
  void project(const Chunk& chunk, const Worker& w) {
    const long block = layout_.width(), B = chunk.rows.size(), count = chunk.count(), D = n_.inputs;
    const Real** x = chunk.x;
    for (long k = chunk.first; k < chunk.first + chunk.steps; ++k)
      for (long b = chunk.rows.begin; b < chunk.rows.end; ++b) *x++ = p_.xs + n_.at(time(k), b) * D;
    for (long j = chunk.blocks.begin; j < chunk.blocks.end; ++j)
      product<V>(chunk.x, count, {0, D}, x_ + j * block * D, bias_ + j * block, of_x(chunk, 0, j), chunk.blocks.size() * block);
    if (!norm()) return;
    const long most = at_once_ * most_rows_;
    squares(chunk.u, block, chunk.blocks.size() * block, chunk.blocks.size(), V, count, of_u_ + w.number * most);
    wait(w);
    Real* scales = scale_u_ + w.number * most;
    for (long m = 0; m < count; ++m) {
      scales[m] = scale(w, of_u_, most, m, F::GATES * H_);
      if (p_.kept && chunk.blocks.begin == 0)
        stats(n_.at(time(chunk.first + m / B), chunk.rows.begin + m % B))[0] = scales[m];
    }
  }

  void step(const Chunk& chunk, long k, const Worker& w) {
    in_groups(w, chunk.rows, [&](Range rows) { first_stage(chunk, k, rows, w); });
    if (BEFORE || projected()) {
      wait(w);
      in_groups(w, chunk.rows, [&](Range rows) { second_product(chunk, k, rows, w); });
    }
    wait(w);
  }

  void first_stage(const Chunk& chunk, long k, Range rows, const Worker& w) {
    const Range blocks = chunk.blocks;
    for (long j = blocks.begin; VF > 0 && j < blocks.end; ++j)
      if constexpr (VF > 0)
        product<VF>(read_rows_[k & 1] + rows.begin, rows.size(), heads(j * layout_.units(), layout_.units()),
                    h_ + j * S_ * VF * LANES, nullptr, of_h(rows.begin, j), blocks_ * V * LANES, B_ == 1);
    if (norm()) {
      find_squares(w, rows, blocks, 0, F::FIRST, of_v_);
      for (long row = rows.begin; row < rows.end; ++row) {
        const Real found = scale_v_[w.number * B_ + row] = scale(w, of_v_, B_, row, F::FIRST * H_);
        if (p_.kept && blocks.begin == 0) stats(n_.at(time(k), row))[1] = found;
      }
    }
    first(chunk, k, rows, w);
    if (LSTM && norm()) normalized_output(k, w, rows, blocks);
  }

  // Of the products with h, some vectors of every block.
  void find_squares(const Worker& w, Range rows, Range blocks, long first, long vectors, Real* partial) const {
    squares(of_h(rows.begin, blocks.begin) + first * LANES, V * LANES, blocks_ * V * LANES, blocks.size(), vectors,
            rows.size(), partial + w.number * B_ + rows.begin);
    wait(w);
  }

  template <class Work>
  JAXRNN_INLINE void each(long k, Range rows, Range blocks, const Work& work) const {
    this->template batches<false>(k, rows, blocks, theta_, [](Entry&) {}, work);
  }

  // The sums of the gates [first, last) for some rows, from their products.
  template <class B>
  JAXRNN_INLINE void gate_sums(const Chunk& chunk, long k, const Worker& w, B& b, int first, int last) const {
    for (int i = 0; i < b.n; ++i) {
      const Entry& e = b.entries[i];
      const long m = chunk.at(k, e.row);
      const Real *u = of_x(chunk, m, 0) + Base::in_row(e.unit), *v = of_h(e.row) + Base::in_row(e.unit);
      for (int q = first; q < last; ++q) {
        Vec x = load(u + q * LANES), h = F::FIRST > 0 ? load(v + q * LANES) : Vec{};
        if (norm()) normalize(e, w, m, q, x, h);
        if (APART && q == 2) b.a[2][i] = h + b.theta(0, i), b.a[F::SUMS - 1][i] = x;
        else b.a[q][i] = x + h;
      }
    }
    if (!norm() && !rule_.keeps_gates()) keep(b, first, APART ? F::SUMS : last);
  }
  // With a norm, v̂ = scale v is kept of both products, and the gates read v̂ γ; the bias comes to that of x.
  JAXRNN_INLINE void normalize(const Entry& e, const Worker& w, long m, int q, Vec& x, Vec& h) const {
    const Real* theta = theta_ + e.unit;
    x *= scale_u_[w.number * at_once_ * most_rows_ + m];
    h *= scale_v_[w.number * B_ + e.row];
    if (p_.kept) {
      Real* to = kept(e.at) + q * H_ + e.unit;
      store(to, x, e.n), store(to + F::GATES * H_, h, e.n);
    }
    x = x * load(theta + (this->gain_x() + q) * width_) + load(theta + (this->shift() + q) * width_);
    h = h * load(theta + (this->gain_h() + q) * width_);
  }
  // What is kept where there is no norm.
  template <class B>
  JAXRNN_INLINE void keep(const B& b, int first, int last) const {
    if (!p_.kept) return;
    for (int i = 0; i < b.n; ++i) {
      const Entry& e = b.entries[i];
      Real* to = kept(e.at) + e.unit;
      for (int q = first; q < last; ++q) store(to + q * H_, b.a[q][i], e.n);
    }
  }

  // What the gates do.
  void first(const Chunk& chunk, long k, Range rows, const Worker& w) const {
    const bool keeps_gates = rule_.keeps_gates();
    each(k, rows, chunk.blocks, [&](auto& b) {
      gate_sums(chunk, k, w, b, 0, BEFORE ? F::FIRST : F::GATES);
      for (int i = 0; i < b.n; ++i) {
        const Entry& e = b.entries[i];
        if (!LSTM) b.s[0][i] = load(state_[k & 1] + e.row * s_width_ + e.unit);
        if (BEFORE || F::FIRST == 0) b.read[i] = load(read_[k & 1] + e.row * s_width_ + e.unit);
        for (int s = 0; s < E; ++s) b.s[s + 1][i] = load(rest_[s] + e.row * width_ + e.unit);
      }
      F::first(b);
      if (keeps_gates) keep(b, 0, BEFORE ? F::FIRST : F::SUMS);
      if constexpr (LSTM) {
        for (int i = 0; i < b.n; ++i) {
          const Entry& e = b.entries[i];
          rest_after(k, e, 0, b.c[i]);
          if (!norm()) continue;
          if (p_.kept) store(kept(e.at) + 2 * F::GATES * H_ + e.unit, b.c[i], e.n);
          Real* to = of_h(e.row) + Base::in_row(e.unit);
          store(to, b.c[i]), store(to + F::O * LANES, b.a[F::O][i]);
        }
        if (norm()) return;
        F::output(b, false);
        hand_on(k, b);
      } else {
        for (int i = 0; i < b.n; ++i)
          for (int s = 0; s < E; ++s) rest_after(k, b.entries[i], s, b.s[s + 1][i]);
        if constexpr (BEFORE) {
          for (int i = 0; i < b.n; ++i) {
            const Entry& e = b.entries[i];
            store(mid_ + e.row * width_ + e.unit, b.y[i]);
            store(of_h(e.row) + Base::in_row(e.unit) + (F::FIRST - 1) * LANES, b.a[F::FIRST - 1][i]);
          }
        } else {
          for (int i = 0; i < b.n; ++i) h_after(k, b.entries[i], b.y[i]);
        }
      }
    });
  }

  // y of an LSTM: the new h, or what a projection reads.
  template <class B>
  JAXRNN_INLINE void hand_on(long k, const B& b) const {
    for (int i = 0; i < b.n; ++i) {
      const Entry& e = b.entries[i];
      if (projected()) store(mid_ + e.row * width_ + e.unit, b.y[i]);
      else h_after(k, e, b.y[i]);
    }
  }

  // Mean and scale of c' over its units, and then y.
  void normalized_output(long k, const Worker& w, Range rows, Range blocks) {
    if constexpr (LSTM) {
      const Real size = static_cast<Real>(H_);
      auto of_rows = [&](Real* partial, const auto& part) {
        for (long row = rows.begin; row < rows.end; ++row) {
          Vec sum{};
          for (long j = blocks.begin; j < blocks.end; ++j)
            sum += part(row, load(of_h(row, j), layout_.lanes(j, 0)), layout_.lanes(j, 0));
          partial[w.number * B_ + row] = sum_of(sum);
        }
        wait(w);
      };
      of_rows(of_w_, [](long, Vec c, long) { return c; });
      of_rows(of_c_, [&](long row, Vec c, long n) {
        const Vec centred = c - together(w, of_w_, B_, row) / size;
        return Base::first_lanes(n) ? centred * centred : Vec{};
      });
      for (long row = rows.begin; row < rows.end; ++row) {
        Real* found = of_rows_ + (w.number * B_ + row) * 2;
        found[0] = together(w, of_w_, B_, row) / size, found[1] = scale(w, of_c_, B_, row, H_);
        if (p_.kept && blocks.begin == 0) std::memcpy(stats(n_.at(time(k), row)) + 2, found, 2 * sizeof(Real));
      }
      each(k, rows, blocks, [&](auto& b) {
        for (int i = 0; i < b.n; ++i) {
          const Entry& e = b.entries[i];
          const Real *from = of_h(e.row) + Base::in_row(e.unit), *found = of_rows_ + (w.number * B_ + e.row) * 2;
          b.c[i] = load(from), b.a[F::O][i] = load(from + F::O * LANES);
          b.mean[i] = splat(found[0]), b.scale[i] = splat(found[1]);
        }
        F::output(b, false);
        hand_on(k, b);
      });
    }
  }

  void second_product(const Chunk& chunk, long k, Range rows, const Worker& w) {
    const Range blocks = chunk.blocks;
    auto multiply = [&](auto vectors, long j, Real* to, long stride) {
      constexpr int N = decltype(vectors)::value;
      product<N>(mid_rows_ + rows.begin, rows.size(), {0, H_}, second_ + j * N * LANES * H_, nullptr, to, stride);
    };
    if constexpr (BEFORE) {
      constexpr int N = F::GATES - 1;
      for (long j = blocks.begin; j < blocks.end; ++j)
        multiply(std::integral_constant<int, 1>{}, j, of_h(rows.begin, j) + N * LANES, blocks_ * V * LANES);
      if (norm()) {
        find_squares(w, rows, blocks, N, 1, of_w_);
        for (long row = rows.begin; row < rows.end; ++row) {
          const Real found = scale_v_[w.number * B_ + row] = scale(w, of_w_, B_, row, H_);
          if (p_.kept && blocks.begin == 0) stats(n_.at(time(k), row))[2] = found;
        }
      }
      const bool keeps_gates = rule_.keeps_gates();
      each(k, rows, blocks, [&](auto& b) {
        gate_sums(chunk, k, w, b, N, N + 1);
        for (int i = 0; i < b.n; ++i) {
          const Entry& e = b.entries[i];
          b.a[F::UPDATE][i] = load(of_h(e.row) + Base::in_row(e.unit) + F::UPDATE * LANES);
          b.s[0][i] = load(state_[k & 1] + e.row * s_width_ + e.unit);
        }
        F::second(b);
        if (keeps_gates) keep(b, N, N + 1);
        for (int i = 0; i < b.n; ++i) h_after(k, b.entries[i], b.y[i]);
      });
    } else {
      const Range own = w.blocks(out_.blocks());
      for (long j = own.begin; j < own.end; ++j) {
        multiply(std::integral_constant<int, OUT>{}, j, projected_ + rows.begin * s_width_ + out_.unit(j, 0), s_width_);
        for (long row = rows.begin; row < rows.end; ++row)
          for (int v = 0; v < OUT; ++v) {
            const long at = n_.at(time(k), row), unit = out_.unit(j, v), n = out_.lanes(j, v);
            if (n) h_after(k, {row, at, unit, n, valid(at), nullptr, nullptr}, load(projected_ + row * s_width_ + unit));
          }
      }
    }
  }

  // The carry after the step: that before the next one.
  JAXRNN_INLINE void h_after(long k, const Entry& e, Vec h) const {
    const long place = e.row * s_width_ + e.unit;
    Real* ys = p_.ys + e.at * S_ + e.unit;
    if (!e.live) {
      h = load(state_[k & 1] + place);
      store(ys, Vec{}, e.n);
    } else {
      if (rule_.zoned) {
        const Vec z = this->h_stays(e.at, e.unit, e.n);
        h = z * load(state_[k & 1] + place) + (1.0f - z) * h;
      }
      store(ys, h, e.n);
    }
    if (starts(k + 1, e.row)) h = load(p_.fresh_h + e.row * S_ + e.unit, e.n);
    store(state_[~k & 1] + place, h, e.n);
    if (p_.mask) store(read_[~k & 1] + place, h * load(p_.mask + e.row * S_ + e.unit, e.n), e.n);
  }

  // The same of state `number` among the others.
  JAXRNN_INLINE void rest_after(long k, const Entry& e, int number, Vec s) const {
    Real* state = rest_[number] + e.row * width_ + e.unit;
    if (e.live) {
      if (rule_.zoned) {
        const Vec z = this->rest_stays(e.at, number, e.unit, e.n);
        s = z * load(state) + (1.0f - z) * s;
      }
      if (p_.rests) store(p_.rests + (e.at * E + number) * H_ + e.unit, s, e.n);
    } else {
      s = load(state);
    }
    if (starts(k + 1, e.row)) s = load(p_.fresh_rest + (e.row * E + number) * H_ + e.unit, e.n);
    store(state, s, e.n);
  }

  const StagedForward& p_;
  long most_rows_, at_once_, u_size_;
  const Real** x_rows_;
  Real **read_rows_[2], **mid_rows_;
  Real *x_, *h_, *second_, *bias_, *theta_, *state_[2], *read_[2], *rest_[E > 0 ? E : 1], *mid_, *sums_, *projected_, *u_;
  Real *of_u_, *scale_u_, *of_v_, *scale_v_, *of_w_, *of_c_, *of_rows_;  // of every thread, of norms
};
