// The recurrence over time. Threads divide the rows, and then never wait for each other; or, where rows are few and
// weights many, the blocks of units, and wait after every phase of a step.

struct Range {
  long begin, end;
};

inline Range share(long count, int parts, int part) { return {count * part / parts, count * (part + 1) / parts}; }

struct Team {
  int threads;
  bool by_rows;
};

inline Team team(const Sizes& n, long weights, long blocks, int threads) {
  long work = n.rows * weights;  // multiplications of one step
  if (threads == 1 || n.steps * work < 200000) return {1, true};
  if (n.rows >= threads * 2 * ROWS || (n.rows >= 2 * threads && weights < 200000)) return {threads, true};
  if (blocks >= 2 * threads && work >= 60000) return {threads, false};
  return n.rows >= threads ? Team{threads, true} : Team{1, true};
}

template <class Work>
void in_team(const Team& team, const Work& work) {
  if (team.threads == 1 || !Pool::run(team.threads, [&](int k) { work(k, team.threads); })) work(0, 1);
}

// f.template operator()<R>(row) for tiles of at most ROWS rows.
template <class F>
inline void tiles(Range rows, const F& f) {
  long r = rows.begin;
  for (; r + ROWS <= rows.end; r += ROWS) f(std::integral_constant<int, ROWS>{}, r);
  switch (rows.end - r) {
    case 1: f(std::integral_constant<int, 1>{}, r); break;
    case 2: if constexpr (ROWS > 2) f(std::integral_constant<int, 2>{}, r); break;
    case 3: if constexpr (ROWS > 3) f(std::integral_constant<int, 3>{}, r); break;
    case 4: if constexpr (ROWS > 4) f(std::integral_constant<int, 4>{}, r); break;
    case 5: if constexpr (ROWS > 5) f(std::integral_constant<int, 5>{}, r); break;
    default: break;
  }
}

// Memory of one call, aligned, kept by the thread for the next.
class Scratch {
 public:
  explicit Scratch(long floats) {
    thread_local std::vector<char> memory;
    size_t bytes = floats * sizeof(float) + 64;
    if (memory.size() < bytes) memory.resize(bytes);
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  }
  float* take(long floats) {
    float* p = next_;
    next_ += (floats + 15) / 16 * 16;
    return p;
  }

 private:
  float* next_;
};

// The gates of one vector of units: sums in, carry and output out, what is kept in `kept`.
template <Kind K>
struct Cell;

template <Kind K>
struct ElmanCell {
  static constexpr int V = 4, KEPT = 1;
  static Vec activate(Vec a) { return K == Kind::kElmanTanh ? tangent(a) : a > 0.0f ? a : a != a ? a : Vec{}; }
};
template <>
struct Cell<Kind::kElmanTanh> : ElmanCell<Kind::kElmanTanh> {};
template <>
struct Cell<Kind::kElmanRelu> : ElmanCell<Kind::kElmanRelu> {};
template <>
struct Cell<Kind::kLstm> {
  static constexpr int V = 4, KEPT = 4;
};
template <>
struct Cell<Kind::kGru> {
  static constexpr int V = 3, KEPT = 4;
};
template <>
struct Cell<Kind::kGruBefore> {
  static constexpr int V = 3, KEPT = 3;
};

template <Kind K>
class ForwardRun {
 public:
  static constexpr int V = Cell<K>::V, KEPT = Cell<K>::KEPT;
  static constexpr long GATES = K == Kind::kLstm ? 4 : K >= Kind::kGru ? 3 : 1;
  static constexpr bool LSTM = K == Kind::kLstm, BEFORE = K == Kind::kGruBefore;

  static void run(const Sizes& n, bool reverse, const Forward& p, int threads) {
    ForwardRun(n, reverse, p, threads).go();
  }

 private:
  ForwardRun(const Sizes& n, bool reverse, const Forward& p, int threads)
      : n_(n), p_(p), reverse_(reverse), layout_{n.units, GATES, V}, blocks_(layout_.blocks()),
        width_(blocks_ * layout_.units()), team_(team(n, (n.inputs + n.units) * GATES * n.units, blocks_, threads)) {}

