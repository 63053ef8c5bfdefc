// Diagonal recurrences that are read by a sum over their states, so that no state of a step has to be in memory.
//
//     selective   h' = exp(Δ λ) h + Δ x B,  y = Σ C h'            x, Δ = softplus(step) of each channel; B, C of each state
//     fixed       h' = ā h + b̄ x,  y = 2 Re Σ c h'                complex, the same at every step
//
// Channels do not touch each other: a lane is a channel, and a line of cache is a block of them. Forward, a block walks
// over time with its states. Backward, it takes the steps of a chunk for one state after another: from the state that
// was kept it computes what it needs, and then walks back. Cotangents of B and C are sums over channels, which are
// added lane by lane, and across lanes once for many blocks.

constexpr long LINE = 16, Z = LINE / LANES;  // channels of a block, and its vectors

// 2^x for x ≤ 0; the least normal number where it is below that. In float32 of a relative error of 1e-7.
JAXRNN_INLINE Vec power_of_two(Vec x) {
  constexpr Real LEAST = 1 - BIAS;
  x = x < LEAST ? splat(LEAST) : x;
  const Vec shifted = x + NEAREST, r = x - (shifted - NEAREST);  // the integer is in the lowest bits
  Vec p;
  if constexpr (DOUBLE) {
    p = small_exponential_less_one(r * LN_2) + 1.0f;
  } else {
    p = splat(1.326472690e-3f);
    p = p * r + 9.671512661e-3f;
    p = p * r + 5.550733744e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
  }
  return (Vec)((Int)p + ((Int)shifted << FRACTION));
}

// Some channels of one row.
struct Lane {
  const DiagonalProblem& p;
  long row, channel;
  long count(long z) const { return std::max(0l, std::min(LANES, p.channels - channel - z * LANES)); }
  long time(long n) const { return p.reverse ? p.steps - 1 - n : n; }
  long place(long t) const { return t * p.rows + row; }
  bool valid(long t) const { return !p.valid || p.valid[place(t)]; }
  bool starts(long t) const { return p.start && p.start[place(t)]; }
  long at(long t) const { return place(t) * p.channels + channel; }
  // Of arrays of each row, and of each member.
  long state(long n) const { return (row * p.states + n) * p.channels + channel; }
  long weight(long n) const { return (row / (p.rows / p.members) * p.states + n) * p.channels + channel; }
  void read(Vec* to, const Real* from) const {
    for (long z = 0; z < Z; ++z) to[z] = load(from + z * LANES, count(z));
  }
  void write(Real* to, const Vec* from) const {
    for (long z = 0; z < Z; ++z) store(to + z * LANES, from[z], count(z));
  }
  // States of the block, one or all; those of an array that is absent are 0.
  void read_state(Vec* to, const Real* from, long n) const {
    if (from) return read(to, from + state(n));
    for (long z = 0; z < Z; ++z) to[z] = Vec{};
  }
  void read_states(Vec* to, const Real* from) const {
    for (long n = 0; n < p.states; ++n) read_state(to + n * Z, from, n);
  }
  void write_states(Real* to, const Vec* from) const {
    for (long n = 0; n < p.states; ++n) write(to + state(n), from + n * Z);
  }
  void read_weights(Vec* to, const Real* from, Real factor) const {
    for (long n = 0; n < p.states; ++n, to += Z) {
      read(to, from + weight(n));
      for (long z = 0; z < Z; ++z) to[z] *= factor;
    }
  }
};

// What a step reads of its channels: x, and of a selective recurrence Δ.
struct Inputs {
  Vec x[Z], step[Z];
  JAXRNN_INLINE Inputs(const Lane& lane, long t) {
    lane.read(x, lane.p.x + lane.at(t));
    if (!lane.p.step) return;
    lane.read(step, lane.p.step + lane.at(t));
    for (long z = 0; z < Z; ++z) step[z] = Softplus(step[z]).y;
  }
};

