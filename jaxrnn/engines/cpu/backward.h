// The recurrence backwards, in chunks of steps: first the cotangents of the gates' sums, step by step; then, as large
// products over all rows of the chunk, those of weights and inputs.

template <Kind K>
class BackwardRun : Cell<K> {
 public:
  using Cell<K>::V, Cell<K>::KEPT, Cell<K>::GATES, Cell<K>::LSTM, Cell<K>::AFTER, Cell<K>::BEFORE;

  BackwardRun(const Sizes& n, const Backward& p, int threads)
      : n_(n), p_(p), gates_{n.units, GATES, V}, units_{n.units, 1, OUT}, inputs_{n.inputs, 1, OUT},
        width_(units_.blocks() * units_.units()), panels_(gates_.blocks()), panel_(gates_.width()),
        team_(team(n, n.units * GATES * n.units, units_.blocks(), threads)) {
    const long D = n_.inputs, H = n_.units, B = n_.rows, G = panels_ * panel_;
    const long weights = p_.d_w_x ? G * (D + H + 2) : 0;
    at_once_ = std::max(1l, std::min(n_.steps, 256 / B));
    const long rows = at_once_ * B;
    Scratch scratch(width_ * G + (p_.d_xs ? inputs_.blocks() * inputs_.width() * G : 0) + weights +
                    4 * Scratch::rounded(B * width_) + 2 * B + 2 * rows * G + Scratch::rounded(rows * H) + D + H + 512);
    w_h_ = scratch.take(width_ * G);
    w_hn_ = w_h_ + width_ * panels_ * 2 * LANES;
    w_x_ = p_.d_xs ? scratch.take(inputs_.blocks() * inputs_.width() * G) : nullptr;
    d_w_x_ = weights ? scratch.take(G * D) : nullptr;
    d_w_h_ = weights ? scratch.take(G * H) : nullptr;
    d_b_ = weights ? scratch.take(G) : nullptr;
    d_b_hn_ = weights ? scratch.take(G) : nullptr;
    d_h_ = scratch.take(B * width_);
    d_c_ = scratch.take(B * width_);
    through_ = scratch.take(B * width_);
    products_ = scratch.take(B * width_);
    product_rows_ = scratch.rows(products_, B, width_);
    d_u_ = scratch.take(rows * G);
    d_v_ = AFTER ? scratch.take(rows * G) : d_u_;
    reset_ = scratch.take(rows * H);
    nothing_ = scratch.take(D + H);
    std::memset(nothing_, 0, (D + H) * sizeof(Real));
    if (p_.valid || p_.start) trace();
  }

  void run() {
    in_team(team_, [&](const Worker& worker) {
      const Range rows = worker.rows(n_.rows), blocks = worker.blocks(units_.blocks());
      prepare(worker.part(n_.rows), worker);
      worker.barrier.wait();
      for (long last = n_.steps; last > 0; last -= at_once_) {
        const Chunk chunk{std::max(0l, last - at_once_), last};
        for (long k = last - 1; k >= chunk.first; --k) {
          const long m = (k - chunk.first) * n_.rows;  // the chunk's row of row 0
          for (long b = rows.begin; b < rows.end; ++b) gates(chunk, k, m + b, b, blocks);
          if (!worker.by_rows) worker.barrier.wait();
          if constexpr (BEFORE) {
            for (long j = blocks.begin; j < blocks.end; ++j) reset(chunk, k, j, rows);
            if (!worker.by_rows) worker.barrier.wait();
          }
          for (long j = blocks.begin; j < blocks.end; ++j) carry(chunk, k, j, rows);
        }
        worker.barrier.wait();
        if (p_.d_w_x) weights(chunk, worker.part(panels_));
        if (p_.d_xs) inputs(chunk, worker.part(chunk.steps() * n_.rows));
        worker.barrier.wait();
      }
      finish(worker);
    });
  }

 private:
  // Steps whose cotangents d_u and d_v lie in memory, (panel, row of the chunk, width).
  struct Chunk {
    long first, last;
    long steps() const { return last - first; }
  };

