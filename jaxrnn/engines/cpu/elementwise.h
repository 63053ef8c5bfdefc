// Sequences of single units, in chunks of time: the products with the input, block by block of units, then gates and
// recurrence of that block while its sums are in the cache. Backwards sums are computed again, unless they are kept; the
// cotangents of a chunk's sums give those of weights and inputs, as large products. Rows of a chunk come one after the
// other, each with all its steps.

// The products of a member's rows with its weights: S sums of every unit.
template <int S>
class UnitSums {
 protected:
  static constexpr int OUT = 4;  // vectors of a block of what a product with a transposed weight gives
  static constexpr long W = S * LANES;

  UnitSums(const ElementwiseProblem& p, long member, int threads)
      : p_(p), member_(member), R_(p.rows / p.members), H_(p.units), X_(p.inputs), D_(p.taps * p.inputs),
        layout_{H_, S, S}, in_{D_, 1, OUT},
        blocks_(layout_.blocks()), width_(blocks_ * LANES),
        w_given_(p.w + member * (D_ / p.heads) * S * H_) {
    const int most = p.steps * R_ * H_ * (D_ / p.heads + 8) < 200000 ? 1 : threads;
    by_blocks_ = static_cast<int>(std::min<long>(most, blocks_));
    by_rows_ = static_cast<int>(std::min<long>(most / by_blocks_, R_));
  }

  const ElementwiseProblem& p_;
  const long member_, R_, H_, X_, D_;  // rows of the member, units, inputs of a step and of a window of steps
  const Layout layout_, in_;
  const long blocks_, width_;
  const Real* const w_given_;
  int by_blocks_, by_rows_;  // threads
  Real *w_, *bias_;         // packed

  struct Chunk {
    long first, last;
    long steps() const { return last - first; }
    long count(long rows) const { return rows * steps(); }
  };

  int parts() const { return by_blocks_ * by_rows_; }
  Range rows(const Worker& w) const { return w.count == 1 ? Range{0, R_} : share(R_, by_rows_, w.number / by_blocks_); }
  Range blocks(const Worker& w) const {
    return w.count == 1 ? Range{0, blocks_} : share(blocks_, by_blocks_, w.number % by_blocks_);
  }

  long time(long k) const { return p_.reverse ? p_.steps - 1 - k : k; }
  long place(long k, long row) const { return time(k) * p_.rows + member_ * R_ + row; }
  // What step k reads of a row: the input of every step of its window, the first of which lie before step 0.
  const Real* input(long k, int tap, long row) const {
    const long t = p_.reverse ? p_.steps + p_.taps - 2 - k - tap : k + tap;
    return p_.xs + (t * p_.rows + own(row)) * X_;
  }
  bool valid(long at) const { return !p_.valid || p_.valid[at]; }
  bool starts(long at) const { return p_.start && p_.start[at]; }
  long own(long row) const { return member_ * R_ + row; }  // among the rows of all members
  long lanes(long j) const { return layout_.lanes(j, 0); }

  // Heads of a weight (N, D / N, S H / N), of one tap: which inputs a block of units reads, and which blocks read a block
  // of inputs.
  Range inputs(long j) const {
    const long units = H_ / p_.heads, size = X_ / p_.heads, last = std::min((j + 1) * LANES, H_) - 1;
    return {j * LANES / units * size, (last / units + 1) * size};
  }
  Range readers(long j) const {
    const long units = H_ / p_.heads, size = D_ / p_.heads, last = std::min((j + 1) * in_.units(), D_) - 1;
    return {j * in_.units() / size * units / LANES, ((last / size + 1) * units - 1) / LANES + 1};
  }
  // Where the weight from an input to a sum of a unit lies; −1 between heads.
  long weight(long input, long s, long unit) const {
    const long units = H_ / p_.heads, size = D_ / p_.heads, head = input / size;
    return head == unit / units ? (input * S + s) * units + unit % units : -1;
  }

