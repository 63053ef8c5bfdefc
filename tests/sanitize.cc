// Runs the kernels on problems drawn at random, from several threads at once, and compares every result with that of one
// thread. Built with sanitizers by sanitize.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "cell_steps.h"
#include "problem.h"
#include "threads.h"

using namespace jaxrnn;
using namespace jaxrnn::JAXRNN_NUMBERS;

// What is drawn, in arrays that are exactly as long as they must be.
struct Drawn {
  std::mt19937 rng;
  std::vector<std::vector<Real>> held;
  std::vector<std::vector<uint8_t>> flags_held;
  explicit Drawn(unsigned seed) : rng(seed) { held.reserve(64), flags_held.reserve(3); }

  long draw(long least, long most) { return std::uniform_int_distribution<long>(least, most)(rng); }
  Real* array(long size, Real mean = 0.0f) {
    std::normal_distribution<Real> normal(mean, 0.5f);
    held.emplace_back(size);
    for (Real& x : held.back()) x = normal(rng);
    return held.back().data();
  }
  Real* negative(long size) {
    Real* drawn = array(size);
    for (long k = 0; k < size; ++k) drawn[k] = -std::fabs(drawn[k]);
    return drawn;
  }
  static Real* within(Real* drawn, long size, Real bound) {
    for (long k = 0; k < size; ++k) drawn[k] = bound * std::tanh(drawn[k]);
    return drawn;
  }
  // True once in four times.
  uint8_t* flags(long size) {
    flags_held.emplace_back(size);
    for (uint8_t& flag : flags_held.back()) flag = draw(0, 3) == 0;
    return flags_held.back().data();
  }
};

// Results in arrays that are exactly as long as they must be, and hold another number before every run.
struct Results {
  std::vector<std::vector<Real>> found;
  Real before;
  explicit Results(int threads) : before(static_cast<Real>(threads)) { found.reserve(32); }
  Real* operator()(long size, bool there = true) {
    found.emplace_back(there ? size : 0, before);
    return there ? found.back().data() : nullptr;
  }
};

// A recurrence with gates.
struct Case : Drawn {
  Kind kind;
  Sizes n;
  bool flags, save;
  std::vector<uint8_t> valid, start;
  Forward forward{};
  Backward backward{};

  explicit Case(unsigned seed) : Drawn(seed) {
    kind = static_cast<Kind>(draw(0, KINDS - 1));
    n = Sizes{draw(0, 9), draw(1, 40), draw(1, 70), draw(1, 150), draw(0, 1) == 1, draw(0, 1) == 1};
    const bool stream = draw(0, 3) == 0;  // which has a kernel of its own
    if (stream) n.steps = 1, n.rows = draw(1, 2), n.units = draw(1, 420);
    flags = !stream && draw(0, 1), save = !stream && draw(0, 2) != 0;
    const bool lstm = kind == Kind::kLstm;
    const long T = n.steps, B = n.rows, D = n.inputs, H = n.units, G = gates_of(kind) * H;
    Inputs in{};
    in.xs = array(T * B * D), in.w_x = array(D * G), in.w_h = array(H * G), in.h = array(B * H);
    in.c = lstm ? array(B * H) : nullptr;
    if (flags) {
      for (long k = 0; k < T * B; ++k) valid.push_back(draw(0, 3) != 0), start.push_back(valid[k] && draw(0, 3) == 0);
      in.valid = valid.data(), in.start = start.data();
      in.fresh_h = array(B * H), in.fresh_c = lstm ? array(B * H) : nullptr;
    }
    static_cast<Inputs&>(forward) = static_cast<Inputs&>(backward) = in;
    forward.b = draw(0, 1) ? array(G) : nullptr;
    forward.b_hn = kind == Kind::kGru ? array(H) : nullptr;
    backward.d_ys = array(T * B * H), backward.d_last_h = array(B * H), backward.d_last_c = lstm ? array(B * H) : nullptr;
  }