// The walk over time of one block, where step(t, inputs, h, y) does what a step does. Its inputs are computed one step
// ahead, since they need not wait for the states.
template <class Step>
JAXRNN_INLINE void diagonal_walk(const Lane& lane, Vec* h, const Step& step) {
  const DiagonalProblem& p = lane.p;
  constexpr long AHEAD = 4;  // steps: what comes lies on other pages, where no processor looks by itself
  lane.read_states(h, p.h);
  if (!p.steps) return lane.write_states(p.last, h);
  Inputs next(lane, lane.time(0));
  for (long k = 0; k < p.steps; ++k) {
    const long t = lane.time(k);
    const Inputs inputs = next;
    next = Inputs(lane, lane.time(std::min(k + 1, p.steps - 1)));
    if (p.kept && k % p.chunk == 0) lane.write_states(p.kept + k / p.chunk * p.rows * p.states * p.channels, h);
    if (k + AHEAD < p.steps) {
      const long next = lane.at(lane.time(k + AHEAD));
      __builtin_prefetch(p.x + next);
      if (p.step) __builtin_prefetch(p.step + next);
      __builtin_prefetch(p.ys + next, 1);
    }
    Vec y[Z] = {};
    if (lane.valid(t)) {
      if (lane.starts(t)) lane.read_states(h, p.fresh);
      step(t, inputs, h, y);
    }
    lane.write(p.ys + lane.at(t), y);
  }
  lane.write_states(p.last, h);
}

inline void selective_forward(const Lane& lane, Vec* memory) {
  const DiagonalProblem& p = lane.p;
  const long N = p.states;
  Vec *h = memory, *decay = h + N * Z;
  lane.read_weights(decay, p.a, LOG2_E);
  diagonal_walk(lane, h, [&](long t, const Inputs& in, Vec* h, Vec* y) {
    const Real *b = p.b + lane.place(t) * N, *c = p.c + lane.place(t) * N;
    for (long n = 0; n < N; ++n)
      for (long z = 0; z < Z; ++z) {
        Vec& s = h[n * Z + z];
        s = power_of_two(in.step[z] * decay[n * Z + z]) * s + b[n] * (in.step[z] * in.x[z]);
        y[z] += c[n] * s;
      }
  });
}

inline void fixed_forward(const Lane& lane, Vec* memory) {
  const DiagonalProblem& p = lane.p;
  const long N = p.states * Z, I = N / 2;  // where imaginary parts begin
  Vec *h = memory, *a = h + N, *b = a + N, *c = b + N;
  lane.read_weights(a, p.a, 1);
  lane.read_weights(b, p.b, 1);
  lane.read_weights(c, p.c, 2);
  diagonal_walk(lane, h, [&](long, const Inputs& in, Vec* h, Vec* y) {
    for (long n = 0; n < I; n += Z)
      for (long z = 0; z < Z; ++z) {
        const long k = n + z;
        const Vec re = h[k], im = h[I + k];
        h[k] = a[k] * re - a[I + k] * im + b[k] * in.x[z];
        h[I + k] = a[k] * im + a[I + k] * re + b[I + k] * in.x[z];
        y[z] += c[k] * h[k] - c[I + k] * h[I + k];
      }
  });
}

// The valid steps of a chunk in the order in which they are processed, and which of them start.
struct Steps {
  long* times;
  uint8_t* starts;
  long count = 0;
  void take(const Lane& lane, long begin, long end) {
    count = 0;
    for (long k = begin; k < end; ++k)
      if (const long t = lane.time(k); lane.valid(t)) times[count] = t, starts[count++] = lane.starts(t);
  }
};

// What the backward pass of a block holds for every step of a chunk.
struct Chunk {
  Vec *step, *slope, *u, *d_y, *d_step, *d_u;
};

