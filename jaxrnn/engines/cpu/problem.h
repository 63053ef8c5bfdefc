// One call: the arrays of a recurrence over T steps, B rows, D inputs and H units, and what is kept for the backward pass.
// A null pointer stands for what is absent.

#pragma once
#include <cstdint>

namespace jaxrnn {

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
  const float* xs;                 // (T, B, D)
  const float *w_x, *w_h;          // (D, G), (H, G)
  const float *h, *c;              // (B, H), the carry before the first step
  const float *fresh_h, *fresh_c;  // (B, H), the carry that a start begins from
  const uint8_t *valid, *start;    // (T, B)
};

struct Forward : Inputs {
  const float *b, *b_hn;   // (G,), (H,)
  float* ys;               // (T, B, H)
  float *last_h, *last_c;  // (B, H)
  float *kept, *cs;        // (T, B, kept · H), (T, B, H)
};

struct Backward : Inputs {
  const float *ys, *kept, *cs;
  const float *d_ys, *d_last_h, *d_last_c;  // cotangents of the results
  float *d_xs, *d_w_x, *d_w_h, *d_h, *d_c, *d_fresh_h, *d_fresh_c, *d_b, *d_b_hn;
};

// A linear recurrence over T steps of R columns.
struct LinearProblem {
  long steps, columns;
  bool reverse, shifted;  // shifted: h_k = c_{k-1} + b_k, c_k = a_k h_k
  const float *a, *b, *h;  // (T, R) or, constant, (1, R); (T, R); (R,)
  long a_steps;
  const uint8_t* cut;  // (T or 1, groups), each for R / groups columns, or null
  long cut_steps, cut_groups;
  float *hs, *last;  // (T, R), (R,)
};

constexpr int KINDS = 5;

// By the best instruction set that this processor has.
void forward(Kind kind, const Sizes& n, const Forward& p, int threads);
void backward(Kind kind, const Sizes& n, const Backward& p, int threads);
void linear(const LinearProblem& p, int threads);
const char* instructions();

}  // namespace jaxrnn
