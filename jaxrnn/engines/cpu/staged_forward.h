// Gated recurrences with options, in stages: of every step the products with h of all units, then what the gates do with
// them, batch by batch of vectors. Threads divide the rows or the units, as those of the plain kernels do. Stages that
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
                    parts * (u_size_ + 4 * chunk + 4 * B_ + 128) + 1024);
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
  // Steps whose u lies in memory, (block, step, row, width).
  struct Chunk {
    long first, steps;
    Range rows, blocks;
    Real* u;
    const Real** x;
    long count() const { return steps * rows.size(); }
    long at(long k, long row) const { return (k - first) * rows.size() + row - rows.begin; }
  };

  // Vectors of a row in a block: the products with x, and those with h.
  Real* of_x(const Chunk& chunk, long j, long m) const {
    return chunk.u + ((j - chunk.blocks.begin) * chunk.count() + m) * V * LANES;
  }
  Real* of_h(long j, long row) const { return sums_ + (j * B_ + row) * V * LANES; }
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
      product<V>(chunk.x, count, {0, D}, x_ + j * block * D, bias_ + j * block, of_x(chunk, j, 0), block);
    if (!norm()) return;
    const long most = at_once_ * most_rows_;
    squares(chunk.u, count * block, block, chunk.blocks.size(), V, count, of_u_ + w.number * most);
    wait(w);
    Real* scales = scale_u_ + w.number * most;
    for (long m = 0; m < count; ++m) {
      scales[m] = scale(w, of_u_, most, m, F::GATES * H_);
      if (p_.kept && chunk.blocks.begin == 0)
        stats(n_.at(time(chunk.first + m / B), chunk.rows.begin + m % B))[0] = scales[m];
    }
  }

  void step(const Chunk& chunk, long k, const Worker& w) {
    const Range rows = chunk.rows, blocks = chunk.blocks;
    for (long j = blocks.begin; j < blocks.end; ++j) {
      if constexpr (VF > 0) {
        product<VF>(read_rows_[k & 1] + rows.begin, rows.size(), heads(j * layout_.units(), layout_.units()),
                    h_ + j * S_ * VF * LANES, nullptr, of_h(j, rows.begin), V * LANES, B_ == 1);
      }
      if (!norm()) first(chunk, k, j, w);
    }
    if (norm()) {
      find_squares(w, rows, blocks, 0, F::FIRST, of_v_);
      for (long row = rows.begin; row < rows.end; ++row) {
        const Real found = scale_v_[w.number * B_ + row] = scale(w, of_v_, B_, row, F::FIRST * H_);
        if (p_.kept && blocks.begin == 0) stats(n_.at(time(k), row))[1] = found;
      }
      for (long j = blocks.begin; j < blocks.end; ++j) first(chunk, k, j, w);
      if (LSTM) normalized_output(k, w, rows, blocks);
    }
    if (BEFORE || projected()) {
      wait(w);
      second_product(chunk, k, w);
    }
    wait(w);
  }

  // Of the products with h, some vectors of every block.
  void find_squares(const Worker& w, Range rows, Range blocks, long first, long vectors, Real* partial) const {
    const long block = V * LANES;
    squares(of_h(blocks.begin, rows.begin) + first * LANES, B_ * block, block, blocks.size(), vectors, rows.size(),
            partial + w.number * B_ + rows.begin);
    wait(w);
  }

  // From a product and its scale what is kept of it, and what the gates read of it: v̂ = scale v and v̂ γ.
  Vec normalized(Real* kept, int place, int gain, Vec v, Real scale, long unit, long n) const {
    const Vec normal = v * scale;
    if (kept) store(kept + place * H_ + unit, normal, n);
    return normal * load(theta_ + gain * width_ + unit);
  }
  // The sums of the gates [first, last) for some rows, from their products; with a norm these have scales.
  template <class B>
  void gate_sums(const Chunk& chunk, long k, long j, long row0, long unit, long n, int g, const Worker& w,
                 const Real* scales, B& b, int first, int last) const {
    const Real* scales_u = scale_u_ + w.number * at_once_ * most_rows_;
    for (int i = 0; i < b.n; ++i) {
      const long row = row0 + i, m = chunk.at(k, row);
      const Real *u = of_x(chunk, j, m) + g * LANES, *v = of_h(j, row) + g * LANES;
      Real* to = kept(n_.at(time(k), row));
      for (int q = first; q < last; ++q) {
        Vec x = load(u + q * LANES), h = F::FIRST > 0 ? load(v + q * LANES) : Vec{};
        if (norm()) {
          x = normalized(to, q, this->gain_x() + q, x, scales_u[m], unit, n);
          x += load(theta_ + (this->shift() + q) * width_ + unit);
          h = normalized(to, F::GATES + q, this->gain_h() + q, h, scales[row], unit, n);
        }
        if (APART && q == 2) b.a[2][i] = h + load(theta_ + unit), b.a[F::SUMS - 1][i] = x;
        else b.a[q][i] = x + h;
        if (!to || norm()) continue;
        store(to + q * H_ + unit, b.a[q][i], n);
        if (APART && q == 2) store(to + 3 * H_ + unit, x, n);
      }
    }
  }

  // What the gates do.
  void first(const Chunk& chunk, long k, long j, const Worker& w) const {
    const long t = time(k);
    this->template batches<false>(chunk.rows, j, theta_, [&](auto& b, long row0, long unit, long n, int g) {
      gate_sums(chunk, k, j, row0, unit, n, g, w, scale_v_ + w.number * B_, b, 0, BEFORE ? F::FIRST : F::GATES);
      for (int i = 0; i < b.n; ++i) {
        const long row = row0 + i;
        if (!LSTM) b.s[0][i] = load(state_[k & 1] + row * s_width_ + unit);
        if (BEFORE || F::FIRST == 0) b.read[i] = load(read_[k & 1] + row * s_width_ + unit);
        for (int e = 0; e < E; ++e) b.s[e + 1][i] = load(rest_[e] + row * width_ + unit);
      }
      F::first(b);
      if constexpr (LSTM) {
        for (int i = 0; i < b.n; ++i) {
          rest_after(k, row0 + i, 0, unit, n, b.c[i]);
          if (!norm()) continue;
          if (p_.kept) store(kept(n_.at(t, row0 + i)) + 2 * F::GATES * H_ + unit, b.c[i], n);
          store(of_h(j, row0 + i), b.c[i]);
          store(of_h(j, row0 + i) + F::O * LANES, b.a[F::O][i]);
        }
        if (norm()) return;
        F::output(b, false);
        hand_on(k, row0, unit, n, b);
      } else {
        for (int i = 0; i < b.n; ++i)
          for (int e = 0; e < E; ++e) rest_after(k, row0 + i, e, unit, n, b.s[e + 1][i]);
        if constexpr (BEFORE) {
          for (int i = 0; i < b.n; ++i) {
            store(mid_ + (row0 + i) * width_ + unit, b.y[i]);
            store(of_h(j, row0 + i) + (F::FIRST - 1) * LANES, b.a[F::FIRST - 1][i]);
          }
        } else {
          for (int i = 0; i < b.n; ++i) h_after(k, row0 + i, unit, n, b.y[i]);
        }
      }
    });
  }

  // y of an LSTM: the new h, or what a projection reads.
  template <class B>
  void hand_on(long k, long row0, long unit, long n, const B& b) const {
    for (int i = 0; i < b.n; ++i) {
      if (projected()) store(mid_ + (row0 + i) * width_ + unit, b.y[i]);
      else h_after(k, row0 + i, unit, n, b.y[i]);
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
            sum += part(row, load(of_h(j, row), layout_.lanes(j, 0)), layout_.lanes(j, 0));
          partial[w.number * B_ + row] = sum_of(sum);
        }
        wait(w);
      };
      of_rows(of_w_, [](long, Vec c, long) { return c; });
      of_rows(of_c_, [&](long row, Vec c, long n) {
        const Vec centred = c - together(w, of_w_, B_, row) / size;
        return Base::first_lanes(n) ? centred * centred : Vec{};
      });
      for (long j = blocks.begin; j < blocks.end; ++j)
        this->template batches<false>(rows, j, theta_, [&](auto& b, long row0, long unit, long n, int) {
          for (int i = 0; i < b.n; ++i) {
            const long row = row0 + i, at = n_.at(time(k), row);
            b.c[i] = load(of_h(j, row));
            b.a[F::O][i] = load(of_h(j, row) + F::O * LANES);
            const Real mean = together(w, of_w_, B_, row) / size, found = scale(w, of_c_, B_, row, H_);
            b.mean[i] = splat(mean), b.scale[i] = splat(found);
            if (p_.kept && j == 0) stats(at)[2] = mean, stats(at)[3] = found;
          }
          F::output(b, false);
          hand_on(k, row0, unit, n, b);
        });
    }
  }

  void second_product(const Chunk& chunk, long k, const Worker& w) {
    const Range rows = chunk.rows, blocks = chunk.blocks;
    auto multiply = [&](auto vectors, long j, Real* to, long stride) {
      constexpr int N = decltype(vectors)::value;
      product<N>(mid_rows_ + rows.begin, rows.size(), {0, H_}, second_ + j * N * LANES * H_, nullptr, to, stride);
    };
    if constexpr (BEFORE) {
      constexpr int N = F::GATES - 1;
      for (long j = blocks.begin; j < blocks.end; ++j)
        multiply(std::integral_constant<int, 1>{}, j, of_h(j, rows.begin) + N * LANES, V * LANES);
      if (norm()) {
        find_squares(w, rows, blocks, N, 1, of_w_);
        for (long row = rows.begin; row < rows.end; ++row) {
          const Real found = scale_v_[w.number * B_ + row] = scale(w, of_w_, B_, row, H_);
          if (p_.kept && blocks.begin == 0) stats(n_.at(time(k), row))[2] = found;
        }
      }
      for (long j = blocks.begin; j < blocks.end; ++j)
        this->template batches<false>(rows, j, theta_, [&](auto& b, long row0, long unit, long n, int) {
          gate_sums(chunk, k, j, row0, unit, n, 0, w, scale_v_ + w.number * B_, b, N, N + 1);
          for (int i = 0; i < b.n; ++i) {
            b.a[F::UPDATE][i] = load(of_h(j, row0 + i) + F::UPDATE * LANES);
            b.s[0][i] = load(state_[k & 1] + (row0 + i) * s_width_ + unit);
          }
          F::second(b);
          for (int i = 0; i < b.n; ++i) h_after(k, row0 + i, unit, n, b.y[i]);
        });
    } else {
      const Range own = w.blocks(out_.blocks());
      for (long j = own.begin; j < own.end; ++j) {
        multiply(std::integral_constant<int, OUT>{}, j, projected_ + rows.begin * s_width_ + out_.unit(j, 0), s_width_);
        for (long row = rows.begin; row < rows.end; ++row)
          for (int v = 0; v < OUT; ++v) {
            const long unit = out_.unit(j, v), n = out_.lanes(j, v);
            if (n) h_after(k, row, unit, n, load(projected_ + row * s_width_ + unit));
          }
      }
    }
  }

  // The carry after the step: that before the next one.
  void h_after(long k, long row, long unit, long n, Vec h) const {
    const long at = n_.at(time(k), row), place = row * s_width_ + unit;
    const Vec before = load(state_[k & 1] + place);
    if (!valid(at)) {
      h = before;
      store(p_.ys + at * S_ + unit, Vec{}, n);
    } else {
      if (rule_.zoned) {
        const Vec z = this->h_stays(at, unit, n);
        h = z * before + (1.0f - z) * h;
      }
      store(p_.ys + at * S_ + unit, h, n);
    }
    if (starts(k + 1, row)) h = load(p_.fresh_h + row * S_ + unit, n);
    store(state_[~k & 1] + place, h, n);
    if (p_.mask) store(read_[~k & 1] + place, h * load(p_.mask + row * S_ + unit, n), n);
  }

  void rest_after(long k, long row, int e, long unit, long n, Vec s) const {
    const long at = n_.at(time(k), row);
    Real* state = rest_[e] + row * width_ + unit;
    if (valid(at)) {
      if (rule_.zoned) {
        const Vec z = this->rest_stays(at, e, unit, n);
        s = z * load(state) + (1.0f - z) * s;
      }
      if (p_.rests) store(p_.rests + (at * E + e) * H_ + unit, s, n);
    } else {
      s = load(state);
    }
    if (starts(k + 1, row)) s = load(p_.fresh_rest + (row * E + e) * H_ + unit, n);
    store(state, s, n);
  }

  const StagedForward& p_;
  long most_rows_, at_once_, u_size_;
  const Real** x_rows_;
  Real **read_rows_[2], **mid_rows_;
  Real *x_, *h_, *second_, *bias_, *theta_, *state_[2], *read_[2], *rest_[E > 0 ? E : 1], *mid_, *sums_, *projected_, *u_;
  Real *of_u_, *scale_u_, *of_v_, *scale_v_, *of_w_, *of_c_;  // of every thread, of norms
};
