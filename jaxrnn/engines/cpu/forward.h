// The recurrence over time. Threads divide the rows, and then never wait for each other; or, where rows are few or the
// weights many, the units, and wait once a step.

template <Kind K>
class ForwardRun : Cell<K> {
 public:
  using Cell<K>::V, Cell<K>::KEPT, Cell<K>::GATES, Cell<K>::LSTM, Cell<K>::AFTER, Cell<K>::BEFORE;

  ForwardRun(const Sizes& n, const Forward& p, int threads)
      : n_(n), p_(p), layout_{n.units, GATES, V}, blocks_(layout_.blocks()), width_(blocks_ * layout_.units()),
        team_(team(n, n.units * GATES * n.units, blocks_, threads)) {
    const long block = layout_.width(), B = n_.rows, parts = team_.threads;
    most_rows_ = team_.by_rows ? (B + parts - 1) / parts : B;
    const long floats = team_.by_rows ? blocks_ * block : (blocks_ + parts - 1) / parts * block;
    at_once_ = steps_at_once(n_, most_rows_, floats, 32);
    u_size_ = Scratch::rounded(at_once_ * most_rows_ * floats);
    sums_size_ = Scratch::rounded(std::max(most_rows_, blocks_) * FIRST * LANES);
    Scratch scratch(blocks_ * block * (n_.inputs + n_.units + 2) + 6 * Scratch::rounded(B * width_) + 2 * B +
                    parts * (u_size_ + sums_size_ + 2 * (at_once_ + 1) * most_rows_) + 512);
    x_ = scratch.take(blocks_ * block * n_.inputs);
    h_ = scratch.take(blocks_ * block * n_.units);
    h_n_ = h_ + blocks_ * 2 * LANES * n_.units;
    bias_ = scratch.take(blocks_ * block);
    b_hn_ = scratch.take(width_);
    for (Real** state : {&state_[0], &state_[1], &c_, &z_, &reset_}) *state = scratch.take(B * width_);
    u_ = scratch.take(parts * u_size_);
    sums_ = scratch.take(parts * sums_size_);
    x_rows_ = reinterpret_cast<const Real**>(scratch.take(2 * parts * at_once_ * most_rows_));
    h_rows_ = reinterpret_cast<const Real**>(scratch.take(2 * parts * most_rows_));
    reset_rows_ = scratch.rows(reset_, B, width_);
  }

  void run() {
    in_team(team_, [&](const Worker& worker) {
      const Range rows = worker.rows(n_.rows), blocks = worker.blocks(blocks_);
      prepare(worker.part(n_.rows), worker.part(blocks_));
      worker.barrier.wait();
      for (long first = 0; first < n_.steps; first += at_once_) {
        const int number = worker.number;
        const Chunk chunk{first, std::min(at_once_, n_.steps - first), rows, blocks, u_ + number * u_size_,
                          sums_ + number * sums_size_, x_rows_ + number * at_once_ * most_rows_,
                          h_rows_ + number * most_rows_};
        project(chunk);
        for (long k = first; k < first + chunk.steps; ++k) {
          step(chunk, k);
          if (!worker.by_rows) worker.barrier.wait();
          if constexpr (BEFORE) {
            second_step(chunk, k);
            if (!worker.by_rows) worker.barrier.wait();
          }
        }
      }
      finish(rows, blocks);
    });
  }

 private:
  static constexpr int FIRST = BEFORE ? 2 : V;  // vectors of the product with h, of which a second follows

  // Steps whose u = x w_x + b lies in memory, (block, step, row, width).
  struct Chunk {
    long first, steps;
    Range rows, blocks;
    Real *u, *sums;       // and the products with h of some rows or blocks
    const Real **x, **h;  // where the inputs of every row lie, and what it reads of h
    long at(long j, long k, long row) const {
      return ((j - blocks.begin) * steps + k - first) * rows.size() + row - rows.begin;
    }
  };

  void prepare(Range rows, Range blocks) {
    const long D = n_.inputs, H = n_.units, G = GATES * H;
    pack(p_.w_x, D, G, layout_, blocks, x_);
    if (BEFORE) {
      pack(p_.w_h, H, G, Layout{H, 2, 2}, blocks, h_);
      pack(p_.w_h + 2 * H, H, G, Layout{H, 1, 1}, blocks, h_n_);
    } else {
      pack(p_.w_h, H, G, layout_, blocks, h_);
    }
    const long block = layout_.width();
    if (p_.b) pack(p_.b, 1, G, layout_, blocks, bias_);
    else std::memset(bias_ + blocks.begin * block, 0, blocks.size() * block * sizeof(Real));
    for (long j = blocks.begin; AFTER && j < blocks.end; ++j)
      store(b_hn_ + j * LANES, p_.b_hn ? load(p_.b_hn + j * LANES, layout_.lanes(j, 0)) : Vec{});
    for (long r = rows.begin; r < rows.end; ++r) {
      padded(state_[0] + r * width_, p_.h + r * H);
      std::memset(state_[1] + r * width_, 0, width_ * sizeof(Real));
      if (LSTM) padded(c_ + r * width_, p_.c + r * H);
      if (BEFORE) std::memset(reset_ + r * width_, 0, width_ * sizeof(Real));
    }
  }