  void go() {
    const long block = V * LANES, B = n_.rows, H = n_.units;
    Scratch scratch(blocks_ * block * (n_.inputs + 2 * H + 2) + 6 * B * width_ + 256);
    x_ = scratch.take(blocks_ * block * n_.inputs);
    h_ = scratch.take(blocks_ * block * H);
    bias_ = scratch.take(blocks_ * block);
    pack(p_.w_x, n_.inputs, GATES * H, false, layout_, x_);
    if (BEFORE) {  // r and z, then n, each packed by itself
      const Layout gate{H, 1, 1};
      h_n_ = scratch.take(gate.blocks() * LANES * H);
      pack(p_.w_h + 2 * H, H, GATES * H, false, gate, h_n_);
      pack(p_.w_h, H, GATES * H, false, Layout{H, 2, 2}, h_);
    } else {
      pack(p_.w_h, H, GATES * H, false, layout_, h_);
    }
    if (p_.b) pack(p_.b, 1, GATES * H, false, layout_, bias_);
    else std::memset(bias_, 0, blocks_ * block * sizeof(float));
    b_hn_ = scratch.take(width_);
    std::memset(b_hn_, 0, width_ * sizeof(float));
    if (p_.b_hn) std::memcpy(b_hn_, p_.b_hn, H * sizeof(float));
    for (auto& state : state_) state = scratch.take(B * width_);
    c_ = LSTM ? scratch.take(B * width_) : nullptr;
    z_ = BEFORE ? scratch.take(B * width_) : nullptr;
    n_u_ = BEFORE ? scratch.take(B * width_) : nullptr;
    for (long r = 0; r < B; ++r) {
      copy_row(state_[0] + r * width_, p_.h + r * H);
      if (LSTM) copy_row(c_ + r * width_, p_.c + r * H);
    }
    reset_ = BEFORE ? scratch.take(B * width_) : nullptr;
    if (BEFORE) std::memset(reset_, 0, B * width_ * sizeof(float));
    std::memset(state_[1], 0, B * width_ * sizeof(float));

    Barrier barrier(team_.threads);
    in_team(team_, [&](int k, int parts) {
      const bool by_rows = team_.by_rows || parts == 1;
      const Range rows = by_rows ? share(B, parts, k) : Range{0, B};
      const Range blocks = by_rows ? Range{0, blocks_} : share(blocks_, parts, k);
      for (long step = 0; step < n_.steps; ++step) {
        const long t = reverse_ ? n_.steps - 1 - step : step;
        const float* from = state_[step & 1];
        float* to = state_[(step & 1) ^ 1];
        for (long j = blocks.begin; j < blocks.end; ++j)
          tiles(rows, [&](auto count, long r) { first<decltype(count)::value>(t, j, r, from, to); });
        if (!by_rows) barrier.wait();
        if constexpr (BEFORE) {
          for (long j = blocks.begin; j < blocks.end; ++j)
            tiles(rows, [&](auto count, long r) { second<decltype(count)::value>(t, j, r, from, to); });
          if (!by_rows) barrier.wait();
        }
      }
    });
    const float* last = state_[n_.steps & 1];
    for (long r = 0; r < B; ++r) {
      std::memcpy(p_.last_h + r * H, last + r * width_, H * sizeof(float));
      if (LSTM) std::memcpy(p_.last_c + r * H, c_ + r * width_, H * sizeof(float));
    }
  }

  void copy_row(float* to, const float* from) const {
    std::memcpy(to, from, n_.units * sizeof(float));
    std::memset(to + n_.units, 0, (width_ - n_.units) * sizeof(float));
  }

  bool valid(long t, long r) const { return !p_.valid || p_.valid[t * n_.rows + r]; }
  bool start(long t, long r) const { return p_.start && p_.start[t * n_.rows + r]; }
  const float* before(const float* state, long t, long r) const {
    return start(t, r) ? p_.fresh_h + r * n_.units : state + r * width_;
  }