// M states of a block, from the n-th on, over a chunk; `power` and `decayed` are M vectors of a block for each step.
template <long M>
JAXRNN_INLINE void selective_states(const Lane& lane, const DiagonalGradient& g, const Steps& steps, const Chunk& chunk,
                                    long n, const Real* kept, const Vec* decay, Vec* d_h, Vec* d_decay, Vec* power,
                                    Vec* decayed, Vec* d_b, Vec* d_c) {
  const DiagonalProblem& p = lane.p;
  const long N = p.states;
  Vec d[M][Z], d_rate[M][Z] = {};
  for (long m = 0; m < M; ++m) {
    Vec h[Z], own[Z];
    lane.read(h, kept + lane.state(n + m));
    for (long z = 0; z < Z; ++z) own[z] = decay[m * Z + z];
    for (long j = 0; j < steps.count; ++j) {
      const Real b = p.b[lane.place(steps.times[j]) * N + n + m];
      if (steps.starts[j]) lane.read_state(h, p.fresh, n + m);
      for (long z = 0; z < Z; ++z) {
        const Vec e = power_of_two(chunk.step[j * Z + z] * own[z]), s = e * h[z];
        power[(j * M + m) * Z + z] = e;
        decayed[(j * M + m) * Z + z] = s;
        h[z] = s + b * chunk.u[j * Z + z];
      }
    }
  }
  for (long m = 0; m < M; ++m)
    for (long z = 0; z < Z; ++z) d[m][z] = d_h[m * Z + z];
  for (long j = steps.count - 1; j >= 0; --j) {
    const Real *b = p.b + lane.place(steps.times[j]) * N + n, *c = p.c + lane.place(steps.times[j]) * N + n;
    Vec sum_b[M] = {}, sum_c[M] = {};
    for (long z = 0; z < Z; ++z) {
      const Vec step = chunk.step[j * Z + z], u = chunk.u[j * Z + z], d_y = chunk.d_y[j * Z + z];
      Vec d_step = chunk.d_step[j * Z + z], d_u = chunk.d_u[j * Z + z];
      for (long m = 0; m < M; ++m) {
        const Vec s = decayed[(j * M + m) * Z + z];
        Vec now = d[m][z] + c[m] * d_y;
        sum_c[m] += d_y * (s + b[m] * u);
        sum_b[m] += now * u;
        d_u += now * b[m];
        const Vec rate = now * s;
        d_step += rate * decay[m * Z + z];
        d_rate[m][z] += rate * step;
        d[m][z] = now * power[(j * M + m) * Z + z];
      }
      chunk.d_step[j * Z + z] = d_step;
      chunk.d_u[j * Z + z] = d_u;
    }
    for (long m = 0; m < M; ++m) d_b[j * N + m] += sum_b[m], d_c[j * N + m] += sum_c[m];
    if (steps.starts[j])
      for (long m = 0; m < M; ++m) {
        Vec old[Z];
        if (g.d_fresh) {
          lane.read(old, g.d_fresh + lane.state(n + m));
          for (long z = 0; z < Z; ++z) old[z] += d[m][z];
          lane.write(g.d_fresh + lane.state(n + m), old);
        }
        for (long z = 0; z < Z; ++z) d[m][z] = Vec{};
      }
  }
  for (long m = 0; m < M; ++m)
    for (long z = 0; z < Z; ++z) d_h[m * Z + z] = d[m][z], d_decay[m * Z + z] += d_rate[m][z];
}

constexpr long AT_ONCE = JAXRNN_WIDTH == 64 ? 4 : JAXRNN_WIDTH == 32 ? 2 : 1;  // states

// Σ over lanes of each of N vectors.
JAXRNN_INLINE void across(Vec* from, Real* to, long N) {
  long n = 0;
  for (; n + LANES <= N; n += LANES) store(to + n, sums_of(from + n));
  for (; n < N; ++n) to[n] = sum_of(from[n]);
}

inline long selective_floats(const DiagonalProblem& p, long blocks) {
  const long L = std::min(p.chunk, p.steps);
  return LANES * (3 * blocks * p.states * Z + 6 * L * Z + 2 * L * AT_ONCE * Z + 2 * L * p.states) + 4 * L + 16;
}