  // Everything that the kernels give with so many threads, one after another.
  std::vector<std::vector<Real>> run(int threads) const {
    const bool lstm = kind == Kind::kLstm;
    const long T = n.steps, B = n.rows, D = n.inputs, H = n.units, G = gates_of(kind) * H;
    Results out(threads);
    Forward f = forward;
    f.ys = out(T * B * H), f.last_h = out(B * H), f.last_c = out(B * H, lstm);
    f.kept = out(T * B * kept_of(kind) * H, save && kept_of(kind)), f.cs = out(T * B * H, save && lstm);
    const int number = static_cast<int>(kind);
    jaxrnn::JAXRNN_NUMBERS::forward(kind, n, f, threads);
    if (!save) return out.found;
    Backward b = backward;
    b.ys = f.ys, b.kept = f.kept, b.cs = f.cs;
    b.d_xs = out(T * B * D), b.d_w_x = out(D * G), b.d_w_h = out(H * G), b.d_h = out(B * H), b.d_c = out(B * H, lstm);
    b.d_fresh_h = out(B * H, flags), b.d_fresh_c = out(B * H, flags && lstm);
    b.d_b = out(G, forward.b != nullptr), b.d_b_hn = out(H, kind == Kind::kGru);
    jaxrnn::JAXRNN_NUMBERS::backward(kind, n, b, threads);
    return out.found;
  }
};

// A linear recurrence; its expected results are those of a plain loop.
struct LinearCase {
  std::mt19937 rng;
  long T, R, groups;
  bool reverse, shifted, constant, cuts, constant_cut;
  std::vector<Real> a, b, h;
  std::vector<uint8_t> cut;

  explicit LinearCase(unsigned seed) : rng(seed) {
    auto draw = [&](long least, long most) { return std::uniform_int_distribution<long>(least, most)(rng); };
    std::normal_distribution<Real> normal(0.0f, 0.7f);
    groups = draw(1, 5), T = draw(0, 40);
    R = groups * (draw(0, 9) == 0 ? draw(2000, 9000) : draw(1, 300));
    reverse = draw(0, 1), shifted = draw(0, 1), constant = draw(0, 2) == 0, cuts = draw(0, 1), constant_cut = draw(0, 3) == 0;
    a.resize((constant ? 1 : T) * R), b.resize(T * R), h.resize(R);
    for (auto* array : {&a, &b, &h})
      for (Real& x : *array) x = normal(rng);
    for (Real& x : a) x *= 0.5f;  // so that no sum in which all digits cancel grows
    cut.resize((constant_cut ? 1 : T) * groups);
    for (uint8_t& flag : cut) flag = draw(0, 3) == 0;
  }

  std::vector<std::vector<Real>> run(int threads) const {
    std::vector<Real> hs(T * R, 7.0f), last(R, 7.0f);
    linear(LinearProblem{T, R, reverse, shifted, a.data(), b.data(), h.data(), constant ? 1 : T, cuts ? cut.data() : nullptr,
                         constant_cut ? 1 : T, groups, hs.data(), last.data()},
           threads);
    return {hs, last};
  }

  std::vector<std::vector<Real>> expected() const {
    std::vector<Real> hs(T * R), state = h;
    for (long k = 0; k < T; ++k) {
      const long t = reverse ? T - 1 - k : k;
      for (long r = 0; r < R; ++r) {
        const bool ends = cuts && cut[(constant_cut ? 0 : t) * groups + r / (R / groups)];
        const Real decay = a[(constant ? 0 : t) * R + r];
        if (shifted) hs[t * R + r] = state[r] + b[t * R + r], state[r] = ends ? 0 : decay * hs[t * R + r];
        else hs[t * R + r] = state[r] = (ends ? 0 : decay * state[r]) + b[t * R + r];
      }
    }
    return {hs, state};
  }
};

// A recurrence whose state is a matrix.
struct MatrixCase : Drawn {
  MatrixProblem p{};
  bool save;

  Shared shared(long width, bool negative = false) {
    const long heads = draw(0, 2) ? p.heads : 1, size = p.steps * p.rows * heads * width;
    return {negative ? this->negative(size) : array(size), heads};
  }