  // The products of a step, and the gates; of a GRU that resets before the product, r and z only.
  template <int R>
  void first(long t, long j, long row, const float* from, float* to) {
    const long H = n_.units, B = n_.rows, block = V * LANES;
    const float *x[R], *s[R];
    Vec a[R][V];
    for (int r = 0; r < R; ++r) {
      x[r] = p_.xs + (t * B + row + r) * n_.inputs;
      s[r] = before(from, t, row + r);
      for (int v = 0; v < V; ++v) a[r][v] = load(bias_ + j * block + v * LANES);
    }
    multiply<R, V>(x, n_.inputs, x_ + j * block * n_.inputs, a);
    Vec rest[R];
    if constexpr (BEFORE) {
      Vec rz[R][2];
      for (int r = 0; r < R; ++r) rz[r][0] = a[r][0], rz[r][1] = a[r][1], rest[r] = a[r][2];
      multiply<R, 2>(s, H, h_ + j * 2 * LANES * H, rz);
      for (int r = 0; r < R; ++r) a[r][0] = rz[r][0], a[r][1] = rz[r][1];
    } else {
      if constexpr (K == Kind::kGru)
        for (int r = 0; r < R; ++r) rest[r] = a[r][2], a[r][2] = load(b_hn_ + j * LANES);
      multiply<R, V>(s, H, h_ + j * block * H, a);
    }
    for (int r = 0; r < R; ++r) {
      const long b = row + r, at = t * B + b;
      for (int v = 0; v < (GATES == 1 ? V : 1); ++v) {
        const long unit = layout_.unit(j, v), n = layout_.lanes(j, v);
        if (n == 0) continue;
        const bool live = valid(t, b);
        const Vec h = load(s[r] + unit, n);
        float* kept = p_.kept ? p_.kept + at * KEPT * H + unit : nullptr;
        if (p_.s) store(p_.s + at * H + unit, h, n);
        if (!live) {
          store(p_.ys + at * H + unit, Vec{}, n);
          store(to + b * width_ + unit, load(from + b * width_ + unit));
          if (kept)
            for (int k = 0; k < KEPT; ++k) store(kept + k * H, Vec{}, n);
          if (LSTM && p_.c_before) store(p_.c_before + at * H + unit, Vec{}, n);
          continue;
        }
        Vec y;
        if constexpr (LSTM) {
          const Vec c = start(t, b) ? load(p_.fresh_c + b * H + unit, n) : load(c_ + b * width_ + unit);
          const Vec i = logistic(a[r][0]), f = logistic(a[r][1]), g = tangent(a[r][2]), o = logistic(a[r][3]);
          const Vec after = f * c + i * g;
          y = o * tangent(after);
          store(c_ + b * width_ + unit, after);
          if (p_.c_before) store(p_.c_before + at * H + unit, c, n);
          if (kept) keep(kept, n, {i, f, g, o});
        } else if constexpr (K == Kind::kGru) {
          const Vec reset = logistic(a[r][0]), z = logistic(a[r][1]), q = a[r][2];
          const Vec candidate = tangent(rest[r] + reset * q);
          y = (1.0f - z) * candidate + z * h;
          if (kept) keep(kept, n, {reset, z, candidate, q});
        } else if constexpr (BEFORE) {
          const Vec reset = logistic(a[r][0]), z = logistic(a[r][1]);
          store(reset_ + b * width_ + unit, reset * h, n);
          store(z_ + b * width_ + unit, z);
          store(n_u_ + b * width_ + unit, rest[r]);
          if (kept) keep(kept, n, {reset, z});
          continue;
        } else {
          y = Cell<K>::activate(a[r][v]);
          if (kept) store(kept, y, n);
        }
        store(p_.ys + at * H + unit, y, n);
        store(to + b * width_ + unit, y, n);
      }
    }
  }