  void pack_weights(Range blocks) const {
    if (p_.b) pack(p_.b + member_ * S * H_, 1, S * H_, layout_, blocks, bias_);
    else std::memset(bias_ + blocks.begin * W, 0, blocks.size() * W * sizeof(Real));
    if (p_.heads == 1) return pack(w_given_, D_, S * H_, layout_, blocks, w_);
    each_weight(blocks, [&](long at, Real* packed) { *packed = at < 0 ? 0.0f : w_given_[at]; }, w_);
  }
  void pack_transposed_weights(Range out, Real* to) const {
    if (p_.heads == 1) return pack_transposed(w_given_, S * H_, layout_, 0, S, in_, out, to);
    for (long j = out.begin; j < out.end; ++j)
      for (long unit = 0; unit < width_; ++unit)
        for (long s = 0; s < S; ++s)
          for (long i = 0; i < OUT * LANES; ++i) {
            const long input = j * OUT * LANES + i, at = unit < H_ && input < D_ ? weight(input, s, unit) : -1;
            to[(((j * blocks_ + unit / LANES) * S + s) * LANES + unit % LANES) * OUT * LANES + i] =
                at < 0 ? 0.0f : w_given_[at];
          }
  }
  void unpack_weights(const Real* packed, Range blocks, Real* w) const {
    if (p_.heads == 1) return unpack(packed, D_, S * H_, layout_, blocks, w);
    each_weight(blocks, [&](long at, const Real* packed) { if (at >= 0) w[at] = *packed; }, packed);
  }

  // to = x w + bias, for the rows at `x`, of which some columns are read; `next` lie those of every other tap.
  static void product(const Real* const* x, long count, Range columns, const Real* w, const Real* bias, Real* to,
                      long taps = 1, long next = 0) {
    tiles<ROWS<S>>({0, count}, [&](auto tile, long m) {
      constexpr int R = decltype(tile)::value;
      const Real* a[R];
      Vec sums[R][S];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < S; ++v) sums[r][v] = bias ? load(bias + v * LANES) : Vec{};
      for (long tap = 0; tap < taps; ++tap) {
        for (int r = 0; r < R; ++r) a[r] = x[tap * next + m + r] + columns.begin;
        multiply<R, S>(a, columns.size(), w + tap * columns.size() * W, sums);
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < S; ++v) store(to + (m + r) * W + v * LANES, sums[r][v]);
    });
  }

  // sums += xᵀ d, for some columns of x; all d are added up in `total`, too.
  static void gram(const Real* const* x, long count, Range columns, const Real* d, Real* sums, Real* total) {
    constexpr long MOST = 128;
    for (long begin = 0; begin < count; begin += MOST, d += MOST * W) {
      const long size = std::min(MOST, count - begin);
      tiles<ROWS<S>>(columns, [&](auto tile, long k) {
        accumulate<decltype(tile)::value, S>(x + begin, k, size, d, W, sums + k * W, W);
      });
      Vec more[S] = {};
      for (long m = 0; total && m < size; ++m)
        for (int v = 0; v < S; ++v) more[v] += load(d + m * W + v * LANES);
      for (int v = 0; total && v < S; ++v) store(total + v * LANES, load(total + v * LANES) + more[v]);
    }
  }

  // u = x w + b of a block, for the rows at `x`, and d_w += xᵀ d.
  void project(const Real* const* x, long next, long count, long j, Real* u) const {
    const Range in = inputs(j);
    product(x, count, in, w_ + (j * D_ + in.begin) * W, bias_ + j * W, u, p_.taps, next);
  }
  void project_back(const Real* const* x, long next, long count, long j, const Real* d, Real* d_w, Real* d_b) const {
    for (long tap = 0; tap < p_.taps; ++tap)
      gram(x + tap * next, count, inputs(j), d, d_w + (j * D_ + tap * X_) * W, tap ? nullptr : d_b + j * W);
  }

  // d_xs = d wᵀ for some rows of a chunk, or as much more.
  void inputs_back(const Real* d, const Chunk& chunk, Range rows, const Real* w_back, bool more, Real* d_xs) const {
    for (long j = 0; j < in_.blocks(); ++j)
      tiles<ROWS<OUT>>(rows, [&](auto tile, long m) {
        constexpr int R = decltype(tile)::value;
        Vec sums[R][OUT] = {};
        times<R>(d + m * W, chunk.count(R_) * W, W, readers(j), W, w_back + j * blocks_ * W * OUT * LANES, sums);
        for (int r = 0; r < R; ++r) {
          Real* to = d_xs + place(chunk.first + (m + r) % chunk.steps(), (m + r) / chunk.steps()) * D_;
          for (int v = 0; v < OUT; ++v)
            if (const long n = in_.lanes(j, v)) {
              Real* own = to + in_.unit(j, v);
              store(own, more ? sums[r][v] + load(own, n) : sums[r][v], n);
            }
        }
      });
  }

 private:
  template <class Work, class Pointer>
  void each_weight(Range blocks, const Work& work, Pointer packed) const {
    packed += blocks.begin * D_ * W;
    for (long j = blocks.begin; j < blocks.end; ++j)
      for (long k = 0; k < D_; ++k)
        for (long s = 0; s < S; ++s)
          for (long lane = 0; lane < LANES; ++lane, ++packed)
            work(lane < lanes(j) ? weight(k, s, j * LANES + lane) : -1, packed);
  }
};