// The blocks of channels that begin at `channel`, whose cotangents of B and C are the sums number `group`.
inline void selective_backward(const DiagonalProblem& p, const DiagonalGradient& g, long row, long channel, long blocks,
                               long group, Vec* memory) {
  const long N = p.states, L = std::min(p.chunk, p.steps);
  auto take = [&](long count) { return std::exchange(memory, memory + count); };
  Vec *d_h = take(blocks * N * Z), *d_decay = take(blocks * N * Z), *decay = take(blocks * N * Z);
  const Chunk chunk{take(L * Z), take(L * Z), take(L * Z), take(L * Z), take(L * Z), take(L * Z)};
  Vec *power = take(L * AT_ONCE * Z), *decayed = take(L * AT_ONCE * Z), *d_b = take(L * N), *d_c = take(L * N);
  Steps steps{reinterpret_cast<long*>(memory), reinterpret_cast<uint8_t*>(reinterpret_cast<long*>(memory) + L)};
  for (long k = 0; k < blocks; ++k) {
    const Lane lane{p, row, channel + k * LINE};
    lane.read_states(d_h + k * N * Z, g.d_last);
    lane.read_weights(decay + k * N * Z, p.a, LOG2_E);
    if (g.d_fresh) {
      lane.read_states(d_decay + k * N * Z, nullptr);
      lane.write_states(g.d_fresh, d_decay + k * N * Z);
    }
  }
  std::fill(d_decay, d_decay + blocks * N * Z, Vec{});
  for (long begin = (p.steps - 1) / p.chunk * p.chunk; begin >= 0; begin -= p.chunk) {
    const long end = std::min(begin + p.chunk, p.steps);
    const Real* kept = p.kept + begin / p.chunk * p.rows * N * p.channels;
    steps.take(Lane{p, row, channel}, begin, end);
    std::fill(d_b, d_b + steps.count * N, Vec{});
    std::fill(d_c, d_c + steps.count * N, Vec{});
    for (long k = 0; k < blocks; ++k) {
      const Lane lane{p, row, channel + k * LINE};
      Vec x[Z];
      for (long j = 0; j < steps.count; ++j) {
        const long at = lane.at(steps.times[j]);
        lane.read(chunk.step + j * Z, p.step + at);
        lane.read(chunk.d_y + j * Z, g.d_ys + at);
        lane.read(x, p.x + at);
        for (const Real* next : {p.x, p.step, g.d_ys}) __builtin_prefetch(next + at + LINE);  // of the next block
        for (Real* next : {g.d_x, g.d_step})
          if (next) __builtin_prefetch(next + at + LINE, 1);
        for (long z = 0; z < Z; ++z) {
          const Softplus step(chunk.step[j * Z + z]);
          chunk.step[j * Z + z] = step.y;
          chunk.slope[j * Z + z] = step.slope;
          chunk.u[j * Z + z] = step.y * x[z];
          chunk.d_step[j * Z + z] = chunk.d_u[j * Z + z] = Vec{};
        }
      }
      auto states = [&](auto many, long n) {
        const long own = (k * N + n) * Z;
        selective_states<decltype(many)::value>(lane, g, steps, chunk, n, kept, decay + own, d_h + own, d_decay + own,
                                                power, decayed, d_b + n, d_c + n);
      };
      long n = 0;
      for (; n + AT_ONCE <= N; n += AT_ONCE) states(std::integral_constant<long, AT_ONCE>{}, n);
      for (; n < N; ++n) states(std::integral_constant<long, 1>{}, n);
      if (p.valid)
        for (long j = begin; j < end; ++j)
          if (const long t = lane.time(j); !lane.valid(t)) {
            const Vec none[Z] = {};
            if (g.d_x) lane.write(g.d_x + lane.at(t), none);
            lane.write(g.d_step + lane.at(t), none);
          }
      for (long j = 0; j < steps.count; ++j) {
        const long at = lane.at(steps.times[j]);
        Vec d_x[Z], d_step[Z];
        lane.read(x, p.x + at);
        for (long z = 0; z < Z; ++z) {
          d_x[z] = chunk.d_u[j * Z + z] * chunk.step[j * Z + z];
          d_step[z] = chunk.slope[j * Z + z] * (LN_2 * chunk.d_step[j * Z + z] + chunk.d_u[j * Z + z] * x[z]);
        }
        if (g.d_x) lane.write(g.d_x + at, d_x);
        lane.write(g.d_step + at, d_step);
      }
    }
    const long sums = group * p.steps * p.rows * N;
    if (p.valid)
      for (long j = begin; j < end; ++j)
        if (const long t = Lane{p, row, 0}.time(j), at = sums + (t * p.rows + row) * N; !Lane{p, row, 0}.valid(t)) {
          std::fill(g.d_b + at, g.d_b + at + N, 0.0f);
          std::fill(g.d_c + at, g.d_c + at + N, 0.0f);
        }
    for (long j = 0; j < steps.count; ++j) {
      const long at = sums + (steps.times[j] * p.rows + row) * N;
      across(d_b + j * N, g.d_b + at, N);
      across(d_c + j * N, g.d_c + at, N);
    }
  }
  for (long k = 0; k < blocks; ++k) {
    const Lane lane{p, row, channel + k * LINE};
    lane.write_states(g.d_h, d_h + k * N * Z);
    lane.write_states(g.d_a, d_decay + k * N * Z);
  }
}