  void keep(float* kept, long n, std::initializer_list<Vec> gates) const {
    long k = 0;
    for (Vec gate : gates) store(kept + n_.units * k++, gate, n);
  }

  // n = tanh(u_n + (r h) w_hn), and the new state.
  template <int R>
  void second(long t, long j, long row, const float* from, float* to) {
    const long H = n_.units, B = n_.rows, unit = layout_.unit(j, 0), n = layout_.lanes(j, 0);
    const float* a[R];
    Vec sums[R][1];
    for (int r = 0; r < R; ++r) {
      a[r] = reset_ + (row + r) * width_;
      sums[r][0] = load(n_u_ + (row + r) * width_ + unit);
    }
    multiply<R, 1>(a, H, h_n_ + j * LANES * H, sums);
    for (int r = 0; r < R; ++r) {
      const long b = row + r, at = t * B + b;
      if (!valid(t, b)) continue;
      const Vec z = load(z_ + b * width_ + unit), h = load(before(from, t, b) + unit, n);
      const Vec candidate = tangent(sums[r][0]);
      const Vec y = (1.0f - z) * candidate + z * h;
      if (p_.kept) store(p_.kept + at * KEPT * H + 2 * H + unit, candidate, n);
      store(p_.ys + at * H + unit, y, n);
      store(to + b * width_ + unit, y, n);
    }
  }

  const Sizes n_;
  const Forward p_;
  const bool reverse_;
  const Layout layout_;
  const long blocks_, width_;
  const Team team_;
  float *x_, *h_, *h_n_ = nullptr, *bias_, *b_hn_, *state_[2], *c_, *z_, *n_u_, *reset_;
};

template <Kind K>
class BackwardRun {
 public:
  static constexpr int KEPT = Cell<K>::KEPT;
  static constexpr long GATES = K == Kind::kLstm ? 4 : K >= Kind::kGru ? 3 : 1;
  static constexpr bool LSTM = K == Kind::kLstm, BEFORE = K == Kind::kGruBefore, AFTER = K == Kind::kGru;
  static constexpr int V = 4;

  static void run(const Sizes& n, bool reverse, const Backward& p, int threads) {
    BackwardRun(n, reverse, p, threads).go();
  }

 private:
  BackwardRun(const Sizes& n, bool reverse, const Backward& p, int threads)
      : n_(n), p_(p), reverse_(reverse), layout_{n.units, 1, V}, blocks_(layout_.blocks()),
        width_(blocks_ * layout_.units()), team_(team(n, GATES * n.units * n.units, blocks_, threads)) {}

  void go() {
    const long B = n_.rows, H = n_.units, block = V * LANES, G = GATES * H;
    Scratch scratch(blocks_ * block * G + 3 * B * width_ + 256);
    // Of a GRU that resets before the product, the columns of r and z, and then those of n.
    w_ = scratch.take(blocks_ * block * G);
    if (BEFORE) {
      pack(p_.w_h, 2 * H, G, true, layout_, w_);
      pack(p_.w_h + 2 * H, H, G, true, layout_, w_ + blocks_ * block * 2 * H);
    } else {
      pack(p_.w_h, G, G, true, layout_, w_);
    }
    d_h_ = scratch.take(B * width_);
    d_c_ = LSTM ? scratch.take(B * width_) : nullptr;
    through_ = scratch.take(B * width_);
    for (long r = 0; r < B; ++r) {
      row_in(d_h_ + r * width_, p_.d_last_h + r * H);
      if (LSTM) row_in(d_c_ + r * width_, p_.d_last_c + r * H);
      std::memset(p_.d_fresh_h + r * H, 0, H * sizeof(float));
      if (LSTM) std::memset(p_.d_fresh_c + r * H, 0, H * sizeof(float));
    }
    Barrier barrier(team_.threads);
    in_team(team_, [&](int k, int parts) {
      const bool by_rows = team_.by_rows || parts == 1;
      const Range rows = by_rows ? share(B, parts, k) : Range{0, B};
      const Range blocks = by_rows ? Range{0, blocks_} : share(blocks_, parts, k);
      auto each_tile = [&](const auto& f) {
        for (long j = blocks.begin; j < blocks.end; ++j) tiles(rows, [&](auto count, long r) { f(count, j, r); });
        if (!by_rows) barrier.wait();
      };
      for (long step = 0; step < n_.steps; ++step) {
        const long t = reverse_ ? step : n_.steps - 1 - step;
        for (long b = rows.begin; b < rows.end; ++b) gates(t, b, blocks);
        if (!by_rows) barrier.wait();
        if constexpr (BEFORE) each_tile([&](auto count, long j, long r) { reset<decltype(count)::value>(t, j, r); });
        each_tile([&](auto count, long j, long r) { carry<decltype(count)::value>(t, j, r); });
      }
    });
    for (long r = 0; r < B; ++r) {
      std::memcpy(p_.d_h + r * H, d_h_ + r * width_, H * sizeof(float));
      if (LSTM) std::memcpy(p_.d_c + r * H, d_c_ + r * width_, H * sizeof(float));
    }
  }