// What both passes do with a block of units of a row.
template <class Unit>
class UnitRun : protected UnitSums<Unit::SUMS> {
 protected:
  static constexpr int S = Unit::SUMS, E = Unit::STATES, K = Unit::THETA;
  using Base = UnitSums<S>;
  using typename Base::Chunk;
  using Base::Base, Base::p_, Base::member_, Base::H_, Base::D_, Base::R_, Base::own;

  // The block of the states of a row.
  JAXRNN_INLINE void take(Vec* to, const Real* from, long row, long j) const {
    for (int e = 0; e < E; ++e)
      to[e] = from ? load(from + row * E * H_ + e * H_ + j * LANES, this->lanes(j)) : Vec{};
  }
  JAXRNN_INLINE void give(Real* to, const Vec* from, long row, long j) const {
    for (int e = 0; e < E; ++e) store(to + row * E * H_ + e * H_ + j * LANES, from[e], this->lanes(j));
  }
  JAXRNN_INLINE void fresh(Vec* to, long row, long j) const { take(to, p_.fresh, own(row), j); }

  Sums<S> of_block(long j) const {
    Sums<S> s;
    for (int k = 0; k < K; ++k) s.theta[k] = load(p_.theta + (member_ * K + k) * H_ + j * LANES, this->lanes(j));
    s.bound = p_.bound;
    return s;
  }
  Real* kept(long at, int v, long j) const { return p_.sums + (at * S + v) * H_ + j * LANES; }
  // The sums lie at u, or are kept.
  JAXRNN_INLINE void read(Sums<S>& s, const Real* u, long at, long j) const {
    for (int v = 0; v < S; ++v) s.u[v] = u ? load(u + v * LANES) : load(kept(at, v, j), this->lanes(j));
    if (Unit::READS_X) s.x = load(p_.xs + at * D_ + j * LANES, this->lanes(j));
    s.begun = !p_.begun || p_.begun[at];
  }
};

template <class Unit>
class UnitForward : UnitRun<Unit> {
  using Run = UnitRun<Unit>;
  using typename Run::Chunk;
  using Run::S, Run::E, Run::W, Run::OUT, Run::p_, Run::member_, Run::R_, Run::H_, Run::D_, Run::blocks_, Run::place, Run::own;