  void padded(Real* to, const Real* from) const {
    std::memcpy(to, from, n_.units * sizeof(Real));
    std::memset(to + n_.units, 0, (width_ - n_.units) * sizeof(Real));
  }

  void finish(Range rows, Range blocks) const {
    const long H = n_.units, begin = blocks.begin * layout_.units();
    const long size = (std::min(blocks.end * layout_.units(), H) - begin) * sizeof(Real);
    const Real* last = state_[n_.steps & 1];
    for (long r = rows.begin; size > 0 && r < rows.end; ++r) {
      std::memcpy(p_.last_h + r * H + begin, last + r * width_ + begin, size);
      if (LSTM) std::memcpy(p_.last_c + r * H + begin, c_ + r * width_ + begin, size);
    }
  }

  void project(const Chunk& chunk) const {
    const long block = layout_.width(), B = chunk.rows.size();
    const Real** x = chunk.x;
    for (long k = chunk.first; k < chunk.first + chunk.steps; ++k)
      for (long b = chunk.rows.begin; b < chunk.rows.end; ++b) *x++ = p_.xs + n_.at(n_.time(k), b) * n_.inputs;
    for (long j = chunk.blocks.begin; j < chunk.blocks.end; ++j)
      product<V>(chunk.x, chunk.steps * B, {0, n_.inputs}, x_ + j * block * n_.inputs, bias_ + j * block,
                 chunk.u + (j - chunk.blocks.begin) * chunk.steps * B * block, block);
  }

  bool valid(long at) const { return !p_.valid || p_.valid[at]; }
  const Real* before(const Real* state, long t, long r) const {
    return p_.start && p_.start[n_.at(t, r)] ? p_.fresh_h + r * n_.units : state + r * width_;
  }

  // The products of a block's rows with h and the gates of some rows at once; of a single row, those of some blocks.
  void step(const Chunk& chunk, long k) const {
    const Range rows = chunk.rows, blocks = chunk.blocks;
    const bool alone = n_.rows == 1;
    for (long r = rows.begin; r < rows.end; ++r) chunk.h[r - rows.begin] = before(state_[k & 1], n_.time(k), r);
    auto multiply = [&](long j, long row, long count, Real* to) {
      product<FIRST>(chunk.h + row, count, {0, n_.units}, h_ + j * FIRST * LANES * n_.units, nullptr, to, FIRST * LANES, alone);
    };
    for (long j = blocks.begin; j < blocks.end; ++j) {
      if (alone) {
        multiply(j, 0, 1, chunk.sums + (j - blocks.begin) * FIRST * LANES);
        continue;
      }
      // The gates of a tile wait for their own results, while the processor begins the product of the next one.
      in_parts({0, rows.size()}, ROWS<FIRST>, [&](long size, long first) {
        multiply(j, first, size, chunk.sums);
        tiles<4>({0, size}, [&](auto count, long at) {
          gates<decltype(count)::value>(chunk, k, j, rows.begin + first + at, chunk.sums + at * FIRST * LANES, false);
        });
      });
    }
    if (!alone) return;
    tiles<4>({0, blocks.size()}, [&](auto count, long at) {
      gates<decltype(count)::value>(chunk, k, blocks.begin + at, 0, chunk.sums + at * FIRST * LANES, true);
    });
  }