  void row_in(float* to, const float* from) const {
    std::memcpy(to, from, n_.units * sizeof(float));
    std::memset(to + n_.units, 0, (width_ - n_.units) * sizeof(float));
  }

  bool valid(long t, long b) const { return !p_.valid || p_.valid[t * n_.rows + b]; }
  bool start(long t, long b) const { return p_.start && p_.start[t * n_.rows + b]; }

  // What does not need a product: the cotangents of the gates' sums, and of what of the carry goes straight through.
  void gates(long t, long b, Range blocks) {
    const long H = n_.units, at = t * n_.rows + b;
    for (long unit = blocks.begin * layout_.units(); unit < blocks.end * layout_.units() && unit < H; unit += LANES) {
      const long n = H - unit < LANES ? H - unit : LANES;
      float *d_u = p_.d_u + at * GATES * H + unit, *through = through_ + b * width_ + unit;
      const float* kept = p_.kept + at * KEPT * H + unit;
      if (!valid(t, b)) {
        for (long k = 0; k < GATES; ++k) store(d_u + k * H, Vec{}, n);
        if constexpr (AFTER)
          for (long k = 0; k < GATES; ++k) store(p_.d_v + (at * GATES + k) * H + unit, Vec{}, n);
        continue;
      }
      const Vec d_y = load(d_h_ + b * width_ + unit) + load(p_.d_ys + at * H + unit, n);
      if constexpr (LSTM) {
        const Vec i = load(kept, n), f = load(kept + H, n), g = load(kept + 2 * H, n), o = load(kept + 3 * H, n);
        const Vec c = load(p_.c_before + at * H + unit, n), squashed = tangent(f * c + i * g);
        const Vec d_c = load(d_c_ + b * width_ + unit) + d_y * o * (1.0f - squashed * squashed);
        store(d_u, d_c * g * i * (1.0f - i), n);
        store(d_u + H, d_c * c * f * (1.0f - f), n);
        store(d_u + 2 * H, d_c * i * (1.0f - g * g), n);
        store(d_u + 3 * H, d_y * squashed * o * (1.0f - o), n);
        const Vec d_before = d_c * f;
        if (start(t, b)) {
          store(p_.d_fresh_c + b * H + unit, load(p_.d_fresh_c + b * H + unit, n) + d_before, n);
          store(d_c_ + b * width_ + unit, Vec{});
        } else {
          store(d_c_ + b * width_ + unit, d_before);
        }
        store(through, Vec{});
      } else if constexpr (K >= Kind::kGru) {
        const Vec r = load(kept, n), z = load(kept + H, n), candidate = load(kept + 2 * H, n);
        const Vec h = load(p_.s + at * H + unit, n);
        const Vec d_n = d_y * (1.0f - z) * (1.0f - candidate * candidate);
        const Vec d_z = d_y * (h - candidate) * z * (1.0f - z);
        store(d_u + H, d_z, n);
        store(d_u + 2 * H, d_n, n);
        store(through, d_y * z);
        if constexpr (AFTER) {
          const Vec q = load(kept + 3 * H, n), d_r = d_n * q * r * (1.0f - r);
          float* d_v = p_.d_v + at * GATES * H + unit;
          store(d_u, d_r, n);
          store(d_v, d_r, n);
          store(d_v + H, d_z, n);
          store(d_v + 2 * H, d_n * r, n);
        }
      } else {
        const Vec y = load(kept, n);
        store(d_u, K == Kind::kElmanTanh ? d_y * (1.0f - y * y) : y > 0.0f ? d_y : Vec{}, n);
        store(through, Vec{});
      }
    }
  }