  explicit MatrixCase(unsigned seed) : Drawn(seed) {
    const long T = p.steps = draw(0, 70), R = p.rows = draw(1, 3), G = p.heads = draw(1, 3);
    const long K = p.keys = draw(1, 40), V = p.values = draw(1, 150);
    p.reverse = draw(0, 1), p.chunk = draw(1, 32), save = draw(0, 3) != 0;
    p.q = shared(K), p.k = shared(K), p.v = array(T * R * G * V), p.s = array(R * G * K * V);
    for (const Shared& keys : {p.q, p.k})
      for (long i = 0; i < T * R * keys.heads * K; ++i) const_cast<Real*>(keys.data)[i] *= 2.0f / std::sqrt(K);
    const long decay = draw(0, 2), update = draw(0, 2);
    p.decay_by_row = decay == 2;
    if (decay) p.log_decay = shared(p.decay_by_row ? K : 1, true);
    if (update == 1) p.beta = shared(1);
    if (update == 2) p.u = p.k, p.w = p.q;
    if (draw(0, 1)) p.start = this->flags(T * R);
    if (p.start && draw(0, 1)) p.fresh = array(R * G * K * V);
  }

  std::vector<std::vector<Real>> run(int threads) const {
    const long T = p.steps, R = p.rows, G = p.heads, K = p.keys, V = p.values, C = (T + p.chunk - 1) / p.chunk;
    const bool delta = p.beta.data, low_rank = p.u.data;
    Results out(threads);
    MatrixProblem f = p;
    f.ys = out(T * R * G * V), f.last = out(R * G * K * V);
    f.reads = out(T * R * G * V, save && (delta || low_rank)), f.states = out(C * R * G * K * V, save);
    matrix(f, threads);
    if (!save) return out.found;
    MatrixGradient g{};
    std::vector<Real> d_ys(T * R * G * V, 0.1f), d_last(R * G * K * V, 0.1f);
    g.d_ys = d_ys.data(), g.d_last = d_last.data();
    g.d_q = out(T * R * G * K), g.d_k = out(T * R * G * K), g.d_v = out(T * R * G * V), g.d_s = out(R * G * K * V);
    g.d_log_decay = out(T * R * G * (p.decay_by_row ? K : 1), p.log_decay.data), g.d_beta = out(T * R * G, delta);
    g.d_u = out(T * R * G * K, low_rank), g.d_w = out(T * R * G * K, low_rank);
    g.d_fresh = out(R * G * K * V, p.fresh);
    matrix_backward(f, g, threads);
    return out.found;
  }
};

// A diagonal recurrence that is read by a sum over its states.
struct DiagonalCase : Drawn {
  DiagonalProblem p{};
  bool save;

  explicit DiagonalCase(unsigned seed) : Drawn(seed) {
    const bool selective = draw(0, 1);
    const long T = p.steps = draw(1, 70), M = p.members = draw(1, 2), R = p.rows = M * draw(1, 2);
    const long D = p.channels = draw(1, 70), N = p.states = (selective ? 1 : 2) * draw(1, 20);
    p.reverse = draw(0, 1), p.chunk = draw(1, 64), save = draw(0, 3) != 0;
    p.groups = selective ? draw(1, std::min(D, 4l)) : 1;
    p.x = array(T * R * D), p.h = array(R * N * D), p.a = negative(M * N * D);
    p.b = array(selective ? T * R * N : M * N * D), p.c = array(selective ? T * R * N : M * N * D);
    if (selective) p.step = array(T * R * D);
    if (draw(0, 1)) p.valid = this->flags(T * R);
    if (draw(0, 1)) p.start = this->flags(T * R), p.fresh = array(R * N * D);
  }

  std::vector<std::vector<Real>> run(int threads) const {
    const long T = p.steps, R = p.rows, N = p.states, D = p.channels, C = (T + p.chunk - 1) / p.chunk;
    const long of_b = p.step ? p.groups * T * R * N : R * N * D;
    Results out(threads);
    DiagonalProblem f = p;
    f.ys = out(T * R * D), f.last = out(R * N * D), f.kept = out(C * R * N * D, save);
    diagonal(f, threads);
    if (!save) return out.found;
    DiagonalGradient g{};
    std::vector<Real> d_ys(T * R * D, 0.1f), d_last(R * N * D, 0.1f);
    g.d_ys = d_ys.data(), g.d_last = d_last.data();
    g.d_x = out(T * R * D), g.d_a = out(R * N * D), g.d_b = out(of_b), g.d_c = out(of_b), g.d_h = out(R * N * D);
    g.d_step = out(T * R * D, p.step), g.d_fresh = out(R * N * D, p.fresh);
    diagonal_backward(f, g, threads);
    return out.found;
  }
};

// A linear recurrence of single units with their products and gates.
struct ElementwiseCase : Drawn {
  ElementwiseProblem p{};
  bool save, all, keep;  // cotangents of inputs and weights; the sums

