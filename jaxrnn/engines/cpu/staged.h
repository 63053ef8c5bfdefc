// What both passes of gated recurrences with options share.

constexpr Real EPSILON = static_cast<Real>(1e-5);  // of every norm

// work(rows) for parts whose numbers stay in the first caches from one stage to the next; for all of them where threads
// wait for each other between stages.
template <class Work>
JAXRNN_INLINE void in_groups(const Worker& w, Range rows, const Work& work) {
  if (!w.by_rows) return work(rows);
  in_parts(rows, 24, [&](long count, long first) { work(Range{first, first + count}); });
}

// What both passes know of a family: how its vectors lie, and where its threads work.
template <class F>
class Staged {
 protected:
  static constexpr bool LSTM = std::is_same_v<F, Lstm<false>> || std::is_same_v<F, Lstm<true>>;
  static constexpr bool BEFORE = F::FIRST == F::GATES - 1 && F::FIRST > 0;  // a reset gate, then a second product
  static constexpr bool APART = F::SUMS > F::GATES;  // the last gate reads its products with x and h by themselves
  static constexpr int GROUPS = F::GATES == 1 ? 4 : 1;  // vectors of units of a block
  static constexpr int V = GROUPS * F::GATES, VF = GROUPS * F::FIRST;  // vectors of a block
  static constexpr int E = F::STATES - 1;
  static constexpr bool NORM = LSTM || (BEFORE && F::GATES == 3) || APART;  // what may have a norm

  Staged(const StagedInputs& p, int threads)
      : in_(p), n_(p.n), rule_(p.rule), S_(p.outputs), H_(p.n.units), B_(p.n.rows), layout_{H_, F::GATES, V},
        out_{S_, 1, 4}, blocks_(layout_.blocks()), width_(blocks_ * layout_.units()),
        s_width_(out_.blocks() * out_.units()),
        team_(team(n_, (F::FIRST * S_ + (BEFORE ? H_ : projected() ? S_ : 0)) * H_ + H_, blocks_, threads)) {}

  const StagedInputs& in_;
  const Sizes& n_;
  const Rule& rule_;
  const long S_, H_, B_;
  const Layout layout_, out_;  // of the sums; of the units of h
  const long blocks_, width_, s_width_;
  const Team team_;

  bool norm() const { return NORM && rule_.norm; }
  bool projected() const { return LSTM && rule_.projected; }
  long time(long k) const { return n_.time(k); }
  bool valid(long at) const { return !in_.valid || in_.valid[at]; }
  bool starts(long k, long row) const {
    return in_.start && k < n_.steps && in_.start[n_.at(time(k), row)];
  }
  static void wait(const Worker& w) {
    if (!w.by_rows) w.barrier.wait();
  }

  // Rows of w_h that the units of a block read: those of their heads.
  Range heads(long first, long units) const {
    const long size = H_ / rule_.heads, last = std::min(first + units, H_) - 1;
    return rule_.heads == 1 ? Range{0, S_} : Range{first / size * size, (last / size + 1) * size};
  }

  // Where θ lies, padded.
  void pad_theta(Real* to) const {
    for (long k = 0; k < rule_.theta(); ++k) {
      std::memcpy(to + k * width_, in_.theta + k * H_, H_ * sizeof(Real));
      std::memset(to + k * width_ + H_, 0, (width_ - H_) * sizeof(Real));
    }
  }
  long gain_x() const { return rule_.own_theta(); }  // θ's rows of a norm
  long gain_h() const { return gain_x() + F::GATES; }
  long shift() const { return gain_h() + F::GATES; }
  long gain_c() const { return shift() + F::GATES; }

  // The units of some rows at step k, row by row, in batches of vectors: work(batch), whose entries say where they are;
  // of_row(entry) adds what else is known of a row.
  template <bool BACK, class OfRow, class Work>
  JAXRNN_INLINE void batches(long k, Range rows, Range blocks, const Real* theta, const OfRow& of_row,
                             const Work& work) const {
    const long first = blocks.begin * layout_.units(), last = std::min(blocks.end * layout_.units(), H_);
    if (first >= last || rows.size() == 0) return;
    Batch<F, BACK> b(rule_, theta, width_);
    Entry entry{};
    auto begin = [&](long row) {
      const long at = n_.at(time(k), row);
      entry = {row, at, first, LANES, valid(at), nullptr, nullptr};
      of_row(entry);
    };
    for (begin(rows.begin); entry.row < rows.end;) {
      for (b.n = 0; b.n < AT_ONCE && entry.row < rows.end;) {
        entry.n = std::min(LANES, last - entry.unit);
        b.entries[b.n++] = entry;
        if ((entry.unit += LANES) < last) continue;
        if (++entry.row < rows.end) begin(entry.row);
      }
      work(b);
    }
  }

  // Where the vectors of some units are in a row of all blocks; their block, and their place in it.
  static long in_row(long unit) { return unit * F::GATES; }
  static long block_of(long unit) { return unit / (GROUPS * LANES); }
  static long in_block(long unit) { return unit % (GROUPS * LANES) * F::GATES; }

  static Int first_lanes(long n) {
    Int lane;
    for (long l = 0; l < LANES; ++l) lane[l] = static_cast<Whole>(l);
    return lane < static_cast<Whole>(n);
  }

  // How much of an entry stays: 1 or 0 by flags, or the expectation.
  Vec stays(const uint8_t* flags, long at, Real rate, long n) const {
    if (!flags) return splat(rate);
    if (n >= LANES) return of_bytes(flags + at);
    uint8_t bytes[LANES] = {};
    std::memcpy(bytes, flags + at, n);
    return of_bytes(bytes);
  }
  Vec h_stays(long at, long unit, long n) const { return stays(in_.stay_h, at * S_ + unit, rule_.stay[0], n); }
  Vec rest_stays(long at, int e, long unit, long n) const {
    return stays(in_.stay_rest, (at * E + e) * H_ + unit, rule_.stay[e + 1], n);
  }
};
