// What the kernels of single steps read and write, for R rows. Each takes what a layer has computed of x by products, and
// does all that comes after them.

#pragma once
#include "numbers.h"

namespace jaxrnn::JAXRNN_NUMBERS {

// A delta rule. Features are those of q, k, v, β and, without `gate`, of the decay; G heads share Q of keys; n products.
struct DeltaStep {
  long rows, heads, key_heads, keys, values, products;
  long features, gates;             // F; as many as heads, as rows of all states, or none
  Real strength, bound;             // the largest β; of the logarithm of the decay, 0 for none
  const Real *x, *gate;             // (R, F), (R, gates)
  const Real *b_gate, *log_decay;   // (gates,), (G,)
  const Real* s;                    // (R, G, K, V)
  Real *last, *ys;                  // (R, G, K, V), (R, G V)
};

// RWKV-7. Features are those of r, k, v and, without `decay` and `rate`, of these.
struct Rwkv7Step {
  long rows, heads, keys, values, features;
  Real slowest, smallest, epsilon;
  const Real *x, *decay, *rate;                                     // (R, F), (R, G K)
  const Real *b_decay, *b_rate, *removal, *replacement, *bonus;     // (G K,)
  const Real *scale, *offset;                                       // (G V,)
  const Real* s;                                                    // (R, G, K, V)
  Real *last, *ys;                                                  // (R, G, K, V), (R, G V)
};

// S4D, of D channels with N states. Complex numbers are pairs.
struct S4dStep {
  long rows, channels, states;
  bool bilinear;
  const Real *x, *time;                 // (R, D), (R,) or null
  const Real *log_decay, *frequency;    // (D, N)
  const Real *log_step, *c, *d;         // (D,), (2, D, N), (D,)
  const Real* h;                        // (R, D, N, 2)
  Real *last, *ys;                      // (R, D, N, 2), (R, D)
};

// By the best instruction set that this processor has.
void delta_step(const DeltaStep& p, int threads);
void rwkv7_step(const Rwkv7Step& p, int threads);
void s4d_step(const S4dStep& p, int threads);

}  // namespace jaxrnn::JAXRNN_NUMBERS
