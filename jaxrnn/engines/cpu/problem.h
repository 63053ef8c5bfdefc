// One call: the arrays of a recurrence over T steps, B rows, D inputs and H units, and what is kept for the backward pass.
// A null pointer stands for what is absent.

#pragma once
#include <cstdint>
#include <limits>

#include "numbers.h"

namespace jaxrnn::JAXRNN_NUMBERS {

enum class Kind : int64_t { kElmanTanh = 0, kElmanRelu = 1, kLstm = 2, kGru = 3, kGruBefore = 4 };

// Gates of the products with x and h; and what is kept of a step, in multiples of H: its gates, and q = h w_hn + b_hn.
constexpr long gates_of(Kind kind) { return kind == Kind::kLstm ? 4 : kind >= Kind::kGru ? 3 : 1; }
constexpr long kept_of(Kind kind) { return kind >= Kind::kLstm ? (kind == Kind::kGruBefore ? 3 : 4) : 0; }

struct Sizes {
  long steps, rows, inputs, units;
  bool reverse, batch_major;
  // The step that is taken as number k, and where a step of a row lies in a sequence.
  long time(long k) const { return reverse ? steps - 1 - k : k; }
  long at(long t, long row) const { return batch_major ? row * steps + t : t * rows + row; }
};

// Sequences are (T, B, ·), or (B, T, ·) if batch-major.
struct Inputs {
  const Real* xs;                 // (T, B, D)
  const Real *w_x, *w_h;          // (D, G), (H, G)
  const Real *h, *c;              // (B, H), the carry before the first step
  const Real *fresh_h, *fresh_c;  // (B, H), the carry that a start begins from
  const uint8_t *valid, *start;    // (T, B)
};

struct Forward : Inputs {
  const Real *b, *b_hn;   // (G,), (H,)
  Real* ys;               // (T, B, H)
  Real *last_h, *last_c;  // (B, H)
  Real *kept, *cs;        // (T, B, kept · H), (T, B, H)
};

struct Backward : Inputs {
  const Real *ys, *kept, *cs;
  const Real *d_ys, *d_last_h, *d_last_c;  // cotangents of the results
  Real *d_xs, *d_w_x, *d_w_h, *d_h, *d_c, *d_fresh_h, *d_fresh_c, *d_b, *d_b_hn;
};

// Activations, in the order of their names in Python.
enum Activation {
  kIdentity, kAffine, kExponential, kRelu, kRelu6, kLeakyRelu, kThresholdedRelu, kElu, kCelu, kSelu, kGelu, kGeluTanh,
  kSilu, kHardSilu, kMish, kSoftplus, kSquareplus, kSoftshrink, kHardshrink, kTanhshrink, kTanh, kScaledTanh, kHardTanh,
  kSoftsign, kSigmoid, kLogSigmoid, kHardSigmoid, kKerasHardSigmoid,
  ACTIVATIONS
};
struct Choice {
  int64_t code;
  Real alpha, beta;
  // Whether the value tells the slope.
  bool tells_slope() const { return code == kIdentity || code == kRelu || code == kTanh || code == kSigmoid; }
};

// A family of gated cells with options. Those with a coupled gate have one gate less than an LSTM.
enum class Family : int64_t {
  kElman = 0, kIndRnn = 1, kLstm = 2, kCoupledLstm = 3, kGru = 4, kGruBefore = 5, kMgu = 6, kSlstm = 7
};
constexpr int FAMILIES = 8;
constexpr int MOST_STATES = 4;

// What the gates of such a cell do. φ acts on gates, ψ on the candidate, χ on c'.
struct Rule {
  Family family;
  Choice gate, candidate, output;
  Real gate_clip, cell_clip;  // infinite without one
  bool input;                  // of coupled gates: whether the gate that is there is i
  bool norm, projected;        // layer normalisation; a product between what the gates give and h
  bool zoned;                  // whether entries of the carry may stay
  Real stay[MOST_STATES];     // with this expectation, if no flags tell which ones
  long heads;                  // of a block-diagonal recurrent product