 public:
  UnitForward(const ElementwiseProblem& p, long member, int threads) : Run(p, member, threads) {
    at_once_ = std::max(1l, std::min(p.steps, 256 / R_));
    const long count = at_once_ * R_;
    const long out = PROJECTS ? out_.blocks() * OUT * LANES : 0, both = this->parts() > 1 ? 2 : 1;
    Scratch scratch(blocks_ * ((D_ + 1) * W + out * E * LANES) + R_ * INNER * this->width_ +
                    (PROJECTS ? both * count * blocks_ * E * LANES : 0) + this->parts() * (count * (W + 2 * p.taps) + 32) + 512);
    this->w_ = scratch.take(blocks_ * D_ * W);
    this->bias_ = scratch.take(blocks_ * W);
    h_ = scratch.take(R_ * INNER * this->width_);
    u_ = scratch.take(this->parts() * count * W);
    x_ = reinterpret_cast<const Real**>(scratch.take(2 * this->parts() * p_.taps * count));
    w_y_ = scratch.take(blocks_ * out * E * LANES);
    for (long k = 0; k < 2; ++k) hs_[k] = k < both ? scratch.take(PROJECTS ? count * blocks_ * E * LANES : 0) : hs_[0];
  }

  void run() {
    in_team({this->parts(), false}, [&](const Worker& w) {
      const Range rows = this->rows(w), blocks = this->blocks(w);
      this->pack_weights(w.part(blocks_));
      if (PROJECTS) pack_output(w.part(out_.blocks()));
      for (long j = blocks.begin; j < blocks.end; ++j)
        for (long row = rows.begin; row < rows.end; ++row) {
          Vec h[INNER];
          this->take(h, p_.h, own(row), j);
          enter(h);
          keep(h, row, j);
        }
      w.barrier.wait();
      Real* u = u_ + w.number * at_once_ * R_ * W;
      const long all = at_once_ * R_;
      const Real** x = x_ + w.number * p_.taps * all;
      Real *now = hs_[0], *other = hs_[1];
      for (long first = 0; first < p_.steps; first += at_once_, std::swap(now, other)) {
        const Chunk chunk{first, std::min(first + at_once_, p_.steps)};
        const Real** next = x;
        for (long row = rows.begin; row < rows.end; ++row)
          for (long k = first; k < chunk.last; ++k, ++next)
            for (int tap = 0; tap < p_.taps; ++tap) next[tap * all] = this->input(k, tap, row);
        for (long j = blocks.begin; j < blocks.end; ++j) {
          this->project(x, all, next - x, j, u);
          for (long row = rows.begin; row < rows.end; ++row)
            walk(chunk, row, j, u + chunk.count(row - rows.begin) * W,
                 now + (j * chunk.count(R_) + chunk.count(row)) * E * LANES);
        }
        if (!PROJECTS) continue;
        w.barrier.wait();  // those of the next chunk lie elsewhere
        output(chunk, w.part(chunk.count(R_)), now);
      }
    });
  }

 private:
  static constexpr int INNER = Unit::LOGS ? 2 : E;  // numbers of a state, as a unit goes on from them
  static constexpr bool PROJECTS = Unit::PROJECTS;
  const Layout out_{p_.outputs, 1, OUT};
  long at_once_;
  Real *h_, *u_, *w_y_, *hs_[2] = {};
  const Real** x_;

  static JAXRNN_INLINE void enter(Vec* h) {
    if constexpr (Unit::LOGS) Unit::enter(h);
  }
  static JAXRNN_INLINE void whole(const Vec* h, Vec* to) {
    if constexpr (Unit::LOGS) to[0] = Unit::whole(h);
    else
      for (int e = 0; e < E; ++e) to[e] = h[e];
  }
  Real* state(long row, long j) const { return h_ + (row * blocks_ + j) * INNER * LANES; }
  void keep(const Vec* h, long row, long j) const {
    for (int e = 0; e < INNER; ++e) store(state(row, j) + e * LANES, h[e]);
  }