  void prepare(Range rows, const Worker& worker) {
    const long D = n_.inputs, H = n_.units, G = GATES * H, size = H * sizeof(Real);
    const Range units = worker.part(units_.blocks()), panels = worker.part(panels_);
    if (BEFORE) {
      pack_transposed(p_.w_h, G, gates_, 0, 2, units_, units, w_h_);
      pack_transposed(p_.w_h, G, gates_, 2, 3, units_, units, w_hn_);
    } else {
      pack_transposed(p_.w_h, G, gates_, 0, V, units_, units, w_h_);
    }
    if (p_.d_xs) pack_transposed(p_.w_x, G, gates_, 0, V, inputs_, worker.part(inputs_.blocks()), w_x_);
    if (p_.d_w_x) {
      auto zero = [&](Real* w, long k) {
        std::memset(w + panels.begin * panel_ * k, 0, panels.size() * panel_ * k * sizeof(Real));
      };
      zero(d_w_x_, D), zero(d_w_h_, H), zero(d_b_, 1), zero(d_b_hn_, 1);
    }
    for (long r = rows.begin; r < rows.end; ++r) {
      padded(d_h_ + r * width_, p_.d_last_h + r * H);
      if (LSTM) padded(d_c_ + r * width_, p_.d_last_c + r * H);
      if (p_.d_fresh_h) std::memset(p_.d_fresh_h + r * H, 0, size);
      if (p_.d_fresh_c) std::memset(p_.d_fresh_c + r * H, 0, size);
    }
  }

  void padded(Real* to, const Real* from) const {
    std::memcpy(to, from, n_.units * sizeof(Real));
    std::memset(to + n_.units, 0, (width_ - n_.units) * sizeof(Real));
  }

  void finish(const Worker& worker) const {
    const long D = n_.inputs, H = n_.units, G = GATES * H;
    const Range rows = worker.part(n_.rows), panels = worker.part(panels_);
    for (long r = rows.begin; r < rows.end; ++r) {
      std::memcpy(p_.d_h + r * H, d_h_ + r * width_, H * sizeof(Real));
      if (LSTM) std::memcpy(p_.d_c + r * H, d_c_ + r * width_, H * sizeof(Real));
    }
    if (!p_.d_w_x) return;
    unpack(d_w_x_, D, G, gates_, panels, p_.d_w_x);
    unpack(d_w_h_, H, G, gates_, panels, p_.d_w_h);
    if (p_.d_b) unpack(d_b_, 1, G, gates_, panels, p_.d_b);
    for (long j = panels.begin; p_.d_b_hn && j < panels.end; ++j)
      store(p_.d_b_hn + j * LANES, load(d_b_hn_ + j * panel_ + 2 * LANES), gates_.lanes(j, 0));
  }

  // For every step of every row where the carry before it lies: after which step, or in the first or a fresh carry.
  static constexpr int32_t FIRST = -1, FRESH = -2;
  void trace() {
    before_.resize(n_.steps * n_.rows);
    for (long b = 0; b < n_.rows; ++b) {
      int32_t last = FIRST;
      for (long k = 0; k < n_.steps; ++k) {
        const long at = n_.at(n_.time(k), b);
        before_[at] = start(at) ? FRESH : last;
        if (valid(at)) last = static_cast<int32_t>(n_.time(k));
      }
    }
  }

  bool valid(long at) const { return !p_.valid || p_.valid[at]; }
  bool start(long at) const { return p_.start && p_.start[at]; }

  // h or c before step number k of a row, of the states after every step, the first and the fresh ones.
  const Real* before(long k, long b, const Real* states, const Real* first, const Real* fresh) const {
    const long H = n_.units;
    long t = k == 0 ? FIRST : n_.time(k - 1);
    if (!before_.empty()) t = before_[n_.at(n_.time(k), b)];
    return t == FRESH ? fresh + b * H : t == FIRST ? first + b * H : states + n_.at(t, b) * H;
  }
  const Real* h_before(long k, long b) const { return before(k, b, p_.ys, p_.h, p_.fresh_h); }

  Real* panel(Real* base, const Chunk& chunk, long j, long m) const {
    return base + (j * chunk.steps() * n_.rows + m) * panel_;
  }