  // Of a GRU that resets before the product: the cotangent of r h, and of r.
  template <int R>
  void reset(long t, long j, long row) {
    const long H = n_.units, B = n_.rows, G = GATES * H;
    const float* a[R];
    Vec sums[R][V] = {};
    for (int r = 0; r < R; ++r) a[r] = p_.d_u + (t * B + row + r) * G + 2 * H;
    multiply<R, V>(a, H, w_ + blocks_ * V * LANES * 2 * H + j * V * LANES * H, sums);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const long b = row + r, at = t * B + b, unit = layout_.unit(j, v), n = layout_.lanes(j, v);
        if (n == 0 || !valid(t, b)) continue;
        const Vec gate = load(p_.kept + at * KEPT * H + unit, n), h = load(p_.s + at * H + unit, n);
        store(p_.d_u + at * G + unit, sums[r][v] * h * gate * (1.0f - gate), n);
        float* through = through_ + b * width_ + unit;
        store(through, load(through) + sums[r][v] * gate);
      }
  }

  // The cotangent of the carry before the step.
  template <int R>
  void carry(long t, long j, long row) {
    const long H = n_.units, B = n_.rows, G = GATES * H, length = BEFORE ? 2 * H : G;
    const float* a[R];
    Vec sums[R][V] = {};
    for (int r = 0; r < R; ++r) a[r] = (AFTER ? p_.d_v : p_.d_u) + (t * B + row + r) * G;
    multiply<R, V>(a, length, w_ + j * V * LANES * length, sums);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const long b = row + r, unit = layout_.unit(j, v), n = layout_.lanes(j, v);
        if (n == 0 || !valid(t, b)) continue;
        float* d_h = d_h_ + b * width_ + unit;
        const Vec d_before = sums[r][v] + load(through_ + b * width_ + unit);
        if (start(t, b)) {
          store(p_.d_fresh_h + b * H + unit, load(p_.d_fresh_h + b * H + unit, n) + d_before, n);
          store(d_h, Vec{});
        } else {
          store(d_h, d_before);
        }
      }
  }

  const Sizes n_;
  const Backward p_;
  const bool reverse_;
  const Layout layout_;
  const long blocks_, width_;
  const Team team_;
  float *w_, *d_h_, *d_c_, *through_;
};

template <template <Kind> class Run, class Arguments>
inline void dispatch(Kind kind, const Sizes& n, bool reverse, const Arguments& p, int threads) {
  switch (kind) {
    case Kind::kElmanTanh: return Run<Kind::kElmanTanh>::run(n, reverse, p, threads);
    case Kind::kElmanRelu: return Run<Kind::kElmanRelu>::run(n, reverse, p, threads);
    case Kind::kLstm: return Run<Kind::kLstm>::run(n, reverse, p, threads);
    case Kind::kGru: return Run<Kind::kGru>::run(n, reverse, p, threads);
    case Kind::kGruBefore: return Run<Kind::kGruBefore>::run(n, reverse, p, threads);
  }
}

inline Kernels table(const char* name) { return {dispatch<ForwardRun, Forward>, dispatch<BackwardRun, Backward>, name}; }