  // Rows of w_y in the order of states in a block, 0 beyond the units.
  void pack_output(Range out) const {
    const Real* w = p_.w_y + member_ * E * H_ * p_.outputs;
    Real* to = w_y_ + out.begin * blocks_ * E * LANES * OUT * LANES;
    for (long o = out.begin; o < out.end; ++o)
      for (long j = 0; j < blocks_; ++j)
        for (int e = 0; e < E; ++e)
          for (long lane = 0; lane < LANES; ++lane)
            for (int v = 0; v < OUT; ++v, to += LANES) {
              const Real* row = w + (e * H_ + j * LANES + lane) * p_.outputs + out_.unit(o, v);
              store(to, lane < this->lanes(j) ? load(row, out_.lanes(o, v)) : Vec{});
            }
  }

  // ys = h w_y for some rows of a chunk.
  void output(const Chunk& chunk, Range rows, const Real* hs) const {
    constexpr long each = E * LANES;
    for (long o = 0; o < out_.blocks(); ++o)
      tiles<ROWS<OUT>>(rows, [&](auto tile, long m) {
        constexpr int R = decltype(tile)::value;
        Vec sums[R][OUT] = {};
        times<R>(hs + m * each, chunk.count(R_) * each, each, {0, blocks_}, each, w_y_ + o * blocks_ * each * OUT * LANES,
                 sums);
        for (int r = 0; r < R; ++r) {
          const long at = place(chunk.first + (m + r) % chunk.steps(), (m + r) / chunk.steps());
          for (int v = 0; v < OUT; ++v)
            if (const long n = out_.lanes(o, v))
              store(p_.ys + at * p_.outputs + out_.unit(o, v), this->valid(at) ? sums[r][v] : Vec{}, n);
        }
      });
  }

  void walk(const Chunk& chunk, long row, long j, const Real* u, Real* hs) const {
    Vec h[INNER], y[E];
    for (int e = 0; e < INNER; ++e) h[e] = load(state(row, j) + e * LANES);
    whole(h, y);
    Sums<S> s = this->of_block(j);
    for (long k = chunk.first; k < chunk.last; ++k, u += W, hs += E * LANES) {
      const long at = place(k, row);
      for (int v = 0; p_.sums && v < S; ++v) store(this->kept(at, v, j), load(u + v * LANES), this->lanes(j));
      if (!this->valid(at)) {
        if (p_.hs) this->give(p_.hs, y, at, j);
        const Vec none[E] = {};
        if (PROJECTS)
          for (int e = 0; e < E; ++e) store(hs + e * LANES, none[e]);
        else this->give(p_.ys, none, at, j);
        continue;
      }
      if (this->starts(at)) this->fresh(h, row, j), enter(h);
      this->read(s, u, at, j);
      const Unit unit(s);
      unit.next(h);
      whole(h, y);
      if (p_.hs) this->give(p_.hs, y, at, j);
      if constexpr (PROJECTS) {
        for (int e = 0; e < E; ++e) store(hs + e * LANES, y[e]);
      } else if constexpr (Unit::GIVES_Y) {
        const Vec out[E] = {unit.y(y[0])};
        this->give(p_.ys, out, at, j);
      } else {
        this->give(p_.ys, y, at, j);
      }
    }
    keep(h, row, j);
    if (chunk.last == p_.steps) this->give(p_.last, y, own(row), j);
  }
};

template <class Unit>
class UnitBackward : UnitRun<Unit> {
  using Run = UnitRun<Unit>;
  using typename Run::Chunk;
  using Run::S, Run::E, Run::K, Run::W, Run::OUT, Run::p_, Run::R_, Run::H_, Run::D_, Run::blocks_, Run::place, Run::own;
  using Run::member_, Run::width_;