  long gates() const {
    switch (family) {
      case Family::kElman: case Family::kIndRnn: return 1;
      case Family::kMgu: return 2;
      case Family::kCoupledLstm: case Family::kGru: case Family::kGruBefore: return 3;
      default: return 4;
    }
  }
  bool lstm() const { return family == Family::kLstm || family == Family::kCoupledLstm; }
  bool reset_before() const { return family == Family::kGruBefore || family == Family::kMgu; }
  long states() const { return family == Family::kSlstm ? 4 : lstm() ? 2 : 1; }  // of which h is one
  // Columns of the product with h, in multiples of H, and sums that the gates read.
  long first() const { return family == Family::kIndRnn ? 0 : gates() - reset_before(); }
  long sums() const { return gates() + (family == Family::kGru); }
  // Vectors of H numbers that the gates read: their own; with a norm also gains for x and h, biases, and gain and bias of
  // the norm of c'.
  long own_theta() const {
    return family == Family::kIndRnn || family == Family::kGru ? 1 : lstm() ? gates() - 1 : 0;
  }
  long theta() const { return own_theta() + (norm ? 3 * gates() + (lstm() ? 2 : 0) : 0); }
  // Whether gates are kept of a step, from which a backward pass has all that it needs.
  bool keeps_gates() const {
    return family != Family::kSlstm && !norm && gate.tells_slope() && candidate.tells_slope() &&
           gate_clip == std::numeric_limits<Real>::infinity();
  }
  // Numbers that are kept of a step: gates or their sums; or, with a norm, the normalised products with x and h, c' of an
  // LSTM, and as many more as keep the next step in whole lines of the cache, of which the first are scales and means.
  static constexpr long STATS = 16;
  long before_stats(long units) const { return (2 * gates() + lstm()) * units; }
  long kept(long units) const { return norm ? before_stats(units) + STATS : sums() * units; }
};

// A gated recurrence with options. h has S units; there are E more states, side by side in `rest`.
struct StagedInputs {
  Rule rule;
  Sizes n;
  long outputs;                                // S
  const Real *xs, *w_x, *w_h, *w_2, *theta;   // (T, B, D), (D, G), (S, F), (H, H or S), (K, H)
  const Real *h, *rest, *fresh_h, *fresh_rest;  // (B, S), (B, E H)
  const uint8_t *valid, *start;                // (T, B)
  const Real* mask;                           // (B, S), which multiplies h where products read it
  const uint8_t *stay_h, *stay_rest;           // (T, B, S), (T, B, E H)
  long extra() const { return rule.states() - 1; }
};

struct StagedForward : StagedInputs {
  const Real* b;               // (G,)
  Real *ys, *last_h, *last_rest;  // (T, B, S), (B, S), (B, E H)
  Real *kept, *rests;             // (T, B, kept), (T, B, E H)
};

struct StagedBackward : StagedInputs {
  const Real *ys, *kept, *rests;
  const Real *d_ys, *d_last_h, *d_last_rest;
  bool weights;  // whether their cotangents are asked for
  Real *d_xs, *d_w_x, *d_w_h, *d_w_2, *d_theta, *d_h, *d_rest, *d_fresh_h, *d_fresh_rest, *d_b;
};

// A linear recurrence over T steps of R columns.
struct LinearProblem {
  long steps, columns;
  bool reverse, shifted;  // shifted: h_k = c_{k-1} + b_k, c_k = a_k h_k
  const Real *a, *b, *h;  // (T, R) or, constant, (1, R); (T, R); (R,)
  long a_steps;
  const uint8_t* cut;  // (T or 1, groups), each for R / groups columns, or null
  long cut_steps, cut_groups;
  Real *hs, *last;  // (T, R), (R,)
};

// An array of T steps of R rows and one or all of G heads.
struct Shared {
  const Real* data;  // null where it is absent
  long heads;
};

// A matrix recurrence: T steps, R rows, G heads, states (R, G, K, V). What is absent is null.
struct MatrixProblem {
  long steps, rows, heads, keys, values;
  bool reverse;
  long chunk;                    // steps between two states that are kept
  Shared q, k, u, w;             // (T, R, 1 or G, K)
  const Real *v, *s;            // (T, R, G, V), (R, G, K, V)
  Shared log_decay, beta;        // (T, R, 1 or G, 1 or K), (T, R, 1 or G)
  bool decay_by_row;             // K of them
  const uint8_t* start;          // (T, R)
  const Real* fresh;            // (R, G, K, V)
  Real *ys, *last;              // (T, R, G, V), (R, G, K, V)
  Real *reads, *states;         // (T, R, G, V), (chunks, R, G, K, V): kept by the forward pass, read by the other
};

// Cotangents, in the shapes of their arrays with all G heads.
struct MatrixGradient {
  const Real *d_ys, *d_last;
  Real *d_q, *d_k, *d_v, *d_s, *d_log_decay, *d_beta, *d_u, *d_w, *d_fresh;
};

// A diagonal recurrence: T steps, R rows of M members, D channels, N states of each. What is absent is null.
//
// Selective, with `step`: a are decays (M, N, D), b and c are (T, R, N). Fixed: a, b and c are (M, N, D), complex numbers
// with all real parts first, as all states are.
struct DiagonalProblem {
  long steps, rows, members, channels, states;
  bool reverse;
  long chunk, groups;            // steps between two states that are kept; sums of the cotangents of b and c
  const Real *x, *a, *b, *c, *h;  // (T, R, D), ..., (R, N, D)
  const Real *step, *fresh;     // (T, R, D), (R, N, D)
  const uint8_t *valid, *start;  // (T, R)
  Real *ys, *last, *kept;       // (T, R, D), (R, N, D), (chunks, R, N, D): read by the backward pass
};

// Cotangents in the shapes of their arrays; those of weights are of each row, and d_b and d_c of a selective recurrence
// are G sums over groups of channels. d_x is null where nobody asks.
struct DiagonalGradient {
  const Real *d_ys, *d_last;
  Real *d_x, *d_a, *d_b, *d_c, *d_h, *d_step, *d_fresh;
};

// What a single unit of a linear recurrence does; the names are those of cells. A signed one has g(v) = v, one in logs the
// logarithm of h as its state, and one with a skip a sum in place of x.
enum class Unit : int64_t {
  kMinGru = 0, kMinGruSigned = 1, kMinGruLogs = 2, kMinLstm = 3, kMinLstmSigned = 4, kMinLstmLogs = 5, kHgrn = 6,
  kSru = 7, kSruTanh = 8, kSruSkip = 9, kSruTanhSkip = 10, kQrnn = 11, kRgLru = 12, kLru = 13
};
constexpr int64_t UNITS = 14;
constexpr long sums_of(Unit unit) {
  switch (unit) {
    case Unit::kSruSkip: case Unit::kSruTanhSkip: return 4;
    case Unit::kMinLstm: case Unit::kMinLstmSigned: case Unit::kMinLstmLogs: return 3;
    case Unit::kSru: case Unit::kSruTanh: case Unit::kQrnn: return 3;
    default: return 2;
  }
}
constexpr long states_of(Unit unit) { return unit == Unit::kLru ? 2 : 1; }
constexpr long theta_of(Unit unit) { return unit == Unit::kLru ? 2 : unit == Unit::kRgLru ? 1 : 0; }
constexpr bool reads_x(Unit unit) {  // which has as many numbers as there are units
  return unit == Unit::kSru || unit == Unit::kSruTanh || unit == Unit::kRgLru;
}
constexpr bool projects(Unit unit) { return unit == Unit::kLru; }  // y is a product of h
constexpr bool gives_y(Unit unit) { return (unit >= Unit::kSru && unit <= Unit::kQrnn) || projects(unit); }  // not h

// T steps, R rows of M members, D inputs, H units, each of which has S sums, E states and K numbers θ. A weight has N
// heads: some inputs belong to some units. What is absent is null.
struct ElementwiseProblem {
  Unit unit;
  long steps, rows, members, inputs, units, heads;
  long taps = 1, outputs;                 // with L taps, a step reads its input and those of L − 1 steps before; P = E H,
                                          // unless the unit projects
  bool reverse;
  Real bound;                            // γ
  const Real *xs, *w, *h;                // (L − 1 + T, R, D), (M, N, L D / N, S H / N), (R, E H)
  const Real *b, *theta, *fresh, *w_y;   // (M, S H), (M, K H), (R, E H), (M, E H, P)
  const uint8_t *valid, *start, *begun;   // (T, R)
  Real *ys, *last, *hs;                  // (T, R, P), (R, E H), (T, R, E H): read by the backward pass, absent if ys are
  Real* sums;                            // (T, R, S H), too, or absent
};

// Cotangents in the shapes of their arrays, but d_xs is (T, R, L D); null where nobody asks.
struct ElementwiseGradient {
  const Real *d_ys, *d_last;
  Real *d_xs, *d_w, *d_h, *d_b, *d_theta, *d_fresh, *d_w_y;
};

constexpr int KINDS = 5;

// By the best instruction set that this processor has.
void forward(Kind kind, const Sizes& n, const Forward& p, int threads);
void backward(Kind kind, const Sizes& n, const Backward& p, int threads);
void linear(const LinearProblem& p, int threads);
void matrix(const MatrixProblem& p, int threads);
void matrix_backward(const MatrixProblem& p, const MatrixGradient& g, int threads);
void diagonal(const DiagonalProblem& p, int threads);
void diagonal_backward(const DiagonalProblem& p, const DiagonalGradient& g, int threads);
void elementwise(const ElementwiseProblem& p, int threads);
void elementwise_backward(const ElementwiseProblem& p, const ElementwiseGradient& g, int threads);
void staged(const StagedForward& p, int threads);
void staged_backward(const StagedBackward& p, int threads);
const char* instructions();

}  // namespace jaxrnn::JAXRNN_NUMBERS
