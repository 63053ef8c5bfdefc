// Single steps of cells as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#pragma once
#include <initializer_list>

#include "cell_steps.h"
#include "shapes.h"
#include "threads.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

using Complexes = ffi::Buffer<sizeof(Real) == 8 ? ffi::C128 : ffi::C64>;

ffi::Error delta(int64_t products, int64_t key_heads, double strength, double bound, Floats x, Floats gate, Floats b_gate,
                      Floats log_decay, Floats s, Written last, Written ys) {
  if (s.element_count() == 0) return ffi::Error::Success();
  Shapes shapes;
  const auto features = x.dimensions(), state = s.dimensions();
  if (features.size() != 2 || state.size() != 4 || key_heads < 1 || products < 1 || state[1] % key_heads) {
    shapes.fail("s");
    return shapes.error();
  }
  DeltaStep p{};
  p.rows = state[0], p.heads = state[1], p.keys = state[2], p.values = state[3];
  p.key_heads = key_heads, p.products = products, p.gates = b_gate.element_count();
  p.strength = static_cast<Real>(strength), p.bound = static_cast<Real>(bound);
  const long own = (1 + products) * key_heads * p.keys + products * p.heads * (p.values + 1);
  p.features = own + (gate.element_count() ? 0 : p.gates);
  // The features of what a gate was computed from may follow.
  if (features[0] != p.rows || features[1] < p.features || (p.gates && p.gates != p.heads && p.gates != p.heads * p.keys))
    shapes.fail("x");
  p.features = features[1];
  p.x = x.typed_data();
  p.gate = shapes.optional("gate", gate, {p.rows, p.gates});
  p.b_gate = b_gate.typed_data();
  p.log_decay = p.gates ? shapes.is("log_decay", log_decay, {p.heads}) : nullptr;
  p.s = s.typed_data();
  p.last = shapes.is("last", *last, {p.rows, p.heads, p.keys, p.values});
  p.ys = shapes.is("ys", *ys, {p.rows, p.heads * p.values});
  if (!shapes.failed()) delta_step(p, Pool::threads());
  return shapes.error();
}

ffi::Error rwkv7(double slowest, double smallest, double epsilon, Floats x, Floats decay, Floats rate, Floats b_decay,
                      Floats b_rate, Floats removal, Floats replacement, Floats bonus, Floats scale, Floats offset,
                      Floats s, Written last, Written ys) {
  if (s.element_count() == 0) return ffi::Error::Success();
  Shapes shapes;
  const auto features = x.dimensions(), state = s.dimensions();
  if (features.size() != 2 || state.size() != 4) {
    shapes.fail("s");
    return shapes.error();
  }
  Rwkv7Step p{};
  p.rows = state[0], p.heads = state[1], p.keys = state[2], p.values = state[3], p.features = features[1];
  p.slowest = static_cast<Real>(slowest), p.smallest = static_cast<Real>(smallest), p.epsilon = static_cast<Real>(epsilon);
  const long K = p.heads * p.keys, V = p.heads * p.values;
  p.decay = shapes.optional("decay", decay, {p.rows, K}), p.rate = shapes.optional("rate", rate, {p.rows, K});
  if (features[0] != p.rows || p.features < 2 * K + V + (p.decay && p.rate ? 0 : 2 * K)) shapes.fail("x");
  p.x = x.typed_data();
  p.b_decay = shapes.is("b_decay", b_decay, {K}), p.b_rate = shapes.is("b_rate", b_rate, {K});
  p.removal = shapes.is("removal", removal, {K}), p.replacement = shapes.is("replacement", replacement, {K});
  p.bonus = shapes.is("bonus", bonus, {K});
  p.scale = shapes.is("scale", scale, {V}), p.offset = shapes.is("offset", offset, {V});
  p.s = s.typed_data();
  p.last = shapes.is("last", *last, {p.rows, p.heads, p.keys, p.values});
  p.ys = shapes.is("ys", *ys, {p.rows, V});
  if (!shapes.failed()) rwkv7_step(p, Pool::threads());
  return shapes.error();
}

ffi::Error s4d(bool bilinear, Floats x, Floats time, Floats log_decay, Floats frequency, Floats log_step, Floats c,
                    Floats d, Complexes h, ffi::Result<Complexes> last, Written ys) {
  if (h.element_count() == 0) return ffi::Error::Success();
  Shapes shapes;
  const auto state = h.dimensions();
  if (state.size() != 3) {
    shapes.fail("h");
    return shapes.error();
  }
  S4dStep p{};
  const long R = p.rows = state[0], D = p.channels = state[1], N = p.states = state[2];
  p.bilinear = bilinear;
  p.x = shapes.is("x", x, {R, D}), p.time = shapes.optional("time", time, {R});
  p.log_decay = shapes.is("log_decay", log_decay, {D, N}), p.frequency = shapes.is("frequency", frequency, {D, N});
  p.log_step = shapes.is("log_step", log_step, {D}), p.c = shapes.is("c", c, {2, D, N}), p.d = shapes.is("d", d, {D});
  p.h = reinterpret_cast<const Real*>(h.typed_data());
  p.last = reinterpret_cast<Real*>(shapes.is("last", *last, {R, D, N}));
  p.ys = shapes.is("ys", *ys, {R, D});
  if (!shapes.failed()) s4d_step(p, Pool::threads());
  return shapes.error();
}

}  // namespace


#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_delta_step), delta,
                              ffi::Ffi::Bind().Attr<int64_t>("products").Attr<int64_t>("key_heads").Attr<double>("strength")
                                  .Attr<double>("bound") ARRAY ARRAY ARRAY ARRAY ARRAY RESULT RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_rwkv7_step), rwkv7,
                              ffi::Ffi::Bind().Attr<double>("slowest").Attr<double>("smallest").Attr<double>("epsilon")
                                  ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY RESULT RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_s4d_step), s4d,
                              ffi::Ffi::Bind().Attr<bool>("bilinear") ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY
                                  .Arg<Complexes>().Ret<Complexes>() RESULT);
#pragma GCC visibility pop

}  // namespace jaxrnn::JAXRNN_NUMBERS