 public:
  UnitBackward(const ElementwiseProblem& p, const ElementwiseGradient& g, long member, int threads)
      : Run(p, member, threads), g_(g) {
    at_once_ = std::max(1l, std::min(p.steps, 256 / R_));
    const long count = at_once_ * R_, G = blocks_ * W, in = g.d_xs ? this->in_.blocks() * OUT * LANES : 0;
    const long both = this->parts() > 1 ? 2 : 1, P = PROJECTS ? p.outputs : 0, panel = PROJECTS ? count * W : 0;
    Scratch scratch(G * (2 * D_ + 2) + in * G + R_ * (E + K) * width_ + both * count * G +
                    this->parts() * (count * (W + 2 * p.taps + 2) + panel + 128) + both * blocks_ * panel + 2 * G * P + D_ + P + 1024);
    this->w_ = scratch.take(D_ * G);
    this->bias_ = scratch.take(G);
    w_back_ = scratch.take(in * G);
    d_w_ = scratch.take(D_ * G);
    d_b_ = scratch.take(G);
    d_h_ = scratch.take(R_ * E * width_);
    d_theta_ = scratch.take(R_ * K * width_);
    for (long k = 0; k < 2; ++k) d_u_[k] = k < both ? scratch.take(count * G) : d_u_[0];
    u_ = scratch.take(this->parts() * count * W);
    x_ = reinterpret_cast<const Real**>(scratch.take(2 * this->parts() * p_.taps * count));
    d_ys_ = reinterpret_cast<const Real**>(scratch.take(PROJECTS ? 2 * this->parts() * count : 0));
    w_y_ = scratch.take(G * P);
    d_w_y_ = scratch.take(G * P);
    d_y_ = scratch.take(this->parts() * panel);
    for (long k = 0; k < 2; ++k) h_[k] = k < both ? scratch.take(blocks_ * panel) : h_[0];
    nothing_ = scratch.take(std::max(D_, P));
    std::memset(nothing_, 0, std::max(D_, P) * sizeof(Real));
  }

  void run() {
    in_team({this->parts(), false}, [&](const Worker& w) {
      const Range rows = this->rows(w), blocks = this->blocks(w), all = w.part(blocks_);
      prepare(w, rows, blocks);
      w.barrier.wait();
      Real *u = u_ + w.number * at_once_ * R_ * W, *now = d_u_[0], *other = d_u_[1];
      const long most = at_once_ * R_;
      const Real **x = x_ + w.number * p_.taps * most, **d_ys = PROJECTS ? d_ys_ + w.number * at_once_ * R_ : nullptr;
      Real *d_y = d_y_ + w.number * at_once_ * R_ * W, *h = h_[0], *other_h = h_[1];
      for (long last = p_.steps; last > 0; last -= at_once_, std::swap(now, other), std::swap(h, other_h)) {
        const Chunk chunk{std::max(0l, last - at_once_), last};
        const long count = chunk.count(R_), begin = chunk.count(rows.begin);
        const Real** next = x;
        for (long row = 0; row < R_; ++row)
          for (long k = chunk.first; k < last; ++k) {
            const long at = place(k, row);
            if (PROJECTS) d_ys[next - x] = this->valid(at) ? g_.d_ys + at * p_.outputs : nothing_;
            for (int tap = 0; tap < p_.taps; ++tap)
              next[tap * most] = this->valid(at) ? this->input(k, tap, row) : nothing_;
            ++next;
          }
        for (long j = blocks.begin; j < blocks.end; ++j) {
          const long own = chunk.count(rows.size());
          if (!p_.sums) this->project(x + begin, most, own, j, u);
          if constexpr (PROJECTS) this->product(d_ys + begin, own, {0, p_.outputs}, w_y_ + j * p_.outputs * W, nullptr, d_y);
          for (long row = rows.begin; row < rows.end; ++row) {
            const long m = chunk.count(row), at = (j * count + m) * W, mine = (m - begin) * W;
            walk(chunk, row, j, p_.sums ? nullptr : u + mine, now + at, d_y + mine, h + at);
          }
        }
        w.barrier.wait();  // those of the next chunk lie elsewhere
        if (g_.d_w || g_.d_b)
          for (long j = all.begin; j < all.end; ++j)
            this->project_back(x, most, count, j, now + j * count * W, d_w_, d_b_);
        if constexpr (PROJECTS)
          for (long j = all.begin; g_.d_w_y && j < all.end; ++j)
            this->gram(d_ys, count, {0, p_.outputs}, h + j * count * W, d_w_y_ + j * p_.outputs * W, nullptr);
        if (g_.d_xs) this->inputs_back(now, chunk, w.part(count), w_back_, Unit::READS_X, g_.d_xs);
      }
      finish(w, all);
    });
  }