  explicit ElementwiseCase(unsigned seed) : Drawn(seed) {
    p.unit = static_cast<Unit>(draw(0, UNITS - 1));
    const long N = p.heads = draw(0, 2) ? 1 : draw(2, 4), M = p.members = draw(1, 3), R = p.rows = M * draw(1, 5);
    const long T = p.steps = draw(1, 90), H = p.units = N * draw(1, 40), D = p.inputs = reads_x(p.unit) ? H : N * draw(1, 30);
    const long E = states_of(p.unit), K = theta_of(p.unit), S = sums_of(p.unit);
    const long L = p.taps = N == 1 && !reads_x(p.unit) ? draw(1, 3) : 1;
    p.reverse = draw(0, 1), p.bound = 0.25f, save = draw(0, 3) != 0, all = draw(0, 2) != 0, keep = draw(0, 1);
    p.xs = array((T + L - 1) * R * D), p.w = array(M * L * D / N * S * H), p.h = array(R * E * H);
    p.outputs = projects(p.unit) ? draw(1, 70) : E * H;
    if (projects(p.unit)) p.w_y = array(M * E * H * p.outputs);
    if (draw(0, 1)) p.b = array(M * S * H);
    if (K) p.theta = E == 2 ? within(array(M * K * H), M * K * H, 0.7f) : negative(M * K * H);
    if (p.unit == Unit::kRgLru) p.begun = this->flags(T * R);
    if (draw(0, 1)) p.valid = this->flags(T * R);
    if (draw(0, 1)) p.start = this->flags(T * R), p.fresh = array(R * E * H);
  }

  std::vector<std::vector<Real>> run(int threads) const {
    const long T = p.steps, R = p.rows, H = p.units, D = p.taps * p.inputs, M = p.members, S = sums_of(p.unit);
    const long E = states_of(p.unit), K = theta_of(p.unit), P = p.outputs;
    Results out(threads);
    ElementwiseProblem f = p;
    f.ys = out(T * R * P), f.last = out(R * E * H);
    f.hs = out(T * R * E * H, save && (p.valid || gives_y(p.unit))), f.sums = out(T * R * S * H, save && keep);
    elementwise(f, threads);
    if (!save) return out.found;
    ElementwiseGradient g{};
    std::vector<Real> d_ys(T * R * P, 0.1f), d_last(R * E * H, 0.1f);
    g.d_ys = d_ys.data(), g.d_last = d_last.data(), g.d_h = out(R * E * H), g.d_fresh = out(R * E * H, p.fresh);
    g.d_xs = out(T * R * D, all), g.d_w = out(M * D / p.heads * S * H, all), g.d_b = out(M * S * H, all && p.b);
    g.d_theta = out(M * K * H, all && K), g.d_w_y = out(M * E * H * P, all && projects(p.unit));
    elementwise_backward(f, g, threads);
    return out.found;
  }
};

// A gated recurrence with options.
struct StagedCase : Drawn {
  StagedForward forward{};
  StagedBackward backward{};
  bool save;