// What the backward pass of a fixed recurrence has of a pair of states: real and imaginary parts.
struct Pair {
  Vec a[2], b[2], c[2], h[2], fresh[2], d_a[2], d_b[2], d_c[2], d_h[2], d_fresh[2];
};

// One pair over a chunk, from the state h before it; `before` gets those before every step.
JAXRNN_INLINE void fixed_pair(Pair& pair, const Steps& steps, const Vec* x, const Vec* d_y, Vec* d_x, Vec* before) {
  const Vec *a = pair.a, *b = pair.b, *c = pair.c;
  Vec re = pair.h[0], im = pair.h[1];
  for (long j = 0; j < steps.count; ++j) {
    if (steps.starts[j]) re = pair.fresh[0], im = pair.fresh[1];
    before[2 * j] = re, before[2 * j + 1] = im;
    const Vec moved = a[0] * re - a[1] * im + b[0] * x[j * Z];
    im = a[0] * im + a[1] * re + b[1] * x[j * Z];
    re = moved;
  }
  Vec d_re = pair.d_h[0], d_im = pair.d_h[1], d_a[2] = {}, d_b[2] = {}, d_c[2] = {};
  for (long j = steps.count - 1; j >= 0; --j) {
    const Vec dy = d_y[j * Z], in = x[j * Z];
    d_c[0] += dy * re, d_c[1] -= dy * im;
    d_re += c[0] * dy, d_im -= c[1] * dy;
    re = before[2 * j], im = before[2 * j + 1];
    d_b[0] += d_re * in, d_b[1] += d_im * in;
    d_x[j * Z] += d_re * b[0] + d_im * b[1];
    d_a[0] += d_re * re + d_im * im, d_a[1] += d_im * re - d_re * im;
    const Vec moved = d_re * a[0] + d_im * a[1];
    d_im = d_im * a[0] - d_re * a[1];
    d_re = moved;
    if (steps.starts[j]) {
      pair.d_fresh[0] += d_re, pair.d_fresh[1] += d_im;
      d_re = d_im = Vec{};
      if (j) {  // the state after the step before, which is not the one that this step began with
        const Vec *last = before + 2 * (j - 1), in = x[(j - 1) * Z];
        re = a[0] * last[0] - a[1] * last[1] + b[0] * in;
        im = a[0] * last[1] + a[1] * last[0] + b[1] * in;
      }
    }
  }
  pair.d_h[0] = d_re, pair.d_h[1] = d_im;
  for (long k = 0; k < 2; ++k) pair.d_a[k] += d_a[k], pair.d_b[k] += d_b[k], pair.d_c[k] += 2.0f * d_c[k];
}

inline long fixed_floats(const DiagonalProblem& p) {
  const long L = std::min(p.chunk, p.steps);
  return LANES * (11 * p.states * Z + 3 * L * Z + 2 * L) + 4 * L + 16;
}