 private:
  static constexpr bool PROJECTS = Unit::PROJECTS;  // then there are as many states as sums: E · LANES = W
  const ElementwiseGradient& g_;
  long at_once_;
  Real *w_back_, *d_w_, *d_b_, *d_h_, *d_theta_, *d_u_[2], *u_, *nothing_, *w_y_, *d_w_y_, *d_y_, *h_[2] = {};
  const Real **x_, **d_ys_;

  // Of a block of a row.
  Real* d_state(long row, long j) const { return d_h_ + (row * blocks_ + j) * E * LANES; }
  Real* d_theta(long row, long j) const { return d_theta_ + (row * blocks_ + j) * K * LANES; }

  void prepare(const Worker& w, Range rows, Range blocks) {
    const Range all = w.part(blocks_);
    this->pack_weights(all);
    if (g_.d_xs) this->pack_transposed_weights(w.part(this->in_.blocks()), w_back_);
    std::memset(d_w_ + all.begin * D_ * W, 0, all.size() * D_ * W * sizeof(Real));
    std::memset(d_b_ + all.begin * W, 0, all.size() * W * sizeof(Real));
    if constexpr (PROJECTS) {
      each_output(all, [&](long at, Real* to) { *to = at < 0 ? 0.0f : p_.w_y[at]; }, w_y_);
      std::memset(d_w_y_ + all.begin * p_.outputs * W, 0, all.size() * p_.outputs * W * sizeof(Real));
    }
    for (long row = rows.begin; row < rows.end; ++row)
      for (long j = blocks.begin; j < blocks.end; ++j) {
        Vec d[E];
        const Vec none[E] = {};
        this->take(d, g_.d_last, own(row), j);
        for (int e = 0; e < E; ++e) store(d_state(row, j) + e * LANES, d[e]);
        std::memset(d_theta(row, j), 0, K * LANES * sizeof(Real));
        if (g_.d_fresh) this->give(g_.d_fresh, none, own(row), j);
      }
  }

  // Where w_y lies in the order of its transpose, output by output; −1 beyond the units.
  template <class Work>
  void each_output(Range blocks, const Work& work, Real* packed) const {
    const long P = p_.outputs;
    packed += blocks.begin * P * W;
    for (long j = blocks.begin; j < blocks.end; ++j)
      for (long p = 0; p < P; ++p)
        for (int e = 0; e < E; ++e)
          for (long lane = 0; lane < LANES; ++lane, ++packed)
            work(lane < this->lanes(j) ? ((member_ * E + e) * H_ + j * LANES + lane) * P + p : -1, packed);
  }

