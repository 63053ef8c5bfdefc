// One call: the arrays of a recurrence over T steps, B rows, D inputs and H units, and what is kept for the backward pass.
// A null pointer stands for what is absent.

#pragma once
#include <cstdint>

namespace jaxrnn {

enum class Kind : int64_t { kElmanTanh = 0, kElmanRelu = 1, kLstm = 2, kGru = 3, kGruBefore = 4 };

struct Sizes {
  long members, steps, rows, inputs, units;
};

// Gates of the products with x and h; and what is kept of a step, in multiples of H: its gates, and q = h w_hn + b_hn.
inline long gates_of(Kind kind) { return kind == Kind::kLstm ? 4 : kind >= Kind::kGru ? 3 : 1; }
inline long kept_of(Kind kind) { return kind == Kind::kGru ? 4 : gates_of(kind); }

struct Forward {
  const float *xs;                    // (T, B, D)
  const float *w_x, *b, *w_h, *b_hn;  // (D, G), (G,), (H, G), (H,)
  const float *h, *c;                 // (B, H), the carry before the first step
  const float *fresh_h, *fresh_c;     // (B, H), the carry that a start begins from
  const uint8_t *valid, *start;       // (T, B)
  float *ys;                          // (T, B, H)
  float *last_h, *last_c;             // (B, H)
  float *kept, *s, *c_before;         // (T, B, kept · H), (T, B, H), (T, B, H)
};

struct Backward {
  const float *w_h;
  const float *kept, *s, *c_before;
  const uint8_t *valid, *start;
  const float *d_ys, *d_last_h, *d_last_c;  // cotangents of the results
  float *d_u, *d_v;                         // (T, B, G) of x w_x + b; of h w_h + b_h where that is another
  float *d_h, *d_c, *d_fresh_h, *d_fresh_c;
};

// One member with this many threads; `reverse` runs from the last step to the first.
struct Kernels {
  void (*forward)(Kind, const Sizes&, bool reverse, const Forward&, int threads);
  void (*backward)(Kind, const Sizes&, bool reverse, const Backward&, int threads);
  const char* name;
};

const Kernels& kernels();  // of the best instruction set that this processor has

}  // namespace jaxrnn