inline void fixed_backward(const Lane& lane, const DiagonalGradient& g, Vec* memory) {
  const DiagonalProblem& p = lane.p;
  const long N = p.states * Z, I = N / 2, L = std::min(p.chunk, p.steps);
  auto take = [&](long count) { return std::exchange(memory, memory + count); };
  Pair* pairs = reinterpret_cast<Pair*>(take(10 * N));
  Vec *x = take(L * Z), *d_y = take(L * Z), *d_x = take(L * Z), *before = take(2 * L), *h = take(N);
  Steps steps{reinterpret_cast<long*>(memory), reinterpret_cast<uint8_t*>(reinterpret_cast<long*>(memory) + L)};
  // An array of states or of weights is a member of all pairs.
  auto spread = [&](auto member) {
    for (long k = 0; k < N; ++k) (pairs[k % I].*member)[k / I] = h[k];
  };
  auto gather = [&](Real* to, auto member) {
    for (long k = 0; k < N; ++k) h[k] = (pairs[k % I].*member)[k / I];
    lane.write_states(to, h);
  };
  lane.read_weights(h, p.a, 1), spread(&Pair::a);
  lane.read_weights(h, p.b, 1), spread(&Pair::b);
  lane.read_weights(h, p.c, 2), spread(&Pair::c);
  lane.read_states(h, p.fresh), spread(&Pair::fresh);
  lane.read_states(h, g.d_last), spread(&Pair::d_h);
  lane.read_states(h, nullptr);
  for (auto member : {&Pair::d_a, &Pair::d_b, &Pair::d_c, &Pair::d_fresh}) spread(member);
  for (long begin = (p.steps - 1) / p.chunk * p.chunk; begin >= 0; begin -= p.chunk) {
    const long end = std::min(begin + p.chunk, p.steps);
    lane.read_states(h, p.kept + begin / p.chunk * p.rows * p.states * p.channels);
    steps.take(lane, begin, end);
    for (long j = 0; j < steps.count; ++j) {
      lane.read(x + j * Z, p.x + lane.at(steps.times[j]));
      lane.read(d_y + j * Z, g.d_ys + lane.at(steps.times[j]));
      for (long z = 0; z < Z; ++z) d_x[j * Z + z] = Vec{};
    }
    spread(&Pair::h);
    for (long k = 0; k < I; ++k) {
      fixed_pair(pairs[k], steps, x + k % Z, d_y + k % Z, d_x + k % Z, before);
    }
    if (p.valid)
      for (long k = begin; k < end; ++k)
        if (const long t = lane.time(k); !lane.valid(t)) {
          const Vec none[Z] = {};
          if (g.d_x) lane.write(g.d_x + lane.at(t), none);
        }
    for (long j = 0; g.d_x && j < steps.count; ++j) lane.write(g.d_x + lane.at(steps.times[j]), d_x + j * Z);
  }
  gather(g.d_h, &Pair::d_h);
  gather(g.d_a, &Pair::d_a);
  gather(g.d_b, &Pair::d_b);
  gather(g.d_c, &Pair::d_c);
  if (g.d_fresh) gather(g.d_fresh, &Pair::d_fresh);
}

inline void run_diagonal(const DiagonalProblem& p, int threads) {
  const long blocks = (p.channels + LINE - 1) / LINE, vectors = (p.step ? 2 : 4) * p.states * Z;
  in_turns(p.rows * blocks, p.rows * p.steps * p.channels * p.states, threads, [&](long task) {
    const Lane lane{p, task / blocks, task % blocks * LINE};
    Scratch scratch(vectors * LANES);
    Vec* memory = reinterpret_cast<Vec*>(scratch.take(vectors * LANES));
    if (p.step) selective_forward(lane, memory);
    else fixed_forward(lane, memory);
  });
}

// A task of the selective one is a group of blocks of a row.
inline void run_diagonal_backward(const DiagonalProblem& p, const DiagonalGradient& g, int threads) {
  const long blocks = (p.channels + LINE - 1) / LINE;
  if (!p.step)
    return in_turns(p.rows * blocks, p.rows * p.steps * p.channels * p.states, threads, [&](long task) {
      Scratch scratch(fixed_floats(p));
      Vec* memory = reinterpret_cast<Vec*>(scratch.take(fixed_floats(p)));
      fixed_backward(Lane{p, task / blocks, task % blocks * LINE}, g, memory);
    });
  in_turns(p.rows * p.groups, p.rows * p.steps * p.channels * p.states, threads, [&](long task) {
    const long row = task / p.groups, group = task % p.groups;
    const Range own = share(blocks, p.groups, group);
    Scratch scratch(selective_floats(p, own.size()));
    Vec* memory = reinterpret_cast<Vec*>(scratch.take(selective_floats(p, own.size())));
    selective_backward(p, g, row, own.begin * LINE, own.size(), group, memory);
  });
}