  // What does not need a product: the cotangents of the gates' sums, and of what of the carry goes straight through.
  void gates(const Chunk& chunk, long k, long m, long b, Range blocks) const {
    const long H = n_.units, at = n_.at(n_.time(k), b), scale = units_.units() / gates_.units();
    const bool live = valid(at);
    const Real* h = h_before(k, b);
    for (long j = blocks.begin * scale; j < std::min(blocks.end * scale, panels_); ++j) {
      Real *d_u = panel(d_u_, chunk, j, m), *d_v = panel(d_v_, chunk, j, m);
      if (!live) {
        for (int v = 0; v < V; ++v) store(d_u + v * LANES, Vec{}), store(d_v + v * LANES, Vec{});
        if (BEFORE) store(reset_ + m * H + gates_.unit(j, 0), Vec{}, gates_.lanes(j, 0));
        continue;
      }
      for (int v = 0; v < (GATES == 1 ? V : 1); ++v) {
        const long unit = gates_.unit(j, v), n = gates_.lanes(j, v);
        const Real* kept = p_.kept + at * KEPT * H + unit;
        Real* through = through_ + b * width_ + unit;
        const Vec d_y = load(d_h_ + b * width_ + unit) + (n ? load(p_.d_ys + at * H + unit, n) : Vec{});
        if constexpr (LSTM) {
          const Real* c = before(k, b, p_.cs, p_.c, p_.fresh_c) + unit;
          Vec d_c = load(d_c_ + b * width_ + unit), d_a[4];
          lstm_back(d_y, d_c, load(c, n), load(p_.cs + at * H + unit, n), kept, H, n, d_a);
          for (int gate = 0; gate < 4; ++gate) store(d_u + gate * LANES, d_a[gate]);
          store(through, Vec{});
          if (start(at)) {
            Real* fresh = p_.d_fresh_c + b * H + unit;
            store(fresh, load(fresh, n) + d_c, n);
            d_c = Vec{};
          }
          store(d_c_ + b * width_ + unit, d_c);
        } else if constexpr (GATES == 3) {
          const GruBack back(d_y, load(h + unit, n), kept, H, n);
          store(d_u + LANES, back.d_z);
          store(d_u + 2 * LANES, back.d_n);
          store(through, back.d_h);
          if constexpr (AFTER) {
            const Vec d_r = back.d_n * load(kept + 3 * H, n) * back.r * (1.0f - back.r);
            store(d_u, d_r);
            store(d_v, d_r), store(d_v + LANES, back.d_z), store(d_v + 2 * LANES, back.d_n * back.r);
          }
        } else {
          const Vec y = n ? load(p_.ys + at * H + unit, n) : Vec{};
          store(d_u + v * LANES, K == Kind::kElmanTanh ? d_y * (1.0f - y * y) : y > 0.0f ? d_y : Vec{});
          store(through, Vec{});
        }
      }
    }
  }

  // The vectors [first, first + count) of rows m, … of a chunk in all panels.
  Panels panels(Real* base, const Chunk& chunk, long m, long first, long count) const {
    return {panel(base, chunk, 0, m) + first * LANES, chunk.steps() * n_.rows * panel_, panel_, count * LANES};
  }
  // Those of step k times block j of a packed transposed weight.
  void multiply(Real* base, const Chunk& chunk, long k, long j, Range rows, long first, long count, const Real* w) const {
    const Panels d = panels(base, chunk, (k - chunk.first) * n_.rows + rows.begin, first, count);
    product_of_panels(d, {0, panels_}, w + j * panels_ * count * LANES * OUT * LANES, rows.size(),
                      product_rows_ + rows.begin, units_.unit(j, 0), units_.units(), n_.rows == 1);
  }
  // f(row, step's place, unit, lanes, product) for the vectors of block j, where there is a step.
  template <class F>
  JAXRNN_INLINE void each_product(long k, long j, Range rows, const F& f) const {
    for (long b = rows.begin; b < rows.end; ++b) {
      const long at = n_.at(n_.time(k), b);
      for (int v = 0; valid(at) && v < OUT; ++v)
        if (const long unit = units_.unit(j, v), n = units_.lanes(j, v); n > 0)
          f(b, at, unit, n, load(products_ + b * width_ + unit));
    }
  }

  // Of a GRU that resets before the product: the cotangent of r h, and of r.
  void reset(const Chunk& chunk, long k, long j, Range rows) const {
    const long H = n_.units, m = (k - chunk.first) * n_.rows;
    multiply(d_u_, chunk, k, j, rows, 2, 1, w_hn_);
    each_product(k, j, rows, [&](long b, long at, long unit, long n, Vec d) {
      const Vec gate = load(p_.kept + at * KEPT * H + unit, n), h = load(h_before(k, b) + unit, n);
      store(panel(d_u_, chunk, unit / LANES, m + b), d * h * gate * (1.0f - gate));
      store(reset_ + (m + b) * H + unit, gate * h, n);
      Real* through = through_ + b * width_ + unit;
      store(through, load(through) + d * gate);
    });
  }

