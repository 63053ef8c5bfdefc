// Gated recurrences with options, in stages: of every step the products with h of all units, then what the gates do with
// them, batch by batch of vectors. Threads divide the rows or the units, as those of the plain kernels do. Stages that
// need all units of a row (norms, second products) begin when every thread has done what comes before.

template <class F>
class StagedForwardRun : Staged<F> {
  using Base = Staged<F>;
  using Base::LSTM, Base::BEFORE, Base::APART, Base::GROUPS, Base::V, Base::VF, Base::VS, Base::E;
  using Base::n_, Base::rule_, Base::S_, Base::H_, Base::B_, Base::layout_, Base::out_, Base::blocks_, Base::width_;
  using Base::s_width_, Base::team_, Base::time, Base::valid, Base::starts, Base::wait, Base::heads;

 public:
  StagedForwardRun(const StagedForward& p, int threads) : Base(p, threads), p_(p) {
    const long block = layout_.width(), parts = team_.threads, D = n_.inputs;
    most_rows_ = team_.by_rows ? (B_ + parts - 1) / parts : B_;
    const long floats = team_.by_rows ? blocks_ * block : (blocks_ + parts - 1) / parts * block;
    at_once_ = steps_at_once(n_, most_rows_, floats, 32);
    u_size_ = Scratch::rounded(at_once_ * most_rows_ * floats);
    const long second = BEFORE ? width_ * H_ : rule_.projected ? s_width_ * H_ : 0, chunk = at_once_ * most_rows_;
    Scratch scratch(blocks_ * (block * (D + 1) + VF * LANES * S_) + second + rule_.theta() * width_ +
                    B_ * (4 * s_width_ + (E + 1) * width_ + blocks_ * VS * LANES) +
                    parts * (u_size_ + (4 + LANES) * chunk + (LANES + 5) * B_ + 128) + 1024);
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
    a_ = scratch.take(blocks_ * B_ * VS * LANES);
    u_ = scratch.take(parts * u_size_);
    x_rows_ = reinterpret_cast<const Real**>(scratch.take(2 * parts * chunk));
    squares_ = scratch.take(parts * LANES * std::max(chunk, B_));
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
    Real* at(long j, long m, long width) const { return u + ((j - blocks.begin) * steps * rows.size() + m) * width; }
    Real* at(long j, long k, long row, long width) const {
      return at(j, (k - first) * rows.size() + row - rows.begin, width);
    }
  };

  // The sums of a row in a block.
  Real* sums(long j, long row) const { return a_ + (j * B_ + row) * VS * LANES; }
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
    if (rule_.projected) pack(p_.w_2, H_, S_, out_, w.part(out_.blocks()), second_);
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
    // A thread that is alone takes those of all.
    const Range own = w.part(team_.threads * LANES * std::max(at_once_ * most_rows_, B_));
    std::memset(squares_ + own.begin, 0, own.size() * sizeof(Real));
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