  explicit StagedCase(unsigned seed) : Drawn(seed) {
    StagedInputs in{};
    Rule& rule = in.rule;
    rule.family = static_cast<Family>(draw(0, FAMILIES - 1));
    constexpr int64_t TANH = 20;
    const bool any = draw(0, 1);  // of which some have no bounds, so that numbers are clipped
    for (Choice* each : {&rule.gate, &rule.candidate, &rule.output})
      *each = {any ? draw(0, ACTIVATIONS - 1) : TANH, 0.5f, 0.6f};
    rule.gate_clip = rule.cell_clip = any ? 0.8f : INFINITY;
    rule.input = draw(0, 1), rule.zoned = draw(0, 2) == 0;
    const bool norm_known = rule.lstm() || rule.family == Family::kGru || rule.family == Family::kGruBefore;
    rule.norm = norm_known && draw(0, 1), rule.projected = rule.lstm() && draw(0, 1);
    rule.heads = rule.family == Family::kSlstm ? draw(1, 3) : 1;
    for (Real& each : rule.stay) each = rule.family == Family::kSlstm && &each != rule.stay ? 0.0f : 0.3f;
    const long T = draw(0, 9), B = draw(1, 40), D = draw(1, 70);
    const long H = rule.heads * draw(rule.norm ? 16 : 1, 50);  // a norm of few numbers makes much of rounding
    in.n = Sizes{T, B, D, H, draw(0, 1) == 1, draw(0, 1) == 1};
    const long S = in.outputs = rule.projected ? draw(1, 90) : H, E = in.extra() * H, G = rule.gates() * H;
    in.xs = array(T * B * D), in.w_x = array(D * G), in.h = array(B * S);
    if (rule.first()) in.w_h = heads(array(S * (rule.first() + rule.reset_before()) * H), rule, H);
    if (rule.projected) in.w_2 = array(H * S);
    if (rule.theta()) in.theta = array(rule.theta() * H);
    if (E) in.rest = array(B * E);
    if (draw(0, 1)) {
      uint8_t *valid = this->flags(T * B), *start = this->flags(T * B);
      for (long k = 0; k < T * B; ++k) valid[k] = !valid[k], start[k] = start[k] && valid[k];
      in.valid = valid, in.start = start, in.fresh_h = array(B * S), in.fresh_rest = E ? array(B * E) : nullptr;
    }
    if (draw(0, 1)) in.mask = array(B * S, 1.0f);
    if (rule.zoned && draw(0, 1)) in.stay_h = bits(T * B * S), in.stay_rest = E ? bits(T * B * E) : nullptr;
    static_cast<StagedInputs&>(forward) = static_cast<StagedInputs&>(backward) = in;
    forward.b = !rule.norm && draw(0, 1) ? array(G) : nullptr;
    backward.d_ys = array(T * B * S), backward.d_last_h = array(B * S), backward.d_last_rest = E ? array(B * E) : nullptr;
    save = draw(0, 2) != 0;
  }

  // Zeros between heads.
  static Real* heads(Real* w, const Rule& rule, long H) {
    const long size = H / rule.heads;
    for (long k = 0; rule.heads > 1 && k < H * 4 * H; ++k)
      if (k / (4 * H) / size != k % H / size) w[k] = 0;
    return w;
  }
  uint8_t* bits(long size) {
    stay.emplace_back(size);
    for (uint8_t& each : stay.back()) each = draw(0, 3) == 0;
    return stay.back().data();
  }
  std::vector<std::vector<uint8_t>> stay = [] {
    std::vector<std::vector<uint8_t>> none;
    none.reserve(2);
    return none;
  }();

  std::vector<std::vector<Real>> run(int threads) const {
    const Rule& rule = forward.rule;
    const Sizes& n = forward.n;
    const long T = n.steps, B = n.rows, D = n.inputs, H = n.units, S = forward.outputs, E = forward.extra() * H;
    const long G = rule.gates() * H;
    Results out(threads);
    StagedForward f = forward;
    std::vector<Real> kept(T * B * rule.kept(H), 7.0f), rests(T * B * E, 7.0f);  // nothing where a step is not valid
    f.ys = out(T * B * S), f.last_h = out(B * S), f.last_rest = out(B * E, E);
    if (save) f.kept = kept.data(), f.rests = E ? rests.data() : nullptr;
    staged(f, threads);
    if (!save) return out.found;
    StagedBackward b = backward;
    b.ys = f.ys, b.kept = f.kept, b.rests = f.rests;
    b.weights = true;
    b.d_xs = out(T * B * D), b.d_w_x = out(D * G), b.d_b = out(G, forward.b);
    b.d_w_h = out(S * (rule.first() + rule.reset_before()) * H, rule.first()), b.d_w_2 = out(H * S, rule.projected);
    b.d_theta = out(rule.theta() * H, rule.theta()), b.d_h = out(B * S), b.d_rest = out(B * E, E);
    b.d_fresh_h = out(B * S, b.start), b.d_fresh_rest = out(B * E, b.start && E);
    staged_backward(b, threads);
    return out.found;
  }
};

// One step of a cell.
struct StepCase : Drawn {
  DeltaStep delta{};
  Rwkv7Step rwkv7{};
  S4dStep s4d{};
  long of_state = 0, of_ys = 0;