  // The cotangent of the carry before the step.
  void carry(const Chunk& chunk, long k, long j, Range rows) const {
    multiply(d_v_, chunk, k, j, rows, 0, BEFORE ? 2 : V, w_h_);
    each_product(k, j, rows, [&](long b, long at, long unit, long n, Vec d) {
      d += load(through_ + b * width_ + unit);
      if (start(at)) {
        Real* fresh = p_.d_fresh_h + b * n_.units + unit;
        store(fresh, load(fresh, n) + d, n);
        d = Vec{};
      }
      store(d_h_ + b * width_ + unit, d);
    });
  }

  static constexpr long AT_ONCE = 128;  // rows of a chunk

  // d_w_x += xsᵀ d_u, d_w_h += sᵀ d_v, d_b += Σ d_u over the rows of a chunk.
  void weights(const Chunk& chunk, Range panels) const {
    const long D = n_.inputs, H = n_.units, B = n_.rows, count = chunk.steps() * B;
    const Real *x[AT_ONCE], *s[AT_ONCE], *reset[AT_ONCE];
    for (long begin = 0; begin < count; begin += AT_ONCE) {
      const long size = std::min(AT_ONCE, count - begin);
      long k = chunk.first + begin / B, b = begin % B;
      for (long i = 0; i < size; ++i) {
        const long at = n_.at(n_.time(k), b);
        const bool live = valid(at);
        x[i] = live ? p_.xs + at * D : nothing_;
        s[i] = live ? h_before(k, b) : nothing_;
        reset[i] = reset_ + (begin + i) * H;
        if (++b == B) b = 0, ++k;
      }
      for (long j = panels.begin; j < panels.end; ++j) {
        const Real *d_u = panel(d_u_, chunk, j, begin), *d_v = panel(d_v_, chunk, j, begin);
        gram<V>(x, size, {0, D}, d_u, panel_, d_w_x_ + j * panel_ * D, panel_);
        Real* w_h = d_w_h_ + j * panel_ * H;
        if constexpr (BEFORE) {
          gram<2>(s, size, {0, H}, d_u, panel_, w_h, panel_);
          gram<1>(reset, size, {0, H}, d_u + 2 * LANES, panel_, w_h + 2 * LANES, panel_);
        } else {
          gram<V>(s, size, {0, H}, d_v, panel_, w_h, panel_);
        }
        add_rows<V>(d_u, size, panel_, d_b_ + j * panel_);
        if (AFTER) add_rows<V>(d_v, size, panel_, d_b_hn_ + j * panel_);
      }
    }
  }

  // d_xs = d_u w_xᵀ.
  void inputs(const Chunk& chunk, Range rows) const {
    const long D = n_.inputs, B = n_.rows;
    Real* d_x[AT_ONCE];
    for (long begin = rows.begin; begin < rows.end; begin += AT_ONCE) {
      const long size = std::min(AT_ONCE, rows.end - begin);
      long k = chunk.first + begin / B, b = begin % B;
      for (long i = 0; i < size; ++i) {
        d_x[i] = p_.d_xs + n_.at(n_.time(k), b) * D;
        if (++b == B) b = 0, ++k;
      }
      const Panels d = panels(d_u_, chunk, begin, 0, V);
      for (long j = 0; j < inputs_.blocks(); ++j)
        product_of_panels(d, {0, panels_}, w_x_ + j * panels_ * panel_ * OUT * LANES, size, d_x, inputs_.unit(j, 0),
                          D - inputs_.unit(j, 0));
    }
  }

  const Sizes n_;
  const Backward p_;
  const Layout gates_, units_, inputs_;
  const long width_, panels_, panel_;
  const Team team_;
  std::vector<int32_t> before_;
  long at_once_;
  Real** product_rows_;
  Real *w_h_, *w_hn_, *w_x_, *d_w_x_, *d_w_h_, *d_b_, *d_b_hn_, *d_h_, *d_c_, *through_, *products_, *d_u_, *d_v_, *reset_, *nothing_;
};