  // The gates and what follows from them; of a GRU that resets before the product, r and z only. They are those of rows
  // of block j, from `row` on, or of blocks of a row, from j on.
  template <int R>
  void gates(const Chunk& chunk, long k, long j0, long row, const Real* sums, bool of_blocks) const {
    constexpr int N = GATES == 1 ? V : 1;  // vectors of y
    const long H = n_.units, t = n_.time(k);
    const Real *from = state_[k & 1], *h[R], *u[R];
    Real* to = state_[~k & 1];
    Vec a[R][FIRST], y[R][N], c[R], before_[R], candidate[R];
    bool fresh[R];
    for (int r = 0; r < R; ++r) {
      const long j = j0 + of_blocks * r, b = row + !of_blocks * r, unit = layout_.unit(j, 0), n = layout_.lanes(j, 0);
      h[r] = before(from, t, b);
      u[r] = chunk.u + chunk.at(j, k, b) * layout_.width();
      for (int v = 0; v < FIRST; ++v)
        a[r][v] = load(sums + (r * FIRST + v) * LANES) + (AFTER && v == 2 ? load(b_hn_ + j * LANES) : load(u[r] + v * LANES));
      fresh[r] = h[r] != from + b * width_;
      if constexpr (LSTM) c[r] = fresh[r] ? load(p_.fresh_c + b * H + unit, n) : load(c_ + b * width_ + unit);
      if constexpr (GATES == 3) before_[r] = load(h[r] + unit, n);
    }
    if constexpr (LSTM) {
      Vec last[R];
      lstm<R>(a, c, last);
      for (int r = 0; r < R; ++r) y[r][0] = last[r];
    } else if constexpr (AFTER) {
      Vec u_n[R], last[R];
      for (int r = 0; r < R; ++r) u_n[r] = load(u[r] + 2 * LANES);
      gru<R>(a, u_n, before_, candidate, last);
      for (int r = 0; r < R; ++r) y[r][0] = last[r];
    } else if constexpr (BEFORE) {
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) a[r][v] = logistic(a[r][v]);
    } else {
      for (int r = 0; r < R; ++r) {
        elman<K, N>(a[r]);
        for (int v = 0; v < N; ++v) y[r][v] = a[r][v];
      }
    }
    for (int r = 0; r < R; ++r) {
      const long j = j0 + of_blocks * r, b = row + !of_blocks * r, at = n_.at(t, b);
      const bool live = valid(at);
      for (int v = 0; v < N; ++v) {
        const long unit = layout_.unit(j, v), n = layout_.lanes(j, v);
        if (GATES == 1 && n == 0) continue;
        Real *ys = p_.ys + at * H + unit, *state = to + b * width_ + unit;
        Real *kept = p_.kept ? p_.kept + at * KEPT * H + unit : nullptr, *cs = p_.cs ? p_.cs + at * H + unit : nullptr;
        if (!live) {
          store(ys, Vec{}, n);
          store(state, load(from + b * width_ + unit));
          for (long gate = 0; kept && gate < KEPT; ++gate) store(kept + gate * H, Vec{}, n);
          if (cs) store(cs, Vec{}, n);
          continue;
        }
        if constexpr (BEFORE) {
          store(reset_ + b * width_ + unit, a[r][0] * before_[r]);
          store(z_ + b * width_ + unit, a[r][1]);
        } else {
          store(ys, y[r][v], n);
          store(state, y[r][v]);
        }
        if constexpr (LSTM) {
          store(c_ + b * width_ + unit, c[r]);
          if (cs) store(cs, c[r], n);
        }
        if (!kept) continue;
        for (int gate = 0; gate < std::min<int>(KEPT, FIRST); ++gate)
          store(kept + gate * H, AFTER && gate == 2 ? candidate[r] : a[r][gate], n);
        if constexpr (AFTER) store(kept + 3 * H, a[r][2], n);
      }
    }
  }

  // n = tanh(u_n + (r h) w_hn), and the new state.
  void second_step(const Chunk& chunk, long k) const {
    const Range rows = chunk.rows;
    for (long j = chunk.blocks.begin; j < chunk.blocks.end; ++j) {
      product<1>(reset_rows_ + rows.begin, rows.size(), {0, n_.units}, h_n_ + j * LANES * n_.units, nullptr, chunk.sums,
                 LANES, n_.rows == 1);
      tiles<4>({0, rows.size()}, [&](auto count, long at) {
        second_gates<decltype(count)::value>(chunk, k, j, rows.begin + at, chunk.sums + at * LANES);
      });
    }
  }
  template <int R>
  JAXRNN_INLINE void second_gates(const Chunk& chunk, long k, long j, long row, const Real* sums) const {
    const long H = n_.units, t = n_.time(k), unit = layout_.unit(j, 0), n = layout_.lanes(j, 0), block = layout_.width();
    const Real* u = chunk.u + chunk.at(j, k, row) * block + 2 * LANES;
    Vec candidate[R];
    for (int r = 0; r < R; ++r) candidate[r] = tangent(load(sums + r * LANES) + load(u + r * block));
    for (int r = 0; r < R; ++r) {
      const long b = row + r, at = n_.at(t, b);
      if (!valid(at)) continue;
      const Vec z = load(z_ + b * width_ + unit), h = load(before(state_[k & 1], t, b) + unit, n);
      const Vec y = (1.0f - z) * candidate[r] + z * h;
      if (p_.kept) store(p_.kept + at * KEPT * H + 2 * H + unit, candidate[r], n);
      store(p_.ys + at * H + unit, y, n);
      store(state_[~k & 1] + b * width_ + unit, y);
    }
  }

  const Sizes n_;
  const Forward p_;
  const Layout layout_;
  const long blocks_, width_;
  const Team team_;
  long most_rows_, at_once_, u_size_, sums_size_;
  const Real **x_rows_, **h_rows_;
  Real** reset_rows_;
  Real *x_, *h_, *h_n_, *bias_, *b_hn_, *state_[2], *c_, *z_, *reset_, *u_, *sums_;
};