  // The cotangents of the sums of a chunk, from its end. With a product after it, those of states lie at d_y, and states
  // are written to h.
  void walk(const Chunk& chunk, long row, long j, const Real* u, Real* d_u, const Real* d_ys, Real* states) const {
    const long n = this->lanes(j);
    const Real* hs = p_.hs ? p_.hs : p_.ys;
    Vec d[E], d_theta[K > 0 ? K : 1] = {}, d_fresh[E] = {};
    for (int e = 0; e < E; ++e) d[e] = load(d_state(row, j) + e * LANES);
    Sums<S> s = this->of_block(j);
    for (long k = chunk.last - 1; k >= chunk.first; --k) {
      const long at = place(k, row), here = (k - chunk.first) * W;
      Real* to = d_u + here;
      if (!this->valid(at)) {
        for (int v = 0; v < S; ++v) store(to + v * LANES, Vec{});
        for (int e = 0; PROJECTS && e < E; ++e) store(states + here + e * LANES, Vec{});
        if (Unit::READS_X && g_.d_xs) store(g_.d_xs + at * D_ + j * LANES, Vec{}, n);
        continue;
      }
      Vec before[E], d_y[E];
      if (this->starts(at)) this->fresh(before, row, j);
      else if (k == 0) this->take(before, p_.h, own(row), j);
      else this->take(before, hs, place(k - 1, row), j);
      if constexpr (PROJECTS) {
        Vec h[E];
        this->take(h, p_.hs, at, j);
        for (int e = 0; e < E; ++e) d_y[e] = load(d_ys + here + e * LANES), store(states + here + e * LANES, h[e]);
      } else {
        this->take(d_y, g_.d_ys, at, j);
      }
      this->read(s, u ? u + here : nullptr, at, j);
      const Unit unit(s);
      SumsBack<S> back;
      if constexpr (Unit::GIVES_Y) {
        Vec h[E] = {before[0]};
        unit.next(h);
        d[0] += unit.y_back(h[0], d_y[0], back);
      } else {
        for (int e = 0; e < E; ++e) d[e] += d_y[e];
      }
      unit.back(s, before, d, back);
      for (int v = 0; v < S; ++v) store(to + v * LANES, back.u[v]);
      for (int i = 0; i < K; ++i) d_theta[i] += back.theta[i];
      if (Unit::READS_X && g_.d_xs) store(g_.d_xs + at * D_ + j * LANES, back.x, n);
      if (this->starts(at))
        for (int e = 0; e < E; ++e) d_fresh[e] += d[e], d[e] = Vec{};
    }
    for (int e = 0; e < E; ++e) store(d_state(row, j) + e * LANES, d[e]);
    for (int i = 0; i < K; ++i) {
      Real* sum = this->d_theta(row, j) + i * LANES;
      store(sum, load(sum) + d_theta[i]);
    }
    if (g_.d_fresh) {
      Vec sum[E];
      this->take(sum, g_.d_fresh, own(row), j);
      for (int e = 0; e < E; ++e) sum[e] += d_fresh[e];
      this->give(g_.d_fresh, sum, own(row), j);
    }
    if (chunk.first == 0) this->give(g_.d_h, d, own(row), j);
  }

  // What a worker has summed; of θ, row by row.
  void finish(const Worker& w, Range blocks) const {
    if (g_.d_w) this->unpack_weights(d_w_, blocks, g_.d_w + (this->w_given_ - p_.w));
    if constexpr (PROJECTS)
      if (g_.d_w_y) each_output(blocks, [&](long at, const Real* from) { if (at >= 0) g_.d_w_y[at] = *from; }, d_w_y_);
    if (g_.d_b) unpack(d_b_, 1, S * H_, this->layout_, blocks, g_.d_b + member_ * S * H_);
    if (!g_.d_theta) return;
    w.barrier.wait();
    for (long j = blocks.begin; j < blocks.end; ++j)
      for (int i = 0; i < K; ++i) {
        Vec sum{};
        for (long row = 0; row < R_; ++row) sum += load(d_theta(row, j) + i * LANES);
        store(g_.d_theta + (member_ * K + i) * H_ + j * LANES, sum, this->lanes(j));
      }
  }
};

// run(member, threads) of every member: a thread each, or all threads for one after the other.
template <class Run>
inline void each_member(const ElementwiseProblem& p, int threads, const Run& run) {
  const long work = p.rows * p.steps * p.units * p.inputs;
  if (p.members >= threads) return in_turns(p.members, work, threads, [&](long member) { run(member, 1); });
  for (long member = 0; member < p.members; ++member) run(member, threads);
}

inline void run_elementwise(const ElementwiseProblem& p, int threads) {
  with_unit(p.unit, [&](auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    each_member(p, threads, [&](long member, int parts) { UnitForward<Unit>(p, member, parts).run(); });
  });
}

inline void run_elementwise_backward(const ElementwiseProblem& p, const ElementwiseGradient& g, int threads) {
  with_unit(p.unit, [&](auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    each_member(p, threads, [&](long member, int parts) { UnitBackward<Unit>(p, g, member, parts).run(); });
  });
}