  // The squares of numbers of some rows, added up by every worker as they come; then of every row the sum over workers,
  // by `partial`, and from it 1 / √(mean + ε). Between the two all must have written theirs.
  Real* squares(const Worker& w) const { return squares_ + w.number * LANES * std::max(at_once_ * most_rows_, B_); }
  template <int N>
  JAXRNN_INLINE static void add_squares(Real* squares, const Vec (&a)[N]) {
    Vec sum = load(squares);
    for (int v = 0; v < N; ++v) sum += a[v] * a[v];
    store(squares, sum);
  }
  void hand_in(const Worker& w, Range rows, Real* partial, long stride) const {
    Real* own = squares(w);
    for (long m = rows.begin; m < rows.end; ++m) {
      partial[w.number * stride + m] = sum_of(load(own + m * LANES));
      store(own + m * LANES, Vec{});
    }
    wait(w);
  }
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
    const long block = layout_.width(), B = chunk.rows.size(), count = chunk.steps * B;
    const Real** x = chunk.x;
    for (long k = chunk.first; k < chunk.first + chunk.steps; ++k)
      for (long b = chunk.rows.begin; b < chunk.rows.end; ++b) *x++ = p_.xs + n_.at(time(k), b) * n_.inputs;
    for (long j = chunk.blocks.begin; j < chunk.blocks.end; ++j)
      tiles<ROWS<V>>({0, count}, [&](auto tile, long m) {
        constexpr int R = decltype(tile)::value;
        Vec a[R][V];
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) a[r][v] = load(bias_ + j * block + v * LANES);
        multiply<R, V>(chunk.x + m, n_.inputs, x_ + j * block * n_.inputs, a);
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < V; ++v) store(chunk.at(j, m + r, block) + v * LANES, a[r][v]);
          if (rule_.norm) add_squares(squares(w) + (m + r) * LANES, a[r]);
        }
      });
    if (!rule_.norm) return;
    hand_in(w, {0, count}, of_u_, at_once_ * most_rows_);
    Real* scales = scale_u_ + w.number * at_once_ * most_rows_;
    for (long m = 0; m < count; ++m) {
      scales[m] = scale(w, of_u_, at_once_ * most_rows_, m, F::GATES * H_);
      if (p_.kept && chunk.blocks.begin == 0)
        stats(n_.at(time(chunk.first + m / B), chunk.rows.begin + m % B))[0] = scales[m];
    }
  }

  void step(const Chunk& chunk, long k, const Worker& w) {
    const Range rows = chunk.rows, blocks = chunk.blocks;
    for (long j = blocks.begin; j < blocks.end; ++j) {
      products(chunk, k, j, w);
      if (!rule_.norm) first(chunk, k, j, w);
    }
    if (rule_.norm) {
      hand_in(w, rows, of_v_, B_);
      for (long row = rows.begin; row < rows.end; ++row) {
        const Real found = scale_v_[w.number * B_ + row] = scale(w, of_v_, B_, row, F::FIRST * H_);
        if (p_.kept && blocks.begin == 0) stats(n_.at(time(k), row))[1] = found;
      }
      for (long j = blocks.begin; j < blocks.end; ++j) first(chunk, k, j, w);
      if (LSTM) normalized_output(k, w, rows, blocks);
    }
    if (BEFORE || rule_.projected) {
      wait(w);
      second_product(chunk, k, w);
    }
    wait(w);
  }

  // Sums of a block: u + s w_h, or without u where a norm is between.
  void products(const Chunk& chunk, long k, long j, const Worker& w) const {
    const long block = layout_.width();
    const Real* from = read_[k & 1];
    const Range part = heads(j * layout_.units(), layout_.units());
    auto tile = [&](auto count, auto chains, long row) {
      constexpr int R = decltype(count)::value, W = VF > 0 ? VF : 1;
      const Real* s[R];
      Vec a[R][W];
      for (int r = 0; r < R; ++r) {
        s[r] = from + (row + r) * s_width_ + part.begin;
        const Real* u = chunk.at(j, k, row + r, block);
        for (int v = 0; v < W; ++v) a[r][v] = rule_.norm || (APART && v == 2) ? Vec{} : load(u + v * LANES);
        if (APART && !rule_.norm) a[r][W - 1] = load(theta_ + layout_.unit(j, 0));
      }
      if constexpr (VF > 0)
        multiply<R, W, decltype(chains)::value>(s, part.size(), h_ + (j * S_ + part.begin) * VF * LANES, a);
      for (int r = 0; r < R; ++r) {
        const Real* u = chunk.at(j, k, row + r, block);
        Real* to = sums(j, row + r);
        for (int v = 0; v < W; ++v) store(to + v * LANES, a[r][v]);
        for (int v = W; v < VS; ++v) store(to + v * LANES, load(u + (APART ? 2 : v) * LANES));
        if (rule_.norm) add_squares(squares(w) + (row + r) * LANES, a[r]);
      }
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (B_ == 1) return tile(One{}, Two{}, 0l);
    tiles<ROWS<(VF > 0 ? VF : 4)>>(chunk.rows, [&](auto count, long row) { tile(count, One{}, row); });
  }

  // From a product and its scale what is kept of it, and what the gates read of it: v̂ = scale v and v̂ γ.
  Vec normalized(Real* kept, int place, int gain, Vec v, Real scale, long unit, long n) const {
    const Vec normal = v * scale;
    if (kept) store(kept + place * H_ + unit, normal, n);
    return normal * load(theta_ + gain * width_ + unit);
  }
  // The sums of the gates [first, last) of a row, of products that are normalised.
  template <class B>
  void normalized_sums(const Chunk& chunk, long k, long j, long row, long unit, long n, const Worker& w, Real scale,
                       B& b, int i, int first, int last) const {
    Real* to = kept(n_.at(time(k), row));
    const Real *u = chunk.at(j, k, row, layout_.width()), *v = sums(j, row);
    const Real of_u = scale_u_[w.number * at_once_ * most_rows_ + (k - chunk.first) * chunk.rows.size() + row - chunk.rows.begin];
    for (int q = first; q < last; ++q) {
      const Vec x = normalized(to, q, this->gain_x() + q, load(u + q * LANES), of_u, unit, n) +
                    load(theta_ + (this->shift() + q) * width_ + unit);
      const Vec h = normalized(to, F::GATES + q, this->gain_h() + q, load(v + q * LANES), scale, unit, n);
      if (APART && q == 2) b.a[2][i] = h + load(theta_ + unit), b.a[F::SUMS - 1][i] = x;
      else b.a[q][i] = x + h;
    }
  }

  // What the gates do.
  void first(const Chunk& chunk, long k, long j, const Worker& w) const {
    const long t = time(k);
    this->template batches<false>(chunk.rows, j, theta_, [&](auto& b, long row0, long unit, long n, int g) {
      for (int i = 0; i < b.n; ++i) {
        const long row = row0 + i;
        Real* a = sums(j, row) + g * LANES;
        if (rule_.norm) {
          const Real scale = scale_v_[w.number * B_ + row];
          normalized_sums(chunk, k, j, row, unit, n, w, scale, b, i, 0, F::FIRST);
        } else {
          for (int q = 0; q < F::SUMS; ++q) b.a[q][i] = load(a + q * LANES);
        }
        if (!LSTM) b.s[0][i] = load(state_[k & 1] + row * s_width_ + unit);
        if (BEFORE || F::FIRST == 0) b.read[i] = load(read_[k & 1] + row * s_width_ + unit);
        for (int e = 0; e < E; ++e) b.s[e + 1][i] = load(rest_[e] + row * width_ + unit);
        if (p_.kept && !rule_.norm)
          for (int q = 0; q < F::SUMS; ++q) store(kept(n_.at(t, row)) + q * H_ + unit, b.a[q][i], n);
      }
      F::first(b);
      if constexpr (LSTM) {
        for (int i = 0; i < b.n; ++i) {
          rest_after(k, row0 + i, 0, unit, n, b.c[i]);
          if (!rule_.norm) continue;
          if (p_.kept) store(kept(n_.at(t, row0 + i)) + 2 * F::GATES * H_ + unit, b.c[i], n);
          store(sums(j, row0 + i), b.c[i]);
          store(sums(j, row0 + i) + F::O * LANES, b.a[F::O][i]);
        }
        if (rule_.norm) return;
        F::output(b, false);
        hand_on(k, row0, unit, n, b);
      } else {
        for (int i = 0; i < b.n; ++i)
          for (int e = 0; e < E; ++e) rest_after(k, row0 + i, e, unit, n, b.s[e + 1][i]);
        if constexpr (BEFORE) {
          for (int i = 0; i < b.n; ++i) {
            store(mid_ + (row0 + i) * width_ + unit, b.y[i]);
            store(sums(j, row0 + i) + (F::FIRST - 1) * LANES, b.a[F::FIRST - 1][i]);
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
      if (rule_.projected) store(mid_ + (row0 + i) * width_ + unit, b.y[i]);
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
            sum += part(row, load(sums(j, row), layout_.lanes(j, 0)), layout_.lanes(j, 0));
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
            b.c[i] = load(sums(j, row));
            b.a[F::O][i] = load(sums(j, row) + F::O * LANES);
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
    if constexpr (BEFORE) {
      constexpr int N = F::GATES - 1;
      for (long j = chunk.blocks.begin; j < chunk.blocks.end; ++j)
        tiles<ROWS<1>>(chunk.rows, [&](auto count, long row) {
          constexpr int R = decltype(count)::value;
          const Real* s[R];
          Vec a[R][1];
          for (int r = 0; r < R; ++r) {
            s[r] = mid_ + (row + r) * width_;
            a[r][0] = rule_.norm ? Vec{} : load(sums(j, row + r) + N * LANES);
          }
          multiply<R, 1>(s, H_, second_ + j * LANES * H_, a);
          for (int r = 0; r < R; ++r) {
            store(sums(j, row + r) + N * LANES, a[r][0]);
            if (rule_.norm) add_squares(squares(w) + (row + r) * LANES, a[r]);
          }
        });
      if (rule_.norm) hand_in(w, chunk.rows, of_w_, B_);
      for (long j = chunk.blocks.begin; j < chunk.blocks.end; ++j)
        this->template batches<false>(chunk.rows, j, theta_, [&](auto& b, long row0, long unit, long n, int) {
          for (int i = 0; i < b.n; ++i) {
            const long row = row0 + i;
            b.a[F::UPDATE][i] = load(sums(j, row) + F::UPDATE * LANES);
            if (rule_.norm) {
              const Real found = scale(w, of_w_, B_, row, H_);
              if (p_.kept && j == 0) stats(n_.at(time(k), row))[2] = found;
              normalized_sums(chunk, k, j, row, unit, n, w, found, b, i, N, N + 1);
            } else {
              b.a[N][i] = load(sums(j, row) + N * LANES);
            }
            b.s[0][i] = load(state_[k & 1] + row * s_width_ + unit);
            if (p_.kept && !rule_.norm) store(kept(n_.at(time(k), row)) + N * H_ + unit, b.a[N][i], n);
          }
          F::second(b);
          for (int i = 0; i < b.n; ++i) h_after(k, row0 + i, unit, n, b.y[i]);
        });
    } else {
      const Range own = w.blocks(out_.blocks());
      for (long j = own.begin; j < own.end; ++j)
        tiles<ROWS<4>>(chunk.rows, [&](auto count, long row) {
          constexpr int R = decltype(count)::value;
          const Real* s[R];
          Vec a[R][4] = {};
          for (int r = 0; r < R; ++r) s[r] = mid_ + (row + r) * width_;
          multiply<R, 4>(s, H_, second_ + j * 4 * LANES * H_, a);
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < 4; ++v)
              if (const long n = out_.lanes(j, v)) h_after(k, row + r, out_.unit(j, v), n, a[r][v]);
        });
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
  Real *x_, *h_, *second_, *bias_, *theta_, *state_[2], *read_[2], *rest_[E > 0 ? E : 1], *mid_, *a_, *u_;
  Real *squares_, *of_u_, *scale_u_, *of_v_, *scale_v_, *of_w_, *of_c_;  // of every thread, of norms
};