  explicit StepCase(unsigned seed) : Drawn(seed) {
    const long R = draw(1, 4), Q = draw(1, 3), G = Q * draw(1, 2), K = draw(1, 40), V = draw(1, 150);
    switch (draw(0, 2)) {
      case 0: {
        DeltaStep& p = delta;
        p.rows = R, p.heads = G, p.key_heads = Q, p.keys = K, p.values = V, p.products = draw(1, 3);
        p.gates = draw(0, 2) * G, p.gates = p.gates > G ? G * K : p.gates;
        p.strength = 2, p.bound = draw(0, 1) ? -5 : 0;
        p.gate = p.gates && draw(0, 1) ? array(R * p.gates) : nullptr;
        p.features = (1 + p.products) * Q * K + p.products * G * (V + 1) + (p.gate ? draw(0, 9) : p.gates);
        p.x = array(R * p.features), p.b_gate = array(p.gates), p.log_decay = array(G), p.s = array(R * G * K * V);
        of_state = R * G * K * V, of_ys = R * G * V;
        break;
      }
      case 1: {
        Rwkv7Step& p = rwkv7;
        p.rows = R, p.heads = G, p.keys = K, p.values = V, p.slowest = 0.6f, p.smallest = 1e-12f, p.epsilon = 1e-5f;
        const bool apart = draw(0, 1);
        p.decay = apart ? array(R * G * K) : nullptr, p.rate = apart ? array(R * G * K) : nullptr;
        p.features = G * (2 * K + V) + (apart ? draw(0, 9) : 2 * G * K), p.x = array(R * p.features);
        p.b_decay = array(G * K), p.b_rate = array(G * K), p.removal = array(G * K), p.replacement = array(G * K);
        p.bonus = array(G * K), p.scale = array(G * V), p.offset = array(G * V), p.s = array(R * G * K * V);
        of_state = R * G * K * V, of_ys = R * G * V;
        break;
      }
      default: {
        S4dStep& p = s4d;
        const long D = p.channels = draw(1, 70), N = p.states = draw(1, 40);
        p.rows = R, p.bilinear = draw(0, 1), p.x = array(R * D), p.time = draw(0, 1) ? array(R) : nullptr;
        p.log_decay = array(D * N), p.frequency = array(D * N), p.log_step = array(D), p.c = array(2 * D * N);
        p.d = array(D), p.h = array(2 * R * D * N);
        of_state = 2 * R * D * N, of_ys = R * D;
      }
    }
  }

  std::vector<std::vector<Real>> run(int threads) const {
    Results out(threads);
    Real *last = out(of_state), *ys = out(of_ys);
    auto with_results = [&](auto p) { return p.last = last, p.ys = ys, p; };
    if (delta.rows) delta_step(with_results(delta), threads);
    if (rwkv7.rows) rwkv7_step(with_results(rwkv7), threads);
    if (s4d.rows) s4d_step(with_results(s4d), threads);
    return out.found;
  }
};

int main(int count, char** values) {
  const unsigned cases = count > 1 ? std::atoi(values[1]) : 200;
  std::atomic<int> wrong{0};
  auto compare = [&](unsigned seed, const auto& found, const auto& expected) {
    for (size_t k = 0; k < found.size(); ++k)
      for (size_t i = 0; i < found[k].size(); ++i)
        if (!(std::fabs(found[k][i] - expected[k][i]) <= 1e-4f + 1e-4f * std::fabs(expected[k][i]))) {
          std::printf("case %u, result %zu, number %zu: %g for %g\n", seed, k, i, found[k][i], expected[k][i]);
          ++wrong;
          i = found[k].size() - 1;
        }
  };
  auto work = [&](unsigned first) {
    for (unsigned seed = first; seed < cases; seed += 3) {
      auto alike = [&](const auto& one) {
        const auto expected = one.run(1);
        for (int threads : {2, 4}) compare(seed, one.run(threads), expected);
      };
      alike(Case(seed)), alike(MatrixCase(seed)), alike(DiagonalCase(seed)), alike(ElementwiseCase(seed));
      alike(StagedCase(seed)), alike(StepCase(seed));
      const LinearCase other(seed);
      for (int threads : {1, 2, 4}) compare(seed, other.run(threads), other.expected());
    }
  };
  std::vector<std::thread> threads;
  for (unsigned k = 0; k < 3; ++k) threads.emplace_back(work, k);
  for (auto& thread : threads) thread.join();
  std::printf("%u cases, %s, %d wrong\n", cases, instructions(), wrong.load());
  return wrong != 0;
}
